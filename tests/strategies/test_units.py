# SPDX-License-Identifier: Apache-2.0
"""Which layers are sharded each by itself."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, size_based_auto_wrap_policy, transformer_auto_wrap_policy

from leyden.errors import MisconfigurationException
from leyden.strategies import units


class Layer(nn.Module):
    """A block of 2 * width * width parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x))  # type: ignore[no-any-return]


class Model(nn.Module):
    """Two stacks of blocks, an embedding and a head."""

    def __init__(self, width: int = 256, words: int = 100) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.stack = nn.ModuleList(Layer(width) for _ in range(2))
        self.small = nn.Sequential(Layer(8), nn.Tanh(), Layer(8))
        self.named = nn.ModuleDict({"a": Layer(width), "b": nn.Sequential(Layer(width), Layer(width))})
        self.head = nn.Linear(width, words, bias=False)


def names(model: nn.Module, policy: Any = None) -> list[str]:
    found = {id(layer): name for name, layer in model.named_modules()}
    return [found[id(layer)] for layer in units.find(model, policy)]


def test_blocks_that_repeat_and_are_large_enough() -> None:
    with torch.device("meta"):
        assert names(Model()) == ["stack.0", "stack.1", "named.b.0", "named.b.1"]
        assert names(Model(words=units.LARGE // 256 + 1))[0] == "words"
        assert names(Layer(5)) == []


def test_a_layer_that_shares_a_weight_is_left_to_what_contains_both() -> None:
    with torch.device("meta"):
        model = Model(320, words=units.LARGE // 256 + 1)
        model.head.weight = model.words.weight
        model.stack[0].one.weight = model.named["a"].one.weight  # type: ignore[union-attr]
        model.stack[1].one.weight = model.stack[1].two.weight  # type: ignore[union-attr]
    assert names(model) == ["stack.1", "named.b.0", "named.b.1"]


def test_a_block_that_is_there_twice_is_found_once() -> None:
    with torch.device("meta"):
        model = Model()
        model.stack.append(model.stack[0])
    assert names(model).count("stack.0") == 1


@pytest.mark.parametrize(
    "policy",
    [
        {Layer},
        [Layer],
        lambda layer: isinstance(layer, Layer),
        ModuleWrapPolicy({Layer}),
        partial(transformer_auto_wrap_policy, transformer_layer_cls={Layer}),
    ],
)
def test_policies_that_name_classes(policy: Any) -> None:
    found = names(Model(), policy)
    assert found == ["stack.0", "stack.1", "small.0", "small.2", "named.a", "named.b.0", "named.b.1"]


def test_a_policy_that_goes_by_size_and_lists_of_layers_that_nobody_calls() -> None:
    policy = partial(size_based_auto_wrap_policy, min_num_params=100_000)
    found = names(Model(), policy)
    assert found == ["stack.0", "stack.1", "named.a", "named.b.0", "named.b.1"]
    assert names(Model(), lambda layer: isinstance(layer, (nn.ModuleList, nn.Sequential))) == ["small", "named.b"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_layer_counts_as_what_it_was() -> None:
    model = Model()
    model.stack[0] = torch.compile(model.stack[0], backend="eager")  # type: ignore[call-overload]
    assert names(model, {Layer})[:2] == ["stack.0", "stack.1"]
    assert names(model)[:2] == ["stack.0", "stack.1"]
    assert [id(layer) for layer in units.matching(model, {Layer}, "it")][:2] == [id(model.stack[0]), id(model.stack[1])]


def test_what_is_no_policy() -> None:
    for wrong in (3, "Layer"):
        with pytest.raises(MisconfigurationException, match="auto_wrap_policy"):
            units.find(nn.Linear(1, 1), wrong)
    with pytest.raises(MisconfigurationException, match="holds Linear"):
        units.find(nn.Linear(1, 1), {nn.Linear(1, 1)})


def test_scalars_and_the_rarer_dtype_stay_whole() -> None:
    model = nn.Module()
    model.scalar = nn.Parameter(torch.tensor(1.0))
    model.many, model.few = nn.Parameter(torch.zeros(9)), nn.Parameter(torch.zeros(3, dtype=torch.float64))
    model.frozen = nn.Parameter(torch.zeros(3, dtype=torch.float64), requires_grad=False)
    assert units.plain(model) == {model.scalar, model.few}
    assert units.plain(model, [model.many]) == {model.scalar, model.few, model.many}


def test_layers_without_memory_get_the_values_of_their_constructor() -> None:
    torch.manual_seed(2)
    expected = nn.Sequential(nn.Linear(3, 4), nn.MultiheadAttention(4, 2), nn.LayerNorm(4), nn.BatchNorm1d(4))
    with torch.device("meta"):
        built = nn.Sequential(nn.Linear(3, 4), nn.MultiheadAttention(4, 2), nn.LayerNorm(4), nn.BatchNorm1d(4))
    torch.manual_seed(2)
    for layer in units.inner_first(built):
        units.initialise(layer, torch.device("cpu"), filled=False)
    assert [*built.state_dict()] == [*expected.state_dict()]
    wrong = [name for name, value in expected.state_dict().items() if not torch.equal(value, built.state_dict()[name])]
    # an attention draws before its inner layer in its constructor, and after it here
    assert set(wrong) <= {"1.in_proj_weight", "1.out_proj.weight"}


def test_f5_a_layer_whose_weights_are_read_from_outside_is_left_to_what_reads_them() -> None:
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Transformer(8, 2, 1, 1, 16, batch_first=True), nn.MultiheadAttention(3200, 2), nn.Linear(8, 8)
        )
    kinds = [type(layer) for layer in units.find(model, {nn.Linear})]
    attentions = [nn.MultiheadAttention] * 2  # of the decoder, whose other layers are called
    assert kinds == [nn.TransformerEncoderLayer, *attentions, nn.Linear, nn.Linear, nn.MultiheadAttention, nn.Linear]
    assert [type(layer) for layer in units.find(model)] == [nn.MultiheadAttention]  # large, as is a layer inside of it
