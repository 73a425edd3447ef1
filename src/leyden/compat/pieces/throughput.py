# SPDX-License-Identifier: Apache-2.0
"""Throughput in a loop of the user's own: measured, and logged through Fabric."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from leyden.profilers.throughput import Throughput
from leyden.runtime.flops import get_available_flops

T = TypeVar("T", bound=float)
_DTYPES = {"64": torch.double, "16": torch.float16, "bf": torch.bfloat16}


class ThroughputMonitor(Throughput):
    """A ``Throughput`` that knows the device and the number of processes of a Fabric; it counts on rank 0 only.

    Args:
        fabric: Launched, so that it knows them.
        kwargs: The other arguments of ``Throughput``.
    """

    def __init__(self, fabric: Any, **kwargs: Any) -> None:
        name = str(getattr(fabric.strategy.precision, "precision", ""))
        dtype = _DTYPES.get(name[:2], torch.float32)
        super().__init__(get_available_flops(fabric.device, dtype), fabric.world_size, **kwargs)
        self._fabric = fabric
        self.step = -1

    def update(self, **totals: Any) -> None:
        """Note how far things have come, see ``Throughput.update``."""
        if self._fabric.is_global_zero:
            super().update(**totals)

    def compute_and_log(self, step: int | None = None, **kwargs: Any) -> dict[str, int | float]:
        """Return what ``compute`` returns, and send it to the loggers.

        Args:
            step: The place on the x-axis; None counts the calls.
            kwargs: For ``compute``.
        """
        if not self._fabric.is_global_zero:
            return {}
        self.step = self.step + 1 if step is None else step
        rates = self.compute(**kwargs)
        self._fabric.log_dict(metrics=rates, step=self.step)
        return rates
