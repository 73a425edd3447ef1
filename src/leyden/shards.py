# SPDX-License-Identifier: Apache-2.0
"""What of a checkpoint is spread over processes: taken out of it, by name, and written by torch.distributed.checkpoint.

Each process writes the parts that it holds; nobody ever has the whole of a tensor. In the rest of the checkpoint an empty
tensor of the right shape and type, on the device ``meta``, stands at the place of each. Its name is made of the keys that
lead to it: ``state_dict.layer.weight``, ``optimizer_0.state.layer.weight.exp_avg``, as Lightning has them. The parameters
of an optimizer go by their names in the module, not by numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Path = tuple[Any, ...]
"""The keys that lead to a value in nested dicts and lists."""

META = "meta.pt"
"""The file in a checkpoint folder with all that is not sharded."""
WEIGHTS, OPTIMIZERS = "state_dict", "optimizer_states"
"""The keys of a checkpoint under which every tensor is taken out; elsewhere those that are spread."""
OF_RANKS = "leyden", "ranks"
"""Where each process has a state of its own. Its gradients are taken out, too, and of those of others it has empty ones."""


def is_spread(tensor: Any) -> bool:
    """Return whether this process holds a part of ``tensor`` only: whether it is a DTensor."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


# --------------------------------------------------------------------------------------------- places


def changed(value: Any, change: Callable[[Path, Tensor], Any], path: Path = ()) -> Any:
    """Return nested dicts, lists and tuples with their tensors changed; what holds none that changes is kept as it is."""
    if isinstance(value, Tensor):
        return change(path, value)
    if isinstance(value, Mapping):
        items = {key: changed(item, change, (*path, key)) for key, item in value.items()}
        if all(items[key] is item for key, item in value.items()):
            return value
        if type(value) is dict or not hasattr(value, "copy"):
            return items
        twin = value.copy()  # of its own kind: a Counter, say
        for key, item in items.items():
            twin[key] = item
        return twin
    if isinstance(value, (list, tuple)):
        members = [changed(item, change, (*path, index)) for index, item in enumerate(value)]
        if all(new is old for new, old in zip(members, value, strict=True)):
            return value
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*members)
        return tuple(members) if isinstance(value, tuple) else members
    return value


class Names:
    """Gives each place in a checkpoint a name of its own, the same ones whenever it is gone through in the same order."""

    def __init__(self) -> None:
        self.paths: dict[str, Path] = {}

    def name(self, path: Path) -> str:
        """Return the name of the next place that is taken."""
        if path[0] == OPTIMIZERS:
            path = (f"optimizer_{path[1]}", *path[2:])
        name = ".".join(map(str, path))
        while name in self.paths:
            name += "'"  # keys may have dots in them
        self.paths[name] = tuple(key if isinstance(key, int) else str(key) for key in path)
        return name


# --------------------------------------------------------------------------------------------- taken out, and written


@dataclass
class Shards:
    """What one process writes.

    Attributes:
        tensors: The parts that it holds, by the names of the wholes.
        plan: What torch needs to know of them.
    """

    tensors: dict[str, Tensor]
    plan: Any

    def write(self, folder: FilePath, group: Any = None, alone: bool = False) -> None:
        """Write all of it to ``folder``, together with the other processes of ``group``; nothing is flushed yet.

        Args:
            folder: Shared by all.
            group: The process group whose members call this; None is that of all processes.
            alone: There is but this process.

        Raises:
            CheckpointException: of torch, on all processes, if one of them failed.
        """
        from torch.distributed.checkpoint.filesystem import FileSystemWriter  # noqa: PLC0415  # only for those of several
        from torch.distributed.checkpoint.state_dict_saver import save  # noqa: PLC0415  # processes

        writer = FileSystemWriter(folder, sync_files=False)
        planner = _planner(self.plan, self.tensors)
        if not alone:
            save({}, storage_writer=writer, planner=planner, process_group=group)
            return
        writer.reset()  # what `save` does, which warns where there is but one process
        planner.set_up_planner({}, writer.storage_meta(), True)
        writer.set_up_storage_writer(True)
        plans, metadata = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
        writes = writer.write_data(planner.finish_plan(writer.prepare_global_plan(plans)[0]), planner)
        writes.wait()
        writer.finish(metadata, [writes.value()])


def take_out(checkpoint: Mapping[str, Any], first: bool) -> tuple[dict[str, Any], Shards]:
    """Return a checkpoint without what is written in shards, and the shards of this process.

    Args:
        checkpoint: The same on all processes, as to which tensors are where. It is not changed.
        first: Whether this is the process that also writes what all have: batch statistics, say.
    """
    from torch.distributed.checkpoint.default_planner import (  # noqa: PLC0415  # see Shards.write
        create_default_local_save_plan,
    )

    names, taken = Names(), {}
    stand_ins: dict[Any, Tensor] = {}
    held = []  # or the address of one could pass to another

    def out(path: Path, tensor: Tensor) -> Tensor:
        spread, own = is_spread(tensor), path[:2] == OF_RANKS and "gradients" in path
        if own and tensor.device.type == "meta":
            names.name(path)  # another one writes it
            return tensor
        if not spread and not own and (path[0] not in (WEIGHTS, OPTIMIZERS) or not _is_plain(tensor)):
            return tensor
        if spread:
            tensor = _without_sums(tensor)
        local: Tensor = tensor.to_local() if spread else tensor  # type: ignore[attr-defined]
        memory = local.untyped_storage()
        held.append(memory)
        same = id(memory), local.storage_offset(), tensor.shape, tensor.dtype, local.stride()
        if same not in stand_ins:  # else a weight that is tied, which is written once
            name = names.name(path)
            stand_ins[same] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            if spread or own or first:
                taken[name] = tensor.detach()
        return stand_ins[same]

    rest = changed(checkpoint, out)
    plan = create_default_local_save_plan(taken, first)
    plan = replace(plan, planner_data=names.paths)
    tensors = {name: tensor.to_local() if is_spread(tensor) else tensor for name, tensor in taken.items()}  # type: ignore[attr-defined]
    return dict(rest), Shards(tensors, plan)


def _without_sums(tensor: Any) -> Any:
    """Return a DTensor whose parts have values; of some, an optimizer's say, each process may have a summand."""
    if not any(placement.is_partial() for placement in tensor.placements):
        return tensor
    from torch.distributed.tensor import Replicate  # noqa: PLC0415  # few tensors are so

    return tensor.redistribute(
        placements=[Replicate() if placement.is_partial() else placement for placement in tensor.placements]
    )


def _is_plain(tensor: Tensor) -> bool:
    """Whether torch.distributed.checkpoint can write it; a sparse one, say, stays in the rest."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.device.type != "meta"
        and not (tensor.is_quantized or tensor.is_nested)
    )


def _planner(plan: Any, tensors: Mapping[str, Tensor]) -> Any:
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner  # noqa: PLC0415  # see Shards.write

    class Planner(DefaultSavePlanner):
        """Torch's way to plan a save, for parts that may be copies of those that the plan was made of."""

        def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
            self.state_dict, self.is_coordinator = state_dict, is_coordinator

        def create_local_plan(self) -> Any:
            self.plan = plan
            return plan

        def lookup_object(self, index: Any) -> Any:
            return tensors[index.fqn]

    return Planner()


# --------------------------------------------------------------------------------------------- optimizers


def named(state: Mapping[str, Any], optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """Return the state of an optimizer with the names of its parameters in the place of their numbers.

    Args:
        state: As ``optimizer.state_dict()`` returned it.
        optimizer: The optimizer.
        names: The name of each parameter, by its ``id``; one that is not there goes by ``#<number>``.
    """
    called: dict[Any, str] = {}
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        for parameter, number in zip(group["params"], saved["params"], strict=True):
            called[number] = names.get(id(parameter), f"#{number}")
    return {
        **state,
        "state": {called.get(key, key): value for key, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [called[number] for number in group["params"]]} for group in state["param_groups"]
        ],
    }


def numbered(state: Any) -> Any:
    """Return the state of an optimizer with numbers in the place of names, as its ``load_state_dict`` wants it."""
    groups = state.get("param_groups") if isinstance(state, Mapping) else None
    if not isinstance(groups, Iterable) or not all(isinstance(g, Mapping) and "params" in g for g in groups):
        return state
    named_ones = [name for group in groups for name in group["params"]]
    if not any(isinstance(name, str) for name in named_ones):
        return state
    numbers = {name: number for number, name in enumerate(named_ones)}
    return {
        **state,
        "state": {numbers.get(key, key): value for key, value in state.get("state", {}).items()},
        "param_groups": [{**group, "params": [numbers[name] for name in group["params"]]} for group in groups],
    }
