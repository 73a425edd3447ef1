# SPDX-License-Identifier: Apache-2.0
"""Turns the names that a user gave the Trainer into objects, once: devices, strategy, loggers, callbacks, profiler."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
import math
import numbers
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from leyden.callback import Callback
from leyden.config import TrainerConfig, check_switch, default_semantics, parse_duration
from leyden.errors import MisconfigurationException, did_you_mean
from leyden.precision import Precision, make_precision
from leyden.runtime.devices import Accelerator, make_accelerator, parse_devices
from leyden.runtime.ranks import rank_zero_info
from leyden.strategies import Strategy

F = TypeVar("F", bound=Callable[..., None])

# name -> "module:class", imported when used; third parties add to them
PROFILERS: dict[str, str] = {
    "simple": "leyden.profilers:SimpleProfiler",
}
STRATEGIES: dict[str, str] = {
    "single_device": "leyden.strategies:SingleDeviceStrategy",
    "single": "leyden.strategies:SingleDeviceStrategy",
    "ddp": "leyden.strategies.ddp:DDPStrategy",
}
# other names of ddp: how the processes are started, and what DistributedDataParallel is told
_STARTS = {"ddp": "popen", "ddp_spawn": "spawn", "ddp_fork": "fork", "ddp_notebook": "fork"}
_UNUSED = {"": {}, "_find_unused_parameters_true": {"find_unused_parameters": True}} | {
    "_find_unused_parameters_false": {"find_unused_parameters": False}
}
_DDP: dict[str, dict[str, Any]] = {
    name + suffix: {"start_method": start, **unused}
    for name, start in _STARTS.items()
    for suffix, unused in _UNUSED.items()
}
_LATER_STRATEGIES = (
    "dp", "fsdp", "fsdp_cpu_offload", "deepspeed", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3",
    "deepspeed_stage_2_offload", "deepspeed_stage_3_offload", "tensor_parallel", "model_parallel", "xla", "balanced",
)  # fmt: skip


def load(target: str) -> Any:
    """Import ``"module:name"``."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


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
    backend = make_accelerator(accelerator)
    if not isinstance(num_nodes, int) or isinstance(num_nodes, bool) or num_nodes < 1:
        raise MisconfigurationException(f"Trainer(num_nodes={num_nodes!r}) is not valid: it must be an int >= 1.")
    name = str(given).lower()
    several = not isinstance(given, Strategy) and name.startswith("ddp")
    chosen, num_nodes = _devices(backend, devices, num_nodes, several or hasattr(given, "assign"))
    plugin, checkpoint_io = _plugins(plugins) if plugins is not None else (None, None)
    if plugin is not None and precision is not None:
        raise MisconfigurationException(
            f"Trainer(precision={precision!r}, plugins={plugins!r}): both say how numbers are stored. Give one of them."
        )
    if not isinstance(given, Strategy):
        given = _by_name(given, name, len(chosen) * num_nodes, devices, num_nodes)
        given = given(chosen[0], None, checkpoint_io) if isinstance(given, type) else given
        plugin = plugin or make_precision(precision, chosen[0])
    elif len(chosen) * num_nodes > 1 and not hasattr(given, "assign"):
        raise MisconfigurationException(
            f"Trainer(devices={devices!r}, num_nodes={num_nodes!r}) asks for {len(chosen) * num_nodes} devices, but"
            f" {type(given).__name__} trains on one. Use strategy='ddp'."
        )
    if hasattr(given, "assign"):
        given.assign(chosen, num_nodes)
        given.sync_batchnorm = sync_batchnorm
    if plugin is not None or precision is not None:
        given.precision = plugin or make_precision(precision, given.root_device)
    if checkpoint_io is not None:
        given.checkpoint_io = checkpoint_io
    fits = accelerator != "auto" or given.root_device.type == backend.name()
    return given, backend if fits else make_accelerator(given.root_device.type)


def _by_name(given: Any, name: str, count: int, devices: Any, num_nodes: int) -> Any:
    """Return the strategy that ``name`` means with ``count`` devices, or its class."""
    if name in _LATER_STRATEGIES:
        raise MisconfigurationException(
            f"Trainer(strategy={given!r}) is not there yet. Today there are one device (strategy='auto') and 'ddp', with as"
            " many processes as there are devices."
        )
    if name == "auto":
        name = "single_device" if count == 1 else "ddp_notebook" if hasattr(sys, "ps1") else "ddp"
    if name in _DDP:
        return load(STRATEGIES["ddp"])(**_DDP[name])
    if name not in STRATEGIES:
        known = ["auto", *STRATEGIES, *(alias for alias in _DDP if alias != "ddp")]
        raise MisconfigurationException(
            f"Trainer(strategy={given!r}) is not known: it must be one of {known} or a Strategy object."
            f"{did_you_mean(name, known)}"
        )
    if count > 1 and name in ("single", "single_device"):
        raise MisconfigurationException(
            f"Trainer(devices={devices!r}, num_nodes={num_nodes!r}) asks for {count} devices, but strategy={given!r} trains"
            " on one. Use strategy='ddp'."
        )
    return load(STRATEGIES[name])


def _devices(backend: Accelerator, devices: Any, num_nodes: int, several: bool) -> tuple[list[torch.device], int]:
    """Return the devices of this machine and the number of machines; ``"auto"`` is as many as a launcher has started."""
    if devices != "auto":
        return parse_devices(backend, devices), num_nodes
    from leyden.runtime.world import joined  # noqa: PLC0415  # when a Trainer is made, not when its name is imported

    world = joined()
    if world is not None and world.size > 1 and (several or world.starter != "leyden"):
        return parse_devices(backend, world.local_size), world.nodes
    chosen = parse_devices(backend, devices)
    if len(chosen) > 1 and not several:
        rank_zero_info(f"Training on {chosen[0]}, one of {len(chosen)} devices. Ask for more with devices=...")
        chosen = chosen[:1]
    return chosen, num_nodes


def _plugins(given: Any) -> tuple[Precision | None, Any]:
    """Return the Precision and the CheckpointIO among the plug-ins; None for one that is not there.

    Raises:
        MisconfigurationException: for something that is no plug-in, or two of a kind.
    """
    from leyden.checkpoint_io.base import CheckpointIO  # noqa: PLC0415 - for Trainers that get plug-ins

    found: dict[type, Any] = {}
    for item in given if isinstance(given, (list, tuple)) else [given]:
        if _is_environment(item):
            continue
        kind = next((kind for kind in (Precision, CheckpointIO) if isinstance(item, kind)), None)
        if kind is None:
            raise MisconfigurationException(
                f"Trainer(plugins={_shown(item)}): on one device a plugin must be a Precision, CheckpointIO or"
                f" SLURMEnvironment object, not {'a class' if isinstance(item, type) else type(item).__name__}.{_made(item)}"
            )
        if kind in found:
            raise MisconfigurationException(f"Trainer(plugins={given!r}): give one {kind.__name__}, not several.")
        found[kind] = item
    return found.get(Precision), found.get(CheckpointIO)


def _is_environment(item: Any) -> bool:
    return any(cls.__name__ == "ClusterEnvironment" for cls in type(item).__mro__)


def cluster(plugins: Any) -> Any:
    """Return what starts a job of a cluster anew, where this is one, and the user has not switched that off; else None.

    Raises:
        MisconfigurationException: for two of them.
    """
    items = plugins if isinstance(plugins, (list, tuple)) else [] if plugins is None else [plugins]
    given = [item for item in items if _is_environment(item)]
    if len(given) > 1:
        raise MisconfigurationException(f"Trainer(plugins={plugins!r}): give one cluster environment, not several.")
    if not os.environ.get("SLURM_JOB_ID"):
        return None
    slurm = load("leyden.runtime.cluster:SLURMEnvironment")
    found = given[0] if given else slurm()
    return found if isinstance(found, slurm) and found.auto_requeue and found.detect() else None


def loggers(given: Any, root: str, config: TrainerConfig, quiet: bool) -> list[Any]:
    """Return the loggers: True is TensorBoard, False and None-like values are none, one or several objects are themselves.

    Raises:
        MisconfigurationException: for something that cannot log.
    """
    if config.fast_dev_run and given not in (False, []):
        return [load("leyden.loggers:DummyLogger")()]
    if given is None:
        given = not quiet
    if given is True:
        return [load("leyden.loggers:TensorBoardLogger")(save_dir=root, name=config.rule("log_folder"))]
    if given is False:
        return []
    several = isinstance(given, Iterable) and not hasattr(given, "log_metrics") and not isinstance(given, str)
    found = list(given) if several else [given]
    for item in found:
        if isinstance(item, type) or not callable(getattr(item, "log_metrics", None)):
            raise MisconfigurationException(
                f"Trainer(logger={_shown(item)}): a logger must be True, False, a Logger object or a list of them."
                f"{_made(item)}"
            )
    return found


def _shown(item: Any) -> str:
    return item.__name__ if isinstance(item, type) else repr(item)


def _made(item: Any) -> str:
    return f" Did you mean {item.__name__}(...)?" if isinstance(item, type) else ""


def profiler(given: Any) -> Any:
    """Return the profiler, or None when nothing is measured.

    Raises:
        MisconfigurationException: for an unknown name.
    """
    if given is None:
        return None
    if isinstance(given, str):
        if given.lower() not in PROFILERS:
            raise MisconfigurationException(
                f"Trainer(profiler={given!r}) is not known: it must be one of {sorted(PROFILERS)} or a Profiler object."
                f"{did_you_mean(given, PROFILERS)}"
            )
        return load(PROFILERS[given.lower()])()
    if not callable(getattr(given, "profile", None)):
        raise MisconfigurationException(f"Trainer(profiler={given!r}): it must be a name or a Profiler object.")
    return None if type(given).__name__ == "PassThroughProfiler" else given


def callbacks(
    given: Any, config: TrainerConfig, *, checkpointing: bool, bar: bool, summary: bool, explicit: Mapping[str, Any]
) -> list[Callback]:
    """Return the callbacks: those given, and the defaults that were not switched off, in their order.

    Args:
        given: A callback, a list of them, or None.
        config: For the time limit.
        checkpointing: Add a ModelCheckpoint if none was given.
        bar: Add a progress bar if none was given.
        summary: Add a ModelSummary if none was given.
        explicit: The three switches as the user gave them, for contradictions.

    Raises:
        MisconfigurationException: for something that is no callback, or a contradiction.
    """
    found: list[Any] = list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]
    for item in found:
        if isinstance(item, type) or not callable(getattr(item, "setup", None)):
            raise MisconfigurationException(
                f"Trainer(callbacks={_shown(item)}): a callback must be a Callback object, not"
                f" {'a class' if isinstance(item, type) else type(item).__name__}.{_made(item)}"
            )
    _contradiction(_of_kind(found, "Checkpoint"), "enable_checkpointing", explicit)
    _contradiction(_of_kind(found, "ProgressBar"), "enable_progress_bar", explicit)
    _contradiction(_of_kind(found, "ModelSummary"), "enable_model_summary", explicit)
    if len(bars := _of_kind(found, "ProgressBar")) > 1:
        names = [type(item).__name__ for item in bars]
        raise MisconfigurationException(f"Trainer(callbacks=...) holds {len(names)} progress bars ({names}); give one.")
    if config.max_time is not None and any(type(item).__name__ == "Timer" for item in found):
        rank_zero_info(f"Trainer(max_time={config.max_time!r}) is passed over: there is a Timer in callbacks.")
    elif config.max_time is not None:
        found.append(load("leyden.callbacks.timer:Timer")(parse_duration(config.max_time, "max_time"), interval="step"))
    if bar and not _of_kind(found, "ProgressBar"):
        found.append(load("leyden.callbacks.progress:default_bar")())
    if summary and not _of_kind(found, "ModelSummary"):
        found.append(load("leyden.callbacks.model_summary:ModelSummary")())
    found += _from_entry_points()
    if checkpointing and not _of_kind(found, "Checkpoint"):
        found.append(load("leyden.callbacks.checkpoint:ModelCheckpoint")())
    check_keys(found)
    return in_order(found)


_CALLBACKS = {
    "Checkpoint": "leyden.callbacks.checkpoint:Checkpoint",
    "ProgressBar": "leyden.callbacks.progress:ProgressBar",
    "ModelSummary": "leyden.callbacks.model_summary:ModelSummary",
}


def _of_kind(found: Iterable[Any], name: str) -> list[Any]:
    """Return those of one kind of callbacks; a class that has not been imported has no objects."""
    module, _, kind = _CALLBACKS[name].partition(":")
    return (
        [item for item in found if isinstance(item, getattr(sys.modules[module], kind))]
        if module in sys.modules
        else []
    )


def _contradiction(found: Iterable[Any], switch: str, explicit: Mapping[str, Any]) -> None:
    clash = next(iter(found), None)
    if clash is not None and explicit.get(switch) is False:
        raise MisconfigurationException(
            f"Trainer({switch}=False) contradicts the {type(clash).__name__} in callbacks: drop one of the two."
        )


@functools.cache  # reading the metadata of all installed packages takes milliseconds
def _entry_points(group: str) -> tuple[importlib.metadata.EntryPoint, ...]:
    return tuple(importlib.metadata.entry_points(group=group))


def _from_entry_points() -> list[Any]:
    """Callbacks that installed packages add: each entry point of the group ``leyden.callbacks`` makes one or a list."""
    added: list[Any] = []
    for entry in _entry_points("leyden.callbacks"):
        made = entry.load()()
        added += made if isinstance(made, (list, tuple)) else [made]
    return added


def in_order(found: Iterable[Any]) -> list[Any]:
    """Sort by ``order``, keeping the given order within equals."""
    return sorted(found, key=lambda callback: getattr(callback, "order", 0))


def check_keys(found: Iterable[Any]) -> None:
    """Two callbacks that keep state must not share a key in the checkpoint.

    Raises:
        RuntimeError: if they do.
    """
    seen: dict[str, Any] = {}
    for callback in found:
        if not hasattr(callback, "state_key") or type(callback).state_dict is Callback.state_dict:
            continue
        key = callback.state_key
        if key in seen:
            raise RuntimeError(
                f"Two callbacks of type {type(callback).__name__} have the same state_key {key!r}, so a checkpoint could"
                " not tell them apart. Give them different arguments, or override state_key."
            )
        seen[key] = callback


def merge_callbacks(of_trainer: list[Any], of_module: Any) -> list[Any]:
    """Add the callbacks that the module configures; they replace the Trainer's of the same type."""
    extra = list(of_module) if isinstance(of_module, (list, tuple)) else [of_module] if of_module else []
    if not extra:
        return of_trainer
    types = {type(callback) for callback in extra} - {Callback}
    replaced = [callback for callback in of_trainer if type(callback) in types]
    if replaced:
        names = sorted({type(callback).__name__ for callback in replaced})
        rank_zero_info(f"The module's configure_callbacks() replaces the Trainer's {', '.join(names)}.")
    merged = [callback for callback in of_trainer if callback not in replaced] + extra
    check_keys(merged)
    return in_order(merged)


def root_dir(given: str | os.PathLike[str] | None) -> str:
    """The folder under which a run writes: the one given, ``~`` expanded, else the working directory."""
    if given is None:
        return os.getcwd()
    if not isinstance(given, (str, os.PathLike)):
        raise MisconfigurationException(
            f"Trainer(default_root_dir={given!r}) is not valid: it must be a path, a URL or None."
        )
    text = os.fspath(given)
    return text if "://" in text else str(Path(text).expanduser())


def determinism(config: TrainerConfig) -> dict[str, Any]:
    """The global settings of torch that ``deterministic`` and ``benchmark`` ask for, as ``{name: value}``."""
    wanted: dict[str, Any] = {}
    if config.deterministic is not None and config.deterministic is not False:
        wanted["deterministic"] = config.deterministic
    benchmark = config.benchmark
    if benchmark is None and config.deterministic:
        benchmark = False
    if benchmark is not None:
        wanted["benchmark"] = benchmark
    return wanted


class Determinism:
    """For the length of a run, put torch into the mode that the Trainer asks for; afterwards, back."""

    def __init__(self, config: TrainerConfig) -> None:
        self.wanted = determinism(config)
        self._former: tuple[bool, bool, bool] | None = None
        self._workspace: str | None = None

    def __enter__(self) -> Determinism:
        if self.wanted:
            self._former = (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
                torch.backends.cudnn.benchmark,
            )
            self._workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
        if "deterministic" in self.wanted:
            torch.use_deterministic_algorithms(True, warn_only=self.wanted["deterministic"] == "warn")
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if "benchmark" in self.wanted:
            torch.backends.cudnn.benchmark = bool(self.wanted["benchmark"])
        return self

    def __exit__(self, *error: object) -> None:
        if self._former is None:
            return
        enabled, warn_only, benchmark = self._former
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        if self._workspace is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        self._former = None


_DEFAULTS: dict[str, Any] = {
    # arguments whose None means "the default", so that barebones can tell a default from a wish
    "limit_train_batches": 1.0,
    "limit_val_batches": 1.0,
    "limit_test_batches": 1.0,
    "limit_predict_batches": 1.0,
    "val_check_interval": 1.0,
    "num_sanity_val_steps": 2,
    "log_every_n_steps": 50,
}
_SWITCHES = (
    "benchmark", "inference_mode", "use_distributed_sampler", "detect_anomaly", "barebones", "sync_batchnorm",
    "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "enable_autolog_hparams",
)  # fmt: skip
_FORMER = {
    # arguments that Lightning's Trainer had before 2.0, and how the same is said today
    "tpu_cores": "accelerator and devices",
    "num_processes": "accelerator='cpu', devices=n",
    "resume_from_checkpoint": "Trainer.fit(ckpt_path=...)",
    "weights_save_path": "callbacks=[ModelCheckpoint(dirpath=...)]",
    "default_save_path": "default_root_dir",
    "progress_bar_refresh_rate": "enable_progress_bar, or callbacks=[TQDMProgressBar(refresh_rate=n)]",
    "weights_summary": "enable_model_summary, or callbacks=[ModelSummary(max_depth=n)]",
    "flush_logs_every_n_steps": "logger=CSVLogger(flush_logs_every_n_steps=n)",
    "row_log_interval": "log_every_n_steps",
    "terminate_on_nan": "detect_anomaly, or callbacks=[EarlyStopping(check_finite=True)]",
    "multiple_trainloader_mode": "CombinedLoader(loaders, mode)",
    "reload_dataloaders_every_epoch": "reload_dataloaders_every_n_epochs=1",
    "replace_sampler_ddp": "use_distributed_sampler",
    "amp_backend": "precision",
}


def instead_of(name: str, known: Iterable[str]) -> str:
    """What to write in place of the unknown argument ``name``: a sentence that starts with a space, or nothing."""
    return f" Use {_FORMER[name]}." if name in _FORMER else did_you_mean(name, known)


_BAREBONES_OFF = (
    "enable_checkpointing", "logger", "enable_progress_bar", "enable_model_summary", "log_every_n_steps",
    "num_sanity_val_steps", "profiler",
)  # fmt: skip


def from_environment(init: F) -> F:
    """Let the environment variables ``PL_TRAINER_<ARGUMENT>`` stand for arguments that are not given."""
    names = [name for name in inspect.signature(init).parameters if name not in ("self", "unknown")]

    @functools.wraps(init)
    def with_environment(self: Any, *args: Any, **kwargs: Any) -> None:
        if args:
            raise TypeError(f"Trainer() takes its arguments by name only; {args[0]!r} was given without one.")
        for name in names:
            text = os.environ.get(f"PL_TRAINER_{name.upper()}")
            if text and name not in kwargs:
                try:
                    kwargs[name] = ast.literal_eval(text)
                except (ValueError, SyntaxError):
                    kwargs[name] = text
        init(self, **kwargs)

    return cast("F", with_environment)


def _plain_number(value: Any) -> Any:
    """Turn the numbers of other libraries (numpy's, of a search, say) into python's."""
    if isinstance(value, (bool, int, float)) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def config(given: Mapping[str, Any]) -> TrainerConfig:
    """Make the config from the Trainer's arguments: defaults, and what ``fast_dev_run`` and the like imply.

    Raises:
        MisconfigurationException: for a value that cannot be, or a contradiction.
    """
    for name in _SWITCHES:
        check_switch(name, given[name])
    names = {field.name for field in dataclasses.fields(TrainerConfig)}
    values = {name: _plain_number(value) for name, value in given.items() if name in names}
    if values["semantics"] is None:
        values["semantics"] = default_semantics()
    if given["barebones"]:
        for name in _BAREBONES_OFF:
            if given[name] not in (None, False, 0):
                raise MisconfigurationException(
                    f"Trainer(barebones=True, {name}={given[name]!r}): barebones switches {name} off; drop one of the two."
                )
        for name in ("fast_dev_run", "detect_anomaly"):
            if given[name]:
                raise MisconfigurationException(
                    f"Trainer(barebones=True, {name}={given[name]!r}): the one is for measuring speed, the other for"
                    " finding faults; drop one of the two."
                )
        values.update(log_every_n_steps=0, num_sanity_val_steps=0)
    for name, default in _DEFAULTS.items():
        if values.get(name) is None:
            values[name] = default
    if values["overfit_batches"]:
        TrainerConfig(**values)  # a wrong value is an error under its own name
        values.update(limit_train_batches=values["overfit_batches"], limit_val_batches=values["overfit_batches"])
    if values["num_sanity_val_steps"] == -1:
        values["num_sanity_val_steps"] = math.inf
    fast = values["fast_dev_run"]
    if fast and isinstance(fast, (bool, int)) and fast > 0:
        TrainerConfig(**values)  # a wrong value is an error in a fast dev run too
        count = int(fast)
        values.update(
            max_epochs=1, max_steps=count, num_sanity_val_steps=0, val_check_interval=1.0, check_val_every_n_epoch=1,
            limit_train_batches=count, limit_val_batches=count, limit_test_batches=count, limit_predict_batches=count,
        )  # fmt: skip
    return TrainerConfig(**values)
