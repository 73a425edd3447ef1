# SPDX-License-Identifier: Apache-2.0
"""Questions about one loader, any iterable of batches: is it one, how long is it, does it shuffle; and its epoch."""

from __future__ import annotations

import copy
import math
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, SubsetRandomSampler

from leyden.errors import MisconfigurationException, PossibleUserWarning
from leyden.runtime.ranks import rank_zero_warn
from leyden.types import RunningStage, Stateful


def check_iterable(loader: object, source: str, fn: str) -> None:
    """Raise a TypeError unless ``loader`` can be iterated over; it is not iterated over, which could be expensive.

    ``source`` is what it came from, the argument (``"train_dataloaders"``) or the hook
    (``"MyModule.train_dataloader"``); ``fn`` is the entry point that wants it (``"fit"``).
    """
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        rank_zero_warn(
            f"{source} is a data set ({type(loader).__name__}), not a loader: each of its samples counts as a batch. Did"
            " you mean DataLoader(dataset, batch_size=...)?",
            category=PossibleUserWarning,
        )
    if hasattr(type(loader), "__iter__") or hasattr(type(loader), "__getitem__"):
        return
    what = f"the class {loader.__name__}" if isinstance(loader, type) else f"{loader!r} ({type(loader).__name__})"
    if "." in source:
        hook = source.removesuffix("()")
        raise TypeError(f"{hook}() returned {what}, which cannot be iterated over. Return a DataLoader or an iterable.")
    argument = source if fn == "fit" else "dataloaders"
    hook = source.removesuffix("s") if "_" in source else {"validate": "val"}.get(fn, fn) + "_dataloader"
    raise TypeError(
        f"An invalid dataloader was passed to `Trainer.{fn}({argument}=...)`. Found {what}, which cannot be iterated over. "
        f"Pass a DataLoader or an iterable of batches, or write {hook}() in the module or the data module."
    )


def why_empty(loader: Any) -> str:
    """Say, as half a sentence, why ``loader`` has no batches."""
    samples = length(getattr(loader, "dataset", ()))
    if samples == 0 or not isinstance(loader, DataLoader):
        return f"the {type(loader).__name__} is empty"
    if getattr(loader, "drop_last", False):
        return f"its {samples} samples are fewer than batch_size={loader.batch_size}, and drop_last=True drops them"
    return f"the length of the {type(loader).__name__} is 0, though its data set has {samples} samples"


def length(loader: Any) -> int | float:
    """Return the number of batches that ``loader`` says it has, ``inf`` if it does not say."""
    try:
        return int(len(loader))
    except (TypeError, NotImplementedError):
        return math.inf


def num_batches(stage: RunningStage | str, length: int | float, limit: int | float, argument_name: str) -> int | float:
    """Return how many batches of a loader of that ``length`` a loop runs, given ``limit``.

    ``stage`` is a stage or its prefix (``"val"``). An int ``limit`` is a number of batches, a float a fraction of the
    loader. ``argument_name`` (such as
    ``"limit_train_batches"``) is for the errors: MisconfigurationException where a fraction of an unknown length is
    asked for, or one that comes to no batch at all.
    """
    prefix = stage.dataloader_prefix if isinstance(stage, RunningStage) else stage
    if length == 0:
        return 0
    if isinstance(limit, int):
        return min(length, limit)
    if length == math.inf:
        if limit == 1.0:
            return length
        raise MisconfigurationException(
            f"{argument_name}={limit} asks for a fraction of the {prefix} loader, whose length is not "
            f"known. Give a number of batches (an int), or 1.0 for all."
        )
    count = int(length * limit)
    if count == 0 and limit > 0.0:
        raise MisconfigurationException(
            f"{argument_name}={limit} of the {length} batches of the {prefix} loader is less than one "
            f"batch. The smallest fraction that works is {_smallest_fraction(int(length))}."
        )
    return count


def _smallest_fraction(length: int) -> float:
    """Return the shortest decimal >= 1/length that comes to one batch (``int(3 * 0.333)`` would come to none)."""
    for digits in range(1, 16):
        fraction = math.ceil(10.0**digits / length) / 10.0**digits
        if int(length * fraction) == 1:
            return fraction
    return 1.0


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell the sampler, the batch sampler and the data set of ``loader`` the epoch, each once, if they want to know."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    told: list[Any] = []
    for part in (
        getattr(loader, "sampler", None),
        getattr(batch_sampler, "sampler", None),
        batch_sampler,
        getattr(loader, "dataset", None),
    ):
        while vars(type(part)).get("draws_apart"):
            part = part.sampler  # type: ignore[union-attr]  # the user's, which somebody has wrapped
        if callable(getattr(part, "set_epoch", None)) and not any(part is other for other in told):
            told.append(part)
            part.set_epoch(epoch)  # type: ignore[union-attr]  # None has none


def _sampler(loader: Any) -> Any:
    """Return what decides on the order of the samples, or None."""
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        return None
    batch_sampler = getattr(loader, "batch_sampler", None)
    if batch_sampler is None:
        return getattr(loader, "sampler", None)
    return getattr(batch_sampler, "sampler", batch_sampler)


def has_shuffle(loader: Any) -> bool:
    """Return whether ``loader`` shuffles by torch's RandomSampler, as with ``DataLoader(shuffle=True)``."""
    return isinstance(_sampler(loader), RandomSampler)


def without_shuffle(loader: Any) -> Any:
    """Return ``loader``, or a copy of it that gives its samples in order if it would not.

    Everything else stays: class, data set, batch size or batch sampler, collate function, workers. A warning says
    what was done, or that nothing could be: with a batch sampler of one's own that has no ``sampler``.
    """
    sampler = _sampler(loader)
    if not isinstance(loader, DataLoader) or sampler is None or isinstance(sampler, SequentialSampler):
        return loader
    kind = type(sampler).__name__
    if loader.batch_sampler is sampler:
        rank_zero_warn(
            f"overfit_batches needs the same batches in each epoch, but the order of {kind} cannot be changed."
        )
        return loader
    rank_zero_warn(
        f"overfit_batches needs the same batches in each epoch: samples come in order, not as {kind} has them."
    )
    dataset: Any = loader.dataset
    ordered = list(sampler.indices) if isinstance(sampler, SubsetRandomSampler) else SequentialSampler(dataset)
    # A copy, not a new one made of guessed arguments: so it works for any subclass. DataLoader lets nobody set these
    # attributes after its constructor, but nothing else depends on them.
    copied = copy.copy(loader)
    object.__setattr__(copied, "sampler", ordered)
    object.__setattr__(copied, "_iterator", None)
    if loader.batch_sampler is not None:
        batch_sampler = copy.copy(loader.batch_sampler)
        batch_sampler.sampler = ordered  # type: ignore[attr-defined]
        object.__setattr__(copied, "batch_sampler", batch_sampler)
    return copied


def why_own_workers(loader: Any) -> str | None:
    """Say, as half a sentence, why nobody but its owner can say how many workers ``loader`` has; None where one can."""
    name, kind = type(loader).__name__, type(loader)
    if not isinstance(loader, DataLoader):
        return f"the {name} is no DataLoader"
    if isinstance(loader.dataset, IterableDataset):
        return f"the data set {type(loader.dataset).__name__} is iterable: how its workers share it is its own affair"
    if isinstance(loader, Stateful):
        return f"the {name} keeps a state of its own, in its workers"
    if kind.__iter__ is not DataLoader.__iter__ or kind._get_iterator is not DataLoader._get_iterator:  # noqa: SLF001
        return f"the {name} iterates in a way of its own"
    return None


def with_workers(loader: Any, count: int) -> Any:
    """Return ``loader``, or a copy of it with ``count`` workers if it has another number of them.

    Workers of the copy do not persist by themselves; everything else that makes sense with its number of workers stays.
    """
    if loader.num_workers == count:
        return loader
    # a copy, see without_shuffle
    copied = copy.copy(loader)
    changes: dict[str, Any] = {"num_workers": count, "persistent_workers": False, "_iterator": None}
    if count:
        changes["prefetch_factor"] = loader.prefetch_factor or 2  # torch's default
    else:
        changes |= {"prefetch_factor": None, "timeout": 0, "_DataLoader__multiprocessing_context": None}
    vars(copied).update(changes)
    return copied


def stop_workers(loader: Any) -> None:
    """Stop the worker processes that a DataLoader keeps between epochs (``persistent_workers=True``)."""
    iterator = getattr(loader, "_iterator", None)
    if isinstance(loader, DataLoader) and iterator is not None:
        stop = getattr(iterator, "_shutdown_workers", None)  # torch has no public way
        if stop is not None:
            stop()
        object.__setattr__(loader, "_iterator", None)


def says_workers_are_gone(error: BaseException) -> bool:
    """Whether ``error`` is a DataLoader's way to say that its worker processes have ended."""
    # torch has no class for it
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")
