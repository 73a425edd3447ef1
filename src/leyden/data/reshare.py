# SPDX-License-Identifier: Apache-2.0
"""Goes on with the data of an epoch in another number of processes than it was begun with, in the order of the samples.

All processes share out one order (see ``sharding``), so that those that are done are its beginning: so many samples of it
as all of them together have had. What is left is shared out anew; or, where each process takes the places of several that
are gone, it goes on as those would have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from leyden.data.feed import Feed, Pass
from leyden.data.generators import digest, plain
from leyden.data.loaders import length
from leyden.data.sharding import Sharded, Turns
from leyden.runtime.ranks import rank_zero_warn


@dataclass(frozen=True)
class Layout:
    """Among how many the data of training are shared out.

    Attributes:
        shares: How many shares of the data are read at the same time: one for each process, or group of them.
        turns: Of how many shares each takes the place, one batch after the other.
        accumulate: How many batches of each share make an update, as the user has it.
    """

    shares: int = 1
    turns: int = 1
    accumulate: int = 1

    @property
    def whole(self) -> int:
        """In how many places the samples are laid out."""
        return self.shares * self.turns


class Move:
    """From the processes that have written a checkpoint to those that go on from it.

    Args:
        former: Of those that have written it.
        now: Of those that go on.
        share: Which share this process has.
        batch_idx: How many batches of the epoch each of the former had done.
        redo: Whether an update that is open is to be done once more in any case.

    Attributes:
        kept: Whether the samples are laid out as before, so that each batch is one that there would have been.
        back: How many of the last batches are done once more: they belong to an update that was open, of which only a
            part of the processes' places had had their turn, and the others cannot be shared out evenly.
    """

    def __init__(self, former: Layout, now: Layout, share: int, batch_idx: int, redo: bool = False) -> None:
        self.former, self.now, self.share = former, now, share
        self.kept = former.whole == now.whole
        fits = batch_idx % former.turns == 0 or (self.kept and batch_idx * former.shares % now.shares == 0)
        self.back = 0 if fits and not redo else batch_idx % (former.accumulate * former.turns)

    def batches(self, count: int) -> int:
        """Return what ``count`` batches of each of the former processes come to: batches of each that goes on."""
        return max(count - self.back, 0) * self.now.turns // self.former.turns

    def go_on(self, feed: Feed, run: Pass, done: int, about: Mapping[str, Any], what: str) -> int:
        """Let ``run``, the pass of a former process over a loader, be one of this process; return how much of it is done.

        Args:
            feed: The loader as it is now.
            run: Is changed in place.
            done: How many batches of the pass each of the former had done.
            about: What was known of the loader then.
            what: The kind of loader, for a warning.
        """
        known = self.share < self.former.shares
        if not known and feed.seeding == "batch" and run.seed:
            run.seed = digest(run.seed, self.share)
        done = max(done - self.back, 0)
        if feed.share is not None and about.get("items"):
            return self._shared(feed, feed.share, run, done, about, what)
        then, replicas = about.get("replicas"), replicas_of(feed.loader)
        run.mark = None
        if then and replicas and about["items"]:
            samples, takes = done * then * about["items"], replicas * items_of(feed.loader)
            batches, rest = divmod(int(samples), takes)
            twice = f", of which the last {rest} come a second time" if rest else ""
            rank_zero_warn(
                f"The {what} {type(feed.loader).__name__} has a {type(_sampler(feed.loader)).__name__} of its own, which is"
                f" left alone: {samples} samples of its order count as done{twice}. Without it, Leyden shares the samples"
                " out, and goes on exactly."
            )
            return batches
        rank_zero_warn(
            f"The {what} {type(feed.loader).__name__} is not shared out by Leyden, and the epoch goes on with"
            f" {self.now.shares} processes instead of {self.former.shares}: each goes on where it stood, new ones where"
            " rank 0 stood, and what was left to those that are gone does not come in this epoch. A DataLoader over a data"
            " set with __getitem__ goes on exactly."
        )
        return done

    def _shared(self, feed: Feed, share: Sharded, run: Pass, done: int, about: Mapping[str, Any], what: str) -> int:
        items = items_of(feed.loader)
        if run.share is not None and self.kept and about["items"] == items:
            if self.share >= self.former.shares:
                run.mark = None
            return done * self.now.turns // self.former.turns
        if run.journal:
            rank_zero_warn(
                f"The sampler of the {what} {type(feed.loader).__name__} draws random numbers again and again, from"
                " generators that training uses too. With several processes it draws apart from it, so that what is left of"
                " this epoch may come in another order: some samples twice, others not at all. Give it a generator of its"
                " own."
            )
        state = run.share
        if state is None:
            seeded, first = run.first is not None, run.first or run.begin
            state = {"state": plain(first or {}), "passes": run.number, "base": 0, "seeded": seeded}
        base = state["base"] + done * self.former.shares * about["items"]
        run.share, run.mark, run.journal = {**state, "base": int(min(base, length(share.sampler)))}, None, {}
        if feed.seeding == "batch" and run.seed:
            run.seed = digest(run.seed, "from", base)
        share.load_state_dict(run.share)
        return 0


def left_of(feed: Feed, done: int, limit: int | float) -> int | float:
    """Return how many batches of a pass are left to a process, of ``limit`` at most in all, when ``done`` are done.

    Samples that other processes have had count as well.
    """
    whole = length(feed.loader)
    if feed.share is None:
        return min(whole, limit) - done
    before = feed.share.base // (feed.share.size * items_of(feed.loader))
    return max(min(whole, limit - before) - done, 0)


def items_of(loader: Any) -> int:
    """Return how many items of the order that is shared out a batch takes; 0 where there is none.

    Samples, where torch's BatchSampler makes batches of them; else whole batches.
    """
    if not isinstance(loader, DataLoader):
        return 0
    batches = loader.batch_sampler
    if type(batches) is BatchSampler or isinstance(batches, Turns):
        return int(batches.batch_size)
    return 1


def replicas_of(loader: Any) -> int | None:
    """Return among how many a sampler of torch's that knows ranks shares its samples out; None for any other."""
    sampler = _sampler(loader)
    knows = isinstance(sampler, DistributedSampler) and not isinstance(sampler, Sharded)
    return int(sampler.num_replicas) if knows else None


def _sampler(loader: Any) -> Any:
    sampler = getattr(loader, "sampler", None)
    return sampler if isinstance(sampler, DistributedSampler) else getattr(loader, "batch_sampler", None)


__all__ = ["Layout", "Move", "items_of", "left_of", "replicas_of"]
