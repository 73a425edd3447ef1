# SPDX-License-Identifier: Apache-2.0
"""Tensors in nested values, in memory, and shared between modules; numbers in place of tensors, and the reverse."""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from leyden.compat.pieces import move_data_to_device
from leyden.tree import leaves, tree_map

FLOAT16_EPSILON = float(np.finfo(np.float16).eps)
FLOAT32_EPSILON = float(np.finfo(np.float32).eps)
FLOAT64_EPSILON = float(np.finfo(np.float64).eps)


def _of_array(value: Any, device: torch.device | str | int) -> Tensor:
    return torch.from_numpy(value).to(device)


CONVERSION_DTYPES: list[tuple[Any, Callable[..., Tensor]]] = [
    (bool, partial(torch.tensor, dtype=torch.uint8)),  # NCCL takes no bool
    (int, partial(torch.tensor, dtype=torch.int)),
    (float, partial(torch.tensor, dtype=torch.float)),
    (np.ndarray, _of_array),
]
"""Which values become tensors, and how."""


def convert_to_tensors(data: Any, device: torch.device | str | int) -> Any:
    """Return ``data``, nested as it may be, with numbers and arrays as tensors, everything on ``device``."""
    kinds = tuple(kind for kind, _ in CONVERSION_DTYPES)

    def made(value: Any) -> Tensor:
        make = next(make for kind, make in CONVERSION_DTYPES if isinstance(value, kind))
        return make(value, device=device)

    return move_data_to_device(tree_map(made, data, kinds), device)


def convert_tensors_to_scalars(data: Any) -> Any:
    """Return ``data``, nested as it may be, with numbers in place of tensors.

    Raises:
        ValueError: for a tensor with more than one element.
    """

    def number(value: Tensor) -> float | int | bool:
        if value.numel() != 1:
            raise ValueError(f"A tensor of shape {tuple(value.shape)} is no single number; it has to have one element.")
        return value.item()

    return tree_map(number, data)


def find_shared_parameters(module: nn.Module) -> list[list[str]]:
    """Return the groups of names under which one parameter stands in several places."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [group for group in names.values() if len(group) > 1]


def set_shared_parameters(module: nn.Module, shared_params: Iterable[list[str]]) -> nn.Module:
    """Put the parameter that each group's first name has in the place of the others; return ``module``."""
    for first, *others in shared_params:
        parameter = module.get_parameter(first)
        for name in others:
            path, _, last = name.rpartition(".")
            setattr(module.get_submodule(path), last, parameter)
    return module


def optimizer_to_device(optimizer: Optimizer, device: torch.device | str | int) -> None:
    """Bring the state of an optimizer to ``device``; the counts of steps stay where torch wants them."""
    for parameter, state in optimizer.state.items():
        if isinstance(state, MutableMapping):
            for key, value in state.items():
                if key != "step":
                    state[key] = move_data_to_device(value, device)
        else:
            optimizer.state[parameter] = move_data_to_device(state, device)


def optimizers_to_device(optimizers: Iterable[Optimizer], device: torch.device | str | int) -> None:
    """Bring the states of all of them to ``device``."""
    for optimizer in optimizers:
        optimizer_to_device(optimizer, device)


def gather_all_tensors(result: Tensor, group: Any = None) -> list[Tensor]:
    """Return the tensor of every process of a group, in the order of ranks; sizes may differ, the number of axes not."""
    if not distributed_available():
        return [result]
    distributed = torch.distributed
    size = distributed.get_world_size(group)
    shape = torch.tensor(result.shape, device=result.device)
    shapes = [torch.zeros_like(shape) for _ in range(size)]
    distributed.all_gather(shapes, shape, group=group)
    largest = torch.stack(shapes).max(dim=0).values.tolist() if result.ndim else []
    padded = result.new_zeros(largest)
    padded[tuple(slice(0, count) for count in result.shape)] = result
    gathered = [torch.zeros_like(padded) for _ in range(size)]
    distributed.all_gather(gathered, padded, group=group)
    return [one[tuple(slice(0, int(count)) for count in counts)] for one, counts in zip(gathered, shapes, strict=True)]


def distributed_available() -> bool:
    """Whether torch has processes to exchange with."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def prepare_for_backward(model: Any, output: Any) -> None:
    """Get the reducer of torch's ``DistributedDataParallel`` ready for the backward of what a forward returned.

    It is what the wrapper's own forward does; for one that was gone around.
    """
    if not (torch.is_grad_enabled() and model.require_backward_grad_sync):
        model.require_forward_param_sync = False
        return
    model.require_forward_param_sync = True
    unused = model.find_unused_parameters and not model.static_graph
    model.reducer._rebuild_buckets()  # noqa: SLF001  # torch has no public way to say it
    model.reducer.prepare_for_backward([leaf for leaf in leaves(output) if isinstance(leaf, Tensor)] if unused else [])


def check_finite_loss(loss: Tensor | None) -> None:
    """Raise if the loss of a training step is NaN or infinite.

    Raises:
        ValueError: if it is.
    """
    if loss is not None and not torch.isfinite(loss).all():
        raise ValueError(f"training_step returned the loss {loss}: it is not finite.")


def sync_ddp_if_available(result: Tensor, group: Any = None, reduce_op: Any = None) -> Tensor:
    """Return the sum over all processes of a group (``reduce_op`` None or ``"sum"``), the mean or another reduction.

    Args:
        result: The tensor of this process; changed in place where there are several.
        group: The processes; None: all.
        reduce_op: ``"avg"`` or ``"mean"``, a word that torch has (``"max"`` …), or torch's own.
    """
    if not distributed_available():
        return result
    distributed = torch.distributed
    word = str(reduce_op).lower() if isinstance(reduce_op, str) else ""
    operation = distributed.ReduceOp.SUM
    if isinstance(reduce_op, str) and word not in ("avg", "mean", "sum"):
        operation = getattr(distributed.ReduceOp, word.upper())
    elif reduce_op is not None and not isinstance(reduce_op, str):
        operation = reduce_op
    distributed.all_reduce(result, op=operation, group=group)
    if word in ("avg", "mean"):
        result = (
            result.div_(distributed.get_world_size(group))
            if result.is_floating_point()
            else (result / distributed.get_world_size(group))
        )
    return result
