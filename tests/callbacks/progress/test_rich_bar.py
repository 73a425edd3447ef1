# SPDX-License-Identifier: Apache-2.0
"""The default bar as it is seen: on a terminal, in a notebook, in a pipe (J1, J3)."""

from __future__ import annotations

import gc
import io
import os
import re
import subprocess
import sys
import textwrap
import threading
import types
import weakref
from pathlib import Path

import pytest
from rich.progress import TextColumn

from leyden.callbacks.progress import RichProgressBar, RichProgressBarTheme, default_bar
from leyden.types import TrainerFn

INF = float("inf")
HERE = Path(__file__).parent


def live_bar(width=100, **kwargs):
    """A bar on a terminal that is a string."""
    file = io.StringIO()
    console = {"file": file, "force_terminal": True, "width": width, "color_system": None, "legacy_windows": False}
    return RichProgressBar(console_kwargs={**console, **kwargs.pop("console", {})}, **kwargs), file


def screen(output):
    """What a terminal shows after it was sent ``output``: plays cursor-up, erase-line and carriage return."""
    lines, y, x = [""], 0, 0
    for token in re.findall(r"\x1b\[\??[\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", output):
        if token == "\n":
            y, x = y + 1, 0
            lines.extend([""] * (y + 1 - len(lines)))
        elif token == "\r":
            x = 0
        elif token.startswith("\x1b"):
            if token.endswith("A"):
                y = max(0, y - int(token[2:-1] or 1))
            elif token.endswith("K"):
                lines[y] = ""
        else:
            lines[y] = lines[y][:x].ljust(x) + token + lines[y][x + len(token) :]
            x += len(token)
    return [line.rstrip() for line in lines if line.strip()]


def passing(clock, seconds):
    def after_batch():
        clock.now += seconds

    return after_batch


def test_the_default_bar():
    bar = default_bar()
    assert isinstance(bar, RichProgressBar)
    assert (bar.refresh_rate, bar.is_enabled) == (100, True)


def test_J1_terminal(fake_trainer, clock):
    bar, file = live_bar()
    trainer = fake_trainer(batches=4, max_epochs=2, val=[2])
    trainer.after_batch = passing(clock, 0.5)
    trainer.metrics = {"loss": 0.12345, "lr": 1e-5, "[odd]": 1}
    trainer.fit(bar)
    (line,) = screen(file.getvalue())
    assert re.sub(r"━+", "━", line) == "Epoch 2/2  ━ 4/4 00:02<00:00 2.00it/s loss=0.123 lr=1.00e-05 [odd]=1"


def test_J1_terminal_while_it_validates(fake_trainer, clock):
    bar, file = live_bar()
    trainer = fake_trainer(batches=4, val=[2])
    trainer.after_batch = passing(clock, 0.5)
    shown = []
    original = trainer.after_batch

    def look():
        original()
        shown.append([line.split()[0] for line in screen(file.getvalue())])

    trainer.after_batch = look
    trainer.fit(bar)
    assert shown[1] == ["Sanity"]
    assert shown[-1] == ["Epoch", "Validation"]


def test_rows_that_are_left_behind(fake_trainer, clock):
    bar, file = live_bar(leave=True)
    trainer = fake_trainer(batches=2, max_epochs=3)
    trainer.after_batch = passing(clock, 0.5)
    trainer.fit(bar)
    assert [line.split()[1] for line in screen(file.getvalue())] == ["1/3", "2/3", "3/3"]


def test_unknown_totals(fake_trainer, clock):
    bar, file = live_bar()
    trainer = fake_trainer(batches=INF, max_epochs=1)
    trainer.after_batch = passing(clock, 0.5)
    trainer.fit(bar)
    (line,) = screen(file.getvalue())
    assert line.endswith("5/-- 00:02<? 2.00it/s")


def test_narrow_terminals_lose_no_metrics(fake_trainer, clock):
    bar, file = live_bar(width=70)
    trainer = fake_trainer(batches=2, max_epochs=1)
    trainer.metrics = {"train_loss": 0.5, "accuracy": 0.25, "learning_rate": 0.125}
    trainer.fit(bar)
    lines = screen(file.getvalue())
    assert [line.split()[-1] for line in lines] == ["train_loss=0.500", "accuracy=0.250", "learning_rate=0.125"]


def test_no_row_is_ever_drawn_without_its_numbers(fake_trainer, clock):
    bar, file = live_bar()
    trainer = fake_trainer(batches=2, max_epochs=2, val=[2])
    trainer.after_batch = passing(clock, 0.5)
    trainer.fit(bar)
    drawn = [line for line in re.split(r"\n|\x1b\[2K", file.getvalue()) if "━" in line]
    assert all(re.search(r"\d/\d", line) for line in drawn)
    assert len(drawn) > 8


def test_what_is_printed_meanwhile_goes_above(fake_trainer, clock):
    bar, file = live_bar()
    trainer = fake_trainer(batches=2, max_epochs=1)
    stdout = sys.stdout

    def after_batch():
        clock.now += 1
        print("from the user")
        bar.print("through the bar")

    trainer.after_batch = after_batch
    trainer.fit(bar)
    lines = screen(file.getvalue())
    assert lines[:-1] == ["from the user", "through the bar"] * 2
    assert lines[-1].startswith("Epoch")
    assert sys.stdout is stdout


@pytest.mark.parametrize("hook", ["on_exception", "teardown"])
def test_the_terminal_is_given_back(hook, fake_trainer, clock):
    threads = threading.active_count()
    bar, file = live_bar()
    trainer = fake_trainer()
    stdout, stderr = sys.stdout, sys.stderr
    bar.setup(trainer, None, "fit")
    bar.on_train_epoch_start(trainer, None)
    assert sys.stdout is not stdout
    getattr(bar, hook)(trainer, None, KeyboardInterrupt())
    assert (sys.stdout, sys.stderr) == (stdout, stderr)
    assert file.getvalue().endswith("\n\x1b[?25h")  # a new line, and the cursor is shown again
    assert threading.active_count() == threads


@pytest.mark.parametrize("fail", [False, True])
def test_E1_nothing_keeps_the_trainer_alive(fail, fake_trainer, clock):
    bar, _ = live_bar()
    gc.collect()
    gc.disable()
    try:
        trainer = fake_trainer(val=[2])
        alive = weakref.ref(trainer)
        if fail:
            bar.setup(trainer, None, "fit")
            bar.on_train_epoch_start(trainer, None)
            bar.on_exception(trainer, None, KeyError())
        else:
            trainer.fit(bar)
        del trainer
        assert alive() is None
    finally:
        gc.enable()


def test_theme_and_columns(fake_trainer, clock):
    class Mine(RichProgressBar):
        def configure_columns(self, trainer):
            assert trainer is self.trainer
            return [*super().configure_columns(trainer)[:1], TextColumn("at {task.completed}")]

    file = io.StringIO()
    theme = RichProgressBarTheme(description="red", metrics_text_delimiter="; ", metrics_format=".1f")
    bar = Mine(theme=theme, console_kwargs={"file": file, "force_terminal": True, "color_system": "standard"})
    trainer = fake_trainer(batches=2, max_epochs=1)
    trainer.metrics = {"a": 1.23, "b": 4.56}
    trainer.fit(bar)
    assert "\x1b[31mEpoch 1/1" in file.getvalue()
    assert screen(re.sub(r"\x1b\[[\d;]*m", "", file.getvalue())) == ["Epoch 1/1  at 2 a=1.2; b=4.6"]


def test_rate_zero_switches_it_off(fake_trainer, clock, capsys):
    bar, file = live_bar(refresh_rate=0)
    fake_trainer().fit(bar)
    assert bar.is_disabled
    assert file.getvalue() == capsys.readouterr().out == ""


def test_J1_pipe(fake_trainer, clock, capsys):
    trainer = fake_trainer(batches=4, max_epochs=2, val=[2])
    trainer.after_batch = passing(clock, 0.5)
    trainer.metrics = {"loss": 0.12345}
    trainer.fit(default_bar())
    assert capsys.readouterr().out.splitlines() == [
        "Epoch 1/2: 4/4 [2.0s, 2.00it/s] loss=0.123",
        "Epoch 2/2: 4/4 [2.0s, 2.00it/s] loss=0.123",
    ]
    trainer.run(default_bar(), TrainerFn.TESTING, "test")
    assert capsys.readouterr().out.splitlines() == ["Testing: 2/2 [1.0s, 2.00it/s]"]


def test_a_console_that_is_no_terminal_gets_plain_lines(fake_trainer, clock):
    file = io.StringIO()
    fake_trainer(max_epochs=1).fit(RichProgressBar(console_kwargs={"file": file}))
    assert file.getvalue() == "Epoch 1/1: 4/4 [0.0s, ?it/s]\n"


def test_J1_notebook(fake_trainer, clock, monkeypatch):
    outputs = []

    class Handle:
        def __init__(self, shown):
            outputs.append([shown])
            self.mine = outputs[-1]

        def update(self, shown):
            self.mine.append(shown)

    def display(shown, display_id):
        assert display_id is True
        return Handle(shown)

    ipython = types.ModuleType("IPython.display")
    ipython.display = display
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", ipython)
    stream = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
    monkeypatch.setattr(sys, "stdout", stream)
    trainer = fake_trainer(batches=2, max_epochs=2)
    trainer.after_batch = passing(clock, 0.5)
    trainer.fit(RichProgressBar())
    trainer.current_epoch = 0
    trainer.fit(RichProgressBar(leave=True))
    assert stream.getvalue() == ""
    last = [output[-1]._repr_mimebundle_([], []) for output in outputs]
    assert [re.search(r"Epoch \d/\d", bundle["text/plain"])[0] for bundle in last] == [
        "Epoch 2/2",
        "Epoch 1/2",
        "Epoch 2/2",
    ]
    assert all("2/2" in bundle["text/html"] for bundle in last)


SCRIPT = f"""
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("conftest", {str(HERE / "conftest.py")!r})
conftest = importlib.util.module_from_spec(spec)
spec.loader.exec_module(conftest)
from leyden.callbacks.progress import default_bar, TQDMProgressBar
bar = TQDMProgressBar() if "tqdm" in sys.argv else default_bar()
trainer = conftest.FakeTrainer(batches=3, max_epochs=2, val=[1])
module = trainer.lightning_module
if "fail" in sys.argv:
    try:
        bar.setup(trainer, module, "fit")
        bar.on_train_epoch_start(trainer, module)
        raise KeyError("mine")
    except KeyError as error:
        bar.on_exception(trainer, module, error)
        raise
trainer.fit(bar)
print("rich" in sys.modules)
"""


def run(*arguments, terminal, term="xterm", columns=100):
    """Run the script with its output on a pseudo-terminal or a pipe; return (exit code, output)."""
    environment = {**os.environ, "TERM": term, "COLUMNS": str(columns), "PYTHONPATH": os.pathsep.join(sys.path)}
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        environment.pop(name, None)
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), *arguments]
    if not terminal:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    chunks = []
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # Linux says so when the other side is closed
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(ours)
    return process.wait(), b"".join(chunks).decode().replace("\r\n", "\n")


def test_J1_J3_a_real_terminal():
    code, output = run(terminal=True)
    assert code == 0
    lines = screen(re.sub(r"\x1b\[[\d;]*m", "", output))
    assert lines[-2].startswith("Epoch 2/2  ━")
    assert lines[-1] == "True"
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h") == 1


@pytest.mark.parametrize(("terminal", "term"), [(True, "dumb"), (False, "xterm")])
def test_J1_J3_a_dumb_terminal_and_a_pipe_get_lines_without_rich(terminal, term):
    code, output = run(terminal=terminal, term=term)
    assert code == 0
    assert re.sub(r"\[.*?\]", "[]", output).splitlines() == ["Epoch 1/2: 3/3 []", "Epoch 2/2: 3/3 []", "False"]


def test_a_traceback_comes_after_the_bar():
    code, output = run("fail", terminal=True)
    assert code == 1
    lines = screen(re.sub(r"\x1b\[[\d;]*m", "", output))
    assert lines[0].startswith("Epoch 1/2")
    assert lines[1] == "Traceback (most recent call last):"
    assert lines[-1] == "KeyError: 'mine'"
    assert output.count("\x1b[?25h") == 1


def test_the_tqdm_bar_on_a_real_terminal():
    code, output = run("tqdm", terminal=True)
    assert code == 0
    lines = screen(output)
    assert re.fullmatch(r"Epoch 2/2: 100%\|█+\| 3/3 \[00:00<00:00, [\d.]+it/s\]", lines[-2])
    assert lines[-1] == "False"
