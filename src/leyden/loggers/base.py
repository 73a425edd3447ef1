# SPDX-License-Identifier: Apache-2.0
"""The base class of loggers, and the one place that says who may write: rank zero, one thread at a time."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from threading import RLock
from typing import TYPE_CHECKING, Any, ClassVar

from leyden.hooks import is_written
from leyden.plain import plain_hparams
from leyden.runtime.ranks import rank_zero_only, rank_zero_warn

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

_VERBS = (
    "log_metrics", "log_hyperparams", "log_graph", "save", "finalize", "after_save_checkpoint", "rewind", "set_aside",
)  # fmt: skip


class Logger(ABC):
    """Where the metrics and hyperparameters of a run are written.

    A subclass defines ``name``, ``version``, ``log_metrics`` and ``log_hyperparams``; the rest may stay. The verbs that
    it defines run on rank zero only and never two at a time, with or without ``@rank_zero_only``: rows come from a
    background thread, while hyperparameters and the user's own calls come from the main one.
    """

    threadsafe: ClassVar[bool] = True
    """False: the Trainer calls ``log_metrics`` in its own thread, at the price of waiting for it at every row."""
    every_rank: ClassVar[bool] = False
    """True: the verbs run on all ranks; the logger then sees to it that they do not write to one file."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for verb in _VERBS:
            if callable(method := cls.__dict__.get(verb)):
                setattr(cls, verb, _one_writer(method) if cls.every_rank else rank_zero_only(_one_writer(method)))

    @property
    @abstractmethod
    def name(self) -> str | None:
        """The name of the experiment: what several versions have in common."""

    @property
    @abstractmethod
    def version(self) -> int | str | None:
        """What tells this run from the others of the experiment."""

    @property
    def save_dir(self) -> str | None:
        """The directory under which everything is kept; None if nothing is kept in files."""
        return None

    @property
    def root_dir(self) -> str | None:
        """The directory of all versions of the experiment; None if nothing is kept in files."""
        return None

    @property
    def log_dir(self) -> str | None:
        """The directory of this version; None if nothing is kept in files."""
        return None

    @property
    def experiment(self) -> Any:
        """The object of the tool behind the logger, for all that this interface lacks; None if there is none."""
        return None

    @property
    def group_separator(self) -> str:
        """What stands between a group and a name within it, as in ``train/loss``."""
        return "/"

    def begin(self) -> None:
        """Called when a run begins: make what it logs to."""
        _ = self.experiment

    @abstractmethod
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record one row: a number for each name, at ``step``."""

    @abstractmethod
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Record the hyperparameters; those of a later call are added."""

    # a parameter more than Lightning's base would break its subclasses: keep the signatures of the verbs below
    def log_graph(self, model: Module, input_array: Tensor | None = None) -> None:
        """Record the graph of ``model``, traced with ``input_array`` or, without one, ``model.example_input_array``."""

    def save(self) -> None:
        """Bring to disk what is still held in memory."""

    def finalize(self, status: str) -> None:
        """End the run, with ``status`` ``"success"`` or ``"failed"``; a later run may use the same logger."""
        self.save()

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Called with the ModelCheckpoint callback each time it has saved."""

    # ------------------------------------------------------------------ a run that goes on in another process

    def state_dict(self) -> dict[str, Any]:
        """Return plain data for a checkpoint: which run this is and, if the logger can tell, how far its log reaches.

        All that was logged must be safe when this returns: on disk, or wherever it is kept.
        """
        return run_ids(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the run of ``state``, unless the user has named another.

        Called with what ``state_dict`` returned when the checkpoint was written, and the path of that under
        ``"checkpoint"``, before anything asks for the run.
        """

    def rewind(self) -> None:
        """Take back what was logged after the state that ``load_state_dict`` got: the run will log it again.

        Called when everything else has been restored, before the first row.
        """

    def set_aside(self) -> None:
        """Put away what the named version holds: the run that wrote it left no checkpoint, and now begins anew."""


def run_ids(logger: Any) -> dict[str, Any]:
    """Return what tells the run of any logger, as plain data: its name, version and directory."""
    version, save_dir = logger.version, getattr(logger, "save_dir", None)
    return {
        "name": None if logger.name is None else str(logger.name),
        "version": version if version is None or type(version) is int else str(version),
        "save_dir": None if save_dir is None else str(save_dir),
    }


def keeps_position(logger: Any) -> bool:
    """Whether a logger can take back rows, so that its rows must be written before it says how far its log reaches."""
    return is_written(logger, "rewind", Logger)


def run_states(loggers: Iterable[Any]) -> list[dict[str, Any]]:
    """Return the state of each logger for a checkpoint, with the name of its class.

    A logger that cannot say how far its log reaches is no reason to lose the checkpoint: that gives a warning.
    """
    states = []
    for logger in loggers:
        take = getattr(logger, "state_dict", None)
        try:
            state = take() if callable(take) else run_ids(logger)
            _, other = plain_hparams(state)
            if other:
                raise TypeError(f"{', '.join(other)}: only plain data can be in a checkpoint")
        except Exception as error:
            rank_zero_warn(
                f"{type(logger).__name__}.state_dict() failed while a checkpoint was written; a run that goes on from it"
                f" cannot take back the rows after it: {type(error).__name__}: {error}"
            )
            state = {}
        states.append({**state, "class": type(logger).__qualname__})
    return states


def write_lock(logger: Logger) -> RLock:
    """Return the lock that the verbs of ``logger`` hold while they run.

    It is made at its first use: subclasses need not call ``super().__init__()``. A process forked at the wrong moment
    inherits it locked, so worker processes of a DataLoader must not write to a logger.
    """
    holder: _LockHolder | None = logger.__dict__.get("_write_lock")
    if holder is None:
        holder = logger.__dict__.setdefault("_write_lock", _LockHolder())  # atomic: two threads get the same one
    return holder.lock


class _LockHolder:
    """Lets the owner of a lock be copied and pickled: the copy gets a lock of its own."""

    def __init__(self) -> None:
        self.lock = RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _LockHolder, ()


def _one_writer(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def write(self: Logger, *args: Any, **kwargs: Any) -> Any:
        with write_lock(self):
            return method(self, *args, **kwargs)

    return write


def rank_zero_experiment(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Decorate the getter of ``experiment``: on rank zero its result, elsewhere an object that ignores every call."""

    @functools.wraps(fn)
    def experiment(self: Any) -> Any:
        return fn(self) if on_rank_zero() else DummyExperiment()

    return experiment


@rank_zero_only
def on_rank_zero() -> bool:
    """Whether this process may write; None, which is as good as False, where it may not."""
    return True


class DummyExperiment:
    """Stands in for a logger's ``experiment`` where nothing is to be written: every method exists and does nothing."""

    def nop(self, *args: Any, **kwargs: Any) -> None:
        """Accept anything, do nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        # copy and pickle probe for special methods, and must learn that there are none
        if name.startswith("__"):
            raise AttributeError(name)
        return self.nop

    def __getitem__(self, index: Any) -> DummyExperiment:
        return self

    def __setitem__(self, index: Any, value: Any) -> None:
        pass


class DummyLogger(Logger):
    """Takes the place of the user's loggers during ``fast_dev_run``: accepts every call, writes nothing."""

    def __init__(self) -> None:
        self._experiment = DummyExperiment()

    @property
    def name(self) -> str:
        """Empty."""
        return ""

    @property
    def version(self) -> str:
        """Empty."""
        return ""

    @property
    def experiment(self) -> DummyExperiment:
        """An object of which every method exists and does nothing."""
        return self._experiment

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__") or name == "_experiment":
            raise AttributeError(name)
        return self._experiment.nop

    def __getitem__(self, index: Any) -> DummyLogger:
        return self
