# SPDX-License-Identifier: Apache-2.0
"""The callbacks that print the summary: where, when, and how they are customised."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
import rich
import torch
from rich.console import Console
from torch import nn

from leyden.callbacks.model_summary import ModelSummary, RichModelSummary


def trainer(main=True):
    return SimpleNamespace(is_global_zero=main, strategy=SimpleNamespace())


@pytest.fixture
def model():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    model.example_input_array = torch.zeros(2, 4)
    return model


def test_prints_to_stdout_when_fit_begins(model, capsys):
    ModelSummary().on_fit_start(trainer(), model)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split(" | ")[1:4] == ["Name", "Type  ", "Params"]
    assert len(lines) <= 2 + 6


def test_is_silent_on_other_ranks_and_at_depth_zero(model, capsys):
    ModelSummary().on_fit_start(trainer(main=False), model)
    ModelSummary(max_depth=0).on_fit_start(trainer(), model)
    assert capsys.readouterr().out == ""


def test_the_precision_of_the_strategy_is_used(capsys):
    class Half:
        def convert_input(self, data):
            return data.half()

        def forward_context(self):
            return torch.autocast("cpu", enabled=False)

    model = nn.Sequential(nn.Linear(4, 3)).half()
    model.example_input_array = torch.zeros(2, 4)
    view = SimpleNamespace(is_global_zero=True, strategy=SimpleNamespace(precision=Half()))
    ModelSummary().on_fit_start(view, model)
    assert "[2, 3]" in capsys.readouterr().out


def test_summarize_can_be_overridden(model):
    seen = {}

    class Mine(ModelSummary):
        @staticmethod
        def summarize(
            summary_data,
            total_parameters,
            trainable_parameters,
            model_size,
            total_training_modes,
            total_flops,
            **summarize_kwargs,
        ):
            seen.update(locals())

    Mine(max_depth=1, colour="red").on_fit_start(trainer(), model)
    assert [heading for heading, _ in seen["summary_data"]] == [
        " ", "Name", "Type", "Params", "Mode", "FLOPs", "In sizes", "Out sizes",
    ]  # fmt: skip
    assert (seen["total_parameters"], seen["trainable_parameters"]) == (15, 15)
    assert seen["model_size"] == pytest.approx(60e-6)
    assert seen["total_training_modes"] == {"train": 2, "eval": 0}
    assert seen["total_flops"] == 2 * 2 * 4 * 3
    assert seen["summarize_kwargs"] == {"colour": "red"}


def test_rich_table(model, monkeypatch):
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="truecolor")
    monkeypatch.setattr(rich, "get_console", lambda: console)
    RichModelSummary(header_style="bold red").on_fit_start(trainer(), model)
    text = console.file.getvalue()
    assert "\x1b[1;31m" in text  # the style of the headings
    assert "[2, 4]" in text  # not swallowed as markup
    assert "Total params:" in text
    assert "Total FLOPs:" in text
