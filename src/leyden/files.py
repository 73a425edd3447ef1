# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files: written whole or not at all, read without running their code, found by their step.

A file is written under a temporary name (``.<name>.<pid>-<random>.tmp``, in the same folder), flushed to the disk,
read back and checked, and only then renamed. Whenever the process or the machine dies, the folder holds the file that
was there before, or the new one, complete; a temporary file that stays behind is never taken for a checkpoint.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import math
import os
import pickle
import re
import secrets
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch.serialization import get_crc32_options

from leyden.errors import CheckpointError, CheckpointNotFoundError
from leyden.runtime.ranks import rank_zero_warn
from leyden.types import PathLike

SUFFIX = ".ckpt"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)


def save(obj: Any, path: PathLike, *, verify: bool = True, storage_options: Mapping[str, Any] | None = None) -> None:
    """Write ``obj`` to ``path`` with ``torch.save``, atomically; missing folders are made.

    ``path`` may be remote (``"s3://..."``, by fsspec with ``storage_options``). ``verify=False`` leaves out reading
    the file back. Raises CheckpointError, with the cause and the remedy, if anything fails; then a file that was
    there before is still there, whole, and no temporary file is.
    """
    try:
        if is_remote(path):
            _save_remote(obj, str(path), verify, dict(storage_options or {}))
        else:
            _save_local(obj, local_path(path), verify)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"The checkpoint {str(path)!r} could not be written: {_explain(error)}") from error


def _save_local(obj: Any, path: Path, verify: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / _temporary_name(path.name)
    try:
        with open(temporary, "xb") as file:
            torch.save(obj, file)
            file.flush()
            os.fsync(file.fileno())
        if verify:
            _check(temporary, name=repr(str(path)))
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def _save_remote(obj: Any, path: str, verify: bool, storage_options: dict[str, Any]) -> None:
    from fsspec.core import url_to_fs  # noqa: PLC0415  # only for remote files

    fs, target = url_to_fs(path, **storage_options)
    folder, _, name = target.rpartition("/")
    temporary = f"{folder}/{_temporary_name(name)}"
    if folder:
        fs.makedirs(folder, exist_ok=True)
    try:
        with fs.open(temporary, "wb") as file:
            torch.save(obj, file)
        if verify:
            with fs.open(temporary, "rb") as file:
                _check(file, name=repr(path))
        fs.mv(temporary, target)
    except BaseException:
        with contextlib.suppress(Exception):
            fs.rm(temporary)
        raise


def _temporary_name(name: str) -> str:
    # a file name has at most 255 bytes, and a character up to four
    return f".{name[:50]}.{os.getpid()}-{secrets.token_hex(4)}.tmp"


def _sync_folder(folder: Path) -> None:
    """Flush the entry of a renamed or removed file to the disk; Windows and some mounts cannot."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _explain(error: BaseException) -> str:
    """Return the cause of a failed write and what to do about it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__  # torch's writer hides the error of a full disk behind its own
    number = cause.errno if isinstance(cause, OSError) else None
    if number in _NO_ROOM:
        return f"the disk or the quota is full ({cause}). Free some room, or write somewhere else."
    if number in _NO_PERMISSION:
        return f"no permission to write there ({cause}). Choose another folder, or change its permissions."
    if number in (errno.EISDIR, errno.ENOTEMPTY):
        return f"there is a folder of that name ({cause}). Choose another name."
    if isinstance(cause, OSError):
        return f"{type(cause).__name__}: {cause}."
    if isinstance(error, (pickle.PicklingError, AttributeError, TypeError)):
        return f"something in it cannot be pickled ({error}). Leave that out of state_dict() or on_save_checkpoint()."
    return f"{type(error).__name__}: {error}."


# --------------------------------------------------------------------------------------------- read


def load(
    path: PathLike | IO[bytes],
    map_location: Any = None,
    weights_only: bool = True,
    *,
    verify: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> Any:
    """Read what :func:`save`, or ``torch.save``, has written: a path, a remote path, or an open binary file.

    ``map_location`` is as in ``torch.load``, except that None puts tensors of a device that is not here on the CPU.
    ``weights_only=False`` unpickles anything, which lets the file run code: only for files you trust. ``verify``
    compares checksums first, which reads the file twice.

    Raises CheckpointNotFoundError, naming files with similar names, or CheckpointError, saying what is wrong.
    """
    map_location = _to_what_is_here if map_location is None else map_location
    if not isinstance(path, (str, os.PathLike)):
        return _load(path, "the file", map_location, weights_only, verify)
    with _opened(path, storage_options) as source:
        return _load(source, repr(str(path)), map_location, weights_only, verify)


@contextlib.contextmanager
def _opened(path: PathLike, storage_options: Mapping[str, Any] | None) -> Iterator[Path | IO[bytes]]:
    """Give the local path, or the opened remote file, of a checkpoint that exists."""
    if not is_remote(path):
        local = local_path(path)
        _require_file(local)
        yield local
        return
    from fsspec.core import url_to_fs  # noqa: PLC0415  # only for remote files

    fs, target = url_to_fs(str(path), **dict(storage_options or {}))
    try:
        file = fs.open(target, "rb")
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"There is no checkpoint {str(path)!r}.") from error
    with file:
        yield file


def _require_file(path: Path) -> None:
    if path.is_dir():
        raise CheckpointError(f"The checkpoint {str(path)!r} is a folder. Give the file in it: {_names(path)}")
    if path.exists():
        if path.stat().st_size == 0:
            raise CheckpointError(f"The checkpoint {str(path)!r} is empty: writing it was cut short. Use another one.")
        return
    if not path.parent.is_dir():
        raise CheckpointNotFoundError(f"There is no checkpoint {str(path)!r}, and no folder {str(path.parent)!r}.")
    names = [entry.name for entry in path.parent.iterdir() if entry.suffix == path.suffix]
    similar = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(map(repr, similar))}?" if similar else f"In that folder: {_names(path.parent)}"
    raise CheckpointNotFoundError(f"There is no checkpoint {str(path)!r}. {hint}")


def _names(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    return f"{', '.join(names[:5]) or 'nothing'}{', ...' if len(names) > 5 else ''}."


def _load(source: Path | IO[bytes], name: str, map_location: Any, weights_only: bool, verify: bool) -> Any:
    start = None if isinstance(source, Path) else source.tell()
    if verify:
        _check(source, name)
    try:
        if start is not None and not isinstance(source, Path):
            source.seek(start)
        return torch.load(source, map_location=map_location, weights_only=weights_only)
    except (MemoryError, torch.OutOfMemoryError):
        raise  # says all there is to say, and nothing is wrong with the file
    except Exception as error:
        refused = re.search(r"GLOBAL (\S+) (was not an allowed global|whose module \S+ is blocked)", str(error))
        if refused:
            raise CheckpointError(
                f"The checkpoint {name} contains {refused[1]!r}, which is code, not plain data, so it was not opened. "
                "If you trust whoever wrote it, pass weights_only=False; that lets the file run any code."
            ) from error
        if isinstance(source, Path) and not isinstance(error, PermissionError):
            _check_shape(source, name)
        if isinstance(error, (ImportError, AttributeError)):
            raise CheckpointError(
                f"The checkpoint {name} needs code that is not here ({error}). Make it importable, or open the file "
                "with weights_only=True if it is only weights you need."
            ) from error
        raise CheckpointError(
            f"The checkpoint {name} cannot be read: {type(error).__name__}: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    """Return what matters of an error; torch's begin with advice to open the file with weights_only=False."""
    text = str(error).rpartition("WeightsUnpickler error: ")[2]
    return text.strip().partition("\n")[0]


def _to_what_is_here(storage: Any, location: str) -> Any:
    """Leave tensors on the CPU if the device they were saved from is not here."""
    kind, _, index = location.partition(":")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        return storage
    if kind == "mps" and not torch.backends.mps.is_available():
        return storage
    return None


def _check_shape(source: Path | IO[bytes], name: str) -> None:
    """Raise CheckpointError if the file is cut off, or was never a checkpoint."""
    if zipfile.is_zipfile(source):
        return
    if isinstance(source, Path):
        with open(source, "rb") as file:
            head = file.read(4)
    else:
        source.seek(0)
        head = source.read(4)
    if head.startswith(b"PK\x03\x04"):
        raise CheckpointError(
            f"The checkpoint {name} is cut off: writing or copying it was cut short. Use another one."
        )
    raise CheckpointError(f"The checkpoint {name} is not a checkpoint, or damaged beyond recognition.")


def _check(source: Path | IO[bytes], name: str) -> None:
    """Raise CheckpointError unless the file is complete and its checksums are right."""
    _check_shape(source, name)
    try:
        with zipfile.ZipFile(source) as archive:
            # torch writes no checksums where the user has switched them off
            damaged = archive.testzip() if get_crc32_options() else None
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise CheckpointError(f"The checkpoint {name} is damaged: {error}.") from error
    if damaged is not None:
        raise CheckpointError(
            f"The checkpoint {name} is damaged: the checksum of {damaged!r} is wrong. Use another one."
        )


# --------------------------------------------------------------------------------------------- find and remove


def newest(folder: PathLike, suffix: str = SUFFIX) -> Path | None:
    """Return the checkpoint in ``folder`` with the highest ``global_step``, None if there is none.

    The step is the one recorded inside; names do not count, and the time of writing only between equals. Tensors are
    not read. A file that is damaged, or that cannot be opened without running its code, is passed over with a warning.
    """
    directory = local_path(folder)
    if not directory.is_dir():
        return None
    found: list[tuple[float, float, str, Path]] = []
    for path in directory.iterdir():
        if path.name.endswith(suffix) and not path.name.startswith(".") and path.is_file():
            try:
                step = recorded_step(path)
            except CheckpointError as error:
                rank_zero_warn(f"Passed over while looking for the newest checkpoint: {error}")
                continue
            if step is not None:
                found.append((step, path.stat().st_mtime, path.name, path))
    return max(found)[-1] if found else None


def recorded_step(path: PathLike) -> int | None:
    """Return the ``global_step`` that a local checkpoint records, None if it records none; reads no tensors."""
    local = local_path(path)
    _require_file(local)
    try:
        # on the device "meta" tensors have no content, and mapped into memory the file is read only where needed
        checkpoint = torch.load(local, map_location="meta", mmap=True, weights_only=True)
    except Exception:
        checkpoint = load(local, map_location="cpu")  # reads the format before torch 1.6 too, or says what is wrong
    step = checkpoint.get("global_step") if isinstance(checkpoint, Mapping) else None
    return int(step) if isinstance(step, (int, float)) and math.isfinite(step) else None


def remove(path: PathLike, storage_options: Mapping[str, Any] | None = None) -> None:
    """Remove a checkpoint file; of a link, the link. Nothing happens if there is none. Folders are not removed."""
    try:
        if is_remote(path):
            from fsspec.core import url_to_fs  # noqa: PLC0415  # only for remote files

            fs, target = url_to_fs(str(path), **dict(storage_options or {}))
            fs.rm_file(target)
        else:
            local = local_path(path)
            local.unlink()
            _sync_folder(local.parent)
    except FileNotFoundError:
        return
    except OSError as error:
        raise CheckpointError(f"The checkpoint {str(path)!r} could not be removed: {error}.") from error


def is_remote(path: PathLike) -> bool:
    """Return whether ``path`` is a URL of another file system than the local one."""
    return "://" in str(path) and not str(path).startswith(("file://", "local://"))


def local_path(path: PathLike) -> Path:
    """Return ``path`` without ``file://`` and with ``~`` expanded."""
    return Path(re.sub(r"^(file|local)://", "", str(path))).expanduser()
