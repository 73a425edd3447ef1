# SPDX-License-Identifier: Apache-2.0
"""Reads the batches of a data set that lies in memory whole: one indexing for a batch, instead of one for each sample.

A batch is equal to the last bit to what the DataLoader makes of it: values, types, strides, containers. The order is the
user's sampler's, drawn one batch at a time, as ever. The first batch is read in both ways and compared. What cannot be
read so goes the standard way: torch's own iterator is there for whole passes and for single batches (docs/data.md).
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, StackDataset, Subset, TensorDataset, default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from leyden.data.resident import Changed, Shelf
from leyden.runtime.ranks import rank_zero_info

Read: TypeAlias = Callable[[list[int]], Any]
"""Makes a batch from the indices of its samples."""
Take: TypeAlias = Callable[[Tensor], Tensor]
"""Makes a part of a batch from the indices of its samples, which are on the device of the data."""

COMPARED = 64
"""How many samples of the first batch are compared."""
_END = object()
_ASIDE = (IndexError, TypeError, ValueError, OverflowError, RuntimeError)
"""What reading a batch as a whole may raise; the standard way then has the right batch, or the right error."""
_DEVICES = ("cpu", "cuda")
_OF_A_PART = 4
"""How many samples of a batch must lie in each part of a data set, on average, for them to be read at once."""
_COUNTS = (torch.int64, torch.int32)
_ITERATES = ("__iter__", "_get_iterator", "_index_sampler", "_auto_collation")
"""What a subclass of DataLoader overrides if it iterates in a way of its own."""


class Scattered(Exception):
    """The samples of a batch lie in so many parts of a data set that it is quicker to read them one by one."""


class Whole:
    """Reads whole batches for one loader.

    Args:
        loader: The user's.
        shelf: Keeps small data on the device of the run; None where batches have to begin on the host.
    """

    def __init__(self, loader: Any, shelf: Shelf | None = None) -> None:
        self.loader, self.shelf = loader, shelf
        self.agreed: Any = None
        """The form of the data for which both ways gave the same batch."""
        self.refused = False
        """Whether they once did not: the standard way, from then on."""
        self.told = False
        """Whether it was said that the loader's ``collate_fn`` is in the way."""

    def plan(self) -> Plan | None:
        """Return what reads the pass that begins now; None for the standard way."""
        loader = self.loader
        if self.refused or not _iterates_as_torch(loader):
            return None
        source = Source(loader.dataset)
        if source.read is None:
            return None
        if loader.collate_fn is not default_collate:
            if not self.told:
                rank_zero_info(
                    f"The {type(loader.dataset).__name__} of a DataLoader is read sample by sample, for its collate_fn:"
                    " without one, batches of data in memory are read as a whole."
                )
            self.told = True
            return None
        return Plan(self, source)


class Plan:
    """Reads one pass of ``whole`` from ``source``."""

    def __init__(self, whole: Whole, source: Source) -> None:
        self.whole, self.source = whole, source
        self._standard: Iterator[Any] = iter(())
        self._drawn: Iterator[Any] = iter(())
        self._given: list[Any] = []

    def share(self, drawn: Iterator[Any]) -> Iterator[Any]:
        """Take the indices of the pass; return what torch's iterator draws from instead: those that are left to it."""
        self._drawn = drawn
        return iter(self._given.pop, _END)

    def batches(self, standard: Iterator[Any]) -> Iterator[Any]:
        """Iterate over the batches of the pass; ``standard`` is torch's iterator, which draws by way of ``share``."""
        self._standard = standard
        return chain.from_iterable(self._stretches())

    def _stretches(self) -> Iterator[Iterator[Any]]:
        """Yield the iterators of which one goes on where the other stops: no batch passes through more than one."""
        whole, source, dataset = self.whole, self.source, self.whole.loader.dataset
        if whole.agreed != source.form:
            yield self._compared()
        if whole.agreed == source.form:
            if whole.shelf is not None and source.watched:
                yield self._lean(_resident(dataset, source.leaves, whole.shelf))
            # decided by torch's iterator, which knows what there is to pin for; torch has no public way to ask it
            pins = getattr(self._standard, "_pin_memory", False)
            yield self._lean(Source(dataset, _pinned).read if pins else source.read)
        yield self._as_ever()

    def _lean(self, read: Read | None) -> Iterator[Any]:
        given, standard = self._given, self._standard
        if read is None:
            return
        for indices in self._drawn:
            if _are_numbers(indices):
                try:
                    yield read(indices)
                    continue
                except (Changed, Scattered):
                    given.append(indices)
                    yield next(standard)
                    return
                except _ASIDE:
                    pass
            given.append(indices)
            yield next(standard)

    def _compared(self) -> Iterator[Any]:
        """Read in the standard way until a batch could be compared."""
        for indices in self._drawn:
            self._given.append(indices)
            batch = next(self._standard)
            done = _are_numbers(indices) and self._compare(indices, batch)
            yield batch
            del batch
            if done:
                return

    def _compare(self, indices: list[int], batch: Any) -> bool:
        whole, read = self.whole, self.source.read
        assert read is not None
        try:
            agrees = same(read(indices[:COMPARED]), _head(batch))
        except Scattered:
            return True
        except (Changed, *_ASIDE):
            return False
        if agrees:
            whole.agreed = self.source.form
        else:
            whole.refused = True
            rank_zero_info(
                f"The {type(whole.loader.dataset).__name__} of a DataLoader is read sample by sample: its first batch, read"
                " as a whole, is not the one that the loader gives."
            )
        return True

    def _as_ever(self) -> Iterator[Any]:
        for indices in self._drawn:
            self._given.append(indices)
            yield next(self._standard)


def to_index(indices: list[int]) -> Tensor:
    """Return indices as a tensor on the host.

    Raises:
        TypeError: for what is no index of one sample.
    """
    # three times as fast as torch.tensor
    return torch.frombuffer(array("q", indices), dtype=torch.int64)


def to_index_of(device: torch.device, indices: list[int], size: int) -> Tensor:
    """Return indices as a tensor on a device, without waiting for it.

    Raises:
        IndexError: where one is not in ``range(size)``: the device itself would end the process.
    """
    index = to_index(indices)
    if min(indices) < 0 or max(indices) >= size:
        raise IndexError(f"Indices from {min(indices)} to {max(indices)} for {size} samples.")
    return (index.pin_memory() if device.type == "cuda" else index).to(device, non_blocking=True)


def _index_on(device: torch.device, size: int) -> Callable[[list[int]], Tensor]:
    """Return what makes an index tensor for ``size`` samples on a device."""
    return to_index if device.type == "cpu" else partial(to_index_of, device, size=size)


def _resident(dataset: Any, leaves: list[Tensor], shelf: Shelf) -> Read | None:
    """Return what reads batches on the device of ``shelf``; None where there is no room, or other data by now."""
    copies = shelf.take(leaves)
    if copies is None:
        return None
    there = {id(leaf): copy for leaf, copy in zip(leaves, copies, strict=True)}
    try:
        return Source(dataset, lambda tensor: there[id(tensor)].rows, shelf.device).read
    except KeyError:
        return None


def _rows(tensor: Tensor) -> Take:
    return partial(tensor.index_select, 0)


def _pinned(tensor: Tensor) -> Take:
    return lambda index: tensor.index_select(0, index).pin_memory()


class Source:
    """A data set in memory, and how batches are read from it.

    Args:
        dataset: The user's.
        rows: Makes of each tensor of the data set what takes rows of it.
        device: From where they are taken; None for where each tensor is.

    Attributes:
        read: Makes a batch of a list of indices; None where this data set cannot be read so.
        leaves: The tensors of the data set.
        watched: Whether all changes to them can be noticed.
    """

    def __init__(
        self, dataset: Any, rows: Callable[[Tensor], Take] = _rows, device: torch.device | None = None
    ) -> None:
        self.leaves: list[Tensor] = []
        self.watched = True
        self._rows, self._device = rows, device
        self.read = self._read(dataset)
        if not self.leaves or len({leaf.device for leaf in self.leaves}) > 1:
            self.read = None

    @property
    def form(self) -> list[Any]:
        """All of the tensors on which it depends whether batches come out as those of the loader."""
        return [(leaf.dtype, leaf.shape[1:], leaf.stride(), leaf.device) for leaf in self.leaves]

    def _read(self, dataset: Any) -> Read | None:
        if type(dataset) is Tensor or _is_array(dataset):
            return self._of_rows(dataset)
        if _is_plain(dataset, TensorDataset):
            return self._of_tensors(dataset)
        if _is_plain(dataset, Subset):
            return self._of_subset(dataset)
        if _is_plain(dataset, StackDataset):
            return self._of_stack(dataset)
        if _is_plain(dataset, ConcatDataset):
            return self._of_concat(dataset)
        return None

    def _leaf(self, tensor: Tensor) -> tuple[Take, Callable[[list[int]], Tensor]]:
        """Return what takes rows of a tensor, and what makes the index that it takes."""
        self.leaves.append(tensor)
        device = self._device or tensor.device
        return self._rows(tensor), _index_on(device, len(tensor))

    def _of_rows(self, data: Any) -> Read | None:
        if type(data) is not Tensor:
            self.watched = False  # nothing tells when an array is changed
            try:
                data = torch.from_numpy(data)
            except (TypeError, ValueError):
                return None  # objects, words, bytes in another order
        if not _is_readable(data):
            return None
        take, index = self._leaf(data)
        return lambda indices: take(index(indices))

    def _of_tensors(self, dataset: Any) -> Read | None:
        tensors = dataset.tensors
        if type(tensors) is not tuple or not tensors or not all(map(_is_readable, tensors)):
            return None
        pairs = [self._leaf(tensor) for tensor in tensors]
        takes, index_of = [take for take, _ in pairs], pairs[0][1]

        def read(indices: list[int]) -> list[Tensor]:
            if dataset.tensors is not tensors:
                raise Changed
            index = index_of(indices)
            return [take(index) for take in takes]

        return read

    def _of_subset(self, subset: Any) -> Read | None:
        dataset, inner = subset.dataset, self._read(subset.dataset)
        if inner is None or not _is_sequence(subset.indices):
            return None

        def read(indices: list[int]) -> Any:
            chosen = subset.indices
            if subset.dataset is not dataset or not _is_sequence(chosen):
                raise Changed
            samples = list(map(chosen.__getitem__, indices))
            if not _are_numbers(samples):
                raise TypeError
            return inner(samples)

        return read

    def _of_stack(self, stack: Any) -> Read | None:
        parts = stack.datasets
        named = type(parts) is dict
        if not named and type(parts) is not tuple:
            return None
        names, datasets = (list(parts), list(parts.values())) if named else ([], list(parts))
        inner = [self._read(part) for part in datasets]
        if any(each is None for each in inner):
            return None
        reads = [each for each in inner if each is not None]

        def check() -> None:
            if stack.datasets is not parts or (
                named and (list(parts) != names or any(map(_is_other, parts.values(), datasets)))
            ):
                raise Changed

        def read_named(indices: list[int]) -> Any:
            check()
            return {name: each(indices) for name, each in zip(names, reads, strict=True)}

        def read(indices: list[int]) -> Any:
            check()
            return [each(indices) for each in reads]

        return read_named if named else read

    def _of_concat(self, concat: Any) -> Read | None:
        parts, ends = list(concat.datasets), list(concat.cumulative_sizes)
        reads, forms = [], []
        for part in parts:
            known = len(self.leaves)
            read_part = self._read(part)
            if read_part is None:
                return None
            reads.append(read_part)
            forms.append([(leaf.dtype, leaf.shape[1:]) for leaf in self.leaves[known:]])
        if any(form != forms[0] for form in forms):
            return None
        order_of = _index_on(self._device or self.leaves[0].device, sys.maxsize)
        starts = [0, *ends]

        def read(indices: list[int]) -> Any:
            now = concat.datasets
            if len(now) != len(parts) or any(map(_is_other, now, parts)) or concat.cumulative_sizes != ends:
                raise Changed
            found: dict[int, list[int]] = {}
            for place, number in enumerate(map(partial(bisect_right, ends), indices)):
                found.setdefault(number, []).append(place)
            if len(found) > max(3, len(indices) // _OF_A_PART):
                raise Scattered
            if len(parts) in found:
                raise IndexError
            batches, places = [], []
            for number, mine in found.items():
                batches.append(reads[number]([indices[place] - starts[number] for place in mine]))
                places += mine
            if len(batches) == 1:
                return batches[0]
            order = [0] * len(places)
            for position, place in enumerate(places):
                order[place] = position
            return _join(batches, order_of(order))

        return read


def _join(batches: list[Any], order: Tensor) -> Any:
    """Make one batch of several that have the same form, its samples in an order."""
    first = batches[0]
    if isinstance(first, dict):
        return {name: _join([batch[name] for batch in batches], order) for name in first}
    if isinstance(first, list):
        return [_join(list(parts), order) for parts in zip(*batches, strict=True)]
    return torch.cat(batches).index_select(0, order)


def _is_other(one: Any, other: Any) -> bool:
    return one is not other


def _iterates_as_torch(loader: Any) -> bool:
    """Whether torch's own iterator would read the loader, in this process, and collate would do what torch's does."""
    kind = type(loader)
    return (
        isinstance(loader, DataLoader)
        and loader.num_workers == 0
        and loader.batch_sampler is not None
        and all(getattr(kind, name) is getattr(DataLoader, name) and name not in vars(loader) for name in _ITERATES)
        and all(_is_torchs(collate) for collate in default_collate_fn_map.values())
    )


def _is_torchs(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith("torch.utils.data.")


def _is_plain(dataset: Any, kind: type) -> bool:
    """Whether it is of that very class, with the methods that torch gave it."""
    if type(dataset) is not kind or "__getitems__" in vars(dataset):
        return False
    methods = (getattr(kind, name, None) for name in ("__getitem__", "__getitems__"))
    return all(method is None or _is_torchs(method) for method in methods)


def _is_array(data: Any) -> bool:
    numpy = sys.modules.get("numpy")
    # torch warns of one that is read-only
    return numpy is not None and type(data) is numpy.ndarray and data.ndim > 0 and bool(data.flags.writeable)


def _is_sequence(indices: Any) -> bool:
    """Whether it holds indices, and is of a class whose code is not the user's."""
    if type(indices) is Tensor:
        return indices.ndim == 1 and indices.dtype in _COUNTS
    return type(indices) in (list, tuple, range) or (
        _is_array(indices) and indices.ndim == 1 and indices.dtype.kind == "i"
    )


def _are_numbers(indices: Any) -> bool:
    """Whether it is a list of what takes one sample each: True adds a dimension, and so do a mask and a list of one."""
    if type(indices) is not list:
        return False
    kinds = set(map(type, indices))
    if Tensor not in kinds:
        return bool not in kinds
    tensors = (index for index in indices if type(index) is Tensor)
    return bool not in kinds and all(index.ndim == 0 and index.dtype in _COUNTS for index in tensors)


def _is_readable(tensor: Any) -> bool:
    """Whether rows of a tensor, taken at once, are the rows taken one by one and stacked."""
    if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.device.type not in _DEVICES:
        return False
    if tensor.ndim == 0 or tensor.is_nested or tensor.is_quantized or tensor.requires_grad:
        return False
    if tensor.is_conj() or tensor.is_neg():
        return False
    # torch.stack keeps an order of memory such as channels_last_3d, which takes five dimensions
    return tensor.ndim < 5 or tensor.stride()[1:] == _strides(tensor.shape[1:])


def _strides(shape: Iterable[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor of that shape."""
    strides: list[int] = []
    step = 1
    for size in reversed(list(shape)):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def same(one: Any, other: Any) -> bool:
    """Whether two batches are equal to the last bit: containers, names, types, shapes, strides, values."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return _look(one) == _look(other) and torch.equal(_bytes(one), _bytes(other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[name], other[name]) for name in one)
    return isinstance(one, list) and len(one) == len(other) and all(map(same, one, other))


def _head(batch: Any) -> Any:
    """The first samples of a batch."""
    if isinstance(batch, Tensor):
        return batch[:COMPARED]
    if isinstance(batch, dict):
        return {name: _head(part) for name, part in batch.items()}
    return [_head(part) for part in batch] if isinstance(batch, list) else batch


def _look(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.device, tensor.requires_grad, tensor.is_inference()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().flatten().view(torch.uint8)
