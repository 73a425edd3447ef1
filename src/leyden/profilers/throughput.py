# SPDX-License-Identifier: Apache-2.0
"""Rates from running totals: batches, samples, items and floating-point operations per second over a rolling window."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from leyden.errors import MisconfigurationException


class _Totals(NamedTuple):
    """Where the counts stand at one moment."""

    time: float
    batches: int
    samples: int
    lengths: int | None
    flops: int | None


class Throughput:
    """Takes the totals after each batch and answers with rates over the last ``window_size`` of them.

    ``compute`` returns, under these names (``/`` is the separator):

    - ``time``, ``batches``, ``samples``, ``lengths``: the newest totals.
    - ``device/batches_per_sec``, ``device/samples_per_sec``, ``device/items_per_sec``, ``device/flops_per_sec``: rates of
      one device, once the window is full; ``device/mfu``: the last as a share of ``available_flops``.
    - ``batches_per_sec``, ``samples_per_sec``, ``items_per_sec``, ``flops_per_sec``: the same times ``world_size``, where
      that is more than 1.

    Args:
        available_flops: Operations a second that one device can do (:func:`~leyden.runtime.flops.get_available_flops`).
        world_size: How many devices work alike.
        window_size: How many updates the rolling average spans.
        separator: Between ``device`` and what follows.

    Raises:
        MisconfigurationException: for a ``world_size`` below 1 or a ``window_size`` below 2.
    """

    def __init__(
        self,
        available_flops: float | None = None,
        world_size: int = 1,
        window_size: int = 100,
        separator: str = "/",
    ) -> None:
        if world_size < 1:
            raise MisconfigurationException(f"Throughput(world_size={world_size!r}): must be 1 or more.")
        if window_size < 2:
            raise MisconfigurationException(
                f"Throughput(window_size={window_size!r}): must be 2 or more, since a rate needs two moments."
            )
        self.available_flops = available_flops
        self.world_size = world_size
        self.separator = separator
        self._window: deque[_Totals] = deque(maxlen=window_size)
        self._flops = 0

    def update(
        self, *, time: float, batches: int, samples: int, lengths: int | None = None, flops: int | None = None
    ) -> None:
        """Note how far things have come. All but ``flops`` are totals, and never decrease.

        Args:
            time: Seconds since the start.
            batches: Batches of this device since the start.
            samples: Samples in them.
            lengths: Items (tokens, frames) in those.
            flops: Operations since the last call, not a total.

        Raises:
            ValueError: for a total that is smaller than the last one, or fewer samples than batches, or fewer items than
                samples.
        """
        if samples < batches:
            raise ValueError(f"Expected samples ({samples}) to be greater or equal than batches ({batches})")
        if lengths is not None and lengths < samples:
            raise ValueError(f"Expected lengths ({lengths}) to be greater or equal than samples ({samples})")
        if self._window:
            last = self._window[-1]
            for name, before, now in (
                ("time", last.time, time), ("batches", last.batches, batches), ("samples", last.samples, samples),
                ("lengths", last.lengths or 0, lengths or 0),
            ):  # fmt: skip
                if now < before:
                    raise ValueError(f"Expected the value to increase, last: {before}, current: {now} ({name})")
        if flops is not None:
            self._flops += flops
        self._window.append(_Totals(time, batches, samples, lengths, None if flops is None else self._flops))

    def compute(self) -> dict[str, int | float]:
        """Return the totals, and the rates once the window is full."""
        if not self._window:
            return {}
        first, last = self._window[0], self._window[-1]
        found: dict[str, int | float] = {"time": last.time, "batches": last.batches, "samples": last.samples}
        if last.lengths is not None:
            found["lengths"] = last.lengths
        seconds = last.time - first.time
        if len(self._window) < (self._window.maxlen or 0) or seconds <= 0:
            return found
        done: dict[str, float] = {"batches": last.batches - first.batches, "samples": last.samples - first.samples}
        if last.lengths is not None and first.lengths is not None:
            done["items"] = last.lengths - first.lengths
        if last.flops is not None and first.flops is not None:
            done["flops"] = last.flops - first.flops
        for name, number in done.items():
            found[f"device{self.separator}{name}_per_sec"] = number / seconds
            if self.world_size > 1:
                found[f"{name}_per_sec"] = number / seconds * self.world_size
        if "flops" in done and self.available_flops:
            found[f"device{self.separator}mfu"] = done["flops"] / seconds / self.available_flops
        return found

    def reset(self) -> None:
        """Forget everything."""
        self._window.clear()
        self._flops = 0
