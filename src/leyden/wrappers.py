# SPDX-License-Identifier: Apache-2.0
"""What Fabric puts around a module, an optimizer and a loader, so that a loop of the user's own need not change.

Each looks like what it wraps. In 32 bits on one device they do next to nothing.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from leyden.data.loaders import set_epoch
from leyden.precision import Precision
from leyden.strategies.base import Strategy
from leyden.strategies.through import Through
from leyden.tree import move_to, tree_map

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")
_SHORT = (torch.float16, torch.bfloat16)
_MISSING = object()
_backwards = 0
"""How many calls of ``Fabric.backward`` are under way."""


class _FabricModule(nn.Module):
    """A module whose forward goes through the strategy and the precision.

    Everything else is the module's own: attributes, methods, the names of parameters, ``state_dict``.

    Args:
        forward_module: What the forward goes through: the module, or what a strategy or torch.compile made of it.
        strategy: Whose precision the forward runs in.
        original_module: The user's module; None: ``forward_module`` is.
    """

    def __init__(self, forward_module: Any, strategy: Any, original_module: Any = None) -> None:
        super().__init__()
        precision = strategy.precision
        original = forward_module if original_module is None else original_module
        inner, compiler = uncompiled(forward_module)
        own = vars(self)
        own["_strategy"], own["_home"] = strategy, None
        own["_forward_methods"] = set(_STEPS)
        own["_plain"] = _changes_nothing(precision)
        own["_scaled"] = not own["_plain"] and needs_own_backward(strategy)
        parallel = hasattr(strategy, "assign")
        trains = isinstance(original, nn.Module) and any(p.requires_grad for p in original.parameters())
        own["_guards"] = inner is not original or (parallel and trains and strategy.world_size > 1)
        own["_redirects"] = inner is not original or compiler is not None or parallel or not own["_plain"]
        own["_compiler"], own["_compiled"] = compiler, {}
        super().__setattr__("_forward_module", forward_module)
        own["_run"] = forward_module  # past nn.Module's look-up, in each step
        own["_original_module"] = original

    @property
    def module(self) -> Any:
        """The user's module."""
        return vars(self)["_original_module"]

    @property
    def device(self) -> torch.device:
        """Where the first parameter or buffer is; without any, where the module was put."""
        for tensor in chain(self.parameters(), self.buffers()):
            return tensor.device
        return vars(self)["_home"] or torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point parameter or buffer; without any, torch's default."""
        for tensor in chain(self.parameters(), self.buffers()):
            if tensor.is_floating_point():
                return tensor.dtype
        return torch.get_default_dtype()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of the module in the precision; 16-bit outputs come back in torch's default dtype."""
        if self._plain:
            return self._run(*args, **kwargs)
        return self._in_precision(self._run, args, kwargs)

    def _in_precision(self, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        precision = self._strategy.precision
        if str(precision.precision).endswith("-mixed"):  # which knows what to do with 32 bits and fewer only
            args, kwargs = tree_map(_not_double, (args, kwargs))
        args, kwargs = precision.convert_input((args, kwargs))
        with precision.forward_context():
            output = run(*args, **kwargs)
        output = tree_map(_full, precision.convert_output(output))
        if self._scaled and torch.is_grad_enabled():
            tree_map(_guarded, output)
        return output

    # ------------------------------------------------------------------ methods beside forward

    def mark_forward_method(self, method: MethodType | str) -> None:
        """Let calls of a method go through the strategy and the precision, as those of ``forward`` do.

        Raises:
            TypeError: for what is neither a method nor a name.
            ValueError: for ``forward`` itself.
            AttributeError: if the module has no such method.
        """
        if not isinstance(method, (MethodType, str)):
            raise TypeError(f"mark_forward_method({method!r}): give a method of the module, or its name.")
        name = method if isinstance(method, str) else method.__name__
        if name == "forward":
            raise ValueError("mark_forward_method('forward'): the forward always goes through the strategy.")
        if not isinstance(getattr(self.module, name, None), MethodType):
            raise AttributeError(f"mark_forward_method({name!r}): {type(self.module).__name__} has no method {name!r}.")
        self._forward_methods.add(name)

    def _through_forward(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the module from inside the forward of what wraps it: there it stands in for the module's own."""
        original = self.module
        method = getattr(original, name)
        if self._compiler is not None:
            method = self._compiled.get(name) or self._compiled.setdefault(name, self._compiler(method))

        through = Through(original)
        through.step = method  # which may call forward itself
        try:
            return self._in_precision(uncompiled(self._run)[0], args, kwargs)
        finally:
            through.remove()

    def _watched(self, method: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Return the method, which must not run the forward of a module: it would go past the strategy."""

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            ran: list[nn.Module] = []
            original = self.module
            hooks = [part.register_forward_hook(lambda part, *_: ran.append(part)) for part in original.modules()]
            try:
                output = method(*args, **kwargs)
            finally:
                for hook in hooks:
                    hook.remove()
            if ran:
                raise RuntimeError(
                    f"{type(original).__name__}.{name}() was called from outside the module and ran the forward of"
                    f" {type(ran[0]).__name__}, past {type(self._strategy).__name__}: its gradients would not be exchanged."
                    f" Call model.mark_forward_method({name!r}) after fabric.setup()."
                )
            return output

        return call

    # ------------------------------------------------------------------ looks like the module

    def __getattr__(self, name: str) -> Any:
        own = vars(self)
        original = own.get("_original_module", _MISSING)
        if original is _MISSING or name == "_forward_module":
            return super().__getattr__(name)
        if own["_redirects"] and name in own["_forward_methods"] and hasattr(original, name):
            return partial(self._through_forward, name)
        value = getattr(original, name)
        return self._watched(value, name) if own["_guards"] and inspect.ismethod(value) else value

    def __setattr__(self, name: str, value: Any) -> None:
        original = vars(self).get("_original_module", _MISSING)
        own = original is _MISSING or name in vars(self) or hasattr(type(self), name)
        if original is not _MISSING and (not own or hasattr(original, name)):
            setattr(original, name, value)
        if own:
            super().__setattr__(name, value)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters, under the names that they have in the module."""
        yield from self.module.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """The buffers, under the names that they have in the module."""
        yield from self.module.named_buffers(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The state of the module, under its own names."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load the state of the module."""
        return self.module.load_state_dict(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _FabricModule:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        kept = {"_strategy": self._strategy, "_compiler": self._compiler, "_compiled": {}}
        vars(copied).update({k: kept[k] if k in kept else copy.deepcopy(v, memo) for k, v in vars(self).items()})
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as the module and its precision: processes stay behind."""
        return _module_again, (self.module, self._strategy.precision, sorted(self._forward_methods))


def _module_again(module: nn.Module, precision: Precision, methods: list[str]) -> _FabricModule:
    wrapper = _FabricModule(module, Strategy("cpu", precision))
    wrapper._forward_methods.update(methods)  # noqa: SLF001  # it was made here
    return wrapper


def _changes_nothing(precision: Any) -> bool:
    names = ("convert_input", "convert_output", "forward_context")
    return all(
        name not in vars(precision) and getattr(type(precision), name, None) is getattr(Precision, name)
        for name in names
    )


def needs_own_backward(strategy: Any) -> bool:
    """Whether ``loss.backward()`` by itself would give wrong gradients: they are scaled, or the strategy's affair."""
    precision = strategy.precision
    if type(strategy).backward is not Strategy.backward or type(precision).backward is not Precision.backward:
        return True
    return type(precision).scale is not Precision.scale and getattr(precision, "scaler", True) is not None


def _not_double(tensor: Tensor) -> Tensor:
    return tensor.to(torch.get_default_dtype()) if tensor.dtype == torch.float64 else tensor


def _full(tensor: Tensor) -> Tensor:
    return tensor.to(torch.get_default_dtype()) if tensor.dtype in _SHORT else tensor


def _guarded(tensor: Tensor) -> Tensor:
    if tensor.requires_grad:
        tensor.register_hook(_check_backward)  # type: ignore[no-untyped-call]
    return tensor


def _check_backward(*_: Tensor) -> None:
    if not _backwards:
        raise RuntimeError(
            "loss.backward() was called where the precision scales gradients: they would be wrong. Call"
            " fabric.backward(loss)."
        )


def backward(run: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Call ``run``, a backward of a strategy, as what ``needs_own_backward``."""
    global _backwards
    _backwards += 1
    try:
        run(*args, **kwargs)
    finally:
        _backwards -= 1


def exchange(strategy: Any, optimizer: Any) -> None:
    """Average gradients that were not averaged while they were computed; doing it twice changes nothing."""
    average = getattr(strategy, "exchange_gradients", None)
    if average is not None:
        average(optimizer)


class _FabricOptimizer:
    """An optimizer whose step goes through the strategy and the precision. It is an instance of the optimizer's class.

    Args:
        optimizer: The user's.
        strategy: Through which it steps.
        callbacks: Those with ``on_after_optimizer_step(strategy, optimizer)`` hear of each step.
    """

    def __new__(cls, optimizer: Any, *_: Any, **__: Any) -> _FabricOptimizer:
        like: Any = _class_like
        made: _FabricOptimizer = object.__new__(like(cls, optimizer.__class__))
        return made

    def __init__(self, optimizer: Any, strategy: Any, callbacks: list[Any] | None = None) -> None:
        vars(self).update(_optimizer=optimizer, _strategy=strategy, _callbacks=[] if callbacks is None else callbacks)
        vars(self)["_exchanges"] = getattr(strategy, "exchange_gradients", None) is not None

    @property
    def optimizer(self) -> Any:
        """The user's optimizer."""
        return vars(self)["_optimizer"]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters, unless gradients that were scaled are not finite; return what the optimizer returned."""
        optimizer = self._optimizer
        if self._exchanges and closure is None:
            exchange(self._strategy, optimizer)
        if closure is None:
            output = self._strategy.optimizer_step(optimizer)
        else:
            output = self._strategy.optimizer_step(optimizer, closure=closure)
        for callback in self._callbacks:
            hook = getattr(callback, "on_after_optimizer_step", None)
            if callable(hook):
                hook(strategy=self._strategy, optimizer=optimizer)
        return output

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """As the optimizer's."""
        self._optimizer.zero_grad(*args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizer, as the strategy keeps it."""
        state: dict[str, Any] = self._strategy.optimizer_state(self._optimizer)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the state of the optimizer."""
        self._strategy.load_optimizer_state(self._optimizer, dict(state_dict))

    def __getattr__(self, name: str) -> Any:
        if "_optimizer" not in vars(self):
            raise AttributeError(name)
        return getattr(vars(self)["_optimizer"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        # a learning-rate schedule puts a step of its own on what it was given, and that one is ours
        if name != "step" and name in getattr(self._optimizer, "__dict__", ()):
            setattr(self._optimizer, name, value)
        else:
            vars(self)[name] = value

    def __deepcopy__(self, memo: dict[int, Any]) -> _FabricOptimizer:
        return _FabricOptimizer(copy.deepcopy(self._optimizer, memo), self._strategy, self._callbacks)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as the optimizer and the precision: processes and callbacks stay behind."""
        return _optimizer_again, (self._optimizer, self._strategy.precision)


@functools.cache
def _class_like(base: type, kind: type) -> type:
    return type(f"Fabric{kind.__name__}", (base, kind), {"__module__": base.__module__})


def _optimizer_again(optimizer: Optimizer, precision: Precision) -> _FabricOptimizer:
    return _FabricOptimizer(optimizer, Strategy("cpu", precision))


class _FabricDataLoader:
    """A loader whose batches arrive on a device. Samplers that want to know the epoch are told: 0, 1, 2 … by passes.

    Args:
        dataloader: The user's, or its share.
        device: Where batches go; None leaves them where they are.
        begins: Called at the beginning of each pass.
    """

    def __init__(self, dataloader: Any, device: torch.device | None = None, begins: Callable[[], None] | None = None):
        self._dataloader, self._device, self._begins = dataloader, device, begins
        self._num_iter_calls = self._told = 0

    @property
    def device(self) -> torch.device | None:
        """Where batches go; None: they stay where they are."""
        return self._device

    def __len__(self) -> int:
        return len(self._dataloader)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next pass is, for a loop that goes on with another one."""
        self._num_iter_calls = epoch

    def _tell_epoch(self) -> None:
        loader = self._dataloader
        for part in (
            getattr(loader, "sampler", None),
            getattr(getattr(loader, "batch_sampler", None), "sampler", None),
        ):
            said = getattr(part, "epoch", None)
            if type(said) is int and said not in (self._told, self._num_iter_calls):
                self._num_iter_calls = said  # by the user
                break
        self._told = self._num_iter_calls
        self._num_iter_calls += 1
        set_epoch(loader, self._told)

    def __iter__(self) -> Iterator[Any]:
        self._tell_epoch()
        if self._begins is not None:
            self._begins()
        device = self._device
        if device is None:
            yield from self._dataloader
            return
        for batch in self._dataloader:
            yield batch if _is_there(batch, device) else move_to(batch, device)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_dataloader" not in vars(self):
            raise AttributeError(name)
        return getattr(self._dataloader, name)


def _is_there(batch: Any, device: torch.device) -> bool:
    """Whether a plain list of tensors, the batch of most loaders, is on ``device`` already."""
    if type(batch) is list:
        return all(type(item) is Tensor and item.device == device for item in batch)
    return type(batch) is Tensor and batch.device == device


def uncompiled(obj: Any) -> tuple[Any, Any]:
    """Return the module in what torch.compile returned for it, and what compiles another one in the same way, or None."""
    inner = vars(obj).get("_modules", {}).get("_orig_mod") if isinstance(obj, nn.Module) else None
    return (obj, None) if inner is None else (inner, obj.dynamo_ctx)


def unwrapped(obj: Any) -> Any:
    """Return the user's module, optimizer or loader in what Fabric or torch.compile made of it; else ``obj``."""
    inner = uncompiled(obj)[0]
    if isinstance(inner, _FabricModule):
        return inner.module
    if isinstance(obj, _FabricOptimizer):
        return obj.optimizer
    if isinstance(obj, _FabricDataLoader):
        return obj._dataloader  # noqa: SLF001  # of this file
    return inner


def is_wrapped(obj: object) -> bool:
    """Whether Fabric has set up a module, an optimizer or a loader."""
    return isinstance(uncompiled(obj)[0], (_FabricModule, _FabricOptimizer, _FabricDataLoader))
