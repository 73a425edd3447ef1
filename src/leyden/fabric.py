# SPDX-License-Identifier: Apache-2.0
"""Fabric: the devices, processes and number formats of a Trainer for a training loop of the user's own."""

from __future__ import annotations

import copy
import functools
import os
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from leyden import wrappers
from leyden.config import SEMANTICS, default_semantics
from leyden.contents import Contents
from leyden.data import sharding
from leyden.errors import CheckpointError, MisconfigurationException, PossibleUserWarning
from leyden.fabric_face import FabricFace, from_environment, is_started_by_cli, takes_arguments
from leyden.loops import hardware
from leyden.runtime.devices import Accelerator
from leyden.runtime.ranks import rank_zero_deprecation, rank_zero_warn
from leyden.runtime.seed import given_seed, pl_worker_init_function, seeds_workers
from leyden.strategies.base import Strategy
from leyden.tree import move_to, parameters_of
from leyden.types import PathLike
from leyden.wrappers import _FabricDataLoader, _FabricModule, _FabricOptimizer, unwrapped

AFTER = 1.0
"""Seconds by which a process that fails after another one ends later: so that the first is seen first."""


class Fabric(FabricFace):
    """Runs a loop of one's own on any device, in any number format, on one process or many.

    ::

        fabric = Fabric(devices=2, precision="bf16-mixed")
        fabric.launch()
        model, optimizer = fabric.setup(model, optimizer)
        loader = fabric.setup_dataloaders(loader)
        for batch in loader:
            loss = model(batch)
            fabric.backward(loss)                 # in the place of loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    Args:
        accelerator: ``"cpu"``, ``"gpu"``, ``"cuda"``, ``"mps"``, ``"auto"``, or an Accelerator.
        strategy: A name such as ``"ddp"``, a Strategy, or ``"auto"``.
        devices: How many, which, or ``"auto"``; for each machine.
        num_nodes: How many machines.
        precision: As of the Trainer: ``"32-true"``, ``"bf16-mixed"`` …
        plugins: A Precision, a CheckpointIO, a cluster environment, or a list of them.
        callbacks: Objects whose methods ``call`` calls; one or a list.
        loggers: Where ``log`` logs; one or a list.

    The environment variables ``LT_ACCELERATOR``, ``LT_STRATEGY``, ``LT_DEVICES``, ``LT_NUM_NODES`` and ``LT_PRECISION``
    stand in for the first five.

    Raises:
        MisconfigurationException: for values that are not known, or that do not go together.
    """

    def __init__(
        self,
        *,
        accelerator: str | Accelerator = "auto",
        strategy: str | Strategy = "auto",
        devices: list[int] | str | int = "auto",
        num_nodes: int = 1,
        precision: str | int | None = None,
        plugins: Any = None,
        callbacks: Any = None,
        loggers: Any = None,
    ) -> None:
        nodes = from_environment("num_nodes", num_nodes, 1)
        chosen = {
            "given": from_environment("strategy", strategy, "auto"),
            "accelerator": from_environment("accelerator", accelerator, "auto"),
            "devices": from_environment("devices", devices, "auto"),
            "num_nodes": int(nodes) if isinstance(nodes, str) and nodes.isdigit() else nodes,
            "precision": from_environment("precision", precision, None),
        }
        try:
            self._strategy, self._accelerator = hardware.strategy(**chosen, plugins=plugins)
        except MisconfigurationException as error:
            raise type(error)(str(error).replace("Trainer(", "Fabric(")) from None
        self._callbacks: list[Any] = _as_list(callbacks)
        self._loggers: list[Any] = _as_list(loggers)
        self._contents = Contents(self._strategy)
        self._launched = False
        if self._loggers:
            weakref.finalize(self, _save_all, self._loggers)  # rows that are in memory when the program ends
        if is_started_by_cli():
            if type(self).run is not Fabric.run and default_semantics() == "lightning":
                raise TypeError(
                    f"{type(self).__name__}.run() is overridden, and LT_CLI_USED says that a command line has started the"
                    " processes: run the script by itself, or call the methods of Fabric without run()."
                )
            self._begin()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        run = vars(cls).get("run")
        if run is not None:
            cls.run = _launching(run)  # type: ignore[method-assign]

    # ------------------------------------------------------------------ processes

    def launch(self, function: Any = ..., *args: Any, **kwargs: Any) -> Any:
        """Start the processes that are missing, and meet them; call this once, before anything else.

        By default the script runs once more in each further process, and every line after this one runs in all of them.
        Under torchrun, SLURM or MPI they are there. On one device it does nothing.

        Args:
            function: Called as ``function(fabric, *args, **kwargs)`` in each process. ``"ddp_spawn"``, ``"ddp_fork"`` and
                ``"ddp_notebook"`` need one: they start processes for it alone.
            *args: For it.
            **kwargs: For it.

        Returns:
            What the function returned: in this process, or, where processes were started for it, on rank 0.

        Raises:
            TypeError: for something that cannot be called with a Fabric, or where a function is needed.
            RuntimeError: in a program that imports Lightning's Fabric, where LT_CLI_USED says that the processes are there.
        """
        if is_started_by_cli() and default_semantics() == "lightning":
            raise RuntimeError("LT_CLI_USED: a command line has started the processes. Leave Fabric.launch() out.")
        if function is ...:
            if self._strategy.spawns:
                raise TypeError(
                    f"Fabric.launch() needs to be called with a function: {type(self._strategy).__name__} starts processes"
                    " for one call. Use fabric.launch(function), or strategy='ddp', which runs the script in each."
                )
            self._begin()
            return None
        if not callable(function):
            raise TypeError(
                f"Fabric.launch(function={function!r}): it needs to be a callable: fabric.launch(train), not train()."
            )
        if not takes_arguments(function):
            raise TypeError(
                f"Fabric.launch(function={function!r}): it needs to take at least one argument, this Fabric."
            )
        return self._call_launched(function, args, kwargs)

    def _call_launched(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._strategy.spawns:
            given = {"model": (args, kwargs), "function": function, "args": args, "kwargs": kwargs}
            return self._strategy.run_elsewhere(self, "run_in_process", given)
        self._begin()
        return function(self, *args, **kwargs)

    def run_in_process(self, model: Any, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What one of the processes does that ``launch`` has started for a function; ``model`` is where modules may be."""
        self._begin()
        try:
            returned = function(self, *args, **kwargs)
        except BaseException as error:
            if self._strategy.fail(error, together=False):
                time.sleep(AFTER)
            raise
        self._strategy.barrier("Fabric.launch")
        self._strategy.land()
        return returned

    def _begin(self) -> None:
        """Meet the other processes, once."""
        if self._launched:
            return
        self._accelerator.setup_device(self.device)
        self._strategy.begin()
        self._launched = True
        followers = [logger for logger in self._loggers if hasattr(logger, "follow")] if self.world_size > 1 else []
        if followers:  # all name the folder in which rank 0 logs
            mine = [logger.version for logger in followers] if self.is_global_zero else []
            for logger, version in zip(followers, self._strategy.broadcast(mine), strict=True):
                logger.follow(version)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Override it with the whole loop, in a subclass: calling it launches the processes, and runs it in each."""

    # ------------------------------------------------------------------ set up

    def setup(
        self,
        module: nn.Module,
        *optimizers: Optimizer,
        scheduler: Any = None,
        move_to_device: bool = True,
        _reapply_compile: bool = True,
    ) -> Any:
        """Bring a module and its optimizers to the device, the number format and the processes.

        Args:
            module: Compiled or not; one that is compiled is compiled again, around what the strategy makes of it.
            *optimizers: Its optimizers; none, one or several.
            scheduler: A learning-rate schedule, returned as it is.
            move_to_device: False leaves the module where it is.

        Returns:
            The wrapped module; with optimizers a tuple of it, of them, and of the schedule if there is one.

        Raises:
            ValueError: for a module or optimizer that is set up already.
            TypeError: for what is neither.
            RuntimeError: before ``launch``, with several processes.
        """
        self._check_launched("setup")
        _check_optimizers("setup", optimizers)
        wrapper = self._wrapped("setup", module, optimizers, move_to_device, _reapply_compile)
        around = [
            _FabricOptimizer(self._strategy_optimizer(one), self._strategy, self._callbacks) for one in optimizers
        ]
        original = wrapper.module
        if around and hasattr(original, "_fabric_optimizers"):
            original._fabric_optimizers = list(around)  # noqa: SLF001  # a LightningModule has it for this
        self.call("on_after_setup", fabric=self, module=wrapper)
        if not around:
            return wrapper
        return (wrapper, *around) if scheduler is None else (wrapper, *around, scheduler)

    def setup_module(
        self, module: nn.Module, move_to_device: bool = True, _reapply_compile: bool = True
    ) -> _FabricModule:
        """Bring a module to the device, the number format and the processes; see ``setup``."""
        self._check_launched("setup_module")
        wrapper = self._wrapped("setup_module", module, (), move_to_device, _reapply_compile)
        self.call("on_after_setup", fabric=self, module=wrapper)
        return wrapper

    def setup_optimizers(self, *optimizers: Optimizer) -> Any:
        """Wrap optimizers of modules that are set up.

        Returns:
            The wrapped optimizer, or a tuple of them.

        Raises:
            ValueError: for none, or one that is set up already.
            RuntimeError: for one whose parameters have no memory (they are on the meta device).
        """
        self._check_launched("setup_optimizers")
        if not optimizers:
            raise ValueError("Fabric.setup_optimizers() requires at least one optimizer.")
        _check_optimizers("setup_optimizers", optimizers)
        for optimizer in optimizers:
            _check_memory("setup_optimizers", optimizer)
        around = [
            _FabricOptimizer(self._strategy_optimizer(one), self._strategy, self._callbacks) for one in optimizers
        ]
        return around[0] if len(around) == 1 else tuple(around)

    def _strategy_optimizer(self, optimizer: Optimizer) -> Any:
        set_up = getattr(self._strategy, "setup_optimizer", None)  # a strategy of the user's own may have one
        return optimizer if set_up is None else set_up(optimizer)

    def _wrapped(self, name: str, module: Any, optimizers: Any, move: bool, reapply: bool) -> _FabricModule:
        if isinstance(wrappers.uncompiled(module)[0], _FabricModule):
            raise ValueError(f"Fabric.{name}(): a module should be passed only once; this one is set up already.")
        if not isinstance(module, nn.Module):
            raise TypeError(f"Fabric.{name}(module={module!r}): it must be a torch.nn.Module.")
        original, compiler = wrappers.uncompiled(module) if reapply else (module, None)
        names = {parameter: key for key, parameter in original.named_parameters()} if optimizers else {}
        converted = self._strategy.precision.convert_module(original)
        if move:
            _warn_of_devices(converted)
            self._accelerator.setup_device(self.device)
            self._strategy.turn_to(converted)
            self._strategy.place()
        forward = self._strategy.setup_module(converted)
        for optimizer in optimizers:
            _follow(optimizer, names, dict(original.named_parameters()))
            _check_memory(name, optimizer)
        wrapper = _FabricModule(forward if compiler is None else compiler(forward), self._strategy, original)
        vars(wrapper)["_home"] = self.device if move else None
        self._contents.modules.append(weakref.ref(original))
        if hasattr(type(original), "fabric") and hasattr(original, "_fabric"):  # a LightningModule
            original.fabric = self
            if all(callback is not original for callback in self._callbacks):
                self._callbacks.append(original)
        return wrapper

    def setup_dataloaders(
        self, *dataloaders: Any, use_distributed_sampler: bool = True, move_to_device: bool = True, pad: bool = True
    ) -> Any:
        """Give each process its share of the loaders, and bring batches to the device.

        The order is the one that the loader would have in one process: all ranks draw it from the random state of rank 0,
        and each takes every n-th sample. So a pass over a loader that shuffles has to begin on all ranks.

        Args:
            *dataloaders: DataLoaders.
            use_distributed_sampler: False: each process goes through all of the loader.
            move_to_device: False leaves batches where they are.
            pad: Whether all ranks get as many samples, which training needs: the first ones may come twice. False, for
                evaluation: each sample comes once, and some ranks may have a batch less.

        Returns:
            The loader, or a list of them. The user's own stay as they are.

        Raises:
            ValueError: for none, or one that is set up already.
            TypeError: for something that is no DataLoader.
        """
        self._check_launched("setup_dataloaders")
        if not dataloaders:
            raise ValueError("Fabric.setup_dataloaders() requires at least one DataLoader.")
        for loader in dataloaders:
            if isinstance(loader, _FabricDataLoader):
                raise ValueError(
                    "Fabric.setup_dataloaders(): a loader should be passed only once; one is set up already."
                )
            if not isinstance(loader, DataLoader):
                raise TypeError(f"Fabric.setup_dataloaders() takes DataLoaders; it got a {type(loader).__name__}.")
        ready = [self._loader(loader, use_distributed_sampler, move_to_device, pad) for loader in dataloaders]
        return ready[0] if len(ready) == 1 else ready

    def _loader(self, loader: Any, shares: bool, moves: bool, pad: bool) -> _FabricDataLoader:
        strategy, begins = self._strategy, None
        rank, size = strategy.data_rank, strategy.data_size
        if shares and size > 1 and sharding.can_be_shared(loader):
            if pad and SEMANTICS[default_semantics()]["shared_order"] == "shuffled":
                shuffles = isinstance(loader.sampler, RandomSampler)
                loader = sharding.share_shuffled(loader, rank, size, given_seed(), shuffle=shuffles)
            else:
                loader = sharding.share(loader, rank, size, pad)
            share = sharding.share_of(loader)
            if share is not None and not isinstance(share.sampler, SequentialSampler):
                begins = partial(sharding.agree, [share], strategy.broadcast)
        if seeds_workers() and loader.num_workers > 0 and loader.worker_init_fn is None:
            loader = copy.copy(loader)
            loader.worker_init_fn = partial(pl_worker_init_function, rank=self.global_rank)
        return _FabricDataLoader(loader, self.device if moves else None, begins)

    # ------------------------------------------------------------------ in the loop

    def backward(self, tensor: Tensor, *args: Any, model: Any = None, **kwargs: Any) -> None:
        """Compute the gradients of a loss, scaled where the precision scales them; in the place of ``loss.backward()``.

        Args:
            tensor: The loss.
            *args: For ``Tensor.backward``.
            model: Accepted; every strategy finds its module itself.
            **kwargs: For ``Tensor.backward``.
        """
        wrappers.backward(self._strategy.backward, tensor, *args, **kwargs)

    def no_backward_sync(self, module: Any, enabled: bool = True) -> AbstractContextManager[Any]:
        """Return a context for accumulation: gradients of what runs in it, forward and backward, are not exchanged.

        Args:
            module: As ``setup`` returned it.
            enabled: False: they are.

        Raises:
            TypeError: for a module that is not set up.
        """
        wrapper = wrappers.uncompiled(module)[0]
        if not isinstance(wrapper, _FabricModule):
            raise TypeError(
                f"Fabric.no_backward_sync(): set up the {type(wrapper).__name__} first: model = fabric.setup(model)."
            )
        if not enabled:
            return nullcontext()
        forward = wrappers.uncompiled(vars(wrapper)["_run"])[0]
        return self._strategy.no_backward_sync(forward)

    def clip_gradients(
        self,
        module: Any,
        optimizer: Any,
        clip_val: float | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor | None:
        """Clip the gradients of the parameters of an optimizer, whatever their scale.

        Args:
            module: Whose gradients.
            optimizer: Whose parameters.
            clip_val: Clip each element to [-clip_val, clip_val].
            max_norm: Clip to this total norm; the same on all ranks.
            norm_type: The p of the norm.
            error_if_nonfinite: Whether a norm that is infinite or no number is an error.

        Returns:
            The norm before, with ``max_norm``; a tensor with one element.

        Raises:
            ValueError: for both of ``clip_val`` and ``max_norm``, or none of them.
            RuntimeError: for a norm that is not finite.
        """
        if (clip_val is None) == (max_norm is None):
            raise ValueError(
                f"Fabric.clip_gradients(clip_val={clip_val!r}, max_norm={max_norm!r}): give exactly one of the two."
            )
        module, optimizer = unwrapped(module), unwrapped(optimizer)
        wrappers.exchange(self._strategy, optimizer)
        if max_norm is None:
            self._strategy.clip_gradients_value(module, optimizer, clip_val=clip_val)  # type: ignore[arg-type]  # one of the two is given
            return None
        return self._strategy.clip_gradients_norm(
            module, optimizer, max_norm=max_norm, norm_type=norm_type, error_if_nonfinite=error_if_nonfinite
        )

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context for operations outside of the module's forward that are to run in the precision."""
        return self._strategy.precision.forward_context()

    def to_device(self, obj: Any) -> Any:
        """Return a module (the same object), a tensor, or a tree of tensors, on the device of this process."""
        if isinstance(obj, nn.Module):
            self._accelerator.setup_device(self.device)
            return obj.to(self.device)
        return move_to(obj, self.device)

    def init_tensor(self) -> AbstractContextManager[Any]:
        """Return a context in which tensors are made on the device and in the number format."""
        return self._strategy.tensor_init_context()

    def init_module(self, empty_init: bool | None = None) -> AbstractContextManager[Any]:
        """Return a context in which modules are made on the device and in the number format.

        Args:
            empty_init: True leaves the weights uninitialised (when a checkpoint follows).
        """
        self._check_launched("init_module")
        return self._strategy.module_init_context(empty_init=empty_init)

    def sharded_model(self) -> AbstractContextManager[Any]:
        """The former name of ``init_module``, for strategies that shard modules."""
        rank_zero_deprecation("Fabric.sharded_model() is the former name of Fabric.init_module(): use that.")
        self._check_launched("sharded_model")
        context: Any = getattr(self._strategy, "module_sharded_context", nullcontext)
        return context()  # type: ignore[no-any-return]

    # ------------------------------------------------------------------ checkpoints

    def save(
        self, path: PathLike, state: Mapping[str, Any], filter: Mapping[str, Callable[[str, Any], bool]] | None = None
    ) -> None:
        """Write a checkpoint, whole or not at all; to be called on all ranks.

        Args:
            path: Of the file; of a folder, where the strategy shards modules.
            state: Modules, optimizers and whatever has a ``state_dict`` are saved by it, also inside of dicts; the rest
                as it is. Plain data and tensors load without running code.
            filter: For a key of ``state``: which entries of its state to keep, as ``keep(name, value)``.

        Raises:
            TypeError: for a ``filter`` that is no dict of functions.
            ValueError: for a key of ``filter`` that is not in ``state``.
            CheckpointError: on every rank, where it cannot be written; what was there before is still there.
        """
        self._check_launched("save")
        if not isinstance(filter, (Mapping, type(None))):
            raise TypeError(f"Fabric.save(filter={filter!r}): it must be a dict of functions.")
        for key, keep in (filter or {}).items():
            if key not in state:
                raise ValueError(
                    f"Fabric.save(filter=...): {key!r} is not in the state, which has {sorted(map(str, state))}."
                )
            if not callable(keep):
                raise TypeError(
                    f"Fabric.save(filter=...): {key!r} must be a function of a name and a value, not {keep!r}."
                )
        found = {key: self._contents.take(value) for key, value in state.items()}
        for key, keep in (filter or {}).items():
            if isinstance(found[key], Mapping):
                found[key] = {name: value for name, value in found[key].items() if keep(name, value)}
        self._strategy.save_checkpoint(found, os.fspath(path))
        self._strategy.barrier("Fabric.save")

    def load(
        self,
        path: PathLike,
        state: dict[str, Any] | None = None,
        strict: bool = True,
        *,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint, and put its contents into ``state``; to be called on all ranks.

        Args:
            path: What ``save`` wrote; or any other checkpoint.
            state: Modules, optimizers and whatever has a ``load_state_dict`` are loaded in place; for the rest the dict
                gets new values. None: all is returned.
            strict: Whether all keys of ``state`` must be in the checkpoint, and all of a module's too.
            weights_only: False unpickles anything, which lets the file run code: only for files you trust.

        Returns:
            What is in the checkpoint beyond ``state``.

        Raises:
            KeyError: for a key that is missing, if ``strict``.
            CheckpointError: for a file that is damaged, does not fit, or would run code.
        """
        self._check_launched("load")
        found = self._strategy.load_checkpoint(os.fspath(path), weights_only)
        if not isinstance(found, Mapping):
            raise CheckpointError(f"{str(path)!r} holds a {type(found).__name__}, not a dict. Use fabric.load_raw().")
        rest = dict(found)
        if state:
            self._contents.put(rest, state, strict, str(path))
        self._strategy.barrier("Fabric.load")
        return rest

    def load_raw(self, path: PathLike, obj: Any, strict: bool = True, *, weights_only: bool | None = None) -> None:
        """Load a file with the state of one module or optimizer, that was written without Fabric.

        Args:
            path: Of the file.
            obj: The module or optimizer, wrapped or not.
            strict: Whether the keys of a module must match.
            weights_only: As in ``load``.

        Raises:
            TypeError: for an object without a state.
            CheckpointError: for a file that is damaged, does not fit, or would run code.
        """
        self._check_launched("load_raw")
        value = self._strategy.load_checkpoint(os.fspath(path), weights_only)
        if not self._contents.put_into(unwrapped(obj), value, strict, str(path)):
            raise TypeError(f"Fabric.load_raw(obj={obj!r}): it must be a module or an optimizer.")


def _launching(run: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(run)
    def launched(self: Fabric, *args: Any, **kwargs: Any) -> Any:
        if self._launched:
            return run(self, *args, **kwargs)
        return self._call_launched(_run, args, kwargs)

    return launched


def _run(fabric: Fabric, *args: Any, **kwargs: Any) -> Any:
    return fabric.run(*args, **kwargs)


def _as_list(given: Any) -> list[Any]:
    return list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]


def _save_all(loggers: list[Any]) -> None:
    for logger in loggers:
        save = getattr(logger, "save", None)
        if callable(save):
            save()


def _check_optimizers(name: str, optimizers: tuple[Any, ...]) -> None:
    for optimizer in optimizers:
        if isinstance(optimizer, _FabricOptimizer):
            raise ValueError(f"Fabric.{name}(): an optimizer should be passed only once; one is set up already.")
        if not hasattr(optimizer, "param_groups") or not callable(getattr(optimizer, "step", None)):
            raise TypeError(f"Fabric.{name}() takes optimizers; it got a {type(optimizer).__name__}.")


def _check_memory(name: str, optimizer: Any) -> None:
    if any(isinstance(p, Tensor) and p.is_meta for p in parameters_of(optimizer)):
        raise RuntimeError(
            f"Fabric.{name}(): parameters of the {type(optimizer).__name__} have no memory (they are on the meta device)."
            " Set up the module first, make the optimizer of its parameters then, and pass it to setup_optimizers()."
        )


def _follow(optimizer: Any, names: Mapping[Tensor, str], now: Mapping[str, Tensor]) -> None:
    """Let an optimizer train the parameters that have taken the place of those that it was made with."""
    for group in optimizer.param_groups:
        taken = [now.get(names[p], p) if p in names else p for p in group["params"]]
        if any(new is not old for new, old in zip(taken, group["params"], strict=True)):
            if optimizer.state:
                raise MisconfigurationException(
                    "Fabric.setup(): the strategy makes new parameters, and the optimizer has a state for the old ones. Set"
                    " up the module first, make the optimizer then, and load its state into it."
                )
            group["params"] = taken


def _warn_of_devices(module: nn.Module) -> None:
    places = {str(parameter.device): name for name, parameter in module.named_parameters()}
    if len(places) > 1:
        shown = ", ".join(f"{name!r} on {place}" for place, name in places.items())
        rank_zero_warn(
            f"Fabric.setup(): {type(module).__name__} has parameters on different devices ({shown}); all are moved to one."
            " With move_to_device=False they stay.",
            category=PossibleUserWarning,
        )
