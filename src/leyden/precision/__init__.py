# SPDX-License-Identifier: Apache-2.0
"""The precisions, and how a name such as ``"bf16-mixed"`` becomes one."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from leyden.errors import MisconfigurationException, did_you_mean
from leyden.precision.base import Precision
from leyden.runtime.ranks import rank_zero_warn

if TYPE_CHECKING:
    from leyden.precision.bitsandbytes import BitsandbytesPrecision
    from leyden.precision.double import DoublePrecision
    from leyden.precision.gone import FSDPPrecision, XLAPrecision
    from leyden.precision.half import HalfPrecision
    from leyden.precision.mixed import MixedPrecision
    from leyden.precision.transformer_engine import TransformerEnginePrecision

_HOMES = {
    "BitsandbytesPrecision": "bitsandbytes",
    "DoublePrecision": "double",
    "FSDPPrecision": "gone",
    "HalfPrecision": "half",
    "MixedPrecision": "mixed",
    "TransformerEnginePrecision": "transformer_engine",
    "XLAPrecision": "gone",
}
_ENGINE = {"transformer-engine": torch.bfloat16, "transformer-engine-float16": torch.float16}
PRECISIONS = ("32-true", "64-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed", *_ENGINE)
_SHORT = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}


def canonical(precision: str | int | None) -> str:
    """Return the full name of a precision: 16 and ``"16"`` are ``"16-mixed"``, None is ``"32-true"``."""
    if precision is None:
        return "32-true"
    name = str(precision)
    name = _SHORT.get(name, name)
    if isinstance(precision, bool) or name not in PRECISIONS:
        raise MisconfigurationException(
            f"Precision {precision!r} is invalid. Allowed precision values: {', '.join(map(repr, PRECISIONS))}, and"
            f" the short forms 64, 32, 16 and 'bf16'.{did_you_mean(name, [*PRECISIONS, *_SHORT])}"
        )
    return name


def make_precision(precision: Precision | str | int | None, device: torch.device | str) -> Precision:
    """Return the precision of that name for a run on ``device``; a Precision is returned as it is.

    ``"16-mixed"`` on a CPU becomes ``"bf16-mixed"``, with a warning: CPUs have no float16 arithmetic to gain from.
    """
    if isinstance(precision, Precision):
        return precision
    name = canonical(precision)
    device_type = torch.device(device).type
    if name == "16-mixed" and device_type == "cpu":
        rank_zero_warn("precision='16-mixed' gains nothing on a CPU: using 'bf16-mixed'. Ask for that to silence this.")
        name = "bf16-mixed"
    if name == "32-true":
        return Precision()
    # most runs need none of these
    if name == "64-true":
        from leyden.precision.double import DoublePrecision  # noqa: PLC0415

        return DoublePrecision()
    if name in _ENGINE:
        from leyden.precision.transformer_engine import TransformerEnginePrecision  # noqa: PLC0415

        return TransformerEnginePrecision(weights_dtype=_ENGINE[name])
    if name.endswith("-true"):
        from leyden.precision.half import HalfPrecision  # noqa: PLC0415

        return HalfPrecision(name)
    from leyden.precision.mixed import MixedPrecision  # noqa: PLC0415

    return MixedPrecision(name, device_type)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "PRECISIONS",
    "BitsandbytesPrecision",
    "DoublePrecision",
    "FSDPPrecision",
    "HalfPrecision",
    "MixedPrecision",
    "Precision",
    "TransformerEnginePrecision",
    "XLAPrecision",
    "canonical",
    "make_precision",
]
