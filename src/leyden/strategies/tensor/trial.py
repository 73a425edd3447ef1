# SPDX-License-Identifier: Apache-2.0
"""Tries out whether activations may stay split between two layers: the code between them gives the same, or it may not.

The weights of the layers are random for the trial, and other ones on each device, so that what is right by accident does not
pass; what the block returns, what its last layer gives, and how many random numbers it draws must be the same.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from leyden.runtime.seed import isolate_rng
from leyden.strategies.tensor.automatic import Place
from leyden.strategies.tensor.layers import Region
from leyden.strategies.tensor.plan import HEADS, heads_of
from leyden.tree import leaves

_SHAPES = ((2, 4), (2,))
"""What the activations may look like, less their last dimension."""
_MORE_HEADS = (
    "num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "n_local_heads", "n_local_kv_heads", "num_query_groups",
)  # fmt: skip
_WIDTHS = ("hidden_size", "embed_dim", "n_embd", "d_model", "dim", "all_head_size", "inner_dim", "embedding_dim")
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
"""How far apart the same may be, for what lies in the range of 1; what is not the same is as far apart as that range."""


def try_out(root: nn.Module, place: Place, region: Region, size: int) -> dict[str, int] | str:
    """Let the activations of a place stay split if that gives the same, with these numbers in its block; or return why not.

    The layers are split already. Runs on all devices of the group together. The numbers are those of the block's own that
    must be what one device has: an attention counts its heads.
    """
    block = root.get_submodule(place.block)
    call = _call(root, place, block)
    if isinstance(call, str):
        return call
    width: Any = root.get_submodule(place.columns[0]).in_features
    layers = [root.get_submodule(name) for name in (*place.columns, place.row)]
    with _random_weights(layers), _as_it_was(block), isolate_rng(), torch.no_grad():
        whole: list[Any] = []
        problem = ""
        for shape in _SHAPES:
            given = _given(layers[-1], (*shape, width))
            region.split = False
            try:
                whole = _outcomes(call, block, layers[-1], given)
            except Exception as error:  # whatever the user's code says of what it was given
                problem = f"it does not run on a tensor of the shape {tuple(given.shape)} alone: {_first_line(error)}"
                continue
            break
        else:
            return problem
        if not all(_varies(outcome[0]) for outcome in whole):
            return "what it gives does not depend on what it gets"
        region.split = True
        first: str | None = None
        for fewer in _numbers_to_share(root, block, size):
            whys = _differs(call, block, layers[-1], given, whole, fewer)
            region.leave()
            if whys is None:
                return fewer
            first = first or whys
        region.split = False
    heads = heads_of(block)
    return f"its {heads} heads are not divisible by {size}" if heads is not None and heads % size else str(first)


def _differs(
    call: Callable[[Tensor], Any],
    block: nn.Module,
    row: nn.Module,
    given: Tensor,
    whole: list[Any],
    fewer: dict[str, int],
) -> str | None:
    """Say what is other than it was when activations stay split, and the block has these numbers; None if nothing is."""
    former = {name: getattr(block, name) for name in fewer}
    vars(block).update(fewer)
    try:
        split = _outcomes(call, block, row, given)
    except Exception as error:  # as above
        return f"its code does not take a part of them ({_first_line(error)})"
    finally:
        vars(block).update(former)
    for one, other in zip(whole, split, strict=True):
        if one[-1] != other[-1]:
            return "random numbers are drawn in between (dropout)"
        if not _same(one[:-1], other[:-1], _TOLERANCE.get(given.dtype, 0.1)):
            return "its code gives other numbers for a part of them"
    return None


def _numbers_to_share(root: nn.Module, block: nn.Module, size: int) -> Iterator[dict[str, int]]:
    """Numbers of the block that may have to be those of one device: none, its heads, its heads and their width."""
    yield {}
    if block is root or heads_of(block) is None:
        return
    numbers = {name: value // size for name, value in vars(block).items() if type(value) is int and value % size == 0}
    heads = {name: value for name, value in numbers.items() if name in HEADS or name in _MORE_HEADS}
    if heads:
        yield heads
        widths = {name: value for name, value in numbers.items() if name in _WIDTHS}
        if widths:
            yield {**heads, **widths}


def _call(root: nn.Module, place: Place, block: nn.Module) -> Callable[[Tensor], Any] | str:
    if place.through:
        steps = [root.get_submodule(name) for name in place.through]

        def run(given: Tensor) -> Any:
            for step in steps:
                given = step(given)
            return given

        return run
    parameters = list(inspect.signature(block.forward).parameters.values())
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in parameters if p.default is p.empty and p.kind in (*named, inspect.Parameter.KEYWORD_ONLY)]
    if not parameters or parameters[0].kind not in named or any(p.kind is p.KEYWORD_ONLY for p in needed):
        return f"{type(block).__name__}.forward cannot be tried out: it does not take tensors alone"
    return lambda given: block.forward(*[given] * max(len(needed), 1))


def _given(layer: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """The same random numbers on all devices."""
    weight = layer.weight
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return numbers.to(device=weight.device, dtype=weight.dtype)  # type: ignore[arg-type]


def _outcomes(call: Callable[[Tensor], Any], block: nn.Module, row: nn.Module, given: Tensor) -> list[list[Any]]:
    """In evaluation and in training: what the last layer gives, all that is returned, and where the generators are."""
    found: list[list[Any]] = []
    last: list[Tensor] = []
    handle = row.register_forward_hook(lambda _module, _args, output: last.append(output))
    try:
        for training in (False, True):
            block.train(training)
            torch.manual_seed(2)
            last.clear()
            returned = call(given.clone())
            tensors = [leaf.float() for leaf in leaves(returned) if isinstance(leaf, Tensor)]
            drawn = bytes(torch.get_rng_state().numpy())
            if given.device.type == "cuda":
                drawn += bytes(torch.cuda.get_rng_state(given.device).numpy())
            found.append([last[-1].float(), *tensors, drawn])
    finally:
        handle.remove()
    return found


def _varies(output: Tensor) -> bool:
    spread = (output - output.reshape(-1, output.shape[-1]).mean(0)).abs().max()
    return bool(spread > 1e-3)


def _same(one: list[Tensor], other: list[Tensor], tolerance: float) -> bool:
    if len(one) != len(other) or any(a.shape != b.shape for a, b in zip(one, other, strict=True)):
        return False
    first, second = one[0], other[0]
    spread = (first - first.reshape(-1, first.shape[-1]).mean(0)).abs().max()
    if bool((first - second).abs().max() > tolerance * spread):
        return False
    return all(
        bool((a - b).abs().max() <= tolerance * a.abs().max()) for a, b in zip(one, other, strict=True) if a.numel()
    )


@contextmanager
def _random_weights(layers: list[nn.Module]) -> Iterator[None]:
    locals_ = [_local(p) for layer in layers for p in layer.parameters(recurse=False)]
    kept = [one.clone() for one in locals_]
    rank = next(
        p.device_mesh.get_local_rank() for layer in layers for p in layer.parameters() if isinstance(p, DTensor)
    )
    try:
        with torch.no_grad():
            number = 0
            for layer in layers:
                scale = 1.0 / math.sqrt(layer.in_features)  # type: ignore[arg-type]
                for parameter in layer.parameters(recurse=False):
                    number += 1
                    whole = isinstance(parameter, DTensor) and parameter.placements[0].is_replicate()
                    generator = torch.Generator().manual_seed(1000 * number + (0 if whole else rank))
                    local = _local(parameter)
                    local.copy_(torch.randn(local.shape, generator=generator) * scale)
        yield
    finally:
        with torch.no_grad():
            for one, value in zip(locals_, kept, strict=True):
                one.copy_(value)


@contextmanager
def _as_it_was(block: nn.Module) -> Iterator[None]:
    """Put back whether the modules train, and their buffers."""
    modes = [(module, module.training) for module in block.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in block.buffers()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local().detach() if isinstance(parameter, DTensor) else parameter.detach()


def _first_line(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return text if len(text) <= 120 else f"{text[:117]}..."
