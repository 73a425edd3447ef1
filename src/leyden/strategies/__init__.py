# SPDX-License-Identifier: Apache-2.0
"""Strategies: where the module lives and how its steps, gradients and checkpoints travel between devices."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from leyden.strategies.base import Strategy
from leyden.strategies.single import SingleDeviceStrategy

if TYPE_CHECKING:
    from leyden.strategies.ddp import DDPStrategy

__all__ = ["DDPStrategy", "SingleDeviceStrategy", "Strategy"]


def __getattr__(name: str) -> Any:
    if name == "DDPStrategy":
        return importlib.import_module("leyden.strategies.ddp").DDPStrategy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
