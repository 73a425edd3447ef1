# SPDX-License-Identifier: Apache-2.0
"""``Trainer(num_workers=...)``: how many workers the loaders of a run get, as said, as measured, or as a checkpoint has it."""

from __future__ import annotations

from typing import Any

from leyden.data.combined import CombinedLoader
from leyden.data.loaders import length, why_own_workers, with_workers
from leyden.loops.session import Session
from leyden.runtime.cores import cores
from leyden.runtime.ranks import rank_zero_info
from leyden.types import TrainerFn

_WORTH, _WORTH_ONCE = 0.1, 2.0
"""Seconds that a pass must take for a measurement: where many follow, and where it is the only one."""


def chosen(session: Session, combined: CombinedLoader, prefix: str) -> list[Any]:
    """Return what is drawn from in the place of the loaders: copies with as many workers as this run is to have.

    The choice holds for the length of a run, and for those that go on from its checkpoints.
    """
    _remember(session)
    loaders = combined.flattened
    numbers = session.workers.get(prefix)
    if numbers is None or len(numbers) != len(loaders):
        numbers = session.workers[prefix] = [_number(session, loader, prefix) for loader in loaders]
    return [
        loader if number is None or why_own_workers(loader) else with_workers(loader, number)
        for loader, number in zip(loaders, numbers, strict=True)
    ]


def _remember(session: Session) -> None:
    """Take over what the checkpoint says that this run goes on from: with other workers, chance would be another."""
    if session.config.num_workers != "auto" or session.workers:
        return
    found = session.position.data if session.position is not None else None
    if found is None:
        found = ((session.checkpoint or {}).get("leyden") or {}).get("data") or {}
    for prefix in ("train", "val"):
        if prefix in found:
            session.workers[prefix] = [state["about"].get("workers") for state in found[prefix]["loaders"]]
    if session.workers:
        told = ", ".join(f"{prefix} {numbers}" for prefix, numbers in session.workers.items())
        rank_zero_info(f"Trainer(num_workers='auto'): as many workers as the checkpoint was written with: {told}.")


def _number(session: Session, loader: Any, prefix: str) -> int | None:
    """How many workers one loader gets; None for those that it has."""
    wanted = session.config.num_workers
    if session.config.fast_dev_run and wanted == "auto":
        return None
    said = f"Trainer(num_workers={wanted!r})"
    if (why := why_own_workers(loader)) is not None:
        rank_zero_info(f"{said}: the {prefix} loader stays as it is: {why}.")
        return None
    if isinstance(wanted, int):
        return wanted
    from leyden.data.measure import measure  # noqa: PLC0415  # only where workers are measured
    from leyden.data.whole import Whole  # noqa: PLC0415  # as above

    if session.config.fast_data and Whole(with_workers(loader, 0)).plan() is not None:
        rank_zero_info(
            f"{said}: no workers for the {prefix} loader: its data lie in memory and are read a batch at a time."
        )
        return 0
    allowed, fitting = cores(), session.trainer.state.fn is TrainerFn.FITTING
    try:
        found = measure(loader, allowed, _WORTH if fitting else _WORTH_ONCE)
    except Exception as error:  # the data set is the user's; what it raises it will raise again where it matters
        rank_zero_info(
            f"{said}: the {prefix} loader stays as it is, with {loader.num_workers} workers: it could not be measured:"
            f" {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        )
        return _agreed(session, None)
    number = _agreed(session, found.workers)
    rank_zero_info(
        f"{said}: {number or 'no'} worker{'s' * (number != 1)} for the {prefix} loader of {length(loader)} batches: {found};"
        f" {allowed} core{'s' * (allowed > 1)} to use."
    )
    return number


def _agreed(session: Session, number: int | None) -> int | None:
    """The choice of the first process, for all."""
    agreed: int | None = session.strategy.broadcast(number)
    return agreed
