# SPDX-License-Identifier: Apache-2.0
"""Whether a training step can be captured as a CUDA graph and replayed: asked before, during, and after one real step.

A replay repeats the work of the device and nothing of Python. What a step does beside it, such as counting in an
attribute, reading ``global_step`` or drawing a random number on the host, would happen once and never again. So a step is
watched while it runs for real, and whatever it does of that kind is a reason not to capture it.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Number
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from leyden.hooks import BY_NAME, is_written, names_in
from leyden.loops.session import Session
from leyden.module import LightningModule
from leyden.results import Store
from leyden.types import MetricLike

INSIDE = (
    "on_before_zero_grad", "optimizer_zero_grad", "on_before_backward", "backward", "on_after_backward",
    "on_before_optimizer_step", "configure_gradient_clipping", "optimizer_step",
)  # fmt: skip
"""Hooks that run in the middle of what is captured."""
_PLAIN = (bool, int, float, str, bytes, type(None))
_OURS = frozenset(vars(nn.Module())) - {"training"}
"""Attributes that every module has."""
_BASE = frozenset(vars(LightningModule())) - {"_hparams"}
"""Attributes that every LightningModule has, but for the hyperparameters, which a step may read."""
_OPAQUE = (nn.Module, type, FunctionType, ModuleType, MetricLike)
_DEPTH, _WIDTH = 2, 64
"""How deep, and how far, it is looked into attributes."""
_HOOKED = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
_STEP_HOOKED = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_GONE = object()
_MOVING = (
    "global_step", "current_epoch", "progress", "fit_loop", "should_stop", "logger", "loggers", "callback_metrics",
    "logged_metrics", "progress_bar_metrics", "is_last_batch", "history", "results", "callbacks",
)  # fmt: skip
"""What a step may find on the Trainer that is another thing in the next step, or that does something on the host."""


class Unfit(Exception):
    """Raised with the reason why a step cannot be captured."""


def obstacle(session: Session) -> str | None:
    """Return why no step of this fit can be captured, as far as that is known before one has run; None if it may be."""
    module, hooks, strategy, config = session.module, session.hooks, session.strategy, session.config
    if strategy.world_size > 1:
        return "several devices train together"
    if (count := session.trainer.batches_per_update) != 1:
        return f"an update takes {count} batches (accumulate_grad_batches)"
    if session.compilation is not None:
        # what is compiled takes numbers in and out past all that is watched here
        return "the run is compiled; compile={'mode': 'reduce-overhead'} makes torch's compiler record graphs itself"
    if config.detect_anomaly:
        return "detect_anomaly looks into every step"
    if getattr(strategy.precision, "scaler", None) is not None:
        return "precision='16-mixed' skips a step by what it finds in the gradients; 'bf16-mixed' does not"
    written = [name for name in INSIDE if getattr(hooks, name)]
    if not written and is_written(module, "clip_gradients", LightningModule):
        written = ["clip_gradients"]
    if written:
        return f"the hook {written[0]}() is written, and runs in the middle of the step"
    for name, layer in module.named_modules():
        if any(vars(layer).get(kind) for kind in _HOOKED):
            return f"hooks are registered on {name or 'the module'}"
    if any(vars(one).get(kind) for one in strategy.optimizers for kind in _STEP_HOOKED):
        return "hooks are registered on an optimizer"
    return None


def signature(node: Any, device: torch.device, tensors: list[Tensor]) -> Any:
    """Return what must be equal for two batches to take the same graph; add the tensors of this one to ``tensors``.

    Raises:
        Unfit: for a batch that holds something other than tensors on the device and plain values.
    """
    if isinstance(node, Tensor):
        if type(node) is not Tensor or node.layout is not torch.strided or node.requires_grad or node.is_nested:
            raise Unfit("a batch holds a tensor of a special kind")
        if node.device.type != device.type:
            raise Unfit(f"a batch holds a tensor on {node.device}")
        tensors.append(node)
        return node.shape, node.dtype, node.stride()
    if isinstance(node, Mapping):
        return type(node), tuple(node), tuple(signature(value, device, tensors) for value in node.values())
    if isinstance(node, (list, tuple)):
        return type(node), tuple(signature(value, device, tensors) for value in node)
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        names = [field.name for field in dataclasses.fields(node) if hasattr(node, field.name)]
        return type(node), tuple(signature(getattr(node, name), device, tensors) for name in names)
    if isinstance(node, _PLAIN):
        return type(node), node
    raise Unfit(f"a batch holds a {type(node).__name__}")


class Watch:
    """What a graph was captured with and does not look at again: plain attributes, options, and where tensors lie.

    Args:
        module: The module that is trained.
        optimizers: Its optimizers.
        free: The groups whose ``lr`` a graph reads anew each time.
        outside: Those of the optimizers that step after the graph, by the options that they have then.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Iterable[Optimizer],
        free: Iterable[dict[str, Any]] = (),
        outside: Iterable[Optimizer] = (),
    ) -> None:
        unread = {id(group) for group in free}
        after = {id(optimizer) for optimizer in outside}
        self._held: list[tuple[dict[str, Any], str, Any]] = []
        self._deep: list[tuple[dict[str, Any], str, list[Any]]] = []
        self._lists: list[tuple[list[Any], int]] = []
        read = _read_in(module)
        tensors: dict[int, Tensor] = {}
        for layer in _layers(module):
            attributes = vars(layer)
            for name, value in attributes.items():
                if name not in _OURS and isinstance(value, _PLAIN):
                    self._held.append((attributes, name, value))
                elif name not in _BASE and not read.isdisjoint((name, name.removeprefix("_"))):
                    self._deep.append((attributes, name, _contents(value)))
            for kind in ("_parameters", "_buffers"):
                for name, tensor in attributes.get(kind, {}).items():
                    self._held.append((attributes[kind], name, tensor))
                    if tensor is not None:
                        tensors[id(tensor)] = tensor
        for optimizer in optimizers:
            self._lists.append((optimizer.param_groups, len(optimizer.param_groups)))
            for group in optimizer.param_groups:
                self._lists.append((group["params"], len(group["params"])))
                tensors.update((id(parameter), parameter) for parameter in group["params"])
                for name, value in group.items() if id(optimizer) not in after else ():
                    if name != "params" and not (name == "lr" and id(group) in unread):
                        self._held.append((group, name, value))
        self._optimizers = [(optimizer, optimizer.param_groups) for optimizer in optimizers]
        self._tensors = list(tensors.values())
        self._where = self._places()

    def _places(self) -> list[Any]:
        return [(tensor.data_ptr(), tensor.requires_grad) for tensor in self._tensors]

    def changed(self) -> str | None:
        """Return the name of something that is not as it was, or None; this reads nothing from the device."""
        for place, name, value in self._held:
            now = place.get(name, _GONE)
            if now is not value and (type(now) is not type(value) or isinstance(value, Tensor) or now != value):
                return name
        for place, name, contents in self._deep:
            if name not in place or not _alike(contents, _contents(place[name])):
                return name
        for optimizer, groups in self._optimizers:
            if optimizer.param_groups is not groups:
                return "param_groups"
        if any(len(items) != count for items, count in self._lists):
            return "param_groups"
        return None if self._places() == self._where else "the place of a weight"

    def restore(self) -> None:
        """Put back what was set anew since."""
        for place, name, value in self._held:
            if place.get(name, _GONE) is not value:
                place[name] = value


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module and all in it but metric objects, which count whenever somebody else asks them to.

    A step that uses one leaves traces, and is not captured.
    """
    if not isinstance(module, MetricLike):
        yield module
        for child in module.children():
            yield from _layers(child)


class Traces:
    """What a step leaves behind in the attributes of a module and of its layers."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._before = _attributes(module)

    def changed(self) -> str | None:
        """Return the name of an attribute that the step has set, or whose content it has changed; None if there is none."""
        now = _attributes(self._module)
        for name in [*self._before, *(name for name in now if name not in self._before)]:
            before, after = self._before.get(name), now.get(name)
            if before is None or after is None or not _alike(before, after):
                return name
        return None


def _attributes(module: nn.Module) -> dict[str, list[Any]]:
    """Return every attribute by its name, with what it contains."""
    found: dict[str, list[Any]] = {}
    for path, layer in module.named_modules():
        for name, value in vars(layer).items():
            if name == "_buffers" or name not in _OURS:
                contents = list(value.values()) if name == "_buffers" else _contents(value)
                found[f"{path}.{name}".lstrip(".")] = [value, *contents]
    return found


def _contents(value: Any, depth: int = _DEPTH) -> list[Any]:
    """Return what is in a value, some levels down, in a flat list: of containers and of objects of the user's classes."""
    if isinstance(value, Tensor):
        # on the host a number of no dimensions becomes a constant of the graph, which writing into it does not change
        counted = value.device.type == "cpu" and not value.is_inference()
        return [value, value._version if counted else 0]  # noqa: SLF001  # torch has no public name for it
    inner: Iterable[Any]
    if isinstance(value, dict):
        inner = (part for pair in value.items() for part in pair)
    elif isinstance(value, (list, tuple, set, deque)):
        inner = value
    elif _is_theirs(value):
        value = vars(value)
        inner = (part for pair in value.items() for part in pair)
    else:
        return [value]
    if not depth or len(value) > _WIDTH:
        return [len(value)]
    return [len(value), *(leaf for part in inner for leaf in _contents(part, depth - 1))]


def _is_theirs(value: Any) -> bool:
    """Whether a value is an object of a class that neither torch nor this package has, and no metric."""
    known = type(value).__module__.partition(".")[0] in ("builtins", "functools", "leyden", "numpy", "torch")
    return not known and isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, _OPAQUE)


def _alike(before: list[Any], after: list[Any]) -> bool:
    # the objects themselves, which are alive: an id could be that of another one by now
    return len(before) == len(after) and all(
        old is new or (isinstance(old, _PLAIN) and type(old) is type(new) and old == new)
        for old, new in zip(before, after, strict=True)
    )


def _read_in(module: nn.Module) -> set[str]:
    """Return the names that the code of a module mentions, and that of its parts, but for hooks outside of the step."""
    found: set[str] = set()
    outside = {"__init__", *BY_NAME.keys() - {"training_step", *INSIDE}}
    for cls in {
        cls for part in module.modules() for cls in type(part).__mro__ if not cls.__module__.startswith("torch.")
    }:
        if cls not in LightningModule.__mro__:
            for name, method in vars(cls).items():
                found.update(names_in(method) if name not in outside else ())
    return found


class Spy:
    """Stands for the Trainer during one step: passes everything on, and notes what a replay would not see change.

    Args:
        trainer: The Trainer.
        more: Further names to note.

    Attributes:
        seen: The names that were read, or set.
    """

    def __init__(self, trainer: Any, more: Iterable[str] = ()) -> None:
        vars(self).update(_trainer=trainer, seen=[], _moving={*_MOVING, *more})

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._trainer)

    def __getattr__(self, name: str) -> Any:
        if name in vars(self)["_moving"]:
            self.seen.append(name)
        return getattr(vars(self)["_trainer"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.seen.append(name)
        setattr(self._trainer, name, value)


class Index(int):
    """The index of a batch that notes whether somebody computes with it."""

    used = False


def _noting(name: str) -> Any:
    plain = getattr(int, name)

    def call(self: Index, *args: Any) -> Any:
        self.used = True
        return plain(self, *args)

    return call


for _name in (
    "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__hash__", "__bool__", "__index__", "__int__", "__float__",
    "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__mod__", "__rmod__", "__floordiv__",
    "__rfloordiv__", "__truediv__", "__rtruediv__", "__pow__", "__rpow__", "__neg__", "__and__", "__rand__", "__str__",
    "__repr__", "__format__",
):  # fmt: skip
    setattr(Index, _name, _noting(_name))


Logs = list[tuple[str, Any, tuple[Any, ...]]]
"""Calls of ``self.log``: name, value, and the further arguments of ``Store.log``."""


@contextmanager
def noted(store: Store, logs: Logs, passes_on: bool) -> Iterator[None]:
    """For the length of the block, note what is logged; store it as well where it ``passes_on``.

    Raises:
        Unfit: unless it passes on, for a value whose course only Python knows.
    """
    real = store.log

    def log(name: str, value: Any, *rest: Any) -> None:
        if passes_on:
            logs.append((name, value, rest))
            real(name, value, *rest)
        elif isinstance(value, Tensor):
            # a copy: what the step does to its tensor afterwards must not change what was logged
            logs.append((name, value.detach().clone(), rest))
        elif isinstance(value, Number):
            logs.append((name, value, rest))
        else:
            raise Unfit(f"self.log({name!r}) is given a {type(value).__name__}, whose course only Python knows")

    vars(store)["log"] = log
    try:
        yield
    finally:
        del vars(store)["log"]


def host_values(logs: Logs, device: torch.device) -> dict[str, Any]:
    """Return, by name, the values that were logged from the host."""
    found = {}
    for name, value, _ in logs:
        if not isinstance(value, Tensor):
            found[name] = value
        elif value.device.type != device.type:
            found[name] = value.item()
    return found
