# SPDX-License-Identifier: Apache-2.0
"""The prediction loop: ``predict_step`` over all batches, and what it returned if somebody wants to keep it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader

from leyden.data.combined import CombinedLoader
from leyden.data.loaders import stop_workers
from leyden.errors import MisconfigurationException
from leyden.loops import batches
from leyden.loops.session import Session
from leyden.strategies.base import IDLE
from leyden.tree import move_to
from leyden.types import RunningStage


class PredictLoop:
    """Runs ``predict_step`` over all batches of all loaders.

    ``return_predictions`` None keeps the predictions and returns them, False keeps none (memory stays flat).
    """

    def __init__(self) -> None:
        self.return_predictions = True
        self.gather = False
        """Whether each process returns what all have predicted, in the order of the data."""
        self._dealt: list[Any] = []
        self.loader: CombinedLoader | None = None
        self.max_batches: list[int | float] = []
        self._kept: list[list[Any]] = []
        self.epoch_batch_indices: list[list[list[int]]] = []
        """For each loader and batch, the indices of its samples in the data set, for writers at the end of the epoch."""
        self.current_batch_indices: list[int] = []
        """The indices of the samples in the batch that runs now; empty where the sampler does not tell."""

    def load_data(self, session: Session) -> None:
        """Ask for the loaders."""
        self.loader = batches.request(session, "predict", "sequential")
        limit = session.config.limit_predict_batches
        self.max_batches = batches.limits(self.loader, "predict", limit, "limit_predict_batches")
        if self.loader.mode != "sequential":
            raise MisconfigurationException(
                f"predict() takes loaders one after the other: CombinedLoader(mode={self.loader.mode!r}) must be"
                " 'sequential'."
            )

    @property
    def predictions(self) -> list[Any]:
        """What has been predicted and kept so far: per batch, or per loader and batch where there are several loaders."""
        return self._kept[0] if len(self._kept) == 1 else self._kept

    def run(self, session: Session) -> list[Any] | None:
        """Predict; return the list of predictions (of lists, with several loaders), or None."""
        session.enter(RunningStage.PREDICTING)
        with session.strategy.evaluating(session.config.inference_mode):
            predictions = self._predict(session)
        if not self.gather or predictions is None or session.strategy.world_size == 1:
            return predictions
        from leyden.loops import ordered  # noqa: PLC0415  # for those who ask for it

        dealt, self._dealt = self._dealt, []
        found = ordered.gather(session.strategy, dealt)
        return found[0] if len(found) == 1 else found

    def _predict(self, session: Session) -> list[Any] | None:
        self.load_data(session)
        assert self.loader is not None
        self._deal([[] for _ in self.max_batches], [[] for _ in self.max_batches])
        if batches.nothing(session, self.loader, self.max_batches):
            return []
        batches.check_several(session.module.predict_step, "predict_step", len(self.max_batches))
        self._kept = [[] for _ in self.max_batches]
        self.epoch_batch_indices = [[] for _ in self.max_batches]
        writers = [getattr(callback, "interval", None) for callback in session.trainer.callbacks]
        # callbacks that write at the end need the predictions, those that write at all the indices of the samples
        keep = self.return_predictions or any(getattr(interval, "on_epoch", False) for interval in writers)
        track = self.gather or any(hasattr(interval, "on_epoch") for interval in writers)
        self.loader.limits = list(self.max_batches)
        try:
            with ExitStack() as stack:
                indices = [stack.enter_context(_indices(item if track else None)) for item in self.loader.flattened]
                self._run(session, indices, keep)
            self._deal(self._kept, self.epoch_batch_indices)
            return self.predictions if self.return_predictions else None
        finally:
            self._kept, self.epoch_batch_indices, self.current_batch_indices = [], [], []

    def _deal(self, outputs: list[list[Any]], indices: list[list[list[int]]]) -> None:
        """Note what there is to gather, if anything is."""
        if self.gather and self.loader is not None:
            from leyden.data.sharding import deal_of  # noqa: PLC0415  # see run
            from leyden.loops.ordered import Predicted  # noqa: PLC0415  # see run

            rows = zip(self.loader.flattened, outputs, indices, strict=True)
            self._dealt = [Predicted(deal_of(loader), kept, [len(i) for i in seen]) for loader, kept, seen in rows]

    def _run(self, session: Session, indices: list[Callable[[int], list[int]]], keep: bool) -> None:
        hooks, module = session.hooks, session.module
        assert self.loader is not None
        supply = batches.supply(session, self.loader, "predict", module.predict_step)
        supply.start_epoch("predict", None)
        iterator = supply.triples()
        modes = {child: child.training for child in module.modules()}
        if hooks.on_predict_model_eval:
            hooks.on_predict_model_eval()
        else:
            module.eval()
        hooks.on_predict_start()
        hooks.on_predict_epoch_start()
        several, draws = len(self.max_batches) > 1, batches.takes(module.predict_step, "dataloader_iter")
        if draws:
            iterator = batches.DataLoaderIter(iterator, math.inf).turns()
        num_args = 1 if draws else 3 if several else max(batches.positional(module.predict_step), 1)
        transfer = session.transfer(draws)
        for batch, batch_idx, loader_idx in session.strategy.paced(batches.remaining(iterator)):
            if batch is IDLE:
                session.strategy.keep_up()
                continue
            if transfer is not None:
                batch = transfer(batch, loader_idx)
            self.current_batch_indices = indices[loader_idx](batch_idx)
            args = (batch, batch_idx, loader_idx) if several else (batch, batch_idx)
            if hooks.on_predict_batch_start:
                hooks.on_predict_batch_start(batch.batch if draws else batch, *args[1:])
            output = session.strategy.precision.convert_output(session.strategy.predict_step(*args[:num_args]))
            if hooks.on_predict_batch_end:
                hooks.on_predict_batch_end(output, batch.batch if draws else batch, *args[1:])
            self.epoch_batch_indices[loader_idx].append(self.current_batch_indices)
            if keep:
                self._kept[loader_idx].append(move_to(output, torch.device("cpu")))
            del output
            if session.interrupt.received and session.strategy.world_size == 1:
                session.interrupt.answer()
        hooks.on_predict_epoch_end()
        hooks.on_predict_end()
        if hooks.on_predict_model_train:
            hooks.on_predict_model_train()
        else:
            for child, training in modes.items():
                child.training = training


class _Recorder:
    """A batch sampler that remembers what it handed out: workers fetch ahead, so the loop cannot ask it afterwards."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.seen: list[list[int]] = []

    def __iter__(self) -> Iterator[Any]:
        self.seen = []
        for indices in self.sampler:
            self.seen.append(list(indices) if isinstance(indices, (list, tuple)) else [indices])
            yield indices

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)


@contextmanager
def _indices(loader: Any) -> Iterator[Callable[[int], list[int]]]:
    """For the length of the block, let ``loader`` tell which samples a batch holds; empty where that is not known."""
    sampler = loader.batch_sampler if isinstance(loader, DataLoader) else None
    if sampler is None:
        yield lambda _: []
        return
    recorder = _Recorder(sampler)
    stop_workers(loader)  # those that persist go on with the sampler they began with
    # past DataLoader's own guard, which would have us build the user's loader anew; put back below
    object.__setattr__(loader, "batch_sampler", recorder)
    try:
        yield lambda batch_idx: recorder.seen[batch_idx]
    finally:
        object.__setattr__(loader, "batch_sampler", sampler)
        stop_workers(loader)
