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
        """Return the context in which modules and tensors are created in this precision."""
        return _NOTHING

    def scale(self, loss: Tensor) -> Tensor:
        """Return the tensor to call ``backward`` on in place of ``loss``."""
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Scale ``loss`` and call its ``backward`` with the further arguments."""
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

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Let ``optimizer`` take one step and return what it returned.

        ``closure`` recomputes the loss; ``kwargs`` go to ``optimizer.step``.
        """
        if closure is not None:
            return optimizer.step(closure, **kwargs)
        return optimizer.step(**kwargs) if kwargs else step(optimizer)

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

    def init_context(self) -> AbstractContextManager[Any]:
        return self._default_dtype
