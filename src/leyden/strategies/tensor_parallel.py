# SPDX-License-Identifier: Apache-2.0
"""Several devices work on one batch: the weights of large layers are split over them, and each computes its part.

With fewer devices in such a group than there are, the groups share out the data, and parameters are sharded over them too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from leyden.errors import MisconfigurationException, did_you_mean
from leyden.precision import Precision
from leyden.runtime.collective import average_flat
from leyden.runtime.ranks import rank_zero_info
from leyden.runtime.seed import rng_state, set_rng_state
from leyden.strategies import units
from leyden.strategies.base import Strategy
from leyden.strategies.fsdp import FSDPStrategy
from leyden.strategies.mesh import DATA, TENSOR, local
from leyden.strategies.tensor.automatic import find
from leyden.strategies.tensor.layers import WORDS, Layers, Region
from leyden.strategies.tensor.plan import checked, described, resolved
from leyden.strategies.tensor.trial import try_out
from leyden.tree import leaves, parameters_of

_SHARDING = (
    "accelerator", "cluster_environment", "auto_wrap_policy", "mixed_precision", "cpu_offload",
    "activation_checkpointing", "activation_checkpointing_policy", "state_dict_type", "ignored_modules", "ignored_states",
)  # fmt: skip
_MIXED = "got mixed torch.Tensor and DTensor"


class TensorParallelStrategy(FSDPStrategy):
    """Splits layers over devices that work on one batch together.

    ::

        Trainer(accelerator="gpu", devices=8, strategy="tensor_parallel")
        Trainer(devices=8, strategy=TensorParallelStrategy({"*.fc1": "colwise", "*.fc2": "rowwise"}, tensor_parallel_size=4))

    Args:
        plan: How layers are split: their names in the module, with ``*`` for anything, and ``"colwise"``,
            ``"colwise_gather"``, ``"rowwise"``, ``"rowwise_split"``, ``"sequence"``, ``"replicate"``, or a ParallelStyle of
            ``torch.distributed.tensor.parallel``; of two that name one layer the later counts. None finds a plan, and tries
            out where activations may stay split. The plan of a run is in ``trainer.strategy.plan``.
        tensor_parallel_size: How many devices work on one batch. ``"auto"``: all of one machine. Where that is fewer than
            there are, the others get other batches, and parameters are sharded over them as by ``fsdp``.
        parallel_devices: One device for each process of this machine; None takes the Trainer's.
        precision_plugin: The number format; None is the Trainer's.
        checkpoint_io: As in the base class.
        process_group_backend: torch's name for how tensors travel; None is NCCL for GPUs and Gloo for CPUs.
        timeout: After how long an exchange that not all ranks take part in is an error.
        start_method: As for DDPStrategy.
        **kwargs: How parameters are sharded over groups, as for FSDPStrategy: ``auto_wrap_policy``, ``mixed_precision``,
            ``cpu_offload``, ``activation_checkpointing_policy``, ``state_dict_type``.

    Raises:
        MisconfigurationException: for a way to split that is not known, or a size that does not divide the devices.
    """

    strategy_name = "tensor_parallel"

    def __init__(
        self,
        plan: Mapping[str, Any] | None = None,
        tensor_parallel_size: str | int = "auto",
        parallel_devices: list[torch.device] | None = None,
        precision_plugin: Precision | None = None,
        checkpoint_io: Any = None,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        start_method: Any = "popen",
        **kwargs: Any,
    ) -> None:
        _check_kwargs(type(self).__name__, kwargs)
        super().__init__(
            parallel_devices=parallel_devices, precision_plugin=precision_plugin, checkpoint_io=checkpoint_io,
            process_group_backend=process_group_backend, timeout=timeout, start_method=start_method, **kwargs,
        )  # fmt: skip
        self._given = None if plan is None else checked(plan)
        self.plan: dict[str, Any] = dict(self._given or {})
        """How each layer is split: what was given, and from the beginning of a run what has come of it."""
        self.tensor_parallel_size = checked_size(type(self).__name__, "tensor_parallel_size", tensor_parallel_size)
        self._split: Layers | None = None
        self._told: str | None = None
        self._metrics: list[Any] = []
        self._compared = True
        self._adds_up = True
        """Whether a gradient may be the sum of what devices have of it: of layers that see a part of the sequence each."""
        self._all_words = False
        """Whether all that is split computes with plain tensors outside of its layers."""

    def why_no_join(self) -> str | None:
        return Strategy.why_no_join(self)

    # ------------------------------------------------------------------ who and where

    def assign(self, devices: list[torch.device], num_nodes: int) -> None:
        super().assign(devices, num_nodes)
        size = self._size()
        if self.world_size % size:
            raise MisconfigurationException(
                f"{type(self).__name__}(tensor_parallel_size={self.tensor_parallel_size!r}): groups of {size} cannot be made"
                f" of {self.world_size} processes (devices times num_nodes). Take one of {_divisors(self.world_size)}."
            )

    def _size(self) -> int:
        wanted = self.tensor_parallel_size
        return self.num_processes if isinstance(wanted, str) else wanted

    def mesh_shape(self) -> dict[str, int]:
        size = self._size()
        return {DATA: self.world_size // size, TENSOR: size}

    def data_mesh(self) -> Any:
        return self.device_mesh[DATA]

    # ------------------------------------------------------------------ the life of a module

    def distribute(self, fitting: bool) -> None:
        self._share_generators()
        super().distribute(fitting)
        self._metrics = share_metrics(self.module, self.device_mesh)
        self._compared = not fitting or self._size() == 1

    def spread(self, module: nn.Module, fitting: bool) -> None:
        ties = units.Ties(module)
        for layer in units.inner_first(module):  # what was built without memory; all of a group draw the same
            units.initialise(layer, torch.device("cpu"), filled=self._held is not None)
            ties.tie(layer)
        self.split(module)
        if self.data_size > 1:
            super().spread(module, fitting)

    def split(self, module: nn.Module) -> None:
        """Split the layers of ``module`` over the devices of a group, and say how.

        Raises:
            MisconfigurationException: where nothing can be split, or the plan names what is not there.
        """
        size = self._size()
        self._split = layers = Layers(module, self.device_mesh[TENSOR], self.root_device)
        reasons: dict[str, str] = {}
        if self._given is not None:
            self.plan = resolved(self._given, module, size)
            for name, style in self.plan.items():
                layers.split(name, style)
        else:
            self.plan, reasons = self._find(module, layers, size)
        for name, encoder in module.named_modules():
            if getattr(encoder, "use_nested_tensor", False) and any(key.startswith(f"{name}.") for key in self.plan):
                layers.set_numbers(name, {"use_nested_tensor": False})
                reasons[name] = "padded positions are computed in evaluation too, where nested tensors would give 0"
        if not self.plan:
            raise MisconfigurationException(_nothing_to_split(module, reasons))
        self._adds_up = any(style not in WORDS or style == "sequence" for style in self.plan.values())
        self._all_words = all(isinstance(style, str) for style in self.plan.values())
        if (text := described(self.plan, reasons, size)) != self._told:
            self._told = text
            rank_zero_info("%s", text)

    def _find(self, module: nn.Module, layers: Layers, size: int) -> tuple[dict[str, Any], dict[str, str]]:
        found = find(module, size)
        plan, reasons = {}, dict(found.reasons)
        regions = [Region(split=False, paired=True) for _ in found.places]
        for place, region in zip(found.places, regions, strict=True):
            for name in place.columns:
                layers.split(name, "colwise_gather", region)
            layers.split(place.row, "rowwise_split", region)
        for name, word in found.single.items():
            layers.split(name, word)
        bring((*module.parameters(), *module.buffers()), self.root_device)
        outcomes = [try_out(module, place, region, size) for place, region in zip(found.places, regions, strict=True)]
        agreed = self.gather_objects([outcome for outcome in outcomes if isinstance(outcome, str)])
        alike = all(one == agreed[0] for one in agreed)
        for place, region, outcome in zip(found.places, regions, outcomes, strict=True):
            region.split = alike and not isinstance(outcome, str)
            if isinstance(outcome, str) or not alike:
                why = outcome if isinstance(outcome, str) else "devices do not agree on what comes out"
                reasons[place.block or place.row] = f"activations are gathered: {why}"
            elif outcome:
                layers.set_numbers(place.block, outcome)
            plan.update(dict.fromkeys(place.columns, "colwise" if region.split else "colwise_gather"))
            plan[place.row] = "rowwise" if region.split else "rowwise_split"
        return {**plan, **found.single}, reasons

    def unspread(self, module: nn.Module) -> None:
        if self._split is not None:
            self._split.undo()
            self._split = None
        super().unspread(module)

    def teardown(self) -> None:
        for metric in self._metrics:
            metric.process_group = None
        self._metrics = []
        super().teardown()

    def _share_generators(self) -> None:
        """Let all that work on one batch draw the same random numbers, those of the first of them."""
        size = self._size()
        if size == 1:
            return
        leads = self.global_rank % size == 0
        states = self.gather_objects(generators(self.root_device) if leads else None)
        state = states[self.global_rank - self.global_rank % size]
        if not leads and state is not None:
            put_generators(state, self.root_device)

    # ------------------------------------------------------------------ steps

    def training_step(self, *args: Any) -> Any:
        if not self._compared:
            self._compare(args[0] if args else None)
        try:
            output = super().training_step(*args)
        except RuntimeError as error:
            if _MIXED in str(error):
                raise _used_outside(f"{error}\n") from error
            raise
        if self._all_words and isinstance(output["loss"] if isinstance(output, Mapping) else output, DTensor):
            raise _used_outside("")
        return output

    def _compare(self, batch: Any) -> None:
        """Once for each fit: those that work on one batch must have got the same.

        Raises:
            MisconfigurationException: if they have not; on all ranks.
        """
        self._compared = True
        self._share_generators()  # a checkpoint of another strategy may have put back others
        size = self._size()
        looks = self.gather_objects(fingerprint(batch))
        for first in range(0, self.world_size, size):
            group = looks[first : first + size]
            if any(one != group[0] for one in group):
                raise MisconfigurationException(
                    f"The ranks {list(range(first, first + size))} work on one batch together, but their loaders gave"
                    " different ones. A data set that is iterated over, or a sampler that knows ranks, must give the share of"
                    " trainer.strategy.data_rank of trainer.strategy.data_size, not that of the rank in the world."
                )

    def exchange_gradients(self, optimizer: Optimizer) -> None:
        """Average over the shares of the data what nothing else averages; runs before each step of an optimizer.

        Devices that add numbers in any order also agree on the gradients of parameters that all in a group have.
        """
        self.flush()
        if self._alone or self.world_size == 1:
            return
        parameters = parameters_of(optimizer)
        for parameter in parameters if self._adds_up else ():
            gradient = parameter.grad
            if isinstance(gradient, DTensor) and gradient.placements != parameter.placements:
                parameter.grad = gradient.redistribute(placements=parameter.placements)
        if self.data_size > 1:
            alike = [p for p in parameters if _dimensions(p) in ((), (TENSOR,))]
            self.average(alike, self.device_mesh.get_group(DATA))
        # on a CPU the same computation gives the same, to the last bit
        if self.root_device.type != "cpu" and self._size() > 1 and not torch.are_deterministic_algorithms_enabled():
            same = [local(p.grad) for p in parameters if p.grad is not None and _is_whole_in_group(p.grad)]
            if same:
                average_flat(same, self.device_mesh.get_group(TENSOR))


def _dimensions(tensor: Any) -> tuple[str, ...]:
    """The names of the dimensions of the mesh over which a tensor is spread; none for a plain one."""
    mesh = getattr(tensor, "device_mesh", None)
    return () if mesh is None else tuple(mesh.mesh_dim_names or ("",))


def generators(device: torch.device) -> dict[str, Any]:
    """Return the state of the generators that this process draws from."""
    state = rng_state(include_cuda=False)
    if device.type == "cuda":
        state["own"] = torch.cuda.get_rng_state(device)
    return state


def put_generators(state: Mapping[str, Any], device: torch.device) -> None:
    """Put back what ``generators`` returned, also of a process with another device."""
    set_rng_state(state)
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["own"], device)


def _is_whole_in_group(tensor: Any) -> bool:
    names = _dimensions(tensor)
    return TENSOR not in names or bool(tensor.placements[names.index(TENSOR)].is_replicate())


def _used_outside(before: str) -> RuntimeError:
    return RuntimeError(
        f"{before}The weight of a layer that is split was used outside of the layer: by its name, or in the loss. Leave that"
        " layer whole: TensorParallelStrategy(plan={..., 'its.name': 'replicate'})."
    )


def _check_kwargs(owner: str, kwargs: Mapping[str, Any]) -> None:
    for name in kwargs:
        if name in ("sharding_strategy", "device_mesh"):
            raise MisconfigurationException(
                f"{owner}({name}=...) is not possible: tensor_parallel_size says what the mesh is, and parameters are sharded"
                " over its other dimension."
            )
        if name not in _SHARDING:
            known = ("plan", "tensor_parallel_size", *_SHARDING)
            raise MisconfigurationException(
                f"{owner}({name}=...) is not known. It takes {', '.join(known)}.{did_you_mean(name, known)}"
            )


def checked_size(owner: str, name: str, size: Any) -> str | int:
    """Return a number of processes, or ``"auto"``.

    Raises:
        MisconfigurationException: for anything else.
    """
    if size == "auto" or (isinstance(size, int) and not isinstance(size, bool) and size >= 1):
        return size  # type: ignore[no-any-return]
    raise MisconfigurationException(f"{owner}({name}={size!r}) is not valid: it must be 'auto' or an int >= 1.")


def share_metrics(module: nn.Module, mesh: Any) -> list[Any]:
    """Let metric objects exchange with one process of each share of the data; return those that were told so.

    They are known by what those of torchmetrics have: ``update``, ``compute``, and a ``process_group`` that is not set.
    """
    if mesh.ndim < 2 or mesh[TENSOR].size() == 1:
        return []
    metrics = [
        child
        for child in module.modules()
        if callable(getattr(child, "update", None))
        and callable(getattr(child, "compute", None))
        and getattr(child, "process_group", True) is None
    ]
    for metric in metrics:
        metric.process_group = mesh.get_group(DATA)
    return metrics


def fingerprint(batch: Any) -> list[Any]:
    """Return what tells batches apart: plain data, the same for the same batch."""
    return [
        (tuple(leaf.shape), str(leaf.dtype), _digest(leaf))
        if isinstance(leaf, Tensor)
        else leaf
        if isinstance(leaf, (str, int, float))
        else type(leaf).__name__
        for leaf in leaves(batch)
    ]


def _digest(tensor: Tensor) -> tuple[float, float]:
    if not tensor.numel() or tensor.is_complex() or tensor.layout != torch.strided:
        return 0.0, 0.0
    flat = tensor.detach().reshape(-1)[: 1 << 20].double().cpu().nan_to_num()
    return float(flat.sum()), float((flat * torch.arange(1, len(flat) + 1, dtype=torch.float64)).sum())


def bring(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Bring plain tensors of a module to ``device``, in their place."""
    with torch.no_grad():
        for tensor in tensors:
            if not isinstance(tensor, DTensor):
                tensor.data = tensor.data.to(device)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _nothing_to_split(module: nn.Module, reasons: Mapping[str, str]) -> str:
    whys = "".join(f" {name}: {why}." for name, why in list(reasons.items())[:4])
    return (
        f"Nothing of {type(module).__name__} can be split over devices by itself: Linear layers one behind the other,"
        " attentions, embeddings with their head and single layers of more than a million weights are looked for."
        f"{whys} Give a plan, such as TensorParallelStrategy(plan={{'*.fc1': 'colwise', '*.fc2': 'rowwise'}}), or use"
        " strategy='ddp' or 'fsdp'."
    )
