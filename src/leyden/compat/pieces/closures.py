# SPDX-License-Identifier: Apache-2.0
"""The closure of automatic optimization and what steps return, for code that builds them by hand; our loops need none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from leyden.compat.pieces.say import WarningCache
from leyden.errors import MisconfigurationException
from leyden.types import STEP_OUTPUT

T = TypeVar("T")


def do_nothing_closure() -> None:
    """A closure that does nothing."""


@dataclass
class OutputResult:
    """What a step returned."""

    def asdict(self) -> dict[str, Any]:
        """Return it as a dict."""
        raise NotImplementedError(f"{type(self).__name__} has no asdict().")


@dataclass
class ClosureResult(OutputResult):
    """What ``training_step`` returned under automatic optimization.

    Attributes:
        closure_loss: The loss with its graph; None skips the batch.
        loss: A copy of it without the graph.
        extra: What else was returned.
    """

    closure_loss: Tensor | None
    loss: Tensor | None = field(init=False, default=None)
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.closure_loss is not None:
            self.loss = self.closure_loss.detach().clone()

    @classmethod
    def from_training_step_output(cls, training_step_output: STEP_OUTPUT, normalize: int = 1) -> ClosureResult:
        """Read what a step returned; the loss is divided by ``normalize``.

        Raises:
            MisconfigurationException: if it is no tensor, dict with ``"loss"``, or None.
        """
        loss: Any = training_step_output
        extra: dict[str, Any] = {}
        if isinstance(training_step_output, Mapping):
            loss = training_step_output.get("loss")
            extra = {name: value for name, value in training_step_output.items() if name != "loss"}
            if loss is None:
                raise MisconfigurationException("training_step returned a dict without the key 'loss': add it.")
        elif loss is not None and not isinstance(loss, Tensor):
            raise MisconfigurationException(
                f"training_step returned a {type(loss).__name__}: return the loss, a dict with 'loss', or None."
            )
        return cls(None if loss is None else loss / normalize, extra=extra)

    def asdict(self) -> dict[str, Any]:
        """Return the loss without its graph, and what else there is."""
        return {"loss": self.loss, **self.extra}


@dataclass
class ManualResult(OutputResult):
    """What ``training_step`` returned under manual optimization."""

    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_training_step_output(cls, training_step_output: STEP_OUTPUT) -> ManualResult:
        """Read what a step returned; a loss is detached.

        Raises:
            MisconfigurationException: if it is no tensor, dict or None.
        """
        extra: dict[str, Any] = {}
        if isinstance(training_step_output, Mapping):
            extra = dict(training_step_output)
        elif isinstance(training_step_output, Tensor):
            extra = {"loss": training_step_output}
        elif training_step_output is not None:
            raise MisconfigurationException(
                f"training_step returned a {type(training_step_output).__name__}: return a tensor, a dict, or None."
            )
        if "loss" in extra:
            extra["loss"] = extra["loss"].detach()
        return cls(extra)

    def asdict(self) -> dict[str, Any]:
        """Return what there is."""
        return self.extra


class AbstractClosure(ABC, Generic[T]):
    """A function for ``optimizer.step`` that keeps its last result."""

    def __init__(self) -> None:
        super().__init__()
        self._result: T | None = None

    def consume_result(self) -> T:
        """Return the result, once.

        Raises:
            MisconfigurationException: if it was not called since.
        """
        if self._result is None:
            raise MisconfigurationException(
                "The closure has no result: it was not called. Call optimizer_closure() in optimizer_step(), or pass it"
                " to optimizer.step(closure=optimizer_closure)."
            )
        result, self._result = self._result, None
        return result

    @abstractmethod
    def closure(self, *args: Any, **kwargs: Any) -> T:
        """What is done when it is called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._result = self.closure(*args, **kwargs)
        return self


class Closure(AbstractClosure[ClosureResult]):
    """Step, zero the gradients, backward.

    Args:
        step_fn: Returns the result of a step.
        backward_fn: Takes the loss; None leaves backward out.
        zero_grad_fn: None leaves it out.
    """

    warning_cache: ClassVar[WarningCache] = WarningCache()

    def __init__(
        self,
        step_fn: Callable[[], ClosureResult],
        backward_fn: Callable[[Tensor], None] | None = None,
        zero_grad_fn: Callable[[], None] | None = None,
    ) -> None:
        super().__init__()
        self._step_fn, self._backward_fn, self._zero_grad_fn = step_fn, backward_fn, zero_grad_fn

    @torch.enable_grad()
    def closure(self, *args: Any, **kwargs: Any) -> ClosureResult:
        """Do them, in this order; without a loss there is no backward."""
        result = self._step_fn()
        if result.closure_loss is None:
            self.warning_cache.warn("training_step returned None: the batch is skipped.")
        if self._zero_grad_fn is not None:
            self._zero_grad_fn()
        if self._backward_fn is not None and result.closure_loss is not None:
            self._backward_fn(result.closure_loss)
        return result

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor | None:
        self._result = self.closure(*args, **kwargs)
        return self._result.loss
