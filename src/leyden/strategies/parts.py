# SPDX-License-Identifier: Apache-2.0
"""Lets an optimizer step on the parts of DTensors that this process has, as on plain tensors: fast, and fused where it can be.

An optimizer that treats each number by itself does the same to a part as to the whole. torch would take DTensors one by
one, each operation with its own look at how they are spread, and refuses to fuse them with plain tensors beside them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from leyden.tree import parameters_of

BY_ELEMENT = frozenset(
    getattr(torch.optim, name)
    for name in (
        "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD",
    )
)  # fmt: skip
"""torch's optimizers that treat each number by itself."""


class Parts:
    """The plain side of one optimizer whose parameters are DTensors."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.plain: dict[DTensor, nn.Parameter] = {}
        self.state: dict[Any, dict[str, Any]] = defaultdict(dict)
        """The optimizer's state by plain parameters: the same memory as that which it has by DTensors."""
        self.taken: dict[Any, Any] = {}
        """What of the optimizer's state that was made of, to notice when another is loaded."""

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """For the length of the block the optimizer has plain parameters, with their gradients and its state of them."""
        optimizer, whole = self.optimizer, [list(group["params"]) for group in self.optimizer.param_groups]
        state = optimizer.state
        try:
            with torch.no_grad():
                for group, parameters in zip(optimizer.param_groups, whole, strict=True):
                    group["params"] = [self._take(parameter, state) for parameter in parameters]
            optimizer.state = self.state  # type: ignore[assignment]
            yield
        finally:
            optimizer.state = state
            for group, parameters in zip(optimizer.param_groups, whole, strict=True):
                group["params"] = parameters
            with torch.no_grad():
                for parameters in whole:
                    for parameter in parameters:
                        self._give_back(parameter, state)

    def _take(self, parameter: Any, state: Any) -> Any:
        if not isinstance(parameter, DTensor):
            if parameter in state:
                self.state[parameter] = state[parameter]
            return parameter
        part = parameter.to_local()
        plain = self.plain.get(parameter)
        if plain is None or plain.data_ptr() != part.data_ptr() or plain.shape != part.shape:
            if plain is not None:
                self.state.pop(plain, None)
            self.plain[parameter] = plain = nn.Parameter(part, parameter.requires_grad)
            self.taken.pop(parameter, None)
        gradient: Any = parameter.grad
        if gradient is not None and gradient.placements != parameter.placements:
            gradient = gradient.redistribute(placements=parameter.placements)
        plain.grad = None if gradient is None else gradient.to_local()
        if parameter in state and self.taken.get(parameter) is not state[parameter]:
            self.state[plain] = {
                name: value.to_local() if isinstance(value, DTensor) else value
                for name, value in state[parameter].items()
            }
            self.taken[parameter] = state[parameter]
        return plain

    def _give_back(self, parameter: Any, state: Any) -> None:
        if not isinstance(parameter, DTensor):
            if parameter in self.state:
                state[parameter] = self.state[parameter]
            return
        plain = self.plain.get(parameter)
        if plain is None:
            return
        plain.grad = None
        if plain not in self.state:
            return
        known = state[parameter]
        self.taken[parameter] = known
        for name, value in self.state[plain].items():
            if not isinstance(value, Tensor) or name == "step" or value.shape != plain.shape:
                known[name] = value
            elif name not in known or known[name].to_local().data_ptr() != value.data_ptr():
                known[name] = DTensor.from_local(
                    value, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape,
                    stride=parameter.stride(),
                )  # fmt: skip


def steps_by_parts(optimizer: Optimizer) -> bool:
    """Whether ``optimizer`` may step on parts: each number by itself, and nobody looks on while it does."""
    return (
        type(optimizer) in BY_ELEMENT
        and not optimizer._optimizer_step_pre_hooks  # noqa: SLF001  # torch has no public way to ask
        and not optimizer._optimizer_step_post_hooks  # noqa: SLF001
        and any(isinstance(p, DTensor) for p in parameters_of(optimizer))
    )
