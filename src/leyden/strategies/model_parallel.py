# SPDX-License-Identifier: Apache-2.0
"""Parallelism that a module applies to itself, in ``configure_model``, over a mesh of devices with two dimensions."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from leyden.errors import LeydenWarning, MisconfigurationException
from leyden.hooks import is_written
from leyden.module import LightningModule
from leyden.runtime.collective import copy_flat
from leyden.runtime.ranks import rank_zero_warn
from leyden.runtime.seed import isolate_rng
from leyden.strategies.fully_sharded import come_apart, sharded_layers
from leyden.strategies.mesh import DATA, TENSOR, MeshStrategy, is_spread, local
from leyden.strategies.tensor_parallel import TensorParallelStrategy, bring, checked_size, generators, put_generators


class ModelParallelStrategy(TensorParallelStrategy):
    """Gives ``configure_model`` a mesh, over which the module splits and shards itself by torch's own functions.

    ::

        def configure_model(self):
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], {"fc1": ColwiseParallel(), ...})
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    Processes along ``"tensor_parallel"`` get the same batches. After a run the module stays as ``configure_model`` made it:
    further runs do not call that again, checkpoints are whole. Build large layers under ``torch.device("meta")``: they come
    to the device when they are split, and are filled by their ``reset_parameters``, or from the checkpoint.

    Args:
        data_parallel_size: How many shares of the data there are; ``"auto"``: what ``tensor_parallel_size`` leaves, or one
            for each machine.
        tensor_parallel_size: How many devices work on one batch; ``"auto"``: what ``data_parallel_size`` leaves, or all of
            one machine.
        save_distributed_checkpoint: Whether a checkpoint is a folder to which each process writes its part, or one file.
        process_group_backend: torch's name for how tensors travel; None is NCCL for GPUs and Gloo for CPUs.
        timeout: After how long an exchange that not all ranks take part in is an error.
        parallelize_fn: For Fabric, in the place of ``configure_model``: called as ``parallelize_fn(module, device_mesh)``,
            returns the module that is split and sharded.

    Raises:
        MisconfigurationException: for sizes that are not possible.
    """

    strategy_name = "model_parallel"

    def __init__(
        self,
        data_parallel_size: str | int = "auto",
        tensor_parallel_size: str | int = "auto",
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30),
        parallelize_fn: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        super().__init__(
            None,
            tensor_parallel_size,
            process_group_backend=process_group_backend,
            timeout=timedelta(minutes=30) if timeout is None else timeout,
        )
        self.data_parallel_size = checked_size(type(self).__name__, "data_parallel_size", data_parallel_size)
        self.parallelize_fn = parallelize_fn
        self._anew = False
        """Whether ``configure_model`` runs in this run."""
        self.save_distributed_checkpoint = self.saves_shards = bool(save_distributed_checkpoint)

    def assign(self, devices: list[torch.device], num_nodes: int) -> None:
        MeshStrategy.assign(self, devices, num_nodes)
        shape = self.mesh_shape()
        if shape[DATA] * shape[TENSOR] != self.world_size:
            raise MisconfigurationException(
                f"{type(self).__name__}(data_parallel_size={self.data_parallel_size!r},"
                f" tensor_parallel_size={self.tensor_parallel_size!r}) are {shape[DATA]} x {shape[TENSOR]} processes, but there"
                f" are {self.world_size} (devices times num_nodes). One of the two may be 'auto'."
            )

    def _size(self) -> int:
        data, tensor = self.data_parallel_size, self.tensor_parallel_size
        if isinstance(tensor, int):
            return tensor
        return max(self.world_size // data, 1) if isinstance(data, int) else self.num_processes

    def mesh_shape(self) -> dict[str, int]:
        size, data = self._size(), self.data_parallel_size
        return {DATA: data if isinstance(data, int) else max(self.world_size // size, 1), TENSOR: size}

    def connect(self, module: nn.Module) -> None:
        if not is_written(module, "configure_model", LightningModule):
            raise TypeError(
                f"When using the {type(self).__name__}, you are required to override the `configure_model()` hook of"
                f" {type(module).__name__} and apply parallelization there. strategy='tensor_parallel' and 'fsdp' take any"
                " module as it is."
            )
        super().connect(module)

    def setup_module(self, module: nn.Module) -> nn.Module:
        if self.parallelize_fn is None:
            raise TypeError(
                f"Fabric.setup() needs to know how {type(self).__name__} is to split {type(module).__name__}: pass"
                " parallelize_fn=..., a function of the module and the mesh that applies torch's parallelize_module and"
                " fully_shard. strategy='tensor_parallel' and 'fsdp' take any module as it is."
            )
        made = self.parallelize_fn(module, self.device_mesh)
        if not isinstance(made, nn.Module):
            raise TypeError(
                f"{type(self).__name__}(parallelize_fn=...) must return the module that it was given, split; it returned a"
                f" {type(made).__name__}."
            )
        self.turn_to(made)
        self._anew = True
        self.distribute(fitting=any(parameter.requires_grad for parameter in made.parameters()))
        return self.entered(made)

    def builds(self) -> bool:
        self._anew = not is_spread(self.module)
        return self._anew

    def distribute(self, fitting: bool) -> None:
        if self._anew:
            self._complete(self.module)
        super().distribute(fitting)

    def _complete(self, module: nn.Module) -> None:
        """Do what is left to do when ``configure_model`` has split and sharded the module."""
        self._anew = False
        self._fill(module)
        plain = [tensor for tensor in (*module.parameters(), *module.buffers()) if not isinstance(tensor, DTensor)]
        bring(plain, self.root_device)
        if self.world_size > 1 and plain:
            with torch.no_grad():
                copy_flat([tensor.detach() for tensor in plain])
        if sharded_layers(module):
            # what the module has sharded of itself is then brought together and let go of as fsdp does it
            self.stand_around(module, partial(fully_shard, mesh=self.data_mesh()), set(module.parameters()))

    def _fill(self, module: nn.Module) -> None:
        """Give memory to what is on the meta device, and the values that ``reset_parameters`` of its layer gives it.

        Layer by layer these are the values of one process, of which each process keeps its part.
        """
        empty = [(name, child) for name, child in module.named_modules() if any(t.is_meta for t in _own(child))]
        if not empty:
            return
        unfilled: list[str] = []
        state = self.broadcast(generators(self.root_device))
        with isolate_rng(), torch.no_grad():
            put_generators(state, self.root_device)
            for name, child in empty:
                child.to_empty(device=self.root_device, recurse=False)
                if callable(getattr(child, "reset_parameters", None)):
                    self._reset(child)
                else:
                    unfilled.append(f"{name} ({type(child).__name__})")
        if unfilled and self._held is None:
            rank_zero_warn(
                f"These layers were built on the meta device and have no reset_parameters(): {', '.join(unfilled[:8])}. Load a"
                " checkpoint, or their values are whatever memory held.",
                category=LeydenWarning,
            )

    def _reset(self, layer: Any) -> None:
        spread = {name: p for name, p in layer.named_parameters(recurse=False) if isinstance(p, DTensor)}
        for name, parameter in spread.items():
            # what an instance has itself comes before its parameters
            vars(layer)[name] = nn.Parameter(
                torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            )
        try:
            layer.reset_parameters()
        finally:
            values = {name: vars(layer).pop(name).detach() for name in spread}
        for name, part in self.parts(values, spread, strict=True).items():
            local(spread[name]).copy_(local(part))

    def spread(self, module: nn.Module, fitting: bool) -> None:
        """The module has not spread anything: it is whole on each process, as with ddp."""

    def _call(self, step: Callable[..., Any], *args: Any) -> Any:
        if self._root is None or not isinstance(self.module, FSDPModule):
            return super()._call(step, *args)
        module: Any = self.module
        former = vars(module).get("forward")

        def restore() -> None:
            vars(module).pop("forward", None)
            if former is not None:
                vars(module)["forward"] = former

        def once(*args: Any) -> Any:
            restore()
            return step(*args)

        def through(*args: Any) -> Any:
            # a call of the module brings its own weights together, for a step that calls its layers one by one
            vars(module)["forward"] = once
            try:
                return module(*args)
            finally:
                restore()

        return super()._call(through, *args)

    def knows_the_step(self) -> bool:
        return super().knows_the_step() and not isinstance(self.module, FSDPModule)

    def unspread(self, module: nn.Module) -> None:
        come_apart(module)  # only its own code could split it anew


def _own(layer: nn.Module) -> list[torch.Tensor]:
    return [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
