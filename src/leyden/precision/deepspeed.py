# SPDX-License-Identifier: Apache-2.0
"""The numbers of a run under DeepSpeed: its engine has the 16-bit weights, keeps 32-bit ones for the optimizer, and scales."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from leyden.errors import MisconfigurationException, did_you_mean
from leyden.precision.base import DefaultDtype, Precision
from leyden.tree import tree_map

_DTYPES = {
    "32-true": None,
    "16-mixed": torch.float16,
    "16-true": torch.float16,
    "bf16-mixed": torch.bfloat16,
    "bf16-true": torch.bfloat16,
}


class DeepSpeedPrecision(Precision):
    """The number format that DeepSpeed's engine computes in.

    With 16 bits, ``"mixed"`` or ``"true"``, weights, inputs and gradients have 16 bits, and the optimizer steps on weights
    of 32; losses are scaled for ``"16-mixed"`` and ``"16-true"``. ``"true"`` also makes new tensors in a step of 16 bits.

    Raises:
        MisconfigurationException: for a format that DeepSpeed has not.
    """

    def __init__(self, precision: str = "32-true") -> None:
        if precision not in _DTYPES:
            raise MisconfigurationException(
                f"DeepSpeed does not compute in precision={precision!r}: use one of {list(_DTYPES)}, or another strategy."
                f"{did_you_mean(str(precision), _DTYPES)}"
            )
        self.precision = precision
        self.dtype: torch.dtype | None = _DTYPES[precision]
        self.engine: Any = None
        """DeepSpeed's engine, while a fit runs."""
        self._default = DefaultDtype(self.dtype) if self.dtype is not None and precision.endswith("true") else None

    @property
    def skipped_step(self) -> bool:
        return self.engine is not None and not self.engine.was_step_applied()

    def convert_input(self, batch: Any) -> Any:
        return batch if self.dtype is None or self.engine is None else tree_map(self._convert, batch)

    def _convert(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def forward_context(self) -> AbstractContextManager[Any]:
        return super().forward_context() if self._default is None or self.engine is None else self._default

    def scale(self, loss: Tensor) -> Tensor:
        """Return what may be given to ``loss.backward()``; the engine sees to the rest by its hooks.

        Raises:
            MisconfigurationException: for a DeepSpeed that is too old for that.
        """
        if self.engine is None:
            return loss
        if not hasattr(self.engine, "scale"):
            raise MisconfigurationException(
                "The hooks on_before_backward() and backward() need a newer DeepSpeed, whose engine has scale(): pip install"
                " -U deepspeed."
            )
        scaled: Tensor = self.engine.scale(loss)
        return scaled

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Let the engine compute gradients and exchange them.

        Raises:
            MisconfigurationException: for arguments of ``backward`` other than ``retain_graph``.
        """
        if self.engine is None:
            super().backward(loss, *args, **kwargs)
            return
        retain = bool(kwargs.pop("retain_graph", False))
        if args or kwargs:
            raise MisconfigurationException(
                f"DeepSpeed's backward takes retain_graph only, not {[*args, *kwargs]}: it has one loss for one optimizer."
            )
        self.engine.backward(loss, retain_graph=retain, scale_wrt_gas=False)

    def state_dict(self) -> dict[str, Any]:
        """The state of the loss scale, for 16 bits that are not bfloat16."""
        scaler = getattr(getattr(self.engine, "optimizer", None), "loss_scaler", None)
        if scaler is None or self.dtype != torch.float16:
            return {}
        return {name: value for name, value in vars(scaler).items() if isinstance(value, (bool, int, float))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        scaler = getattr(getattr(self.engine, "optimizer", None), "loss_scaler", None)
        if scaler is not None:
            vars(scaler).update({name: value for name, value in state_dict.items() if name in vars(scaler)})
