# SPDX-License-Identifier: Apache-2.0
"""Batch norms that use the statistics of all ranks on the CPU, where torch's SyncBatchNorm does not run."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _Sum(torch.autograd.Function):
    """The sum over all ranks; so is its gradient."""

    @staticmethod
    def forward(_ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_ctx: Any, *gradients: Any) -> Any:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def norms_of(module: nn.Module) -> list[tuple[str, Any]]:
    """Return the batch norms of ``module`` by their names; not those that are synchronised already."""
    return [
        (name, child)
        for name, child in module.named_modules()
        if isinstance(child, _BatchNorm) and not isinstance(child, nn.SyncBatchNorm)
    ]


def synchronise(module: nn.Module) -> list[Any]:
    """Let the batch norms of ``module`` use the statistics of all ranks; return them, for ``release``."""
    norms = [norm for _, norm in norms_of(module) if "forward" not in vars(norm)]
    for norm in norms:
        vars(norm)["forward"] = partial(_forward, norm)
    return norms


def release(norms: list[Any]) -> None:
    """Give the batch norms their own forward back."""
    for norm in norms:
        vars(norm).pop("forward", None)


def _forward(norm: Any, values: Tensor) -> Tensor:
    """What ``norm`` makes of ``values`` (samples, channels, …): in training by the mean and variance over all ranks."""
    if not (norm.training or norm.running_mean is None):
        result: Tensor = type(norm).forward(norm, values)
        return result
    norm._check_input_dim(values)  # noqa: SLF001  # its own check of the shape
    axes = [axis for axis in range(values.dim()) if axis != 1]
    shape = [1, -1] + [1] * (values.dim() - 2)
    local = torch.full((1,), values.numel() / values.shape[1], dtype=values.dtype)
    sums: Tensor = _Sum.apply(torch.cat([values.sum(axes), local]))  # type: ignore[no-untyped-call]
    count = sums[-1].detach()
    mean = sums[:-1] / count
    centred = values - mean.view(shape)
    variance: Tensor = _Sum.apply(centred.square().sum(axes))  # type: ignore[no-untyped-call]
    variance = variance / count
    if norm.training and norm.track_running_stats:
        with torch.no_grad():
            norm.num_batches_tracked += 1
            part = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), part)
            unbiased = variance * (count / (count - 1).clamp(min=1))
            norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), part)
    result = centred * torch.rsqrt(variance + norm.eps).view(shape)
    return result * norm.weight.view(shape) + norm.bias.view(shape) if norm.affine else result
