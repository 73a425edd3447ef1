# SPDX-License-Identifier: Apache-2.0
"""Logs the learning rates (and momenta and weight decays) of all optimizers while they train."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from leyden.callback import Callback
from leyden.errors import MisconfigurationException, did_you_mean
from leyden.hooks import is_written
from leyden.runtime.ranks import rank_zero_warn
from leyden.types import TrainerView


def is_row_due(trainer: TrainerView) -> bool:
    """Return whether the training batch that starts now ends with a row in the logs (every ``log_every_n_steps``)."""
    every = trainer.log_every_n_steps
    return every > 0 and ((trainer.batches_that_stepped + 1) % every == 0 or trainer.should_stop)


def require_logger(trainer: TrainerView, callback: str) -> None:
    """Refuse a callback that has nowhere to log.

    Raises:
        MisconfigurationException: if the Trainer has no logger, and is not meant to have none.
    """
    if not trainer.loggers and not trainer.fast_dev_run:
        raise MisconfigurationException(
            f"{callback} has nowhere to log: the Trainer has no logger. Give it one (`Trainer(logger=True)`), or remove the"
            " callback."
        )


class LearningRateMonitor(Callback):
    """Logs under ``lr-SGD``; ``lr-SGD-1`` for the second SGD; ``lr-SGD/pg1`` where there are several parameter groups.

    The key ``name`` of a scheduler's configuration replaces ``lr-SGD``, the key ``name`` of a parameter group replaces
    ``pg1``. Momentum and weight decay have ``-momentum`` and ``-weight_decay`` appended.

    Args:
        logging_interval: ``"step"`` logs with each row of the logs, ``"epoch"`` at the start of each epoch, None as
            each scheduler's own ``interval`` says (an optimizer without scheduler: both).
        log_momentum: Log the momentum (of Adam and its kin: the first beta) too.
        log_weight_decay: Log the weight decay too.
        log_key_prefix: Stands ahead of every name, as it is: ``"optim/"`` makes ``optim/lr-SGD``.

    Attributes:
        lrs: From name to all values logged so far.
        last_momentum_values: From name to the newest value.
        last_weight_decay_values: From name to the newest value.

    Raises:
        MisconfigurationException: if ``logging_interval`` is none of these, if the Trainer has no logger, or if two
            parameter groups of one optimizer have the same name.
    """

    def __init__(
        self,
        logging_interval: Literal["step", "epoch"] | None = None,
        log_momentum: bool = False,
        log_weight_decay: bool = False,
        log_key_prefix: str | None = None,
    ) -> None:
        if logging_interval not in (None, "step", "epoch"):
            raise MisconfigurationException(
                f"`logging_interval` is {logging_interval!r}; it must be 'step', 'epoch' or None."
                f"{did_you_mean(str(logging_interval), ('step', 'epoch'))}"
            )
        self.logging_interval = logging_interval
        self.log_momentum = log_momentum
        self.log_weight_decay = log_weight_decay
        self.log_key_prefix = log_key_prefix
        self.lrs: dict[str, list[float]] = {}
        self.last_momentum_values: dict[str, float | None] = {}
        self.last_weight_decay_values: dict[str, float | None] = {}
        # names are found once and again when the groups change; no optimizer is kept, so that none outlives its fit
        self._names: list[list[str]] = []
        self._groups: list[int] = []
        self._as_tensor: dict[str, tuple[float, Tensor]] = {}

    def unused_hooks(self, trainer: TrainerView) -> frozenset[str]:
        """Return the hooks that this instance does not need in this run."""
        unused = []
        if self.logging_interval == "epoch" or not trainer.loggers or trainer.log_every_n_steps == 0:
            unused.append("on_train_batch_start")
        if self.logging_interval == "step" or not trainer.loggers:
            unused.append("on_train_epoch_start")
        return frozenset(name for name in unused if not is_written(self, name, LearningRateMonitor))

    def on_train_start(self, trainer: TrainerView, *args: Any, **kwargs: Any) -> None:
        """Find the names."""
        require_logger(trainer, "LearningRateMonitor")
        optimizers = [optimizer for optimizer, _ in _with_interval(trainer)]
        if self.log_momentum and not all({"momentum", "betas"} & set(each.defaults) for each in optimizers):
            rank_zero_warn(
                "LearningRateMonitor(log_momentum=True): some optimizers have no momentum; 0 is logged for them.",
                category=RuntimeWarning,
            )
        self._find_names(trainer)
        names = [name for group in self._names for name in group]
        self.lrs = {name: [] for name in names}
        self.last_momentum_values = {f"{name}-momentum": None for name in names}
        self.last_weight_decay_values = {f"{name}-weight_decay": None for name in names}
        self._as_tensor = {}

    def on_train_batch_start(self, trainer: TrainerView, *args: Any, **kwargs: Any) -> None:
        """Log, if a row of the logs is due with this batch."""
        if is_row_due(trainer) and self.logging_interval != "epoch":
            self._log(trainer, "step")

    def on_train_epoch_start(self, trainer: TrainerView, *args: Any, **kwargs: Any) -> None:
        """Log the values with which the epoch starts."""
        if self.logging_interval != "step":
            self._log(trainer, "epoch")

    def _log(self, trainer: TrainerView, interval: str) -> None:
        stats = self._read(trainer, interval if self.logging_interval is None else "any")
        if not stats:
            return
        device, metrics = trainer.strategy.root_device, trainer.callback_metrics
        for name, value in stats.items():
            known = self._as_tensor.get(name)
            if known is None or known[0] != value:  # most rates stand still for many rows
                known = self._as_tensor[name] = (value, torch.tensor(value, device=device))
            metrics[name] = known[1]
        trainer.record(stats, trainer.batches_that_stepped)

    def _read(self, trainer: TrainerView, interval: str) -> dict[str, float]:
        entries = list(_with_interval(trainer))
        if [len(optimizer.param_groups) for optimizer, _ in entries] != self._groups:
            self._find_names(trainer)
        stats: dict[str, float] = {}
        for (optimizer, own_interval), names in zip(entries, self._names, strict=True):
            if interval != "any" and own_interval not in (None, interval):
                continue
            for group, name in zip(optimizer.param_groups, names, strict=True):
                stats[name] = rate = float(group["lr"])
                self.lrs[name].append(rate)
                if self.log_momentum:
                    key = f"{name}-momentum"
                    momentum = group["betas"][0] if "betas" in group else group.get("momentum", 0)
                    stats[key] = self.last_momentum_values[key] = float(momentum)
                if self.log_weight_decay:
                    key = f"{name}-weight_decay"
                    stats[key] = self.last_weight_decay_values[key] = float(group.get("weight_decay", 0))
        return stats

    def _find_names(self, trainer: TrainerView) -> None:
        counts: Counter[type[Optimizer]] = Counter()
        names: list[list[str]] = []
        groups: list[int] = []
        schedulers = [config.name for config in trainer.lr_scheduler_configs]
        for position, (optimizer, _) in enumerate(_with_interval(trainer)):
            given = schedulers[position] if position < len(schedulers) else None
            base = given if given is not None else f"lr-{type(optimizer).__name__}"
            counts[type(optimizer)] += given is None
            if counts[type(optimizer)] > 1:
                base = f"{base}-{counts[type(optimizer)] - 1}"
            names.append([f"{self.log_key_prefix or ''}{name}" for name in _group_names(base, optimizer)])
            groups.append(len(optimizer.param_groups))
        self._names, self._groups = names, groups
        for name in (name for group in names for name in group):
            # an optimizer that got a second group goes on under the name of its first one
            alone = name.replace("/pg1", "")
            if name not in self.lrs:
                self.lrs[name] = self.lrs.pop(alone) if "/pg1" in name and alone in self.lrs else []


def _with_interval(trainer: TrainerView) -> Iterator[tuple[Optimizer, str | None]]:
    """Yield each scheduler's optimizer with the scheduler's interval, then the other optimizers with None."""
    seen = []
    for config in trainer.lr_scheduler_configs:
        optimizer = config.scheduler.optimizer
        seen.append(optimizer)
        yield optimizer, config.interval
    for optimizer in trainer.optimizers:
        if optimizer not in seen:
            yield optimizer, None


def _group_names(base: str, optimizer: Optimizer) -> list[str]:
    groups = optimizer.param_groups
    own = [group.get("name", f"pg{number}") for number, group in enumerate(groups, start=1)]
    if len(set(own)) < len(own):
        twice = sorted({str(name) for name in own if own.count(name) > 1})
        raise MisconfigurationException(
            f"LearningRateMonitor needs a different `name` for each parameter group of an optimizer; {base} has more"
            f" than one group named {', '.join(map(repr, twice))}."
        )
    if len(groups) == 1 and not groups[0].get("name"):
        return [base]
    return [f"{base}/{name}" for name in own]


__all__ = ["LearningRateMonitor", "is_row_due"]
