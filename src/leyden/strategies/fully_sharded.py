# SPDX-License-Identifier: Apache-2.0
"""What torch's fully_shard keeps to itself and a trainer needs: gradients that wait for their exchange, and the way back.

Everything here reaches into ``torch.distributed.fsdp``; nothing else does.
"""
# ruff: noqa: SLF001  # see above

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed import _composable_state
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
from torch.distributed.fsdp import FSDPModule, fully_shard


def sharded_layers(module: nn.Module) -> list[Any]:
    """Return the layers of ``module`` to which fully_shard was applied, itself first."""
    return [layer for layer in module.modules() if isinstance(layer, FSDPModule)]


def _groups(layer: Any) -> list[Any]:
    state = fully_shard.state(layer)  # type: ignore[attr-defined]
    several = getattr(state, "_fsdp_param_groups", None)  # torch 2.10 and later
    return list(several) if several is not None else [g for g in [state._fsdp_param_group] if g is not None]


def parts(module: nn.Module) -> Iterator[Any]:
    """Yield what torch keeps of each parameter that is sharded: ``sharded_param``, and ``_unsharded_param`` once made."""
    seen: set[int] = set()
    for layer in sharded_layers(module):
        for group in _groups(layer):
            if id(group) not in seen:
                seen.add(id(group))
                yield from group.fsdp_params


def own_parts(layer: Any) -> list[Any]:
    """Return the same for the one group of parameters that ``layer`` brings together."""
    return [part for group in _groups(layer) for part in group.fsdp_params]


def twin(part: Any) -> Any:
    """Return the whole parameter that a layer computes with; None before it has been brought together once."""
    return getattr(part, "_unsharded_param", None)


def waiting(part: Any) -> Tensor | None:
    """Return the gradient of this process alone that has still to be exchanged; None if there is none."""
    whole = twin(part)
    if whole is None:
        return None
    kept: Tensor | None = part.unsharded_accumulated_grad
    return whole.grad if kept is None else kept


def let_wait(part: Any, gradient: Tensor) -> None:
    """Put back what ``waiting`` returned."""
    whole = twin(part)
    if gradient.dtype == whole.dtype:
        whole.grad = gradient.to(whole.device)
    else:
        part.unsharded_accumulated_grad = gradient.to(whole.device)


def follow_requires_grad(module: nn.Module) -> None:
    """Let whole parameters that are in use require gradients where the sharded ones, which optimizers have, do."""
    for part in parts(module):
        whole = twin(part)
        if whole is not None and whole.requires_grad != part.sharded_param.requires_grad:
            whole.requires_grad_(part.sharded_param.requires_grad)


def come_apart(module: nn.Module) -> None:
    """Let ``module`` have its sharded parameters, whatever step an exception has ended."""
    for layer in sharded_layers(module):
        for group in _groups(layer):
            group._to_sharded()


def take_off(module: nn.Module) -> None:
    """Take fully_shard off all layers of ``module``; their parameters are not touched."""
    for layer in sharded_layers(module):
        state = fully_shard.state(layer)  # type: ignore[attr-defined]
        state._pre_forward_hook_handle.remove()
        state._post_forward_hook_handle.remove()
        for group in _groups(layer):
            for handles in (
                group._module_to_pre_save_state_dict_hook_handle,
                group._module_to_pre_load_state_dict_hook_handle,
            ):
                for handle in handles.values():
                    handle.remove()
        layer.__class__ = type(layer).__mro__[2]  # FSDPX, FSDPModule, X
        _composable_state._module_state_mapping.pop(layer, None)
        for key in (STATE_KEY, REGISTRY_KEY):
            vars(layer).pop(key, None)
    for layer in module.modules():
        for name in ("_is_fsdp_managed_module", "_fsdp_use_orig_params"):
            vars(layer).pop(name, None)
