# SPDX-License-Identifier: Apache-2.0
"""The base of loggers that keep their files in ``<save_dir>/<name>/version_N``, and how N is found."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from leyden import atomic
from leyden.config import SEMANTICS, default_semantics
from leyden.errors import MisconfigurationException
from leyden.loggers.base import Logger, on_rank_zero, write_lock
from leyden.loggers.params import params_to_dict, plain_params
from leyden.runtime.ranks import rank_zero_info, rank_zero_warn
from leyden.types import PathLike

HPARAMS_FILE = "hparams.yaml"


class DefaultName(str):
    """The name of an experiment that was not given: what it is depends on whose names the program imports."""

    __slots__ = ()


LOG_FOLDER = DefaultName("leyden_logs")
"""What loggers have for the name that was not given; under ``semantics="lightning"`` it stands for that one's."""


def given_name(name: str | None) -> str | None:
    """Return ``name``, or where it is the default what that is at this moment."""
    return str(SEMANTICS[default_semantics()]["log_folder"]) if isinstance(name, DefaultName) else name


class FolderLogger(Logger):
    """A logger with a folder of its own for each run.

    Args:
        save_dir: a local directory, or an address that fsspec understands; ``~`` and ``$VARIABLES`` are expanded.
        name: the folder of the experiment within it; None or ``""`` for none.
        version: an int for the folder ``version_<int>``, a string for a folder of that name. None takes the number
            after the highest one there, at the first moment that anything asks for it, and makes the folder at once,
            so that two runs that start together never share one.
        resume: a fit that goes on from a checkpoint goes on with the version that the checkpoint names, if ``version``
            is None. False: it gets a version of its own.

    Which rows a checkpoint knows of is written in it. A run that goes on from it takes back the rows that came later
    (of a process that was killed, say), so that its log is the one of a run that was never interrupted.
    """

    def __init__(self, save_dir: PathLike, name: str | None, version: int | str | None, resume: bool = True) -> None:
        self._save_dir = os.path.expanduser(os.path.expandvars(os.fspath(save_dir)))
        self._name = given_name(name) or ""
        self._version = version
        self._named = version is not None
        self._resume = resume
        self._ended = False
        self._state: Mapping[str, Any] | None = None
        """The state of the run with which this one goes on, until it does; None for a run of its own."""
        self.hparams: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """The folder of the experiment within ``save_dir``; empty for none."""
        return self._name

    @property
    def version(self) -> int | str:
        """The version that was given, or the next free number."""
        if self._version is None:
            with write_lock(self):
                if self._version is None:
                    self._version = next_version(self.root_dir, claim=bool(on_rank_zero()))
        return self._version

    def follow(self, version: int | str) -> None:
        """Take the version of the first process, in all others."""
        self._version = version

    @property
    def save_dir(self) -> str:
        """The directory that was given, expanded."""
        return self._save_dir

    @property
    def root_dir(self) -> str:
        """``<save_dir>/<name>``: the folder of all versions."""
        return os.path.join(self._save_dir, self._name) if self._name else self._save_dir

    @property
    def log_dir(self) -> str:
        """``<save_dir>/<name>/<version>``: the folder of this run."""
        return self._folder(self.version)

    def _folder(self, version: int | str) -> str:
        return os.path.join(self.root_dir, version if isinstance(version, str) else f"version_{version}")

    # ------------------------------------------------------------------ a run that goes on in another process

    def folders(self) -> list[str]:
        """Return the folders of the runs with which this logger may go on, the highest number first; none is made.

        Where the user named the version, that is its folder.
        """
        if self._version is not None and self._named:
            return [self._folder(self._version)]
        numbers = _version_numbers(filesystem_of(self.root_dir), self.root_dir)
        return [self._folder(number) for number in sorted(numbers, reverse=True)]

    def within(self, path: str) -> str | None:
        """Return ``path`` as it is seen from the folder of this run; None if it is elsewhere, or the run has none yet."""
        if self._version is None:
            return None
        folder = self._folder(self._version)
        if is_local(folder):
            folder, path = os.path.realpath(folder), os.path.realpath(path)
        folder = os.path.join(folder, "")
        return path[len(folder) :] if path.startswith(folder) else None

    def state_dict(self) -> dict[str, Any]:
        """Return the name, the version and the directory of this run."""
        return {**super().state_dict(), "save_dir": _absolute(self._save_dir)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the version of ``state``, if that is the run that its folder holds and the user named no other."""
        self._state = None
        version = state.get("version")
        if not self._resume or state.get("name") != self.name or not isinstance(version, (int, str)):
            return
        folder = self._folder(version)
        if self._named and folder != self._folder(self.version):
            return
        if not os.path.normpath(folder).startswith(os.path.join(os.path.normpath(self.root_dir), "")):
            return  # a checkpoint of a stranger decides about nothing outside
        there = bool(filesystem_of(folder).isdir(folder))
        if there and not self.holds(state, folder):
            rank_zero_warn(
                f"{type(self).__name__}: the checkpoint is of a run that was logged in {folder!r}, but what is there now"
                " is not the log of that run. It is left alone; this run gets a version of its own."
                if not self._named
                else f"{type(self).__name__}: {folder!r} does not hold what the checkpoint says it has logged there. The"
                " rows that are there stay; new ones are added."
            )
            return
        if not there and not self.is_at_home(state):
            return  # a checkpoint that came from elsewhere, without its logs
        if self._version is not None and folder != self._folder(self._version):
            self.close()
            if on_rank_zero():
                with suppress(OSError):  # it is not empty: somebody has put something there
                    os.rmdir(self.log_dir)
        self._version, self._state = version, state
        if there:
            self.hparams = self.read_hyperparams()
            rank_zero_info(f"{type(self).__name__} goes on with {folder}.")

    @property
    def begins_anew(self) -> bool:
        """Whether what is in the folder of this version was written before this object, into a version of that name."""
        return self._named and not self._ended

    def close(self) -> None:
        """Bring everything to disk and close the files; the next call of any verb opens them again."""
        self.save()

    def holds(self, state: Mapping[str, Any], folder: str) -> bool:
        """Whether ``folder`` holds the log of the run of ``state``, at least as far as ``state`` says."""
        return True

    def is_at_home(self, state: Mapping[str, Any]) -> bool:
        """Whether the run of ``state`` was logged below the directory of this logger, or was moved there, checkpoint and all.

        That must tell where ``state`` knows of no row yet: any log at all begins with nothing.
        """
        folder, checkpoint = self._folder(state["version"]), str(state.get("checkpoint", ""))
        if is_local(folder):
            folder, checkpoint = os.path.realpath(folder), os.path.realpath(checkpoint)
        return bool(state.get("save_dir") == _absolute(self._save_dir)) or checkpoint.startswith(
            os.path.join(folder, "")
        )

    def knows_hyperparams(self, params: Mapping[str, Any] | Namespace | None) -> bool:
        """Whether the run with which this one goes on has already logged these hyperparameters."""
        if self._state is None:
            return False
        logged = plain_params(self.hparams)
        return all(
            name in logged and logged[name] == value for name, value in plain_params(params_to_dict(params)).items()
        )

    def finalize(self, status: str) -> None:
        """Bring everything to disk."""
        self.save()
        self._ended, self._state = True, None

    def add_hyperparams(self, params: Mapping[str, Any] | Namespace | None) -> dict[str, Any]:
        """Add to ``hparams``; return what was added as a dict."""
        added = params_to_dict(params)
        self.hparams.update(added)
        return added

    def write_hyperparams(self) -> None:
        """Write all hyperparameters so far to ``hparams.yaml``, as plain data that ``yaml.safe_load`` reads back."""
        filesystem, text = filesystem_of(self.save_dir), "{}\n"
        filesystem.makedirs(self.log_dir, exist_ok=True)
        if self.hparams:
            import yaml  # noqa: PLC0415  only a run that has hyperparameters pays for it

            text = yaml.safe_dump(plain_params(self.hparams), sort_keys=False, allow_unicode=True)
        replace_file(filesystem, os.path.join(self.log_dir, HPARAMS_FILE), [text.encode()])

    def read_hyperparams(self) -> dict[str, Any]:
        """Return what ``hparams.yaml`` of this version holds; nothing if there is no such file."""
        path = os.path.join(self.log_dir, HPARAMS_FILE)
        if not self.has_hyperparams_file():
            return {}
        import yaml  # noqa: PLC0415  only a run that goes on with its logs pays for it

        with filesystem_of(self.save_dir).open(path, "r", encoding="utf-8") as file:
            found = yaml.safe_load(file)
        return dict(found) if isinstance(found, Mapping) else {}

    def has_hyperparams_file(self) -> bool:
        """Whether this version has its ``hparams.yaml``."""
        return bool(filesystem_of(self.save_dir).isfile(os.path.join(self.log_dir, HPARAMS_FILE)))


def filesystem_of(path: str) -> Any:
    """Return fsspec's file system for ``path``; for a path without ``scheme://`` the local one."""
    from fsspec.core import url_to_fs  # noqa: PLC0415  only a run that logs to files pays for it

    return url_to_fs(path)[0]


def next_version(root_dir: str, claim: bool) -> int:
    """Return the number after the highest ``version_<number>`` in ``root_dir``, or 0.

    With ``claim`` the folder is made, and the number is of this caller alone, whoever else looks at the same moment
    (object stores know no folders and cannot promise that).
    """
    filesystem = filesystem_of(root_dir)
    try:
        while True:
            version = max(_version_numbers(filesystem, root_dir), default=-1) + 1
            if not claim:
                return version
            try:
                filesystem.makedirs(os.path.join(root_dir, f"version_{version}"), exist_ok=False)
            except FileExistsError:
                continue  # another run took it between the look and the claim
            return version
    except OSError as error:
        raise MisconfigurationException(
            f"The logger cannot make a folder in {root_dir!r} ({error}). Log somewhere else by"
            " Trainer(default_root_dir=...) or the logger's save_dir, or not at all by Trainer(logger=False)."
        ) from error


def _version_numbers(filesystem: Any, root_dir: str) -> list[int]:
    """The numbers of the ``version_<number>`` in ``root_dir``."""
    filesystem.invalidate_cache()
    try:
        entries = [os.path.basename(entry.rstrip("/")) for entry in filesystem.ls(root_dir, detail=False)]
    except FileNotFoundError:
        entries = []
    return [int(entry[8:]) for entry in entries if entry.startswith("version_") and entry[8:].isdecimal()]


def replace_file(filesystem: Any, path: str, blocks: Iterable[bytes]) -> None:
    """Write ``blocks`` to ``path`` so that at every moment either the old or the new file is there in full."""
    temporary = f"{path}.tmp"
    try:
        with filesystem.open(temporary, "wb") as file:
            for block in blocks:
                file.write(block)
        sync_file(temporary)  # or a power failure might leave the new name with nothing in it
        move_file(filesystem, temporary, path)
    except BaseException:
        if filesystem.exists(temporary):
            filesystem.rm(temporary)
        raise


def move_file(filesystem: Any, path: str, target: str) -> None:
    """Rename a file; one of the name ``target`` is replaced."""
    if is_local(path):
        os.replace(path, target)
    else:
        filesystem.mv(path, target)


def append_file(filesystem: Any, path: str, data: bytes) -> None:
    """Append ``data`` to the file at ``path``, all of it or, where the disk is full, nothing.

    The file is opened for this one write and nothing is buffered, so that a process forked at any moment holds no
    rows that it could write a second time.
    """
    if not is_local(path):
        with filesystem.open(path, "ab") as file:
            file.write(data)
        return
    with open(path, "ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except BaseException:
            file.truncate(end)
            raise


def sync_file(path: str) -> None:
    """Bring what was written to a local file to the disk, so that even a power failure cannot take it back."""
    if is_local(path):
        atomic.sync_file(Path(path))


def is_local(path: str) -> bool:
    """Whether ``path`` is of the local file system."""
    return "://" not in path


def _absolute(path: str) -> str:
    return os.path.abspath(path) if is_local(path) else path
