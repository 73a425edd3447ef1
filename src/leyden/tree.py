# SPDX-License-Identifier: Apache-2.0
"""Walk nested things: batches (dicts, lists, (named) tuples and dataclasses of tensors), and the groups of an optimizer."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def tree_map(function: Callable[[Any], Any], tree: Any, leaf: type | tuple[type, ...] = Tensor) -> Any:
    """Return ``tree`` with ``function`` applied to every node that is an instance of ``leaf``.

    Mappings, lists, tuples, named tuples and dataclass instances are rebuilt with their own type; all other nodes
    are passed through unchanged. The input is never modified.
    """
    if isinstance(tree, leaf):
        return function(tree)
    if isinstance(tree, Mapping):
        items = [(key, tree_map(function, value, leaf)) for key, value in tree.items()]
        if isinstance(tree, defaultdict):
            return type(tree)(tree.default_factory, items)
        if type(tree) in (dict, OrderedDict):
            return type(tree)(items)  # type: ignore[call-arg]
        return _rebuild_mapping(tree, items)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(tree_map(function, value, leaf) for value in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)([tree_map(function, value, leaf) for value in tree])
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        result = copy.copy(tree)
        for field in dataclasses.fields(tree):
            if hasattr(tree, field.name):
                # object.__setattr__ so that frozen dataclasses can be rebuilt too
                object.__setattr__(result, field.name, tree_map(function, getattr(tree, field.name), leaf))
        return result
    return tree


def _rebuild_mapping(tree: Mapping[Any, Any], items: list[tuple[Any, Any]]) -> Any:
    """Rebuild a mapping of a class that may not take a list of pairs (a custom dict, transformers' BatchEncoding)."""
    if hasattr(tree, "update") and hasattr(tree, "__setitem__"):
        result: Any = copy.copy(tree)
        for key, value in items:
            result[key] = value
        return result
    make: Any = type(tree)
    return make(items)


def leaves(tree: Any) -> Iterator[Any]:
    """Yield the nodes of ``tree`` that are not containers, in order."""
    if isinstance(tree, Mapping):
        for value in tree.values():
            yield from leaves(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from leaves(value)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for field in dataclasses.fields(tree):
            if hasattr(tree, field.name):
                yield from leaves(getattr(tree, field.name))
    else:
        yield tree


def move_to(tree: Any, device: torch.device) -> Any:
    """Return ``tree`` with every tensor, and every other object that has a ``to`` method, on ``device``.

    A copy from pinned host memory does not block the host. Objects whose ``to`` returns None (they move in place)
    are kept.
    """
    return tree_map(lambda node: moved(node, device), tree, MOVABLE)


def moved(node: Any, device: torch.device) -> Any:
    """Return one node that has a ``to`` method on ``device``, as ``move_to`` does."""
    if isinstance(node, Tensor):
        return node.to(device, non_blocking=device.type == "cuda")
    other = node.to(device)
    return node if other is None else other


class _HasTo(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, Tensor) or (
            callable(getattr(instance, "to", None)) and not isinstance(instance, type)
        )


class MOVABLE(metaclass=_HasTo):
    """Anything with a ``to`` method: tensors, packed sequences, graph batches, tokenizer outputs."""


def detach(tree: Any) -> Any:
    """Return ``tree`` with every tensor detached from its graph."""
    return tree_map(Tensor.detach, tree)


def batch_sizes(batch: Any) -> Iterator[int]:
    """Yield candidates for the number of samples in ``batch``: first dimensions of tensors, lengths of strings.

    Objects that know their own size are believed: an attribute ``num_graphs`` (graph batches) or ``batch_size``
    holding an int.
    """
    if isinstance(batch, Tensor):
        yield 1 if batch.ndim == 0 else batch.shape[0]
        return
    for name in ("num_graphs", "batch_size"):
        size = getattr(batch, name, None)
        if isinstance(size, int) and not isinstance(size, bool):
            yield size
            return
    if isinstance(batch, str):
        yield len(batch)
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from batch_sizes(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from batch_sizes(value)
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for field in dataclasses.fields(batch):
            yield from batch_sizes(getattr(batch, field.name, None))


def parameters_of(optimizer: Any) -> list[Any]:
    """Return the parameters of all groups of an optimizer, in their order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
