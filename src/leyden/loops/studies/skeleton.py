# SPDX-License-Identifier: Apache-2.0
"""A copy of a module that has shapes and no memory, and what stands in for the Trainer of such a copy."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from leyden.errors import MisconfigurationException
from leyden.hooks import is_written
from leyden.module import LightningModule


class Stand:
    """Stands in for the Trainer of a copy that is measured, since no fit runs: what only a fit knows is played."""

    def __init__(self, trainer: Any, module: Any) -> None:
        self._trainer, self._module = trainer, module
        self.optimizers: list[Any] = []
        self.lr_scheduler_configs: list[Any] = []
        if isinstance(module, LightningModule):
            module.trainer = self
        for part in module.modules():
            if isinstance(part, LightningModule):
                vars(part).update(log=_nothing, log_dict=_nothing)

    @property
    def estimated_stepping_batches(self) -> int:
        """Updates that the fit will make, if that is known; a schedule takes up no memory for it."""
        try:
            known = self._trainer.estimated_stepping_batches
        except RuntimeError:  # known in a fit only
            known = math.inf
        return int(known) if 0 < known < math.inf else 1000

    @property
    def lightning_module(self) -> Any:
        """The copy."""
        return self._module

    def release(self) -> None:
        """Let go of the copy's trainer."""
        if isinstance(self._module, LightningModule):
            self._module.trainer = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._trainer, name)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In the place of ``log``."""


class _OnMeta(TorchFunctionMode):
    """While it is on, a deep copy of a tensor is a tensor on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = _meta(tensor)
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def _meta(tensor: Tensor) -> Tensor:
    if tensor.is_sparse or tensor.is_quantized or is_lazy(tensor):
        return tensor
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def skeleton_of(trainer: Any, module: nn.Module) -> nn.Module:
    """Return a copy of the module on the meta device, built by its own hooks and in the precision of the trainer."""
    memo: dict[int, Any] = {id(tensor): _meta(tensor) for tensor in (*module.parameters(), *module.buffers())}
    try:
        with _OnMeta():
            found: Any = copy.deepcopy(module, memo)
    except Exception as error:
        raise MisconfigurationException(
            f"plan measures a copy of the module, and something of it cannot be copied (copy.deepcopy):"
            f" {type(error).__name__}: {error}."
        ) from error
    precision = trainer.strategy.precision
    stand = Stand(trainer, found)
    hooks = ("configure_sharded_model", "configure_model")
    written = [
        name for name in hooks if isinstance(found, LightningModule) and is_written(found, name, LightningModule)
    ]
    if not any(True for _ in found.parameters()) and isinstance(found, LightningModule):
        written = (["setup"] if is_written(found, "setup", LightningModule) else []) + written
    for name in written:
        try:
            with torch.device("meta"), precision.init_context():
                getattr(found, name)("fit") if name == "setup" else getattr(found, name)()
        except Exception as error:
            raise MisconfigurationException(
                f"plan: {type(module).__name__}.{name}() failed on the meta device, outside of a run:"
                f" {type(error).__name__}: {error}. Give plan a module that is built."
            ) from error
    lazy = [name for name, parameter in found.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise MisconfigurationException(
            f"plan: {type(module).__name__} has parameters without a shape yet ({', '.join(lazy[:3])}). Run it once on a"
            " batch before."
        )
    converted: nn.Module = precision.convert_module(found)
    stand.release()
    return converted


def fake_of(mode: FakeTensorMode, device: torch.device, tensor: Tensor) -> Tensor:
    """Return a tensor on ``device`` that has the shape of ``tensor`` and no memory."""
    if tensor.is_sparse:
        return mode.from_tensor(tensor)
    with mode:
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return made.requires_grad_() if tensor.requires_grad and not isinstance(tensor, nn.Parameter) else made


def exchange(module: nn.Module, fake: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Put fakes in the place of all parameters, buffers and tensors of a module; return its parameters by name."""
    made: dict[int, Any] = {}
    names: dict[str, Any] = {}
    for prefix, part in module.named_modules():
        own = vars(part)
        for name, parameter in own["_parameters"].items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(fake(parameter), parameter.requires_grad)
                names[f"{prefix}.{name}" if prefix else name] = made[id(parameter)]
            own["_parameters"][name] = made[id(parameter)]
        for name, buffer in own["_buffers"].items():
            if buffer is not None:
                own["_buffers"][name] = made.setdefault(id(buffer), fake(buffer))
        for name, value in list(own.items()):
            if isinstance(value, Tensor):
                own[name] = made.setdefault(id(value), fake(value))
    return names


def size_of(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()
