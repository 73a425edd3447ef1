# SPDX-License-Identifier: Apache-2.0
"""What Fabric passes on: who and where a process is, the exchanges between processes, callbacks and loggers."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from leyden.errors import MisconfigurationException
from leyden.runtime.devices import Accelerator
from leyden.runtime.ranks import rank_zero_info, rank_zero_warn
from leyden.runtime.seed import seed_everything
from leyden.strategies.base import Strategy
from leyden.tree import tree_map


class FabricFace:
    """The properties of Fabric, and its methods that a strategy, a callback or a logger answers."""

    _strategy: Strategy
    _accelerator: Accelerator
    _callbacks: list[Any]
    _loggers: list[Any]
    _launched: bool

    # ------------------------------------------------------------------ who and where

    @property
    def accelerator(self) -> Accelerator:
        """The kind of device."""
        return self._accelerator

    @property
    def strategy(self) -> Any:
        """How the work is spread over processes."""
        return self._strategy

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self._strategy.root_device

    @property
    def global_rank(self) -> int:
        """Index of this process among all."""
        return self._strategy.global_rank

    @property
    def local_rank(self) -> int:
        """Index of this process on its machine."""
        return self._strategy.local_rank

    @property
    def node_rank(self) -> int:
        """Index of this machine."""
        return self._strategy.node_rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self._strategy.world_size

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the process that writes."""
        return self._strategy.is_global_zero

    @property
    def loggers(self) -> list[Any]:
        """The loggers."""
        return self._loggers

    @property
    def logger(self) -> Any:
        """The first logger.

        Raises:
            IndexError: if there is none.
        """
        return self._loggers[0]

    def _check_launched(self, name: str) -> None:
        if (
            not self._launched
            and hasattr(self._strategy, "parallel_devices")
            and hasattr(self._strategy, "start_method")
        ):
            raise RuntimeError(
                f"Fabric.{name}(): {type(self._strategy).__name__} has {self.world_size} processes, which have not met yet."
                " Call fabric.launch() first, right after Fabric(...)."
            )

    # ------------------------------------------------------------------ between processes

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print in one process of each machine."""
        if self.local_rank == 0:
            print(*args, **kwargs)

    def barrier(self, name: str | None = None) -> None:
        """Wait for all processes."""
        self._check_launched("barrier")
        self._strategy.barrier(name=name)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return the object that process ``src`` has, whatever can be pickled."""
        self._check_launched("broadcast")
        return self._strategy.broadcast(obj, src=src)

    def all_gather(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """Gather a tensor, or a tree of tensors and numbers, from all processes.

        Args:
            data: Of the same shapes everywhere.
            group: Of processes; None is all.
            sync_grads: Whether gradients flow back to where the tensors came from.

        Returns:
            Tensors with a leading dimension of ``world_size``; with one process without it.
        """
        self._check_launched("all_gather")
        return self._strategy.all_gather(self._as_tensors(data), group=group, sync_grads=sync_grads)

    def all_reduce(self, data: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce a tensor, or a tree of tensors and numbers, over all processes; tensors are changed in place.

        Args:
            data: Of the same shapes everywhere.
            group: Of processes; None is all.
            reduce_op: ``"mean"``, ``"sum"``, or an operation of torch.distributed.
        """
        self._check_launched("all_reduce")

        def reduced(tensor: Tensor) -> Tensor:
            with torch.no_grad():
                result: Tensor = self._strategy.reduce(tensor, group=group, reduce_op=reduce_op)
                return tensor if result is tensor else tensor.copy_(result)

        return tree_map(reduced, self._as_tensors(data))

    def _as_tensors(self, data: Any) -> Any:
        def tensor(number: Any) -> Tensor:
            return number if isinstance(number, Tensor) else torch.tensor(number, device=self.device)

        return tree_map(tensor, data, (Tensor, bool, int, float))

    @contextmanager
    def rank_zero_first(self, local: bool = False) -> Iterator[None]:
        """Let rank 0 run the block alone, and then all others.

        Args:
            local: Let the first process of each machine go first, where machines have disks of their own.
        """
        rank = self.local_rank if local else self.global_rank
        if rank > 0:
            self.barrier("rank_zero_first")
        yield
        if rank == 0:
            self.barrier("rank_zero_first")

    # ------------------------------------------------------------------ callbacks and loggers

    def call(self, hook_name: str, *args: Any, **kwargs: Any) -> None:
        """Call the method ``hook_name`` of each callback that has one.

        Args:
            hook_name: Any name.
            *args: For the method.
            **kwargs: For the method; each callback gets those that its method takes.
        """
        for callback in self._callbacks:
            method = getattr(callback, hook_name, None)
            if method is None:
                continue
            if not callable(method):
                rank_zero_warn(
                    f"Fabric.call({hook_name!r}): {type(callback).__name__}.{hook_name} is no method; left out."
                )
                continue
            method(*args, **_accepted(method, kwargs))

    def log(self, name: str, value: Any, step: int | None = None) -> None:
        """Log one number to all loggers; see ``log_dict``."""
        self.log_dict({name: value}, step)

    def log_dict(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log numbers to all loggers, which write on rank 0.

        Args:
            metrics: Numbers, or tensors with one element, by name.
            step: What they belong to; None: loggers count.

        Raises:
            ValueError: for a tensor with more than one element.
        """
        numbers = tree_map(_as_number, dict(metrics))
        for logger in self._loggers:
            logger.log_metrics(metrics=numbers, step=step)

    @staticmethod
    def seed_everything(seed: int | None = None, workers: bool | None = None, verbose: bool = True) -> int:
        """Seed all random generators, those of data workers too unless ``workers=False``; return the seed."""
        return seed_everything(seed, workers=True if workers is None else workers, verbose=verbose)


def _accepted(method: Callable[..., Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    try:
        parameters = inspect.signature(method).parameters
    except (TypeError, ValueError):  # one that is not written in Python
        return kwargs
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return kwargs
    return {name: value for name, value in kwargs.items() if name in parameters}


def _as_number(tensor: Tensor) -> float | int:
    if tensor.numel() != 1:
        raise ValueError(
            f"A tensor of shape {tuple(tensor.shape)} was to be logged: it cannot be converted to a scalar. Log its mean,"
            " say."
        )
    return tensor.item()


def from_environment(name: str, given: Any, default: Any) -> Any:
    """Return the value of an argument of Fabric: what LT_<name> says, if it is set.

    Raises:
        MisconfigurationException: where a command line has set it, and the code says something else.
    """
    found = os.environ.get(f"LT_{name.upper()}")
    if found is None:
        return given
    if str(given) not in (found, str(default)):
        if is_started_by_cli():
            raise MisconfigurationException(
                f"Fabric({name}={given!r}): the command line says {found!r} (LT_{name.upper()}). Say it in one place only."
            )
        rank_zero_info(f"Fabric({name}={given!r}): {found!r} is taken, which LT_{name.upper()} says.")
    started = is_started_by_cli() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    # machines come and go: as many as are there
    return default if started and name in ("devices", "num_nodes") and found.isdigit() else found


def is_started_by_cli() -> bool:
    """Whether LT_CLI_USED says that a command line has started the processes."""
    return os.environ.get("LT_CLI_USED", "0") not in ("", "0")


def takes_arguments(function: Callable[..., Any]) -> bool:
    """Whether a function takes any argument, as far as it tells."""
    try:
        return bool(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # one that is not written in Python
        return True
