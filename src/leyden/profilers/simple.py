# SPDX-License-Identifier: Apache-2.0
"""A profiler that reports how long each action took and how often it ran."""

from __future__ import annotations

import math
import time
from array import array

from leyden.errors import MisconfigurationException
from leyden.profilers.base import Profiler
from leyden.types import PathLike


class SimpleProfiler(Profiler):
    """Records the wall time of each action, in seconds, and reports means and sums.

    Actions may nest, so the percentages need not add up to 100.

    Args:
        dirpath: See ``Profiler``.
        filename: See ``Profiler``.
        extended: Report also the number of calls and the share of the whole time.
    """

    def __init__(self, dirpath: PathLike | None = None, filename: str | None = None, extended: bool = True) -> None:
        super().__init__(dirpath=dirpath, filename=filename)
        self.extended = extended
        self.current_actions: dict[str, float] = {}
        # eight bytes a call, where a list of floats takes thirty-two
        self.recorded_durations: dict[str, array[float]] = {}
        self.start_time = time.perf_counter()

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """Begin the whole time here unless something was measured before."""
        super().setup(stage, local_rank=local_rank, log_dir=log_dir)
        if not self.recorded_durations and not self.current_actions:
            self.start_time = time.perf_counter()

    def start(self, action_name: str) -> None:
        """Begin to time an action.

        Raises:
            MisconfigurationException: If it is being timed already.
        """
        if action_name in self.current_actions:
            raise MisconfigurationException(
                f"start({action_name!r}): this action has already started; stop it first, or give it another name."
            )
        self.current_actions[action_name] = time.perf_counter()

    def stop(self, action_name: str) -> None:
        """End the timing of an action.

        Raises:
            MisconfigurationException: If it was never started.
        """
        now = time.perf_counter()
        started = self.current_actions.pop(action_name, None)
        if started is None:
            raise MisconfigurationException(
                f"stop({action_name!r}): this action was never started; running are {sorted(self.current_actions)}."
            )
        self.recorded_durations.setdefault(action_name, array("d")).append(now - started)

    def summary(self) -> str:
        """Return the report: one row for each action, the most expensive first, as plain text."""
        whole = time.perf_counter() - self.start_time
        totals = {action: math.fsum(durations) for action, durations in self.recorded_durations.items()}
        calls = {action: len(durations) for action, durations in self.recorded_durations.items()}
        rows = [
            [
                action,
                f"{total / calls[action]:.5}",
                f"{calls[action]}",
                f"{total:.5}",
                f"{100 * total / whole:.5}" if whole > 0 else "-",
            ]
            for action, total in sorted(totals.items(), key=lambda item: -item[1])
        ]
        headings = ["Action", "Mean duration (s)", "Num calls", "Total time (s)", "Percentage %"]
        rows.insert(0, ["Total", "-", str(sum(calls.values())), f"{whole:.5}", "100"])
        kept = range(len(headings)) if self.extended else (0, 1, 3)
        return f"{self.title}\n{_table([[row[index] for index in kept] for row in [headings, *rows]])}"


def _table(rows: list[list[str]]) -> str:
    """Align cells in columns, with a rule around the headings and around the first row, which is the total."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    rule = "-" * (sum(widths) + 3 * (len(widths) - 1))
    return "\n".join([rule, lines[0], rule, lines[1], rule, *lines[2:], *([rule] if lines[2:] else [])])
