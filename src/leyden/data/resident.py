# SPDX-License-Identifier: Apache-2.0
"""Small data sets on the device of a run: each tensor is moved there once, for as long as the run lasts."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from leyden.runtime.ranks import rank_zero_info

SHARE = 0.1
"""The part of the device's free memory, once a step has run, that data may take at most."""
PROBES = 2**16
"""How many elements of a tensor are compared when a pass begins, to notice changes that torch knows nothing of."""


class Changed(Exception):
    """A data set holds other data than when the pass began."""


class Copy:
    """One tensor of a data set, on the device.

    Args:
        source: The tensor on the host.
        device: Where the copy is made.

    Attributes:
        there: The copy; None once it was given back.
    """

    def __init__(self, source: Tensor, device: torch.device) -> None:
        # weakly: data that is replaced by other data, such as in each epoch, must not stay in memory for the run
        self._source, self.size = weakref.ref(source), _size(source)
        self.version, self.probe = source._version, _probe(source)  # noqa: SLF001  # documented, in spite of its name
        with torch.inference_mode(False), torch.no_grad():
            # from pageable memory this returns when the source has been read; from pinned memory it would not
            self.there: Tensor | None = source.to(device, non_blocking=not _is_pinned(source), copy=True)

    @property
    def source(self) -> Tensor | None:
        """The tensor on the host; None where nobody else has it any more."""
        return self._source()

    def changed(self) -> bool:
        """Whether the source is gone, or somebody changed it by way of torch, since the copy was made."""
        source = self.source
        return source is None or bool(source._version != self.version)  # noqa: SLF001

    def stale(self) -> bool:
        """Whether somebody changed the source, by way of a numpy array or ``.data`` too (of these, by PROBES elements)."""
        source = self.source
        return source is None or self.changed() or not torch.equal(self.probe, _probe(source))

    def rows(self, index: Tensor) -> Tensor:
        """Return some rows, on the device.

        Raises:
            Changed: where the source is not any more what was copied.
        """
        if self.there is None or self.changed():
            raise Changed
        return self.there.index_select(0, index)


class Shelf:
    """The tensors that a run keeps on its device.

    Args:
        device: That of the run.
        free: Tells how many bytes are free on it; None where that is not known.
    """

    def __init__(self, device: torch.device, free: Callable[[], int | None] | None = None) -> None:
        self.device = device
        self._free = free or partial(free_memory, device)
        self._copies: dict[int, Copy] = {}
        self._told = False

    def take(self, tensors: Sequence[Tensor]) -> list[Copy] | None:
        """Return copies of ``tensors`` on the device: made now, or by an earlier call; None where there is no room."""
        if not tensors or not all(map(_may_move, tensors)):
            return None
        for key in [key for key, copy in self._copies.items() if copy.source is None]:
            self._drop(key)
        for tensor in tensors:
            former = self._copies.get(id(tensor))
            if former is not None and former.stale():
                self._drop(id(tensor))
        wanted = {id(tensor): tensor for tensor in tensors if id(tensor) not in self._copies}
        if wanted:
            free = self._free()
            if free is None:
                return None
            held = sum(copy.size for copy in self._copies.values())
            if not has_room(sum(map(_size, wanted.values())), held, free):
                self._tell(f"would take more than {SHARE:.0%} of the memory that is free on {self.device}")
                return None
            try:
                self._copies.update({key: Copy(tensor, self.device) for key, tensor in wanted.items()})
            except torch.OutOfMemoryError:
                self._tell(f"found no memory on {self.device}")
                return None
        return [self._copies[id(tensor)] for tensor in tensors]

    def release(self) -> None:
        """Give all memory back; who still iterates goes on in the standard way."""
        for key in list(self._copies):
            self._drop(key)

    def _drop(self, key: int) -> None:
        self._copies.pop(key).there = None

    def _tell(self, why: str) -> None:
        if not self._told:
            rank_zero_info(f"Data in memory is copied to the device batch by batch: to keep it there {why}.")
        self._told = True


def has_room(size: int, held: int, free: int) -> bool:
    """Whether ``size`` more bytes of data may lie on a device with ``free`` bytes left, beside the ``held`` ones."""
    return size + held <= SHARE * (free + held)


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that are free on a CUDA device, torch's own reserve counted as free; None for other devices."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _may_move(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_inference()


def _probe(tensor: Tensor) -> Tensor:
    """Return the bytes of elements that lie evenly over a tensor."""
    flat = tensor.detach().view(-1)
    step, row = max(len(flat) // PROBES, 1), tensor[0].numel() if len(tensor) else 1
    if row > 1 and step % row == 0:
        step += 1  # not the same corner of each sample
    return flat[::step].clone().view(torch.uint8)


def _is_pinned(tensor: Tensor) -> bool:
    return torch.cuda.is_available() and tensor.is_pinned()
