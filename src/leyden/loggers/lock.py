# SPDX-License-Identifier: Apache-2.0
"""Let one process at a time write to a folder: a lock that is gone with its process, however that ends."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from importlib import import_module
from types import ModuleType
from typing import IO

from leyden.errors import MisconfigurationException

LOCK_FILE = ".lock"


class FolderLock:
    """The right to write to ``folder``, held until ``release`` or until the process ends.

    The operating system holds the lock, so the file that a killed process leaves behind is no obstacle. It is of the
    process, not of the object: taking it twice in one process succeeds, and a forked child does not have it. Where
    there are no such locks (Windows, some network mounts) nothing is locked.

    Raises:
        MisconfigurationException: if another process has it.
    """

    def __init__(self, folder: str) -> None:
        self._pid = os.getpid()
        self._path = os.path.join(folder, LOCK_FILE)
        self._file = _lock(self._path)
        self._file.truncate(0)
        self._file.write(f"{self._pid} on {socket.gethostname()}")
        self._file.flush()

    @property
    def held_here(self) -> bool:
        """Whether this process has the lock: not after ``release``, nor in a process forked from the one that took it."""
        return not self._file.closed and self._pid == os.getpid()

    def release(self) -> None:
        """Give the lock back and remove its file."""
        if self.held_here:
            with suppress(FileNotFoundError):  # the whole folder was removed
                os.unlink(self._path)
            self._file.close()


def _lock(path: str) -> IO[str]:
    fcntl = _fcntl()
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  held open: closing it gives the lock back
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read() or "unknown"
            file.close()
            raise MisconfigurationException(
                f"{os.path.dirname(path)!r} is being written by another process ({holder}). Wait for it to end, end it, "
                "or choose another version: none given (version=None) takes the next free one."
            ) from None
        except OSError:
            return file  # this file system has no locks
        try:
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                return file
        except FileNotFoundError:
            pass
        file.close()  # its owner removed the file between our two looks: what we locked is no longer the file of that name


def _fcntl() -> ModuleType | None:
    try:
        return import_module("fcntl")
    except ImportError:
        return None
