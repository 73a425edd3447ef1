# SPDX-License-Identifier: Apache-2.0
"""Plans of tensor parallelism: names, ways to split, and what is said of those that are not possible."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from leyden.errors import MisconfigurationException
from leyden.strategies.tensor.plan import checked, described, grouped, resolved, tied
from tensor_models import GPT, Llama, Perceptron


def test_the_later_of_two_entries_counts_and_words_have_other_names() -> None:
    plan = checked({"*.c_fc": "colwise", "*.c_proj": "ROWWISE", "blocks.1.*": "replicate", "lm_head": "replicate"})
    assert resolved(plan, GPT(), 2) == {
        "blocks.0.mlp.c_fc": "colwise", "blocks.0.attn.c_proj": "rowwise", "blocks.0.mlp.c_proj": "rowwise",
    }  # fmt: skip
    assert checked({"a": "colwise_rep", "b": "sequence_parallel"}) == {"a": "colwise_gather", "b": "sequence"}
    own = {"net.0": ColwiseParallel(), "net.3": RowwiseParallel()}
    assert resolved(checked(own), Perceptron(), 2) == own


def test_of_what_a_pattern_names_only_layers_that_can_be_split_are() -> None:
    assert set(resolved({"blocks.0.mlp*": "colwise"}, GPT(), 2)) == {"blocks.0.mlp.c_fc", "blocks.0.mlp.c_proj"}


@pytest.mark.parametrize(
    ("plan", "module", "size", "message"),
    [
        ({"nett.0": "colwise"}, Perceptron, 2, "names 'nett.0', but no layer has that name. Did you mean 'net.0'"),
        ({"0": "colwise"}, Perceptron, 2, r"Did you mean '\*.0'\? Layers that can be split: net"),
        ({"*.gate": "colwise"}, Llama, 2, "no layer has that name"),
        ({"norm": "colwise"}, Perceptron, 2, "LayerNorm cannot be split so"),
        ({"head": "colwise"}, Perceptron, 2, "its 1 outputs cannot be shared out evenly among tensor_parallel_size=2"),
        ({"net.0": "rowwise_split"}, Perceptron, 3, "its 4 inputs cannot be shared out evenly"),
        ({"wpe": "rowwise"}, GPT, 3, "its 8 rows cannot be shared out evenly"),
        ({"wpe": "colwise"}, GPT, 3, "its 16 features cannot be shared out evenly"),
        ({"*.c_attn": "colwise"}, lambda: GPT(heads=1), 2, "the 1 heads of Attention cannot be shared out evenly"),
        ({"wte": "rowwise"}, GPT, 2, "have one weight, so they must be split along the same dimension"),
        ({"wte": "colwise", "lm_head": "colwise_gather"}, GPT, 2, "have one weight"),
    ],
)
def test_what_is_not_possible_is_told(plan: Any, module: Any, size: int, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        resolved(checked(plan), module(), size)


def test_layers_with_one_weight_are_found_and_may_be_split_alike() -> None:
    assert [sorted(names) for names in tied(GPT())] == [["lm_head", "wte"]]
    assert len(resolved({"wte": "rowwise", "lm_head": "colwise_gather"}, GPT(), 2)) == 2


def test_what_is_split_is_told_in_few_lines() -> None:
    plan = {"a.0.up": "colwise", "a.1.up": "colwise", "head": ColwiseParallel()}
    text = described(plan, {"a.0.attn": "left whole", "a.1.attn": "left whole"}, 4)
    assert text.splitlines() == [
        "Tensor parallel on 4 devices:",
        "  colwise (outputs are split and stay so): a.*.up (2)",
        "  ColwiseParallel: head",
        "  a.*.attn: left whole",
    ]
    assert grouped(["a.0.b", "a.12.b", "c.1"]) == {"a.*.b": 2, "c.1": 1}
    assert described({}, {}, 2).endswith("nothing is split.")


def test_a_module_without_children_has_nothing_to_split() -> None:
    with pytest.raises(MisconfigurationException, match="Layers that can be split: none"):
        resolved({"a": "colwise"}, nn.ReLU(), 2)
