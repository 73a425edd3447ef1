# SPDX-License-Identifier: Apache-2.0
"""What the loggers of services have in common: the library that may be missing, names, values, and checkpoints to upload."""

from __future__ import annotations

import inspect
import json
import os
from argparse import Namespace
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from leyden.loggers.base import Logger, on_rank_zero
from leyden.loggers.params import params_to_dict


class ServiceLogger(Logger):
    """A logger whose rows a library sends to a service, or keeps in a store of its own.

    A run that goes on from a checkpoint goes on with the run that the checkpoint names, if that is of the same experiment
    and the user has named no other. A service takes nothing back: rows after the checkpoint are there twice, and the same.
    """

    LOGGER_JOIN_CHAR: ClassVar[str] = "-"

    def follow(self, version: str | None) -> None:
        """Take the version of the first process, in all others, which log nothing."""
        self._version_of_first = version

    _version_of_first: str | None = None

    def _run_of(self, state: Mapping[str, Any]) -> str | None:
        """The run that a checkpoint names, if it is of this logger's experiment; else None."""
        version = state.get("version")
        if not isinstance(version, str) or state.get("name") != _text(self.name) or not on_rank_zero():
            return None
        return version


def is_installed(module: str) -> bool:
    """Whether a library is there; it is not imported."""
    try:
        return find_spec(module) is not None
    except ValueError:  # something that stands in for it, without a spec
        return True


def library(module: str, extra: str, logger: str) -> Any:
    """Import a library.

    Raises:
        ModuleNotFoundError: saying what to install.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # the library is there, and lacks something itself
        raise ModuleNotFoundError(
            f"{logger} needs the package {module.partition('.')[0]!r}, which is not installed: run"
            f" `pip install 'leyden[{extra}]'`, or log to files with CSVLogger or TensorBoardLogger.",
            name=module,
        ) from error


def prefixed(metrics: Mapping[str, Any], prefix: str | None, joint: str = "-") -> dict[str, Any]:
    """Return ``metrics`` with ``prefix`` and ``joint`` put before each name, where there is a prefix."""
    return {f"{prefix}{joint}{name}": value for name, value in metrics.items()} if prefix else dict(metrics)


def json_params(params: Mapping[str, Any] | Namespace | None) -> dict[str, Any]:
    """Return hyperparameters as JSON can hold them: of a class its name, of a function what it returns or its name.

    A function is called, since hyperparameters may be given as one that makes the value; if it needs arguments or fails,
    its name stands for it.
    """
    called = {name: _named(value) for name, value in params_to_dict(params).items()}
    return {name: value if _is_json(value) else str(value) for name, value in called.items()}


def _named(value: Any) -> Any:
    if inspect.isclass(value):
        return value.__name__
    if not callable(value):
        return value
    try:
        made = value()
    except Exception:  # any code of the user's: its name is all that is wanted
        return getattr(value, "__name__", None)
    return getattr(value, "__name__", None) if callable(made) else made


def _is_json(value: Any) -> bool:
    if value is None or isinstance(value, (bool, int, float, str, list, dict)):
        return True
    try:
        json.dumps(value)
    except (TypeError, ValueError, OverflowError, RecursionError):
        return False
    return True


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


# --------------------------------------------------------------------------------------------- checkpoints to upload


class Saved(NamedTuple):
    """A checkpoint file that is to be uploaded."""

    path: str
    written: float
    """When it was written, in seconds since 1970."""
    score: Any
    """The value of what ModelCheckpoint monitors, a number, or None."""
    aliases: list[str]
    """``"latest"``, and ``"best"`` for the best one."""


class Uploads:
    """Which checkpoints of ModelCheckpoint callbacks go to the service, and when.

    Args:
        log_model: ``"all"``: each when it is written. True: the ones that are there when the run ends with success, or
            each when it is written where all are kept (``save_top_k=-1``). False: none.
    """

    def __init__(self, log_model: bool | str) -> None:
        self.log_model = log_model
        self.known: dict[str, float] = {}
        """When each uploaded file was written: one that is written anew under its name goes up again."""
        self.waiting: dict[int, Any] = {}
        """The callbacks whose files go up at the end of the run."""

    def due(self, callback: Any) -> bool:
        """Whether what ``callback`` has saved goes up now; otherwise remember the callback for the end, where that is asked."""
        if self.log_model == "all" or (self.log_model is True and getattr(callback, "save_top_k", None) == -1):
            return True
        if self.log_model is True:
            self.waiting[id(callback)] = callback
        return False

    def new(self, callback: Any) -> Iterator[Saved]:
        """Yield the files that ``callback`` has saved and that are not uploaded, the oldest first."""
        scores: dict[str, Any] = {}
        if hasattr(callback, "last_model_path") and hasattr(callback, "current_score"):
            scores[str(callback.last_model_path)] = callback.current_score
        if hasattr(callback, "best_model_path") and hasattr(callback, "best_model_score"):
            scores[str(callback.best_model_path)] = callback.best_model_score
        scores.update({str(path): score for path, score in getattr(callback, "best_k_models", {}).items()})
        files = sorted((os.stat(path).st_mtime, path) for path in scores if os.path.isfile(path))
        best = str(getattr(callback, "best_model_path", ""))
        for written, path in files:
            if self.known.get(path, -1.0) < written:
                score = scores[path]
                score = score.item() if isinstance(score, Tensor) else score
                yield Saved(path, written, score, ["latest", "best"] if path == best else ["latest"])
                self.known[path] = written


_TOLD = ("monitor", "mode", "save_last", "save_top_k", "save_weights_only", "_every_n_train_steps")


def metadata_of(saved: Saved, callback: Any, key: str, more: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return what is told of an uploaded checkpoint: score, file name, and under ``key`` how the callback chose it."""
    told = {name: getattr(callback, name) for name in (*_TOLD, *more) if hasattr(callback, name)}
    return {"score": saved.score, "original_filename": Path(saved.path).name, key: told}
