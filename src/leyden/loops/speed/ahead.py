# SPDX-License-Identifier: Apache-2.0
"""Copies each batch to a CUDA device beside the step before it: on a stream of its own, from pinned memory.

The host runs ahead of the device: when it draws batch k+1, step k has been launched and mostly has still to run. The
copy of batch k+1 therefore needs no batch drawn early; it only must not queue up behind step k. So the tensors that it
goes into are made before step k is launched, in the shapes of batch k::

    host      draw k   room for k+1, mark   launch step k   draw k+1   copy k+1   room for k+2, mark   launch step k+1
    compute   ................. mark . step k ................... waits for copy k+1 . mark . step k+1
    side                        waits for the mark . copy k+1

All memory belongs to the stream that computes: what it held before was used ahead of the mark, and what it holds
afterwards is used after the copy, so that nothing has to be kept back from reuse. One batch at most is ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from leyden.runtime.ranks import rank_zero_warn
from leyden.tree import MOVABLE, moved, tree_map

SMALL = 1 << 16
"""Bytes of a batch below which it is copied in line: the device needs less time for it than the host for the marks."""


class Lane:
    """What copying ahead needs of ``torch.cuda``: a stream beside the one that computes, room, and marks.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def compute(self) -> Any:
        """The stream that computes now."""
        return torch.cuda.current_stream(self.device)

    def room(self, like: Tensor) -> Tensor:
        """Return a tensor on the device, without content, for a copy of ``like``; it belongs to the stream that computes."""
        return torch.empty_like(like, device=self.device)

    def mark(self, stream: Any) -> Any:
        """Return a mark of what ``stream`` was given so far."""
        return stream.record_event()

    def pinned(self, source: Tensor) -> Tensor:
        """Return ``source`` in pinned memory; itself if it is there already."""
        if source.is_pinned():
            return source
        # not pin_memory(), which cannot copy a tensor that was expanded
        return torch.empty_like(source, pin_memory=True).copy_(source)

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Any) -> Any:
        """Copy each ``(target, source)`` beside the stream that computes, once ``after`` is reached; return a mark.

        The sources may be let go of at once: torch keeps pinned memory from reuse until a copy that reads it is done,
        and the copy of memory that is not pinned has read it when the call returns.
        """
        self._side.wait_event(after)
        with torch.cuda.stream(self._side):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        return self._side.record_event()

    def wait(self, stream: Any, mark: Any) -> None:
        """Let ``stream`` go on once ``mark`` is reached; the host does not wait."""
        stream.wait_event(mark)


class Room:
    """Tensors on the device that wait for the next batch, and the mark from which on they may be written."""

    def __init__(self, tensors: list[Tensor], shapes: list[tuple[Any, ...]], stream: Any, mark: Any) -> None:
        self.tensors, self.shapes, self.stream, self.mark = tensors, shapes, stream, mark


class Ahead:
    """Brings batches to the device, each one beside the step before it; ``ahead(batch)`` returns the batch there.

    What it returns equals what ``tree.move_to`` returns, and its tensors are nobody else's. A batch of another shape than
    the one before is copied in line with the steps. So is one that is small, and objects with a ``to`` method of their own
    and tensors that are on a device already are brought there as ``move_to`` does.

    Args:
        device: Where to.
        lane: The calls of ``torch.cuda``.
    """

    def __init__(self, device: torch.device, lane: Lane) -> None:
        self.device, self.lane = device, lane
        self.room: Room | None = None
        self.pins = True
        """False once memory could not be pinned."""

    def __call__(self, batch: Any, *place: Any) -> Any:
        """Return ``batch`` on the device; ``place``, the further arguments of ``transfer_batch_to_device``, changes nothing."""
        lane, room = self.lane, self.room
        self.room = None
        stream = lane.compute()
        if room is not None and room.stream != stream:
            room = None  # made in the order of another stream
        sources: list[Tensor] = []
        pairs: list[tuple[Tensor, Tensor]] = []

        def bring(node: Any) -> Any:
            if not _is_plain(node):
                return moved(node, self.device)
            index = len(sources)
            sources.append(node)
            if room is None or index >= len(room.shapes) or room.shapes[index] != _shape(node):
                return moved(self._pinned(node) if node.nbytes >= SMALL else node, self.device)
            pairs.append((room.tensors[index], node))
            return room.tensors[index]

        brought = tree_map(bring, batch, MOVABLE)
        if pairs:
            assert room is not None
            lane.wait(stream, lane.copy([(target, self._pinned(source)) for target, source in pairs], room.mark))
        if sources and sum(source.nbytes for source in sources) >= SMALL:
            self.room = self._make_room(sources, stream)
        return brought

    def _make_room(self, sources: list[Tensor], stream: Any) -> Room | None:
        try:
            tensors = [self.lane.room(source) for source in sources]
        except torch.OutOfMemoryError:
            return None  # no room for a second batch now: the next one is copied in line
        return Room(tensors, [_shape(source) for source in sources], stream, self.lane.mark(stream))

    def _pinned(self, source: Tensor) -> Tensor:
        if not self.pins:
            return source
        try:
            return self.lane.pinned(source)
        except RuntimeError as error:
            self.pins = False
            reason = str(error).strip().partition("\n")[0]
            rank_zero_warn(
                f"A batch could not be copied to pinned memory ({reason}), so batches go to the device from ordinary"
                " memory from here on, which is slower. The system limits how much memory may be locked (ulimit -l)."
            )
            return source


def _is_plain(node: Any) -> bool:
    """Whether a node is an ordinary tensor in host memory: one that a copy into an empty tensor reproduces."""
    return (
        type(node) is Tensor
        and node.device.type == "cpu"
        and node.layout is torch.strided
        and not (node.requires_grad or node.is_nested or node.is_quantized or node.is_complex() or node.is_neg())
    )


def _shape(source: Tensor) -> tuple[Any, ...]:
    """What room is made by: a tensor made of it has these too."""
    return source.shape, source.dtype, source.stride(), torch.is_inference_mode_enabled()
