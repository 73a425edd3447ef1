# SPDX-License-Identifier: Apache-2.0
"""Turns what a user said about devices, processes and number formats into a strategy, once."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

import torch

from leyden.errors import MisconfigurationException, did_you_mean
from leyden.loops.resolve import load, made, shown
from leyden.precision import Precision, make_precision
from leyden.runtime.devices import ACCELERATORS, Accelerator, make_accelerator, parse_devices
from leyden.runtime.ranks import rank_zero_info
from leyden.strategies import Strategy

# how the processes of ddp are started, and what DistributedDataParallel is told
_STARTS = {"ddp": "popen", "ddp_spawn": "spawn", "ddp_fork": "fork", "ddp_notebook": "notebook", "ddp_ray": "ray"}
_UNUSED = {"": {}, "_find_unused_parameters_true": {"find_unused_parameters": True}} | {
    "_find_unused_parameters_false": {"find_unused_parameters": False}
}
# what of DeepSpeed a name means
_OFFLOAD = {"offload_optimizer": True}
_DEEPSPEED: dict[str, dict[str, Any]] = {
    "deepspeed": {},
    **{f"deepspeed_stage_{stage}": {"stage": stage} for stage in (1, 2, 3)},
    "deepspeed_stage_1_offload": {"stage": 1, **_OFFLOAD},
    "deepspeed_stage_2_offload": {"stage": 2, **_OFFLOAD},
    "deepspeed_stage_3_offload": {"stage": 3, "offload_parameters": True, **_OFFLOAD},
    "deepspeed_stage_3_offload_nvme": {
        "stage": 3, "offload_parameters": True, "offload_params_device": "nvme", "offload_optimizer_device": "nvme",
        **_OFFLOAD,
    },
}  # fmt: skip

# name -> "module:class", imported when used, or a class; with the arguments it is made with, if it takes any.
# Third parties add to it
STRATEGIES: dict[str, Any] = {
    "single_device": "leyden.strategies:SingleDeviceStrategy",
    "single": "leyden.strategies:SingleDeviceStrategy",
    "dp": "leyden.strategies.data_parallel:DataParallelStrategy",
    **{
        name + suffix: ("leyden.strategies.ddp:DDPStrategy", {"start_method": start, **unused})
        for name, start in _STARTS.items()
        for suffix, unused in _UNUSED.items()
    },
    "fsdp": "leyden.strategies.fsdp:FSDPStrategy",
    "fsdp_cpu_offload": ("leyden.strategies.fsdp:FSDPStrategy", {"cpu_offload": True}),
    "tensor_parallel": "leyden.strategies.tensor_parallel:TensorParallelStrategy",
    "model_parallel": "leyden.strategies.model_parallel:ModelParallelStrategy",
    **{name: ("leyden.strategies.deepspeed:DeepSpeedStrategy", arguments) for name, arguments in _DEEPSPEED.items()},
}
LATER = ("xla", "xla_debug", "single_xla", "single_tpu", "xla_fsdp")


def strategy(
    given: Any,
    accelerator: Any,
    devices: Any,
    num_nodes: Any,
    precision: Any,
    plugins: Any,
    sync_batchnorm: bool = False,
) -> tuple[Strategy, Accelerator]:
    """Choose devices, precision and strategy.

    Raises:
        MisconfigurationException: for an unknown name, or a number of devices that the strategy cannot use.
    """
    if not isinstance(num_nodes, int) or isinstance(num_nodes, bool) or num_nodes < 1:
        raise MisconfigurationException(f"Trainer(num_nodes={num_nodes!r}) is not valid: it must be an int >= 1.")
    is_object = isinstance(given, Strategy)
    automatic = not is_object and str(given).lower() == "auto"
    kind: Any
    kind, arguments = (type(given), {}) if is_object else (None, {}) if automatic else _named(given)
    plugin, checkpoint_io, environment, layers = _plugins(plugins) if plugins is not None else (None,) * 4
    if layers is not None:
        sync_batchnorm, layers = _layer_sync(layers, sync_batchnorm)
    if is_object and getattr(given, "names_environment", False):
        if environment is not None:
            raise MisconfigurationException(
                f"Trainer(strategy={type(given).__name__}(cluster_environment=...), plugins={plugins!r}): both name a cluster"
                " environment. Give one of them."
            )
        environment = given.cluster_environment
    remote = _remote(arguments.get("start_method", getattr(given, "start_method", None)), accelerator, devices)
    backend = make_accelerator(accelerator) if remote is None else ACCELERATORS["cuda"]()
    chosen, num_nodes = (
        (remote, num_nodes)
        if remote is not None
        else _devices(backend, devices, num_nodes, hasattr(kind, "assign"), environment)
    )
    count = len(chosen) * num_nodes
    if automatic:
        kind, arguments = _named("single" if count == 1 else "ddp_notebook" if hasattr(sys, "ps1") else "ddp")
    if count > 1 and not hasattr(kind, "assign"):
        name = type(given).__name__ if is_object else f"strategy={given!r}"
        raise MisconfigurationException(
            f"Trainer(devices={devices!r}, num_nodes={num_nodes!r}) asks for {count} devices, but {name} trains on one. Use"
            " strategy='ddp'."
        )
    if plugin is not None and precision is not None:
        raise MisconfigurationException(
            f"Trainer(precision={precision!r}, plugins={plugins!r}): both say how numbers are stored. Give one of them."
        )
    if not is_object:
        given = kind(**arguments) if hasattr(kind, "assign") else kind(chosen[0], **arguments)
        plugin = plugin or make_precision(precision, chosen[0])
    if hasattr(given, "assign"):
        if environment is not None:
            given.cluster_environment = environment
        given.assign(chosen, num_nodes)
        given.sync_batchnorm, given.layer_sync = sync_batchnorm, layers
    if plugin is not None or precision is not None:
        given.precision = plugin or make_precision(precision, given.root_device)
    if checkpoint_io is not None:
        given.checkpoint_io = checkpoint_io
    _tell(given, chosen, num_nodes)
    fits = accelerator != "auto" or given.root_device.type == backend.name()
    return given, backend if fits else make_accelerator(given.root_device.type)


def _tell(used: Strategy, chosen: list[torch.device], num_nodes: int) -> None:
    """Say which devices a Trainer uses, unless that is the CPU in one process."""
    names = [str(device) for device in getattr(used, "parallel_devices", None) or chosen]
    if used.root_device.type == "cpu":
        if len(names) * num_nodes == 1:
            return
        names = [f"{len(names)} times the CPU"]
    where = f" on each of {num_nodes} nodes" if num_nodes > 1 else ""
    rank_zero_info(f"Devices: {', '.join(names)}{where}, by {type(used).__name__}.")


def _remote(start: Any, accelerator: Any, devices: Any) -> list[torch.device] | None:
    """Return the GPUs of another machine that are asked for, where processes start on a Ray cluster; None for devices here.

    Raises:
        MisconfigurationException: where they are not counted: nobody here knows what that machine has.
    """
    if not (start == "ray" or hasattr(start, "call")) or str(accelerator).lower() not in ("gpu", "cuda"):
        return None
    if "RANK" in os.environ or (torch.cuda.is_available() and not isinstance(devices, int)):
        return None
    if not isinstance(devices, int) or isinstance(devices, bool) or devices < 1:
        raise MisconfigurationException(
            f"Trainer(accelerator={accelerator!r}, devices={devices!r}): on a Ray cluster devices is the number of GPUs of"
            " each node, an int >= 1."
        )
    return [torch.device("cuda", index) for index in range(devices)]


def _named(given: Any) -> tuple[Any, dict[str, Any]]:
    """Return the class that a name means, and what it is made with.

    Raises:
        MisconfigurationException: for a name that is not known.
    """
    name = str(given).lower()
    if name in LATER:
        raise MisconfigurationException(
            f"Trainer(strategy={given!r}) is not there: TPUs are out of scope. Use 'ddp' or 'fsdp' on GPUs or CPUs."
        )
    if name not in STRATEGIES:
        known = ["auto", *STRATEGIES]
        raise MisconfigurationException(
            f"You selected an invalid strategy name: `strategy={given!r}`. It must be one of {known} or a Strategy object."
            f"{did_you_mean(name, known)}"
        )
    entry = STRATEGIES[name]
    target, arguments = entry if isinstance(entry, tuple) else (entry, {})
    return target if isinstance(target, type) else load(target), arguments


def _devices(
    backend: Accelerator, devices: Any, num_nodes: int, several: bool, environment: Any
) -> tuple[list[torch.device], int]:
    """Return the devices of this machine and the number of machines; ``"auto"`` is as many as a launcher has started."""
    if devices != "auto":
        return parse_devices(backend, devices), num_nodes
    from leyden.runtime.world import joined  # noqa: PLC0415  # when a Trainer is made, not when its name is imported

    world = joined()
    if environment is not None and environment.creates_processes_externally:
        # the user's own says how many there are, but not how many of them are here
        world = environment.world() if hasattr(environment, "world") else None
    several_there = world is not None and (world.size > 1 or "TORCHELASTIC_RUN_ID" in os.environ)
    if world is not None and several_there and (several or world.starter != "leyden"):
        return parse_devices(backend, world.local_size), world.nodes
    chosen = parse_devices(backend, devices)
    if len(chosen) > 1 and not several:
        rank_zero_info(f"Training on {chosen[0]}, one of {len(chosen)} devices. Ask for more with devices=...")
        chosen = chosen[:1]
    return chosen, num_nodes


def _layer_sync(given: Any, sync_batchnorm: bool) -> tuple[bool, Any]:
    """Whether batch norms are shared, and what of the user's does that to other layers.

    Raises:
        MisconfigurationException: where both ways are asked for and differ.
    """
    if type(given) is load("leyden.strategies.layer_sync:TorchSyncBatchNorm"):
        return True, None
    if sync_batchnorm and not isinstance(given, load("leyden.strategies.layer_sync:TorchSyncBatchNorm")):
        raise MisconfigurationException(
            f"Trainer(sync_batchnorm=True, plugins=[{type(given).__name__}()]): both say how layers are shared. Drop one."
        )
    return False, given


def _plugins(given: Any) -> tuple[Precision | None, Any, Any, Any]:
    """Return the Precision, CheckpointIO, cluster environment and LayerSync among the plug-ins; None for what is not there.

    Raises:
        MisconfigurationException: for something that is no plug-in, or two of a kind.
    """
    from leyden.checkpoint_io.base import CheckpointIO  # noqa: PLC0415 - for Trainers that get plug-ins

    found: dict[Any, Any] = {}
    # a class of it has been imported where there is an object of it
    layer_sync: Any = getattr(sys.modules.get("leyden.strategies.layer_sync"), "LayerSync", ())
    kinds = {Precision: Precision, CheckpointIO: CheckpointIO, "layers": layer_sync}
    for item in given if isinstance(given, Iterable) and not isinstance(given, str) else [given]:
        if _is_environment(item):
            if "environment" in found:
                raise MisconfigurationException(
                    f"Trainer(plugins={given!r}): give one cluster environment, not several."
                )
            found["environment"] = item
            continue
        kind: Any = next((key for key, kind in kinds.items() if isinstance(item, kind)), None)
        if kind is None:
            raise MisconfigurationException(
                f"Trainer(plugins={shown(item)}): a plugin must be a Precision, CheckpointIO,"
                f" ClusterEnvironment or LayerSync object, not"
                f" {'a class' if isinstance(item, type) else type(item).__name__}.{made(item)}"
            )
        if kind in found:
            raise MisconfigurationException(
                f"Trainer(plugins={given!r}): give one {getattr(kind, '__name__', 'LayerSync')}, not several."
            )
        found[kind] = item
    return found.get(Precision), found.get(CheckpointIO), found.get("environment"), found.get("layers")


def _is_environment(item: Any) -> bool:
    return any(cls.__name__ == "ClusterEnvironment" for cls in type(item).__mro__)


def cluster(plugins: Any, used: Strategy) -> Any:
    """Return what starts a job of a cluster anew, where this is one, and the user has not switched that off; else None."""
    items = plugins if isinstance(plugins, Iterable) else [] if plugins is None else [plugins]
    given = [item for item in items if _is_environment(item)]
    if getattr(used, "names_environment", False):
        given = [used.cluster_environment]  # type: ignore[attr-defined]
    if not os.environ.get("SLURM_JOB_ID"):
        return None
    slurm = load("leyden.runtime.cluster:SLURMEnvironment")
    found = given[0] if given else slurm()
    return found if isinstance(found, slurm) and found.auto_requeue and found.detect() else None
