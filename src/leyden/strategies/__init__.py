# SPDX-License-Identifier: Apache-2.0
"""Strategies: where the module lives and how its steps, gradients and checkpoints travel between devices."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from leyden.strategies.base import Strategy

if TYPE_CHECKING:
    from leyden.strategies.data_parallel import DataParallelStrategy
    from leyden.strategies.ddp import DDPStrategy
    from leyden.strategies.launch.ray import OnRay
    from leyden.strategies.parallel import ParallelStrategy
    from leyden.strategies.single import SingleDeviceStrategy

__all__ = ["DDPStrategy", "DataParallelStrategy", "OnRay", "ParallelStrategy", "SingleDeviceStrategy", "Strategy"]

_WHERE = {
    "DDPStrategy": "ddp",
    "DataParallelStrategy": "data_parallel",
    "OnRay": "launch.ray",
    "ParallelStrategy": "parallel",
    "SingleDeviceStrategy": "single",
}
"""What is imported when it is asked for: the class, and the file that it is in."""


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"leyden.strategies.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
