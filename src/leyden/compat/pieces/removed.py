# SPDX-License-Identifier: Apache-2.0
"""Names that Lightning itself has taken out: the class is there to import, and says so when it is made."""

from __future__ import annotations

from typing import Any

from leyden import precision
from leyden.precision.deepspeed import DeepSpeedPrecision
from leyden.runtime.ranks import rank_zero_deprecation

_GONE = {
    "HPUAccelerator": "accelerator='auto'",
    "HPUCheckpointIO": "TorchCheckpointIO",
    "HPUParallelStrategy": "strategy='ddp'",
    "HPUPrecisionPlugin": "precision='bf16-mixed'",
    "SingleHPUStrategy": "strategy='auto'",
}


def _gone(name: str, instead: str) -> type:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"{name} is gone: Lightning 2.6 has no support for HPUs either. Use {instead}.")

    nothing = {method: staticmethod(lambda *_, **__: False) for method in ("is_available", "auto_device_count")}
    return type(name, (), {"__init__": init, "__doc__": f"Removed; use {instead}.", "__module__": __name__, **nothing})


def _renamed(name: str, now: type) -> type:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        rank_zero_deprecation(f"{name} is an old name: use {now.__name__}.", stacklevel=6)
        now.__init__(self, *args, **kwargs)  # type: ignore[misc]

    return type(
        name, (now,), {"__init__": init, "__doc__": f"{now.__name__}, by its old name.", "__module__": __name__}
    )


HPUAccelerator = _gone("HPUAccelerator", _GONE["HPUAccelerator"])
HPUCheckpointIO = _gone("HPUCheckpointIO", _GONE["HPUCheckpointIO"])
HPUParallelStrategy = _gone("HPUParallelStrategy", _GONE["HPUParallelStrategy"])
HPUPrecisionPlugin = _gone("HPUPrecisionPlugin", _GONE["HPUPrecisionPlugin"])
SingleHPUStrategy = _gone("SingleHPUStrategy", _GONE["SingleHPUStrategy"])
DeepSpeedPrecisionPlugin = _renamed("DeepSpeedPrecisionPlugin", DeepSpeedPrecision)
DoublePrecisionPlugin = _renamed("DoublePrecisionPlugin", precision.DoublePrecision)
HalfPrecisionPlugin = _renamed("HalfPrecisionPlugin", precision.HalfPrecision)
MixedPrecisionPlugin = _renamed("MixedPrecisionPlugin", precision.MixedPrecision)
PrecisionPlugin = _renamed("PrecisionPlugin", precision.Precision)
