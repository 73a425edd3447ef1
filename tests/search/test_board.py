# SPDX-License-Identifier: Apache-2.0
"""What a search shows: lines, or a live table on a terminal."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import trial_functions as functions
from rich.console import Console

from leyden.search import HyperOptArgumentParser
from leyden.search.board import Board, LiveBoard, in_words, make_board, objective

TRIALS = [{"lr": 0.1}, {"lr": 0.2}, {"lr": 0.3}]


@pytest.mark.parametrize(
    ("value", "monitor", "expected"),
    [
        (0.5, None, 0.5),
        (torch.tensor(2.0), None, 2.0),
        (torch.ones(2), None, None),
        ({"loss": 1, "val_loss": 2}, None, 2.0),
        ({"loss": 1}, None, 1.0),
        ({"acc": 0.9}, None, None),
        ({"acc": 0.9}, "acc", 0.9),
        (None, None, None),
        ("3", None, None),
        (float("nan"), None, None),
    ],
)
def test_the_number_that_is_compared(value: Any, monitor: str | None, expected: float | None) -> None:
    assert objective(value, monitor) == expected


def test_the_values_of_a_trial_in_words() -> None:
    assert in_words({"lr": 0.1 + 0.2, "units": 8, "name": "a"}) == "lr=0.3 units=8 name=a"


@pytest.mark.parametrize(("mode", "best"), [("min", 1), ("max", 0)])
def test_lines_tell_what_runs_what_is_done_and_the_best_so_far(mode: str, best: int, capsys: Any) -> None:
    board = Board(TRIALS, None, mode)
    board.started(0, "GPU 1")
    board.finished(0, 0.5, None)
    board.started(1, "")
    board.output(1, "epoch 1")
    board.finished(1, 0.25, None)
    board.started(2, "")
    board.finished(2, None, "Traceback\nValueError: no\n")
    board.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "trial 0 starts on GPU 1: lr=0.1"
    assert lines[1].startswith("trial 0 done in 0.0 s: 0.5; 3 trials: 1 done, 2 waiting; best: trial 0, 0.5 (lr=0.1)")
    assert lines[3] == "trial 1 | epoch 1"
    assert lines[6].startswith("trial 2 failed after")
    assert lines[7:9] == ["Traceback", "ValueError: no"]
    assert lines[-1] == f"3 trials: 2 done, 1 failed; best: trial {best}, {[0.5, 0.25][best]} (lr={TRIALS[best]['lr']})"


def test_the_live_table_shows_running_done_failed_and_the_best() -> None:
    screen = io.StringIO()
    board = LiveBoard(TRIALS, None, "min", Console(file=screen, force_terminal=True, width=100, color_system=None))
    board.started(0, "GPU 0,1")
    board.finished(0, 0.5, None)
    board.started(1, "")
    board.finished(1, None, "Traceback: [bold]why[/bold]")
    board.output(1, "a line of [it]")
    board.started(2, "GPU 0,1")
    text = Console(file=io.StringIO(), width=100, record=True)
    text.print(board.table())
    board.close()
    shown = text.export_text()
    for words in ("0 done", "1 failed", "2 runs on GPU 0,1", "lr=0.3"):
        assert words in " ".join(shown.split())
    assert "1 done, 1 failed, 1 running; best: trial 0, 0.5 (lr=0.1)" in screen.getvalue()
    assert "Traceback: [bold]why[/bold]" in screen.getvalue()
    assert "trial 1 | a line of [it]" in screen.getvalue()


def test_the_live_table_keeps_the_best_when_many_have_ended() -> None:
    board = LiveBoard([{"n": n} for n in range(40)], None, "min", Console(file=io.StringIO(), width=100))
    for trial in range(40):
        board.started(trial, "")
        board.finished(trial, float(trial), None)
    assert board.table().row_count == 13
    board.close()


def test_a_terminal_gets_the_table_and_a_file_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(make_board(TRIALS, None, "min")) is Board
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", terminal)
    board = make_board(TRIALS, None, "min")
    board.close()
    assert type(board) is LiveBoard


def test_what_trials_print_is_passed_on_under_their_number(capfd: Any) -> None:
    parser = HyperOptArgumentParser()
    parser.opt_list("--x", type=int, default=0, options=[3, 4], tunable=True)
    parser.parse_args([]).optimize_parallel_cpu(functions.prints, None, 1)
    lines = capfd.readouterr().err.splitlines()
    assert "trial 0 starts: x=3" in lines
    assert "trial 0 | hello from 3" in lines
    assert "trial 1 | hello from 4" in lines
    assert lines.count("trial 0 | no end of line") == 1
