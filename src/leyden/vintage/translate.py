# SPDX-License-Identifier: Apache-2.0
"""Turns the arguments that the Trainer and the callbacks took in 2019 into those that they take today."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from leyden.errors import MisconfigurationException, did_you_mean
from leyden.runtime.ranks import rank_zero_info
from leyden.vintage.tables import CALLBACK_ARGUMENTS, DEFAULTS, REQUIRED, SOON_AFTER, TRAINER_ARGUMENTS

_UNSET = {"strategy": "auto", "devices": "auto", "num_nodes": 1, "overfit_batches": 0.0}
"""Defaults of today that are not None."""
_BACKENDS = ("dp", "ddp", "ddp2", "ddp_cpu")
_AMP_LEVELS = {"O0": "32-true", "O1": "16-mixed", "O2": "16-mixed", "O3": "16-true"}
_FRACTIONS = ("train_percent_check", "val_percent_check", "test_percent_check", "overfit_pct")
_RENAMED = (
    "experiment", "progress_bar", "max_nb_epochs", "min_nb_epochs", "add_log_row_interval", "print_weights_summary",
    "nb_sanity_val_steps", *_FRACTIONS,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the arguments of 2019 ask of a run beyond the arguments of today."""

    restores: bool = False
    """Whether a session is restored whose checkpoint lies in the folder of the first logger."""
    cluster: Any = None
    """Knows, in a job that goes on, from which checkpoint."""
    flush_every: int = 0
    """Bring what was logged to disk every so many batches; 0 leaves it to the loggers."""


def arguments(old: Mapping[str, Any], given: dict[str, Any], hint: Callable[[str, Iterable[str]], str]) -> Wishes:
    """Change ``given``, the Trainer's arguments of today, to what ``old``, those of 2019, say.

    ``hint`` says what to write in the place of a name that is unknown, given those that are known.

    Raises:
        TypeError: for a name that is neither of then nor of today.
        MisconfigurationException: for a value that cannot be, or for both names of one thing.
    """
    rows = {row.name: row for row in TRAINER_ARGUMENTS}
    if any(name in rows for name in old):  # alone, the others are of a later year, whose defaults are today's
        rows |= {row.name: row for row in SOON_AFTER}
    for name, value in old.items():
        if name not in rows:
            raise TypeError(
                f"Trainer.__init__() got an unexpected keyword argument {name!r}.{hint(name, [*given, *rows])}"
            )
        modern = rows[name].modern
        if modern not in ("", "callbacks") and given[modern] != _UNSET.get(modern):
            raise MisconfigurationException(
                f"Trainer({name}={value!r}, {modern}={given[modern]!r}): these are the old and the new name of one thing."
                f" Give {modern} only."
            )
    for name in _FRACTIONS:
        _check_fraction(name, old.get(name, 0.0))
    for name in _RENAMED:
        if name in old:
            given[rows[name].modern] = float(old[name]) if name in _FRACTIONS else old[name]
    if old.get("overfit_pct") and given["limit_test_batches"] is None:
        given["limit_test_batches"] = float(old["overfit_pct"])
    clip = old.get("gradient_clip")
    if clip and not (isinstance(clip, (int, float)) and clip < 0):  # the default options of then say -1 for none
        given["gradient_clip_val"] = old["gradient_clip"]
    _devices(old, given)
    _precision(old, given)
    _callbacks(old, given)
    _defaults(given)
    given["semantics"] = given["semantics"] or "leyden"  # what a program imports changes nothing for 2019's arguments
    every = old.get("log_save_interval", 0)
    if not isinstance(every, int) or isinstance(every, bool) or every < 0:
        raise MisconfigurationException(
            f"Trainer(log_save_interval={every!r}): it must be a number of batches, 0 or more."
        )
    return Wishes(old.get("experiment") is not None, old.get("cluster"), every)


def _check_fraction(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise MisconfigurationException(
            f"Trainer({name}={value!r}): it must be a fraction from 0.0 to 1.0. A number of batches goes to limit_*_batches."
        )


def _defaults(given: dict[str, Any]) -> None:
    """Apply the defaults of 2019 where nothing was said."""
    if given["max_epochs"] is None and given["max_steps"] == -1 and given["max_time"] is None:
        given["max_epochs"] = 1000
    if given["min_epochs"] is None:
        given["min_epochs"] = 1
    if given["barebones"]:
        return
    for name, value in DEFAULTS.items():
        across = name == "val_check_interval" and given["check_val_every_n_epoch"] is None
        if given[name] is None and not across:
            given[name] = value


# --------------------------------------------------------------------------------------------- devices


def _devices(old: Mapping[str, Any], given: dict[str, Any]) -> None:
    nodes, backend = old.get("nb_gpu_nodes", 1), old.get("distributed_backend", "dp")
    if backend not in (*_BACKENDS, None):
        raise MisconfigurationException(
            f"Trainer(distributed_backend={backend!r}): it must be 'dp', 'ddp', 'ddp2', 'ddp_cpu' or None."
            f"{did_you_mean(str(backend), _BACKENDS)} Other ways to use several devices are names of strategy=."
        )
    if "nb_gpu_nodes" in old:
        if not isinstance(nodes, int) or isinstance(nodes, bool) or nodes < 1:
            raise MisconfigurationException(
                f"Trainer(nb_gpu_nodes={nodes!r}): it must be a number of machines, 1 or more."
            )
        given["num_nodes"] = nodes
        if nodes > 1 and backend != "ddp":
            rank_zero_info(f"Trainer(nb_gpu_nodes={nodes}): {backend!r} works on one machine only; using 'ddp'.")
            backend = "ddp"
    elif given["num_nodes"] != 1:
        nodes = given["num_nodes"]
        backend = "ddp" if backend in ("dp", "ddp2") else backend
    if backend == "ddp2":
        backend = "dp" if nodes == 1 else "ddp"
        rank_zero_info(
            f"Trainer(distributed_backend='ddp2'): it is {backend!r} here"
            f"{', with one process on this machine.' if nodes == 1 else ', with one process for each GPU.'}"
        )
    count = _processes(old, given, backend)
    if "gpus" in old and count == 1:
        ids = _gpu_ids(old["gpus"])
        if given["accelerator"] not in ("auto", "gpu", "cuda") and ids:
            raise MisconfigurationException(
                f"Trainer(gpus={old['gpus']!r}, accelerator={given['accelerator']!r}): give one of the two."
            )
        if ids:
            given["accelerator"], given["devices"], count = "gpu", ids, len(ids)
        else:
            given["accelerator"], given["devices"] = "cpu", 1
    # one device needs no backend; that of 2019 was 'dp' even on a CPU
    if backend is not None and (count > 1 or nodes > 1):
        several = "ddp_notebook" if hasattr(sys, "ps1") else "ddp"  # there is no script in a session
        given["strategy"] = "dp" if backend == "dp" and given["accelerator"] != "cpu" else several


def _processes(old: Mapping[str, Any], given: dict[str, Any], backend: Any) -> int:
    """Read ``num_processes``, and have as many processes on the CPU; return their number, 1 for none that are asked for."""
    count = old.get("num_processes", 1)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise MisconfigurationException(
            f"Trainer(num_processes={count!r}): it must be a number of processes, 1 or more."
        )
    if backend == "ddp_cpu" or count > 1:
        if old.get("gpus") not in (None, "", 0, [], ()):
            raise MisconfigurationException(
                f"Trainer(num_processes={count}, gpus={old['gpus']!r}): these are processes on the CPU. Give gpus only; each"
                " GPU has a process of its own under distributed_backend='ddp'."
            )
        given["accelerator"], given["devices"] = "cpu", count
    return count


def _gpu_ids(gpus: Any) -> list[int]:
    """Read ``gpus``: the ids of the devices to use; none for the CPU."""
    count = torch.cuda.device_count()
    if gpus in (None, "", 0, [], ()):
        return []
    if gpus in (-1, "-1", [-1], ["-1"]):
        ids = list(range(count))
    elif isinstance(gpus, int) and not isinstance(gpus, bool):
        ids = list(range(gpus))
    else:
        parts = gpus.split(",") if isinstance(gpus, str) else gpus
        try:
            ids = [int(str(part)) for part in parts if str(part).strip()]
        except (TypeError, ValueError):
            raise MisconfigurationException(
                f"Trainer(gpus={gpus!r}): it must be a list of ids ([0, 1]), a text with them ('0,1'), '-1' for all, or"
                " None for the CPU."
            ) from None
    here = f"the GPUs here are {list(range(count))}" if count else "there is no GPU here"
    if not ids or any(index not in range(count) for index in ids):
        raise MisconfigurationException(
            f"Trainer(gpus={gpus!r}): {here}. Name ids that are here, or leave gpus out to take what there is; on the CPU"
            " distributed_backend='ddp_cpu' with num_processes=2 (say) uses several processes."
        )
    if len(set(ids)) < len(ids):
        raise MisconfigurationException(f"Trainer(gpus={gpus!r}) names a GPU twice.")
    return ids


def _precision(old: Mapping[str, Any], given: dict[str, Any]) -> None:
    level = old.get("amp_level", "O2")
    if level not in _AMP_LEVELS:
        raise MisconfigurationException(f"Trainer(amp_level={level!r}): it must be one of {list(_AMP_LEVELS)}.")
    if old.get("use_amp"):
        given["precision"] = _AMP_LEVELS[level]


# --------------------------------------------------------------------------------------------- callbacks


def _load(target: str) -> Any:
    """Import ``"module:name"``: it stands above this file, and only who asks for it loads it."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _callbacks(old: Mapping[str, Any], given: dict[str, Any]) -> None:
    own = given["callbacks"]
    found = list(own) if isinstance(own, (list, tuple)) else [] if own is None else [own]
    early, checkpoint = old.get("early_stop_callback"), old.get("checkpoint_callback")
    if early not in (None, False):
        found.append(_load("leyden.callbacks:EarlyStopping")() if early is True else as_then(early))
    if checkpoint is False:
        given["enable_checkpointing"] = False
    elif checkpoint not in (None, True):
        found.append(as_then(checkpoint))
    norm = _norm(old.get("track_grad_norm", -1))
    if norm is not None:
        found.append(_load("leyden.vintage.callbacks:GradientNorms")(norm))
    if old.get("print_nan_grads"):
        found.append(_load("leyden.vintage.callbacks:NaNGradients")())
    if old.get("cluster") is not None:
        found.append(_load("leyden.search:WalltimeCheckpoint")(old["cluster"]))
    position = old.get("process_position", 0)
    if not isinstance(position, int) or isinstance(position, bool) or position < 0:
        raise MisconfigurationException(
            f"Trainer(process_position={position!r}): it must be a number of rows, 0 or more."
        )
    if position and given["enable_progress_bar"] is not False and not given["barebones"]:
        found.append(_load("leyden.callbacks:TQDMProgressBar")(process_position=position))
    if not old.get("enable_early_stop", True):
        found = [item for item in found if not any(cls.__name__ == "EarlyStopping" for cls in type(item).__mro__)]
    given["callbacks"] = found


def _norm(value: Any) -> float | None:
    """Read ``track_grad_norm``: the p of a norm; None for none."""
    try:
        norm = float(value)
    except (TypeError, ValueError):
        norm = 0.0
    if norm == -1:
        return None
    if isinstance(value, bool) or not norm > 0:
        raise MisconfigurationException(
            f"Trainer(track_grad_norm={value!r}): it must be the p of a norm (2, say, or 'inf'), or -1 for none."
        )
    return norm


def is_dated(name: str, init: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a callback is called as in 2019: by a name or in the order of then, with mode 'auto', or without what is
    needed today.
    """
    today = inspect.signature(init).parameters
    place = [row.name for row in CALLBACK_ARGUMENTS[name]].index("mode")
    if any(key not in today for key in kwargs) or "auto" in (kwargs.get("mode"), *args[place : place + 1]):
        return True
    if name == "ModelCheckpoint" and any(isinstance(arg, int) for arg in args[2:3]):
        return True  # the third is the metric today, and was verbose
    needed = [p.name for p in list(today.values())[1:] if p.default is p.empty]
    return any(key not in kwargs for key in needed[len(args) :])


def fits_both(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of a callback, which is one of today, could be one of 2019: no argument is of today alone."""
    names = [row.name for row in CALLBACK_ARGUMENTS[name]]
    return len(args) <= len(names) and all(key in names[len(args) :] for key in kwargs)


def as_then(callback: Any) -> Any:
    """Return a callback, made anew with the defaults and the order of 2019 if nothing but its Trainer tells that year.

    ``ModelCheckpoint(path, "val_loss")`` has a filename today and a metric in 2019; the Trainer's ``checkpoint_callback=``
    settles it.
    """
    init = getattr(type(callback).__init__, "__wrapped__", None)
    name = type(callback).__name__
    call = vars(callback).pop("_call", None) if name in CALLBACK_ARGUMENTS else None
    # not one of the user's own class, whose constructor may do more
    if call is not None and init is not None and init.__qualname__ == f"{name}.__init__":
        args, kwargs = call
        init(callback, **callback_arguments(name, init, args, kwargs))
    return callback


def callback_arguments(
    name: str, init: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of today for a callback that is called as in 2019; those of today may stand among them.

    Raises:
        TypeError: for a name that is neither of then nor of today, or an argument that is missing or given twice.
        MisconfigurationException: for a mode that cannot be.
    """
    rows, today = CALLBACK_ARGUMENTS[name], list(inspect.signature(init).parameters)[1:]
    names = [row.name for row in rows]
    for key in kwargs:
        if key not in names and key not in today:
            raise TypeError(f"{name}() has no argument {key!r}.{did_you_mean(key, [*today, *names])}")
    if len(args) > len(names) or (twice := [key for key in names[: len(args)] if key in kwargs]):
        raise TypeError(
            f"{name}(): {f'{twice[0]!r} is given twice' if len(args) <= len(names) else 'too many arguments'}."
        )
    then = {**dict(zip(names, args, strict=False)), **{key: kwargs[key] for key in kwargs if key in names}}
    missing = [
        row.name for row in rows if row.default is REQUIRED and row.name not in then and row.modern not in kwargs
    ]
    if missing:
        raise TypeError(f"{name}() needs {missing[0]!r}.")
    then = {**{row.name: row.default for row in rows if row.default is not REQUIRED}, **then}
    then["mode"] = _mode(name, then["mode"], str(then["monitor"]))
    then["verbose"] = bool(then["verbose"])
    return {**(_checkpoint(then) if name == "ModelCheckpoint" else then), **_only_today(kwargs, names)}


def _only_today(kwargs: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key not in names}


def _mode(name: str, mode: Any, monitor: str) -> str:
    if mode not in ("auto", "min", "max"):
        raise MisconfigurationException(
            f"{name}(mode={mode!r}): must be 'auto', 'min' or 'max'.{did_you_mean(str(mode), ('auto', 'min', 'max'))}"
        )
    rises = "acc" in monitor or monitor.startswith("fmeasure")
    return mode if mode != "auto" else "max" if rises else "min"


def _checkpoint(then: dict[str, Any]) -> dict[str, Any]:
    best, prefix = then["save_best_only"], then["prefix"]
    return {
        "dirpath": then.get("filepath"),
        "filename": f"{prefix}_{{epoch}}-{{step}}" if prefix else None,
        "monitor": then["monitor"] if best else None,
        "mode": then["mode"],
        "verbose": then["verbose"],
        "save_top_k": 1 if best else -1,
        "save_weights_only": then["save_weights_only"],
        "every_n_epochs": then["period"],
    }
