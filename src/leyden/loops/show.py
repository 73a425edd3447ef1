# SPDX-License-Identifier: Apache-2.0
"""What the loops have to say at their end: the table of ``validate`` and ``test``, and who asked a fit to stop."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from leyden.results import LOADER_SUFFIX


def table(results: Sequence[dict[str, float]], stage: str) -> str:
    """Return the values as text, a row for each metric, a column for each loader; empty if nothing was logged."""
    columns = [{name.split(LOADER_SUFFIX)[0]: value for name, value in result.items()} for result in results]
    names = sorted({name for column in columns for name in column})
    if not names:
        return ""
    head = [f"{stage.capitalize()} metric", *(f"DataLoader {index}" for index in range(len(columns)))]
    body = [[name, *(f"{column[name]:.6g}" if name in column else "" for column in columns)] for name in names]
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]

    def line(row: list[str]) -> str:
        first, *rest = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join([first, *rest]).rstrip()

    return "\n".join([line(head), "  ".join("─" * width for width in widths), *(line(row) for row in body)])


def who_stopped(callbacks: Iterable[Any], epochs: int) -> str:
    """Say who set ``trainer.should_stop`` in a fit that stops after so many epochs, and why if that is known."""
    for callback in callbacks:
        message = getattr(callback, "stopping_reason_message", None)
        if message and callback.stopped_epoch in (epochs - 1, epochs):
            name = type(callback).__name__
            # a callback that is verbose has said why
            return f"by {name}" if callback.verbose else f"{name}: {message.removesuffix(' Stopping.').rstrip('.')}"
    return "trainer.should_stop was set"
