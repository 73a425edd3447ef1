# SPDX-License-Identifier: Apache-2.0
"""Log to MLflow: to a tracking server, to a data base, or to files."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from time import time
from typing import Any, Literal

from leyden.loggers.base import on_rank_zero, rank_zero_experiment, write_lock
from leyden.loggers.folder import LOG_FOLDER, given_name
from leyden.loggers.params import flatten_params, params_to_dict
from leyden.loggers.service import ServiceLogger, Uploads, is_installed, library, metadata_of, prefixed
from leyden.runtime.ranks import rank_zero_info, rank_zero_warn

log = logging.getLogger(__name__)

AVAILABLE = is_installed("mlflow")
LOCAL_FILE_URI_PREFIX = "file:"
"""How the address of a store of files begins."""
DATA_BASE = "mlflow.db"
"""The file in ``save_dir`` where MLflow has no stores of files."""
_RUN_NAME = "mlflow.runName"
_LONGEST_VALUE = 250
_PARAMS_AT_ONCE = 100
_STATUS = {"success": "FINISHED", "finished": "FINISHED", "failed": "FAILED"}


class MLFlowLogger(ServiceLogger):
    """Log to MLflow: metrics, hyperparameters, checkpoints.

    A run that goes on from a checkpoint goes on with its MLflow run, unless ``run_id`` or ``resume=False`` say otherwise.

    Args:
        experiment_name: The experiment; it is made if there is none of that name.
        run_name: What MLflow shows as the name of the run; None: it makes one up.
        tracking_uri: The address of the server or the store (``http://…``, ``sqlite:///…``, ``file:…``); None: files in
            ``save_dir``, or where MLflow has given that up, ``mlflow.db`` in it. The default is what the environment
            variable ``MLFLOW_TRACKING_URI`` says when this is imported.
        tags: For the run.
        save_dir: The directory of a local store, where ``tracking_uri`` is not given.
        log_model: ``"all"``: upload each checkpoint when it is written. True: those that are there at the end, or each
            when it is written if ModelCheckpoint keeps all (``save_top_k=-1``).
        prefix: Put before every name of a metric, with a dash between.
        artifact_location: Where the artifacts of an experiment that is made go; None: the server decides.
        run_id: The run to log to; None: a new one.
        synchronous: False: MLflow itself sends behind; it needs mlflow >= 2.8. None: its default.
        resume: Go on with the run of a checkpoint.

    Raises:
        ModuleNotFoundError: without the package mlflow.
    """

    def __init__(
        self,
        experiment_name: str = LOG_FOLDER,
        run_name: str | None = None,
        tracking_uri: str | None = os.getenv("MLFLOW_TRACKING_URI"),  # as it is at the import
        tags: dict[str, Any] | None = None,
        save_dir: str | None = "./mlruns",
        log_model: Literal["all"] | bool = False,
        prefix: str = "",
        artifact_location: str | None = None,
        run_id: str | None = None,
        synchronous: bool | None = None,
        resume: bool = True,
    ) -> None:
        library("mlflow", "mlflow", "MLFlowLogger")
        from mlflow.tracking import MlflowClient  # noqa: PLC0415  # heavy, and optional

        files = not tracking_uri
        tracking_uri = tracking_uri or f"{LOCAL_FILE_URI_PREFIX}{save_dir}"
        self._experiment_name = str(given_name(experiment_name))
        self._experiment_id: str | None = None
        self._tracking_uri = tracking_uri
        self._run_name = run_name
        self._run_id = run_id
        self.tags = tags
        self._uploads = Uploads(log_model)
        self._prefix = prefix
        self._artifact_location = artifact_location
        self._log_batch_kwargs: dict[str, Any] = {} if synchronous is None else {"synchronous": synchronous}
        self._resume = resume
        self._initialized = False
        self._save_dir: str | None = None
        try:
            self._mlflow_client: Any = MlflowClient(tracking_uri)
        except Exception:
            if not files or save_dir is None:
                raise
            # since its version 3 MLflow refuses to begin a store of files, its own default of old
            os.makedirs(save_dir, exist_ok=True)
            self._save_dir = os.fspath(save_dir)
            self._tracking_uri = f"sqlite:///{os.path.join(os.path.abspath(save_dir), DATA_BASE)}"
            self._artifact_location = artifact_location or Path(save_dir).absolute().as_uri()
            rank_zero_info("This MLflow keeps no store of files: MLFlowLogger logs to %s.", self._tracking_uri)
            self._mlflow_client = MlflowClient(self._tracking_uri)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """MLflow's client, for all that this class lacks; what it does is done to ``run_id``."""
        if not self._initialized:
            with write_lock(self):
                if not self._initialized:
                    self._open()
                    self._initialized = True
        return self._mlflow_client

    def _open(self) -> None:
        """Find the run, or make one."""
        import mlflow  # noqa: PLC0415  # see __init__

        mlflow.set_tracking_uri(self._tracking_uri)
        if self._run_id is not None:
            self._experiment_id = self._mlflow_client.get_run(self._run_id).info.experiment_id
            return
        experiment_id = self._find_experiment()
        if self._run_name is not None:
            self.tags = self.tags or {}
            if _RUN_NAME in self.tags:
                log.warning(
                    f"MLFlowLogger: the tag {_RUN_NAME!r} and run_name={self._run_name!r} both name the run; the name is"
                    " taken."
                )
            self.tags[_RUN_NAME] = self._run_name
        run = self._mlflow_client.create_run(experiment_id=experiment_id, tags=tag_resolver()(self.tags))
        self._run_id = run.info.run_id

    def _find_experiment(self) -> str | None:
        """The id of the experiment, which is made if it is not there; no run is made."""
        if self._experiment_id is None:
            found = self._mlflow_client.get_experiment_by_name(self._experiment_name)
            if found is not None and found.lifecycle_stage != "deleted":
                self._experiment_id = found.experiment_id
            else:
                log.warning(f"MLflow has no experiment {self._experiment_name!r} here. It is made now.")
                self._experiment_id = self._mlflow_client.create_experiment(
                    name=self._experiment_name, artifact_location=self._artifact_location
                )
        return self._experiment_id

    def __getstate__(self) -> dict[str, Any]:
        """A copy in another process logs to the same run, with a client of its own."""
        return {**self.__dict__, "_mlflow_client": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        from mlflow.tracking import MlflowClient  # noqa: PLC0415  # see __init__

        self.__dict__.update(state)
        self._mlflow_client = MlflowClient(self._tracking_uri)
        self._initialized = False  # the new process has yet to be told the address

    # ------------------------------------------------------------------ which run

    @property
    def run_id(self) -> str | None:
        """The id of the run, which is made if there is none."""
        _ = self.experiment
        return self._run_id or self._version_of_first

    @property
    def experiment_id(self) -> str | None:
        """The id of the experiment; it and the run are made if there is none."""
        _ = self.experiment
        return self._experiment_id

    @property
    def name(self) -> str | None:
        """The id of the experiment, which is made if there is none; no run is made."""
        return self._find_experiment() if self._run_id is None and on_rank_zero() else self.experiment_id

    @property
    def version(self) -> str | None:
        """The id of the run."""
        return self.run_id

    @property
    def save_dir(self) -> str | None:
        """The directory of a local store that was not given by its address; None for others."""
        if self._save_dir is not None:
            return self._save_dir
        prefix = LOCAL_FILE_URI_PREFIX
        return self._tracking_uri.removeprefix(prefix) if self._tracking_uri.startswith(prefix) else None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the run of ``state``, if the store has it in this experiment and the user has named no other."""
        if not self._resume or self._run_id is not None or state.get("version") is None:
            return
        if state.get("experiment") != self._experiment_name or not on_rank_zero():
            return
        try:
            found = self._mlflow_client.get_run(state["version"])
        except Exception as error:  # whatever the store has for "there is none"
            rank_zero_warn(
                f"MLFlowLogger: the run {state['version']!r} of the checkpoint is not at {self._tracking_uri!r}; this run"
                f" gets one of its own: {type(error).__name__}: {error}"
            )
            return
        if found.info.lifecycle_stage != "deleted":
            self._run_id = state["version"]

    def state_dict(self) -> dict[str, Any]:
        """Return the run, and the name of its experiment."""
        return {**super().state_dict(), "experiment": str(self._experiment_name)}

    # ------------------------------------------------------------------ what is logged

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log one row. Text is left out; what MLflow does not allow in a name is taken out of it, with a warning."""
        from mlflow.entities import Metric  # noqa: PLC0415  # see __init__

        row = []
        now_ms = int(time() * 1000)
        for key, value in prefixed(metrics, self._prefix, self.LOGGER_JOIN_CHAR).items():
            if isinstance(value, str):
                log.warning(f"MLFlowLogger leaves out {key}={value!r}: a metric is a number.")
                continue
            allowed = re.sub("[^a-zA-Z0-9_/. -]+", "", key)
            if allowed != key:
                rank_zero_warn(
                    f"MLflow allows letters, digits and '_/. -' in the names of metrics: {key!r} is logged as {allowed!r}.",
                    category=RuntimeWarning,
                )
            row.append(Metric(key=allowed, value=value, timestamp=now_ms, step=step or 0))
        self.experiment.log_batch(run_id=self.run_id, metrics=row, **self._log_batch_kwargs)

    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Log hyperparameters: nested ones as ``outer/inner``, each as text of 250 characters at most."""
        from mlflow.entities import Param  # noqa: PLC0415  # see __init__

        flat = flatten_params(params_to_dict(params))
        items = [Param(key=name, value=str(value)[:_LONGEST_VALUE]) for name, value in flat.items()]
        for start in range(0, len(items), _PARAMS_AT_ONCE):
            self.experiment.log_batch(
                run_id=self.run_id,
                params=items[start : start + _PARAMS_AT_ONCE],
                **self._log_batch_kwargs,
            )

    def finalize(self, status: str = "success") -> None:
        """Upload the checkpoints that are to be, and end the run: ``FINISHED`` or ``FAILED``, or as ``status`` says."""
        if not self._initialized:
            return
        for callback in self._uploads.waiting.values():
            self._upload(callback)
        if self.experiment.get_run(self.run_id):
            self.experiment.set_terminated(self.run_id, _STATUS.get(status, status))

    # ------------------------------------------------------------------ artifacts

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Upload what the callback has saved, now or at the end, as ``log_model`` says."""
        if self._uploads.due(checkpoint_callback):
            self._upload(checkpoint_callback)

    def _upload(self, callback: Any) -> None:
        """Each checkpoint into a folder of its name, with ``metadata.yaml`` and ``aliases.txt`` beside it."""
        import yaml  # noqa: PLC0415  # only runs that upload need it

        from leyden.loggers.params import plain_params  # noqa: PLC0415

        for saved in self._uploads.new(callback):
            folder = Path(saved.path).stem
            self.experiment.log_artifact(self._run_id, saved.path, folder)
            with tempfile.TemporaryDirectory() as temporary:
                told = metadata_of(saved, callback, "Checkpoint", ("_every_n_val_epochs",))
                text = yaml.safe_dump(plain_params(told), default_flow_style=False)
                (Path(temporary) / "metadata.yaml").write_text(text, encoding="utf-8")
                (Path(temporary) / "aliases.txt").write_text(str(saved.aliases), encoding="utf-8")
                self.experiment.log_artifacts(self._run_id, temporary, folder)


def tag_resolver() -> Callable[[Any], Any]:
    """Return MLflow's function that adds to the tags of a run what it knows of the program: user, source, commit."""
    try:
        from mlflow.tracking.context.registry import resolve_tags  # noqa: PLC0415  # see MLFlowLogger.__init__
    except ImportError:  # it is not public, and may move
        return lambda tags: tags
    return resolve_tags
