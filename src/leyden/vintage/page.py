# SPDX-License-Identifier: Apache-2.0
"""Writes the page of the documentation that maps each name of 2019 to the one of today: ``docs/2019.md``.

python -m leyden.vintage.page > docs/2019.md
"""

from __future__ import annotations

from collections.abc import Iterable

from leyden.vintage.tables import (
    CALLBACK_ARGUMENTS,
    DEFAULTS,
    MODULE_MEMBERS,
    REQUIRED,
    SAME_ARGUMENTS,
    SOON_AFTER,
    TRAINER_ARGUMENTS,
    TRAINER_MEMBERS,
    Argument,
    Member,
)

_INTRODUCTION = """\
# The names of 2019

Leyden has the names of today and, beside them, those of the trainer of 2019 and of its experiment tracker. A script of
then runs once its imports say `leyden`:

    import leyden as ptl
    from leyden import Trainer, Experiment

The import lines of then serve, too: after `leyden.compat.install()`, or under `leyden run script.py`.

`ptl.LightningModel` is `ptl.LightningModule`. `Experiment`, `HyperOptArgumentParser` and `SlurmCluster` have kept their
names and those of their arguments. An old name and its new one mean the same thing: use either, and only one of them.

This page is made from the tables in `leyden.vintage.tables`; a test holds the two together."""


def page() -> str:
    """Return the whole page."""
    then = ", ".join(f"`{name}={value}`" for name, value in DEFAULTS.items())
    parts = [
        _INTRODUCTION,
        "## LightningModule",
        "A module is one of 2019 if it writes a name that only 2019 knew (the four hooks `on_epoch_*` and `on_batch_*` were"
        " known later, too), or if its Trainer was built with an argument of then. For the length of a run its hooks are"
        " called at today's places, and the loss is logged as `tng_loss`.",
        _members(MODULE_MEMBERS),
        "## Trainer",
        f"With any of these arguments, the defaults of then apply where nothing else is said: {then}.",
        _arguments([*TRAINER_ARGUMENTS, *SOON_AFTER, *SAME_ARGUMENTS]),
        _members(TRAINER_MEMBERS),
        "## Callbacks",
        "A callback is called as in 2019 if one of its arguments has a name or a place that is gone, if `mode` is `'auto'`,"
        " or if what is needed today is left out; and where its call could be of either year, if the Trainer gets it by"
        " `checkpoint_callback=` or `early_stop_callback=`. Then its arguments are these, in this order.",
    ]
    for name, rows in CALLBACK_ARGUMENTS.items():
        parts += [f"### {name}", _arguments(rows)]
    return "\n\n".join(parts) + "\n"


def _members(rows: Iterable[Member]) -> str:
    lines = [[f"`{row.usage}`", f"`{row.modern}`" if row.modern else "the same", row.meaning] for row in rows]
    return _table(["then", "today", "meaning"], lines)


def _arguments(rows: Iterable[Argument]) -> str:
    lines = []
    for row in rows:
        default = "" if row.default is REQUIRED else f"={row.default!r}"
        lines.append([f"`{row.name}{default}`", f"`{row.modern}`" if row.modern else "", row.meaning])
    return _table(["then", "today", "meaning"], lines)


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


if __name__ == "__main__":
    print(page(), end="")
