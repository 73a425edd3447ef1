# SPDX-License-Identifier: Apache-2.0
"""Where a fit stands in its data: gathered for a checkpoint, and found again when a fit goes on from one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from leyden.data.feed import Pass
from leyden.data.position import Place, Supply
from leyden.data.reshare import Layout, Move
from leyden.loops.batches import TrainingData
from leyden.loops.evaluate import Before
from leyden.loops.fit import FitLoop
from leyden.loops.session import FORESEEN, Session
from leyden.progress import Progress
from leyden.runtime.ranks import rank_zero_info, rank_zero_warn
from leyden.runtime.seed import rng_state, set_rng_state


def gather(loop: FitLoop, progress: Progress, accumulate: int = 1) -> dict[str, Any]:
    """Return the state of the loaders of a fit, training and validation, as plain data; warns, once, of those without."""
    before, validation = unfinished(loop, progress), loop.validation
    state: dict[str, Any] = {"load_rng": None, "val_load_rng": validation.load_rng}
    if loop.data is not None and loop.data.settled:
        # all batches are done where the tail of the last one is what is left of the epoch
        opened = loop.opened == progress.epoch and not progress.epoch_done
        inside = (progress.batch_idx > 0 or opened) and not progress.epoch_done and not (loop.last and progress.tail)
        state["opened"] = opened and not progress.batch_idx
        place = loop.data.place(progress.batch_idx, inside)
        state["load_rng"] = loop.data.load_rng
        state["layout"] = {"shares": loop.data.layout.shares, "turns": loop.turns, "accumulate": accumulate}
        state["train"] = loop.data.supply.state_dict(place, cut=getattr(loop.data.ahead, "cut", False))
        if place is not None and not loop.told:
            for why in loop.data.supply.why_not():
                loop.told = True
                rank_zero_warn(f"This checkpoint is inside an epoch that cannot be gone on with exactly: {why}.")
    if before is not None and before.loaders is not None:
        state["val"], state["val_load_rng"] = before.loaders, before.load_rng
    elif validation.supply is not None:
        state["val"] = validation.supply.state_dict(None, cut=True)
    return state


def ask_ahead(loop: FitLoop, session: Session) -> None:
    """Ask for the training loaders before a fit that goes on has its counters back: as of the epoch in which it goes on.

    It may be one of several processes that asks: nothing here is an exchange that all must take part in.
    """
    session.strategy.announce(FORESEEN)
    ours = (session.checkpoint or {}).get("leyden") or {}
    if "data" not in ours:
        _foresee(loop, session, loop.load_data(session))
        return
    progress, random = session.progress, rng_state()
    before = progress.state_dict()
    progress.load_state_dict(ours["progress"])
    if progress.epoch_done:
        progress.end_epoch(ours.get("last", False))
    if (state := ours["data"].get("load_rng")) is not None:
        set_rng_state(state)
    _ask(loop, session)
    loop.asked_ahead = True
    progress.load_state_dict(before)
    set_rng_state(random)
    assert loop.data is not None
    _foresee(loop, session, loop.data)


def _foresee(loop: FitLoop, session: Session, data: TrainingData) -> None:
    data.foresee(session)
    loop.measure(session, data.num_batches)


def _ask(loop: FitLoop, session: Session) -> None:
    last = session.progress.last_train_reload
    loop.load_data(session)
    session.progress.last_train_reload = last


def unfinished(loop: FitLoop, progress: Progress) -> Before | None:
    """What was there before the validation that runs now, which a resume begins anew; None if none runs."""
    return loop.validation.before if progress.tail == "validate" else None


def lightning_states(train: Mapping[str, Any] | None, supply: Supply | None) -> list[Any]:
    """Return, of what ``gather`` returned for training, the states of loaders that keep one, in Lightning's way."""
    if train is None or supply is None:
        return []
    own = train["own"] if train["place"] is None else train["place"]["own"]
    states = [state for feed, state in zip(supply.feeds, own, strict=True) if feed.how == "state"]
    return states if any(state is not None for state in states) else []


class Position:
    """Brings the generators and the loaders to where a checkpoint was written, once, when its epoch begins.

    Args:
        rng: Generators when the checkpoint was written; None for files that have none.
        data: What ``gather`` returned; None for files that have none.
        loaders: States of the training loaders that keep one, as Lightning saves them.
        last: Whether the last batch before the checkpoint ended the epoch.
        steps: Whether it ended with an update.
        window: State of a window of accumulation that was open; None if none was.
    """

    def __init__(
        self,
        rng: Any,
        data: dict[str, Any] | None,
        loaders: list[Any],
        last: bool,
        steps: bool,
        window: dict[str, Any] | None = None,
    ) -> None:
        self.rng, self.loaders = rng, loaders
        self.data: dict[str, Any] = data or {}
        self.last, self.steps, self.window = last, steps, window

    @property
    def opened(self) -> bool:
        """Whether the epoch had begun, and its iterator been made, though no batch of it was done."""
        return bool(self.data.get("opened"))

    @property
    def validated(self) -> bool:
        """Whether the validation loaders had been asked for."""
        return "val" in self.data

    def load(self, loop: FitLoop, session: Session) -> None:
        """Ask for the loaders; hooks that draw random numbers then draw those that they drew the first time.

        Where they are due to be reloaded, that comes later, as it did in the run that was not interrupted.
        """
        if session.config.reload_dataloaders_every_n_epochs and not loop.asked_ahead:
            loop.data = None  # they may depend on the epoch, which was not known if they have been asked for already
        loop.asked_ahead = False
        if loop.data is None:
            self._put(self.data.get("load_rng"))
            _ask(loop, session)
        self._put(self.data.get("val_load_rng"))

    def arrive(self, loop: FitLoop, session: Session, begun: bool) -> Place | None:
        """Put back, before an iterator is made, all that holds wherever the loaders stand; return their place, if any."""
        assert loop.data is not None
        supply, validation, progress = loop.data.supply, loop.validation.supply, session.progress
        progress.update = dict(session.update or {})  # as it is now, not as it was saved
        progress.resized = progress.resized or session.resized
        moved = self._move(loop, session)
        if moved is not None:
            place = supply.load_state_dict(self.data["train"], "training", moved)
            self._count_anew(moved, place, loop, session)
            if moved.back:
                self._begin_window_anew(session)
        elif "train" in self.data:
            place = supply.load_state_dict(self.data["train"], "training")
            if place is not None and place.drawn != self.data["train"]["place"]["drawn"]:
                progress.batch_idx = place.drawn  # batches have another size now
        else:
            place = self._lightning(supply, progress, begun)
        if "val" in self.data and validation is not None:
            validation.load_state_dict(self.data["val"], "validation", moved)  # its loaders stand at their beginning
        self._put(self.rng)
        return place

    def _move(self, loop: FitLoop, session: Session) -> Move | None:
        """How this process goes on with the data of those that were at it; None where they are as many."""
        assert loop.data is not None
        if "train" not in self.data:
            return None
        former, now = Layout(**self.data.get("layout", {})), loop.data.layout
        redo = bool(self.data.get("redo"))
        if (former.shares, former.turns) == (now.shares, now.turns) and not redo:
            return None
        return Move(former, now, session.strategy.data_rank, session.progress.batch_idx, redo)

    def _count_anew(self, moved: Move, place: Place | None, loop: FitLoop, session: Session) -> None:
        """Let the counters of batches, and the end of the epoch, be those of the processes that go on."""
        progress, data = session.progress, loop.data
        assert data is not None
        progress.batches = moved.batches(progress.batches)
        progress.batch_idx = moved.batches(progress.batch_idx)
        if moved.kept or not data.sized:
            return
        if place is not None and data.loader.limits is not None:
            left = min(session.strategy.gather_objects(data.supply.left(place, data.loader.limits)))
            data.epoch_batches = place.drawn + left
            loop.measure(session, data.epoch_batches)
        elif self.last and progress.batch_idx:
            progress.batch_idx = int(loop.num_batches)  # what is due after the last batch is due now

    def _begin_window_anew(self, session: Session) -> None:
        """Compute an update once more that was open, and that these processes cannot share out evenly."""
        session.module.zero_grad()
        session.optimization.end_window()
        session.optimization.window_weights, self.steps = {}, True
        rank_zero_info(
            "The checkpoint is inside an update that other processes cannot go on with: not all had had their turn, or each"
            " has a part of its gradients. It is computed anew from its first batch. No gradient is lost or counted twice;"
            " what was logged of its batches is counted once more."
        )

    def _lightning(self, supply: Supply, progress: Progress, begun: bool) -> Place | None:
        """The place by a file that knows only how many batches are done, and the states of loaders that keep one."""
        own = iter(self.loaders)
        states = [next(own, None) if feed.how == "state" else None for feed in supply.feeds]
        if begun and not (self.last and progress.tail):
            done = progress.batch_idx
            return Place(done, [Pass() for _ in states], [done] * len(states), states)
        for feed, state in zip(supply.feeds, states, strict=True):
            feed.put_own(state)
            if self.last:
                feed.finish(state)
        return None

    def settle(self, supply: Supply) -> None:
        """Put back what finding the place has changed, once the iterator stands there."""
        if "train" in self.data:
            for feed, saved in zip(supply.feeds, self.data["train"]["loaders"], strict=True):
                feed.streams.put(saved["held"])
        self._put(self.rng)

    @staticmethod
    def _put(state: Any) -> None:
        if state is not None:
            set_rng_state(state)
