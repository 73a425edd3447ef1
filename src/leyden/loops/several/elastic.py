# SPDX-License-Identifier: Apache-2.0
"""What a run does that goes on with another number of processes: an update keeps its samples, the epoch what is left.

With fewer processes each takes the places of several in turn, and gradients are accumulated over its turns: batches, losses
and updates are those of the run with as many as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from leyden.data.combined import CombinedLoader
from leyden.loops.session import Session
from leyden.runtime.ranks import rank_zero_info


def decide(session: Session, combined: CombinedLoader) -> None:
    """Find out, from the training loaders, of what an update is made and how many turns each process takes for it."""
    if session.update is not None:
        return  # loaders that are asked for anew in a fit change nothing
    shares, config = session.strategy.data_size, session.config
    sizes = [_size(loader) for loader in combined.flattened]
    now: dict[str, Any] = {"shares": shares, "accumulate": config.accumulate_grad_batches, "batch_sizes": sizes}
    former, session.update = _former(session), now
    if not former or former["shares"] == shares:
        return
    wished = former["shares"]
    as_given, fits = {**now, "shares": wished} == former, wished % shares == 0
    keeps = as_given and fits and config.keep_global_batch and session.module.automatic_optimization
    if as_given and config.keep_global_batch:
        session.update = dict(former)  # what is wished for, also where it cannot be at present
    if keeps:
        session.turns = wished // shares
    same = _count(now) == _count(former)
    session.resized = not keeps and not same
    if same:
        return  # whoever wrote the script has seen to it
    began = f"The updates of this run were made by {_processes(wished)} and are made by {_processes(shares)} now"
    if keeps:
        rank_zero_info(
            f"{began}: each takes {session.turns} batches where it took one, so that an update keeps its"
            f"{_count(former)} (Trainer(keep_global_batch=False) switches that off)."
        )
        return
    if not config.keep_global_batch:
        why = "keep_global_batch=False"
    elif not session.module.automatic_optimization:
        why = "optimization is manual"
    elif not as_given:
        why = "the batch size or accumulate_grad_batches is another one"
    else:
        why = f"{wished} is no multiple of {shares}"
    rank_zero_info(
        f"{began}, each with its own batches, since {why}: an update has{_count(now)}, before{_count(former)}."
    )


def _former(session: Session) -> Mapping[str, Any]:
    """What an update was made of in the run that goes on; empty for one that begins."""
    ours = (session.checkpoint or {}).get("leyden") or {}
    progress: Mapping[str, Any] = ours.get("progress") or {}
    found: Mapping[str, Any] = progress.get("update") or session.progress.update
    return found


def _size(loader: Any) -> int | None:
    size = getattr(loader, "batch_size", None)
    return size if isinstance(size, int) else None


def _samples(update: Mapping[str, Any], size: int | None) -> int | None:
    return None if size is None else int(update["shares"] * update["accumulate"] * size)


def _count(update: Mapping[str, Any]) -> str:
    sizes = update["batch_sizes"]
    counts = [_samples(update, size) for size in sizes]
    if any(count is None for count in counts):
        return f" {update['shares'] * update['accumulate']} batches"
    return f" {' and '.join(map(str, counts))} samples"


def _processes(shares: int) -> str:
    return f"{shares} process" + ("es" if shares > 1 else "")


def is_shared(session: Session, prefix: str) -> bool:
    """Whether the samples of the loaders of ``prefix`` are shared out in one process too: as where it takes turns, or
    goes on in an epoch that several have begun."""
    if prefix != "train":
        return False
    ours = (session.checkpoint or {}).get("leyden") or {}
    data = ours.get("data") or getattr(session.position, "data", None) or {}
    loaders = (data.get("train") or {}).get("loaders", ())
    return session.turns > 1 or any(loader.get("share") is not None for loader in loaders)


__all__ = ["decide", "is_shared"]
