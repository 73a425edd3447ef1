# SPDX-License-Identifier: Apache-2.0
"""The numbers a run computes in: the base class is plain 32-bit training, and names the verbs that others refine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import _profiler_enabled  # type: ignore[attr-defined]
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.overrides import TorchFunctionMode

from leyden.errors import MisconfigurationException, did_you_mean
from leyden.tree import parameters_of, tree_map

_NOTHING: AbstractContextManager[Any] = nullcontext()

CLIP_ALGORITHMS = ("norm", "value")
_CONTEXTS = {
    "training_step": "train_step_context", "validation_step": "val_step_context", "test_step": "test_step_context",
    "predict_step": "predict_step_context",
}  # fmt: skip
_STEP_CONTEXTS = tuple(_CONTEXTS.values())
_HOOKS = {
    "backward", "pre_backward", "post_backward", "optimizer_step",
    "clip_gradients", "clip_grad_by_norm", "clip_grad_by_value", "main_params",
}  # fmt: skip


class Precision:
    """32-bit training, and the verbs of every precision.

    One update, as a loop drives it::

        with precision.forward_context():
            loss = training_step(precision.convert_input(batch))
        precision.backward(loss)            # or: precision.scale(loss), where the user's own backward runs
        precision.unscale(optimizer)        # from here on the gradients are what they seem
        precision.clip(optimizer, 1.0)
        precision.optimizer_step(optimizer)
        if not precision.skipped_step: ...
    """

    precision: str = "32-true"
    """The canonical name, as in ``Trainer(precision=...)``."""

    @property
    def skipped_step(self) -> bool:
        """Whether the last :meth:`optimizer_step` left the weights alone because a gradient was not finite."""
        return False

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Return ``module`` with its parameters in this precision."""
        return module

    def convert_input(self, batch: Any) -> Any:
        """Return ``batch`` (any tree) with its floating-point tensors in this precision."""
        return batch

    def convert_output(self, batch: Any) -> Any:
        """Return what a step returned, in the precision that its consumers expect."""
        return batch

    def forward_context(self) -> AbstractContextManager[Any]:
        """Return the context in which steps run; it is entered for every batch, so it has to be cheap."""
        return _NOTHING

    def init_context(self) -> AbstractContextManager[Any]:
        """Return the context in which modules are created in this precision."""
        return self.module_init_context()

    def module_init_context(self) -> AbstractContextManager[Any]:
        """The same, under its other name: override either."""
        return self.tensor_init_context()

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """Return the context in which tensors are created in this precision."""
        return _NOTHING

    def scale(self, loss: Tensor) -> Tensor:
        """Return the tensor to call ``backward`` on in place of ``loss``."""
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Scale ``loss`` and call its ``backward`` with the further arguments; a module and an optimizer are passed over."""
        if args and isinstance(args[0], nn.Module):
            args = args[2:]
        self.scale(loss).backward(*args, **kwargs)  # type: ignore[no-untyped-call]

    def unscale(self, optimizer: Optimizer) -> None:
        """Undo :meth:`scale` in the gradients of ``optimizer``; any number of calls before its step does it once."""

    def clip(
        self, parameters: Optimizer | Iterable[Tensor], value: float | None, algorithm: str = "norm"
    ) -> Tensor | None:
        """Clip gradients to a total norm of ``value``, or each of their elements to [-value, value].

        ``parameters`` is an optimizer, which is unscaled first where it has to be, or an iterable of parameters whose
        gradients are already unscaled. None or a ``value`` <= 0 does nothing. Returns the total norm before clipping
        (a 0-d tensor on the gradients' device; no host sync) for ``"norm"``, else None.
        """
        if algorithm not in CLIP_ALGORITHMS:
            raise MisconfigurationException(
                f"gradient_clip_algorithm={algorithm!r} is unknown. Use 'norm' or 'value'."
                f"{did_you_mean(str(algorithm), CLIP_ALGORITHMS)}"
            )
        if value is None or value <= 0:
            return None
        if isinstance(parameters, Optimizer):
            self.unscale(parameters)
            parameters = parameters_of(parameters)
        if algorithm == "norm":
            return nn.utils.clip_grad_norm_(parameters, value)
        nn.utils.clip_grad_value_(parameters, value)
        return None

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any] | None = None, *more: Any, **kwargs: Any
    ) -> Any:
        """Let ``optimizer`` take one step and return what it returned.

        ``closure`` recomputes the loss; ``kwargs`` go to ``optimizer.step``. A module may be given, before ``closure`` or
        as ``model``, and is passed over.
        """
        if more or kwargs:
            from leyden.precision.hooked import closure_of  # noqa: PLC0415  # seldom

            closure, _ = closure_of(closure, more, kwargs)
        if closure is not None:
            return optimizer.step(closure, **kwargs)
        return optimizer.step(**kwargs) if kwargs else step(optimizer)

    # ------------------------------------------------------------------ hooks that are there to be overridden

    train_step_context = forward_context
    """The context of training steps; it is ``forward_context`` where it is not overridden, as are the next three."""
    val_step_context = forward_context
    test_step_context = forward_context
    predict_step_context = forward_context

    def step_context(self, name: str) -> AbstractContextManager[None]:
        """Return the context of a step of a module, by its name, such as ``"validation_step"``."""
        context: AbstractContextManager[None] = getattr(self, _CONTEXTS[name])()
        return context

    hooks_backward: bool = False
    """Whether ``backward`` has to be called in any case, since a subclass has something to say about it."""
    attached_module: Any = None
    """The module that is trained, while a fit runs."""
    attached_optimizer: Any = None
    """Its optimizer, where there is one."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        if "forward_context" in own:
            for name in _STEP_CONTEXTS:
                # not where somebody has written it: then it is no alias
                if name not in own and getattr(cls, name).__name__ == "forward_context":
                    setattr(cls, name, own["forward_context"])
        if own.keys() & _HOOKS:
            from leyden.precision.hooked import adapt  # noqa: PLC0415  # for classes that write one of these only

            adapt(cls)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("attached_")}

    def attach(self, module: Any, optimizers: list[Any], schedulers: list[Any]) -> list[Any]:
        """Get to know what is trained, and return the optimizers: those that :meth:`connect` returns.

        Raises:
            MisconfigurationException: if that returns another module.
        """
        self.attached_module, self.attached_optimizer = module, optimizers[0] if len(optimizers) == 1 else None
        connected, optimizers, _ = self.connect(module, optimizers, schedulers)
        if connected is not module:
            raise MisconfigurationException(
                f"{type(self).__name__}.connect() returned another module. Change the module in place, or in"
                " convert_module()."
            )
        return list(optimizers)

    def detach(self) -> None:
        """Forget what was trained."""
        self.attached_module = self.attached_optimizer = None

    def connect(self, model: Any, optimizers: list[Any], lr_schedulers: list[Any]) -> tuple[Any, list[Any], list[Any]]:
        """Called when a fit begins, with what ``configure_optimizers`` gave; return the same, or other optimizers."""
        return model, optimizers, lr_schedulers

    def pre_backward(self, tensor: Tensor, module: Any) -> Any:
        """Called before gradients are computed; return the loss for that."""
        return tensor

    def post_backward(self, tensor: Tensor, module: Any) -> Any:
        """Called when gradients are computed."""
        return tensor

    def main_params(self, optimizer: Optimizer) -> list[Any]:
        """Return the parameters whose gradients are clipped."""
        return parameters_of(optimizer)

    def clip_gradients(
        self, optimizer: Optimizer, clip_val: float = 0.0, gradient_clip_algorithm: Any = "norm"
    ) -> None:
        """Clip the gradients of an optimizer, which are unscaled already."""
        if clip_val <= 0:
            return
        if getattr(gradient_clip_algorithm, "value", gradient_clip_algorithm) == "value":
            self.clip_grad_by_value(optimizer, clip_val)
        else:
            self.clip_grad_by_norm(optimizer, clip_val)

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        """Clip them to a total norm."""
        nn.utils.clip_grad_norm_(self.main_params(optimizer), clip_val)

    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: float) -> None:
        """Clip each of their elements."""
        nn.utils.clip_grad_value_(self.main_params(optimizer), clip_val)

    def clip_list(self, parameters: Any, value: float | None, algorithm: str = "norm") -> Any:
        """Clip as :meth:`clip` does, for parameters of no optimizer."""
        return Precision.clip(self, parameters, value, algorithm)

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """The other name of :meth:`unscale`."""
        self.unscale(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Return what must be in a checkpoint, under the name of the class; empty if nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""


def step(optimizer: Optimizer) -> Any:
    """Return ``optimizer.step()``, less what torch does around it for a profiler and for hooks where there are none.

    That is a profiler range, and a twelfth of the time of a tiny step.
    """
    # a wrapper may have its step only by passing on what it is asked for
    method: Any = getattr(type(optimizer), "step", None)
    if (
        getattr(method, "__code__", None) is not _AROUND
        or "step" in optimizer.__dict__  # a learning-rate schedule counts the calls
        or optimizer._optimizer_step_pre_hooks  # noqa: SLF001  # torch has no public way to ask
        or optimizer._optimizer_step_post_hooks  # noqa: SLF001
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or _profiler_enabled()
    ):
        return optimizer.step()
    return method.__wrapped__(optimizer)


_AROUND = Optimizer.profile_hook_step(Optimizer.step).__code__
"""The code of what torch puts around the ``step`` of every class of optimizers."""


class DefaultDtype:
    """A context in which new floating-point tensors are of ``dtype``. One instance serves any number of entries."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._previous: list[torch.dtype] = []

    def __enter__(self) -> None:
        self._previous.append(torch.get_default_dtype())
        torch.set_default_dtype(self.dtype)

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.set_default_dtype(self._previous.pop())


class Replaced:
    """A context in which classes of ``torch.nn`` are others, for modules that are made in it.

    Args:
        classes: What stands for the class of each name.
    """

    def __init__(self, classes: dict[str, Any]) -> None:
        self._classes = classes
        self._previous: list[dict[str, Any]] = []

    def __enter__(self) -> None:
        self._previous.append({name: getattr(nn, name) for name in self._classes})
        for name, made in self._classes.items():
            setattr(nn, name, made)

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, former in self._previous.pop().items():
            setattr(nn, name, former)


class WithoutInit(TorchFunctionMode):
    """A context in which the functions of ``torch.nn.init`` that layers call do nothing: weights are what memory held."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


class TruePrecision(Precision):
    """Weights, inputs and new tensors all in one ``dtype`` other than float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._default_dtype = DefaultDtype(dtype)

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module.to(dtype=self.dtype)

    def convert_input(self, batch: Any) -> Any:
        return tree_map(self._convert, batch)

    def _convert(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def forward_context(self) -> AbstractContextManager[Any]:
        return self._default_dtype

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return self._default_dtype
