# SPDX-License-Identifier: Apache-2.0
"""The rows of a run in memory: what ``trainer.history`` is, with or without a logger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, overload


class History(Sequence[dict[str, float]]):
    """A sequence of rows in the order in which they were logged; each a dict of names and numbers, ``"step"`` first.

    Example::

        trainer.fit(model)
        trainer.history[-1]                     # the newest row
        trainer.history.last["val_loss"]        # the newest value of one name
        trainer.history.column("val_loss")      # [(step, value), …]
    """

    def __init__(self) -> None:
        self._rows: list[Mapping[str, Any]] = []
        self._steps: list[int] = []

    def append(self, metrics: Mapping[str, Any], step: int) -> None:
        """Add a row. ``metrics`` is kept as it is and must not be changed later; its values are numbers or 0-d tensors.

        This runs in the training loop, so it only stores: whatever can be done when somebody reads is done then.
        """
        self._rows.append(metrics)
        self._steps.append(step)

    @property
    def names(self) -> list[str]:
        """Every name that was logged, in order of first appearance, without ``"step"``."""
        return list(dict.fromkeys(name for row in self._rows for name in row))

    @property
    def last(self) -> dict[str, float]:
        """The newest value of each name, from whichever row has it; empty if nothing was logged."""
        newest: dict[str, Any] = {}
        for row in self._rows:
            newest.update(row)
        return {name: _number(value) for name, value in newest.items()}

    def column(self, name: str) -> list[tuple[int, float]]:
        """Return ``(step, value)`` of each row that has ``name``; an empty list if none has."""
        return [(step, _number(row[name])) for step, row in zip(self._steps, self._rows, strict=True) if name in row]

    def to_pandas(self) -> Any:
        """Return a ``pandas.DataFrame`` with a column for each name, NaN where a row lacks it. Needs pandas."""
        pandas = import_module("pandas")
        return pandas.DataFrame(list(self), columns=["step", *self.names])

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, float]]:
        return map(_row, self._steps, self._rows)

    @overload
    def __getitem__(self, index: int) -> dict[str, float]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, float]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, float] | list[dict[str, float]]:
        if isinstance(index, slice):
            return list(map(_row, self._steps[index], self._rows[index]))
        return _row(self._steps[index], self._rows[index])

    def __repr__(self) -> str:
        return f"History({len(self)} rows of {', '.join(self.names) or 'nothing'})"


def _row(step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
    return {"step": step, **{name: _number(value) for name, value in metrics.items()}}


def _number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
