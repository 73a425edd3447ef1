# SPDX-License-Identifier: Apache-2.0
"""Keeps the order in which DistributedDataParallel exchanges gradients, so that a run that goes on adds them up in the same.

It guesses an order for the first update and takes the one in which gradients really came from then on. Where three ranks
or more add up a number, the place that it has among the others decides who adds to whom first, and so its last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Order:
    """The order in which the gradients of a wrapped module come.

    Args:
        wrapper: The DistributedDataParallel around the module.
        parameters: Those that are trained, in the order of the module.

    Attributes:
        found: Places of parameters in their order, as their gradients come; empty before that is known.
    """

    def __init__(self, wrapper: nn.Module, parameters: list[Tensor]) -> None:
        self.wrapper, self.parameters = wrapper, parameters
        self.found: list[int] = []
        self._came: list[int] = []
        self._handles: list[Any] = []

    def listen(self) -> None:
        """Note the order in which the gradients come, until ``settle``."""
        for place, parameter in enumerate(self.parameters):
            tensor: Any = parameter
            self._handles.append(
                tensor.register_post_accumulate_grad_hook(lambda _, place=place: self._came.append(place))
            )

    def settle(self) -> None:
        """Take the order of the backward that has just been exchanged, which the next one would have done."""
        came, self._came = self._came[-len(self.parameters) :], []
        self.close()
        if sorted(came) == list(range(len(self.parameters))):
            self._take(came)

    def follow(self, order: list[int], backward: Callable[[list[Tensor]], None]) -> None:
        """Take the order of the run that goes on here; one of another module is left alone.

        Args:
            order: What ``found`` was there.
            backward: Runs a backward that brings gradients of 0, for the last of some parameters first, and is exchanged.
        """
        if sorted(order) != list(range(len(self.parameters))):
            return
        self.close()
        if any(getattr(each, "_post_accumulate_grad_hooks", None) for each in self.parameters):
            return  # the user's own, which may step an optimizer
        kept = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        backward([self.parameters[place] for place in reversed(order)])
        for parameter, grad in zip(self.parameters, kept, strict=True):
            parameter.grad = grad
        self._take(order)

    def _take(self, order: list[int]) -> None:
        self.found = order
        wrapper: Any = self.wrapper
        wrapper.reducer._rebuild_buckets()  # noqa: SLF001  # what the next call of the wrapper does first

    def close(self) -> None:
        """Note nothing any more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


__all__ = ["Order"]
