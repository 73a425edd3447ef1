# SPDX-License-Identifier: Apache-2.0
"""Logs how fast a run is: batches, samples and items per second, the share of peak operations, the wait for data."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from leyden.callback import Callback
from leyden.callbacks.learning_rate_monitor import is_row_due
from leyden.errors import MisconfigurationException
from leyden.hooks import is_written
from leyden.profilers.throughput import Throughput
from leyden.runtime.flops import get_available_flops
from leyden.types import RunningStage, TrainerFn, TrainerView

_TOTALS = ("batches", "samples", "lengths")


class _HostClock:
    """Moments on the host: where the host computes, what it has passed is done."""

    def stamp(self) -> Any:
        """Take the moment."""
        return time.perf_counter()

    def passed(self, stamp: Any) -> bool:
        """Whether the work before ``stamp`` is done."""
        return True

    def between(self, earlier: Any, later: Any) -> float:
        """Return seconds."""
        return float(later - earlier)


class _DeviceClock:
    """Moments in the device's own queue: taken without waiting for it, read once it has passed them."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.get_device_module(device).Event

    def stamp(self) -> Any:
        """Put a mark into the queue."""
        event = self._event(enable_timing=True)
        event.record()
        return event

    def passed(self, stamp: Any) -> bool:
        """Whether the device has come to the mark; this asks, and does not wait."""
        return bool(stamp.query())

    def between(self, earlier: Any, later: Any) -> float:
        """Return seconds between two marks that were passed."""
        return float(earlier.elapsed_time(later)) / 1000


class _Meter:
    """What one stage has done: counted at once, timed as soon as the device has done it."""

    def __init__(self, throughput: Throughput, clock: Any) -> None:
        self.throughput, self.clock = throughput, clock
        self.totals = dict.fromkeys(_TOTALS, 0)
        self.time, self.paused = 0.0, 0.0
        self.last: Any = None
        """The moment of the last batch."""
        self._passed: Any = None
        """The moment up to which ``time`` is known."""
        self._pending: deque[tuple[Any, Any]] = deque()

    def start(self, before: float = 0.0) -> None:
        """Begin to measure; ``before`` are seconds that an earlier part of the run took."""
        self.throughput.reset()
        self._pending.clear()
        self.time, self.paused = before, 0.0
        self._passed = self.last = self.clock.stamp()

    def count(self, samples: int, length: int | None, flops: int | None) -> None:
        """Note one more batch."""
        totals = self.totals
        totals["batches"] += 1
        totals["samples"] += samples
        if length is not None:
            totals["lengths"] += length
        self.last = self.clock.stamp()
        seen = {**totals, "lengths": None if length is None else totals["lengths"], "flops": flops}
        self._pending.append((self.last, seen))
        self._settle()

    def leave_out(self, begin: Any, end: Any) -> None:
        """Do not count the time between two moments, both after the last batch."""
        self._pending.append((end, begin))
        self._settle()

    def _settle(self) -> None:
        """Hand over what the device has done by now."""
        pending, clock = self._pending, self.clock
        while pending and clock.passed(pending[0][0]):
            moment, what = pending.popleft()
            if isinstance(what, dict):
                # from batch to batch: a device tells times in 32 bits, too few for those since a run began
                self.time += clock.between(self._passed, moment) - self.paused
                self._passed, self.paused = moment, 0.0
                self.throughput.update(time=self.time, **what)
            else:
                self.paused += clock.between(what, moment)


class ThroughputMonitor(Callback):
    """Logs what :class:`~leyden.profilers.throughput.Throughput` computes, under the name of the stage.

    The rows of training (``train/time``, ``train/samples``, ``train/device/samples_per_sec`` …) are due where the other
    metrics' are, every ``log_every_n_steps``; those of validation, test and prediction after as many batches. Validation
    inside ``fit`` has its own rows and does not count as time of training. Batches may differ in size. The newest values
    are in ``trainer.logged_metrics`` too. On an accelerator the times are those of the device, and nothing waits for it:
    a row tells of the batches that the device has finished.

    The rate of operations and ``mfu`` are logged where the module has an attribute ``flops_per_batch``, read at each
    batch (:func:`~leyden.runtime.flops.measure_flops` finds it), or where ``count_flops`` is True.

    ``train/data_wait`` is the share of the time since the last row that passed between a batch and the next: waiting for
    the loader and bringing the batch to the device. Steps with a validation, a checkpoint or, on an accelerator, a row
    between them are left out of it.

    Args:
        batch_size_fn: From a batch to its number of samples.
        length_fn: From a batch to its number of items, tokens say.
        count_flops: Count the operations of the first training step with torch's counter, while it runs, if the module
            has no ``flops_per_batch``; other batches count in proportion to their samples. That step is slower.
        data_wait: Log ``data_wait``; None does unless ``Trainer(semantics="lightning")``.
        kwargs: As of :class:`~leyden.profilers.throughput.Throughput`; ``available_flops`` is known for many devices.

    Raises:
        MisconfigurationException: for a function that is none, or values that Throughput does not take.
        TypeError: for an argument that Throughput does not have.
    """

    def __init__(
        self,
        batch_size_fn: Callable[[Any], int],
        length_fn: Callable[[Any], int] | None = None,
        *,
        count_flops: bool = False,
        data_wait: bool | None = None,
        **kwargs: Any,
    ) -> None:
        functions: dict[str, Any] = {"batch_size_fn": batch_size_fn}
        if length_fn is not None:
            functions["length_fn"] = length_fn
        for name, function in functions.items():
            if not callable(function):
                raise MisconfigurationException(
                    f"ThroughputMonitor({name}={function!r}): must be a function from a batch to a number, for example"
                    " `lambda batch: len(batch[0])`."
                )
        self.batch_size_fn, self.length_fn = batch_size_fn, length_fn
        self.kwargs = kwargs
        self.separator = Throughput(**kwargs).separator  # a wrong argument is wrong here
        self.available_flops: float | None = kwargs.get("available_flops")
        self._meters: dict[RunningStage, _Meter] = {}
        self._seen = 0
        self._restored: dict[str, Any] = {}
        self._count_flops, self._data_wait = count_flops, data_wait
        self._counter: ExitStack | None = None
        self._flops_of: Any = None
        self._flops_per_sample: float | None = None
        self._validated = 0
        # the wait for data: when the last batch ended, and sums since the last row
        self._ended: float | None = None
        self._waited, self._gap, self._spent = 0.0, 0.0, 0.0

    def unused_hooks(self, trainer: TrainerView) -> frozenset[str]:
        """Return the hooks that this instance does not need in this run."""
        if trainer.log_every_n_steps:
            return frozenset()
        names = [name for name in vars(ThroughputMonitor) if name.startswith("on_")]
        return frozenset(name for name in names if not is_written(self, name, ThroughputMonitor))

    # ------------------------------------------------------------------ training

    def setup(self, trainer: TrainerView, pl_module: Any, stage: str) -> None:
        """Make a meter for each stage of this run."""
        self._restored = {}
        device = trainer.strategy.root_device
        available = self.available_flops
        if available is None:
            available = get_available_flops(device, _dtype(str(trainer.strategy.precision.precision)))
        arguments = {"world_size": trainer.world_size, **self.kwargs, "available_flops": available}
        stages = [RunningStage.TRAINING, RunningStage.VALIDATING] if stage == TrainerFn.FITTING else [_STAGES[stage]]
        for each in stages:
            clock = _HostClock() if device.type == "cpu" else _DeviceClock(device)
            meter = _Meter(Throughput(**arguments), clock)
            known = self._meters.get(each)
            if known is not None and stage != TrainerFn.FITTING:
                meter.totals = known.totals  # over several calls of the same entry point they go on
            self._meters[each] = meter

    def on_train_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Begin to measure; a resumed run goes on with the totals of its checkpoint."""
        restored, self._restored = self._restored, {}
        meter = self._meters[RunningStage.TRAINING]
        meter.totals.update({name: restored[name] for name in _TOTALS if name in restored})
        meter.start(restored.get("time", 0.0))
        self._validated = restored.get("validated", 0)
        self._flops_per_sample = None
        self._waited = self._gap = self._spent = 0.0
        self._ended = None

    def on_train_epoch_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """From here on a first batch is waited for."""
        self._ended = time.monotonic()

    def on_train_batch_start(self, trainer: TrainerView, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note how long the batch was waited for."""
        if self._ended is not None:
            self._gap = time.monotonic() - self._ended
        self._stop_counting()  # of a batch that a hook has skipped
        if self._count_flops and self._flops_per_sample is None and not hasattr(pl_module, "flops_per_batch"):
            self._counter = ExitStack()
            self._flops_of = self._counter.enter_context(FlopCounterMode(display=False))

    def on_train_batch_end(
        self, trainer: TrainerView, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; log if a row is due."""
        if self._stop_counting():
            self._flops_per_sample = self._flops_of.get_total_flops() / max(1, self.batch_size_fn(batch))
        self._count(RunningStage.TRAINING, pl_module, batch)
        now = time.monotonic()
        if self._ended is not None:
            self._waited += self._gap
            self._spent += now - self._ended
        self._ended = now
        # in the middle of a window of accumulation there is no update whose time would be whole
        steps = (batch_idx + 1) % trainer.batches_per_update == 0 or trainer.is_last_batch
        if steps and is_row_due(trainer):
            self._log(trainer, RunningStage.TRAINING, trainer.batches_that_stepped)
            self._waited = self._spent = 0.0
            if trainer.strategy.root_device.type != "cpu":
                self._ended = None  # the loop reads the row back now, and waits for the device

    def on_save_checkpoint(self, trainer: TrainerView, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """A checkpoint is not a wait for data."""
        self._ended = None

    # ------------------------------------------------------------------ evaluation

    def on_validation_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Begin to measure."""
        self._start_evaluation(trainer, RunningStage.VALIDATING)

    def on_validation_batch_end(
        self, trainer: TrainerView, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count the batch; log after every ``log_every_n_steps`` of them."""
        self._count_evaluation(trainer, RunningStage.VALIDATING, pl_module, batch)

    def on_validation_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """Take the time of a validation out of the time of training."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        training = self._meters[RunningStage.TRAINING]
        training.leave_out(training.last, self._meters[RunningStage.VALIDATING].last)
        self._ended = None

    def on_test_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Begin to measure."""
        self._start_evaluation(trainer, RunningStage.TESTING)

    def on_test_batch_end(
        self, trainer: TrainerView, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count the batch; log after every ``log_every_n_steps`` of them."""
        self._count_evaluation(trainer, RunningStage.TESTING, pl_module, batch)

    def on_predict_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Begin to measure."""
        self._start_evaluation(trainer, RunningStage.PREDICTING)

    def on_predict_batch_end(
        self, trainer: TrainerView, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count the batch; log after every ``log_every_n_steps`` of them."""
        self._count_evaluation(trainer, RunningStage.PREDICTING, pl_module, batch)

    # ------------------------------------------------------------------ the rest of a run

    def on_exception(self, trainer: TrainerView, pl_module: Any, exception: BaseException) -> None:
        """Stop counting operations, if that was going on."""
        self._stop_counting()

    def teardown(self, trainer: TrainerView, pl_module: Any, stage: str) -> None:
        """Stop counting operations, if that was going on."""
        self._stop_counting()

    def state_dict(self) -> dict[str, Any]:
        """Return the totals of training, with which a resumed run goes on."""
        meter = self._meters.get(RunningStage.TRAINING)
        return {} if meter is None else {**meter.totals, "time": meter.time, "validated": self._validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""
        self._restored = dict(state_dict)

    def _start_evaluation(self, trainer: TrainerView, stage: RunningStage) -> None:
        if trainer.sanity_checking:
            return
        meter = self._meters[stage]
        if trainer.state.fn == TrainerFn.FITTING:
            meter.totals = dict.fromkeys(_TOTALS, 0)
        self._seen = 0
        meter.start()

    def _count_evaluation(self, trainer: TrainerView, stage: RunningStage, pl_module: Any, batch: Any) -> None:
        if trainer.sanity_checking:
            return
        self._count(stage, pl_module, batch)
        self._seen += 1
        step = self._meters[stage].totals["batches"]
        if trainer.state.fn == TrainerFn.FITTING:
            self._validated += 1
            step = self._validated  # the x-axis goes on over the validations of a fit
        if self._seen % trainer.log_every_n_steps == 0:
            self._log(trainer, stage, step)

    def _count(self, stage: RunningStage, pl_module: Any, batch: Any) -> None:
        with torch.no_grad():
            samples = int(self.batch_size_fn(batch))
            length = None if self.length_fn is None else int(self.length_fn(batch))
        flops = getattr(pl_module, "flops_per_batch", None)
        if flops is None and self._flops_per_sample is not None and stage is RunningStage.TRAINING:
            flops = round(self._flops_per_sample * samples)
        self._meters[stage].count(samples, length, flops)

    def _log(self, trainer: Any, stage: RunningStage, step: int) -> None:
        metrics = self._meters[stage].throughput.compute()
        wanted = self._data_wait
        if wanted is None:
            wanted = trainer.config.rule("data_wait")
        if stage is RunningStage.TRAINING and wanted and self._spent:
            metrics["data_wait"] = self._waited / self._spent
        row: dict[str, float] = {f"{stage}{self.separator}{name}": value for name, value in metrics.items()}
        trainer.logged_metrics.update({name: torch.tensor(value) for name, value in row.items()})
        if stage is RunningStage.TRAINING:
            row["epoch"] = trainer.current_epoch
        trainer.record(row, step)

    def _stop_counting(self) -> bool:
        """Take the counter of operations away; return whether there was one."""
        counter, self._counter = self._counter, None
        if counter is None:
            return False
        counter.close()
        return True


_STAGES = {
    "validate": RunningStage.VALIDATING,
    "test": RunningStage.TESTING,
    "predict": RunningStage.PREDICTING,
}


def _dtype(precision: str) -> torch.dtype:
    """The dtype in which matrices are multiplied under a precision."""
    if precision.startswith("bf16"):
        return torch.bfloat16
    return {"16": torch.float16, "64": torch.float64}.get(precision[:2], torch.float32)
