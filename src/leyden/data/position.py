# SPDX-License-Identifier: Apache-2.0
"""The loaders of one stage as a loop draws from them, and the place in them from which a later run goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from leyden.data.combined import CombinedLoader
from leyden.data.feed import Feed, Pass
from leyden.data.generators import Streams, plain, raw
from leyden.data.loaders import length, set_epoch
from leyden.data.whole import Whole
from leyden.errors import CheckpointError
from leyden.runtime.cores import cores
from leyden.runtime.ranks import rank_zero_warn

if TYPE_CHECKING:
    from leyden.data.reshare import Move
    from leyden.data.resident import Shelf


@dataclass
class Place:
    """Where loaders stand between two batches. Cheap to take; it becomes plain data when it is written."""

    drawn: int
    """How many batches have been drawn from all of them together."""
    passes: list[Pass]
    done: list[int]
    """How many of them were drawn from each loader in its pass."""
    own: list[Any]
    """States of loaders or data sets that keep one."""
    combined: dict[str, Any] = field(default_factory=dict)
    """Which loaders have started again in the epoch."""
    ahead: list[dict[str, Any]] = field(default_factory=list)
    """Random generators before each batch that had been drawn already though its turn comes later."""
    began: int = 0
    """How many of ``drawn`` come from passes before this one, where a rank begins its loaders anew within an epoch."""


class Supply:
    """All loaders of one stage, each by way of a feed.

    Args:
        combined: The loaders.
        seeding: As for ``Feed``.
        seed: As for ``Feed``.
        fast: Whether batches of data in memory are read as a whole.
        shelf: Keeps such data on the device; None where batches begin on the host.
        keep: As for ``Feed``; all loaders together keep no more workers than there are cores for them.
        loaders: What is drawn from in the place of ``combined.flattened``; None for those themselves.
    """

    def __init__(
        self, combined: CombinedLoader, seeding: str = "torch", seed: int = 0, fast: bool = False,
        shelf: Shelf | None = None, keep: bool = False, loaders: list[Any] | None = None,
    ) -> None:  # fmt: skip
        self.combined = combined
        loaders = combined.flattened if loaders is None else loaders
        workers = [int(getattr(loader, "num_workers", 0)) for loader in loaders if isinstance(loader, DataLoader)]
        keep = keep and (len(workers) < 2 or sum(workers) <= max(cores(), *workers))
        self.feeds = [Feed(loader, seeding, seed, keep) for loader in loaders]
        for feed in self.feeds if fast else ():
            feed.whole = Whole(feed.loader, shelf)
        self.single = len(self.feeds) == 1 and combined.flattened[0] is combined.iterables
        held = {f"{i}.{name}": g for i, feed in enumerate(self.feeds) for name, g in feed.streams.held.items()}
        self.streams = Streams(held)
        self.began = 0
        """How many batches of the epoch had been drawn when the loaders were last begun anew within it."""
        self.agree: Callable[[], None] | None = None
        """Lets all ranks draw from one random state; None for one process."""
        self._since = 0
        """The batch of the epoch at which the pass over a single loader was begun: not 0 where others had begun it."""

    @property
    def keeps_state(self) -> bool:
        """Whether a loader, or its data set, keeps a state: it must come to know that an epoch has ended."""
        return any(feed.how in ("state", "dataset") for feed in self.feeds)

    def start_epoch(self, stage: str, epoch: int | None, moment: int = 0) -> None:
        """Tell all samplers which epoch begins (None: there are none); ``moment`` tells passes of one epoch apart."""
        for i, feed in enumerate(self.feeds):
            if epoch is not None:
                set_epoch(feed.loader, epoch)
            feed.key, feed.passes = (stage, i, epoch or 0, moment), 0
        if self.agree is not None:
            self.agree()

    def iterate(self, place: Place | None = None) -> Iterator[Any]:
        """Begin an epoch, or go on at ``place``; yields batches of a single loader, else triples as CombinedLoader does."""
        self._since = place.drawn - place.began - place.done[0] if place is not None and self.single else 0
        if place is not None:
            for feed, run, done, own in zip(self.feeds, place.passes, place.done, place.own, strict=True):
                feed.put_own(own)
                feed.resume = (run, done)
        if self.single:
            return iter(self.feeds[0])
        iterator = self.combined.begin(self.feeds)
        if place is not None:
            iterator.put_place(place.combined, place.drawn - place.began)
        return iterator

    def triples(self) -> Iterator[tuple[Any, int, int]]:
        """Begin to iterate; yields triples as CombinedLoader does, of a single loader too."""
        return self.combined.begin(self.feeds)

    def place(self, drawn: int) -> Place:
        """Return where the loaders stand when ``drawn`` batches of the epoch are done."""
        combined = {} if self.single else self.combined.place()
        here = drawn - self.began
        starts = [min(start, here) for start in combined.get("starts", [self._since] * len(self.feeds))]
        passes, own = [feed.run or Pass() for feed in self.feeds], [feed.own() for feed in self.feeds]
        return Place(drawn, passes, [here - start for start in starts], own, combined, began=self.began)

    def release(self) -> None:
        """Let go of iterators and of the copies that iterate; the loaders stay."""
        for feed in self.feeds:
            feed.release()

    def why_not(self) -> list[str]:
        """Say, for each loader that a resume cannot set to its place, why, and what it does instead."""
        return [why for feed in self.feeds if (why := feed.why_not())]

    # ------------------------------------------------------------------ in a checkpoint

    def state_dict(self, place: Place | None, cut: bool = False) -> dict[str, Any]:
        """Return all that a resume needs, as plain data; ``place`` is None between two epochs.

        ``cut`` says that the next epoch begins anew, not where loaders with a state stand: the last was shorter than they.
        """
        state: dict[str, Any] = {
            "loaders": [{**feed.now(), "about": _about(feed)} for feed in self.feeds],
            "place": None,
        }
        if place is None:
            # asking one that has not begun could make it begin
            state["own"] = [None if cut or feed.run is None else feed.own() for feed in self.feeds]
            return state
        state["place"] = {
            "drawn": place.drawn,
            "done": place.done,
            "own": place.own,
            "combined": place.combined,
            "began": place.began,
            "ahead": [plain(streams) for streams in place.ahead],
            "passes": [run.plain(feed.changed) for run, feed in zip(place.passes, self.feeds, strict=True)],
        }
        return state

    def left(self, place: Place, limits: list[int | float]) -> int | float:
        """Return how many batches of the epoch are left at ``place``, with at most ``limits`` of each loader in all."""
        from leyden.data.reshare import left_of  # noqa: PLC0415  # where another number of processes goes on

        counts = [left_of(*each) for each in zip(self.feeds, place.done, limits, strict=True)]
        if self.combined.mode == "min_size":
            return min(counts)
        # one that was exhausted before has started again, and is not waited for
        consumed = place.combined.get("consumed", [False] * len(counts))
        return max((count for count, over in zip(counts, consumed, strict=True) if not over), default=0)

    def load_state_dict(self, state: Mapping[str, Any], what: str, move: Move | None = None) -> Place | None:
        """Put back what holds wherever the loaders stand; return the place in the epoch, None for between two epochs.

        ``move`` is how other processes go on with it than those that were at it; None where they are as many.

        Raises:
            CheckpointError: where the loaders are not those that the state was taken from.
        """
        loaders = state["loaders"]
        if len(loaders) != len(self.feeds):
            raise CheckpointError(
                f"The checkpoint stands in {len(loaders)} {what} loaders, but there are {len(self.feeds)} now. Resume with"
                " as many loaders as it was written with."
            )
        for feed, saved in zip(self.feeds, loaders, strict=True):
            feed.put_now(saved)
        place = state["place"]
        drawn = None if place is None else place["drawn"]
        pairs = list(zip(self.feeds, loaders, strict=True))
        changed = [_compare(feed, saved["about"], drawn, what, move is not None) for feed, saved in pairs]
        if place is None:
            for feed, own in zip(self.feeds, state["own"], strict=True):
                feed.put_end(own)
            return None
        found = Place(
            **{**place, "passes": [Pass.of(run) for run in place["passes"]], "ahead": [raw(s) for s in place["ahead"]]}
        )
        if move is not None:
            runs = zip(self.feeds, found.passes, found.done, loaders, strict=True)
            found.done = [move.go_on(feed, run, done, saved["about"], what) for feed, run, done, saved in runs]
            found.drawn, found.ahead = move.batches(found.drawn), []
            if found.combined:
                found.combined["starts"] = [found.drawn - done for done in found.done]
        elif any(changed) and not self.single:
            raise CheckpointError(
                "The batch size of a loader has changed inside an epoch that draws from several loaders together: their"
                " places cannot be matched. Go on with the former batch size until the epoch has ended, or resume from a"
                " checkpoint that was written at the end of an epoch."
            )
        elif changed[0] is not None:
            found.drawn = found.done[0] = changed[0]
            found.passes[0].mark = None
        for run, feed, saved in zip(found.passes, self.feeds, loaders, strict=True):
            if saved["about"].get("samples") != _about(feed).get("samples"):
                run.mark = None  # another order was announced
        return found


def _about(feed: Feed) -> dict[str, Any]:
    """What a later run compares, to say what has changed."""
    loader = feed.loader
    if not isinstance(loader, DataLoader):
        return {"batches": _count(loader)}
    from leyden.data.reshare import items_of, replicas_of  # noqa: PLC0415  # when a checkpoint is written or read

    sized = feed.how == "indices"
    size = getattr(loader.batch_sampler, "batch_size", None) if sized else loader.batch_size
    return {
        "batch_size": size if isinstance(size, int) else None,
        "workers": loader.num_workers,
        "samples": _count(loader.dataset) if sized else None,
        "seeding": feed.seeding,
        "items": items_of(loader) if sized else 0,
        "replicas": replicas_of(loader) if sized else None,
    }


def _count(sized: Any) -> int | None:
    count = length(sized)
    return count if isinstance(count, int) else None


def _compare(feed: Feed, then: Mapping[str, Any], drawn: int | None, what: str, moves: bool) -> int | None:
    """Say what has changed since the checkpoint; return how many batches are done, if that is another number now.

    ``moves`` says that other processes go on, of which each finds its place by the samples that are done.
    """
    now, name = _about(feed), f"the {what} {type(feed.loader).__name__}"
    done = None
    if then.get("samples") != now.get("samples"):
        goes_on = (
            f"the epoch that was running goes on after {drawn} batches, but of another order, so that some of its samples"
            " come twice and others not at all; from the next epoch on all samples are drawn"
            if drawn
            else "the epochs that follow draw from all of them"
        )
        rank_zero_warn(
            f"The data set of {name} had {then.get('samples')} samples when the checkpoint was written and has"
            f" {now.get('samples')} now: {goes_on}."
        )
    before, after = then.get("batch_size"), now.get("batch_size")
    if before != after and before and after and not moves:
        if drawn:
            done, rest = divmod(drawn * before, after)
            twice = f" The first {rest} samples of the next batch come a second time." if rest else ""
            rank_zero_warn(
                f"The batch size of {name} was {before} when the checkpoint was written and is {after} now. The"
                f" {drawn * before} samples that are done count as {done} batches.{twice}"
            )
        else:
            rank_zero_warn(
                f"The batch size of {name} was {before} when the checkpoint was written and is {after} now: epochs have"
                " another number of batches from here on."
            )
    if bool(then.get("workers")) != bool(now.get("workers")) and "sample" not in (
        now.get("seeding"),
        then.get("seeding"),
    ):
        rank_zero_warn(
            f"num_workers of {name} was {then.get('workers')} when the checkpoint was written and is {now.get('workers')}"
            " now. The order of samples goes on as it was, but random augmentation is another one, unless the run is"
            " seeded with seed_everything(seed, workers=True)."
        )
    return done
