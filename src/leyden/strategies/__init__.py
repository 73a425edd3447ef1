# SPDX-License-Identifier: Apache-2.0
"""Strategies: where the module lives and how its steps, gradients and checkpoints travel between devices."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from leyden.strategies.base import Strategy

if TYPE_CHECKING:
    from leyden.strategies.data_parallel import DataParallelStrategy
    from leyden.strategies.ddp import DDPStrategy
    from leyden.strategies.deepspeed import DeepSpeedStrategy
    from leyden.strategies.fsdp import FSDPStrategy
    from leyden.strategies.launch.ray import OnRay
    from leyden.strategies.mesh import MeshStrategy
    from leyden.strategies.model_parallel import ModelParallelStrategy
    from leyden.strategies.parallel import ParallelStrategy
    from leyden.strategies.single import SingleDeviceStrategy
    from leyden.strategies.tensor_parallel import TensorParallelStrategy

__all__ = [
    "DDPStrategy",
    "DataParallelStrategy",
    "DeepSpeedStrategy",
    "FSDPStrategy",
    "MeshStrategy",
    "ModelParallelStrategy",
    "OnRay",
    "ParallelStrategy",
    "SingleDeviceStrategy",
    "Strategy",
    "TensorParallelStrategy",
]

_WHERE = {
    "DDPStrategy": "ddp",
    "DataParallelStrategy": "data_parallel",
    "DeepSpeedStrategy": "deepspeed",
    "FSDPStrategy": "fsdp",
    "MeshStrategy": "mesh",
    "ModelParallelStrategy": "model_parallel",
    "OnRay": "launch.ray",
    "ParallelStrategy": "parallel",
    "SingleDeviceStrategy": "single",
    "TensorParallelStrategy": "tensor_parallel",
}
"""What is imported when it is asked for: the class, and the file that it is in."""


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"leyden.strategies.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
