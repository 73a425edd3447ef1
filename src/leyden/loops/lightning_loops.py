# SPDX-License-Identifier: Apache-2.0
"""Our counters as the ``loops`` of a Lightning checkpoint, and back, so that either side resumes from the other's files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from leyden.progress import Progress


def _counts(ready: int, *, done: int | None = None, names: str = "ready completed started processed") -> dict[str, int]:
    """One of Lightning's trackers: how often something was ready, and how often it was completed."""
    completed = ready if done is None else done
    return {name: completed if name == "completed" else ready for name in names.split()}


def _tracker(total: dict[str, int], current: dict[str, int] | None = None, **more: Any) -> dict[str, Any]:
    return {"total": total, "current": dict(total) if current is None else current, **more}


def to_lightning(progress: Progress, loaders: list[Any], last: bool, automatic: bool = True) -> dict[str, Any]:
    """Return the value of the key ``loops``.

    Args:
        progress: Our counters.
        loaders: States of stateful training loaders.
        last: Whether the last batch ended its epoch.
        automatic: Whether the optimizers are stepped by us: their steps are counted in one of two places.
    """
    short = "ready completed"
    zero = _tracker(_counts(0))
    updates = sum(progress.optimizer_steps)
    # inside the tail of a batch its hooks have run but Lightning has not counted it as completed yet
    open_batch = 1 if progress.tail == "log" else 0
    epochs = progress.epoch + 1 if (progress.batch_idx or progress.epoch_done) else progress.epoch
    epoch = {
        "ready": epochs,
        "started": epochs,
        "processed": progress.epoch + (1 if progress.epoch_done else 0),
        "completed": progress.epoch,
    }
    steps, by_hand = (updates, 0) if automatic else (0, updates)
    fit = {
        "state_dict": {"combined_loader": loaders} if loaders else {},
        "epoch_loop.state_dict": {"_batches_that_stepped": progress.batches_that_stepped},
        "epoch_loop.batch_progress": _tracker(
            _counts(progress.batches, done=progress.batches - open_batch),
            _counts(progress.batch_idx, done=progress.batch_idx - open_batch),
            is_last_batch=last,
        ),
        "epoch_loop.scheduler_progress": _tracker(_counts(progress.scheduler_steps, names=short)),
        "epoch_loop.automatic_optimization.state_dict": {},
        "epoch_loop.automatic_optimization.optim_progress": {
            "optimizer": {
                "step": _tracker(_counts(steps, names=short)),
                "zero_grad": _tracker(_counts(steps, names="ready completed started")),
            }
        },
        "epoch_loop.manual_optimization.state_dict": {},
        "epoch_loop.manual_optimization.optim_step_progress": _tracker(_counts(by_hand, names=short)),
        "epoch_loop.val_loop.state_dict": {},
        "epoch_loop.val_loop.batch_progress": _tracker(
            _counts(sum(progress.val_batches)), _counts(0), is_last_batch=False
        ),
        "epoch_progress": _tracker(epoch, dict(epoch)),
    }
    evaluation = {"state_dict": {}, "batch_progress": {**zero, "is_last_batch": False}}
    return {
        "fit_loop": fit,
        "validate_loop": evaluation,
        "test_loop": {"state_dict": {}, "batch_progress": {**zero, "is_last_batch": False}},
        "predict_loop": {"state_dict": {}, "batch_progress": dict(zero)},
    }


def from_lightning(checkpoint: Mapping[str, Any], progress: Progress) -> tuple[bool, bool]:
    """Set ``progress`` from a file that Lightning wrote; return whether its last batch ended the epoch, and stepped."""
    fit = (checkpoint.get("loops") or {}).get("fit_loop")
    progress.global_step = int(checkpoint.get("global_step", 0))
    if not fit:
        # files from before the loops were saved: the epoch and the step are all there is. Since Lightning names its version
        # in them, the epoch is the number of those that were completed; before, the number of the last of these
        progress.epoch = int(checkpoint.get("epoch", -1)) + ("pytorch-lightning_version" not in checkpoint)
        progress.batches_that_stepped = progress.global_step
        return True, True
    epoch = fit["epoch_progress"]["current"]
    batch = fit["epoch_loop.batch_progress"]
    progress.epoch = int(epoch["completed"])
    progress.epoch_done = int(epoch["processed"]) > int(epoch["completed"])
    progress.batches = int(batch["total"]["processed"])
    progress.batch_idx = int(batch["current"]["processed"])
    stepped = fit.get("epoch_loop.state_dict", {}).get("_batches_that_stepped", progress.global_step)
    last = bool(batch.get("is_last_batch", False))
    progress.batches_that_stepped = int(stepped)
    optimizer = fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["completed"]
    manual = fit.get("epoch_loop.manual_optimization.optim_step_progress", {}).get("total", {}).get("completed", 0)
    # only their sum is known
    others = max(0, len(checkpoint.get("optimizer_states") or ()) - 1)
    progress.optimizer_steps = [int(optimizer) + int(manual), *[0] * others]
    if int(epoch["ready"]) <= progress.epoch:
        # saved between two epochs, or after the fit; one that was cut short goes on where it stopped
        progress.cut = not last and progress.batch_idx > 0
        progress.batch_idx = progress.batch_idx if progress.cut else 0
    elif last and not progress.epoch_done and progress.batch_idx:
        # saved in the validation that closes an epoch: nothing is left of it but its count
        progress.epoch_done = True
        progress.batches_that_stepped += 1
    return last, True
