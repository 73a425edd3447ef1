# SPDX-License-Identifier: Apache-2.0
"""Logs what the device says of itself: memory on a GPU, load and memory of the machine on a CPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from leyden.callback import Callback
from leyden.callbacks.learning_rate_monitor import is_row_due, require_logger
from leyden.errors import MisconfigurationException, did_you_mean
from leyden.hooks import is_written
from leyden.runtime.devices import CPUAccelerator
from leyden.runtime.ranks import rank_zero_warn
from leyden.types import STEP_OUTPUT, TrainerView


class DeviceStatsMonitor(Callback):
    """Logs before and after the batches whose row is due, of training, validation and test.

    A name is ``DeviceStatsMonitor.on_train_batch_start/cpu_percent``: the callback, the hook, and one of

    * on a CPU, by psutil: ``cpu_percent``, ``cpu_vm_percent``, ``cpu_swap_percent``;
    * on a CUDA GPU: what :func:`torch.cuda.memory_stats` says, in bytes and counts.

    Args:
        cpu_stats: Log those of the CPU: None where it trains, True always, False never.
        filter_keys: Log these names only (``{"allocated_bytes.all.peak"}``); None is all.

    Raises:
        MisconfigurationException: if the Trainer has no logger.
        ModuleNotFoundError: if figures of the CPU are wanted and psutil is not installed.
    """

    def __init__(self, cpu_stats: bool | None = None, filter_keys: Iterable[str] | None = None) -> None:
        if isinstance(filter_keys, str):
            raise MisconfigurationException(
                f"DeviceStatsMonitor(filter_keys={filter_keys!r}): give a set of names, {{{filter_keys!r}}}."
            )
        self._cpu_stats = cpu_stats
        self._filter_keys = None if filter_keys is None else frozenset(filter_keys)
        self._told = False
        """Whether names that nobody knows have been spoken of."""
        self._batches = 0
        """Batches of this evaluation so far."""

    def unused_hooks(self, trainer: TrainerView) -> frozenset[str]:
        """Return the hooks that this instance does not need in this run."""
        if trainer.loggers and trainer.log_every_n_steps != 0:
            return frozenset()
        names = [f"on_{kind}_batch_{moment}" for kind in ("train", "validation", "test") for moment in ("start", "end")]
        return frozenset(name for name in names if not is_written(self, name, DeviceStatsMonitor))

    def setup(self, trainer: TrainerView, pl_module: Any, stage: str) -> None:
        """Check that there is a logger, and that the figures can be had."""
        self._told = False
        if stage != "fit":
            return
        require_logger(trainer, "DeviceStatsMonitor")
        on_cpu = trainer.strategy.root_device.type == "cpu"
        if self._cpu_stats or (self._cpu_stats is None and on_cpu):
            # says now that psutil is missing; its first figure counts from here
            CPUAccelerator().get_device_stats("cpu")

    def on_train_batch_start(self, trainer: TrainerView, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Log, if a row is due with this batch."""
        if is_row_due(trainer):
            self._log(trainer, "on_train_batch_start")

    def on_train_batch_end(
        self, trainer: TrainerView, pl_module: Any, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Log, if a row is due with this batch."""
        if is_row_due(trainer):
            self._log(trainer, "on_train_batch_end")

    def on_validation_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Count batches from 0."""
        self._batches = 0

    def on_validation_batch_start(
        self, trainer: TrainerView, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Log, every ``log_every_n_steps`` batches of this validation."""
        self._batches += 1
        self._log_if_due(trainer, "on_validation_batch_start")

    def on_validation_batch_end(
        self,
        trainer: TrainerView,
        pl_module: Any,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log, every ``log_every_n_steps`` batches of this validation."""
        self._log_if_due(trainer, "on_validation_batch_end")

    def on_test_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Count batches from 0."""
        self._batches = 0

    def on_test_batch_start(
        self, trainer: TrainerView, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Log, every ``log_every_n_steps`` batches of this test."""
        self._batches += 1
        self._log_if_due(trainer, "on_test_batch_start")

    def on_test_batch_end(
        self,
        trainer: TrainerView,
        pl_module: Any,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log, every ``log_every_n_steps`` batches of this test."""
        self._log_if_due(trainer, "on_test_batch_end")

    def _log_if_due(self, trainer: TrainerView, hook: str) -> None:
        every = trainer.log_every_n_steps
        if every and (self._batches % every == 0 or trainer.should_stop):
            self._log(trainer, hook)

    def _log(self, trainer: TrainerView, hook: str) -> None:
        if not trainer.loggers:
            return
        device = trainer.strategy.root_device
        on_cpu = device.type == "cpu"
        stats = {} if on_cpu and self._cpu_stats is False else dict(trainer.accelerator.get_device_stats(device))
        if self._cpu_stats and not on_cpu:
            stats.update(CPUAccelerator().get_device_stats("cpu"))
        wanted = self._filter_keys
        if wanted is not None:
            unknown = sorted(wanted - stats.keys())
            if unknown and not self._told:
                self._told = True
                rank_zero_warn(
                    f"DeviceStatsMonitor: filter_keys contains keys not found among the figures of this device: {unknown}."
                    f"{did_you_mean(unknown[0], stats)}"
                )
            stats = {name: value for name, value in stats.items() if name in wanted}
        if stats:
            prefix = f"{type(self).__qualname__}.{hook}{getattr(trainer.loggers[0], 'group_separator', '/')}"
            trainer.record({f"{prefix}{name}": value for name, value in stats.items()}, trainer.batches_that_stepped)


__all__ = ["DeviceStatsMonitor"]
