# SPDX-License-Identifier: Apache-2.0
"""The counters of a fit: all of them, each with one meaning, and everything that a resume must know of them.

epoch                  epochs completed; the number of the one that runs now
batch_idx              batches of this epoch that were trained on; the index of the next one
batches                batches trained on since the run began
global_step            updates of the model (with ``semantics="lightning"``: steps of all optimizers)
batches_that_stepped   batches that ended with an update: the x-axis of the loggers
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

TAIL = ("log", "validate", "count", "")
"""What follows a training batch, in order; ``Progress.tail`` names the part that comes next."""


@dataclass
class Progress:
    """Counters of one fit, in batches, steps and epochs as their names say."""

    epoch: int = 0
    batch_idx: int = 0
    batches: int = 0
    global_step: int = 0
    batches_that_stepped: int = 0
    optimizer_steps: list[int] = field(default_factory=list)
    scheduler_steps: int = 0
    tail: str = ""
    """Which part of the tail of the last batch comes next; empty between two batches."""
    epoch_done: bool = False
    """True from the end of the last batch of an epoch until ``epoch`` has been increased."""
    cut: bool = False
    """Whether the last epoch was ended before its last batch; ``batch_idx`` is then where it stopped."""
    val_batches: list[int] = field(default_factory=list)
    """Validation batches of each loader that have been run in this fit: the x-axis of their per-step values."""
    last_train_reload: int = 0
    """The epoch in which the training loaders were last reloaded; a resumed fit keeps to the same schedule."""
    last_val_reload: int = 0
    resized: bool = False
    """Whether updates are made of other numbers of samples than when the run began, so that there are more or fewer."""
    update: dict[str, Any] = field(default_factory=dict)
    """What one update was made of when the run began: ``shares`` of the data, ``accumulate``, ``batch_sizes``."""

    def end_epoch(self, last: bool) -> None:
        """Count an epoch whose end has been dealt with; ``last`` tells whether it ran up to its last batch."""
        self.epoch += 1
        self.epoch_done, self.tail = False, ""
        # an epoch that a bound on steps has cut short goes on where it stopped, if the run is resumed
        self.cut = not last and self.batch_idx > 0
        if not self.cut:
            self.batch_idx = 0

    def reload_due(self, last: int, every: int) -> bool:
        """Whether loaders that were asked for in epoch ``last`` are asked for anew, ``every`` so many epochs (0: never)."""
        return every > 0 and self.epoch - last >= every

    def state_dict(self) -> dict[str, Any]:
        """Return all counters as plain data."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the counters in ``state``; names that this version does not know are ignored."""
        for known in fields(self):
            if known.name in state:
                value = state[known.name]
                setattr(self, known.name, list(value) if isinstance(value, list) else value)

    def reset(self) -> None:
        """Set all counters to their first values."""
        self.load_state_dict(asdict(Progress()))
