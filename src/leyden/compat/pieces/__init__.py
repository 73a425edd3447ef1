# SPDX-License-Identifier: Apache-2.0
"""Small things that Lightning has under names of its own: words of annotations, an enum, two helpers."""

from __future__ import annotations

import socket
from enum import Enum
from typing import Any, TypeAlias, TypedDict

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from leyden.tree import move_to

LRSchedulerType: TypeAlias = type[LRScheduler] | type[ReduceLROnPlateau]
"""A class of schedulers."""
LRSchedulerTypeTuple = (LRScheduler, ReduceLROnPlateau)
"""All schedulers, for ``isinstance``."""


class LRSchedulerConfigType(TypedDict, total=False):
    """What ``configure_optimizers`` says about one scheduler; ``scheduler`` is needed."""

    scheduler: Any
    name: str | None
    interval: str
    frequency: int
    reduce_on_plateau: bool
    monitor: str | None
    strict: bool


class OptimizerConfig(TypedDict):
    """What ``configure_optimizers`` may return: a dict with an optimizer."""

    optimizer: Optimizer


class OptimizerLRSchedulerConfig(TypedDict, total=False):
    """What ``configure_optimizers`` may return: a dict with an optimizer and its scheduler."""

    optimizer: Optimizer
    lr_scheduler: Any
    monitor: str


class GradClipAlgorithmType(str, Enum):
    """How gradients are clipped, as the Trainer's argument of that name takes it."""

    VALUE = "value"
    NORM = "norm"

    @staticmethod
    def supported_type(val: str) -> bool:
        """Whether ``val`` is one of the two."""
        return val in {member.value for member in GradClipAlgorithmType}

    @staticmethod
    def supported_types() -> list[str]:
        """The values of both."""
        return [member.value for member in GradClipAlgorithmType]


def move_data_to_device(batch: Any, device: torch.device | str | int) -> Any:
    """Return ``batch``, nested as it may be, with everything that has a ``to`` method on ``device``."""
    return move_to(batch, torch.device(device))


def grad_norm(module: nn.Module, norm_type: float | int | str, group_separator: str = "/") -> dict[str, Tensor]:
    """Return the norm of each parameter's gradient, and the norm of those norms under ``grad_<p>_norm_total``.

    Args:
        module: Parameters without a gradient are left out; without any gradient the result is empty.
        norm_type: The p of the norm, more than 0; ``"inf"`` is the largest absolute value.
        group_separator: Stands between ``grad_<p>_norm`` and the parameter's name.

    Raises:
        ValueError: if ``norm_type`` is not more than 0.
    """
    p = float(norm_type)
    if not p > 0:
        raise ValueError(f"grad_norm(norm_type={norm_type!r}) is not valid: it must be more than 0, or 'inf'.")
    gradients = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    norms = {
        f"grad_{p}_norm{group_separator}{name}": torch.linalg.vector_norm(gradient.detach(), p)
        for name, gradient in gradients.items()
    }
    if norms:
        device = next(iter(norms.values())).device
        norms[f"grad_{p}_norm_total"] = torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms.values()]), p)
    return norms


def find_free_network_port() -> int:
    """Return a port of this machine that nobody uses now."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def num_cuda_devices() -> int:
    """The number of CUDA devices that can be used here."""
    return torch.cuda.device_count()


def is_cuda_available() -> bool:
    """Whether there is one."""
    return num_cuda_devices() > 0
