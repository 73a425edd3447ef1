# SPDX-License-Identifier: Apache-2.0
"""A module that knows its device and dtype; and what Lightning's helpers say about tensors without memory."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from leyden.precision.base import WithoutInit


class DeviceDtypeModuleMixin(nn.Module):
    """A module with ``device`` and ``dtype``: those of its first parameter or buffer, torch's defaults without any."""

    __jit_unused_properties__ = ["device", "dtype"]

    @property
    def device(self) -> torch.device:
        """The device of the first parameter or buffer."""
        first = next(itertools.chain(self.parameters(), self.buffers()), None)
        return torch.empty(0).device if first is None else first.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point parameter or buffer."""
        tensors = itertools.chain(self.parameters(), self.buffers())
        return next((one.dtype for one in tensors if one.is_floating_point()), torch.get_default_dtype())

    @dtype.setter
    def dtype(self, new_dtype: Any) -> None:
        raise RuntimeError(f"dtype cannot be set to {new_dtype!r}: call module.to({new_dtype!r}).")


def has_meta_device_parameters_or_buffers(obj: Any, recurse: bool = True) -> bool:
    """Whether a module, or the parameters of an optimizer, have tensors that are not made yet (device ``meta``).

    Raises:
        TypeError: for anything else.
    """
    if isinstance(obj, Optimizer):
        return any(one.is_meta for group in obj.param_groups for one in group["params"])
    if isinstance(obj, nn.Module):
        return any(one.is_meta for one in itertools.chain(obj.parameters(recurse), obj.buffers(recurse)))
    raise TypeError(f"A module or an optimizer is needed, not a {type(obj).__name__}.")


class ModuleMode:
    """Keeps which layers of a module are in training mode, and brings that back."""

    def __init__(self) -> None:
        self.mode: dict[str, bool] = {}

    def capture(self, module: nn.Module) -> None:
        """Keep the modes of now."""
        self.mode = {name: layer.training for name, layer in module.named_modules()}

    def restore(self, module: nn.Module) -> None:
        """Bring them back; layers that were not there keep theirs."""
        for name, layer in module.named_modules():
            layer.training = self.mode.get(name, layer.training)


class EmptyInit(WithoutInit):
    """A context in which layers leave their weights as memory held them, if ``enabled``."""

    def __init__(self, enabled: bool = True) -> None:
        super().__init__()
        self.enabled = enabled

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if not self.enabled:
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


def materialize_meta_tensors(module: nn.Module, device: Any) -> None:
    """Make the tensors of a module that are on the device ``meta``, and let its layers fill them.

    Raises:
        TypeError: for a layer that has such tensors and no ``reset_parameters``.
    """
    for layer in module.modules():
        if has_meta_device_parameters_or_buffers(layer, recurse=False):
            layer.to_empty(device=device, recurse=False)
            reset: Any = getattr(layer, "reset_parameters", None)
            if not callable(reset):
                raise TypeError(
                    f"{type(layer).__name__} has no reset_parameters(), which fills its weights: write one."
                )
            reset()
