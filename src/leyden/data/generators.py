# SPDX-License-Identifier: Apache-2.0
"""The random generators that a loader may draw from: the global ones of the CPU, and those that its parts hold."""

from __future__ import annotations

import functools
import hashlib
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from leyden.runtime.seed import as_numpy, plain_numpy, put_numpy, put_python

DEPTH = 6
"""How many attributes deep a generator is looked for: data set, subset, its data set, transforms, one of them, its own."""
WIDTH = 64
"""Lists and dicts with more entries are data; nothing is looked for in them."""
BUDGET = 2000
"""How many objects are looked at in all."""

_LEAVES = (str, bytes, int, float, complex, type(None), type, Tensor, ModuleType, FunctionType)
_FOREIGN = ("pandas", "pyarrow", "polars", "PIL", "h5py", "numpy", "torch.nn.parameter")


class Streams:
    """Reads and sets, all at once, the global generators and those in ``held`` (name to generator).

    A state is a dict with one entry for each generator. Taking one costs some microseconds.
    """

    def __init__(self, held: Mapping[str, Any] | None = None) -> None:
        self.held = dict(held or {})

    def now(self) -> dict[str, Any]:
        """Return the states, as the generators give them."""
        state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
        numpy = sys.modules.get("numpy")  # one that nobody has imported has no state yet
        if numpy is not None:
            state["numpy"] = numpy.random.get_state(legacy=False)
        for name, generator in self.held.items():
            state[name] = _read(generator)
        return state

    def put(self, state: Mapping[str, Any]) -> None:
        """Set the generators to a state, as it was read or as ``plain`` made it; what it lacks is left as it is."""
        for name, value in state.items():
            if name == "python":
                put_python(random, value)
            elif name == "torch":
                torch.set_rng_state(value.cpu())
            elif name == "numpy":
                put_numpy(None, value)
            elif name in self.held:
                _write(self.held[name], value)

    def of_held(self) -> dict[str, Any]:
        """Return the states of the held generators only."""
        return {name: _read(generator) for name, generator in self.held.items()}


def plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state as plain data and tensors, which load with ``weights_only=True``."""

    def convert(value: Any) -> Any:
        if isinstance(value, tuple) and len(value) == 3:  # python's
            return [value[0], list(value[1]), value[2]]
        return plain_numpy(value) if isinstance(value, Mapping) else value

    return {name: convert(value) for name, value in state.items()}


def raw(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state that ``plain`` made, or part of one, as the generators give it."""

    def convert(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return (value[0], tuple(value[1]), value[2])
        return value.cpu() if isinstance(value, Tensor) else as_numpy(value)

    return {name: convert(value) for name, value in state.items()}


def differs(first: Any, second: Any) -> bool:
    """Whether two states of one generator differ."""
    if isinstance(first, Tensor):
        return not torch.equal(first, second)
    if isinstance(first, Mapping):
        return any(differs(first[key], second[key]) for key in first)
    unequal = first != second
    return bool(unequal if isinstance(unequal, bool) else unequal.any())


def is_generator(value: Any) -> bool:
    """Whether ``value`` is a random generator of torch, numpy or python."""
    if isinstance(value, torch.Generator):
        return True
    if isinstance(value, random.Random):
        return not isinstance(value, random.SystemRandom)
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(
        value, (numpy.random.Generator, numpy.random.RandomState, numpy.random.BitGenerator)
    )


def find(roots: Mapping[str, Any], apart: Any = None) -> dict[str, Any]:
    """Return the generators that ``roots`` hold as attributes, directly or some levels down, each once, by its path.

    ``apart`` is an object that is not looked into.
    """
    found: dict[str, Any] = {}
    seen: set[int] = {id(apart)}
    level = list(roots.items())
    for _ in range(DEPTH + 1):
        deeper: list[tuple[str, Any]] = []
        for path, value in level:
            if id(value) in seen or len(seen) > BUDGET:
                continue
            seen.add(id(value))
            if is_generator(value):
                if not _global(value):
                    found[path] = value
            else:
                deeper.extend((f"{path}.{name}", child) for name, child in _children(value))
        level = deeper
    return found


def _global(generator: Any) -> bool:
    """Whether it is one of those that are read anyway."""
    return generator is torch.default_generator


def _children(value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, _LEAVES) or type(value).__module__.startswith(_FOREIGN):
        return ()
    if isinstance(value, functools.partial):
        return _entries([value.func, *value.args, *value.keywords.values()])
    if isinstance(value, dict):
        return _entries(value)
    if isinstance(value, (list, tuple)):
        return _entries(value)
    bound = getattr(value, "__self__", None) if callable(value) else None
    own = getattr(value, "__dict__", None)
    children: Iterator[tuple[str, Any]] = iter(own.items()) if isinstance(own, dict) else iter(())
    return chain(children, [("self", bound)]) if bound is not None else children


def _entries(values: Any) -> Iterable[tuple[str, Any]]:
    # by the functions of Python's own class: those of a subclass might load what they return
    base: Any = next(base for base in (dict, list, tuple) if isinstance(values, base))
    if base.__len__(values) > WIDTH:
        return ()
    pairs = dict.items(values) if base is dict else enumerate(base.__iter__(values))
    return [(str(key), child) for key, child in pairs]


def _read(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if hasattr(generator, "get_state"):
        return generator.get_state(legacy=False)
    return getattr(generator, "bit_generator", generator).state


def _write(generator: Any, value: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(value.cpu())
    elif isinstance(generator, random.Random):
        put_python(generator, value)
    else:
        put_numpy(generator, value)


def digest(*key: Any) -> int:
    """Return 63 bits that depend on all of ``key`` (numbers, words, bytes, tuples of them), and on nothing else."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def seed(number: int, held: Iterable[Any]) -> None:
    """Seed the global generators of this process, and those in ``held``, from one number of 63 bits."""
    torch.default_generator.manual_seed(number)  # not torch.manual_seed, which would reach for other devices
    random.seed(~number)  # numpy's is the same algorithm, which would give the same numbers for the same seed
    words = [number & 0xFFFFFFFF, number >> 32]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(words)
    for place, generator in enumerate(held):
        own = digest(number, place)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(own)
        elif isinstance(generator, random.Random):
            generator.seed(own)
        elif hasattr(generator, "seed"):
            generator.seed([own & 0xFFFFFFFF, own >> 32])
        else:
            bits = getattr(generator, "bit_generator", generator)
            bits.state = type(bits)(own).state
