# SPDX-License-Identifier: Apache-2.0
"""Rows shown by objects of the package tqdm, for bars whose subclasses make or change these objects."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from leyden.callbacks.progress.engine import HIGHEST_RATE
from leyden.callbacks.progress.rows import Row, format_metric
from leyden.types import TrainerView

_WIDTH = 5


class Tqdm(tqdm):  # type: ignore[misc, type-arg, unused-ignore]
    """A bar of tqdm whose numbers keep their width, so that it does not flicker."""

    @staticmethod
    def format_num(n: float | str) -> str:
        """Return a number as text; fractions and text get zeros at the end up to five characters."""
        if isinstance(n, int):
            return str(tqdm.format_num(n))
        text = n if isinstance(n, str) else str(tqdm.format_num(n))
        if "e" in text:
            return text
        if "." not in text and len(text) < _WIDTH:
            try:
                float(text)
            except ValueError:
                return text
            text += "."
        return text.ljust(_WIDTH, "0")


def finite(x: float | None) -> float | None:
    """Return a total as tqdm takes it: None where it is not known, which we say by infinity."""
    return None if x is None or math.isinf(x) or math.isnan(x) else x


class TqdmDisplay:
    """Shows each row by the object that the bar makes for it.

    Args:
        bar: The TQDMProgressBar, whose ``init_…_tqdm`` make the objects and whose ``…_progress_bar`` hold them.
        trainer: The trainer, which knows what runs.
        leave: Whether each epoch gets an object of its own, which stays.
    """

    interval_s = 1 / HIGHEST_RATE
    draws_at_start = True

    def __init__(self, bar: Any, trainer: TrainerView, leave: bool) -> None:
        self.keeps = leave
        self._bar, self._trainer = bar, trainer
        self._shown: dict[Row, Any] = {}
        self._texts: dict[str, str] = {}

    def draw(self, rows: Sequence[Row]) -> None:
        """Bring the objects to the state of the rows."""
        for row in [row for row in self._shown if row not in rows]:
            self.end(row)
        for row in rows:
            if row not in self._shown:
                self.begin(row)
            self._refresh(row)

    def _refresh(self, row: Row) -> None:
        shown = self._shown[row]
        shown.total, shown.n = row.finite_total, row.done
        if row.metrics:
            shown.set_postfix(_texts(row.metrics), refresh=False)
        shown.refresh()

    def keep(self, row: Row) -> None:
        """Show the end of a row, and leave it."""
        self.draw([row])
        self.end(row, keep=True)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bars."""
        text = kwargs.pop("sep", " ").join(map(str, args))
        tqdm.write(text, **{name: value for name, value in kwargs.items() if name in ("file", "end")})

    def close(self) -> None:
        """Close all objects."""
        for row in list(self._shown):
            self.end(row)
        train = self._bar.bars.get("train")
        if train is not None:
            train.close()

    def begin(self, row: Row) -> None:
        """Make the object of a row, or take the one of the epoch before."""
        kind, bars = self._kind(), self._bar.bars
        shown = bars.get(kind)
        if kind == "train" and shown is not None and not self.keeps and not shown.disable:
            shown.reset(row.finite_total)  # one object for all epochs
        else:
            shown = getattr(self._bar, f"init_{kind}_tqdm")()
            bars["validation" if kind == "sanity" else kind] = shown
            shown.total = row.finite_total
        text = str(shown.desc or "").removesuffix(": ")
        if not text or text == self._texts.get(kind) or row.description.startswith(text):
            # or else somebody has given it a text of his own
            shown.set_description(row.description, refresh=False)
            self._texts[kind] = row.description
        shown.refresh()
        self._shown[row] = shown

    def _kind(self) -> str:
        trainer = self._trainer
        if trainer.sanity_checking:
            return "sanity"
        stages = {"validation": trainer.validating, "test": trainer.testing, "predict": trainer.predicting}
        return next((kind for kind, runs in stages.items() if runs), "train")

    def end(self, row: Row, keep: bool = False) -> None:
        """Show the last state of a row; its object is closed, but that of training may be used for the next epoch."""
        if row not in self._shown:
            return
        self._refresh(row)
        shown = self._shown.pop(row)
        if shown is not self._bar.bars.get("train") or keep:
            shown.close()


def _texts(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value if isinstance(value, int) else format_metric(value) for name, value in metrics.items()}
