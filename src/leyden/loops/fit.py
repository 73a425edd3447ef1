# SPDX-License-Identifier: Apache-2.0
"""The training loop: epochs of batches, an update at the end of each window, validation and rows where they are due.

What one epoch does, in order::

    on_train_epoch_start
    for batch in loader:
        batch to device                       on_before/after_batch_transfer
        on_train_batch_start
        training_step                         forward and loss
        zero_grad, backward, clip, step       each with its hooks; only backward inside a window of accumulation
        schedules that step per update, or at the end of the epoch
        on_train_batch_end
        a row for the loggers, validation, schedules that wait for a metric     (each only where due)
    on_train_epoch_end
    a row with the values of the epoch
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from leyden.config import ValInterval, parse_val_check_interval
from leyden.data.combined import CombinedLoader
from leyden.loops import batches, optimize, when
from leyden.loops.evaluate import EvaluationLoop
from leyden.loops.optimize import Optimization, check_loss, detached, read_loss, step_losses, weighted
from leyden.loops.paths import choose
from leyden.loops.schedule import step_schedules
from leyden.loops.session import Loop, Session
from leyden.runtime.ranks import rank_zero_info
from leyden.types import RunningStage

_END = object()


class FitLoop(Loop):
    """Runs a fit on a session. Between runs it keeps the loaders and the bounds; the counters are in ``Progress``."""

    def __init__(self) -> None:
        self.min_epochs: int | None = None
        self.max_epochs: int = -1
        self.validation = EvaluationLoop(RunningStage.VALIDATING)
        self.data: batches.TrainingData | None = None
        self.num_batches: int | float = math.inf
        self.turns = 1
        """How many batches of this process stand for one that the user counts, in a window and between validations."""
        self.interval = ValInterval("epoch", 1.0)
        self.val_every: float = math.inf
        self.val_across = False
        self.last_val_time = 0.0
        self.last = False
        """Whether the batch that runs now is the last of its epoch."""
        self.steps = True
        """Whether the batch that runs now ends with an update."""
        self.due: float = 0
        """The number of batches at which something may be due: the only thing an ordinary step compares."""
        self.told = False
        """Whether somebody has been told of a loader that cannot be resumed."""
        self.asked_ahead = False
        """Whether a fit that goes on has asked for its loaders before its counters were back."""
        self.skip_backward = False
        """Whether batches only go forward, as in an epoch that computes the statistics of batch norms."""
        self.opened: int | None = None
        """The epoch whose batches were last begun to be drawn."""

    @property
    def loader(self) -> CombinedLoader | None:
        """The training loaders, as they were given; None until they have been asked for."""
        return self.data.loader if self.data is not None else None

    # ------------------------------------------------------------------ the loop

    def run(self, session: Session) -> None:
        """Train until a bound is reached or somebody asks to stop."""
        trainer, progress, hooks = session.trainer, session.progress, session.hooks
        store, interrupt = session.results.train, session.interrupt
        if not self.prepare(session):
            return
        optimization: Optimization = session.optimization
        train, num_args = choose(session, self.train_batch)
        transfer = session.transfer(draws=batches.takes(session.module.training_step, "dataloader_iter"))
        hooks.on_train_start()
        while not self.finished(session):
            iterator, ahead = self.start_epoch(session)
            # a run that was resumed inside the tail of a batch finishes that tail first
            open_epoch = not progress.tail or self.finish_batch(session)
            while open_epoch and (batch := next(iterator, _END)) is not _END:
                batch_idx, accumulate = progress.batch_idx, trainer.config.accumulate_grad_batches * self.turns
                self.last = last = batch_idx + 1 == self.num_batches or (ahead is not None and ahead.last)
                self.steps = steps = last or (batch_idx + 1) % accumulate == 0
                if transfer is not None:
                    batch = transfer(batch, 0)
                store.start_batch(batch)
                optimization.stepped = 0
                store.hook = "on_train_batch_start"
                skip = False
                for call in hooks.on_train_batch_start:
                    response = call(batch, batch_idx)
                    skip = skip or (isinstance(response, int) and response == -1)
                if skip and session.strategy.all_skip(progress.batches):
                    self.last = last = True
                    output = None
                elif batch is None:
                    output = optimize.no_batch(session, self, batch_idx)
                else:
                    store.hook = "training_step"
                    args = (batch, batch_idx) if num_args > 1 else (batch,)
                    output = train(
                        session, optimization, args, batch_idx, batch_idx % accumulate == 0, steps,
                        1 if accumulate == 1 else optimize.divisor_of(self, session, batch_idx, last),
                    )  # fmt: skip
                progress.batch_idx += 1
                progress.batches += 1
                if session.strategy.lr_scheduler_configs and optimization.automatic:
                    if optimization.stepped and not skip:
                        step_schedules(session, "step", False, batch_idx + 1)
                    if last:
                        step_schedules(session, "epoch", False, progress.epoch + 1)
                if skip:
                    session.results.collect()
                    break
                progress.tail = "log"
                if hooks.on_train_batch_end:
                    store.hook = "on_train_batch_end"
                    outputs = detached(output)
                    for call in hooks.on_train_batch_end:
                        call(outputs, batch, batch_idx)
                    del outputs
                del output
                if progress.batches >= self.due or last or trainer.should_stop or interrupt.received:
                    open_epoch = self.finish_batch(session)
                else:
                    progress.tail = ""
                    progress.batches_that_stepped += steps
            if open_epoch and not self.last:
                self.ran_out(session)
            self.end_epoch(session)
        hooks.on_train_end()

    def train_batch(
        self, session: Session, opt: Optimization, args: tuple[Any, ...], batch_idx: int, first: bool, steps: bool,
        divisor: int,
    ) -> Any:  # fmt: skip
        """Forward, backward and, at the end of a window, the update. Returns what ``training_step`` returned."""
        output = session.strategy.training_step(*args)
        loss = output if isinstance(output, Tensor) else read_loss(output)
        if loss is None:
            # nothing to learn from this batch; the others of its window still count
            if first:
                opt.zero_grad(batch_idx)
        elif isinstance(loss, (list, tuple)):
            step_losses(opt, output, loss, divisor, (lambda: opt.zero_grad(batch_idx)) if first else None)
        else:
            if not isinstance(loss, Tensor) or not loss.requires_grad or loss.numel() != 1:
                check_loss(loss, bool(session.hooks.backward))
            if divisor > 1 or opt.exchange is not None:
                loss = weighted(opt, output, loss, divisor)
            if first:
                opt.zero_grad(batch_idx)
            opt.backward(loss)
        if steps:
            opt.update()
        return output

    # ------------------------------------------------------------------ before the first batch

    def prepare(self, session: Session) -> bool:
        """Get loaders and bounds; return False when there is nothing to train."""
        config, trainer = session.config, session.trainer
        session.enter(RunningStage.TRAINING)
        if config.limit_train_batches == 0:
            return False
        progress, resumed = session.progress, session.position
        if resumed is None:
            progress.tail, progress.epoch_done = "", False  # of a fit that an exception ended
        elif progress.epoch_done:
            self.last = resumed.last
            session.agree_on_epoch()
            self.close_epoch(session)
        if resumed is not None:
            resumed.load(self, session)
        data = self.data or self.load_data(session)
        data.settle(session, self.measure)
        if resumed is None and data.iterator is None:
            data.supply.start_epoch("train", progress.epoch)
            data.begin(session)
        if self.finished(session):
            if resumed is not None:
                resumed.settle(data.supply)
            return False
        validated = resumed is not None and resumed.validated
        if trainer.enable_validation and not self.validation.ready and (
            validated or when.epoch_validates(config, progress.epoch)
        ):  # fmt: skip
            session.enter(RunningStage.VALIDATING)
            self.validation.load_data(session)
            session.enter(RunningStage.TRAINING)
        self.last_val_time = time.monotonic()
        return True

    def renew(self) -> None:
        """Forget the loaders of an earlier fit."""
        self.data = self.validation.loader = self.validation.supply = None
        self.told, self.asked_ahead, self.opened = False, False, None

    def release(self) -> None:
        """Let go of iterators; the loaders stay, for those who look at them after a run, and so does their place."""
        for part in (self.data, self.validation.supply):
            if part is not None:
                part.release()

    def load_data(self, session: Session) -> batches.TrainingData:
        """Ask for the training loaders, once or when they are to be reloaded, and work out what depends on them."""
        config, progress = session.config, session.progress
        due = progress.reload_due(progress.last_train_reload, config.reload_dataloaders_every_n_epochs)
        if self.data is not None and not due:
            return self.data
        self.data = data = batches.TrainingData(session)
        self.turns, progress.update = session.turns, dict(session.update or {})
        if due:
            progress.last_train_reload = progress.epoch
        self.measure(session, data.num_batches)
        return data

    def measure(self, session: Session, num_batches: int | float) -> None:
        """Take the number of batches of the coming epoch, and work out what depends on it."""
        config, self.num_batches = session.config, num_batches
        self.interval = parse_val_check_interval(config.val_check_interval)
        across = config.check_val_every_n_epoch is None
        self.val_every, self.val_across = when.validation_batches(self.interval, num_batches, across, self.turns)

    # ------------------------------------------------------------------ around an epoch

    def start_epoch(self, session: Session) -> tuple[Iterator[Any], batches.Ahead]:
        """Reload data if asked, run ``on_train_epoch_start``, and return the iterator over the epoch's batches."""
        progress, resumed = session.progress, session.position
        if resumed is None:
            progress.batch_idx, progress.tail, progress.cut = 0, "", False
        begun = progress.batch_idx > 0 or bool(progress.tail) or (resumed is not None and resumed.opened)
        place = None if resumed is None else resumed.arrive(self, session, begun)
        data = self.load_data(session)
        data.settle(session, self.measure)
        if data.iterator is None:
            data.supply.start_epoch("train", progress.epoch)
        self.last = False
        if progress.cut or not (begun or place):
            session.hooks.on_train_epoch_start()
            data = self.data or data  # a callback may have found another batch size
        if resumed is not None and (begun or place):
            if place is not None:
                data.begin(session, place)
            resumed.settle(data.supply)
            if begun:
                self.last, self.steps = resumed.last, resumed.steps
                session.optimization.stepped = self.steps
            else:
                session.hooks.on_train_epoch_start()
        elif data.iterator is None:
            data.begin(session)
        session.position, progress.cut = None, False
        # the tail of a batch of the run that is resumed may be due, and all ranks are at it
        self.due, self.opened = progress.batches if progress.tail else self.next_due(session), progress.epoch
        return data.take()

    def end_epoch(self, session: Session) -> None:
        """Run ``on_train_epoch_end``, the schedules that wait for a metric, and write the row of the epoch."""
        progress, results = session.progress, session.results
        results.train.on_step, results.train.loader = False, None
        results.train.end_batch()
        progress.epoch_done = True
        session.agree_on_epoch()
        session.hooks.on_train_epoch_end()
        self.close_epoch(session)

    def close_epoch(self, session: Session) -> None:
        """What follows ``on_train_epoch_end``; a run that was saved in that hook begins with it."""
        progress, results = session.progress, session.results
        row = results.collect()
        if self.last and session.module.automatic_optimization:
            step_schedules(session, "epoch", True, progress.epoch + 1)
        session.rows.write(row, progress.batches_that_stepped - 1, progress.epoch)
        results.train.reset()
        progress.end_epoch(self.last)
        if self.data is not None and self.num_batches != self.data.num_batches:
            self.measure(session, self.data.num_batches)  # other processes had begun that epoch

    def finished(self, session: Session) -> bool:
        """Whether no further epoch runs; says why."""
        progress, trainer = session.progress, session.trainer
        session.agree_to_stop()
        reason = when.end_reached(progress, session.config, self.max_epochs)
        if progress.tail:
            return False  # a run that was saved after its last batch still has to end its epoch
        if reason is None and trainer.should_stop and self.may_stop(session):
            reason = when.who_stopped(trainer.callbacks, progress.epoch)
        if reason is not None:
            rank_zero_info(f"Trainer.fit stopped: {reason}.")
        return reason is not None

    def may_stop(self, session: Session) -> bool:
        """Whether ``min_epochs`` and ``min_steps`` allow to stop now."""
        progress = session.progress
        done = progress.epoch + (1 if progress.epoch_done else 0)
        return when.may_stop(progress, self.min_epochs, session.config.min_steps, done)

    # ------------------------------------------------------------------ the tail of a batch

    def ran_out(self, session: Session) -> None:
        """Deal with an epoch that ended before its loader said it would: all that belongs to its end still happens."""
        progress, optimization = session.progress, session.optimization
        batches.check_end(self.data, progress.batch_idx, progress.epoch)
        validated = self.validation_is_due(session)
        self.last, optimization.stepped = True, 0
        self.steps = bool(progress.batch_idx % session.trainer.batches_per_update) and optimization.automatic
        if self.steps:
            optimize.divisor_of(self, session, progress.batch_idx - 1, True)
            optimization.update()
            step_schedules(session, "step", False, progress.batch_idx)
        if optimization.automatic:
            step_schedules(session, "epoch", False, progress.epoch + 1)
        progress.tail = "log" if self.steps else "count" if validated else "validate"
        self.finish_batch(session)

    def next_due(self, session: Session) -> float:
        """The number of batches after which something may be due next."""
        progress, config = session.progress, session.config
        several = config.rule("global_step") == "optimizer steps" or not session.optimization.automatic
        if several and (config.max_steps >= 0 or self.interval.unit == "step"):
            return progress.batches + 1  # one batch may count for several
        for schedule in session.strategy.lr_scheduler_configs:
            if schedule.reduce_on_plateau and schedule.interval == "step":
                return progress.batches + 1
        return when.next_check(progress, config, self.interval, self.val_every, self.val_across)

    def validation_is_due(self, session: Session) -> bool:
        """Whether validation follows the batch that has just been counted."""
        trainer, progress = session.trainer, session.progress
        if not trainer.enable_validation or not when.epoch_validates(session.config, progress.epoch):
            return False
        if trainer.should_stop and self.may_stop(session):
            return True
        elapsed = session.seconds_since(self.last_val_time) if self.interval.unit == "time" else 0.0
        early = self.last and progress.batch_idx < self.num_batches < math.inf
        return when.validation_due(
            progress, self.interval, self.val_every, self.val_across, last=self.last, early=early,
            stepped=session.optimization.stepped, elapsed=elapsed,
        )  # fmt: skip

    def finish_batch(self, session: Session) -> bool:
        """Do what is due after a batch, from where ``progress.tail`` stands; return whether the epoch goes on."""
        progress, results, config, trainer = session.progress, session.results, session.config, session.trainer
        automatic = session.module.automatic_optimization
        counts = self.steps
        if session.across is not None:
            session.across.after_batch(progress.batches >= self.due or self.last, progress.batches)
        if progress.tail == "log":
            row = results.collect()  # also what no row wants: it stays readable while hooks read other values
            if counts or not automatic:
                due = when.row_due(progress.batches_that_stepped, config.log_every_n_steps) or trainer.should_stop
                if due or config.fast_dev_run:
                    session.rows.write(row, progress.batches_that_stepped, progress.epoch)
            progress.tail = "validate"
        results.train.end_batch()
        if progress.tail == "validate":
            if self.validation_is_due(session):
                self.validate(session)
            progress.tail = "count"
        if counts and automatic:
            step_schedules(session, "step", True, progress.batch_idx)
        progress.batches_that_stepped += counts
        progress.tail = ""
        if session.interrupt.received and session.strategy.ends_after(progress.batches):
            session.interrupt.answer()
        self.due = self.next_due(session) if progress.batches >= self.due else self.due  # the same on all ranks
        if self.last or (config.max_steps >= 0 and progress.global_step >= config.max_steps):
            return False
        if trainer.should_stop:
            if self.may_stop(session):
                return False
            self.due = progress.batches + 1
        return True

    def validate(self, session: Session) -> None:
        """Run validation inside training and come back."""
        session.enter(RunningStage.VALIDATING)
        if self.steps:
            if session.hooks.on_validation_model_zero_grad:
                session.hooks.on_validation_model_zero_grad()
            else:
                session.module.zero_grad()
        self.validation.run(session)
        session.enter(RunningStage.TRAINING)
        session.agree_to_stop()
        self.last_val_time = time.monotonic()
