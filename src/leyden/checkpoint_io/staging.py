# SPDX-License-Identifier: Apache-2.0
"""A snapshot of a checkpoint in host memory: of one moment, though training goes on in place right after."""

from __future__ import annotations

import io
import pickle
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from leyden import atomic
from leyden.errors import CheckpointError

_COPIED_ALWAYS = 4096
"""Bytes up to which memory is copied for each file: counters may change between two files of one moment."""


class _Slot:
    """Stands in the pickled text for the tensor of that number."""


class Snapshot:
    """All that a checkpoint held at one moment: its objects, pickled, and its tensors, in staging memory."""

    def __init__(self, text: bytes, tensors: list[Tensor], events: list[Any]) -> None:
        self._text, self._tensors, self._events = text, tensors, events

    def build(self) -> Any:
        """Return the checkpoint again: equal, and sharing nothing with what it was taken of."""
        for event in self._events:
            event.synchronize()
        return _Builder(self._text, self._tensors).load()


class Staging:
    """Host memory for one snapshot, reused by the next; pinned for tensors that come from a GPU.

    The order is: ``begin``, then ``take`` for each checkpoint of the moment, then ``end``. All snapshots of one moment
    share their memory, and the next ``begin`` takes it back: they must have been written by then.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[int, bool], list[torch.UntypedStorage]] = defaultdict(list)
        self._used: list[tuple[tuple[int, bool], torch.UntypedStorage]] = []
        # the original is held as well, so that its address cannot pass to another one
        self._twins: dict[tuple[torch.device, int, int], tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._streams: dict[torch.device, Any] = {}

    @property
    def nbytes(self) -> int:
        """How much memory is held, in bytes."""
        free = sum(size * len(storages) for (size, _), storages in self._free.items())
        return free + sum(size for (size, _), _ in self._used)

    def begin(self) -> None:
        """A new moment: the memory of the last one can be written over."""
        for key, storage in self._used:
            self._free[key].append(storage)
        self._used.clear()

    def take(self, checkpoint: Any) -> Snapshot:
        """Return a snapshot. It is complete when this returns, except that a GPU may still be copying: it does so
        before it goes on with what the current stream is given next.

        Raises:
            CheckpointError: if something in ``checkpoint`` cannot be pickled.
        """
        self._twins = {key: twin for key, twin in self._twins.items() if key[2] > _COPIED_ALWAYS}
        buffer = io.BytesIO()
        pickler = _Pickler(buffer, self)
        try:
            pickler.dump(checkpoint)
        except Exception as error:  # whatever an object of the user's raises
            raise CheckpointError(f"The checkpoint could not be written: {atomic.explain(error)}") from error
        return Snapshot(buffer.getvalue(), pickler.tensors, self._events())

    def end(self) -> None:
        """No further snapshot of this moment; memory that it did not need is given back."""
        self._twins.clear()
        self._free.clear()

    def clear(self) -> None:
        """Give all memory back."""
        self._twins.clear()
        self._free.clear()
        self._used.clear()
        self._streams.clear()

    def twin(self, tensor: Tensor) -> Tensor:
        """Return a tensor like ``tensor`` in staging memory; tensors that share memory do so there, too."""
        kind = type(tensor)
        plain = (
            kind in (Tensor, nn.Parameter)
            and tensor.layout is torch.strided
            and not (tensor.is_quantized or tensor.is_nested or tensor.is_conj() or tensor.is_neg())
            and tensor.device.type != "meta"
        )
        if not plain:  # sparse, quantized, a class of somebody's: whatever it is made of, its clone is its own
            staged = tensor.detach().clone()
            return staged.requires_grad_() if tensor.requires_grad else staged
        memory = self._memory(tensor.untyped_storage())
        staged = torch.empty(0, dtype=tensor.dtype)
        staged.set_(memory, tensor.storage_offset(), tensor.size(), tensor.stride())
        if kind is nn.Parameter:
            staged = nn.Parameter(staged, requires_grad=tensor.requires_grad)
        elif tensor.requires_grad:
            staged.requires_grad_()
        return staged

    def _memory(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """Return the copy of ``storage``, making it unless this moment has it already."""
        size = storage.nbytes()
        key = (storage.device, storage.data_ptr(), size)
        if key in self._twins:
            return self._twins[key][0]
        memory = self._allocate(size, storage.device.type == "cuda")
        self._twins[key] = memory, storage
        if storage.device.type == "cuda":
            self._fetch(memory, storage)
        elif size:
            memory.copy_(storage, non_blocking=False)
        return memory

    def _allocate(self, size: int, pinned: bool) -> torch.UntypedStorage:
        key = (size, pinned)
        if self._free[key]:
            memory = self._free[key].pop()
        else:
            self._make_room(size)
            memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned).untyped_storage()
        self._used.append((key, memory))
        return memory

    def _make_room(self, size: int) -> None:
        """Give back memory that is free but of other sizes: there is never more than a snapshot needs."""
        for (each, _), storages in self._free.items():
            while size > 0 and storages:
                storages.pop()
                size -= each

    def _fetch(self, memory: torch.UntypedStorage, storage: torch.UntypedStorage) -> None:
        """Begin to copy from a GPU, on a stream of its own."""
        device = storage.device
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            source = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
            torch.empty(0, dtype=torch.uint8).set_(memory).copy_(source, non_blocking=True)

    def _events(self) -> list[Any]:
        """What must have happened before the copies can be read; training waits for it, too, on the device only."""
        events = []
        for device, stream in self._streams.items():
            events.append(stream.record_event())
            torch.cuda.current_stream(device).wait_event(events[-1])
        return events


class _Pickler(pickle.Pickler):
    """Pickles all but tensors, which it puts aside: numbers and lists change while training goes on, as weights do."""

    def __init__(self, buffer: io.BytesIO, staging: Staging) -> None:
        super().__init__(buffer, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self._staging = staging

    def reducer_override(self, obj: Any) -> Any:
        """Called by ``pickle`` for each object that is not of a built-in type."""
        if not isinstance(obj, Tensor):
            return NotImplemented
        self.tensors.append(self._staging.twin(obj))
        place = _Slot, (len(self.tensors) - 1,)
        # attributes that somebody has given a tensor are of this moment, too
        return (*place, vars(obj), None, None, _give) if vars(obj) else place


def _give(tensor: Tensor, attributes: dict[str, Any]) -> None:
    vars(tensor).update(attributes)


class _Builder(pickle.Unpickler):
    """Puts the tensors back. It reads only what this process has pickled a moment ago."""

    def __init__(self, text: bytes, tensors: list[Tensor]) -> None:
        super().__init__(io.BytesIO(text))
        self._tensors = tensors

    def find_class(self, module: str, name: str) -> Any:
        """Called by ``pickle`` for each class and function."""
        if name == _Slot.__name__ and module == __name__:
            return self._tensors.__getitem__
        return super().find_class(module, name)
