# SPDX-License-Identifier: Apache-2.0
"""The one-line bar: its format, its place, and what it does on streams that are no terminal."""

from __future__ import annotations

import io
import re
import sys

import pytest

from leyden.callbacks.progress import TQDMProgressBar, tqdm_bar
from leyden.callbacks.progress.rows import Row
from leyden.callbacks.progress.tqdm_bar import LineDisplay, format_line
from leyden.errors import LeydenWarning

INF = float("inf")


class Terminal(io.TextIOWrapper):
    def __init__(self, encoding="utf-8"):
        super().__init__(io.BytesIO(), encoding=encoding, newline="\n")

    def isatty(self):
        return True

    def text(self):
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    # not here: pytest puts its own stderr in place once more when the test begins
    terminal.install = lambda: monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


def row(done=40, total=100, elapsed=4.0, **metrics):
    row = Row("Epoch 1/3", total=total)
    row.done, row.elapsed, row.metrics = done, elapsed, metrics
    return row


def test_format():
    assert (
        format_line(row(loss=0.12, v_num=10), 80)
        == ("Epoch 1/3:  40%|████      | 40/100 [00:04<00:06, 10.0it/s, loss=0.120, v_num=10]"[:79])
    )
    assert format_line(row(), 60, "#") == "Epoch 1/3:  40%|####       | 40/100 [00:04<00:06, 10.0it/s]"
    assert format_line(row(total=INF), 80) == "Epoch 1/3: 40/? [00:04<?, 10.0it/s]"
    assert format_line(row(done=0, total=0, elapsed=0.0), 60).startswith("Epoch 1/3: 100%|")
    assert len(format_line(row(), 200)) < 100
    assert len(format_line(row(long_name=1.0), 30)) == 29


def test_one_line_is_written_over(fake_trainer, clock, terminal, capsys):
    trainer = fake_trainer(batches=2, max_epochs=2, val=[1])
    trainer.metrics = {"loss": 0.5}

    def after_batch():
        clock.now += 1

    trainer.after_batch = after_batch
    terminal.install()
    trainer.fit(TQDMProgressBar())
    parts = [part.strip() for part in terminal.text().split("\r") if part.strip()]
    assert terminal.text().count("\n") == 1
    assert terminal.text().endswith("\n")
    assert [part.split(":")[0] for part in parts] == (
        ["Sanity Checking"] * 2
        + ["Epoch 1/2"] * 2
        + ["Validation"]
        + ["Epoch 2/2"] * 2
        + ["Validation"]
        + ["Epoch 2/2"]
    )
    assert re.fullmatch(r"Epoch 2/2: 100%\|█+\| 2/2 \[00:02<00:00, 1.00it/s, loss=0.500\]", parts[-1])
    assert capsys.readouterr().out == ""


def test_lines_that_are_left_behind(fake_trainer, clock, terminal):
    terminal.install()
    fake_trainer(batches=2, max_epochs=3).fit(TQDMProgressBar(leave=True))
    lines = [line.split("\r")[-1].split(":")[0] for line in terminal.text().split("\n")]
    assert lines == ["Epoch 1/3", "Epoch 2/3", "Epoch 3/3", ""]


def test_a_shorter_line_wipes_out_a_longer_one():
    stream = Terminal()
    display = LineDisplay(stream)
    display.draw([row(name=1.0)])
    display.draw([row()])
    first, second = stream.text().split("\r")[1:]
    assert len(second) == len(first)


def test_print_lifts_the_line():
    stream = Terminal()
    display = LineDisplay(stream)
    display.draw([row()])
    line = stream.text()
    display.print("hello", file=stream)
    assert stream.text()[len(line) :].split("\r")[-2:] == ["hello\n", line.strip("\r")]


def test_position():
    stream = Terminal()
    LineDisplay(stream, position=2).draw([row()])
    assert stream.text().startswith("\n\n\r")
    assert stream.text().endswith("\x1b[2A")


def test_streams_without_blocks():
    stream = Terminal("ascii")
    LineDisplay(stream).draw([row()])
    assert "####" in stream.text()


def test_plain_lines_where_there_is_no_terminal(fake_trainer, clock, capsys):
    fake_trainer(batches=2, max_epochs=2).fit(TQDMProgressBar())
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == ["Epoch 1/2: 2/2 [0.0s, ?it/s]", "Epoch 2/2: 2/2 [0.0s, ?it/s]"]


def test_arguments():
    bar = TQDMProgressBar(refresh_rate=5, process_position=2)
    assert (bar.refresh_rate, bar.process_position, bar.is_enabled) == (5, 2, True)
    assert not TQDMProgressBar(refresh_rate=0).is_enabled


def test_hooks_that_would_never_be_called_are_named(monkeypatch):
    monkeypatch.setattr(tqdm_bar, "_has_tqdm", lambda: False)
    with pytest.warns(LeydenWarning, match="Mine.init_train_tqdm will not be called"):

        class Mine(TQDMProgressBar):
            def init_train_tqdm(self):
                return None
