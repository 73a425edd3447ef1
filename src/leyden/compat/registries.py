# SPDX-License-Identifier: Apache-2.0
"""Lightning's registries: the names that ``Trainer(strategy=...)`` and ``Trainer(accelerator=...)`` take, and more of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

from leyden.errors import MisconfigurationException
from leyden.loops.hardware import STRATEGIES
from leyden.loops.resolve import load
from leyden.runtime.devices import ACCELERATORS, Accelerator


class Registry:
    """Names and what they stand for, kept in a table of Leyden's.

    Args:
        entries: The table: a class, where a class is, or either with the arguments that it is made with.
        what: What is registered, for messages.
    """

    def __init__(self, entries: MutableMapping[str, Any], what: str) -> None:
        self._entries, self._what = entries, what
        self._descriptions: dict[str, str] = {}

    def register(
        self,
        name: str,
        target: Callable[..., Any] | None = None,
        description: str = "",
        override: bool = False,
        **init_params: Any,
    ) -> Callable[..., Any]:
        """Let ``name`` stand for a class, made with ``init_params``; without ``target``, return a decorator of a class.

        Raises:
            TypeError: if ``name`` is no string.
            MisconfigurationException: for a name that is there, without ``override``.
        """
        if not isinstance(name, str):
            raise TypeError(f"register({name!r}): the name must be a string.")
        name = name.lower()
        if name in self._entries and not override:
            raise MisconfigurationException(f"{name!r} is registered as a {self._what} already. Use override=True.")

        def keep(target: Callable[..., Any]) -> Callable[..., Any]:
            self._entries[name] = (target, init_params) if init_params else target
            self._descriptions[name] = description
            return target

        return keep if target is None else keep(target)

    def _find(self, name: str) -> tuple[Any, dict[str, Any]]:
        if name not in self._entries:
            raise KeyError(
                f"{name!r} is not registered as a {self._what}. There are: {', '.join(sorted(self._entries))}."
            )
        entry = self._entries[name]
        target, arguments = entry if isinstance(entry, tuple) else (entry, {})
        return load(target) if isinstance(target, str) else target, dict(arguments)

    def get(self, name: str, default: Any = None) -> Any:
        """Return what ``name`` stands for, made; ``default``, if that is given, for a name that is not there.

        Raises:
            KeyError: for a name that is not there, without a default.
        """
        if name not in self._entries and default is not None:
            return default
        target, arguments = self._find(name)
        return target(**arguments)

    def __getitem__(self, name: str) -> dict[str, Any]:
        target, arguments = self._find(name)
        key = self._what
        return {key: target, "description": self._descriptions.get(name, ""), "init_params": arguments}

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def keys(self) -> list[str]:
        """All names."""
        return list(self._entries)

    def remove(self, name: str) -> None:
        """Forget a name.

        Raises:
            KeyError: for one that is not there.
        """
        del self._entries[name]

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._entries)

    def available_strategies(self) -> list[str]:
        """All names, sorted."""
        return self.names()

    def available_accelerators(self) -> set[str]:
        """All names."""
        return set(self._entries)

    def __str__(self) -> str:
        return f"Registered: {', '.join(self.names())}"


STRATEGY_REGISTRY = StrategyRegistry = Registry(STRATEGIES, "strategy")
"""The names of strategies."""
ACCELERATOR_REGISTRY = AcceleratorRegistry = Registry(ACCELERATORS, "accelerator")
"""The names of kinds of devices."""


def call_register_accelerators(registry: Any, base_module: str) -> None:
    """Let every accelerator of a module register itself.

    Args:
        registry: Where.
        base_module: The module.
    """
    for thing in vars(importlib.import_module(base_module)).values():
        if isinstance(thing, type) and issubclass(thing, Accelerator) and thing is not Accelerator:
            register = vars(thing).get("register_accelerators")
            if register is not None:
                thing.register_accelerators(registry)
