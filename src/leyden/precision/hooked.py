# SPDX-License-Identifier: Apache-2.0
"""Lets a user's Precision say things by the hooks that Lightning's has: each becomes the verb that the loops call."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

_CLIPPING = {"clip_gradients", "clip_grad_by_norm", "clip_grad_by_value", "main_params"}


def adapt(cls: Any) -> None:
    """Turn the hooks that the body of ``cls``, a subclass of Precision, defines into the verbs of ours."""
    own = dict(vars(cls))
    if "backward" in own and _takes_model(own["backward"]):
        cls.backward = _backward(own["backward"])
        cls.hooks_backward = True
    if own.keys() & {"pre_backward", "post_backward"}:
        cls.backward = _around(cls.backward)
        cls.hooks_backward = True
    if "optimizer_step" in own and _takes_model(own["optimizer_step"]):
        cls.optimizer_step = _optimizer_step(own["optimizer_step"])
    if own.keys() & _CLIPPING and "clip" not in own:
        cls.clip = _clip


def _takes_model(method: Any) -> bool:
    return "model" in inspect.signature(method).parameters


def _backward(method: Callable[..., Any]) -> Callable[..., None]:
    @functools.wraps(method)
    def backward(self: Any, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if not (args and isinstance(args[0], nn.Module)) and "model" not in kwargs:
            args = (self.attached_module, self.attached_optimizer, *args)
        method(self, loss, *args, **kwargs)

    return backward


def _around(method: Callable[..., Any]) -> Callable[..., None]:
    @functools.wraps(method)
    def backward(self: Any, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.__dict__.get("_within_backward"):  # a subclass of a subclass calls the method of the one above
            method(self, loss, *args, **kwargs)
            return
        self._within_backward = True
        try:
            loss = self.pre_backward(loss, self.attached_module)
            method(self, loss, *args, **kwargs)
            self.post_backward(loss, self.attached_module)
        finally:
            self._within_backward = False

    return backward


def _optimizer_step(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def optimizer_step(self: Any, optimizer: Optimizer, closure: Any = None, *more: Any, **kwargs: Any) -> Any:
        closure, _ = closure_of(closure, more, kwargs)
        return method(self, optimizer, model=self.attached_module, closure=closure or _nothing, **kwargs)

    return optimizer_step


def closure_of(closure: Any, more: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Return closure and module, where a call may be ``(optimizer, closure)`` or Lightning's ``(optimizer, model, closure)``.

    ``model`` is taken out of ``kwargs``.
    """
    model = kwargs.pop("model", None)
    if isinstance(closure, nn.Module):
        model, closure = closure, more[0] if more else kwargs.pop("closure", None)
    return closure, model


def _clip(self: Any, parameters: Any, value: float | None, algorithm: str = "norm") -> None:
    if not isinstance(parameters, Optimizer):
        return self.clip_list(parameters, value, algorithm)  # type: ignore[no-any-return]
    if value is not None and value > 0:
        self.unscale(parameters)
        self.clip_gradients(parameters, value, algorithm)
    return None


def _nothing() -> None:
    pass
