# SPDX-License-Identifier: Apache-2.0
"""``precision="64-true"``: everything in float64."""

from __future__ import annotations

import torch

from leyden.precision.base import TruePrecision


class DoublePrecision(TruePrecision):
    """Weights, inputs and new tensors in float64."""

    precision = "64-true"

    def __init__(self) -> None:
        super().__init__(torch.float64)
