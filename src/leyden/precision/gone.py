# SPDX-License-Identifier: Apache-2.0
"""Precisions that are chosen by another name here, or that are not built."""

from __future__ import annotations

from typing import Any

from leyden.errors import MisconfigurationException
from leyden.precision.base import Precision
from leyden.precision.half import HalfPrecision
from leyden.precision.mixed import MixedPrecision


class FSDPPrecision(Precision):
    """What FSDP computes in. Making one gives the precision of that name; the strategy sees to the shards.

    Args:
        precision: ``"32-true"``, ``"16-mixed"``, ``"bf16-mixed"``, ``"16-true"`` or ``"bf16-true"``.
        scaler: What scales losses, for ``"16-mixed"``; None: one is made.
    """

    def __new__(cls, precision: str, scaler: Any = None) -> Any:  # what is made is of another class
        if scaler is not None and precision != "16-mixed":
            raise MisconfigurationException(
                f"FSDPPrecision({precision!r}, scaler={scaler!r}): only '16-mixed' scales losses. Leave scaler out."
            )
        if precision == "32-true":
            return Precision()
        return HalfPrecision(precision) if precision.endswith("-true") else MixedPrecision(precision, "cuda", scaler)


class XLAPrecision(Precision):
    """The numbers of TPUs, which are not built.

    Raises:
        MisconfigurationException: always.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise MisconfigurationException(
            "XLAPrecision is not there: TPUs are out of scope. Use precision='bf16-true' or 'bf16-mixed' on GPUs or CPUs."
        )
