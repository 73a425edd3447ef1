# SPDX-License-Identifier: Apache-2.0
"""``precision="16-true"`` and ``"bf16-true"``: everything in 16 bits, weights included."""

from __future__ import annotations

import torch

from leyden.errors import MisconfigurationException
from leyden.precision.base import TruePrecision

_DTYPES = {"16-true": torch.float16, "bf16-true": torch.bfloat16}


class HalfPrecision(TruePrecision):
    """Weights, inputs and new tensors in float16 (``"16-true"``) or bfloat16 (``"bf16-true"``); no loss scaling."""

    def __init__(self, precision: str = "16-true") -> None:
        if precision not in _DTYPES:
            raise MisconfigurationException(f"HalfPrecision(precision={precision!r}): use '16-true' or 'bf16-true'.")
        super().__init__(_DTYPES[precision])
        self.precision = precision
