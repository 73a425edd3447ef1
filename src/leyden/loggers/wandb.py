# SPDX-License-Identifier: Apache-2.0
"""Log to Weights & Biases, on its servers or, offline, into files that are sent there later."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping
from typing import Any, Literal, cast

from torch import nn

from leyden.errors import MisconfigurationException
from leyden.loggers.base import rank_zero_experiment, write_lock
from leyden.loggers.folder import LOG_FOLDER, given_name
from leyden.loggers.service import ServiceLogger, Uploads, is_installed, json_params, library, metadata_of, prefixed
from leyden.runtime.ranks import rank_zero_only, rank_zero_warn
from leyden.types import PathLike

AVAILABLE = is_installed("wandb")
_STEP = "trainer/global_step"


class WandbLogger(ServiceLogger):
    """Log to Weights & Biases: metrics, hyperparameters, media, checkpoints.

    A run that goes on from a checkpoint goes on with its W&B run, unless ``version``, ``id``, ``experiment`` or
    ``resume="never"`` say otherwise. Several fits of one process log to one run; ``wandb.finish()`` ends it.

    Args:
        name: What W&B shows as the name of the run; None: it makes one up.
        save_dir: The directory of W&B's files, ``wandb/`` within it.
        version: The id of the run; one that exists is continued.
        offline: Send nothing; ``wandb sync`` does it later.
        dir: Where ``save_dir`` is None, the same.
        id: Where ``version`` is None, the same.
        anonymous: Log without an account; only old versions of W&B know it.
        project: The project; None: the environment variable ``WANDB_PROJECT``, or else ``leyden_logs``.
        log_model: ``"all"``: upload each checkpoint when it is written. True: those that are there at the end, or each
            when it is written if ModelCheckpoint keeps all (``save_top_k=-1``). Only runs that succeed upload at the end.
        experiment: A W&B run to log to.
        prefix: Put before every name of a metric, with a dash between.
        checkpoint_name: The name of the artifact with the checkpoints; None: ``model-<id of the run>``.
        add_file_policy: ``"mutable"``: W&B copies a checkpoint before it uploads it. ``"immutable"``: it reads the file
            itself, which must stay.
        **kwargs: For ``wandb.init``: ``entity``, ``group``, ``tags``, …

    Raises:
        ModuleNotFoundError: without the package wandb.
        MisconfigurationException: for ``log_model`` with ``offline``.
    """

    def __init__(
        self,
        name: str | None = None,
        save_dir: PathLike | None = ".",
        version: str | None = None,
        offline: bool = False,
        dir: PathLike | None = None,
        id: str | None = None,
        anonymous: bool | None = None,
        project: str | None = None,
        log_model: Literal["all"] | bool = False,
        experiment: Any = None,
        prefix: str = "",
        checkpoint_name: str | None = None,
        add_file_policy: Literal["mutable", "immutable"] = "mutable",
        **kwargs: Any,
    ) -> None:
        library("wandb", "wandb", "WandbLogger")
        if offline and log_model:
            raise MisconfigurationException(
                f"WandbLogger(log_model={log_model!r}, offline={offline!r}): offline nothing can be uploaded, checkpoints"
                " neither. Use offline=False to log the model."
            )
        folder: PathLike | None = dir if save_dir is None else save_dir
        self._wandb_init: dict[str, Any] = {
            "name": name,
            "project": project or os.environ.get("WANDB_PROJECT", str(given_name(LOG_FOLDER))),
            "dir": None if folder is None else os.fspath(folder),
            "id": version or id,
            "resume": "allow",
            "anonymous": "allow" if anonymous else None,
            **kwargs,
        }
        self._offline = offline
        self._prefix = prefix
        self._experiment = experiment
        self._uploads = Uploads(log_model)
        self._checkpoint_name = checkpoint_name
        self._attach_id: str | None = None
        self.add_file_policy = add_file_policy
        self._project: str | None = self._wandb_init["project"]
        self._save_dir: str | None = self._wandb_init["dir"]
        self._name = self._wandb_init["name"]
        self._id: str | None = self._wandb_init["id"]

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of W&B, for all that this class lacks."""
        if self._experiment is None:
            with write_lock(self):
                if self._experiment is None:
                    self._experiment = self._open()
        return self._experiment

    def _open(self) -> Any:
        import wandb  # noqa: PLC0415  # heavy, and optional

        if self._offline:
            os.environ["WANDB_MODE"] = "dryrun"
        if wandb.run is not None:
            rank_zero_warn(
                "WandbLogger logs to the W&B run that is open in this process. For a run of its own call wandb.finish()"
                " before you make the logger."
            )
            return wandb.run
        if self._attach_id is not None and hasattr(wandb, "_attach"):
            return wandb._attach(self._attach_id)  # noqa: SLF001  # its way into a run of another process
        options = self._wandb_init
        if options["anonymous"] is None and "anonymous" not in _words_of(wandb.init):
            options = {name: value for name, value in options.items() if name != "anonymous"}
        run = wandb.init(**options)
        if getattr(run, "define_metric", None):
            # the axis that charts have: W&B's own counts calls, of several loggers and of the user's too
            if self._wandb_init.get("sync_tensorboard"):
                run.define_metric("*", step_metric="global_step")
            else:
                run.define_metric(_STEP)
                run.define_metric("*", step_metric=_STEP, step_sync=True)
        return run

    def __getstate__(self) -> dict[str, Any]:
        """A copy in another process logs to the same run: the run is opened here, and the copy enters it."""
        import wandb  # noqa: PLC0415  # see experiment

        wandb.require("service")
        run = self.experiment
        state = {**self.__dict__, "_experiment": None}
        if self._experiment is not None:
            state["_id"] = getattr(run, "id", None)
            state["_attach_id"] = getattr(run, "_attach_id", None)
            state["_name"] = run.name
        return state

    # ------------------------------------------------------------------ which run

    @property
    def save_dir(self) -> str | None:
        """The directory of W&B's files."""
        return self._save_dir

    @property
    def name(self) -> str | None:
        """The project. The name of the run is ``experiment.name``."""
        return self._project

    @property
    def version(self) -> str | None:
        """The id of the run, where it is open; else the id that was given."""
        if self._experiment is not None:
            return str(self._experiment.id)
        return self._id or self._version_of_first

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the run of ``state``, if it is of this project and the user has named no other."""
        found = self._run_of(state)
        if found and self._experiment is None and self._id is None and self._wandb_init.get("resume") == "allow":
            self._id = self._wandb_init["id"] = found

    # ------------------------------------------------------------------ what is logged

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log one row; ``step`` goes with it as ``trainer/global_step``, the axis of the charts."""
        row = prefixed(metrics, self._prefix, self.LOGGER_JOIN_CHAR)
        if step is not None and not self._wandb_init.get("sync_tensorboard"):
            row[_STEP] = step
        self.experiment.log(row)

    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Add hyperparameters to the run's config."""
        self.experiment.config.update(json_params(params), allow_val_change=True)

    def watch(
        self, model: nn.Module, log: str | None = "gradients", log_freq: int = 100, log_graph: bool = True
    ) -> None:
        """Let W&B log histograms of gradients, parameters or both (``"all"``), every ``log_freq`` backward passes."""
        self.experiment.watch(model, log=log, log_freq=log_freq, log_graph=log_graph)

    @rank_zero_only
    def log_table(
        self,
        key: str,
        columns: list[str] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
    ) -> None:
        """Log a table, of ``columns`` and ``data`` (a list of rows) or of a ``dataframe``; cells may be media."""
        import wandb  # noqa: PLC0415  # see experiment

        self.log_metrics({key: wandb.Table(columns=cast("Any", columns), data=data, dataframe=dataframe)}, step)

    @rank_zero_only
    def log_text(
        self,
        key: str,
        columns: list[str] | None = None,
        data: list[list[str]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
    ) -> None:
        """Log text, as a table."""
        self.log_table(key, columns, data, dataframe, step)

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Log images: tensors, arrays, PIL images or paths; ``kwargs`` (``caption=[…]``, …) has a list of one for each."""
        self._log_media("Image", "images", key, images, step, kwargs)

    @rank_zero_only
    def log_audio(self, key: str, audios: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Log sounds: arrays or paths; ``kwargs`` (``caption=[…]``, ``sample_rate=[…]``) has a list of one for each."""
        self._log_media("Audio", "audios", key, audios, step, kwargs)

    @rank_zero_only
    def log_video(self, key: str, videos: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Log videos: arrays or paths; ``kwargs`` (``caption=[…]``, ``fps=[…]``, …) has a list of one for each."""
        self._log_media("Video", "videos", key, videos, step, kwargs)

    def _log_media(
        self, kind: str, what: str, key: str, items: Any, step: int | None, options: Mapping[str, Any]
    ) -> None:
        if not isinstance(items, list):
            raise TypeError(f'Expected a list as "{what}", found {type(items)}')
        for name, values in options.items():
            if len(values) != len(items):
                raise ValueError(f"Expected {len(items)} items but only found {len(values)} for {name}")
        import wandb  # noqa: PLC0415  # see experiment

        make = getattr(wandb, kind)
        made = [
            make(item, **{name: values[index] for name, values in options.items()}) for index, item in enumerate(items)
        ]
        self.log_metrics({key: made}, step)

    # ------------------------------------------------------------------ artifacts

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Upload what the callback has saved, now or at the end, as ``log_model`` says."""
        if self._uploads.due(checkpoint_callback):
            self._upload(checkpoint_callback)

    def finalize(self, status: str) -> None:
        """Upload the checkpoints that are to be, if the run has succeeded. The W&B run stays open for what may follow."""
        if status == "success" and self._experiment is not None:
            for callback in self._uploads.waiting.values():
                self._upload(callback)

    def _upload(self, callback: Any) -> None:
        import wandb  # noqa: PLC0415  # see experiment

        for saved in self._uploads.new(callback):
            if not self._checkpoint_name:
                self._checkpoint_name = f"model-{self.experiment.id}"
            metadata = metadata_of(saved, callback, type(callback).__name__)
            artifact = wandb.Artifact(name=self._checkpoint_name, type="model", metadata=metadata)
            artifact.add_file(saved.path, name="model.ckpt", policy=self.add_file_policy)
            self.experiment.log_artifact(artifact, aliases=saved.aliases)

    @staticmethod
    @rank_zero_only
    def download_artifact(
        artifact: str,
        save_dir: PathLike | None = None,
        artifact_type: str | None = None,
        use_artifact: bool | None = True,
    ) -> str:
        """Download an artifact, and return the directory where it is.

        Args:
            artifact: Its path, ``entity/project/name:version``.
            save_dir: Where to put it; None: where W&B keeps its downloads.
            artifact_type: What type it has to be of.
            use_artifact: Say that the open run, if there is one, uses it.
        """
        import wandb  # noqa: PLC0415  # see experiment

        if wandb.run is not None and use_artifact:
            found: Any = wandb.run.use_artifact(artifact)
        else:
            found = wandb.Api().artifact(artifact, type=artifact_type)
        folder: str = found.download(root=None if save_dir is None else os.fspath(save_dir))
        return folder

    def use_artifact(self, artifact: str, artifact_type: str | None = None) -> Any:
        """Say that this run uses an artifact, and return that."""
        return self.experiment.use_artifact(artifact, type=artifact_type)


def _words_of(function: Any) -> set[str]:
    """The arguments that a function takes today; those of an argument that it takes only to complain are left out."""
    import inspect  # noqa: PLC0415  # once in a run

    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {"anonymous"}
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return {"anonymous"}
    return {name for name, each in parameters.items() if each.default is None}
