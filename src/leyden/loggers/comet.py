# SPDX-License-Identifier: Apache-2.0
"""Log to Comet, on its servers or, offline, into an archive that is sent there later."""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor
from torch.nn import Module

from leyden.loggers.base import on_rank_zero, rank_zero_experiment, write_lock
from leyden.loggers.params import params_to_dict
from leyden.loggers.service import ServiceLogger, is_installed, library

log = logging.getLogger(__name__)

AVAILABLE = is_installed("comet_ml")
FRAMEWORK_NAME = "pytorch-lightning"
"""What Comet is told that the numbers come from: it sorts them by names that it knows, and this is the one for us."""
_FORMER = {
    # arguments that there were before, what they are called today, and whether Comet itself takes that
    "experiment_name": ("name", True),
    "project_name": ("project", False),
    "offline": ("online", False),
    "save_dir": ("offline_directory", True),
}


class CometLogger(ServiceLogger):
    """Log to Comet: metrics, hyperparameters, the graph of the model.

    A run that goes on from a checkpoint goes on with its Comet experiment, unless ``experiment_key`` or ``mode`` say
    otherwise. The experiment begins when the logger is made and is not ended by it: call ``logger.experiment.end()``.

    Args:
        api_key: Your key; None: what Comet finds in its settings.
        workspace: The workspace; None: the default one.
        project: The project; None: the default one.
        experiment_key: The experiment to log to, or the key of the one to make; 32 to 50 letters and digits.
        mode: ``"get_or_create"`` (the default of Comet), ``"get"`` one that exists, ``"create"`` a new one.
        online: False: write an archive, which ``comet upload`` sends later. None: as Comet finds it.
        prefix: Put before every name of a metric, with an underscore between.
        **kwargs: For ``comet_ml.ExperimentConfig``: ``name``, ``tags``, ``offline_directory``, ``log_code``, …

    Raises:
        ModuleNotFoundError: without the package comet_ml.
    """

    def __init__(
        self,
        *,
        api_key: str | None = None,
        workspace: str | None = None,
        project: str | None = None,
        experiment_key: str | None = None,
        mode: Literal["get_or_create", "get", "create"] | None = None,
        online: bool | None = None,
        prefix: str | None = None,
        **kwargs: Any,
    ) -> None:
        # Comet looks at it when it is imported: it would log by itself what we log
        os.environ["COMET_DISABLE_AUTO_LOGGING"] = "1"
        comet_ml = library("comet_ml", "comet", "CometLogger")
        given: dict[str, Any] = {"project": project, "online": online}
        for former, (now, is_theirs) in _FORMER.items():
            if former in kwargs:
                value = kwargs.pop(former)
                target = kwargs if is_theirs else given
                twice = target.get(now) is not None
                log.warning(
                    f"CometLogger({former}=...) is called {now} today{', and that is given too and is taken' if twice else ''}."
                )
                if not twice:
                    target[now] = value
        self._api_key = api_key
        self._workspace = workspace
        self._project_name: str | None = given["project"]
        self._experiment_key = experiment_key
        self._mode = mode
        self._online: bool | None = given["online"]
        self._prefix = prefix
        self._kwargs = kwargs
        self._named = experiment_key is not None or mode is not None
        self._experiment: Any = None
        self._comet_config = comet_ml.ExperimentConfig(**kwargs)
        if on_rank_zero():
            self._open()

    def _open(self) -> None:
        comet_ml = library("comet_ml", "comet", "CometLogger")
        self._experiment = comet_ml.start(
            api_key=self._api_key,
            workspace=self._workspace,
            project=self._project_name,
            experiment_key=self._experiment_key,
            mode=self._mode,
            online=self._online,
            experiment_config=self._comet_config,
        )
        if self._experiment is None:
            raise comet_ml.exceptions.ExperimentNotFound("Comet has made no experiment, and does not say why.")
        self._experiment_key = self._experiment.get_key()
        self._project_name = self._experiment.project_name
        self._experiment.log_other("Created from", FRAMEWORK_NAME)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The experiment of Comet, for all that this class lacks."""
        if self._experiment is None:
            with write_lock(self):
                if self._experiment is None:
                    self._open()
        return self._experiment

    def __getstate__(self) -> dict[str, Any]:
        """A copy in another process logs to the same experiment."""
        key = self._experiment.get_key() if self._experiment is not None else None
        return {**self.__dict__, "_experiment_key": key, "_experiment": None}

    # ------------------------------------------------------------------ which run

    @property
    def save_dir(self) -> str | None:
        """The directory of the archives, offline."""
        folder: str | None = self._comet_config.offline_directory
        return folder

    @property
    def name(self) -> str | None:
        """The project."""
        return self._project_name

    @property
    def version(self) -> str | None:
        """The key of the experiment, where there is one."""
        return str(self._experiment.get_key()) if self._experiment is not None else self._version_of_first

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the experiment of ``state``, if it is of this project and the user has named no other.

        The one that began with this logger, and has nothing in it, is ended.
        """
        found = self._run_of(state)
        if not found or self._named or found == self.version:
            return
        if self._experiment is not None:
            self._experiment.log_other("Continued as", found)
            self._experiment.end()
        self._experiment, self._experiment_key = None, found
        self._mode = "get" if self._online is not False else self._mode

    # ------------------------------------------------------------------ what is logged

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log one row; ``epoch``, where it is in it, is Comet's epoch."""
        row = {
            name: value.detach().cpu() if isinstance(value, Tensor) else value for name, value in dict(metrics).items()
        }
        epoch = row.pop("epoch", None)
        self.experiment.__internal_api__log_metrics__(
            row, step=step, epoch=epoch, prefix=self._prefix, framework=FRAMEWORK_NAME
        )

    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Log hyperparameters; Comet flattens nested ones."""
        self.experiment.__internal_api__log_parameters__(
            parameters=params_to_dict(params), framework=FRAMEWORK_NAME, flatten_nested=True, source="manual"
        )

    def log_graph(self, model: Module, input_array: Tensor | None = None) -> None:
        """Log the layers of the model."""
        if self._experiment is not None:
            self._experiment.__internal_api__set_model_graph__(graph=model, framework=FRAMEWORK_NAME)

    def finalize(self, status: str) -> None:
        """Send what is not sent yet. The experiment stays open for what may follow."""
        if self._experiment is not None:
            self._experiment.flush()
