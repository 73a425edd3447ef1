# SPDX-License-Identifier: Apache-2.0
"""The base of loggers that keep their files in ``<save_dir>/<name>/version_N``, and how N is found."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterable, Mapping
from typing import Any

from leyden.errors import MisconfigurationException
from leyden.loggers.base import Logger, on_rank_zero, write_lock
from leyden.loggers.params import params_to_dict, plain_params
from leyden.types import PathLike

HPARAMS_FILE = "hparams.yaml"


class FolderLogger(Logger):
    """A logger with a folder of its own for each run.

    Args:
        save_dir: a local directory, or an address that fsspec understands; ``~`` and ``$VARIABLES`` are expanded.
        name: the folder of the experiment within it; None or ``""`` for none.
        version: an int for the folder ``version_<int>``, a string for a folder of that name. None takes the number
            after the highest one there, at the first moment that anything asks for it, and makes the folder at once,
            so that two runs that start together never share one.
    """

    def __init__(self, save_dir: PathLike, name: str | None, version: int | str | None) -> None:
        self._save_dir = os.path.expanduser(os.path.expandvars(os.fspath(save_dir)))
        self._name = name or ""
        self._version = version
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
        version = self.version
        return os.path.join(self.root_dir, version if isinstance(version, str) else f"version_{version}")

    def add_hyperparams(self, params: Mapping[str, Any] | Namespace | None) -> dict[str, Any]:
        """Add to ``hparams``; return what was added as a dict."""
        added = params_to_dict(params)
        self.hparams.update(added)
        return added

    def write_hyperparams(self) -> None:
        """Write all hyperparameters so far to ``hparams.yaml``, as plain data that ``yaml.safe_load`` reads back."""
        import yaml  # noqa: PLC0415  only a run that logs to files pays for it

        filesystem = filesystem_of(self.save_dir)
        filesystem.makedirs(self.log_dir, exist_ok=True)
        text = yaml.safe_dump(plain_params(self.hparams), sort_keys=False, allow_unicode=True)
        replace_file(filesystem, os.path.join(self.log_dir, HPARAMS_FILE), [text.encode()])

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
            version = _highest_version(filesystem, root_dir) + 1
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


def _highest_version(filesystem: Any, root_dir: str) -> int:
    """The highest number of a ``version_<number>`` in ``root_dir``; -1 if there is none."""
    filesystem.invalidate_cache()
    try:
        entries = [os.path.basename(entry.rstrip("/")) for entry in filesystem.ls(root_dir, detail=False)]
    except FileNotFoundError:
        entries = []
    taken = [int(entry[8:]) for entry in entries if entry.startswith("version_") and entry[8:].isdecimal()]
    return max(taken, default=-1)


def replace_file(filesystem: Any, path: str, blocks: Iterable[bytes]) -> None:
    """Write ``blocks`` to ``path`` so that at every moment either the old or the new file is there in full."""
    temporary = f"{path}.tmp"
    try:
        with filesystem.open(temporary, "wb") as file:
            for block in blocks:
                file.write(block)
        if _is_local(path):
            os.replace(temporary, path)
        else:
            filesystem.mv(temporary, path)
    except BaseException:
        if filesystem.exists(temporary):
            filesystem.rm(temporary)
        raise


def append_file(filesystem: Any, path: str, data: bytes) -> None:
    """Append ``data`` to the file at ``path``, all of it or, where the disk is full, nothing.

    The file is opened for this one write and nothing is buffered, so that a process forked at any moment holds no
    rows that it could write a second time.
    """
    if not _is_local(path):
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


def _is_local(path: str) -> bool:
    return "://" not in path
