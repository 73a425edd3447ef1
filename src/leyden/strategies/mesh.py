# SPDX-License-Identifier: Apache-2.0
"""What all strategies share whose parameters are spread over a mesh of devices: each process has a part of a tensor.

Parameters are torch's DTensors while a run lasts. Checkpoints have whole, plain tensors under the names that one process
gives them, so that a file does not tell which strategy wrote it; and after a run the module is plain again.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from leyden.errors import MisconfigurationException
from leyden.loading import apply_state_dict, clean_names
from leyden.precision.base import CLIP_ALGORITHMS
from leyden.runtime.collective import average_flat, copy_flat
from leyden.runtime.ranks import rank_zero_info
from leyden.strategies.parts import Parts, steps_by_parts
from leyden.strategies.spread import ShardedCheckpoints, local, rebuilt
from leyden.strategies.turns import in_turn
from leyden.tree import parameters_of, tree_map

__all__ = ["DATA", "TENSOR", "MeshStrategy", "by_kind", "is_spread", "local", "rebuilt"]

DATA, TENSOR = "data_parallel", "tensor_parallel"
"""The dimensions of a mesh, as Lightning calls them: along one the data differ, along the other they are the same."""
_MESHES: dict[tuple[Any, ...], DeviceMesh] = {}
"""The meshes of this process: each has groups of its own, and every run of a script wants the same."""
_SHARE = " (share)"
"""Follows the name of a parameter of whose gradient a process has its share only."""
_CHUNK = 1 << 26
"""How many bytes are copied from rank 0 at a time."""


class MeshStrategy(ShardedCheckpoints):
    """Spreads parameters over a mesh of devices.

    A subclass says ``mesh_shape`` and ``spread``, and takes back in ``unspread`` what it has put on the module besides
    its parameters. All that is known here of a parameter is whether it is a DTensor. The arguments are those of
    ParallelStrategy.

    A module is plain outside a run, on every process and in host memory: ``model(x)`` and ``model.state_dict()`` are what
    they are with one process. It stays spread where the memory of the machine cannot hold it once for each process; it is
    then called on all ranks together, and the next run under a strategy of this kind takes it as it is.
    """

    _mesh: DeviceMesh | None = None
    _waits = False
    """Whether the module of this run has still to be spread."""
    _held: tuple[dict[str, Any], bool, str] | None = None
    """Weights that came before the module was spread."""
    _parts: dict[Optimizer, Parts] | None = None
    """What the optimizers of this run step on."""

    # ------------------------------------------------------------------ who and where

    def mesh_shape(self) -> dict[str, int]:
        """The dimensions of the mesh, in their order; ``"tensor_parallel"``, where there is one, comes last."""
        return {DATA: self.world_size}

    @property
    def device_mesh(self) -> DeviceMesh:
        """The mesh of all processes.

        Raises:
            RuntimeError: before the first run, when the processes have not met.
        """
        if self._mesh is None:
            raise RuntimeError(
                f"{type(self).__name__}.device_mesh is there from the beginning of a run: setup() has it."
            )
        return self._mesh

    @property
    def data_size(self) -> int:
        return self.world_size // self.mesh_shape().get(TENSOR, 1)

    @property
    def data_rank(self) -> int:
        return self.global_rank // self.mesh_shape().get(TENSOR, 1)

    def launch(self, interrupt: Any, progress: Any) -> None:
        super().launch(interrupt, progress)
        if self._mesh is None:
            self._mesh = self.make_mesh()

    def make_mesh(self) -> DeviceMesh:
        """Return the mesh of ``mesh_shape``; all processes are in it.

        Raises:
            MisconfigurationException: where it has another size than there are processes.
        """
        shape = self.mesh_shape()
        if math.prod(shape.values()) != self.world_size:
            sizes = " x ".join(f"{name}={size}" for name, size in shape.items())
            raise MisconfigurationException(
                f"{type(self).__name__}: {sizes} is {math.prod(shape.values())} processes, but there are"
                f" {self.world_size} (devices times num_nodes)."
            )
        key = (os.getpid(), self.root_device.type, *shape.items())
        if key not in _MESHES:
            _MESHES[key] = init_device_mesh(self.root_device.type, tuple(shape.values()), mesh_dim_names=tuple(shape))
        return _MESHES[key]

    # ------------------------------------------------------------------ the life of a module

    def connect(self, module: nn.Module) -> None:
        super().connect(module)
        self._waits, self._held, self._parts = True, None, None

    def turn_to(self, module: nn.Module) -> None:
        super().turn_to(module)
        self._waits, self._held = False, None

    @contextmanager
    def module_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        # a device may not have the memory for the whole: it gets its part when the module is spread
        with torch.device("meta") if empty_init else nullcontext(), self.precision.init_context():
            yield

    def place(self) -> None:
        """Nothing yet: a device may hold a part of the module only, and gets it in ``spread``."""

    def distribute(self, fitting: bool) -> None:
        module = self.module
        if not is_spread(module):
            if self.world_size > 1:
                _copy_from_rank_zero(module, self.root_device)
            self.spread(module, fitting)
            _bring(module, self.root_device)
        self._waits = False
        held, self._held = self._held, None
        if held is not None:
            self.load_module_state_dict(*held)

    def spread(self, module: nn.Module, fitting: bool) -> None:
        """Make DTensors on ``device_mesh`` of the parameters of ``module``, which has the same values on all ranks.

        Runs before ``configure_optimizers``. Weights of a checkpoint are loaded afterwards. Parameters that stay plain are
        brought to the device, and their gradients are averaged before each step.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how a module is spread.")

    def unspread(self, module: nn.Module) -> None:
        """Give ``module`` whole, plain parameters and buffers in host memory, on every rank; all ranks take part."""
        made: dict[int, Any] = {}
        for child in module.modules():
            own: list[tuple[str, Any]] = list(child.named_parameters(recurse=False, remove_duplicate=False))
            for name, parameter in own:
                if isinstance(parameter, DTensor):
                    if id(parameter) not in made:
                        whole = nn.Parameter(_whole(parameter).cpu(), parameter.requires_grad)
                        made[id(parameter)] = whole, parameter  # the id is taken as long as it is held
                    setattr(child, name, made[id(parameter)][0])
            for name, buffer in list(child.named_buffers(recurse=False, remove_duplicate=False)):
                if isinstance(buffer, DTensor):
                    setattr(child, name, _whole(buffer).cpu())
        module.to("cpu")

    def come_home(self) -> None:
        self._waits, self._held, self._parts = False, None, None
        module = self.module
        if not is_spread(module):
            module.to("cpu")
        elif self._alone:
            return  # the others do not take part any more
        elif self.reduce_boolean_decision(_fits(module, self.num_processes)):
            self.unspread(module)
            for optimizer in self.optimizers if self.root_device.type != "cpu" else ():
                for key, value in optimizer.state.items():
                    optimizer.state[key] = tree_map(self.at_home, value)
        else:
            rank_zero_info(
                f"{type(module).__name__} stays spread over {self.world_size} processes: the memory of this machine does not"
                " hold it once for each of them. Call it on all ranks together; its weights are whole in checkpoints."
            )

    def at_home(self, tensor: Tensor) -> Tensor:
        """Return a tensor with what this process has of it in host memory."""
        if not isinstance(tensor, DTensor):
            return tensor.cpu()
        mesh, whole = tensor.device_mesh, self.device_mesh
        names, all_names = mesh.mesh_dim_names or (), whole.mesh_dim_names or ()
        is_part = mesh != whole and bool(names) and set(names) < set(all_names)
        made = whole if is_part else mesh  # all processes take part in making one
        key = (os.getpid(), "home", id(made))
        if key not in _MESHES:  # the same processes, whose tensors are elsewhere
            _MESHES[key] = DeviceMesh("cpu", made.mesh, mesh_dim_names=made.mesh_dim_names)
        home = _MESHES[key][names] if is_part else _MESHES[key]
        return rebuilt(local(tensor).cpu(), tensor, home)

    # ------------------------------------------------------------------ steps

    def evaluating(self, inference: bool) -> AbstractContextManager[Any]:
        self.share_statistics()
        return torch.no_grad()  # the parts of a tensor are brought together in memory that training uses again

    def paced(self, batches: Iterator[tuple[Any, int, int]]) -> Iterator[tuple[Any, int, int]]:
        return batches if self.data_size == 1 else in_turn(self, batches, self.knows_the_step, self._without_exchanges)

    @contextmanager
    def _without_exchanges(self) -> Iterator[None]:
        self.hold_together()
        yield

    def knows_the_step(self) -> bool:
        """Whether this process knows the exchanges of a step of the evaluation that runs: it has run one itself."""
        return True

    def hold_together(self) -> None:
        """Make all exchanges of the next step now, the same on all ranks, so that it has none."""

    def exchange_gradients(self, optimizer: Optimizer) -> None:
        """Average the gradients of parameters that are not spread; runs before each step of an optimizer."""
        if self.world_size > 1 and not self._alone:
            self.average([p for p in parameters_of(optimizer) if not isinstance(p, DTensor)])

    def average(self, parameters: list[Any], group: Any = None) -> None:
        """Average the gradients of ``parameters`` over all processes, or those of a ``group``, in one exchange."""
        if not parameters:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        there = torch.tensor([float(p.grad is not None) for p in parameters]).to(self.root_device, non_blocking=True)
        average_flat([*map(local, grads), there], group)
        if any(p.grad is None for p in parameters):  # only then it is read, which waits for the device
            for parameter, gradient, count in zip(parameters, grads, there.tolist(), strict=True):
                parameter.grad = gradient if count else None

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any] | None = None, model: Any = None, **kwargs: Any
    ) -> Any:
        if closure is not None or not steps_by_parts(optimizer):
            return super().optimizer_step(optimizer, closure, **kwargs)
        if self._parts is None:
            self._parts = {}
        parts = self._parts.get(optimizer)
        if parts is None:
            parts = self._parts[optimizer] = Parts(optimizer)
        with parts.in_place():
            return super().optimizer_step(optimizer, None, **kwargs)

    def scale_gradients(self, optimizer: Optimizer, factor: Any) -> None:
        for together in by_kind(local(p.grad) for p in parameters_of(optimizer) if p.grad is not None):
            torch._foreach_mul_(together, factor)

    def clip_gradients(self, optimizer: Optimizer, value: float, algorithm: str) -> Tensor | None:
        self.precision.unscale(optimizer)
        grads = [p.grad for p in parameters_of(optimizer) if p.grad is not None]
        if (
            algorithm not in CLIP_ALGORITHMS
            or not value
            or value <= 0
            or not any(isinstance(g, DTensor) for g in grads)
        ):
            return self.precision.clip(parameters_of(optimizer), value, algorithm)
        if algorithm == "value":
            for together in by_kind(local(grad) for grad in grads):
                torch._foreach_clamp_max_(together, value)
                torch._foreach_clamp_min_(together, -value)
            return None
        return _scaled_down(grads, self.total_norm(grads), value)

    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        self.precision.unscale(optimizer)
        grads = [p.grad for p in parameters_of(optimizer) if p.grad is not None]
        if norm_type == 2.0 or not grads:
            norm = self.total_norm(grads)
        else:  # few ask: each tensor is brought together
            plain = [_whole(grad) if isinstance(grad, DTensor) else grad for grad in grads]
            each = [torch.linalg.vector_norm(grad, norm_type).to(self.root_device) for grad in plain]
            norm = torch.linalg.vector_norm(torch.stack(each), norm_type)
        if error_if_nonfinite and not bool(norm.isfinite()):
            raise RuntimeError(
                f"The total norm of order {norm_type} of the gradients is non-finite ({norm.item()}), so they were not"
                " clipped. error_if_nonfinite=False clips them nevertheless."
            )
        return _scaled_down(grads, norm, max_norm)

    def clip_gradients_value(self, module: nn.Module, optimizer: Optimizer, clip_val: float) -> None:
        self.clip_gradients(optimizer, clip_val, "value")

    def total_norm(self, tensors: Iterable[Tensor]) -> Tensor:
        """Return the norm of all ``tensors`` together, each of them whole: the same number as one process has.

        One exchange for each set of processes over which tensors are spread.

        Returns:
            A plain tensor without dimensions, on the device of this process; no wait for the device.
        """
        sums: dict[tuple[Any, ...], Tensor] = {}
        kinds: dict[tuple[Any, ...], list[Tensor]] = {}
        for tensor in tensors:
            groups: tuple[Any, ...] = ()
            if isinstance(tensor, DTensor):
                if any(placement.is_partial() for placement in tensor.placements):
                    settled = [Replicate() if p.is_partial() else p for p in tensor.placements]
                    tensor = tensor.redistribute(placements=settled)
                mesh = tensor.device_mesh
                groups = tuple(mesh.get_group(dim) for dim, p in enumerate(tensor.placements) if not p.is_replicate())
            part = local(tensor)
            kinds.setdefault((groups, part.device, part.dtype), []).append(part)
        for (groups, _, dtype), parts in kinds.items():
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            norms = torch._foreach_norm(parts, 2.0, wide)  # noqa: SLF001  # torch has no other name for it
            squares = torch.stack([norm.to(self.root_device) for norm in norms]).square().sum()
            sums[groups] = sums[groups] + squares if groups in sums else squares
        for groups, total in sums.items():
            for group in groups:
                dist.all_reduce(total, group=group)
        return torch.stack(list(sums.values())).sum().sqrt() if sums else torch.zeros((), device=self.root_device)

    # ------------------------------------------------------------------ checkpoints

    def module_state_dict(self) -> dict[str, Any]:
        """The whole weights, in host memory on rank 0; on other ranks, tensors without values in their place.

        Where checkpoints are written in shards, the weights as they are spread.
        """
        own = self.own_module_state()
        return own if self.saves_shards else self.whole(own)

    def own_module_state(self) -> dict[str, Any]:
        """The weights as they are spread: DTensors, of which this process has a part. Takes no exchange."""
        return clean_names(self.module.state_dict())

    def load_module_state_dict(self, state: dict[str, Any], strict: bool, source: str) -> None:
        """Load weights, whole or spread; before the module is spread, they are kept until it is."""
        if self._waits:
            self._held = state, strict, source
            return
        apply_state_dict(self.module, self.weights_for(state), strict, source)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state of one optimizer, in host memory on rank 0; on other ranks tensors without values.

        Where checkpoints are written in shards, the state as it is spread, with names of parameters for numbers.
        """
        own = self.own_optimizer_state(optimizer)
        return self.with_names(own, optimizer) if self.saves_shards else self.whole(own)

    def own_optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of one optimizer as it is spread: DTensors where it goes with a parameter. Takes no exchange."""
        return dict(optimizer.state_dict())

    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Load the state of one optimizer, whole or spread."""
        optimizer.load_state_dict(self.optimizer_parts(optimizer, state))

    def whole(self, tree: Any) -> Any:
        """Return ``tree`` with whole tensors in the place of DTensors: in host memory on rank 0, without values elsewhere.

        Tensors are brought together one at a time, and no other rank keeps them.
        """

        def of(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, DTensor):
                return tensor
            gathered = _whole(tensor)
            return gathered.cpu() if self.is_global_zero else torch.empty_like(gathered, device="meta")

        return tree_map(of, tree)

    def gradients(self) -> dict[str, Tensor]:
        return {
            name + _SHARE if isinstance(gradient, DTensor) else name: gradient if self.saves_shards else local(gradient)
            for name, gradient in super().gradients().items()
        }

    def load_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        owners: dict[str, Any] = {
            name + _SHARE if isinstance(parameter, DTensor) else name: parameter
            for name, parameter in self.module.named_parameters()
        }
        found = self.read_gradients(gradients, owners)
        for name, parameter in owners.items():
            part, gradient = local(parameter), found.get(name)
            if gradient is not None and local(gradient).shape == part.shape:
                gradient = local(gradient)  # where it was written in shards
                moved = gradient.to(part.device, part.dtype)
                parameter.grad = rebuilt(moved, parameter) if isinstance(parameter, DTensor) else moved


def _scaled_down(grads: list[Any], norm: Tensor, most: float) -> Tensor:
    """Scale gradients so that their total norm is at most ``most``; return what it was."""
    factor = torch.clamp(most / (norm + 1e-6), max=1.0)  # as torch.nn.utils.clip_grad_norm_ has it
    for together in by_kind(local(grad) for grad in grads):
        torch._foreach_mul_(together, factor.to(together[0].device))
    return norm


def is_spread(module: nn.Module) -> bool:
    """Whether any parameter of ``module`` is a DTensor."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def by_kind(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Return plain tensors in lists of one device and dtype each, as torch's fused operations want them."""
    kinds: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(kinds.values())


def _whole(tensor: DTensor) -> Tensor:
    with torch.no_grad():
        placements = list(tensor.placements)
        for dim in range(len(placements)):  # torch warns of all dimensions in one go
            placements[dim] = Replicate()
            tensor = tensor.redistribute(placements=placements)
        return tensor.full_tensor()


def _copy_from_rank_zero(module: nn.Module, device: torch.device) -> None:
    """Give the parameters and buffers of ``module`` the values that they have on rank 0, a few at a time."""
    batch: list[Tensor] = []
    size = 0
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_meta:
                continue
            batch.append(tensor.detach())
            size += tensor.nbytes
            if size >= _CHUNK:
                _copy(batch, device)
                batch, size = [], 0
        _copy(batch, device)


def _copy(tensors: list[Tensor], device: torch.device) -> None:
    there = [tensor.to(device) for tensor in tensors]
    copy_flat(there)
    for tensor, value in zip(tensors, there, strict=True):
        if value is not tensor:
            tensor.copy_(value)


def _bring(module: nn.Module, device: torch.device) -> None:
    """Bring to the device what has not been spread."""
    with torch.no_grad():
        for parameter in module.parameters():
            if not isinstance(parameter, DTensor):
                parameter.data = parameter.data.to(device)
        for child in module.modules():
            for name, buffer in list(child.named_buffers(recurse=False, remove_duplicate=False)):
                if not isinstance(buffer, DTensor):
                    setattr(child, name, buffer.to(device))


def _fits(module: nn.Module, processes: int) -> bool:
    """Whether half of the free memory of this machine holds the module once for each of its processes."""
    wanted = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters()) * processes
    return wanted <= _free_memory() / 2


def _free_memory() -> float:
    """Bytes of host memory that can be had; infinity where nobody tells."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return math.inf
