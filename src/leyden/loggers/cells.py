# SPDX-License-Identifier: Apache-2.0
"""Plain values as the cells of a CSV file, and back with their types: tables of pairs, and rows of metrics."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping
from typing import Any

from leyden.errors import MisconfigurationException
from leyden.hparams import cell_value
from leyden.loggers.folder import filesystem_of, replace_file
from leyden.types import PathLike


def cell_text(value: Any) -> str:
    """Return what a cell holds for a plain value: a text as it is, unless it would be read as something else."""
    if value is None or isinstance(value, bool) or (isinstance(value, str) and cell_value(value) == value):
        return str(value)
    return json.dumps(value, ensure_ascii=False)


def write_pairs(path: str, pairs: Mapping[str, Any]) -> None:
    """Write plain values to a table with the columns ``key`` and ``value``, all of it or nothing."""
    block = io.StringIO(newline="")
    writer = csv.writer(block)
    writer.writerow(["key", "value"])
    writer.writerows((key, cell_text(value)) for key, value in pairs.items())
    replace_file(filesystem_of(path), path, [block.getvalue().encode()])


def read_pairs(path: PathLike) -> dict[str, Any]:
    """Return what ``write_pairs`` wrote to ``path``.

    Raises:
        MisconfigurationException: if the table lacks the columns ``key`` and ``value``.
    """
    with open(path, encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        columns = list(rows.fieldnames or ())
        if not {"key", "value"} <= set(columns):
            raise MisconfigurationException(
                f"{os.fspath(path)!r} has the columns {columns}; a table of hyperparameters has 'key' and 'value'. "
                "Put them into its first line, or remove the file."
            )
        return {row["key"]: cell_value(row["value"] or "") for row in rows if row["key"] is not None}


def read_rows(path: PathLike) -> list[dict[str, Any]]:
    """Return the rows of a table of metrics without their empty cells, with numbers as int or float."""
    with open(path, encoding="utf-8", newline="") as file:
        return [
            {name: _number_or_text(text) for name, text in row.items() if name is not None and text}
            for row in csv.DictReader(file)
        ]


def drop_rows(path: str, first: int, end: int) -> None:
    """Take the rows from ``first`` to before ``end`` out of a table of metrics, in one move; rows are counted from 0."""
    with open(path, encoding="utf-8", newline="") as file:
        columns, *rows = csv.reader(file)
    del rows[first:end]
    block = io.StringIO(newline="")
    csv.writer(block).writerows([columns, *rows])
    replace_file(filesystem_of(path), path, [block.getvalue().encode()])


def _number_or_text(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
