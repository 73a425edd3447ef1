# SPDX-License-Identifier: Apache-2.0
"""One process on one device: the strategy that has nothing to add to the base."""

from __future__ import annotations

from leyden.strategies.base import Strategy


class SingleDeviceStrategy(Strategy):
    """Trains on one CPU, CUDA or MPS device."""

    strategy_name = "single_device"
