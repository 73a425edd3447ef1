# SPDX-License-Identifier: Apache-2.0
"""Where a fit goes on whose processes torchrun has started anew: at the newest checkpoint that this very fit has written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from leyden.callbacks.checkpoint_files import is_url
from leyden.loops.leave import checkpoints_in, first_good, peek
from leyden.runtime import agent
from leyden.runtime.ranks import rank_zero_info


def resume_point(trainer: Any, given: Any) -> Any:
    """Return where a fit goes on: ``given``, unless torchrun has started it anew and it has left a checkpoint behind.

    All processes must call it. Machines may have come and gone: one that is left is enough to know the run by.

    Args:
        trainer: Whose folders are looked at; on rank 0.
        given: The ``ckpt_path`` that the user gave.
    """
    own = agent.begin_fit()
    everybody: list[agent.Agent | None] = trainer.strategy.gather_objects(own)
    agents = [each for each in everybody if each is not None]
    times = [each.since for each in agents if each.since is not None]
    found = None
    if times and trainer.is_global_zero:
        # a clock of another machine may be a little ahead of that of the disk
        found = _newest(trainer, {each.name for each in agents}, min(times) - 60.0)
    found = trainer.strategy.broadcast(found)
    agent.note()
    if found is None:
        if times:
            rank_zero_info(
                "torchrun has started this fit anew, and it had saved no checkpoint in a local folder: it begins"
                + (" anew." if given is None else f" with ckpt_path={given!r}.")
            )
        return given
    rank_zero_info(f"torchrun has started this fit anew: it goes on from {found}.")
    return found


def _newest(trainer: Any, names: set[str], since: float) -> str | None:
    """The newest good checkpoint of this fit in the folders where it may have written some."""
    folders = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    root = trainer.default_root_dir
    if not is_url(root):
        folders += [os.path.join(root, "checkpoints"), *map(str, Path(root).glob("*/*/checkpoints"))]
    own: list[tuple[int, int, float, str]] = []
    for path in dict.fromkeys(checkpoints_in(folder for folder in folders if folder)):
        try:
            written = os.stat(path).st_mtime
        except OSError:
            continue  # a link that leads nowhere, or it has just been replaced
        if written < since:
            continue
        facts = peek(path)
        launch = facts.get("launch") or {}
        if facts.get("resumes") and launch.get("fit") == agent.fit() and names & set(launch.get("agents", ())):
            own.append((facts["step"], facts["batches"], written, path))
    return first_good(path for *_, path in sorted(own, reverse=True))


__all__ = ["resume_point"]
