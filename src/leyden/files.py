# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: written whole or not at all, read without running their code, found by their step.

A checkpoint is a file, or a folder to which several processes wrote. Either is written under a temporary name, flushed
to the disk, compared with its checksums, and only then renamed. Whenever the process or the machine dies, there is the
one that was there before, or the new one, complete; what stays behind under a temporary name is never taken for a
checkpoint, and the next one to write there clears it away.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch.serialization import get_crc32_options, set_crc32_options

from leyden import archive, atomic
from leyden.errors import CheckpointDamagedError, CheckpointError, CheckpointNotFoundError
from leyden.runtime.ranks import rank_zero_warn
from leyden.types import PathLike

SUFFIX = ".ckpt"


def save(obj: Any, path: PathLike, *, verify: bool = True, storage_options: Mapping[str, Any] | None = None) -> None:
    """Write ``obj`` to ``path`` with ``torch.save``, atomically; missing folders are made.

    Args:
        obj: Anything; a checkpoint of ours gets its manifest.
        path: Where; it may be remote (``"s3://..."``, by fsspec).
        verify: Read the file back and compare its checksums before it gets its name.
        storage_options: For fsspec.

    Raises:
        CheckpointError: with the cause and the remedy. Then a file that was there before is still there, whole, and no
            temporary file is; only if the folder could not be flushed, at the very end, the new file is there.
    """
    with explained(path):
        obj = archive.with_manifest(obj)
        if is_remote(path):
            _save_remote(obj, str(path), verify, dict(storage_options or {}))
        else:
            atomic.write_file(
                local_path(path),
                lambda file: write(obj, file),
                lambda file: verify and archive.check(file, repr(str(path))),
            )


def save_folder(path: PathLike, write: Callable[[Path], None], record: Mapping[str, Any] | None = None) -> None:
    """Let ``write`` fill a folder, which becomes the checkpoint ``path`` once all of it is on the disk.

    For one process; ``Strategy.save_folder`` lets several write into it.

    Args:
        path: Where, on the local file system. A checkpoint folder that is there is replaced.
        write: Called with the folder to write into.
        record: Plain data by which the checkpoint is known without opening it: ``global_step``, ``epoch``.

    Raises:
        CheckpointError: with the cause and the remedy. Then what was there before is still there, and nothing else.
    """
    from leyden import folders  # noqa: PLC0415  # only for checkpoints of several processes

    with explained(path):
        folders.save(require_local(path), write, record)


@contextlib.contextmanager
def explained(path: PathLike) -> Iterator[None]:
    """Turn what goes wrong in the block, which writes ``path``, into a CheckpointError with the cause and the remedy."""
    try:
        yield
    except CheckpointError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not hasattr(
            error, "failures"
        ):  # as torch.distributed.checkpoint's have
            raise
        raise CheckpointError(f"The checkpoint {str(path)!r} could not be written: {atomic.explain(error)}") from error


def write(obj: Any, path: Path) -> None:
    """Write ``obj`` to a new file, with checksums; for who sees to the rest: see ``save``."""
    with open(path, "xb") as file:
        _torch_save(obj, file)


def _torch_save(obj: Any, file: IO[bytes]) -> None:
    """Write with checksums, whatever the user has set: a resume relies on them."""
    if get_crc32_options():
        torch.save(obj, file)
        return
    set_crc32_options(True)
    try:
        torch.save(obj, file)
    finally:
        set_crc32_options(False)


def _save_remote(obj: Any, path: str, verify: bool, storage_options: dict[str, Any]) -> None:
    fs, target = _filesystem(path, storage_options)
    folder, _, name = target.rpartition("/")
    temporary = f"{folder}/{atomic.temporary_name(name)}"
    if folder:
        fs.makedirs(folder, exist_ok=True)
        _sweep_remote(fs, folder)
    try:
        with fs.open(temporary, "wb") as file:
            _torch_save(obj, file)
        if verify:
            with fs.open(temporary, "rb") as file:
                archive.check(file, repr(path))
        fs.mv(temporary, target)
    except BaseException:
        with contextlib.suppress(Exception):
            fs.rm(temporary)
        raise


def _sweep_remote(fs: Any, folder: str) -> None:
    """Remove files that dead processes left half written in a remote folder, as ``atomic.sweep`` does in a local one."""
    with contextlib.suppress(Exception):  # whatever it is, it is in nobody's way
        fs.invalidate_cache(folder)
        for path in map(str, fs.ls(folder, detail=False)):
            if atomic.is_abandoned(path.rpartition("/")[2], partial(_modified, fs, path)):
                fs.rm_file(path)


def _modified(fs: Any, path: str) -> float:
    return float(fs.modified(path).timestamp())


# --------------------------------------------------------------------------------------------- read


def load(
    path: PathLike | IO[bytes],
    map_location: Any = None,
    weights_only: bool = True,
    *,
    verify: bool = True,
    storage_options: Mapping[str, Any] | None = None,
) -> Any:
    """Read what :func:`save`, or ``torch.save``, has written, or the whole of a checkpoint folder.

    Args:
        path: A path, a remote path, or an open binary file.
        map_location: As in ``torch.load``, except that None puts tensors of a device that is not here on the CPU.
        weights_only: False unpickles anything, which lets the file run code: only for files you trust.
        verify: Compare checksums first: about a tenth of a second for 200 MB.
        storage_options: For fsspec.

    Raises:
        CheckpointNotFoundError: naming files with similar names.
        CheckpointDamagedError: naming the newest good one beside it.
        CheckpointError: saying what is wrong.
    """
    if not isinstance(path, (str, os.PathLike)):
        return _load(path, "the file", map_location, weights_only, verify)
    try:
        with _opened(path, storage_options) as source:
            return _load(source, repr(str(path)), map_location, weights_only, verify)
    except CheckpointDamagedError as error:
        raise CheckpointDamagedError(f"{error}{_alternative(path)}") from error


def _load(source: Path | IO[bytes], name: str, map_location: Any, weights_only: bool, verify: bool) -> Any:
    if isinstance(source, Path) and source.is_dir():
        from leyden import sharded  # noqa: PLC0415  # only for checkpoints of several processes

        return sharded.load(source, map_location, weights_only, verify=verify)
    if verify:
        archive.check(source, name)
    loaded = archive.read(source, name, map_location, weights_only)
    if verify:
        archive.warn_of_changes(loaded, name)
    return loaded


def verify(path: PathLike, storage_options: Mapping[str, Any] | None = None) -> bool:
    """Compare a checkpoint with its checksums, without opening it.

    Returns:
        Whether it has any: a file in the format before torch 1.6 has none.

    Raises:
        CheckpointDamagedError: if it is not what was written.
        CheckpointNotFoundError: if there is none.
    """
    with _opened(path, storage_options) as source:
        if isinstance(source, Path) and source.is_dir():
            from leyden import folders  # noqa: PLC0415  # only for checkpoints of several processes

            return bool(folders.check(source))
        return archive.check(source, repr(str(path)))


@contextlib.contextmanager
def _outlined(path: PathLike, storage_options: Mapping[str, Any] | None = None) -> Iterator[Path | IO[bytes]]:
    """As ``_opened``, for who reads no tensors: of a remote one they are not fetched."""
    if is_remote(path):
        fs, target = _filesystem(path, storage_options)
        with tempfile.TemporaryDirectory(prefix="leyden-", ignore_cleanup_errors=True) as folder:
            copy, outlined = Path(folder) / "outline", False
            # a file system that reads no parts, a file of another kind: fetched whole, it is as it is, or its error is told
            with (
                contextlib.suppress(Exception),
                fs.open(target, "rb", block_size=1 << 18) as source,
                open(copy, "wb") as file,
            ):
                outlined = archive.outline(source, file)
            if outlined:
                yield copy
                return
    with _opened(path, storage_options) as source:
        yield source


@contextlib.contextmanager
def _opened(path: PathLike, storage_options: Mapping[str, Any] | None = None) -> Iterator[Path | IO[bytes]]:
    """Give the local path of a checkpoint that exists, or a copy of a remote one."""
    if not is_remote(path):
        try:
            yield require_file(local_path(path))
        except PermissionError as error:
            raise CheckpointError(
                f"The checkpoint {str(path)!r} cannot be read: {error}. Change its permissions, or those of its folder."
            ) from error
        return
    fs, target = _filesystem(path, storage_options)
    # fetched once and whole: it is read twice, and not from front to back
    with tempfile.TemporaryFile() as copy:
        try:
            with fs.open(target, "rb") as file:
                shutil.copyfileobj(file, copy, 1 << 20)
        except FileNotFoundError as error:
            raise CheckpointNotFoundError(f"There is no checkpoint {str(path)!r}.") from error
        except OSError as error:
            raise CheckpointError(f"The checkpoint {str(path)!r} cannot be fetched: {error}.") from error
        copy.seek(0)
        yield copy


def require_file(path: Path) -> Path:
    """Return where the checkpoint ``path`` is.

    Raises:
        CheckpointError: if that cannot be one; if there is none, with names that are similar.
    """
    if path.is_dir():
        if is_folder_checkpoint(path):
            return path
        raise CheckpointError(f"The checkpoint {str(path)!r} is a folder. Give the file in it: {_names(path)}")
    if path.exists():
        if path.stat().st_size == 0:
            raise CheckpointDamagedError(
                f"The checkpoint {str(path)!r} is empty: writing it was cut short. Use another one."
            )
        return path
    if not path.parent.is_dir():
        raise CheckpointNotFoundError(f"There is no checkpoint {str(path)!r}, and no folder {str(path.parent)!r}.")
    if path.is_symlink():
        raise CheckpointNotFoundError(
            f"The checkpoint {str(path)!r} is a link to {os.readlink(path)!r}, which is not there."
        )
    from leyden import folders  # noqa: PLC0415  # only where there is nothing of that name

    if (folder := folders.waiting(path)) is not None:
        return folder
    names = [entry.name for entry in path.parent.iterdir() if entry.suffix == path.suffix]
    similar = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(map(repr, similar))}?" if similar else f"In that folder: {_names(path.parent)}"
    raise CheckpointNotFoundError(f"There is no checkpoint {str(path)!r}. {hint}")


def is_folder_checkpoint(path: Path) -> bool:
    """Return whether a folder is a checkpoint: one of ours, complete, or one that torch.distributed.checkpoint wrote."""
    from leyden import folders  # noqa: PLC0415  # only for checkpoints of several processes

    return folders.is_committed(path) or (path / ".metadata").is_file()


def _names(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    return f"{', '.join(names[:5]) or 'nothing'}{', ...' if len(names) > 5 else ''}."


# --------------------------------------------------------------------------------------------- find and remove


def newest(
    folder: PathLike | Iterable[PathLike], suffix: str | tuple[str, ...] = SUFFIX, *, since: float = -math.inf
) -> Path | str | None:
    """Return the good checkpoint with the highest ``global_step`` in a folder, or in several; None if there is none.

    The step is the one recorded inside; names do not count, and the time of writing only between equals. The one that
    is returned was compared with its checksums. One that is damaged, or that cannot be opened without running its code,
    is passed over with a warning that names it and the one that is taken. Of a remote folder, the one that is returned is
    fetched, and of the others what is no tensor.
    What was written before ``since`` (seconds since 1970) does not count; nor does a remote file then.

    Returns:
        The path; a URL, if the folder is remote.

    Raises:
        CheckpointDamagedError: if there are checkpoints, and all of them are damaged.
    """
    places = [folder] if isinstance(folder, (str, os.PathLike)) else list(folder)
    found, passed_over = _newest(places, suffix, since=since)
    if found is None and any(isinstance(error, CheckpointDamagedError) for error in passed_over):
        reasons = " ".join(map(str, passed_over))
        raise CheckpointDamagedError(
            f"There is no good checkpoint in {', '.join(map(str, dict.fromkeys(places)))}. {reasons} Remove what is"
            " damaged if you want to start anew."
        )
    instead = f" {str(found)!r}, of step {recorded_step(found)}, is taken instead." if found is not None else ""
    for error in passed_over:
        rank_zero_warn(f"Passed over while looking for the newest checkpoint: {error}{instead}")
    return found


def _newest(
    places: Iterable[PathLike], suffix: str | tuple[str, ...], but: Path | None = None, since: float = -math.inf
) -> tuple[Path | str | None, list[CheckpointError]]:
    """Return the newest good checkpoint, and why others, that might be newer, are not."""
    found: list[tuple[int, float, str, Path | str]] = []
    passed_over: list[CheckpointError] = []
    for path in dict.fromkeys(path for place in places for path in _checkpoints_in(place, suffix)):
        if path == but:
            continue
        try:
            if since > -math.inf and (not isinstance(path, Path) or path.stat().st_mtime < since):
                continue
            step = recorded_step(path)
            if step is not None:
                found.append((step, path.stat().st_mtime_ns if isinstance(path, Path) else 0, str(path), path))
        except (CheckpointError, OSError) as error:
            passed_over.append(error if isinstance(error, CheckpointError) else CheckpointError(f"{path}: {error}."))
    for *_, path in sorted(found, key=lambda each: each[:3], reverse=True):
        try:
            verify(path)
        except CheckpointError as error:
            passed_over.append(error)
        else:
            return path, passed_over
    return None, passed_over


def _checkpoints_in(place: PathLike, suffix: str | tuple[str, ...]) -> list[Path | str]:
    if is_remote(place):
        fs, target = _filesystem(place, None)
        entries = fs.ls(target, detail=False) if fs.isdir(target) else []
        names = [str(entry).rstrip("/").rpartition("/")[2] for entry in entries]
        return [f"{str(place).rstrip('/')}/{name}" for name in names if name.endswith(suffix) and name[0] != "."]
    from leyden import folders  # noqa: PLC0415  # only who looks for a checkpoint

    folder = local_path(place)
    try:
        if not folder.is_dir():
            return []
        entries = [
            entry for entry in folder.iterdir() if entry.name.endswith(suffix) and not entry.name.startswith(".")
        ]
        found: list[Path | str] = [entry for entry in entries if entry.is_file() or folders.is_committed(entry)]
        found += [entry for entry in folders.stand_ins(folder) if folders.manifest(entry)["name"].endswith(suffix)]
    except PermissionError as error:
        raise CheckpointError(f"The folder {str(folder)!r} cannot be read: {error}. Change its permissions.") from error
    return found


def _alternative(path: PathLike) -> str:
    """Return a sentence that names the newest good checkpoint beside a damaged one."""
    if is_remote(path):
        return ""
    damaged = local_path(path)
    with contextlib.suppress(OSError, CheckpointError):
        found, _ = _newest([damaged.parent], damaged.suffix or SUFFIX, but=damaged)
        if found is not None:
            return f" The newest good one beside it is {str(found)!r}, of step {recorded_step(found)}."
    return " There is no good one beside it."


def recorded_step(path: PathLike) -> int | None:
    """Return the ``global_step`` that a checkpoint records, None if it records none; reads no tensors.

    Raises:
        CheckpointError: if the checkpoint cannot be read.
    """
    with _outlined(path) as source:
        if isinstance(source, Path) and source.is_dir():
            from leyden import folders  # noqa: PLC0415  # only for checkpoints of several processes

            step = folders.manifest(source)["record"].get("global_step")
        else:
            checkpoint = _without_tensors(source, repr(str(path)))
            step = checkpoint.get("global_step") if isinstance(checkpoint, Mapping) else None
    return int(step) if isinstance(step, (int, float)) and math.isfinite(step) else None


def _without_tensors(source: Path | IO[bytes], name: str, *, any_name: bool = False) -> Any:
    """Read a checkpoint file with empty tensors, on the device ``meta``."""
    checked = archive.check(source, name, tensors=False)
    if isinstance(source, Path) and checked:  # mapped into memory, so that the file is read only where it is needed
        return archive.read(source, name, "meta", mmap=True, any_name=any_name)
    return archive.read(source, name, "meta", any_name=any_name)


def look(path: PathLike, storage_options: Mapping[str, Any] | None = None) -> Any:
    """Return what is in a checkpoint, to look at: tensors are empty, and objects that are no data know only their names.

    No code of the file runs. Of a folder, the manifest is under ``"leyden"``.

    Raises:
        CheckpointError: if it cannot be read at all.
    """
    with _outlined(path, storage_options) as source:
        if isinstance(source, Path) and source.is_dir():
            from leyden import sharded  # noqa: PLC0415  # only for checkpoints of several processes

            return sharded.look(source)
        return _without_tensors(source, repr(str(path)), any_name=True)


def remove(path: PathLike, storage_options: Mapping[str, Any] | None = None) -> None:
    """Remove a checkpoint, file or folder; of a link, the link. Nothing happens if there is none.

    Raises:
        CheckpointError: if it cannot be removed, or is a folder that is no checkpoint of ours.
    """
    try:
        if is_remote(path):
            fs, target = _filesystem(path, storage_options)
            fs.rm_file(target)
            return
        local = local_path(path)
        if local.is_dir() and not local.is_symlink():
            from leyden import folders  # noqa: PLC0415  # only for checkpoints of several processes

            folders.remove(local)
        else:
            local.unlink()
            atomic.sync_folder(local.parent)
    except FileNotFoundError:
        return
    except OSError as error:
        raise CheckpointError(f"The checkpoint {str(path)!r} could not be removed: {error}.") from error


def _filesystem(path: PathLike, storage_options: Mapping[str, Any] | None) -> tuple[Any, str]:
    from fsspec.core import url_to_fs  # noqa: PLC0415  # only for remote files

    fs, target = url_to_fs(str(path), **dict(storage_options or {}))
    return fs, str(target)


def is_remote(path: PathLike) -> bool:
    """Return whether ``path`` is a URL of another file system than the local one."""
    return "://" in str(path) and not str(path).startswith(("file://", "local://"))


def local_path(path: PathLike) -> Path:
    """Return ``path`` without ``file://`` and with ``~`` expanded."""
    return Path(re.sub(r"^(file|local)://", "", str(path))).expanduser()


def require_local(path: PathLike) -> Path:
    """Return ``path`` as a local one.

    Raises:
        CheckpointError: for a remote one: a folder can be put in place in one step on a local file system only.
    """
    if is_remote(path):
        raise CheckpointError(
            f"The checkpoint {str(path)!r} is a folder to which several processes write, and must be on a local or shared"
            " file system."
        )
    return local_path(path)
