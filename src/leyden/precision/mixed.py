# SPDX-License-Identifier: Apache-2.0
"""``precision="16-mixed"`` and ``"bf16-mixed"``: 32-bit weights, 16-bit arithmetic where it is safe (autocast)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import LBFGS, Optimizer

from leyden.errors import MisconfigurationException
from leyden.precision.base import Precision
from leyden.precision.hooked import closure_of
from leyden.tree import parameters_of

_DTYPES = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


class MixedPrecision(Precision):
    """Autocast to float16 with loss scaling (``"16-mixed"``), or to bfloat16 without (``"bf16-mixed"``).

    ``device`` is the device type for autocast: ``"cuda"``, ``"cpu"``, ``"mps"``. ``scaler`` replaces the default
    :class:`torch.amp.GradScaler` of ``"16-mixed"``.

    The scale is updated when the next loss is scaled, not right after a step: so several optimizers may step on one
    loss, and all their gradients are unscaled by the factor that they were scaled by.
    """

    def __init__(self, precision: str, device: str, scaler: GradScaler | None = None) -> None:
        if precision not in _DTYPES:
            raise MisconfigurationException(f"MixedPrecision(precision={precision!r}): use '16-mixed' or 'bf16-mixed'.")
        if precision == "bf16-mixed" and scaler is not None:
            raise MisconfigurationException(
                f"MixedPrecision('bf16-mixed', scaler={scaler!r}): bfloat16 has the range of float32 and needs no loss "
                "scaling. Leave scaler out, or use '16-mixed'."
            )
        self.precision = precision
        self.device = device
        self.scaler = GradScaler(device) if scaler is None and precision == "16-mixed" else scaler
        # ids of the optimizers that were unscaled, and that stepped, since the last update of the scale
        self._unscaled: set[int] = set()
        self._stepped: set[int] = set()
        self._step_ran = True
        self._found_inf: Tensor | None = None

    def forward_context(self) -> AbstractContextManager[Any]:
        # a new one each time, since an autocast object keeps one previous state and so cannot be nested in itself
        return torch.autocast(self.device, dtype=_DTYPES[self.precision], cache_enabled=False)

    def scale(self, loss: Tensor) -> Tensor:
        if self.scaler is None:
            return loss
        self._update()
        return self.scaler.scale(loss)

    def unscale(self, optimizer: Optimizer) -> None:
        if self.scaler is None or not _has_gradients(optimizer):
            return
        if id(optimizer) in self._stepped:
            self._update()  # a second step since the last loss was scaled
        if id(optimizer) in self._unscaled:
            return
        self.scaler.unscale_(optimizer)
        self._unscaled.add(id(optimizer))

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any] | None = None, *more: Any, **kwargs: Any
    ) -> Any:
        if more or kwargs:
            closure, _ = closure_of(closure, more, kwargs)
        if self.scaler is None:
            return super().optimizer_step(optimizer, closure, **kwargs)
        if isinstance(optimizer, LBFGS):
            raise MisconfigurationException(
                "LBFGS evaluates the loss several times a step, which loss scaling does not allow. "
                "Use another optimizer, or Trainer(precision='bf16-mixed')."
            )
        result = None if closure is None else closure()
        self._step_ran, self._found_inf = True, None
        if not _has_gradients(optimizer):
            optimizer.step(**kwargs)  # nothing to check for infinities; the scaler would refuse
            return result
        self.unscale(optimizer)
        self._step_ran = False
        hook = optimizer.register_step_pre_hook(self._note_step)
        try:
            returned = self.scaler.step(optimizer, **kwargs)
        finally:
            hook.remove()
        self._stepped.add(id(optimizer))
        return returned if closure is None else result

    def _note_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Called when the scaler lets the optimizer step: an unfused one only if all gradients are finite, a fused one
        always, with a flag on the device that tells its kernel to do nothing."""
        self._step_ran = True
        self._found_inf = getattr(optimizer, "found_inf", None)

    @property
    def skipped_step(self) -> bool:
        if not self._step_ran:
            return True
        # waits for the device, only with a fused optimizer and only when asked
        return self._found_inf is not None and bool(self._found_inf.item())

    def _update(self) -> None:
        if self._stepped and self.scaler is not None:
            self.scaler.update()
            self._stepped.clear()
            self._unscaled.clear()

    def state_dict(self) -> dict[str, Any]:
        if self.scaler is None:
            return {}
        self._update()
        return self.scaler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.scaler is not None and state_dict:
            self._stepped.clear()
            self._unscaled.clear()
            self.scaler.load_state_dict(state_dict)


def _has_gradients(optimizer: Optimizer) -> bool:
    return any(parameter.grad is not None for parameter in parameters_of(optimizer))
