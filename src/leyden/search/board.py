# SPDX-License-Identifier: Apache-2.0
"""Shows a search while it runs: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

_SHOWN = 12
"""So many finished trials stay on the live table."""


def objective(value: Any, monitor: str | None) -> float | None:
    """Return the number by which a trial is compared: ``value`` itself, or what a dict holds under ``monitor``.

    ``monitor`` None looks for ``val_loss``, then ``loss``. None if there is no such number.
    """
    if isinstance(value, Mapping):
        names = ("val_loss", "loss") if monitor is None else (monitor,)
        value = next((value[name] for name in names if name in value), None)
    if value is None or isinstance(value, (str, bytes)):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several values
        return None
    return None if number != number else number


def in_words(values: Mapping[str, Any]) -> str:
    """Return ``lr=0.1 units=8``."""
    return " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
    )


class Board:
    """Writes a line to stderr for all that happens; the base of the live table.

    Args:
        trials: For each trial, the values that differ between trials.
        monitor: See :func:`objective`.
        mode: ``"min"`` or ``"max"``.
    """

    def __init__(self, trials: Sequence[Mapping[str, Any]], monitor: str | None, mode: str) -> None:
        self.trials = trials
        self.monitor = monitor
        self.sign = 1 if mode == "min" else -1
        self.best: tuple[int, float] | None = None
        self.running: dict[int, tuple[float, str]] = {}  # trial -> when it started, where it runs
        self.ended: dict[int, tuple[float, bool, float | None]] = {}  # trial -> seconds, whether it failed, objective

    def started(self, trial: int, where: str) -> None:
        """Tell that a trial begins; ``where`` names its GPUs, if any."""
        self.running[trial] = (time.monotonic(), where)
        self.event(f"trial {trial} starts{where and f' on {where}'}: {in_words(self.trials[trial])}")

    def finished(self, trial: int, value: Any, error: str | None) -> float:
        """Tell that a trial has ended, with ``value`` or ``error``. Returns how many seconds it took."""
        seconds = time.monotonic() - self.running.pop(trial)[0]
        number = None if error is not None else objective(value, self.monitor)
        self.ended[trial] = (seconds, error is not None, number)
        if number is not None and (self.best is None or number * self.sign < self.best[1] * self.sign):
            self.best = (trial, number)
        if error is not None:
            self.show(f"trial {trial} failed after {seconds:.1f} s ({in_words(self.trials[trial])}):\n{error.rstrip()}")
        else:
            result = "" if number is None else f": {number:.6g}"
            self.event(f"trial {trial} done in {seconds:.1f} s{result}; {self.summary()}")
        return seconds

    def output(self, trial: int, line: str) -> None:
        """Pass on a line that a trial printed."""
        self.show(f"trial {trial} | {line}")

    def summary(self) -> str:
        """Return one line: how many are done, running, waiting and failed, and the best so far."""
        failed = sum(failed for _, failed, _ in self.ended.values())
        counts = {
            "done": len(self.ended) - failed,
            "failed": failed,
            "running": len(self.running),
            "waiting": len(self.trials) - len(self.ended) - len(self.running),
        }
        text = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        if self.best is not None:
            text += f"; best: trial {self.best[0]}, {self.best[1]:.6g} ({in_words(self.trials[self.best[0]])})"
        return f"{len(self.trials)} trials: {text}"

    def event(self, text: str) -> None:
        """Tell what a table would show by itself."""
        self.show(text)

    def show(self, text: str) -> None:
        """Write ``text``, one line or several."""
        print(text, file=sys.stderr, flush=True)

    def refresh(self) -> None:
        """Bring what is on the screen up to date."""

    def close(self) -> None:
        """Write the last line."""
        self.show(self.summary())


class LiveBoard(Board):
    """A table at the foot of the terminal; what trials print, and the tracebacks of failed ones, scroll above it."""

    def __init__(
        self, trials: Sequence[Mapping[str, Any]], monitor: str | None, mode: str, console: Any = None
    ) -> None:
        # rich takes a tenth of a second to import, and only a terminal needs it
        from rich.console import Console  # noqa: PLC0415
        from rich.live import Live  # noqa: PLC0415

        super().__init__(trials, monitor, mode)
        self.console = console if console is not None else Console(stderr=True)
        # refreshed by hand: a thread of rich's would outlive a killed search
        self.live = Live(console=self.console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        self.live.start()
        self.refresh()

    def event(self, text: str) -> None:
        """Draw the table, which shows it."""
        self.refresh()

    def show(self, text: str) -> None:
        """Print ``text`` above the table."""
        self.console.print(text, markup=False, highlight=False)

    def refresh(self) -> None:
        """Draw the table and the summary."""
        from rich.console import Group  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        self.live.update(Group(self.table(), Text(self.summary())), refresh=True)

    def table(self) -> Any:
        """Return the table: running trials, the last that ended, and the best in bold."""
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        table = Table(box=None, pad_edge=False)
        for name in ("trial", "state", "time", "result", "values"):
            table.add_column(name, justify="right" if name in ("trial", "time", "result") else "left")
        now = time.monotonic()
        ended = list(self.ended)[-_SHOWN:]
        if self.best is not None and self.best[0] not in ended:
            ended.insert(0, self.best[0])
        for trial in ended:
            seconds, failed, number = self.ended[trial]
            style = "red" if failed else "bold green" if self.best is not None and self.best[0] == trial else ""
            result = "" if number is None else f"{number:.6g}"
            row = (str(trial), "failed" if failed else "done", f"{seconds:.0f} s", result, in_words(self.trials[trial]))
            table.add_row(*map(Text, row), style=style)
        for trial, (since, where) in self.running.items():
            row = (
                str(trial),
                f"runs {where and f'on {where}'}".rstrip(),
                f"{now - since:.0f} s",
                "",
                in_words(self.trials[trial]),
            )
            table.add_row(*map(Text, row), style="cyan")
        return table

    def close(self) -> None:
        """Leave the table as it is now."""
        self.refresh()
        self.live.stop()


def make_board(trials: Sequence[Mapping[str, Any]], monitor: str | None, mode: str) -> Board:
    """Return the board that suits stderr: a live table on a terminal, lines elsewhere."""
    return (LiveBoard if sys.stderr.isatty() else Board)(trials, monitor, mode)
