# SPDX-License-Identifier: Apache-2.0
"""A run inside a hook of another: batches are run on trial, and afterwards everything is as if they had not been."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from leyden.data.loaders import length
from leyden.errors import MisconfigurationException
from leyden.loggers.base import DummyLogger
from leyden.loggers.history import History
from leyden.loops import batches
from leyden.loops.evaluate import EvaluationLoop
from leyden.loops.fit import FitLoop
from leyden.loops.metric_state import metrics_of
from leyden.loops.optimize import Optimization
from leyden.loops.predict import PredictLoop
from leyden.loops.session import Session
from leyden.loops.start import make_session
from leyden.loops.undo import Undo
from leyden.module import LightningModule
from leyden.optim import LRSchedulerConfig
from leyden.results import Results
from leyden.runtime.memory import garbage_collection_cuda, is_oom_error
from leyden.types import RunningStage, TrainerFn

_PREFIXES = {
    TrainerFn.FITTING: "train",
    TrainerFn.VALIDATING: "val",
    TrainerFn.TESTING: "test",
    TrainerFn.PREDICTING: "predict",
}


class Rehearsal:
    """Runs batches of a run on trial, as often as wanted, between ``with`` and the end of the block.

    Whatever is run then has the module, the optimizers and the data of the run, but callbacks and loggers of its own, and
    its own counters of batches. At the end of the block the module, the optimizers and their schedules, metric objects,
    random generators, counters, results and the Trainer itself are what they were.

    Args:
        trainer: Whose run it is.
        session: That run.

    Attributes:
        prefix: Which loaders the run takes: ``"train"``, ``"val"``, ``"test"`` or ``"predict"``.
        fits: Whether the run is a fit.
    """

    def __init__(self, trainer: Any, session: Session | None) -> None:
        if session is None:
            raise MisconfigurationException(
                "Trainer.rehearsal() works inside a run only, in a hook such as on_fit_start: no run is going on."
            )
        self.trainer, self.session = trainer, session
        self.prefix = _PREFIXES[trainer.state.fn]
        self.fits = self.prefix == "train"
        self._undo: Undo | None = None
        self._loader: Any = getattr(trainer, f"{trainer.state.fn}_loop").loader
        self._strategy = trainer.strategy

    # ------------------------------------------------------------------ what the run is like

    @property
    def given(self) -> bool:
        """Whether the loaders were given to the entry point, rather than made by the module or the data module."""
        return self.session.sources.get(self.prefix) is not None

    @property
    def world_size(self) -> int:
        """How many processes take part in the run."""
        return int(self._strategy.world_size)

    def on_its_own(self) -> None:
        """From now on this process runs its batches without the others, so that one may fail and the others go on.

        Raises:
            MisconfigurationException: where a step takes all processes together.
        """
        strategy = self._strategy.on_its_own()
        if strategy is None:
            raise MisconfigurationException(
                f"{type(self._strategy).__name__} takes all processes for each step, so that one cannot try by itself how"
                " large a batch can be. Find it with one device, or with strategy='ddp', which can."
            )
        self._strategy = strategy

    def loader(self) -> Any:
        """The loaders of the last trial, or else of now, as a CombinedLoader."""
        if self._loader is None:
            mode = "max_size_cycle" if self.fits else "sequential"
            self._loader = batches.request(self.session, self.prefix, mode)
        return self._loader

    def num_samples(self) -> float | None:
        """How many samples the data sets of ``loader`` have, as its mode counts them; None where none has a length."""
        combined = self.loader()
        data = [getattr(loader, "dataset", None) for loader in combined.flattened]
        lengths = [count for each in data if (count := length(each)) < math.inf]
        if not lengths:
            return None
        return sum(lengths) if combined.mode == "sequential" else (min if combined.mode == "min_size" else max)(lengths)

    # ------------------------------------------------------------------ on trial

    def __enter__(self) -> Rehearsal:
        self._undo = Undo(self.session)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._undo is not None
        self._undo.restore()
        self._undo = None

    def fits_in_memory(self, callbacks: Iterable[Any] = (), **settings: Any) -> bool:
        """Run batches as ``run`` does; return whether memory was enough, in all processes."""
        self._loader, enough = None, True
        try:
            self.run(callbacks, **settings)
        except Exception as error:
            if not is_oom_error(error):
                raise
            enough = False
        # here, where the error has let go of its frames and their tensors
        if not enough or self._strategy.root_device.type != "cpu":
            garbage_collection_cuda()
        return bool(self.trainer.strategy.reduce_boolean_decision(enough))

    def run(
        self, callbacks: Iterable[Any] = (), schedules: list[LRSchedulerConfig] | None = None, **settings: Any
    ) -> None:
        """Run the loop of the run from where its counters stand, until it ends.

        Args:
            callbacks: The only ones that are called.
            schedules: In the place of those of the optimizers; None leaves them.
            settings: Of the Trainer's knobs (``max_steps``, ``limit_val_batches``, ...), for this time.
        """
        trainer, outer = self.trainer, self.session
        own, loop, progress = vars(trainer), trainer.fit_loop, trainer.progress
        # in place: strategies, and whoever watches over a run of several processes, hold these two
        former, kept, counters = dict(own), dict(vars(loop)), progress.state_dict()
        stage, scheduled, brings = trainer.state.stage, outer.strategy.lr_scheduler_configs, outer.strategy.brings
        own.update(
            _callbacks=list(callbacks), _loggers=[DummyLogger()] if trainer.loggers else [], results=Results(),
            history=History(), should_stop=False, _profiler=None, _strategy=self._strategy,
            config=trainer.config.replace(**{"cuda_graphs": False, "num_workers": None, **settings}),
        )  # fmt: skip
        vars(loop).clear()
        vars(loop).update(vars(FitLoop()), min_epochs=kept["min_epochs"], max_epochs=kept["max_epochs"])
        progress.load_state_dict({"batch_idx": 0, "tail": "", "epoch_done": False, "cut": False})
        session = self._begin(schedules)
        try:
            with _quietly(), _without_meetings(outer.module, self._strategy is former["_strategy"]):
                self._loop(session)
        finally:
            self._loader = self._loader or _loader_of(trainer)
            _end(session)
            vars(loop).clear()
            vars(loop).update(kept)
            own.update(former)
            progress.load_state_dict(counters)
            trainer.state.stage = stage
            if self.fits:
                verbs = outer.optimization.step_with_closure, outer.optimization.backward
                outer.strategy.set_optimizers(outer.optimization.optimizers, scheduled, *verbs)
            outer.strategy.brings = brings
            outer.module.log_into(None if outer.config.barebones else outer.results)

    def stop(self) -> None:
        """End a fit on trial with this batch; to be called after the same batch in all processes."""
        self.trainer.should_stop = True
        self.trainer.fit_loop.due = 0  # so that all meet here, and none asks whether the others stop as well

    def _begin(self, schedules: list[LRSchedulerConfig] | None) -> Session:
        trainer, outer, strategy = self.trainer, self.session, self._strategy
        session = make_session(trainer, outer.module, outer.datamodule, dict(outer.sources), outer.interrupt)
        session.compiler, session.compilation = outer.compiler, None
        vars(trainer).update(_session=session, _recorder=session.recorder)
        session.bind(trainer.callbacks, None)
        if self.fits:
            optimizers = outer.optimization.optimizers
            strategy.optimizers = optimizers
            optimization = session.optimization = Optimization(session)
            found = outer.strategy.lr_scheduler_configs if schedules is None else schedules
            strategy.set_optimizers(optimizers, found, optimization.step_with_closure, optimization.backward)
        return session

    def _loop(self, session: Session) -> None:
        trainer = self.trainer
        if self.fits:
            trainer.fit_loop.run(session)
            return
        loop: Any = PredictLoop() if self.prefix == "predict" else EvaluationLoop(_STAGES[self.prefix])
        if self.prefix == "predict":
            loop.return_predictions = False
        vars(trainer)[f"{trainer.state.fn}_loop"] = loop
        loop.run(session)

    # ------------------------------------------------------------------ for the run itself

    def reload(self, always: bool = False) -> None:
        """Let the run ask for its loaders anew: what they are made from has changed.

        Args:
            always: Also where it has not asked for any yet.
        """
        trainer, session = self.trainer, self.session
        if not self.fits:
            getattr(trainer, f"{trainer.state.fn}_loop").load_data(session)
            return
        loop = trainer.fit_loop
        if loop.data is None and not always:
            return
        loop.data = None
        data = loop.load_data(session)
        data.settle(session, loop.measure)
        data.supply.start_epoch("train", session.progress.epoch)
        loop.validation.loader = None
        if always and trainer.enable_validation:
            loop.validation.load_data(session)


_STAGES = {"val": RunningStage.VALIDATING, "test": RunningStage.TESTING}


def _loader_of(trainer: Any) -> Any:
    """The loaders that a trial has had."""
    return getattr(trainer, f"{trainer.state.fn}_loop").loader


def _end(session: Session) -> None:
    """Let go of what a trial has made."""
    for supply in session.supplies.values():
        supply.release()
    session.recorder.close("success", reraise=False)
    session.let_go()


@contextmanager
def _quietly() -> Iterator[None]:
    """Leave out what a loop says of its end: it is not that of the user's run."""
    logger = logging.getLogger("leyden")

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Trainer.fit stopped")

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


@contextmanager
def _without_meetings(module: LightningModule, together: bool) -> Iterator[None]:
    """Let metric objects count for this process alone, unless all take part: the others might not come."""
    metrics = [] if together else [each for each in metrics_of(module).values() if hasattr(each, "sync_on_compute")]
    former = [metric.sync_on_compute for metric in metrics]
    for metric in metrics:
        metric.sync_on_compute = False
    try:
        yield
    finally:
        for metric, sync in zip(metrics, former, strict=True):
            metric.sync_on_compute = sync
