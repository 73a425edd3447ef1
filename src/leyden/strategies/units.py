# SPDX-License-Identifier: Apache-2.0
"""Which layers of a module are sharded each by itself: the blocks that repeat, and what is large; or what the user says."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from leyden.errors import MisconfigurationException

BLOCK = 100_000
"""The fewest parameters of a repeated block that is worth an exchange of its own."""
LARGE = 10_000_000
"""From how many parameters on any other layer has an exchange of its own."""
Policy = Any
"""None, a set of classes, ``policy(module) -> bool``, or one of torch's: ``policy(module, recurse, nonwrapped_numel)``."""


def find(root: nn.Module, policy: Policy = None) -> list[nn.Module]:
    """Return the layers of ``root`` that are sharded each by itself, inner ones first; never ``root``.

    A layer that shares a parameter with another one is left to what contains both.

    Raises:
        MisconfigurationException: for a policy that is none of those that ``Policy`` lists.
    """
    if policy is None:
        chosen = _repeated(root)
        chosen |= _by_question(root, lambda _, left: left >= LARGE, chosen)
    elif isinstance(policy, (set, frozenset, list, tuple)):
        classes = classes_of(policy, "auto_wrap_policy")
        chosen = {id(layer) for layer in root.modules() if isinstance(_inner(layer), classes)}
    elif callable(policy):
        chosen = _by_policy(root, policy)
    else:
        raise MisconfigurationException(
            f"FSDPStrategy(auto_wrap_policy={policy!r}) is not valid: give a set of classes of layers, or a function that"
            " takes a layer and says whether it is sharded by itself."
        )
    shared, chosen = _shared(root), _as_they_are_read(root, chosen)
    chosen -= {id(_inner(layer)) for layer in root.modules() if _inner(layer) is not layer}
    return [
        layer
        for layer in inner_first(root)
        if id(layer) in chosen
        and layer is not root
        and _is_called(layer)
        and any(True for _ in layer.parameters())
        and not _shares(layer, shared)
    ]


def classes_of(given: Iterable[Any], argument: str) -> tuple[type[nn.Module], ...]:
    """Return classes of layers as a tuple.

    Raises:
        MisconfigurationException: for anything else among them.
    """
    classes = tuple(given)
    wrong = [each for each in classes if not (isinstance(each, type) and issubclass(each, nn.Module))]
    if wrong:
        raise MisconfigurationException(
            f"FSDPStrategy({argument}=...) holds {wrong[0]!r}, which is no class of layers. Give classes, such as"
            " {torch.nn.TransformerEncoderLayer}."
        )
    return classes


def matching(root: nn.Module, policy: Policy, argument: str) -> list[nn.Module]:
    """Return the layers of ``root`` that a set of classes names, or for which a function says yes; not ``root``."""
    if callable(policy) and not isinstance(policy, type):
        found = _by_policy(root, policy)
    else:
        classes = classes_of([policy] if isinstance(policy, type) else policy, argument)
        found = {id(layer) for layer in root.modules() if isinstance(_inner(layer), classes)}
    found -= {id(_inner(layer)) for layer in root.modules() if _inner(layer) is not layer}
    return [layer for layer in root.modules() if id(layer) in found and layer is not root]


def inner_first(root: nn.Module) -> Iterator[nn.Module]:
    """Yield ``root`` and all its layers, each once, the parts of a layer ahead of it."""
    seen: set[int] = set()

    def walk(layer: nn.Module) -> Iterator[nn.Module]:
        if id(layer) in seen:
            return
        seen.add(id(layer))
        for child in layer.children():
            yield from walk(child)
        yield layer

    return walk(root)


def plain(root: nn.Module, ignored: Iterable[nn.Parameter] = ()) -> set[nn.Parameter]:
    """Return the parameters that every process keeps whole: scalars, and those of another dtype than most have."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in root.parameters():
        if parameter.requires_grad and parameter.dim():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    usual = max(sizes, key=lambda dtype: sizes[dtype], default=None)
    return {
        parameter
        for parameter in root.parameters()
        if not parameter.dim() or (parameter.requires_grad and parameter.dtype is not usual)
    } | set(ignored)


def initialise(layer: nn.Module, device: torch.device, filled: bool) -> None:
    """Give the layer's own parameters and buffers on the meta device memory and values, as its constructor would.

    Args:
        layer: Its ``reset_parameters`` says what the values are; parts of it have theirs already.
        device: Where the memory is.
        filled: Whether a checkpoint follows, so that values are not needed.

    Raises:
        MisconfigurationException: for a layer that cannot say what its values are.
    """
    own = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    if not any(tensor.is_meta for tensor in own):
        return
    layer.to_empty(device=device, recurse=False)
    reset = getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)
    if callable(reset):
        with torch.no_grad():
            reset()
    elif not filled:
        raise MisconfigurationException(
            f"{type(layer).__name__} was built on the meta device and has no reset_parameters(), so nobody knows its first"
            " values. Write one that sets the layer's own parameters and buffers, or build it on a real device, or go on"
            " from a checkpoint."
        )


class Ties:
    """Remembers which layers share a parameter, where giving memory to each of them would part them."""

    def __init__(self, module: nn.Module) -> None:
        self.first: dict[int, nn.Parameter] = {}
        self.names = {
            id(layer): dict(layer.named_parameters(recurse=False))
            for layer in module.modules()
            if any(parameter.is_meta for parameter in layer.parameters(recurse=False))
        }

    def tie(self, layer: nn.Module) -> None:
        """Let ``layer`` have the parameters that an earlier layer shares with it."""
        for name, former in self.names.get(id(layer), {}).items():
            known = self.first.setdefault(id(former), getattr(layer, name))
            if known is not getattr(layer, name):
                setattr(layer, name, known)


_READERS = nn.MultiheadAttention, nn.TransformerEncoderLayer
"""Layers of torch that read the weights of layers inside of them, some only when they do not train, and do not call them."""


def _as_they_are_read(root: nn.Module, chosen: set[int]) -> set[int]:
    """Return ``chosen`` with whole layers for those parts of them that are not called."""
    for layer in root.modules():  # outer ones first
        if isinstance(layer, _READERS):
            inside = {id(part) for part in layer.modules()} - {id(layer)}
            if chosen & inside:
                chosen = (chosen - inside) | {id(layer)}
    return chosen


def _inner(layer: nn.Module) -> Any:
    """The layer itself where torch.compile has wrapped it."""
    return getattr(layer, "_orig_mod", layer)


def _is_called(layer: nn.Module) -> bool:
    """Whether it is no mere list of layers, which nobody calls."""
    return type(_inner(layer)).forward is not nn.Module.forward


def _count(layer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer.parameters())


def _repeated(root: nn.Module) -> set[int]:
    chosen: set[int] = set()

    def walk(layer: nn.Module) -> None:
        children = list(layer.children())
        kinds: dict[type, list[nn.Module]] = {}
        if isinstance(layer, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
            for child in children:
                if _count(child) >= BLOCK and _is_called(child):
                    kinds.setdefault(type(_inner(child)), []).append(child)
        blocks = {id(child) for alike in kinds.values() if len(alike) > 1 for child in alike}
        chosen.update(blocks)
        for child in children:
            if id(child) not in blocks:
                walk(child)

    walk(root)
    return chosen


def _by_policy(root: nn.Module, policy: Callable[..., Any]) -> set[int]:
    names = list(inspect.signature(policy).parameters)
    if "recurse" not in names:
        return {id(layer) for layer in root.modules() if policy(layer)}
    return _by_question(
        root,
        lambda layer, left: bool(policy(module=layer, recurse=False, nonwrapped_numel=left)),
        set(),
        lambda layer, left: bool(policy(module=layer, recurse=True, nonwrapped_numel=left)),
    )


def _by_question(
    root: nn.Module,
    wanted: Callable[[nn.Module, int], bool],
    taken: set[int],
    enters: Callable[[nn.Module, int], bool] = lambda _layer, _left: True,
) -> set[int]:
    """Ask from the inside out, with the number of parameters that no layer inside has taken."""
    chosen: set[int] = set()

    def walk(layer: nn.Module) -> int:
        count = _count(layer)
        if id(layer) in taken:
            return count
        inside = sum(walk(child) for child in layer.children()) if enters(layer, count) else 0
        if layer is not root and _is_called(layer) and wanted(layer, count - inside):
            chosen.add(id(layer))
            return count
        return inside

    walk(root)
    return chosen


def _shared(root: nn.Module) -> dict[int, set[int]]:
    """For each parameter that several layers have, those layers."""
    owners: dict[int, set[int]] = {}
    for layer in root.modules():
        for parameter in layer.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(layer))
    return {key: layers for key, layers in owners.items() if len(layers) > 1}


def _shares(layer: nn.Module, shared: dict[int, set[int]]) -> bool:
    inside = {id(part) for part in layer.modules()}
    return any(not shared[id(p)] <= inside for p in layer.parameters() if id(p) in shared)
