# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint of Fabric holds: the states of modules, optimizers and other objects, taken and put back in place."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from leyden.tree import leaves, parameters_of
from leyden.types import Stateful
from leyden.wrappers import unwrapped


class Contents:
    """Takes the states of objects as a strategy keeps them, and puts them back.

    Args:
        strategy: Whose processes save and load together.
    """

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy
        self.modules: list[weakref.ref[nn.Module]] = []
        """Those that are set up: an optimizer belongs to one of them."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "modules": []}

    def take(self, obj: Any) -> Any:
        """Return the state of an object, or of all objects in a dict; what has none, as it is."""
        obj, strategy = unwrapped(obj), self.strategy
        if isinstance(obj, nn.Module):
            strategy.turn_to(obj)
            return strategy.module_state_dict()
        if isinstance(obj, Optimizer):
            self._connect_owner(obj)
            return strategy.optimizer_state(obj)
        if isinstance(obj, Stateful) and not isinstance(obj, type):
            return obj.state_dict()
        return {key: self.take(value) for key, value in obj.items()} if type(obj) is dict else obj

    def _connect_owner(self, optimizer: Optimizer) -> None:
        """Tell the strategy which module an optimizer trains."""
        first = next(map(id, parameters_of(optimizer)), None)
        for module in filter(None, (ref() for ref in self.modules)):
            if any(id(parameter) == first for parameter in module.parameters()):
                self.strategy.turn_to(module)
                return

    def put(self, found: dict[str, Any], state: dict[str, Any], strict: bool, source: str) -> None:
        """Move what ``found`` has for each key of ``state`` into the object that is there, or in its place.

        Raises:
            KeyError: for a key that is missing, if ``strict``.
            CheckpointError: for a state that does not fit; ``source`` is what it comes from, for the message.
        """
        missing = [key for key in state if key not in found]
        if strict and missing:
            raise KeyError(
                f"{source} has no {missing[0]!r}; it has {sorted(map(str, found))}. With strict=False what is missing stays"
                " as it is."
            )
        for key in [key for key in state if key in found]:
            obj, value = unwrapped(state[key]), found.pop(key)
            if type(obj) is dict and isinstance(value, Mapping) and _holds_state(obj):
                self.put(dict(value), obj, strict, f"{source}[{key!r}]")
            elif not self.put_into(obj, value, strict, f"{source}[{key!r}]"):
                state[key] = value

    def put_into(self, obj: Any, value: Any, strict: bool, source: str) -> bool:
        """Load a state into an object; return whether the object has a state."""
        strategy = self.strategy
        if isinstance(obj, nn.Module):
            strategy.turn_to(obj)
            strategy.load_module_state_dict(value, strict, source)
        elif isinstance(obj, Optimizer):
            self._connect_owner(obj)
            strategy.load_optimizer_state(obj, value)
        elif isinstance(obj, Stateful) and not isinstance(obj, type):
            obj.load_state_dict(value)
        else:
            return False
        return True


def _holds_state(tree: Mapping[str, Any]) -> bool:
    return any(hasattr(unwrapped(leaf), "load_state_dict") for leaf in leaves(tree))
