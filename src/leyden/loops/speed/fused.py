# SPDX-License-Identifier: Apache-2.0
"""Gives torch's optimizers their fused form, in place: one kernel for a whole step, the same arithmetic but for rounding.

An optimizer stays the object that it was, so schedulers and whoever else holds it go on. Its checkpoints say nothing of
the form: whether a run is fused is up to that run, and a file of either kind goes on in either, here and elsewhere.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from leyden.optim import NoOptimizer
from leyden.runtime.ranks import rank_zero_info

KINDS: tuple[type[Optimizer], ...] = (AdamW, Adam, SGD, Adagrad)
"""The optimizers of torch that have a fused form, the more special ones first."""
MARK = "_leyden_fused"
"""The attribute of an optimizer that holds its ``Fused``, by which a later fit takes it back."""


def fuse(optimizers: Iterable[Optimizer], module: nn.Module) -> None:
    """Give each optimizer its fused form; say of those that have none, in one line each, why they stay as they are.

    Args:
        optimizers: On the device on which they will step.
        module: Whose parameters they have; layers with sparse gradients are looked for in it.
    """
    layers = (layer for layer in module.modules() if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)))
    sparse = {id(layer.weight) for layer in layers if layer.sparse}
    for optimizer in optimizers:
        if isinstance(optimizer, NoOptimizer):
            continue
        why = why_not(optimizer, sparse)
        if why is None:
            Fused(optimizer, sparse)
        elif why:
            rank_zero_info(
                f"Trainer(fused_optimizers=True): {type(optimizer).__name__} stays as it is: {why}.", stacklevel=5
            )


def why_not(optimizer: Any, sparse: set[int]) -> str | None:
    """Return why an optimizer cannot be fused, as a half sentence; None if it can, empty if it is already.

    Args:
        optimizer: Any.
        sparse: The ids of the parameters that get sparse gradients.
    """
    kind = next((kind for kind in KINDS if isinstance(optimizer, kind)), None)
    # a wrapper passes for the class of what it wraps
    if kind is None or kind not in type(optimizer).__mro__ or "fused" not in optimizer.defaults:
        return "torch has no fused form of it"
    for name in ("step", "_init_group"):
        own, theirs = getattr(type(optimizer), name, None), getattr(kind, name, None)
        # torch wraps the step of each class that it makes an object of
        if own is None or theirs is None or inspect.unwrap(own) is not inspect.unwrap(theirs):
            return f"its class overrides {name}()"
    if all(group["fused"] for group in optimizer.param_groups):
        return ""
    tried: set[Any] = set()
    for group in optimizer.param_groups:
        why = _why_not_group(kind, group, sparse, tried)
        if why is not None:
            return why
    return None


def _why_not_group(kind: type[Optimizer], group: dict[str, Any], sparse: set[int], tried: set[Any]) -> str | None:
    if group["fused"] is False:
        return "it was built with fused=False"
    for name in ("foreach", "differentiable"):
        if group.get(name):
            return f"it was built with {name}=True, which excludes it"
    if group.get("momentum") and group.get("dampening"):
        # torch's kernel knows one first step for all, and with dampening a first step is not like the others
        return "its fused form cannot dampen the momentum of a parameter that gets its first gradient late"
    for parameter in group["params"]:
        sharded = type(parameter).__module__.startswith("torch.distributed.")
        if type(parameter) not in (nn.Parameter, Tensor) and not sharded:
            return f"it has parameters of the class {type(parameter).__name__}"
        if id(parameter) in sparse:
            return "it has parameters with sparse gradients"
        # torch's kernels for the CPU go through memory as it lies, whatever the strides
        if not sharded and not is_dense(parameter):
            return "it has a parameter that is a view with gaps"
        what = (parameter.device, parameter.dtype, bool(group.get("amsgrad")), isinstance(group["lr"], Tensor))
        if what not in tried and not _works(kind, group, parameter):
            short = str(parameter.dtype).removeprefix("torch.")
            return f"torch has no fused {kind.__name__} for {short} on {parameter.device.type}"
        tried.add(what)
    return None


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements lie in memory without gaps and overlaps, in any order of dimensions."""
    return tensor.is_contiguous() or torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def _works(kind: Any, group: dict[str, Any], parameter: Tensor) -> bool:
    """Whether torch can take a fused step there; its lists of devices do not tell of every optimizer."""
    sample = torch.zeros(2, dtype=parameter.dtype, device=parameter.device, requires_grad=parameter.is_floating_point())
    try:
        trial = kind([sample], fused=True)
        options = {name: value for name, value in group.items() if name in trial.defaults and name != "fused"}
        trial.param_groups[0].update(options)
        sample.grad = torch.zeros_like(sample)
        with torch.no_grad():
            inspect.unwrap(kind.step)(trial)  # past what is around it: whoever counts the steps of all optimizers
    except (RuntimeError, ValueError):  # NotImplementedError is a RuntimeError
        return False
    return True


class Fused:
    """What an optimizer was before it got its fused form. It does not hold the optimizer, which holds it.

    Args:
        optimizer: One that ``why_not`` finds nothing about.
        sparse: The ids of the parameters that get sparse gradients.
    """

    def __init__(self, optimizer: Optimizer, sparse: set[int]) -> None:
        self.sparse = sparse
        self.kind = next(kind for kind in KINDS if isinstance(optimizer, kind))
        self.before = [group["fused"] for group in optimizer.param_groups]
        self.default = optimizer.defaults["fused"]
        own = vars(optimizer)
        # tells the scaler that the kernel leaves all as it is where a gradient is infinite. Of the Adams that holds; of
        # SGD's momentum on CUDA it is reported not to. Without it the scaler itself leaves out the step
        self.scales = issubclass(self.kind, (Adam, AdamW)) and "_step_supports_amp_scaling" not in own
        if self.scales:
            own["_step_supports_amp_scaling"] = True
        optimizer.defaults["fused"] = True
        for group in optimizer.param_groups:
            group["fused"] = True
        self.fit_state(optimizer)
        self.hooks = [
            optimizer.register_state_dict_post_hook(self._saved),
            optimizer.register_load_state_dict_pre_hook(self._loads),
            optimizer.register_load_state_dict_post_hook(self.fit_state),
        ]
        self.optimizer: Callable[[], Any] = weakref.ref(optimizer)
        own["add_param_group"] = self._add_param_group
        if self.kind in (SGD, Adagrad):
            own["_init_group"] = self._init_group
        own[MARK] = self

    def undo(self) -> None:
        """Give the optimizer back in the form in which it was built."""
        optimizer = self.optimizer()
        own = vars(optimizer)
        for hook in self.hooks:
            hook.remove()
        for name in ("add_param_group", "_init_group", MARK):
            own.pop(name, None)
        if self.scales:
            del own["_step_supports_amp_scaling"]
        optimizer.defaults["fused"] = self.default
        self._put(optimizer.param_groups)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state.get(parameter, {})
                if isinstance(state.get("step"), Tensor) and not group.get("capturable"):
                    state["step"] = state["step"].to("cpu")  # where the other forms read it without a wait

    def fit_state(self, optimizer: Optimizer) -> None:
        """Bring the state into the shape that the kernels need: on the device, laid out like the parameters, complete."""
        for group in optimizer.param_groups:
            momentum = self.kind is SGD and group["momentum"]
            for parameter in group["params"]:
                if momentum and optimizer.state[parameter].get("momentum_buffer") is None:
                    # what a first step would leave there is the same from zero; without it torch's fused SGD cannot go on
                    # where one parameter gets its first gradient later than another
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
                state = optimizer.state.get(parameter, {})
                for name, value in state.items():
                    if name == "step":
                        state[name] = torch.as_tensor(value, dtype=torch.float32, device=parameter.device)
                    elif isinstance(value, Tensor) and value.shape == parameter.shape and _apart(value, parameter):
                        state[name] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)

    def _init_group(self, group: dict[str, Any], *lists: list[Any]) -> Any:
        """Gather what a step needs of a group, and see to it that the kernel can take it."""
        optimizer = self.optimizer()
        found = type(optimizer)._init_group(optimizer, group, *lists)  # noqa: SLF001  # torch's, for its own subclasses
        if found is True or (isinstance(found, tuple) and found[0]):
            # a gradient that no layer has announced; the step reads the form of the group after this
            self.undo()
            rank_zero_info(
                f"Trainer(fused_optimizers=True): {type(optimizer).__name__} goes on unfused: it has got sparse gradients."
            )
        elif self.kind is SGD:
            parameters, _, buffers = lists
            for index, buffer in enumerate(buffers):
                if buffer is None:  # a parameter, or the momentum, that came in the middle of a run: see fit_state
                    buffers[index] = torch.zeros_like(parameters[index], requires_grad=False)
        return found

    def _put(self, groups: list[dict[str, Any]]) -> None:
        """Write into ``groups`` what the optimizer was built with."""
        for number, group in enumerate(groups):
            group["fused"] = self.before[number] if number < len(self.before) else self.default

    def _saved(self, _: Optimizer, state: dict[str, Any]) -> None:
        self._put(state["param_groups"])

    def _loads(self, _: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        # not in place: what is loaded belongs to somebody else
        return {**state, "param_groups": [{**group, "fused": True} for group in state["param_groups"]]}

    def _add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take up a further group of parameters, as callbacks that thaw layers do in the middle of a fit."""
        optimizer = self.optimizer()
        own = param_group.get("fused", self.default)
        type(optimizer).add_param_group(optimizer, param_group)
        group = optimizer.param_groups[-1]
        group["fused"] = own
        self.before.append(own)
        why = None if own else _why_not_group(self.kind, group, self.sparse, set())
        if why is not None:
            self.undo()
            rank_zero_info(
                f"Trainer(fused_optimizers=True): {type(optimizer).__name__} goes on unfused with the parameters that were"
                f" added: {why}."
            )
            return
        group["fused"] = True
        self.fit_state(optimizer)


def _apart(value: Tensor, parameter: Tensor) -> bool:
    """Whether two tensors of one shape lie in memory in different orders."""
    return value.stride() != parameter.stride()
