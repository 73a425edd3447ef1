# SPDX-License-Identifier: Apache-2.0
"""The tracker of 2019: torch's SummaryWriter with a folder, a version and a memory of its own; and a logger of today."""

from __future__ import annotations

import functools
import json
import math
import os
import weakref
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.writer import FileWriter

from leyden.errors import MisconfigurationException
from leyden.loggers.base import Logger, on_rank_zero, write_lock
from leyden.loggers.cells import cell_text, drop_rows, read_pairs, read_rows, write_pairs
from leyden.loggers.csv import METRICS_FILE, ExperimentWriter
from leyden.loggers.folder import append_file, filesystem_of, next_version, replace_file
from leyden.loggers.git import git
from leyden.loggers.images import image_extension, save_image
from leyden.loggers.lock import FolderLock
from leyden.loggers.params import flatten_params, params_to_dict, plain_params
from leyden.runtime.ranks import rank_zero_info
from leyden.types import PathLike

META_FILE = "meta.experiment"
TAGS_FILE = "meta_tags.csv"

_WRITERS: weakref.WeakValueDictionary[str, Experiment] = weakref.WeakValueDictionary()
"""The experiments that this process has open, by folder."""


def _writes(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a verb of Experiment that writes: nothing happens where nothing may, and the files are open where it may."""

    @functools.wraps(method)
    def write(self: Experiment, *args: Any, **kwargs: Any) -> Any:
        if not self.may_write:
            return None
        with write_lock(self):
            self.open()
            return method(self, *args, **kwargs)

    return write


class Experiment(SummaryWriter, Logger):
    """Keep a run in ``<save_dir>/<name>/version_N``: its metrics, hyperparameters and images, and TensorBoard's events.

    The folder holds ``meta.experiment`` (JSON: what this version is), ``meta_tags.csv`` (the hyperparameters),
    ``metrics.csv`` (one row for each ``log``), ``media/`` (images) and ``tf/``: look at it with ``tensorboard --logdir
    <save_dir>``. All verbs of torch's ``SummaryWriter`` write there too. Give it to ``Trainer(logger=…)``, or log by hand::

        exp = Experiment(save_dir="logs", name="digits")
        exp.tag({"learning_rate": 0.02})
        for step in range(100):
            exp.log({"loss": loss, "png_sample": image}, global_step=step)
        exp.close()

    Only rank zero writes. While an experiment is open no other process can write to its version; ``close`` ends that,
    and the next verb opens it again. In one process the newest Experiment of a version takes over from an older one.

    Args:
        save_dir: a local directory; None for ``test_tube_data`` in the current one.
        name: the folder of the experiment within it.
        debug: write nothing at all.
        version: a number; that of a folder that exists loads its history (``tags``, ``metrics``), which is then
            extended. None takes the next free one.
        autosave: ``save`` after each ``log`` and ``tag``.
        description: a text for ``meta.experiment`` and TensorBoard.
        create_git_tag: snapshot the code: mark the commit of the current directory with the tag ``tt_<name>_v<version>``.
            A version that exists keeps the tag that it has.
        rank: that of this process; all but 0 write nothing.
        **kwargs: for ``SummaryWriter``: ``flush_secs``, ``max_queue`` (1000 here), ``purge_step``, ``filename_suffix``.

    Attributes:
        tags: the hyperparameters, as plain data.
        metrics: all rows, those of earlier runs too: dicts with ``created_at`` and ``step`` besides what was logged.

    Raises:
        MisconfigurationException: if an argument cannot be, if another process writes to this version, or if git
            cannot make the tag.
    """

    file_writer: Any
    all_writers: Any
    purge_step: Any

    def __init__(
        self,
        save_dir: PathLike | None = None,
        name: str = "default",
        debug: bool = False,
        version: int | None = None,
        autosave: bool = False,
        description: str | None = None,
        create_git_tag: bool = False,
        rank: int = 0,
        **kwargs: Any,
    ) -> None:
        self._save_dir = _directory(save_dir)
        self._name = _checked_name(name)
        self.debug = debug
        self.autosave = autosave
        self.description = description
        self.create_git_tag = create_git_tag
        self.rank = rank
        self.created_at = _now()
        self.tags: dict[str, Any] = {}
        self.metrics: list[dict[str, Any]] = []
        self._tags_saved: dict[str, Any] | None = None
        self._tags_shown: dict[str, Any] = {}
        self._lock: FolderLock | None = None
        self._rows: ExperimentWriter | None = None
        self._settle: weakref.finalize[..., Experiment] | None = None
        self._reach: Mapping[str, Any] | None = None  # how far the files reached when a checkpoint was written
        self._found: dict[str, Any] = {}  # how far they reached when this was opened
        marks_code = create_git_tag and self.may_write
        if marks_code:
            git("rev-parse", "--git-dir")  # before anything is written
        self._version = (
            next_version(self.root_dir, claim=self.may_write) if version is None else _checked_version(version)
        )
        if marks_code and not self._exists():
            self._mark_code(claimed=version is None)
        super().__init__(self.get_logdir(), **{"max_queue": 1000, **kwargs})  # it makes files when they are open, later
        if self.may_write:
            self.open()
        elif not debug and self._exists():
            self._load()

    # ------------------------------------------------------------------ what and where

    @property
    def name(self) -> str:
        """The folder of the experiment within ``save_dir``."""
        return self._name

    @property
    def version(self) -> int:
        """The number of this version."""
        return self._version

    @property
    def save_dir(self) -> str:
        """The directory of all experiments."""
        return self._save_dir

    @property
    def root_dir(self) -> str:
        """``<save_dir>/<name>``: the folder of all versions."""
        return os.path.join(self._save_dir, self._name)

    @property
    def log_dir(self) -> str:
        """``<save_dir>/<name>/version_N``: the folder of this version. The events are in ``get_logdir()``, within it."""
        return self.get_data_path()

    @log_dir.setter
    def log_dir(self, value: str) -> None:
        """Accept what ``SummaryWriter.__init__`` sets: the place of the events follows from the version."""

    @property
    def exp_hash(self) -> str:
        """``<name>_v<version>``."""
        return f"{self._name}_v{self._version}"

    @property
    def began(self) -> float:
        """When this version was opened for the first time, in seconds since 1970; infinite if its file does not say."""
        try:
            moment = datetime.fromisoformat(self.created_at)
        except ValueError:
            return math.inf
        # 2019's tool wrote the time of UTC without saying so
        return (moment if moment.tzinfo is not None else moment.replace(tzinfo=timezone.utc)).timestamp()

    @property
    def experiment(self) -> Experiment:
        """This object: it is the logger and the tool behind it in one."""
        return self

    @property
    def may_write(self) -> bool:
        """Whether this process may write: not with ``debug``, and on rank zero only."""
        return not self.debug and self.rank == 0 and bool(on_rank_zero())

    @property
    def is_open(self) -> bool:
        """Whether this process is the writer of the version at this moment."""
        return self._lock is not None and self._lock.held_here

    def get_data_path(self, name: str | None = None, version: int | None = None) -> str:
        """Return the folder of a version; without arguments that of this one."""
        return os.path.join(
            self._save_dir, name or self._name, f"version_{self._version if version is None else version}"
        )

    def get_media_path(self, name: str | None = None, version: int | None = None) -> str:
        """Return the folder of the images of a version; without arguments those of this one."""
        return os.path.join(self.get_data_path(name, version), "media")

    def get_tensorboardx_path(self, name: str | None = None, version: int | None = None) -> str:
        """Return the folder of TensorBoard's events of a version; without arguments those of this one."""
        return os.path.join(self.get_data_path(name, version), "tf")

    def get_logdir(self) -> str:
        """Return the folder of TensorBoard's events."""
        return self.get_tensorboardx_path()

    # ------------------------------------------------------------------ verbs

    @_writes
    def log(
        self, metrics_dict: Mapping[str, Any], global_step: int | None = None, walltime: float | None = None
    ) -> None:
        """Add one row: to ``metrics.csv`` with the next ``save``, and its numbers to TensorBoard.

        Args:
            metrics_dict: numbers, tensors or arrays of one element, or dicts of them (``{"loss": {"val": 1.0}}`` is
                ``loss/val``). A name that contains ``png``, ``jpg`` or ``jpeg`` may hold an image, an array of shape
                (H, W), (H, W, channels) or (channels, H, W): it is written to ``media/`` at once, and the row has its path.
            global_step: the step; without it that which is named ``step``, or the number of rows so far.
            walltime: the time that TensorBoard shows, in seconds since 1970; without it, now.
        """
        index = len(self.metrics)
        step = int(metrics_dict.get("step", index)) if global_step is None else int(global_step)
        row: dict[str, Any] = {}
        scalars = []
        for name, value in flatten_params(metrics_dict).items():
            if getattr(value, "ndim", 0) >= 2 and image_extension(name) is not None:
                row[name] = save_image(value, self.get_media_path(), name, index)
            elif name == "created_at":
                row[name] = str(value)
            else:
                row[name] = number = _number(name, value)
                scalars.append(Summary.Value(tag=name, simple_value=float(number)))
        row.setdefault("created_at", _now())
        row["step"] = step
        if scalars:
            self._get_file_writer().add_summary(Summary(value=scalars), step, walltime)
        assert self._rows is not None
        self._rows.log_metrics(row, step)
        self.metrics.append(row)
        if self.autosave:
            self.save()

    @_writes
    def tag(self, tag_dict: Mapping[str, Any]) -> None:
        """Add hyperparameters, or change them; they are kept as plain data."""
        self.tags.update({str(key): plain_params(value) for key, value in tag_dict.items()})
        if self.autosave:
            self.save()

    def argparse(self, argparser: Namespace | Mapping[str, Any]) -> None:
        """Tag each option of a namespace of parsed arguments, but for those that can be called."""
        self.tag({key: value for key, value in params_to_dict(argparser).items() if not callable(value)})

    def add_meta_from_hyperopt(self, hypo: Any) -> None:
        """Tag what a trial of a hyperparameter search was given.

        Args:
            hypo: has ``get_current_trial_meta()``, which returns a dict or a list of them; or is itself a namespace.
        """
        get_meta = getattr(hypo, "get_current_trial_meta", None)
        meta = hypo if get_meta is None else get_meta()
        for part in meta if isinstance(meta, (list, tuple)) else [meta]:
            self.argparse(part)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add one row, as ``log`` does."""
        self.log(metrics, step)

    def log_hyperparams(self, params: dict[str, Any] | Namespace | None, *args: Any, **kwargs: Any) -> None:
        """Add hyperparameters, as ``tag`` does; classes and functions are kept as their name."""
        self.tag(params_to_dict(params))

    def save(self) -> None:
        """Bring to disk what is not there yet: rows, hyperparameters, events.

        The hyperparameters become a table among TensorBoard's texts too, once, and again only after they have changed.
        """
        if not self.is_open:
            return
        assert self._rows is not None
        self._rows.save()
        if self.tags != self._tags_saved:
            write_pairs(os.path.join(self.log_dir, TAGS_FILE), self.tags)
            self._tags_saved = dict(self.tags)
        if self.tags != self._tags_shown:
            self.add_text("hparams", self._table_of_tags())
            self._tags_shown = dict(self.tags)
        self.flush()

    def flush(self) -> None:
        """Bring TensorBoard's events to disk."""
        if self.is_open:
            super().flush()

    def finalize(self, status: str) -> None:
        """End the run: everything is on disk, and another process may write to the version."""
        self.close()

    def close(self) -> None:
        """Save everything and let other processes write to the version; the next verb opens it again."""
        with write_lock(self):
            if not self.is_open:
                return
            self.save()
            super().close()
            assert self._lock is not None
            assert self._settle is not None
            self._settle.detach()
            self._lock.release()
            self._lock = self._rows = self._settle = None

    def open(self) -> None:
        """Become the writer of this version, if this process is not; every verb does so by itself.

        Raises:
            MisconfigurationException: if another process is.
        """
        if self.is_open or not self.may_write:
            return
        previous = _WRITERS.get(self.log_dir)
        if previous is not None and previous is not self:
            previous.close()
        for folder in (self.get_media_path(), self.get_tensorboardx_path()):
            try:
                os.makedirs(folder, exist_ok=True)
            except OSError as error:
                raise MisconfigurationException(
                    f"The Experiment cannot make its folder {folder!r} ({error}). Choose another save_dir, name or version."
                ) from error
        self.file_writer = self.all_writers = None  # in a forked process, the parent's
        lock = FolderLock(self.log_dir)
        try:
            metrics_file, tags_file = os.path.join(self.log_dir, METRICS_FILE), os.path.join(self.log_dir, TAGS_FILE)
            if not os.path.isfile(metrics_file):
                append_file(filesystem_of(metrics_file), metrics_file, b"created_at,step\r\n")
            if not os.path.isfile(tags_file):
                write_pairs(tags_file, {})
            self._rows = ExperimentWriter(self.log_dir)  # cuts off a line that a crash left half written
            if self._exists():
                self._load()
            self._write_meta()
        except BaseException:
            lock.release()
            raise
        self._lock = lock
        _WRITERS[self.log_dir] = self
        self._found = self._lengths()
        self._get_file_writer()
        self._settle = weakref.finalize(self, _save_rest, lock, self._rows, self.tags, self.all_writers)

    # ------------------------------------------------------------------ in another process

    def state_dict(self) -> dict[str, Any]:
        """Bring everything to disk; return which version this is and how far its files reach, for a checkpoint."""
        with write_lock(self):
            state = {"name": self.name, "version": self.version, "save_dir": self.save_dir}
            if self.is_open:
                self.save()
                state["log"] = {**self._lengths(), "tags": dict(self._tags_shown)}
            return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Note how far the files of this version reached when a checkpoint was written; see ``rewind``."""
        same = (state.get("name"), state.get("version")) == (self.name, self.version)
        self._reach = state.get("log") if same else None

    @_writes
    def rewind(self) -> None:
        """Take back what came after the checkpoint, up to when this was opened: the run that goes on logs it again."""
        (reach, self._reach), found = (self._reach, None), self._found
        if reach is None or found["rows"] < reach["rows"]:
            return
        if any(found["events"].get(path, -1) < size for path, size in reach["events"].items()):
            return  # of another run that had the same name and version: their files are called otherwise
        for path, size in found["events"].items():
            kept, full = reach["events"].get(path, 0), os.path.join(self.get_logdir(), path)
            if kept == 0:
                os.remove(full)
            elif kept < size:
                os.truncate(full, kept)
        self._tags_shown = dict(reach["tags"])
        if superseded := found["rows"] - reach["rows"]:
            self.save()
            del self.metrics[reach["rows"] : found["rows"]]
            path = os.path.join(self.log_dir, METRICS_FILE)
            drop_rows(path, reach["rows"], found["rows"])
            rank_zero_info(f"{path}: {superseded} rows after the checkpoint are taken out; the run logs them again.")
        self._found = {**reach}

    def _lengths(self) -> dict[str, Any]:
        """Return how many rows there are, and the sizes of TensorBoard's files by their paths in ``tf/``."""
        folder = self.get_logdir()
        paths = [os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names]
        sizes = {os.path.relpath(path, folder): os.path.getsize(path) for path in paths}
        return {"rows": len(self.metrics), "events": sizes}

    def get_meta_copy(self) -> ExperimentMeta:
        """Save, close, and return plain data about this experiment, with which another process can go on with it."""
        self.close()
        return ExperimentMeta(
            save_dir=self.save_dir, name=self.name, version=self.version, debug=self.debug, autosave=self.autosave,
            description=self.description, create_git_tag=self.create_git_tag, exp_hash=self.exp_hash,
            created_at=self.created_at, rank=self.rank, tags=dict(self.tags), metrics=list(self.metrics),
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        self.close()  # whoever gets the copy writes next
        return {**self.__dict__, **dict.fromkeys(("_lock", "_rows", "_settle", "file_writer", "all_writers"))}

    def __repr__(self) -> str:
        return f"Experiment({self.log_dir!r}{', debug=True' if self.debug else ''})"

    # ------------------------------------------------------------------ files

    def _get_file_writer(self) -> Any:
        """Return torch's writer of the events; SummaryWriter asks for it here. It is in ``tf/``, not in ``log_dir``."""
        if self.file_writer is None and self.is_open:
            folder = self.get_logdir()
            self.file_writer = writer = FileWriter(folder, self.max_queue, self.flush_secs, self.filename_suffix)
            self.all_writers = {folder: writer}
            if self.purge_step is not None:
                step, self.purge_step = self.purge_step, None
                writer.add_event(Event(step=step, file_version="brain.Event:2"))
                writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
        return self.file_writer

    def _exists(self) -> bool:
        """Whether this version was written before; an empty file is what 2019's tool left until its first save."""
        path = os.path.join(self.log_dir, META_FILE)
        return os.path.isfile(path) and os.path.getsize(path) > 0

    def _load(self) -> None:
        """Take the history of this version from its folder; tags that were set here prevail."""
        path = os.path.join(self.log_dir, META_FILE)
        try:
            with open(path, encoding="utf-8") as file:
                meta = dict(json.load(file))
        except (ValueError, TypeError) as error:
            raise MisconfigurationException(
                f"{path!r} is damaged: it is not a JSON object ({error}). Remove this file to go on with the version "
                "without its description, or choose another version."
            ) from error
        self.created_at = str(meta.get("created_at", self.created_at))
        if self.description is None:
            self.description = meta.get("description")
        tags = os.path.join(self.log_dir, TAGS_FILE)
        if os.path.isfile(tags):
            saved = read_pairs(tags)
            self.tags = {**saved, **self.tags}
            self._tags_saved, self._tags_shown = saved, dict(saved)
        metrics = os.path.join(self.log_dir, METRICS_FILE)
        if os.path.isfile(metrics):
            self.metrics = read_rows(metrics)

    def _write_meta(self) -> None:
        meta = {
            "name": self.name,
            "version": self.version,
            "tags_path": os.path.join(self.log_dir, TAGS_FILE),
            "metrics_path": os.path.join(self.log_dir, METRICS_FILE),
            "media_path": self.get_media_path(),
            "tensorboard_path": self.get_tensorboardx_path(),
            "autosave": self.autosave,
            "description": self.description,
            "created_at": self.created_at,
            "exp_hash": self.exp_hash,
        }
        text = json.dumps(meta, ensure_ascii=False, indent=1)
        replace_file(filesystem_of(self.log_dir), os.path.join(self.log_dir, META_FILE), [text.encode()])

    def _table_of_tags(self) -> str:
        """Return the hyperparameters as Markdown, which TensorBoard shows as a table."""
        lines = [f"###### {_cell(self.name)}, version {self.version}", ""]
        if self.description:
            lines += [f"*{_cell(self.description)}*", ""]
        lines += ["parameter | value", "--- | ---"]
        lines += [f"{_cell(key)} | {_cell(cell_text(value))}" for key, value in self.tags.items()]
        return "\n".join(lines)

    def _mark_code(self, claimed: bool) -> None:
        """Tag the commit; if that fails, give back the folder that was claimed for this version."""
        try:
            git("tag", "-a", f"tt_{self.exp_hash}", "-m", self.description or f"The code of {self.exp_hash}.")
        except MisconfigurationException:
            if claimed:
                os.rmdir(self.log_dir)
            raise
        rank_zero_info(f"The tag tt_{self.exp_hash} marks the code of this experiment.")


for _verb in [name for name in vars(SummaryWriter) if name.startswith("add_")]:
    setattr(Experiment, _verb, _writes(getattr(SummaryWriter, _verb)))


@dataclass
class ExperimentMeta:
    """What an Experiment is, without its files: plain data that can be pickled into another process."""

    save_dir: str
    name: str
    version: int
    debug: bool
    autosave: bool
    description: str | None
    create_git_tag: bool
    exp_hash: str
    created_at: str
    rank: int = 0
    tags: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)

    def get_non_ddp_exp(self) -> Experiment:
        """Return the Experiment: it goes on with the version where the original stopped."""
        return Experiment(
            save_dir=self.save_dir, name=self.name, debug=self.debug, version=self.version, autosave=self.autosave,
            description=self.description, create_git_tag=self.create_git_tag, rank=self.rank,
        )  # fmt: skip


def _cell(text: str) -> str:
    """Return ``text`` as it can stand in a table of Markdown."""
    return text.replace("|", "\\|").replace("\n", " ")


def _number(name: str, value: Any) -> int | float:
    try:
        number = value.item() if hasattr(value, "item") else value
        if isinstance(number, (int, float)):
            return int(number) if isinstance(number, bool) else number
    except (TypeError, ValueError, RuntimeError):
        pass
    shown = f"an array of shape {tuple(value.shape)}" if hasattr(value, "shape") else repr(value)
    raise MisconfigurationException(
        f"Experiment cannot log {name}={shown} of type {type(value).__name__}: a metric is a number, or a tensor or "
        "array of one element; an image is an array of two or three dimensions under a name with png, jpg or jpeg."
    )


def _save_rest(lock: FolderLock, rows: ExperimentWriter, tags: dict[str, Any], writers: dict[str, Any]) -> None:
    """Save what an experiment holds that was dropped, or left to the end of the program, without ``close``."""
    if lock.held_here:  # not in a forked process, which would write it a second time
        rows.save()
        write_pairs(os.path.join(rows.log_dir, TAGS_FILE), tags)
        for writer in writers.values():
            writer.close()
        lock.release()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(sep=" ")


def _directory(save_dir: PathLike | None) -> str:
    if save_dir is None:
        return os.path.join(os.getcwd(), "test_tube_data")
    path = os.path.expanduser(os.path.expandvars(os.fspath(save_dir)))
    if "://" in path:
        raise MisconfigurationException(
            f"Experiment(save_dir={path!r}): an Experiment is kept in local files. Give a local directory, or use "
            "TensorBoardLogger or CSVLogger, which write to such places."
        )
    return os.path.abspath(path)


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or not name.strip("./\\ "):
        raise MisconfigurationException(
            f"Experiment(name={name!r}): the name must be a text that can be the name of a folder, such as 'default'."
        )
    return name


def _checked_version(version: Any) -> int:
    if isinstance(version, str) and version.isdecimal():
        return int(version)
    try:
        number = int(version) if not isinstance(version, (bool, float, str)) else -1
    except (TypeError, ValueError):
        number = -1
    if number < 0:
        raise MisconfigurationException(
            f"Experiment(version={version!r}): a version is a whole number from 0, or None for the next free one."
        )
    return number
