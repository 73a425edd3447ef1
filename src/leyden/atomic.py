# SPDX-License-Identifier: Apache-2.0
"""Things appear on the disk whole or not at all: temporary names, flushes, one rename, and the leftovers of the dead.

What is being written is called ``.<name>.<process>-<host>-<random>.tmp``, in the folder where it will be, until it is
complete and on the disk; then it is renamed. A folder that another one replaces is called ``….old`` for a moment, one that
is being removed ``….del``. Nothing else has such names, so that they tell which files are leftovers of ours, and whose.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import platform
import re
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

_TEMPORARY = re.compile(r"\..+\.(\d+)-([0-9a-f]{8})-[0-9a-f]{8}\.(?:tmp|old|del)")
_STALE = 24 * 3600.0  # seconds: no write takes longer; of another machine's process nothing else can be known
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)
# what a file system answers that cannot flush a folder; anything else (EIO, ENOSPC) means that it tried and failed
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM)

_writing: set[str] = set()
"""Temporary names that this process is writing now, in any thread: names, since one path can be written in several ways."""


def write_file(path: Path, write: Callable[[Path], None], check: Callable[[Path], Any] | None = None) -> None:
    """Let ``write`` make a file under a temporary name, and give it the name ``path`` once it is on the disk.

    ``check`` may read it back before that and raise. Missing folders are made. If anything raises before the rename,
    what was at ``path`` is still there and the temporary file is not; only the last flush, of the folder, comes after.
    """
    make_folder(path.parent)
    sweep(path.parent)
    with temporary(path) as file:
        write(file)
        sync_file(file)
        if check is not None:
            check(file)
        os.replace(file, path)
    sync_folder(path.parent)


@contextlib.contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; a file that is still there when the block ends is removed."""
    file = path.parent / temporary_name(path.name)
    claim(file)
    try:
        yield file
    except BaseException:
        with contextlib.suppress(OSError):
            file.unlink()
        raise
    finally:
        release(file)


def temporary_name(name: str, kind: str = "tmp") -> str:
    """Return a name for what will be (kind ``"tmp"``) or was (``"old"``, ``"del"``) ``name``: another one at each call."""
    # a file name has at most 255 bytes, and a character up to four
    return f".{name[:50]}.{os.getpid()}-{_host()}-{os.urandom(4).hex()}.{kind}"


def claim(path: Path) -> None:
    """Note that this process writes the temporary ``path`` until :func:`release`: it is no leftover."""
    _writing.add(path.name)


def release(path: Path) -> None:
    """Undo :func:`claim`."""
    _writing.discard(path.name)


def make_folder(folder: Path) -> None:
    """Make ``folder`` and those above it, so that they outlast a power cut."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        if folder.parent == folder:
            break
        folder = folder.parent
    for each in reversed(missing):
        each.mkdir(exist_ok=True)
        sync_folder(each.parent)


def sync_file(path: Path) -> None:
    """Flush a file to the disk."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to the disk, where the system and the file system can (Windows cannot).

    Raises:
        OSError: when they can, and it failed.
    """
    if sys.platform == "win32":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def checksum(path: Path) -> str:
    """Return the CRC-32 of a file's content, as eight hexadecimal digits."""
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"


# --------------------------------------------------------------------------------------------- leftovers


def sweep(folder: Path) -> None:
    """Remove files that dead processes left half written in ``folder``; nothing that is not ours, by its name."""
    for path in leftovers(folder):
        if not path.is_dir() or path.is_symlink():
            with contextlib.suppress(OSError):  # somebody else's, perhaps: it is in nobody's way
                path.unlink()


def leftovers(folder: Path) -> list[Path]:
    """Return what is in ``folder`` under a temporary name of a process that is no more."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        return [Path(entry.path) for entry in entries if is_abandoned(entry.name, partial(_modified, entry.path))]
    return []


def _modified(path: str) -> float:
    return os.lstat(path).st_mtime


def is_temporary(name: str) -> bool:
    """Return whether ``name`` is one of :func:`temporary_name`'s."""
    return _TEMPORARY.fullmatch(name) is not None


def is_abandoned(name: str, modified: Callable[[], float]) -> bool:
    """Return whether ``name`` is a temporary one of a process that is no more.

    Args:
        name: Without its folder.
        modified: Called where the process is not of this machine: when the file was last written, in seconds since 1970.
    """
    match = _TEMPORARY.fullmatch(name)
    if match is None or name in _writing:
        return False
    process, host = int(match[1]), match[2]
    if host == _host() and process == os.getpid():
        return True  # a process before this one had the same number, as in a container that was started again
    if host == _host() and sys.platform != "win32":
        return not _runs(process)
    with contextlib.suppress(OSError, NotImplementedError):
        return time.time() - modified() > _STALE
    return False


def _host() -> str:
    """Return a short name of this machine, and of the container in it: where process numbers have a meaning."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        space = ""
    return f"{zlib.crc32(f'{platform.node()} {space}'.encode()):08x}"


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's
    return True


def delete(path: Path) -> None:
    """Remove a file, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


# --------------------------------------------------------------------------------------------- what went wrong


def explain(error: BaseException) -> str:
    """Return the cause of a failed write and what to do about it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        # torch's writer hides the error of a full disk behind its own, torch.distributed.checkpoint in a dict of ranks
        failures = getattr(cause, "failures", None)
        hidden = next(iter(failures.values()))[0] if isinstance(failures, dict) and failures else None
        cause = hidden or cause.__cause__ or cause.__context__
    number = cause.errno if isinstance(cause, OSError) else None
    if number in _NO_ROOM:
        return f"the disk or the quota is full ({cause}). Free some room, or write somewhere else."
    if number in _NO_PERMISSION:
        return f"no permission to write there ({cause}). Choose another folder, or change its permissions."
    if number in (errno.EISDIR, errno.ENOTEMPTY):
        return f"there is a folder of that name ({cause}). Choose another name."
    if number in (errno.ENOTDIR, errno.EEXIST):
        return f"there is a file where a folder is needed ({cause}). Choose another folder."
    if number == errno.EIO:
        return f"the disk failed ({cause}). What was written before is untouched; write to another disk."
    if isinstance(cause, OSError):
        return f"{type(cause).__name__}: {cause}."
    if isinstance(error, (pickle.PicklingError, AttributeError, TypeError)):
        return f"something in it cannot be pickled ({error}). Leave that out of state_dict() or on_save_checkpoint()."
    return f"{type(error).__name__}: {error}."
