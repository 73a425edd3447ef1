# SPDX-License-Identifier: Apache-2.0
"""What DeepSpeed's engine keeps spread over processes, brought together and put back, and the way back to a plain module.

Everything here reaches into DeepSpeed's ZeRO optimizers; nothing else does.
"""
# ruff: noqa: SLF001  # see above

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from leyden.errors import CheckpointError

_LEFT = ("applied_pre_backward_ref_cnt", "_original_parameters", "_external_params", "post_bwd_fn", "pre_bwd_fn")
"""What stage 3 leaves on layers."""
_PART, _WHOLE = "zero part ", "zero parts"
"""Names of gradients of a window of accumulation that is open, of which a process has its share."""


class Before:
    """How a module and its optimizer were before DeepSpeed got them.

    Attributes:
        groups: The parameters of each group of the optimizer; what comes after has flat ones in their place.
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer) -> None:
        self.module, self.optimizer = module, optimizer
        self.groups = [list(group["params"]) for group in optimizer.param_groups]
        owned = (parameter for group in self.groups for parameter in group)
        self.dtypes: dict[Any, tuple[torch.dtype, set[str]]] = {
            parameter: (parameter.dtype, set(vars(parameter))) for parameter in (*module.parameters(), *owned)
        }
        self.trained = {p for group in self.groups for p in group if p.requires_grad}
        self._buffers = {name: buffer.dtype for name, buffer in module.named_buffers()}
        self._vars = [(child, set(vars(child))) for child in module.modules()]
        self._linear = nn.functional.linear  # stage 3 puts its own in the place of torch's
        vars(optimizer)["zero_grad"] = _nothing  # the engine clears gradients, after its step

    def dtype_of(self, name: str, tensor: Tensor) -> torch.dtype:
        """The number format that a parameter or a buffer had."""
        if isinstance(tensor, nn.Parameter) and tensor in self.dtypes:
            return self.dtypes[tensor][0]
        return self._buffers.get(name, tensor.dtype)

    def restore(self, weights: Mapping[nn.Parameter, Tensor], state: dict[str, Any] | None) -> None:
        """Make the module plain, with these weights, and the optimizer one of its parameters, with this state."""
        for child, names in self._vars:
            mine = vars(child)
            mine["_parameters"] = dict(mine["_parameters"])
            for hooks in (value for name, value in mine.items() if name.endswith("_hooks") and value):
                for key in [key for key, hook in hooks.items() if str(_module_of(hook)).startswith("deepspeed")]:
                    hooks.pop(key)
            for name in set(mine) - names:
                theirs = str(getattr(mine[name], "__module__", "")).startswith("deepspeed")
                if theirs or name.startswith(("ds_", "_ds")) or name in _LEFT:
                    mine.pop(name)
        nn.functional.linear = self._linear
        for parameter, (dtype, names) in self.dtypes.items():
            for name in set(vars(parameter)) - names:
                delattr(parameter, name)
            parameter.grad = None
            parameter.data = weights.get(parameter, parameter.data).to(dtype, copy=True)
        for name, buffer in self.module.named_buffers():
            if buffer.is_floating_point():
                buffer.data = buffer.data.to(self._buffers.get(name, buffer.dtype))
        for group, parameters in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["params"] = parameters
        self.optimizer.state.clear()
        vars(self.optimizer).pop("zero_grad", None)
        if state is not None:
            self.optimizer.load_state_dict(state)


def _nothing(set_to_none: bool = True) -> None:
    """Stands in the place of ``zero_grad``."""


def _module_of(hook: Any) -> Any:
    return getattr(getattr(hook, "func", hook), "__module__", None)


def flats(zero: Any) -> list[list[Tensor]]:
    """Return, for each group of the optimizer, this process's parts of its parameters, in 32 bits."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3
        groups: list[list[Tensor]] = [[] for _ in zero.optimizer.param_groups]
        for index, flat in enumerate(zero.fp32_partitioned_groups_flat):
            groups[zero.sub_group_to_group_id[index]].append(flat)
        return groups
    return [[flat] for flat in zero.single_partition_of_fp32_groups]


def _utils() -> Any:
    return importlib.import_module("deepspeed.utils")


@contextlib.contextmanager
def gathered(parameters: Iterable[nn.Parameter], writes: bool = False) -> Iterator[None]:
    """A context in which ``parameters`` are whole on all ranks, which take part together; it may write to them."""
    zero: Any = importlib.import_module("deepspeed").zero
    own = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    with zero.GatheredParameters(own, modifier_rank=0 if writes else None, enabled=bool(own)):
        yield


def whole_weight(parameter: nn.Parameter, trained: bool) -> Tensor:
    """Return the whole value of a parameter, in 32 bits where it is trained; all ranks take part."""
    if trained:
        value: Tensor | None = _utils().safe_get_full_fp32_param(parameter)
        if value is not None:
            return value.detach()
    with gathered([parameter]):
        return parameter.detach().clone()


def set_master(parameter: Any, value: Tensor, name: str | None = None) -> None:
    """Put a whole value, the same on all ranks, in the place of what the optimizer steps on, or keeps under ``name``.

    Takes no exchange: each process keeps its part.
    """
    utils = _utils()
    whole = value.to(parameter.device, torch.float32)
    if not hasattr(parameter, "ds_id"):
        if name is None:
            utils.safe_set_full_fp32_param(parameter, whole)
        else:
            utils.safe_set_full_optimizer_state(parameter, whole, name)
        return
    # what DeepSpeed has for whole values of stage 3 fails where they cannot be shared out evenly
    size = parameter.ds_tensor.numel()
    start = min(size * dist.get_rank(parameter.ds_process_group), whole.numel())
    part = torch.zeros(size, device=whole.device)
    mine = whole.flatten()[start : start + size]
    part[: mine.numel()] = mine
    if name is None:
        utils.safe_set_local_fp32_param(parameter, part)
    else:
        utils.safe_set_local_optimizer_state(parameter, part, name)


def optimizer_state(zero: Any, before: Before, writes: bool) -> dict[str, Any]:
    """Return the whole state of the optimizer, as torch's has it with one process; all ranks take part.

    Args:
        zero: DeepSpeed's optimizer.
        before: What it was made of.
        writes: Whether this process wants values, in host memory; the others get tensors without any.

    Raises:
        CheckpointError: for state of an optimizer that does not go with the elements of parameters.
    """
    inner, utils = zero.optimizer, _utils()
    state: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    index = 0
    for position, (group, parameters, parts) in enumerate(
        zip(inner.param_groups, before.groups, flats(zero), strict=True)
    ):
        first = index
        flat = next((part for part in parts if inner.state.get(part)), None)
        known = {} if flat is None else inner.state[flat]
        if flat is not None:
            _link(zero, position, flat)
        for parameter in parameters:
            if parameter in before.trained and known:
                own = state[index] = {}
                for name, value in known.items():
                    if not isinstance(value, Tensor) or value.numel() == 1 and value.dim() == 0:
                        own[name] = value.detach().cpu().clone() if isinstance(value, Tensor) else value
                    elif flat is not None and value.shape == flat.shape:
                        whole = utils.safe_get_full_optimizer_state(parameter, name).detach()
                        own[name] = whole.to("cpu", copy=True) if writes else torch.empty_like(whole, device="meta")
                    else:
                        raise CheckpointError(
                            f"DeepSpeed cannot bring together {name!r}, which {type(inner).__name__} keeps in the shape"
                            f" {tuple(value.shape)} for a part of {flat.numel() if flat is not None else 0} elements. Save"
                            " with save_weights_only=True, or use an optimizer whose state goes with the elements."
                        )
            index += 1
        groups.append({**{k: v for k, v in group.items() if k != "params"}, "params": list(range(first, index))})
    return {"state": state, "param_groups": groups}


def load_optimizer_state(zero: Any, before: Before, state: Mapping[str, Any]) -> None:
    """Load what ``optimizer_state`` returned, or what torch's optimizer of one process did.

    Raises:
        ValueError: for the state of another optimizer.
    """
    inner = zero.optimizer
    saved = state["param_groups"]
    if [len(group["params"]) for group in saved] != [len(parameters) for parameters in before.groups]:
        raise ValueError("it has other groups of parameters")
    for position, (group, given, parameters, parts) in enumerate(
        zip(inner.param_groups, saved, before.groups, flats(zero), strict=True)
    ):
        group.update({name: value for name, value in given.items() if name != "params"})
        own = {
            p: state["state"].get(i) for i, p in zip(given["params"], parameters, strict=True) if p in before.trained
        }
        template = next((each for each in own.values() if each), None)
        if template is None:
            continue
        names = [name for name, value in template.items() if isinstance(value, Tensor) and name != "step"]
        for flat in parts:
            inner.state[flat] = {
                name: torch.zeros_like(flat) if name in names else _scalar(value, flat, group)
                for name, value in template.items()
            }
        _link(zero, position, parts[0])
        for parameter, each in own.items():
            for name in names:
                if each is None or name not in each:
                    raise ValueError(f"it has no {name!r} for a parameter of shape {tuple(parameter.shape)}")
                set_master(parameter, each[name], name)


def _link(zero: Any, position: int, flat: Tensor) -> None:
    """Let parameters know the state of their group; DeepSpeed does it too early where there are several groups."""
    if hasattr(zero, "bit16_groups"):  # stages 1 and 2
        _utils().lazy_init_hp_params_optimizer_state(zero.bit16_groups[position], flat, zero.optimizer.state)


def _scalar(value: Any, flat: Tensor, group: Mapping[str, Any]) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(flat.device if group.get("fused") or group.get("capturable") else "cpu", copy=True)


def scale_gradients(zero: Any, factor: Any) -> None:
    """Multiply the averaged gradients by a number, or a tensor with one element."""
    for parts in flats(zero):
        for flat in parts:
            if flat.grad is not None:
                flat.grad.mul_(factor)
    for grads in zero.averaged_gradients.values():
        for gradient in grads or ():
            gradient.mul_(factor)
    if getattr(zero, "norm_for_param_grads", None):  # measured already, where gradients go to the host
        zero.norm_for_param_grads = {key: norm * factor for key, norm in zero.norm_for_param_grads.items()}


def waiting_gradients(zero: Any) -> dict[str, Tensor]:
    """Return what this process has of the gradients of a window that is open, where the engine keeps them.

    Raises:
        CheckpointError: where it keeps them with the optimizer in host memory.
    """
    if getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False):
        raise CheckpointError(
            "DeepSpeed with offload_optimizer does not give out the gradients of a window of accumulation that is open. Save"
            " at the end of a window: every_n_train_steps counts those."
        )
    if hasattr(zero, "grad_partitions_flat_buffer"):
        return {_WHOLE: zero.grad_partitions_flat_buffer.detach().clone()}
    return {
        f"{_PART}{group}.{number}": gradient.detach().clone()
        for group, grads in zero.all_grad_tensors.items()
        for number, gradient in enumerate(grads or ())
    }


def load_waiting_gradients(zero: Any, gradients: Mapping[str, Tensor]) -> None:
    """Take over what ``waiting_gradients`` returned."""
    whole = gradients.get(_WHOLE)
    if whole is not None and whole.shape == zero.grad_partitions_flat_buffer.shape:
        zero.grad_partitions_flat_buffer.copy_(whole)
        zero.micro_step_id = 1  # the next gradients are added to these
    groups: dict[int, list[Tensor]] = {}
    for name, gradient in gradients.items():
        if name.startswith(_PART):
            groups.setdefault(int(name[len(_PART) :].split(".")[0]), []).append(gradient)
    for group, grads in groups.items():
        device = zero.single_partition_of_fp32_groups[group].device
        zero.all_grad_tensors[group] = [gradient.to(device) for gradient in grads]
        zero.micro_step_id = 1


@contextlib.contextmanager
def held_together(engine: Any) -> Iterator[None]:
    """A context in which a module of stage 3 is whole on all ranks, and a step has no exchange."""
    offload = engine.optimizer.parameter_offload
    with gathered(engine.module.parameters()):
        offload._remove_module_hooks()
        try:
            yield
        finally:
            offload._register_deepspeed_module(offload.module)
