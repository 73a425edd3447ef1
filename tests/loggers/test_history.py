# SPDX-License-Identifier: Apache-2.0
"""History: the rows of a run in memory."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch

from leyden.loggers import History


@pytest.fixture
def history():
    history = History()
    history.append({"loss": 1.0, "epoch": 0}, 0)
    history.append({"val": torch.tensor(0.5)}, 0)
    history.append({"loss": 0.25, "epoch": 1}, 10)
    return history


def test_rows(history):
    assert list(history) == [
        {"step": 0, "loss": 1.0, "epoch": 0},
        {"step": 0, "val": 0.5},
        {"step": 10, "loss": 0.25, "epoch": 1},
    ]
    assert len(history) == 3
    assert history[-1] == {"step": 10, "loss": 0.25, "epoch": 1}
    assert history[1:] == list(history)[1:]
    assert list(reversed(history)) == list(history)[::-1]
    assert history.index({"step": 0, "val": 0.5}) == 1
    with pytest.raises(IndexError):
        history[3]


def test_columns(history):
    assert history.names == ["loss", "epoch", "val"]
    assert history.column("loss") == [(0, 1.0), (10, 0.25)]
    assert history.column("missing") == []
    assert history.last == {"loss": 0.25, "epoch": 1, "val": 0.5}


def test_tensors_are_read_as_numbers(history):
    assert type(history[1]["val"]) is float
    assert type(history.last["val"]) is float
    assert type(history.column("val")[0][1]) is float
    assert type(history[0]["epoch"]) is int


def test_a_row_that_was_read_may_be_changed(history):
    history[0]["loss"] = 7.0
    assert history[0]["loss"] == 1.0


def test_empty():
    history = History()
    assert not history
    assert (history.names, history.last, list(history)) == ([], {}, [])
    assert repr(history) == "History(0 rows of nothing)"


def test_repr(history):
    assert repr(history) == "History(3 rows of loss, epoch, val)"


def test_to_pandas_hands_over_rows_and_columns(history, monkeypatch):
    fake = types.ModuleType("pandas")
    fake.DataFrame = lambda rows, columns: (rows, columns)
    monkeypatch.setitem(sys.modules, "pandas", fake)
    assert history.to_pandas() == (list(history), ["step", "loss", "epoch", "val"])


@pytest.mark.skipif(importlib.util.find_spec("pandas") is None, reason="pandas is not installed")
def test_to_pandas(history):
    frame = history.to_pandas()
    assert list(frame.columns) == ["step", "loss", "epoch", "val"]
    assert frame["loss"].dropna().tolist() == [1.0, 0.25]
