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
from leyden.loggers.base import rank_zero_experiment, write_lock
from leyden.loggers.folder import HPARAMS_FILE, FolderLogger
from leyden.loggers.params import flatten_params, sanitize_params
from leyden.runtime.ranks import rank_zero_warn
from leyden.tree import move_to
from leyden.types import PathLike

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardLogger(FolderLogger):
    """Keep the metrics of a run as TensorBoard events in ``<save_dir>/<name>/version_N``.

    The hyperparameters are there too, and in ``hparams.yaml``. Look at them with ``tensorboard --logdir <save_dir>``.

    Args:
        save_dir, name, version: see :class:`~leyden.loggers.folder.FolderLogger`.
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
        name: str | None = "leyden_logs",
        version: int | str | None = None,
        log_graph: bool = False,
        default_hp_metric: bool = True,
        prefix: str = "",
        sub_dir: PathLike | None = None,
        **kwargs: Any,
    ) -> None:
        if find_spec("tensorboard") is None:
            raise MisconfigurationException(
                "TensorBoardLogger needs the package 'tensorboard', which is not installed: "
                "run `pip install tensorboard`, or use CSVLogger."
            )
        super().__init__(save_dir, name, version)
        self._log_graph = log_graph
        self._default_hp_metric = default_hp_metric
        self._prefix = f"{prefix}{self.LOGGER_JOIN_CHAR}" if prefix else ""
        self._sub_dir = None if sub_dir is None else os.fspath(sub_dir)
        self._kwargs = kwargs
        self._experiment: SummaryWriter | None = None

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
    def experiment(self) -> SummaryWriter:
        """torch's ``SummaryWriter``: ``self.logger.experiment.add_image(…)`` and all its other verbs."""
        if self._experiment is None:
            with write_lock(self):
                if self._experiment is None:
                    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  half a second, only for runs that log to it

                    self._experiment = SummaryWriter(log_dir=self.log_dir, **{"max_queue": 1000, **self._kwargs})
        return self._experiment

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Record one scalar for each name; a value that is a dict of numbers becomes one chart with several curves."""
        from tensorboard.compat.proto.summary_pb2 import Summary  # noqa: PLC0415  see experiment

        writer: SummaryWriter = self.experiment
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
            self._add_summary(Summary(value=scalars), step)

    def _add_summary(self, summary: Any, step: int | None) -> None:
        file_writer = self.experiment.file_writer
        if file_writer is None:  # the user has closed the experiment: a new one continues in another file
            self._experiment = None
            file_writer = self.experiment.file_writer
        file_writer.add_summary(summary, step)

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
        added = self.add_hyperparams(params)
        self.write_hyperparams()
        if metrics is None:
            metrics = {"hp_metric": -1} if self._default_hp_metric else {}
        elif not isinstance(metrics, dict):
            metrics = {"hp_metric": metrics}
        if not metrics:
            return
        self.log_metrics(metrics, step)
        from torch.utils.tensorboard.summary import hparams  # noqa: PLC0415  see experiment

        # the writer's own add_hparams would put them into a run of their own, in a folder beside this one
        for summary in hparams(sanitize_params(flatten_params(added)), metrics):  # type: ignore[no-untyped-call]
            self._add_summary(summary, step)

    def log_graph(self, model: Module, input_array: Tensor | tuple[Any, ...] | None = None) -> None:
        """Record the graph of ``model``, if ``log_graph`` is set: it is traced with ``model.example_input_array``."""
        if not self._log_graph:
            return
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
        if self._experiment is None:
            return
        self._experiment.flush()
        if not self.has_hyperparams_file():
            self.write_hyperparams()

    def finalize(self, status: str) -> None:
        """Bring everything to disk and close the event file; the next call of any verb opens another."""
        self.save()
        if self._experiment is not None:
            self._experiment.close()
            self._experiment = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_experiment": None}


def _describe(value: Any) -> str:
    return "not set" if value is None else f"of type {type(value).__name__}"
