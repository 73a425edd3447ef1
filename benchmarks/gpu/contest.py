# SPDX-License-Identifier: Apache-2.0
"""Contenders on a GPU take turns; a table of the time of each, and of its ratio to the first, round by round."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Prepare = Callable[[int, str], Callable[[], None]]
"""Takes a number of steps and a folder to write to; returns a run that is ready to be timed."""


@dataclass
class Table:
    """What a contest measured: seconds of each run by contender, the first being the one that others are compared with."""

    title: str
    text: str
    steps: int
    times: dict[str, list[float]]
    per_step: float = 0.0
    """Tokens of a step; 0 shows microseconds instead of tokens per second."""

    def lines(self) -> list[str]:
        """Return the table as markdown."""
        unit = "tokens/s" if self.per_step else "us/step"
        against = next(iter(self.times))
        lines = [f"## {self.title}", "", self.text, "", f"| | {unit} | ratio | (least, most) |", "|---|---|---|---|"]
        for name, mine in self.times.items():
            middle = statistics.median(mine) / self.steps
            figure = f"{self.per_step / middle:,.0f}" if self.per_step else f"{middle * 1e6:.1f}"
            # of speeds where speeds are shown, of times where times are
            ratios = [a / b for a, b in zip(mine, self.times[against], strict=True)]
            ratios = [1 / ratio for ratio in ratios] if self.per_step else ratios
            shown = f"{statistics.median(ratios):.3f} | ({min(ratios):.3f}, {max(ratios):.3f})"
            lines.append(f"| {name} | {figure} | {shown} |")
        return [*lines, ""]


def seconds(run: Callable[[], None]) -> float:
    """Run, and return how long it took, until the device is done."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def contest(
    title: str, text: str, table: dict[str, Prepare], steps: int, rounds: int, warm: int = 50, per_step: float = 0.0
) -> Table:
    """Let all contenders run ``rounds`` times, by turns, after a short run of each that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in table}
    with tempfile.TemporaryDirectory() as folder:
        for prepare in table.values():
            seconds(prepare(warm, folder))
        for _ in range(rounds):
            for name, prepare in table.items():
                torch.manual_seed(1)
                run = prepare(steps, folder)
                gc.collect()
                times[name].append(seconds(run))
                del run
    return Table(title, text, steps, times, per_step)


def machine() -> str:
    """Describe the machine in one line."""
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
