# SPDX-License-Identifier: Apache-2.0
"""The summary of a model: its rows and totals, and that looking at a model changes nothing."""

from __future__ import annotations

import contextlib
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from leyden.errors import LeydenWarning, MisconfigurationException
from leyden.summary import LayerSummary, ModelSummary, human_count, shape_of, summarize


class Net(nn.Module):
    """Two levels, a parameter of the model itself, and an example."""

    def __init__(self, example=None):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(256, 512), nn.BatchNorm1d(512), nn.Dropout(0.5))
        self.head = nn.Linear(512, 10)
        self.scale = nn.Parameter(torch.ones(3))
        if example is not None:
            self.example_input_array = example

    def forward(self, x):
        return self.head(self.net(x)) * self.scale.sum()


def test_rows_without_an_example():
    summary = ModelSummary(Net())
    assert summary.layer_names == ["net", "head"]
    assert summary.layer_types == ["Sequential", "Linear"]
    assert summary.param_nums == [132_608, 5_130]
    assert summary.in_sizes == summary.out_sizes == ["?", "?"]
    assert summary.training_modes == [True, True]
    assert summary.total_parameters == 132_608 + 5_130 + 3
    assert summary.total_layer_params == 132_608 + 5_130
    assert summary.total_training_modes == {"train": 5, "eval": 0}
    assert summary.total_flops == 0
    assert summary.model_size == pytest.approx(4 * summary.total_parameters / 1e6)


def test_sizes_and_flops_with_an_example():
    summary = summarize(Net(torch.zeros(10, 256)), max_depth=-1)
    assert summary.layer_names == ["net", "net.0", "net.1", "net.2", "head"]
    assert summary.in_sizes == [[10, 256], [10, 256], [10, 512], [10, 512], [10, 512]]
    assert summary.out_sizes == [[10, 512], [10, 512], [10, 512], [10, 512], [10, 10]]
    first, second = 2 * 10 * 256 * 512, 2 * 10 * 512 * 10
    assert [sum(counts.values()) for counts in summary.flop_counts.values()] == [first, first, 0, 0, second]
    assert summary.total_flops == first + second


def test_the_text_holds_the_table_and_the_totals():
    model = Net(torch.zeros(10, 256))
    model.net[1].eval()
    model.head.requires_grad_(False)
    text = str(ModelSummary(model))
    assert text.splitlines() == [
        "  | Name         | Type       | Params | Mode  | FLOPs | In sizes  | Out sizes",
        "-" * 78,
        "0 | net          | Sequential | 132 K  | train | 2.6 M | [10, 256] | [10, 512]",
        "1 | head         | Linear     | 5.1 K  | train | 102 K | [10, 512] | [10, 10]",
        "  | other params | n/a        | 3      | n/a   | n/a   | n/a       | n/a",
        "-" * 78,
        "Parameters: 137 K in all, 132 K trainable, 5.1 K frozen; 0.551 MB",
        "Modules: 4 in train mode, 1 in eval mode",
        "FLOPs: 2.7 M for one forward pass of the example input",
    ]


@pytest.mark.parametrize(
    ("depth", "names"), [(0, []), (1, ["net", "head"]), (2, ["net", "net.0", "net.1", "net.2", "head"])]
)
def test_depth(depth, names):
    summary = ModelSummary(Net(), max_depth=depth)
    assert summary.layer_names == names
    assert [name for name, _ in summary.named_modules] == names


@pytest.mark.parametrize("depth", [-2, 1.0, "1", True, None])
def test_a_depth_that_cannot_be(depth):
    with pytest.raises(MisconfigurationException, match=r"max_depth=.*-1 \(all levels\)"):
        ModelSummary(Net(), max_depth=depth)


class TwoInputs(nn.Module):
    def __init__(self, example):
        super().__init__()
        self.pair = Pair()
        self.example_input_array = example

    def forward(self, x, y=None):
        return self.pair(x, y=y)


class Pair(nn.Module):
    def forward(self, x, y=None):
        return [x, (x if y is None else y, "text")]


@pytest.mark.parametrize(
    "example",
    [
        (torch.zeros(2, 3), torch.zeros(4)),
        [torch.zeros(2, 3), torch.zeros(4)],
        {"y": torch.zeros(4), "x": torch.zeros(2, 3)},
    ],
)
def test_examples_of_several_inputs(example):
    summary = ModelSummary(TwoInputs(example))
    assert summary.in_sizes == [[[2, 3], [4]]]
    assert summary.out_sizes == [[[2, 3], [[4], "?"]]]


class Restless(nn.Module):
    """Draws from every generator, trains a BatchNorm against orders, counts and replaces its buffers."""

    def __init__(self, fail=False):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Dropout(0.5).eval()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(2))
        self.example_input_array = torch.arange(8.0).reshape(2, 4)
        self.fail = fail

    def forward(self, x):
        assert not self.training
        assert not torch.is_grad_enabled()
        self.norm.train()
        self.calls += 1
        self.replaced = torch.ones(2)
        x = self.norm(x + torch.rand(1) + random.random() + float(np.random.rand()))
        if self.fail:
            raise KeyError("mine")
        return x


@pytest.mark.parametrize("fail", [False, True])
def test_looking_changes_nothing(fail):
    model = Restless(fail)
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    replaced = model.replaced
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with pytest.raises(KeyError, match="mine") if fail else contextlib.nullcontext():
        ModelSummary(model, max_depth=-1)
    assert [module.training for module in model.modules()] == modes
    assert model.replaced is replaced
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert np.array_equal(np.random.get_state()[1], generators[2])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_lazy_parameters_count_zero_and_say_so():
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1))
    with pytest.warns(LeydenWarning, match="example_input_array"):
        assert ModelSummary(model).total_parameters == 4


def test_an_example_gives_lazy_layers_their_shape():
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d(), nn.Linear(3, 1))
    model.example_input_array = torch.zeros(2, 5)
    assert ModelSummary(model).param_nums == [18, 6, 4]


def test_the_precision_wraps_the_run():
    events = []

    class Half:
        def convert_input(self, data):
            events.append("convert")
            return data.to(torch.bfloat16)

        @contextlib.contextmanager
        def forward_context(self):
            events.append("enter")
            yield
            events.append("exit")

    model = nn.Sequential(nn.Linear(4, 2)).to(torch.bfloat16)
    model.example_input_array = torch.zeros(3, 4)
    summary = ModelSummary(model, precision=Half())
    assert summary.out_sizes == [[3, 2]]
    assert summary.model_size == pytest.approx(2 * 10 / 1e6)
    assert events == ["convert", "enter", "exit"]


def test_shared_parameters_are_not_counted_as_others():
    model = nn.Module()
    model.a = nn.Linear(4, 4, bias=False)
    model.b = nn.Linear(4, 4, bias=False)
    model.b.weight = model.a.weight
    model.own = nn.Parameter(torch.zeros(2))
    summary = ModelSummary(model)
    assert summary.param_nums == [16, 16]
    assert summary.total_parameters == 18
    assert dict(summary.columns)["Params"] == ["16", "16", "2"]


def test_a_layer_used_twice_shows_its_first_pass():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat = nn.Flatten()
            self.unused = nn.Linear(1, 1)
            self.example_input_array = torch.zeros(2, 3, 4)

        def forward(self, x):
            return self.flat(self.flat(x))

    summary = ModelSummary(Twice())
    assert summary.in_sizes == [[2, 3, 4], "?"]


def test_a_model_without_layers():
    assert str(ModelSummary(nn.Identity())).splitlines()[0].startswith("Parameters: 0 in all")


def test_scripted_layers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of newer versions of torch
        scripted = torch.jit.script(nn.Linear(2, 3))
    model = nn.Sequential(scripted)
    model.example_input_array = torch.zeros(1, 2)
    assert ModelSummary(model).in_sizes == ["?"]


def test_layer_summary_alone():
    layer = nn.Conv2d(3, 8, 3)
    summary = LayerSummary(layer)
    assert (summary.layer_type, summary.num_parameters, summary.in_size) == ("Conv2d", 224, "?")
    layer(torch.rand(1, 3, 5, 5))
    assert (summary.in_size, summary.out_size) == ([1, 3, 5, 5], [1, 8, 3, 3])
    assert not layer._forward_hooks
    summary.detach_hook()


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1234, "1.2 K"), (132_096, "132 K"), (2e6, "2.0 M"), (3e9, "3.0 B"), (5e15, "5,000 T")],
)
def test_human_count(number, text):
    assert human_count(number) == text


def test_shape_of_anything():
    assert shape_of((torch.zeros(2), [torch.zeros(1, 3)], None)) == [[2], [[1, 3]], "?"]
