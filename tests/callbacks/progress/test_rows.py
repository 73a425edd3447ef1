# SPDX-License-Identifier: Apache-2.0
"""Rows, their text, and plain lines."""

from __future__ import annotations

import io
import math

import pytest
import torch

from leyden.callbacks.progress.rows import (
    PlainDisplay,
    Row,
    format_clock,
    format_metric,
    format_rate,
    kind_of_output,
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "?"), (0, "00:00"), (59.9, "00:59"), (61, "01:01"), (3600, "1:00:00"), (90061, "25:01:01")],
)
def test_clock(seconds, text):
    assert format_clock(seconds) == text


@pytest.mark.parametrize(
    ("rate", "text"), [(None, "?it/s"), (0.25, "0.25it/s"), (47.54, "47.5it/s"), (1234.5, "1234it/s")]
)
def test_rate(rate, text):
    assert format_rate(rate) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.12345, "0.123"),
        (0.0, "0.000"),
        (1e-5, "1.00e-05"),
        (-2e-7, "-2.00e-07"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (3, "3"),
        ("abc", "abc"),
        (torch.tensor(0.5), "0.500"),
        (torch.tensor([7]), "7"),
        ({"a": 1}, "{'a': 1}"),
    ],
)
def test_metric(value, text):
    assert format_metric(value) == text


def test_rate_and_time_to_go_of_a_resumed_loop(clock):
    row = Row("Epoch 1", total=100)
    assert (row.rate, row.remaining_s) == (None, None)
    row.skipped, row.done = 50, 60
    row.look(clock.now + 5.0)
    assert (row.elapsed, row.rate, row.remaining_s) == (5.0, 2.0, 20.0)
    row.pause(2.5)
    row.look(clock.now + 5.0)
    assert row.rate == 4.0


def test_the_clock_is_looked_at_more_seldom_the_faster_the_loop(clock):
    def stride(rate):
        row = Row("Epoch 1")
        row.done = 1000
        row.look(clock.now + 1000 / rate)
        return row.next_look - row.done

    assert [stride(rate) for rate in (0.1, 10, 400, 1e6)] == [1, 1, 10, 32]


def test_a_total_that_was_wrong_or_unknown():
    row = Row("Epoch 1", total=3)
    row.done = 5
    assert row.finite_total == 5
    assert Row("Epoch 1", total=math.inf).finite_total is None


def test_plain_lines(clock):
    stream = io.StringIO()
    display = PlainDisplay(stream)
    row = Row("Epoch 3/10", total=57)
    row.done, row.elapsed, row.metrics = 57, 1.2, {"loss": 0.1234, "val_acc": 0.98, "v_num": 3}
    display.keep(row)
    row.done = 19
    display.draw([Row("outer"), row])
    row.total, row.elapsed, row.metrics = math.inf, 90.0, {}
    display.draw([row])
    display.keep(Row("Validation", main=False))
    display.print("hello")
    display.close()
    assert stream.getvalue().splitlines() == [
        "Epoch 3/10: 57/57 [1.2s, 47.5it/s] loss=0.123 val_acc=0.98 v_num=3",
        "Epoch 3/10: 19/57 [1.2s<00:02, 15.8it/s] loss=0.123 val_acc=0.98 v_num=3",
        "Epoch 3/10: 19/? [01:30<?, 0.21it/s]",
        "hello",
    ]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def stream_of(module, terminal=False):
    return type("OutStream", (Terminal if terminal else io.StringIO,), {"__module__": module})()


def test_where_output_goes(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    closed = Terminal()
    closed.isatty = lambda: (_ for _ in ()).throw(ValueError("closed"))
    assert kind_of_output(Terminal()) == "terminal"
    assert kind_of_output(io.StringIO()) == kind_of_output(None) == kind_of_output(closed) == "plain"
    assert kind_of_output(object()) == "plain"
    assert kind_of_output(stream_of("ipykernel.iostream")) == "notebook"
    spyder = type("TTYOutStream", (type(stream_of("ipykernel.iostream", True)),), {"__module__": "spyder_kernels.x"})
    assert kind_of_output(spyder()) == "plain"
    monkeypatch.setenv("TERM", "dumb")
    assert kind_of_output(Terminal()) == "plain"
