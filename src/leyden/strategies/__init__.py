# SPDX-License-Identifier: Apache-2.0
"""Strategies: where the module lives and how its steps, gradients and checkpoints travel between devices."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from leyden.strategies.base import Strategy

if TYPE_CHECKING:
    from leyden.strategies.ddp import DDPStrategy
    from leyden.strategies.deepspeed import DeepSpeedStrategy
    from leyden.strategies.fsdp import FSDPStrategy
    from leyden.strategies.mesh import MeshStrategy
    from leyden.strategies.parallel import ParallelStrategy
    from leyden.strategies.single import SingleDeviceStrategy

__all__ = [
    "DDPStrategy",
    "DeepSpeedStrategy",
    "FSDPStrategy",
    "MeshStrategy",
    "ParallelStrategy",
    "SingleDeviceStrategy",
    "Strategy",
]

_WHERE = {
    "DDPStrategy": "ddp",
    "DeepSpeedStrategy": "deepspeed",
    "FSDPStrategy": "fsdp",
    "MeshStrategy": "mesh",
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
