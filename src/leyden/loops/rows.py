# SPDX-License-Identifier: Apache-2.0
"""Where rows of metrics go: to the history in memory, and to the loggers, from one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from leyden.loggers.history import History
from leyden.results import to_floats


class Rows:
    """Turns what the loops collected into rows.

    Args:
        history: Gets every row.
        put: Takes ``(metrics, step)`` to the loggers; None if there are none.
    """

    def __init__(self, history: History, put: Callable[[dict[str, float], int], None] | None) -> None:
        self.history = history
        self.put = put
        self.amend: Callable[[dict[str, float]], Mapping[str, Any]] | None = None
        """Changes a row that is about to be written; returns it."""

    def write(self, metrics: Mapping[str, Any], step: int, epoch: int | None = None) -> None:
        """Write one row; this reads the values back from the device.

        A metric that the user logged under the name ``step`` takes the place of ``step``; otherwise the row also says
        its ``epoch``, unless it is None.
        """
        if not metrics:
            return
        row = to_floats(metrics)
        own = row.pop("step", None)
        if own is not None:
            step = int(own)
        elif epoch is not None:
            row.setdefault("epoch", epoch)
        if self.amend is not None:
            row = to_floats(self.amend(row))
        self.history.append(row, step)
        if self.put is not None:
            self.put(row, step)
