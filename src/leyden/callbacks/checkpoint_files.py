# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint files are this run's own, and what is asked of the places they are in (local, or fsspec's)."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from leyden import atomic
from leyden.errors import CheckpointError
from leyden.runtime.ranks import rank_zero_warn
from leyden.types import PathLike, TrainerView


class Ledger:
    """The files that one run wrote, across its resumes; no other file may be overwritten or deleted.

    Attributes:
        mark: A random word that is in each file of this run and of those that resume it.
        files: The paths that it wrote and has not deleted.
        doomed: The paths that it wrote and will delete as soon as what replaces them is written.
        interrupted: The path of the file that a signal made it write, until another one is newer; empty if there is none.
    """

    def __init__(self) -> None:
        self.mark = os.urandom(8).hex()
        self.files: list[str] = []
        self.doomed: list[str] = []
        self.interrupted = ""
        self._has_resumed = False

    def add(self, path: str) -> None:
        """Note that this run writes ``path``."""
        if path not in self.files:
            self.files.append(path)

    def is_taken(self, trainer: TrainerView, path: str) -> bool:
        """Return whether a new file cannot be called ``path``; all processes get the same answer."""
        # what this run holds is known without asking the disk, so that a resumed run decides as an unbroken one would
        if path in self.files or any(path in getattr(each, "files", ()) for each in trainer.checkpoint_callbacks):
            return True
        # a run that resumed may find a file of its own, written after the checkpoint that it came from
        is_taken = trainer.is_global_zero and exists(path) and not (self._has_resumed and bears(path, self.mark))
        return bool(trainer.strategy.reduce_boolean_decision(is_taken, all=False))

    def replace(self, trainer: TrainerView, path: str, successor: str) -> None:
        """Give up ``path`` for ``successor``: it is deleted later, unless the user named it for the run to resume from."""
        if path == successor or path not in self.files:
            return
        self.files.remove(path)
        resumed_from = trainer.named_ckpt_path
        if resumed_from is None or os.path.abspath(resumed_from) != os.path.abspath(path):
            self.doomed.append(path)

    @contextmanager
    def interrupt(self, trainer: TrainerView, folder: str, suffix: str) -> Iterator[str]:
        """Give, and note, the path in ``folder`` for the state in which a signal ends the run, to be written inside."""
        before = list(self.files), list(self.doomed), self.interrupted
        former, path, version = self.interrupted, os.path.join(folder, f"interrupted{suffix}"), 1
        ours = trainer.strategy.broadcast(replaceable(trainer, former))
        while path != ours and self.is_taken(trainer, path):
            path, version = os.path.join(folder, f"interrupted-v{version}{suffix}"), version + 1
        self.replace(trainer, former, path)
        self.add(path)
        self.interrupted = path
        try:
            yield path
        except BaseException:
            self.files, self.doomed, self.interrupted = before
            raise
        self.delete_doomed(trainer)

    def supersede(self, trainer: TrainerView, successor: str) -> None:
        """Give up the file that a signal made the run write, since ``successor`` is written."""
        self.replace(trainer, self.interrupted, successor)
        self.interrupted = ""

    def delete_doomed(self, trainer: TrainerView) -> None:
        """Delete the files whose successors are written by now."""
        while self.doomed:
            trainer.strategy.remove_checkpoint(self.doomed[0])
            del self.doomed[0]

    def distrust_doomed(self) -> None:
        """Forget what a checkpoint said must be deleted where the name has passed to a file of somebody else."""
        self.doomed = [path for path in self.doomed if bears(path, self.mark)]

    def copy(self) -> Ledger:
        """Return a copy that further changes leave alone."""
        twin = Ledger()
        twin.load_state_dict(self.state_dict())
        twin._has_resumed = self._has_resumed
        return twin

    def state_dict(self) -> dict[str, Any]:
        """Return plain data for a checkpoint."""
        state = {"mark": self.mark, "files": list(self.files), "doomed": list(self.doomed)}
        return {**state, "interrupted": self.interrupted} if self.interrupted else state

    def load_state_dict(self, state: Mapping[str, Any], folder: str | None = None) -> None:
        """Take back what ``state_dict`` returned; whatever it says, nothing outside ``folder`` is this run's."""
        self.mark = state.get("mark", self.mark)
        self.files = [path for path in state.get("files", ()) if folder is None or is_inside(path, folder)]
        self.doomed = [path for path in state.get("doomed", ()) if folder is None or is_inside(path, folder)]
        interrupted = state.get("interrupted", "")
        self.interrupted = interrupted if interrupted in self.files else ""
        self._has_resumed = True


def default_folder(trainer: TrainerView) -> str:
    """Return ``checkpoints`` in the folder of the first logger, or in the Trainer's ``default_root_dir``."""
    if not trainer.loggers:
        return os.path.join(trainer.default_root_dir, "checkpoints")
    logger = trainer.loggers[0]
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return os.path.join(versions_folder(trainer), version, "checkpoints")


def versions_folder(trainer: TrainerView) -> str:
    """Return the folder of all versions of the first logger; a logger that makes a run when asked for one makes none."""
    logger = trainer.loggers[0]
    root = trainer.default_root_dir if logger.save_dir is None else logger.save_dir
    return os.path.join(root, str(logger.name))


def is_url(path: PathLike) -> bool:
    """Return whether ``path`` names a place for fsspec (``s3://...``)."""
    return "://" in str(path)


def exists(path: str) -> bool:
    """Return whether the name is in use; a link that leads nowhere uses its name too."""
    return bool(_filesystem(path).exists(path)) if is_url(path) else os.path.lexists(path)


def replaceable(trainer: TrainerView, path: str) -> str:
    """Return ``path`` if a new checkpoint can take its place in one step, else an empty text.

    A folder cannot take that of a file: a run may go on under a strategy that writes the other of them.
    """
    is_other = os.path.isfile(path) if trainer.strategy.saves_shards else os.path.isdir(path)
    return "" if is_other and not os.path.islink(path) else path


def paths_in(folder: str) -> list[str]:
    """Return the paths of what is in ``folder``; nothing if there is no such folder."""
    if not exists(folder):
        return []
    if is_url(folder):
        filesystem = _filesystem(folder)
        return [filesystem.unstrip_protocol(path) for path in filesystem.ls(folder, detail=False)]
    return [os.path.join(folder, name) for name in os.listdir(folder)] if os.path.isdir(folder) else []


def require_writable(folder: str) -> None:
    """Raise CheckpointError if it is plain, before any training, that no file can be written in ``folder``."""
    if is_url(folder):
        return
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        reason = "this process may not write there" if existing.is_dir() else "that is not a folder"
        raise CheckpointError(
            f"ModelCheckpoint cannot write in {folder!r}: of that path there is {str(existing)!r}, and {reason}. Choose"
            " another folder by ModelCheckpoint(dirpath=...) or Trainer(default_root_dir=...), or none by"
            " Trainer(enable_checkpointing=False)."
        )


def warn_of_others(folder: str, suffix: str, ours: Iterable[str]) -> None:
    """Warn of files with ``suffix`` in ``folder`` that are not among ``ours``."""
    others = {path for path in paths_in(folder) if path.endswith(suffix)} - set(ours)
    if others:
        rank_zero_warn(
            f"The checkpoint folder {folder} holds {len(others)} checkpoint(s) of other runs. They are left alone; names"
            " that are taken get a version appended (-v1)."
        )


def is_inside(path: str, folder: str) -> bool:
    """Return whether ``path`` is below ``folder``."""
    if is_url(path) or is_url(folder):
        return path.startswith(folder.rstrip("/") + "/")
    return os.path.abspath(path).startswith(os.path.join(os.path.abspath(folder), ""))


def open_path(path: str, mode: str) -> Any:
    """Open a local or remote file."""
    return _filesystem(path).open(path, mode) if is_url(path) else open(path, mode)


def bears(path: str, mark: str) -> bool:
    """Return whether the checkpoint ``path`` was written under its name by the run that has ``mark``.

    Such a file contains the mark and its own name (in the state of the callback that wrote it). Its text is searched
    for them; nothing is unpickled.
    """
    name = os.path.basename(path if is_url(path) else os.path.realpath(path))  # a link is judged by its target
    if not is_url(path) and os.path.isdir(path):
        from leyden.shards import META  # noqa: PLC0415  # only for checkpoints of several processes

        path = os.path.join(path, META)
    try:
        with open_path(path, "rb") as stream, zipfile.ZipFile(stream) as archive:
            text = b"".join(archive.read(part) for part in archive.namelist() if part.endswith("data.pkl"))
    except (OSError, zipfile.BadZipFile):
        return False
    return mark.encode() in text and name.encode() in text


def link(path: str, linkpath: str) -> None:
    """Make ``linkpath`` a symbolic link to ``path``, or a copy where links cannot be made; replaces what was there."""
    with atomic.temporary(Path(linkpath)) as fresh:  # what a killed process leaves of it is swept away
        try:
            os.symlink(os.path.relpath(path, os.path.dirname(linkpath)), fresh)
        except OSError:  # Windows asks for a privilege
            (shutil.copytree if os.path.isdir(path) else shutil.copy)(path, fresh)
        if os.path.isdir(linkpath) and not os.path.islink(linkpath):
            # a folder cannot be replaced in one move; it can stop being a checkpoint in one, if it is ours
            from leyden import folders  # noqa: PLC0415  # only for checkpoints of several processes

            (folders.remove if folders.is_committed(Path(linkpath)) else shutil.rmtree)(Path(linkpath))
        os.replace(fresh, linkpath)


def _filesystem(url: str) -> Any:
    import fsspec  # noqa: PLC0415 - only for remote paths

    return fsspec.core.url_to_fs(url)[0]
