# SPDX-License-Identifier: Apache-2.0
"""What a plan of tensor parallelism says: names of layers, with ``*``, and how each is split."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle

from leyden.errors import MisconfigurationException, did_you_mean
from leyden.strategies.tensor.layers import ALIASES, WORDS, can_be_split, require_divisible

HEADS = ("num_heads", "n_heads", "n_head", "nhead", "num_attention_heads", "heads")
"""What attention layers call the number of their heads."""
_OF_HEADS = re.compile(r"q|key|value|attn|in_proj|^w?_?[kv](_|$)", re.IGNORECASE)
"""What attention layers call the layers whose outputs are shared out among heads."""


def checked(plan: Any) -> dict[str, Any]:
    """Return a user's plan with one name for each way to split.

    Raises:
        MisconfigurationException: for something that is no plan, or a way that is not known.
    """
    if not isinstance(plan, Mapping):
        raise MisconfigurationException(
            f"TensorParallelStrategy(plan={plan!r}) is not valid: it must be a dict of names of layers and how to split"
            " them, such as {'*.fc1': 'colwise', '*.fc2': 'rowwise'}, or None to find a plan."
        )
    found: dict[str, Any] = {}
    for pattern, style in plan.items():
        if isinstance(style, str):
            word = ALIASES.get(style.lower(), style.lower())
            if word not in WORDS:
                known = [*WORDS, *ALIASES]
                raise MisconfigurationException(
                    f"TensorParallelStrategy(plan={{{pattern!r}: {style!r}}}) is not known: it must be one of"
                    f" {list(WORDS)}, or a ParallelStyle of torch.distributed.tensor.parallel.{did_you_mean(word, known)}"
                )
            found[str(pattern)] = word
        elif isinstance(style, ParallelStyle):
            found[str(pattern)] = style
        else:
            made = " Make an object of the class." if isinstance(style, type) else ""
            raise MisconfigurationException(
                f"TensorParallelStrategy(plan={{{pattern!r}: {style!r}}}) is not valid: it must be one of {list(WORDS)}, or"
                f" a ParallelStyle of torch.distributed.tensor.parallel.{made}"
            )
    return found


def resolved(plan: Mapping[str, Any], root: nn.Module, size: int) -> dict[str, Any]:
    """Return, for each layer of ``root`` that a plan names, how it is split; the later entry of a plan wins.

    Args:
        plan: Of names with ``*`` (any number of characters, dots too), as ``checked`` returned it.
        root: The module.
        size: Among how many devices.

    Raises:
        MisconfigurationException: for a name that no layer has, or a layer that cannot be split so.
    """
    layers = {name: module for name, module in root.named_modules() if name}
    found: dict[str, Any] = {}
    for pattern, style in plan.items():
        names = [name for name in layers if fnmatchcase(name, pattern)]
        if not names:
            raise MisconfigurationException(_nothing_named(pattern, layers))
        fit = [name for name in names if _fits(layers[name], style)]
        if not fit:
            kinds = sorted({type(layers[name]).__name__ for name in names})
            raise MisconfigurationException(
                f"The plan splits {pattern!r} {style}, but {', '.join(kinds)} cannot be split so: only Linear and Embedding"
                " layers can, as torch has them. Give a ParallelStyle of torch.distributed.tensor.parallel, or leave it out."
            )
        for name in fit:
            if isinstance(style, str) and style not in ("replicate", "sequence", "gather"):
                require_divisible(name, layers[name], style, size)
                _require_heads(name, root, layers[name], style, size)
            found.pop(name, None)
            found[name] = style
    found = {name: style for name, style in found.items() if style != "replicate"}
    _require_tied_alike(root, found)
    return found


def _fits(module: nn.Module, style: Any) -> bool:
    if not isinstance(style, str) or style == "replicate":
        return True
    if style == "gather":
        return isinstance(module, nn.MultiheadAttention) or not any(True for _ in module.children())
    if style == "sequence":
        return not any(True for _ in module.children())
    return can_be_split(module)


def _nothing_named(pattern: str, layers: Mapping[str, nn.Module]) -> str:
    inside = f"*.{pattern}"
    close = f" Did you mean {inside!r}?" if any(fnmatchcase(name, inside) for name in layers) else ""
    general = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in layers}
    close = close or did_you_mean(pattern, [*layers, *general, *(f"*.{name.rpartition('.')[2]}" for name in layers)])
    some = list(grouped(name for name, module in layers.items() if can_be_split(module)))
    shown = ", ".join(some[:8]) + (f" and {len(some) - 8} more" if len(some) > 8 else "")
    return (
        f"The plan names {pattern!r}, but no layer has that name.{close} Layers that can be split: {shown or 'none'}."
    )


def _require_heads(name: str, root: nn.Module, module: nn.Module, style: str, size: int) -> None:
    """Whole heads only: a layer whose outputs stay split is that of an attention with a number of heads."""
    if style != "colwise" or not isinstance(module, nn.Linear):
        return
    owner, _, last = name.rpartition(".")
    parent = root.get_submodule(owner)
    heads = heads_of(parent)
    if heads is not None and heads % size and _OF_HEADS.search(last):
        raise MisconfigurationException(
            f"The plan splits {name!r} colwise, but the {heads} heads of {type(parent).__name__} cannot be shared out evenly"
            f" among tensor_parallel_size={size} devices. Say 'colwise_gather' for it (and 'rowwise_split' for the layer"
            f" behind), or take a size that divides {heads}."
        )


def heads_of(module: nn.Module) -> int | None:
    """The number of heads that an attention layer says it has; None if it says nothing."""
    return next((heads for key in HEADS if isinstance(heads := getattr(module, key, None), int) and heads > 0), None)


def tied(root: nn.Module) -> list[list[str]]:
    """The names of layers that have one weight in common."""
    owners: dict[int, list[str]] = {}
    for name, module in root.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    return [names for names in owners.values() if len(names) > 1]


def _require_tied_alike(root: nn.Module, found: Mapping[str, Any]) -> None:
    for names in tied(root):
        ways = {name: _dimension(root.get_submodule(name), found[name]) for name in names if name in found}
        if ways and (len(ways) < len(names) or len(set(ways.values())) > 1):
            said = {name: str(found.get(name, "replicate")) for name in names}
            raise MisconfigurationException(
                f"The layers {names} have one weight, so they must be split along the same dimension; the plan says {said}."
                " An embedding split 'rowwise' goes with a head split 'colwise_gather'."
            )


def _dimension(module: nn.Module, style: Any) -> Any:
    if not isinstance(style, str):
        return style
    if style == "gather":
        return 0
    rows = style.startswith("rowwise")
    return int(not rows) if isinstance(module, nn.Embedding) else int(rows)


def grouped(names: Iterable[str]) -> dict[str, int]:
    """Return names with their numbers as ``*``, and how many there are of each."""
    found: dict[str, int] = {}
    for name in names:
        general = re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name)
        found[general] = found.get(general, 0) + 1
    return found


def described(plan: Mapping[str, Any], reasons: Mapping[str, str], size: int) -> str:
    """Return, for people, what is split and how, and what is not and why."""
    if not plan:
        return "Tensor parallel: nothing is split."
    kinds: dict[str, list[str]] = {}
    for name, style in plan.items():
        kinds.setdefault(style if isinstance(style, str) else type(style).__name__, []).append(name)
    lines = [f"Tensor parallel on {size} device{'s' * (size > 1)}:"]
    for word, names in kinds.items():
        shown = [name if count == 1 else f"{name} ({count})" for name, count in grouped(names).items()]
        meaning = f" ({WORDS[word]})" if word in WORDS else ""
        lines.append(f"  {word}{meaning}: {', '.join(shown)}")
    whys: dict[str, list[str]] = {}
    for name, why in reasons.items():
        whys.setdefault(why, []).append(name)
    lines += [f"  {', '.join(grouped(names))}: {why}" for why, names in whys.items()]
    return "\n".join(lines)
