# SPDX-License-Identifier: Apache-2.0
"""Lengths of loaders and batches, samplers that share out what another draws, and the folders that processes share."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, IterableDataset, Sampler

from leyden.compat.pieces.say import WarningCache
from leyden.errors import MisconfigurationException
from leyden.runtime.cores import allowed_cores
from leyden.runtime.ranks import rank_zero_warn

_said = WarningCache()


def has_iterable_dataset(dataloader: object) -> bool:
    """Whether its data set is an ``IterableDataset``."""
    return isinstance(getattr(dataloader, "dataset", None), IterableDataset)


def sized_len(dataloader: object) -> int | None:
    """Return its length; None if it has none."""
    try:
        return len(dataloader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def has_len(dataloader: object) -> bool:
    """Whether it has a length; warn of a length that is 0, or that workers may belie."""
    length = sized_len(dataloader)
    if length == 0:
        rank_zero_warn(f"{type(dataloader).__name__} has length 0. Is that what you want?")
    if length is not None:
        _warn_of_iterable(dataloader)
    return length is not None


def _warn_of_iterable(dataloader: object) -> None:
    if has_iterable_dataset(dataloader):
        rank_zero_warn(
            "The IterableDataset has a __len__. With several workers it is right only if each of them yields a part of"
            " the data."
        )


def has_len_all_ranks(
    dataloader: object, strategy: Any, allow_zero_length_dataloader_with_multiple_devices: bool = False
) -> bool:
    """Whether it has a length on this process; the processes compare theirs.

    Args:
        dataloader: The loader of this process.
        strategy: Exchanges with the other processes.
        allow_zero_length_dataloader_with_multiple_devices: Warn of a length of 0 beside others, rather than raise.

    Raises:
        RuntimeError: if the length is 0 here and not elsewhere.
    """
    length = sized_len(dataloader)
    if length is None:
        return False
    total = int(strategy.reduce(torch.tensor(length, device=strategy.root_device), reduce_op="sum"))
    name = type(dataloader).__name__
    if total == 0:
        rank_zero_warn(f"{name} has length 0 on all ranks. Is that what you want?")
    elif length == 0 and not allow_zero_length_dataloader_with_multiple_devices:
        raise RuntimeError(f"{name} has length 0 on this rank, and not on others: give every rank a batch.")
    elif length == 0:
        rank_zero_warn(f"{name} has length 0 on this rank, and not on others.")
    _warn_of_iterable(dataloader)
    return True


def _sizes(batch: Any) -> Iterator[int | None]:
    if isinstance(batch, Tensor):
        yield batch.shape[0] if batch.ndim else 1
    elif isinstance(batch, str):
        yield None
    elif isinstance(batch, (Mapping, Iterable)):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _sizes(part)
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for field in dataclasses.fields(batch):
            yield from _sizes(getattr(batch, field.name))
    else:
        yield None


def extract_batch_size(batch: Any) -> int:
    """Return the first dimension of the tensors in a batch, nested as it may be; warn once if they differ.

    Raises:
        MisconfigurationException: if no size can be told.
        RecursionError: if it contains itself.
    """
    problem = "The batch size cannot be told from the batch: say self.log(..., batch_size=...)."
    found: int | None = None
    try:
        for size in _sizes(batch):
            if found is None:
                found = size
            elif size != found:
                _said.warn(
                    f"The tensors of a batch differ in size; {found} is taken as the batch size. To be sure, say"
                    " self.log(..., batch_size=...)."
                )
                break
    except RecursionError:
        raise RecursionError(problem) from None
    if found is None:
        raise MisconfigurationException(problem)
    return found


def suggested_max_num_workers(local_world_size: int) -> int:
    """Return how many workers a loader of each of so many processes of this machine should have at most.

    Raises:
        ValueError: for less than one process.
    """
    if local_world_size < 1:
        raise ValueError(f"suggested_max_num_workers({local_world_size}): it must be 1 or more.")
    return max(1, allowed_cores() // local_world_size - 1)


class DrawnIndices(Dataset[Any]):
    """What a sampler draws, as a data set.

    Raises:
        TypeError: for a sampler without a length, or with an infinite one.
    """

    def __init__(self, sampler: Sampler[Any] | Iterable[Any]) -> None:
        length: Any = sampler.__len__() if isinstance(sampler, Sized) else None
        if length is None or length == float("inf"):
            raise TypeError(
                f"{type(sampler).__name__} has {'no' if length is None else 'an infinite'} length, so it cannot be"
                " shared out among processes: give it one, or set use_distributed_sampler=False."
            )
        self._sampler = sampler
        self._drawn: list[Any] | None = None

    def __getitem__(self, index: int) -> Any:
        if self._drawn is None:
            self.reset()
        return (self._drawn or [])[index]

    def __len__(self) -> int:
        return len(self._sampler)  # type: ignore[arg-type]

    def reset(self) -> None:
        """Let the sampler draw anew."""
        self._drawn = list(self._sampler)


class _OfSampler(DistributedSampler[Any]):
    """Shares out what a sampler draws, as the class beside it in the bases shares out a data set."""

    def __init__(self, sampler: Sampler[Any] | Iterable[Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(DrawnIndices(sampler), *args, **kwargs)

    def __iter__(self) -> Iterator[Any]:
        drawn: Any = self.dataset
        drawn.reset()
        return (drawn[index] for index in super().__iter__())


class DistributedSamplerWrapper(_OfSampler):
    """Shares out what any sampler draws; shuffling and its seed remain that sampler's.

    Args:
        sampler: It must have a length.
        args, kwargs: As for torch's ``DistributedSampler``.
    """

    def set_epoch(self, epoch: int) -> None:
        """Tell the sampler too, if it wants to know."""
        super().set_epoch(epoch)
        inner: Any = getattr(self.dataset, "_sampler", None)
        if callable(getattr(inner, "set_epoch", None)):
            inner.set_epoch(epoch)


class UnrepeatedDistributedSampler(DistributedSampler[Any]):
    """Shares out a data set without repeating samples: processes may have one more or one less. For predictions.

    Raises:
        TypeError: for a data set without a length.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.dataset, Sized):
            raise TypeError(f"{type(self.dataset).__name__} has no length, so it cannot be shared out.")
        self.total_size = len(self.dataset)
        self.num_samples = len(range(self.rank, self.total_size, self.num_replicas))
        assert self.num_samples >= 1 or self.total_size == 0, "every process needs a sample"

    def __iter__(self) -> Iterator[Any]:
        order: Any = range(self.total_size)
        if self.shuffle:
            order = torch.randperm(self.total_size, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        return iter(list(order)[self.rank : self.total_size : self.num_replicas])


class UnrepeatedDistributedSamplerWrapper(_OfSampler, UnrepeatedDistributedSampler):
    """Shares out what any sampler draws, without repeating it."""


def is_shared_filesystem(strategy: Any, path: str | Path | None = None, timeout: int = 3) -> bool:
    """Whether a folder is the same for all processes: rank 0 puts a file there, the others look for it.

    Args:
        strategy: Exchanges with the other processes, on all of which this is called.
        path: The folder, or a file in it; None: the working directory. A URL is the same for all.
        timeout: For so many seconds the others look.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    if path is not None and "://" in str(path):
        return True
    here = Path(path or Path.cwd()).resolve()
    if getattr(strategy, "world_size", 1) == 1:
        return True
    if not strategy.reduce_boolean_decision(strategy.broadcast(here) == here, all=True):
        return False
    if not strategy.reduce_boolean_decision(here.exists(), all=True):
        raise FileNotFoundError(f"is_shared_filesystem(path={str(path)!r}): there is no such folder.")
    mark = (here.parent if here.is_file() else here) / ".leyden_shared_folder"
    mark.unlink(missing_ok=True)
    strategy.barrier()
    if strategy.is_global_zero:
        mark.touch()
    end = time.monotonic() + timeout
    while not (found := mark.exists()) and time.monotonic() < end:
        time.sleep(0.01)
    strategy.barrier()
    shared = bool(strategy.reduce_boolean_decision(found, all=True))
    with contextlib.suppress(OSError):  # another has removed it
        mark.unlink()
    return shared
