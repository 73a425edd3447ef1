# SPDX-License-Identifier: Apache-2.0
"""What ``validate`` and ``test`` have to say at their end: a table."""

from __future__ import annotations

from collections.abc import Sequence

from leyden.results import LOADER_SUFFIX
from leyden.runtime.ranks import say


def tell(results: Sequence[dict[str, float]], stage: str) -> None:
    """Say the table of the values, if anything was logged."""
    if text := table(results, stage):
        say(text)


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
