# SPDX-License-Identifier: Apache-2.0
"""The three independent parts of ModelCheckpoint: when a save is due, which files are the best k, which one is the last.

Each is plain bookkeeping; none writes, names or deletes a file. ``ModelCheckpoint`` asks them and does the rest.
"""

from __future__ import annotations

import copy
import time
from datetime import timedelta
from typing import Any, Generic, TypeVar, overload

import torch
from torch import Tensor

from leyden.errors import MisconfigurationException, did_you_mean
from leyden.types import TrainerView

T = TypeVar("T")


class Policy:
    """Bookkeeping that can be copied before it changes, so that a change can be taken back."""

    def copy(self: T) -> T:
        """Return a copy that further changes leave alone."""
        twin = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, dict):
                vars(twin)[name] = dict(value)
        return twin


class Occasions(Policy):
    """When a periodic save is due: after each so many optimizer steps, so much time, or so many epochs; 0 is never."""

    def __init__(self, every_n_train_steps: int, train_time_interval: timedelta | None, every_n_epochs: int) -> None:
        self._every_n_train_steps = every_n_train_steps
        self._train_time_interval = train_time_interval
        self._every_n_epochs = every_n_epochs
        self._turn = 0  # how many times `every_n_train_steps` fits into the steps so far
        self._last_time_checked: float | None = None

    def arguments(self) -> dict[str, Any]:
        """The three, by the names that ModelCheckpoint has for them."""
        return {
            "every_n_train_steps": self._every_n_train_steps,
            "every_n_epochs": self._every_n_epochs,
            "train_time_interval": self._train_time_interval,
        }

    def looks_at_batches(self) -> bool:
        """Whether anything can be due after a batch."""
        return self._every_n_train_steps > 0 or self._train_time_interval is not None

    def start(self, trainer: TrainerView) -> None:
        """Begin to count."""
        self._last_time_checked = time.monotonic()
        if self._every_n_train_steps:
            self._turn = trainer.global_step // self._every_n_train_steps

    def due_after_batch(self, trainer: TrainerView) -> bool:
        """Whether so many steps or so much time have passed since it was due last; all processes agree."""
        if not self._every_n_train_steps:
            return self._time_has_passed(trainer)
        turn, before = trainer.global_step // self._every_n_train_steps, self._turn
        self._turn = turn  # not `step % n == 0`: one batch may make several steps
        return turn != before

    def due_after_epoch(self, trainer: TrainerView) -> bool:
        """Whether the epoch that ends is one in so many."""
        return self._every_n_epochs > 0 and (trainer.current_epoch + 1) % self._every_n_epochs == 0

    def _time_has_passed(self, trainer: TrainerView) -> bool:
        if self._train_time_interval is None:
            return False
        now, before = time.monotonic(), self._last_time_checked
        has_passed = before is not None and now - before >= self._train_time_interval.total_seconds()
        if trainer.world_size > 1:  # clocks differ; all must save at the same batch
            has_passed = trainer.strategy.broadcast(has_passed)
        if has_passed:
            self._last_time_checked = now
        return has_passed


class TopK(Policy):
    """The best ``save_top_k`` files by a metric (-1: all of them), or without a metric the newest file."""

    def __init__(self, save_top_k: int, mode: str) -> None:
        self.save_top_k, self.mode = save_top_k, mode
        self.current_score: Tensor | None = None
        self.best_k_models: dict[str, Tensor] = {}
        self.kth_best_model_path = ""
        self.kth_value = torch.tensor(self._worst())
        self.best_model_score: Tensor | None = None
        self.best_model_path = ""

    def _worst(self) -> float:
        return torch.inf if self.mode == "min" else -torch.inf

    def admits(self, score: Tensor) -> bool:
        """Whether a file with this score would be among the best; NaN is worse than anything."""
        if self.save_top_k == -1 or len(self.best_k_models) < self.save_top_k:
            return True
        if self.save_top_k == 0:
            return False
        is_better = torch.lt if self.mode == "min" else torch.gt
        return bool(is_better(score, self.best_k_models[self.kth_best_model_path]))

    def beaten(self) -> str:
        """The file that makes way for a new one; empty while there is room."""
        is_full = self.save_top_k != -1 and len(self.best_k_models) >= self.save_top_k
        return self.kth_best_model_path if is_full else ""

    def enter(self, path: str, score: Tensor, beaten: str) -> None:
        """Put ``path`` among the best, in the place of ``beaten``."""
        score = score.detach().clone()  # what is logged next may be written into the same tensor
        if torch.isnan(score):
            score.fill_(self._worst())
        self.best_k_models.pop(beaten, None)
        self.current_score = self.best_k_models[path] = score
        worst_of, best_of = (max, min) if self.mode == "min" else (min, max)
        if self.save_top_k == -1 or len(self.best_k_models) >= self.save_top_k:
            self.kth_best_model_path = worst_of(self.best_k_models, key=self.best_k_models.__getitem__)
            self.kth_value = self.best_k_models[self.kth_best_model_path]
        self.best_model_path = best_of(self.best_k_models, key=self.best_k_models.__getitem__)
        self.best_model_score = self.best_k_models[self.best_model_path]


class Last(Policy):
    """The file that holds the newest state, and the step that it holds."""

    def __init__(self) -> None:
        self.last_model_path = ""
        self._last_file_step = 0

    def enter(self, path: str, step: int) -> None:
        """The file is now ``path``, and holds ``step``."""
        self.last_model_path, self._last_file_step = path, step


class KeptBy(Generic[T]):
    """An attribute of a callback that one of its policies keeps: reading and setting it goes there.

    Args:
        policy: The name of the attribute that holds the policy.
    """

    def __init__(self, policy: str) -> None:
        self.policy = policy

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, callback: None, owner: type) -> KeptBy[T]: ...

    @overload
    def __get__(self, callback: Any, owner: type) -> T: ...

    def __get__(self, callback: Any, owner: type) -> Any:
        return self if callback is None else getattr(getattr(callback, self.policy), self.name)

    def __set__(self, callback: Any, value: T) -> None:
        setattr(getattr(callback, self.policy), self.name, value)


def check_arguments(monitor: str | None, save_last: Any, top: TopK, occasions: Occasions) -> None:
    """Check the arguments of ModelCheckpoint against each other.

    Raises:
        MisconfigurationException: naming the argument, its value and what it can be.
    """
    for name, choice, choices in (
        ("mode", top.mode, ("min", "max")),
        ("save_last", save_last, (None, True, False, "link")),
    ):
        if choice not in choices:
            hint = did_you_mean(str(choice), ("min", "max", "link"))
            raise MisconfigurationException(f"ModelCheckpoint({name}={choice!r}): must be one of {choices}.{hint}")
    triggers = occasions.arguments()
    for name, value, least in (("save_top_k", top.save_top_k, -1), *((*each, 0) for each in triggers.items())):
        if not isinstance(value, timedelta) and value is not None and value < least:
            raise MisconfigurationException(f"ModelCheckpoint: Invalid value for {name}={value}. Must be >= {least}.")
    given = [f"{name}={value}" for name, value in triggers.items() if value or isinstance(value, timedelta)]
    if len(given) > 1:
        raise MisconfigurationException(
            f"ModelCheckpoint({', '.join(given)}): these should be mutually exclusive. To save at several occasions, use"
            " several ModelCheckpoint callbacks."
        )
    if monitor is None and top.save_top_k not in (-1, 0, 1):
        raise MisconfigurationException(
            f"ModelCheckpoint(save_top_k={top.save_top_k}, monitor=None) is not a valid configuration. No quantity for"
            f" top_k to track: without a metric to rank by, save_top_k"
            " can only be -1 (all), 0 (none) or 1 (the newest)."
        )
