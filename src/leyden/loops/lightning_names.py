# SPDX-License-Identifier: Apache-2.0
"""Views of our loops under names of Lightning's loops that libraries reach for: ``trainer.fit_loop.epoch_loop`` and below.

Nothing of Leyden uses them, and they are made when somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from leyden.errors import did_you_mean
from leyden.loops.lightning_loops import to_lightning
from leyden.strategies import ParallelStrategy, Strategy

_OPTIMIZER = ("epoch_loop.automatic_optimization.optim_progress", "optimizer", "step", "total", "completed")
_MANUAL = ("epoch_loop.manual_optimization.optim_step_progress", "total", "completed")
SETTABLE = {
    ("epoch_progress", "current", "completed"): "epoch",
    ("epoch_progress", "current", "processed"): "epoch",
    _OPTIMIZER: "global_step",
    _MANUAL: "global_step",
}
"""The counters of Lightning's that may be set, and those of ``trainer.progress`` that they are."""


class Counters:
    """Some of our counters under Lightning's names, as ``epoch_progress.current.completed``: read anew at each question."""

    def __init__(self, trainer: Any, *path: str) -> None:
        self.__dict__.update(_trainer=trainer, _path=path)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        path = (*self._path, name)
        if path in SETTABLE:
            return getattr(self._trainer.progress, SETTABLE[path])
        found = self._found()
        if name not in found:
            raise AttributeError(_lacks(".".join(self._path), name, found))
        return Counters(self._trainer, *path) if isinstance(found[name], dict) else found[name]

    def _found(self) -> Any:
        trainer, by_hand = self._trainer, self._path[0].startswith("epoch_loop.manual")
        found: Any = to_lightning(trainer.progress, [], trainer.fit_loop.last, automatic=not by_hand)["fit_loop"]
        for step in self._path:
            found = found[step]
        return found

    def __repr__(self) -> str:
        return repr(self._found())

    def __setattr__(self, name: str, value: int) -> None:
        path = (*self._path, name)
        if path not in SETTABLE:
            raise AttributeError(
                f"trainer.fit_loop.{'.'.join(path)} cannot be set: Leyden counts otherwise. Set a counter of trainer.progress,"
                " such as trainer.progress.epoch or .global_step."
            )
        setattr(self._trainer.progress, SETTABLE[path], value)


_FROM_EPOCH_LOOP = ("batch_idx", "global_step", "max_steps", "min_steps", "total_batch_idx")


class EpochLoop:
    """``trainer.fit_loop.epoch_loop``: where an epoch stands."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.val_loop = trainer.fit_loop.validation
        self.batch_progress = Counters(trainer, "epoch_loop.batch_progress")
        self.scheduler_progress = Counters(trainer, "epoch_loop.scheduler_progress")
        self.automatic_optimization = SimpleNamespace(optim_progress=Counters(trainer, _OPTIMIZER[0]))
        self.manual_optimization = SimpleNamespace(optim_step_progress=Counters(trainer, _MANUAL[0]))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(_lacks("epoch_loop", name, [*vars(self), *_FROM_EPOCH_LOOP]))

    @property
    def batch_idx(self) -> int:
        """Index in its epoch of the batch that is at work, or was the last; -1 before the first."""
        return int(self._trainer.progress.batch_idx) - self._counted()

    @property
    def total_batch_idx(self) -> int:
        """The same, since the run began."""
        return int(self._trainer.progress.batches) - self._counted()

    def _counted(self) -> int:
        """1 where the last batch is counted already: after its step."""
        progress = self._trainer.progress
        return 0 if self._trainer.training and not progress.tail and not progress.epoch_done else 1

    @property
    def min_steps(self) -> int | None:
        """As ``trainer.min_steps``."""
        found: int | None = self._trainer.min_steps
        return found

    @property
    def max_steps(self) -> int:
        """As ``trainer.max_steps``."""
        return int(self._trainer.max_steps)

    @property
    def global_step(self) -> int:
        """As ``trainer.global_step``."""
        return int(self._trainer.global_step)

    @property
    def _batches_that_stepped(self) -> int:
        return int(self._trainer.progress.batches_that_stepped)

    @_batches_that_stepped.setter
    def _batches_that_stepped(self, value: int) -> None:
        self._trainer.progress.batches_that_stepped = value


class DataSource:
    """Where the loaders of a run come from."""

    def __init__(self, trainer: Any, prefix: str) -> None:
        self._trainer, self._prefix = trainer, prefix

    def is_defined(self) -> bool:
        """Whether the run that goes on has loaders of this kind: from ``fit(...)``, the data module or the module."""
        return bool(self._trainer.has_loaders(self._prefix))


class Connector:
    """What ``Trainer(accelerator=..., devices=..., strategy=...)`` was resolved to."""

    def __init__(self, strategy: Strategy, accelerator: Any) -> None:
        self.strategy, self.accelerator = strategy, accelerator

    @property
    def is_distributed(self) -> bool:
        """Whether the strategy is one of several processes, of however many it has now."""
        return isinstance(self.strategy, ParallelStrategy)

    @property
    def _accelerator_flag(self) -> str:
        return str(self.accelerator.name())

    @property
    def _parallel_devices(self) -> list[torch.device]:
        return list(getattr(self.strategy, "parallel_devices", None) or [self.strategy.root_device])

    @property
    def _devices_flag(self) -> int | list[int]:
        devices = self._parallel_devices
        return len(devices) if self._accelerator_flag == "cpu" else [device.index or 0 for device in devices]


def view(loop: Any, name: str) -> Any:
    """Return what ``name`` means for one of our loops.

    Raises:
        AttributeError: for a name that means nothing; it says what the public way is.
    """
    trainer, kind = loop.trainer, type(loop).__name__
    fits = hasattr(type(loop), "train_batch")
    views: dict[str, Callable[[], Any]] = {
        "epoch_loop": lambda: EpochLoop(trainer),
        "epoch_progress": lambda: Counters(trainer, "epoch_progress"),
        "current_epoch": lambda: trainer.current_epoch,
        "done": lambda: _done(trainer),
        **{known: partial(_inside, trainer, known) for known in _FROM_EPOCH_LOOP},
    }
    views = views if fits else {}
    views["_data_source"] = lambda: DataSource(trainer, "train" if fits else getattr(loop, "prefix", "predict"))
    if name.startswith("__") or trainer is None or name not in views:
        raise AttributeError(_lacks(kind, name, [*vars(loop), *views]))
    return views[name]()


def _inside(trainer: Any, name: str) -> Any:
    return getattr(EpochLoop(trainer), name)


def _done(trainer: Any) -> bool:
    epochs, steps = trainer.max_epochs, trainer.max_steps
    enough = epochs is not None and 0 <= epochs <= trainer.progress.epoch
    return bool(enough or 0 <= steps <= trainer.global_step)


def _lacks(owner: str, name: str, names: Any) -> str:
    return (
        f"{owner} has no {name!r}.{did_you_mean(name, [str(known) for known in names])} The loops of Lightning are private"
        " there; of Leyden's, the public way is the Trainer itself: trainer.progress, .current_epoch, .global_step, hooks."
    )
