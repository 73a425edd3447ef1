# SPDX-License-Identifier: Apache-2.0
"""Finds a plan of tensor parallelism for a module: which layers are split, and where activations may stay split.

Names and shapes only say what may belong together. Each such place is tried out before it is relied upon (``trial``); where
a trial fails, or is not possible, the weights are split all the same and the activations gathered: that is always right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from leyden.strategies.tensor.layers import can_be_split
from leyden.strategies.tensor.plan import tied

_PAIRS = (
    # attention
    ("q_proj k_proj v_proj", "o_proj out_proj dense proj c_proj"),
    ("wq wk wv", "wo"),
    ("w_q w_k w_v", "w_o"),
    ("q_lin k_lin v_lin", "out_lin"),
    ("to_q to_k to_v", "to_out to_out.0"),
    ("query key value", "dense out proj out_proj output"),
    ("queries keys values", "out fc_out out_proj proj"),
    ("self.query self.key self.value", "output.dense"),
    ("attention.query attention.key attention.value", "output.dense"),
    ("q k v", "o out proj"),
    # attention with one layer for all three
    ("c_attn", "c_proj"),
    ("qkv", "proj out out_proj to_out"),
    ("to_qkv", "to_out to_out.0"),
    ("qkv_proj", "o_proj out_proj"),
    ("Wqkv", "out_proj Wo"),
    ("query_key_value", "dense"),
    ("in_proj", "out_proj"),
    # layers between attentions
    ("gate_proj up_proj", "down_proj"),
    ("gate_up_proj", "down_proj"),
    ("up_proj", "down_proj"),
    ("w1 w3", "w2"),
    ("w1", "w2"),
    ("c_fc", "c_proj"),
    ("fc1", "fc2"),
    ("fc_in", "fc_out"),
    ("lin1", "lin2"),
    ("linear1", "linear2"),
    ("linear_1", "linear_2"),
    ("wi_0 wi_1", "wo"),
    ("wi", "wo"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("intermediate.dense", "output.dense"),
)
"""Names of layers that belong together: those that are split by columns, and the one behind them that is split by rows."""
_WORTH = 2**20
"""A layer of its own with as many weights is split, whatever it is."""


@dataclass
class Place:
    """Layers that may be split together.

    Attributes:
        block: The module that they are in; its forward runs them.
        columns: The names of the layers that are split by columns.
        row: The name of the one that is split by rows.
        through: For layers one behind the other, the names of all of them from the first to the last; else empty.
    """

    block: str
    columns: list[str]
    row: str
    through: list[str] = field(default_factory=list)


@dataclass
class Found:
    """What may be split: places, single layers with the way to split them, and why others are left whole."""

    places: list[Place] = field(default_factory=list)
    single: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def find(root: nn.Module, size: int) -> Found:
    """Return what of ``root`` may be split among ``size`` devices."""
    found, used = Found(), set[str]()
    together = tied(root)
    # of layers with one weight only embeddings and heads are split
    used.update(name for names in together for name in names)
    blocks = sorted(root.named_modules(), key=lambda item: -item[0].count(".") - bool(item[0]))
    for name, block in blocks:
        for place in _places(name, block):
            names = [*place.columns, place.row]
            if used.isdisjoint(names):
                uneven = _uneven(root, place, size)
                if uneven is None:
                    found.places.append(place)
                    used.update(names)
                else:
                    found.reasons[place.block or place.row] = uneven
    order = {name: number for number, (name, _) in enumerate(root.named_modules())}
    found.places.sort(key=lambda place: order[place.columns[0]])
    _vocabulary(root, size, together, used, found)
    for name, module in root.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            if name not in used and module.embed_dim % size == 0:
                found.single[name] = "gather"  # it computes with its weights itself
            used.update(child for child in order if child.startswith(f"{name}."))
    for name, module in root.named_modules():
        if name in used or not isinstance(module, nn.Linear) or not can_be_split(module):
            continue
        if module.weight.numel() >= _WORTH and module.out_features % size == 0:
            found.single[name] = "colwise_gather"
    return found


def _places(prefix: str, block: nn.Module) -> Iterator[Place]:
    """Yield the places in one block, those that are sure of their names first."""

    def full(name: str) -> str:
        return f"{prefix}.{name}" if prefix else name

    if isinstance(block, nn.Sequential):
        yield from _in_sequence(prefix, block)
        return
    layer = _layers(block)
    for columns, rows in _PAIRS:
        names = columns.split()
        if all(name in layer for name in names):
            row = next((name for name in rows.split() if name in layer), None)
            if row is not None and _in_a_row([layer[name] for name in names], layer[row]):
                yield Place(prefix, [full(name) for name in names], full(row))
    yield from _by_shape(full, prefix, block)


def _layers(block: nn.Module) -> dict[str, nn.Linear]:
    """The Linear layers of a block and of its children, by their names in it."""
    return {
        name: module
        for name, module in block.named_modules()
        if name.count(".") <= 1 and isinstance(module, nn.Linear) and can_be_split(module)
    }


def _in_a_row(columns: list[nn.Linear], row: nn.Linear) -> bool:
    """Whether shapes allow that the row takes what the columns give: theirs, or of one layer a part of it."""
    width = columns[0].in_features
    return all(one.in_features == width for one in columns) and columns[0].out_features % row.in_features == 0


def _by_shape(full: Callable[[str], str], prefix: str, block: nn.Module) -> Iterator[Place]:
    """The pairs among the layers of a block that no table names: one widens what the next narrows."""
    direct = [
        (name, child) for name, child in block.named_children() if isinstance(child, nn.Linear) and can_be_split(child)
    ]
    for (first, wide), (second, narrow) in zip(direct, direct[1:], strict=False):
        if wide.out_features == narrow.in_features:
            yield Place(prefix, [full(first)], full(second))


def _in_sequence(prefix: str, block: nn.Sequential) -> Iterator[Place]:
    """Linear, anything without weights that are split, Linear."""
    children = list(block.named_children())
    start: int | None = None
    for number, (_, child) in enumerate(children):
        if not isinstance(child, nn.Linear) or not can_be_split(child):
            if any(isinstance(inner, (nn.Linear, nn.Embedding)) for inner in child.modules()):
                start = None
            continue
        if start is not None:
            first = children[start][1]
            assert isinstance(first, nn.Linear)
            if first.out_features == child.in_features:
                through = [f"{prefix}.{step}" if prefix else step for step, _ in children[start : number + 1]]
                yield Place(prefix, [through[0]], through[-1], through)
                start = None
                continue
        start = number


def _uneven(root: nn.Module, place: Place, size: int) -> str | None:
    for name in place.columns:
        layer: Any = root.get_submodule(name)
        if layer.out_features % size:
            return f"left whole: the {layer.out_features} outputs of {_last(name)} are not divisible by {size}"
    layer = root.get_submodule(place.row)
    if layer.in_features % size:
        return f"left whole: the {layer.in_features} inputs of {_last(place.row)} are not divisible by {size}"
    return None


def _vocabulary(root: nn.Module, size: int, together: list[list[str]], used: set[str], found: Found) -> None:
    """The embedding with the most rows, and the head with as many outputs, which may have the same weight."""
    names = {name: module for name, module in root.named_modules() if isinstance(module, nn.Embedding)}
    fit = {name: module for name, module in names.items() if can_be_split(module)}
    if not fit:
        return
    rows = max(module.num_embeddings for module in fit.values())
    for name, module in fit.items():
        partners = next((group for group in together if name in group), [name])
        if module.num_embeddings < rows and module.weight.numel() < _WORTH:
            continue
        others = [root.get_submodule(other) for other in partners]
        if len(partners) > 1 and not all(can_be_split(other) for other in others):
            found.reasons[name] = (
                f"left whole: its weight is that of {', '.join(p for p in partners if p != name)} as well"
            )
        elif module.num_embeddings % size == 0:
            for partner, other in zip(partners, others, strict=True):
                found.single[partner] = "rowwise" if isinstance(other, nn.Embedding) else "colwise_gather"
        elif module.embedding_dim % size == 0 and len(partners) == 1:
            found.single[name] = "colwise"
        else:
            found.reasons[name] = f"left whole: its {module.num_embeddings} rows are not divisible by {size}"
    for name, module in root.named_modules():
        if name in used or name in found.single or not isinstance(module, nn.Linear):
            continue
        if module.out_features == rows and rows % size == 0 and can_be_split(module):
            found.single[name] = "colwise_gather"
            used.add(name)


def _last(name: str) -> str:
    return name.rpartition(".")[2]
