# SPDX-License-Identifier: Apache-2.0
"""Strategies: where the module lives and how its steps, gradients and checkpoints travel between devices."""

from leyden.strategies.base import Strategy
from leyden.strategies.single import SingleDeviceStrategy

__all__ = ["SingleDeviceStrategy", "Strategy"]
