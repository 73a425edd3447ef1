# SPDX-License-Identifier: Apache-2.0
"""The evaluation loop: validation inside fit, the sanity check, ``Trainer.validate`` and ``Trainer.test``.

on_*_model_eval, on_*_start, on_*_epoch_start
for each loader, for each batch:
    batch to device, on_*_batch_start, *_step, on_*_batch_end
on_*_epoch_end, a row with the values of the epoch, on_*_end, on_*_model_train
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from leyden.data.combined import CombinedLoader
from leyden.loops import batches
from leyden.loops.dispatch import Calls
from leyden.loops.metric_state import metrics_of
from leyden.loops.profiled import measured_iterator
from leyden.loops.session import Loop, Session
from leyden.results import to_floats
from leyden.runtime.seed import rng_state, set_rng_state
from leyden.strategies.base import IDLE
from leyden.types import RunningStage, TrainerFn

if TYPE_CHECKING:
    from leyden.data.position import Supply


class EvaluationLoop(Loop):
    """Runs ``validation_step`` or ``test_step`` over all batches of all loaders.

    Args:
        stage: VALIDATING or TESTING.
    """

    def __init__(self, stage: RunningStage) -> None:
        self.stage = stage
        self.prefix = "test" if stage is RunningStage.TESTING else "val"
        self.verbose = False
        self.loader: CombinedLoader | None = None
        self.supply: Supply | None = None
        self.load_rng: dict[str, Any] | None = None
        """State of the random generators when the loaders were asked for."""
        self.max_batches: list[int | float] = []
        self.batch_idx = 0
        self.before: Before | None = None
        """While a validation of a fit runs: what it changes, as it was before."""

    @property
    def ready(self) -> bool:
        """Whether the loaders are there."""
        return self.loader is not None

    def load_data(self, session: Session) -> None:
        """Ask for the loaders: once in a fit, or when they are to be reloaded; at each run otherwise."""
        config, progress = session.config, session.progress
        fitting = session.trainer.state.fn is TrainerFn.FITTING
        due = progress.reload_due(progress.last_val_reload, config.reload_dataloaders_every_n_epochs)
        if fitting and self.loader is not None and not due:
            return
        self.load_rng = rng_state() if fitting else None
        self.loader = batches.request(session, self.prefix, "sequential")
        step = getattr(session.module, _names(session, self.prefix).step)
        self.supply = batches.supply(session, self.loader, self.prefix, step)
        limit = config.limit_test_batches if self.prefix == "test" else config.limit_val_batches
        self.max_batches = batches.limits(self.loader, str(self.stage), limit, f"limit_{self.prefix}_batches")
        if fitting:
            if due and session.position is None:  # a run that goes on has to catch up with the former loaders first
                progress.last_val_reload = progress.epoch
            if len(progress.val_batches) != len(self.max_batches):
                progress.val_batches = [0] * len(self.max_batches)

    def limits(self, session: Session) -> list[int | float]:
        """How many batches of each loader run now: fewer in a sanity check."""
        if session.trainer.sanity_checking:
            most = session.config.num_sanity_val_steps
            return [min(math.inf if most == -1 else most, batches_) for batches_ in self.max_batches]
        return list(self.max_batches)

    def run(self, session: Session, stage: RunningStage | None = None) -> list[dict[str, float]]:
        """Evaluate; return the logged values of each loader."""
        session.enter(stage or self.stage)
        fitting = session.trainer.state.fn is TrainerFn.FITTING
        self.before = Before(session, self) if fitting and not session.trainer.sanity_checking else None
        # inside fit tensors of a validation may be wanted by training later: inference tensors could not
        inference = session.config.inference_mode and not fitting
        with session.strategy.evaluating(inference):
            self.load_data(session)
            assert self.loader is not None
            limits = self.limits(session)
            if batches.nothing(session, self.loader, limits):
                return []
            names = _names(session, self.prefix)
            step = getattr(session.module, names.step)
            batches.check_several(step, names.step, len(limits))
            outputs = self._run(session, names, step, limits)
        self.before = None
        return outputs

    def tell(self, results: list[dict[str, float]]) -> None:
        """Say the table of what ``run`` returned."""
        from leyden.loops.show import tell  # noqa: PLC0415  # at the end of an evaluation, not on import

        tell(results, str(self.stage))

    def _run(
        self, session: Session, names: _Names, step: Callable[..., Any], limits: list[int | float]
    ) -> list[dict[str, float]]:
        results, store = session.results, session.results.eval
        fitting, draws = session.trainer.state.fn is TrainerFn.FITTING, batches.takes(step, "dataloader_iter")
        loader, iterator = self._begin(session, limits, draws)
        several = len(limits) > 1 and loader.mode == "sequential"
        store.on_step, store.loader = False, None
        modes = {module: module.training for module in session.module.modules()}
        if names.model_eval:
            names.model_eval()
        else:
            session.module.eval()
        names.start()
        if self.loader is not loader:  # a callback has found another batch size
            limits = self.limits(session)
            loader, iterator = self._begin(session, limits, draws)
        names.epoch_start()
        transfer = session.transfer(draws)
        run_step = session.strategy.test_step if self.prefix == "test" else session.strategy.validation_step
        num_args = 1 if draws else 3 if several else max(batches.positional(step), 1)
        sanity = session.trainer.sanity_checking
        seen = session.progress.val_batches if fitting else [0] * len(limits)
        outputs: list[dict[str, Any]] = [{} for _ in (limits if loader.mode == "sequential" else (0,))]
        current = done = 0
        for batch, batch_idx, loader_idx in session.strategy.paced(batches.remaining(iterator)):
            while current < loader_idx:
                outputs[current] = self._end_loader(session, current if several else None, done)
                current, done = current + 1, 0
            if batch is IDLE:
                session.strategy.keep_up()
                continue
            self.batch_idx = batch_idx
            done += 1
            if transfer is not None:
                batch = transfer(batch, loader_idx)
            store.start_batch(batch, loader_idx if several else None)
            index = (batch_idx, loader_idx) if several else (batch_idx,)
            if names.batch_start:
                names.batch_start(batch.batch if draws else batch, *index)
            store.hook = names.step
            output = run_step(*(batch, *index)[:num_args])
            if names.batch_end:
                names.batch_end(output, batch.batch if draws else batch, *index)
            del output
            store.end_batch()
            if not sanity:
                row = results.collect()
                if row:
                    session.rows.write(row, seen[loader_idx])
                seen[loader_idx] += 1
            if session.interrupt.received and self.cuts(session):
                session.interrupt.answer()
        while current < len(outputs):
            outputs[current] = self._end_loader(session, current if several else None, done)
            current, done = current + 1, 0
        return self._finish(session, names, outputs, modes)

    def _begin(self, session: Session, limits: list[int | float], draws: bool) -> tuple[CombinedLoader, Iterator[Any]]:
        """Begin a pass over the loaders, with so many batches of each; return them and what to draw from."""
        loader, supply, progress = self.loader, self.supply, session.progress
        assert loader is not None
        assert supply is not None
        fitting = session.trainer.state.fn is TrainerFn.FITTING
        supply.start_epoch(*(self.prefix, progress.epoch, progress.batches) if fitting else (self.prefix, None))
        loader.limits = limits
        iterator, store = supply.triples(), session.results.eval
        if session.profiler is not None:
            iterator = measured_iterator(iterator, session.profiler, f"[_EvaluationLoop].{self.prefix}_next")
        if draws:
            iterator = batches.DataLoaderIter(
                iterator, math.inf, lambda batch: store.start_batch(batch, store.loader)
            ).turns()
        return loader, iterator

    def cuts(self, session: Session) -> bool:
        """Whether this evaluation can be cut short; inside fit it is then as if it had not begun, and is run as a whole
        when the fit goes on.

        It cannot where somebody does something of his own when a validation begins, such as to exchange the weights for
        averages: what he undoes when it ends would be left, and saved.
        """
        if session.strategy.world_size > 1:
            return False  # the others may be in another batch; all answer when this evaluation is over
        if session.trainer.state.fn is TrainerFn.FITTING:
            if _is_prepared(session):
                return False
            if self.before is not None:
                self.before.restore(session)
        return True

    def _end_loader(self, session: Session, index: int | None, done: int) -> dict[str, Any]:
        """The values of loader ``index``, which has just ended, after ``done`` batches."""
        store = session.results.eval
        store.on_step, store.loader = False, index
        if session.trainer.sanity_checking:
            return {}
        if session.across is not None:
            session.across.epoch(store, done)
        return session.results.collect()

    def _finish(
        self, session: Session, names: _Names, outputs: list[dict[str, Any]], modes: dict[nn.Module, bool]
    ) -> list[dict[str, float]]:
        results, store = session.results, session.results.eval
        store.on_step, store.loader = False, None
        names.epoch_end()
        sanity = session.trainer.sanity_checking
        if session.across is not None and not sanity:
            session.across.after_hook(store, names.epoch_end.name)
        closing = {} if sanity else results.collect()
        for output in outputs:
            output.update(closing)
        if not sanity:
            together = {name: value for output in reversed(outputs) for name, value in output.items()}
            session.rows.write({**together, **closing}, session.progress.batches_that_stepped, session.progress.epoch)
        if session.progress.tail == "validate" and session.trainer.state.fn is TrainerFn.FITTING:
            session.progress.tail = "count"  # a run that is saved from here on does not validate again
        names.end()
        store.reset()
        if names.model_train:
            names.model_train()
        else:
            for module, training in modes.items():
                module.training = training
        return [to_floats(output) for output in outputs]


class Before:
    """What a validation changes, as it was before: a run that is saved after a part of it begins it anew, exactly."""

    def __init__(self, session: Session, loop: EvaluationLoop) -> None:
        results, progress = session.results, session.progress
        self.rng, self.load_rng = rng_state(), loop.load_rng
        self.loaders = None if loop.supply is None else loop.supply.state_dict(None, cut=True)
        self.counters = {"val_batches": list(progress.val_batches), "last_val_reload": progress.last_val_reload}
        self.views = {"callback": dict(results.callback), "logged": dict(results.logged), "bar": dict(results.bar)}
        self.idle = {name: metric for name, metric in metrics_of(session.module).items() if not metric.update_count}

    def restore(self, session: Session) -> None:
        """Make it so again."""
        results = session.results
        results.eval.reset()
        results.callback, results.logged, results.bar = self.views.values()
        for metric in self.idle.values():
            metric.reset()
        session.progress.load_state_dict(self.counters)
        set_rng_state(self.rng)
        session.enter(RunningStage.TRAINING)


def _is_prepared(session: Session) -> bool:
    hooks = ("on_validation_model_eval", "on_validation_start", "on_validation_epoch_start")
    owners = (session.module, *session.trainer.callbacks)
    homes = [str(getattr(getattr(owner, hook, None), "__module__", "leyden.")) for owner in owners for hook in hooks]
    return not all(home.startswith("leyden.") for home in homes)


class _Names:
    """The hooks of one kind of evaluation."""

    def __init__(self, session: Session, kind: str) -> None:
        hooks = session.hooks

        def calls(name: str) -> Calls:
            found: Calls = getattr(hooks, name)
            return found

        self.step = f"{kind}_step"
        self.model_eval = calls(f"on_{kind}_model_eval")
        self.model_train = calls(f"on_{kind}_model_train")
        self.start, self.end = calls(f"on_{kind}_start"), calls(f"on_{kind}_end")
        self.epoch_start, self.epoch_end = calls(f"on_{kind}_epoch_start"), calls(f"on_{kind}_epoch_end")
        self.batch_start, self.batch_end = calls(f"on_{kind}_batch_start"), calls(f"on_{kind}_batch_end")


def _names(session: Session, prefix: str) -> _Names:
    return _Names(session, "test" if prefix == "test" else "validation")
