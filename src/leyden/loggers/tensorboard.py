# SPDX-License-Identifier: Apache-2.0
"""Log to TensorBoard event files, through torch's own writer."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module

from leyden.errors import MisconfigurationException
from leyden.loggers.base import on_rank_zero, rank_zero_experiment, write_lock
from leyden.loggers.folder import HPARAMS_FILE, LOG_FOLDER, FolderLogger, is_local, sync_file
from leyden.loggers.params import flatten_params, sanitize_params
from leyden.runtime.ranks import rank_zero_info, rank_zero_warn
from leyden.tree import move_to
from leyden.types import PathLike

if TYPE_CHECKING:
    from leyden.loggers.events import EventWriter


class TensorBoardLogger(FolderLogger):
    """Keep the metrics of a run as TensorBoard events in ``<save_dir>/<name>/version_N``.

    The hyperparameters are there too, and in ``hparams.yaml``. Look at them with ``tensorboard --logdir <save_dir>``.

    Args:
        save_dir, name, version, resume: see :class:`~leyden.loggers.folder.FolderLogger`.
        log_graph: also record the graph of the model; it needs ``model.example_input_array``.
        default_hp_metric: when hyperparameters come without metrics, log ``hp_metric`` = -1: TensorBoard shows
            hyperparameters only beside a metric.
        prefix: put before every name, with a dash between.
        sub_dir: a folder within that of the version, to part several writers of one run.
        **kwargs: for torch's ``SummaryWriter``: ``flush_secs``, ``max_queue`` (1000 here, since torch's 10 makes its
            thread and ours wait for each other), ``purge_step``, ``filename_suffix``.
    """

    LOGGER_JOIN_CHAR = "-"
    NAME_HPARAMS_FILE = HPARAMS_FILE

    def __init__(
        self,
        save_dir: PathLike,
        name: str | None = LOG_FOLDER,
        version: int | str | None = None,
        log_graph: bool = False,
        default_hp_metric: bool = True,
        prefix: str = "",
        sub_dir: PathLike | None = None,
        resume: bool = True,
        **kwargs: Any,
    ) -> None:
        if find_spec("tensorboard") is None:
            raise MisconfigurationException(
                "TensorBoardLogger needs the package 'tensorboard', which is not installed: "
                "run `pip install tensorboard`, or use CSVLogger."
            )
        super().__init__(save_dir, name, version, resume)
        self._log_graph = log_graph
        self._default_hp_metric = default_hp_metric
        self._prefix = f"{prefix}{self.LOGGER_JOIN_CHAR}" if prefix else ""
        self._sub_dir = None if sub_dir is None else os.fspath(sub_dir)
        self._kwargs = kwargs
        self._last_step = -1
        self._experiment: EventWriter | None = None
        self._begun = False
        """Whether a run has begun that has not ended."""
        self._waiting: list[tuple[dict[str, Any], dict[str, Any], int | None]] = []
        """Hyperparameters, with their metrics and step, that go into the event file when there is one."""

    def begin(self) -> None:
        """Take the folder of the version. The event file comes with the first event: TensorBoard is slow to import."""
        _ = self.version
        self._begun = True

    @property
    def sub_dir(self) -> str | None:
        """The folder within that of the version, or None."""
        return self._sub_dir

    @property
    def log_dir(self) -> str:
        """``<save_dir>/<name>/<version>``, and ``sub_dir`` within it if there is one."""
        log_dir = super().log_dir
        return log_dir if self._sub_dir is None else os.path.join(log_dir, os.path.expandvars(self._sub_dir))

    @property
    @rank_zero_experiment
    def experiment(self) -> EventWriter:
        """torch's ``SummaryWriter``: ``self.logger.experiment.add_image(…)`` and all its other verbs."""
        if self._experiment is None:
            with write_lock(self):
                if self._experiment is None:
                    from leyden.loggers.events import EventWriter  # noqa: PLC0415  half a second, only for runs that log to it

                    options = {"max_queue": 1000, **self._kwargs}
                    # a run that goes on has its file already, and may have nothing to add
                    self._experiment = EventWriter(self.log_dir, waits=self._state is not None, **options)
                    waiting, self._waiting = self._waiting, []
                    for each in waiting:
                        self._write_hyperparams(*each)
        return self._experiment

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Record one scalar for each name; a value that is a dict of numbers becomes one chart with several curves."""
        from tensorboard.compat.proto.summary_pb2 import Summary  # noqa: PLC0415  see experiment

        writer: EventWriter = self.experiment
        scalars = []
        for name, value in metrics.items():
            tag = f"{self._prefix}{name}"
            if isinstance(value, dict):
                writer.add_scalars(tag, value, step)
                continue
            try:
                scalars.append(Summary.Value(tag=tag, simple_value=float(value)))
            except (TypeError, ValueError, RuntimeError) as error:
                raise MisconfigurationException(
                    f"TensorBoardLogger cannot log {name}={value!r} of type {type(value).__name__}: a metric is "
                    "a number, a tensor of one element, or a dict of numbers."
                ) from error
        if scalars:
            # one event for the row: TensorBoard shows the same as after one add_scalar for each name, for half the cost
            writer.add(Summary(value=scalars), step)
        self._last_step = max(self._last_step, step or 0)

    def log_hyperparams(
        self,
        params: dict[str, Any] | Namespace | None,
        metrics: dict[str, Any] | float | None = None,
        step: int | None = None,
    ) -> None:
        """Record hyperparameters, for TensorBoard's table of runs and in ``hparams.yaml``.

        Args:
            params: nested dicts and dataclasses are flattened, with ``/`` between the names.
            metrics: what the table shows beside them: a dict of numbers, or one number, named ``hp_metric``.
            step: the step of the metrics.
        """
        if metrics is None and self.knows_hyperparams(params):
            return
        added = self.add_hyperparams(params)
        self.write_hyperparams()
        if metrics is None:
            metrics = {"hp_metric": -1} if self._default_hp_metric else {}
        elif not isinstance(metrics, dict):
            metrics = {"hp_metric": metrics}
        if not metrics:
            return
        if self._experiment is None and self._begun:
            self._waiting.append((added, metrics, step))
        else:
            self._write_hyperparams(added, metrics, step)

    def _write_hyperparams(self, params: dict[str, Any], metrics: dict[str, Any], step: int | None) -> None:
        self.log_metrics(metrics, step)
        from torch.utils.tensorboard.summary import hparams  # noqa: PLC0415  see experiment

        # the writer's own add_hparams would put them into a run of their own, in a folder beside this one
        for summary in hparams(sanitize_params(flatten_params(params)), metrics):  # type: ignore[no-untyped-call]
            self.experiment.add(summary, step)

    def log_graph(self, model: Module, input_array: Tensor | tuple[Any, ...] | None = None) -> None:
        """Record the graph of ``model``, if ``log_graph`` is set: it is traced with ``model.example_input_array``."""
        if not self._log_graph or self._state is not None:
            return  # nobody wants it, or it is there already
        if input_array is None:
            input_array = getattr(model, "example_input_array", None)
        if not isinstance(input_array, (Tensor, tuple)):
            rank_zero_warn(
                "TensorBoardLogger(log_graph=True) recorded no graph: it needs `example_input_array` to be a tensor or "
                f"a tuple of the arguments of `forward`, and it is {_describe(input_array)}. "
                "Set it in the module's __init__."
            )
            return
        parameter = next(model.parameters(), None)
        inputs = move_to(input_array, torch.device("cpu") if parameter is None else parameter.device)
        self.experiment.add_graph(model, inputs)

    def save(self) -> None:
        """Bring all events to disk, and ``hparams.yaml`` if none is there yet."""
        if self._experiment is not None:
            self._experiment.flush()
        elif not self._begun:
            return
        if not self.has_hyperparams_file():
            self.write_hyperparams()

    def finalize(self, status: str) -> None:
        """Bring everything to disk and close the event file; the next call of any verb opens another."""
        if self._begun:
            _ = self.experiment  # a run that has logged nothing is a run, too
            self._begun = False
        super().finalize(status)
        self.close()

    def close(self) -> None:
        """Bring all events to disk and close their file; the next one opens another."""
        if self._waiting:
            _ = self.experiment
        if self._experiment is not None:
            self._experiment.close()
            self._experiment = None

    # ------------------------------------------------------------------ a run that goes on in another process

    def state_dict(self) -> dict[str, Any]:
        """Bring all events to disk; return the version, and how long its event files are."""
        with write_lock(self):
            if not on_rank_zero():
                return {}
            if self._waiting:
                _ = self.experiment
            self.save()
            files = event_files(self.log_dir)
            for path in files:
                sync_file(os.path.join(self.log_dir, path))
            return {**super().state_dict(), "log": {"files": files, "step": self._last_step}}

    def holds(self, state: Mapping[str, Any], folder: str) -> bool:
        """Whether ``folder`` holds the event files that ``state`` tells of, at least as long as they were."""
        if "log" not in state:
            return True
        found = event_files(
            folder if self._sub_dir is None else os.path.join(folder, os.path.expandvars(self._sub_dir))
        )
        known = state["log"]["files"]
        if not known:
            return not found or self.is_at_home(state)
        return all(found.get(path, -1) >= size for path, size in known.items())

    def rewind(self) -> None:
        """Cut the event files back to what the checkpoint knows of, and remove those that came later.

        Files that are not local cannot be cut: TensorBoard is told to show nothing of theirs from the step on that
        follows (``purge_step``).
        """
        state = self._state
        if state is None or "log" not in state:
            return
        known = state["log"]
        self._last_step = known["step"]
        if not is_local(self.log_dir):
            self.experiment.purge_step = self._last_step + 1
            return
        self.close()
        superseded = 0
        for path, size in event_files(self.log_dir).items():
            kept, full = known["files"].get(path, 0), os.path.join(self.log_dir, path)
            superseded += size - kept
            if kept == 0:
                os.remove(full)
            elif kept < size:
                os.truncate(full, kept)
        if superseded:
            rank_zero_info(f"{self.log_dir}: the events after the checkpoint are taken out; the run logs them again.")

    def set_aside(self) -> None:
        """Rename the event files, so that TensorBoard does not show them: ``superseded.<number>``."""
        if not self.begins_anew:
            return
        if is_local(self.log_dir) and (files := event_files(self.log_dir)):
            self.close()
            for path in files:
                full = os.path.join(self.log_dir, path)
                os.rename(full, os.path.join(os.path.dirname(full), f"superseded.{full.rpartition('tfevents.')[2]}"))
            rank_zero_info(
                f"{self.log_dir} is of a run that left no checkpoint: its events are put aside (superseded.*)."
            )
        elif not is_local(self.log_dir):
            self._kwargs = {**self._kwargs, "purge_step": 0}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_experiment": None}


def event_files(folder: str) -> dict[str, int]:
    """Return the event files in ``folder`` and below it, by their path from there, with their sizes in bytes.

    Only local ones: others cannot be cut.
    """
    return {
        os.path.relpath(os.path.join(parent, name), folder): os.path.getsize(os.path.join(parent, name))
        for parent, _, names in os.walk(folder)
        for name in names
        if "tfevents." in name
    }


def _describe(value: Any) -> str:
    return "not set" if value is None else f"of type {type(value).__name__}"
