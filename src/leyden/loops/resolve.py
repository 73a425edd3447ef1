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
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from leyden.callback import Callback
from leyden.config import CALLBACK_GROUPS, TrainerConfig, check_switch, default_semantics, parse_duration
from leyden.errors import MisconfigurationException, did_you_mean
from leyden.runtime.ranks import rank_zero_info

F = TypeVar("F", bound=Callable[..., None])

# name -> "module:class", imported when used; third parties add to them
PROFILERS: dict[str, str] = {
    "simple": "leyden.profilers:SimpleProfiler",
    "advanced": "leyden.profilers:AdvancedProfiler",
    "pytorch": "leyden.profilers:PyTorchProfiler",
    "xla": "leyden.profilers:XLAProfiler",
}


def load(target: str) -> Any:
    """Import ``"module:name"``."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


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
                f"Trainer(logger={shown(item)}): a logger must be True, False, a Logger object or a list of them."
                f"{made(item)}"
            )
    return found


def shown(item: Any) -> str:
    """The value of an argument as a message shows it."""
    return item.__name__ if isinstance(item, type) else repr(item)


def made(item: Any) -> str:
    """What a message adds where a class was given in the place of an object of it."""
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
                f"Trainer(profiler={given!r}) is not known: it can only be one of {sorted(PROFILERS)} or a Profiler object."
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
                f"Trainer(callbacks={shown(item)}): a callback must be a Callback object, not"
                f" {'a class' if isinstance(item, type) else type(item).__name__}.{made(item)}"
            )
        if not isinstance(item, Callback):
            _require_able(item)
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


def _require_able(callback: Any) -> None:
    """Refuse a callback of another library that needs more than the methods of ours."""
    from leyden.loops.foreign import why_not  # noqa: PLC0415  # only for what is not derived from our Callback

    if reason := why_not(callback):
        raise MisconfigurationException(f"Trainer(callbacks=...): {reason}")


def _of_kind(found: Iterable[Any], name: str) -> list[Any]:
    """Return those of one kind of callbacks, known by the name of a class: one of another library counts too."""
    return [item for item in found if any(cls.__name__ == name for cls in type(item).__mro__)]


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
    """Callbacks that installed packages add: each entry point of one of the groups makes one or a list."""
    added: list[Any] = []
    for entry in [entry for group in CALLBACK_GROUPS for entry in _entry_points(group)]:
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
    """Add the callbacks that the module configures; each replaces the Trainer's of its type or of one that it derives from."""
    extra = list(of_module) if isinstance(of_module, (list, tuple)) else [of_module] if of_module else []
    if not extra:
        return of_trainer
    types = {kind for callback in extra for kind in type(callback).__mro__} - {Callback, object}
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
    "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "enable_autolog_hparams", "keep_global_batch",
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

    # what Trainer() takes: names that it does not know are only caught so that it can say what was meant
    signature = inspect.signature(init)
    known = [parameter for name, parameter in signature.parameters.items() if name != "unknown"]
    with_environment.__signature__ = signature.replace(parameters=known)  # type: ignore[attr-defined]
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
