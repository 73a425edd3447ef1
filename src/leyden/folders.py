# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are folders: several processes write their files, one of them commits the whole, or nothing is there.

A folder is written under a temporary name. Every file in it is flushed and its size and checksum are noted; the
manifest, which holds them, is written last, and only then is the folder renamed. A folder without a manifest, or one
that does not fit its manifest, is no checkpoint.

One process calls :func:`save`. Several, that share a file system, call in turn, and agree after each call that all of
them came through: :func:`begin` on one, their own writing, :func:`note` on all, and :func:`commit` on the first again;
or :func:`abandon`, if one failed. ``Strategy.save_folder`` does that.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any

from leyden import atomic
from leyden.errors import CheckpointDamagedError, CheckpointError
from leyden.version import __version__

MANIFEST = "leyden-manifest.json"
"""The file that makes a folder a checkpoint: written last, under its own checksum."""
FORMAT = 1
_PART = ".leyden-part-"


def save(path: Path, write: Callable[[Path], None], record: Mapping[str, Any] | None = None) -> None:
    """Let ``write`` fill a folder and give it the name ``path`` once it is complete and on the disk.

    Args:
        path: Where. A checkpoint folder that is there is replaced; anything else that is there is an error.
        write: Called with the folder to write into.
        record: Plain data for the manifest, such as ``global_step``, by which ``"last"`` is found.

    Raises:
        CheckpointError: with cause and remedy; then what was at ``path`` is there as before, and nothing else is.
    """
    folder = begin(path)
    try:
        write(folder)
        note(folder)
        commit(folder, path, record)
    except BaseException:
        abandon(folder)
        raise


def begin(path: Path) -> Path:
    """Make the temporary folder for ``path``, clear away what dead processes left, and return it."""
    _require_free(path)
    atomic.make_folder(path.parent)
    sweep(path.parent)
    folder = path.parent / atomic.temporary_name(path.name)
    atomic.claim(folder)
    folder.mkdir()
    return folder


def abandon(folder: Path) -> None:
    """Remove the temporary folder; nothing happens if it has got its name."""
    _discard(folder)
    atomic.release(folder)


def note(folder: Path, rank: int = 0, world_size: int = 1) -> None:
    """Flush this process's share of the files to the disk and note their sizes and checksums in the folder.

    Call when all processes have written; the share of ``rank`` is every ``world_size``-th file.
    """
    names = _files(folder)[rank::world_size]
    for name in names:
        atomic.sync_file(folder / name)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        sums = list(threads.map(atomic.checksum, [folder / name for name in names]))
    noted = {
        name: {"bytes": (folder / name).stat().st_size, "crc32": crc} for name, crc in zip(names, sums, strict=True)
    }
    part = folder / f"{_PART}{rank}.json"
    part.write_text(json.dumps(noted), encoding="utf-8")


def commit(folder: Path, path: Path, record: Mapping[str, Any] | None = None) -> None:
    """Write the manifest and give the temporary ``folder`` the name ``path``; a checkpoint folder there is replaced.

    Raises:
        CheckpointError: if a file was not noted by any process.
    """
    noted: dict[str, Any] = {}
    parts = [entry for entry in folder.iterdir() if entry.name.startswith(_PART)]
    for part in parts:
        noted.update(json.loads(part.read_text(encoding="utf-8")))
    lost = sorted(set(_files(folder)) ^ set(noted))
    if lost or not noted:
        raise CheckpointError(
            f"The checkpoint {str(path)!r} is not whole: {', '.join(lost) or 'no file was written'}. All processes must"
            " write into one shared folder, and be done, before it is committed."
        )
    for part in parts:
        part.unlink()
    content = {
        "format": FORMAT,
        "version": __version__,
        "name": path.name,
        "record": dict(record or {}),
        "files": noted,
    }
    _write_manifest(folder, content)
    for inner in (entry for entry in folder.rglob("*") if entry.is_dir()):
        atomic.sync_folder(inner)
    atomic.sync_folder(folder)
    _require_free(path)
    _put_in_place(folder, path)
    atomic.release(folder)


def second(path: Path, name: Path) -> None:
    """Make ``name`` a second folder with what is in ``path``: with the same files, where a file can have two names."""
    folder = begin(name)
    try:
        content = manifest(path)
        for file in content["files"]:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path / file, folder / file)
            except OSError:  # another disk
                shutil.copyfile(path / file, folder / file)
        note(folder)
        commit(folder, name, content["record"])
    except BaseException:
        abandon(folder)
        raise


def _write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps({"crc32": _checksum(content), **content}, indent=1)
    unfinished = folder / f"{_PART}manifest.json"
    unfinished.write_text(text, encoding="utf-8")
    atomic.sync_file(unfinished)
    os.replace(unfinished, folder / MANIFEST)


def _checksum(content: Mapping[str, Any]) -> str:
    as_read = json.loads(json.dumps(content))  # its keys are text, and sorted as such
    return f"{zlib.crc32(json.dumps(as_read, sort_keys=True).encode()):08x}"


def _files(folder: Path) -> list[str]:
    """Return the paths of the files in ``folder``, relative to it, without ours."""
    found = []
    for entry in sorted(folder.rglob("*")):
        name = entry.relative_to(folder).as_posix()
        if not entry.is_dir() and name != MANIFEST and not name.startswith(_PART):
            found.append(name)
    return found


def _require_free(path: Path) -> None:
    """Raise CheckpointError if what is at ``path`` is not ours to replace."""
    if path.is_dir() and not (path / MANIFEST).is_file():
        raise CheckpointError(
            f"The checkpoint {str(path)!r} could not be written: there is a folder of that name, and it is no checkpoint"
            " of ours. Choose another name."
        )
    if not path.is_dir() and os.path.lexists(path):
        raise CheckpointError(
            f"The checkpoint {str(path)!r} could not be written: there is a file of that name, and this checkpoint is a"
            " folder. Choose another name."
        )


def _put_in_place(folder: Path, path: Path) -> None:
    if not path.exists():
        os.rename(folder, path)
        atomic.sync_folder(path.parent)
        return
    former = folder if _exchange(folder, path) else path.parent / atomic.temporary_name(path.name, "old")
    if former is not folder:
        # between these two renames nothing is called `path`; the two in waiting are found by `waiting`
        atomic.claim(former)  # or another thread would put it in place again
        try:
            os.rename(path, former)
            try:
                os.rename(folder, path)
            except BaseException:
                os.rename(former, path)
                raise
        finally:
            atomic.release(former)
    try:
        atomic.sync_folder(path.parent)
    finally:
        _discard(former)


def _discard(folder: Path) -> None:
    """Remove a folder that is no checkpoint any more, the manifest first; what cannot be removed is a leftover.

    Of a link, the link: what it led to is a checkpoint still.
    """
    with contextlib.suppress(OSError):
        if not folder.is_symlink():
            (folder / MANIFEST).unlink(missing_ok=True)
        atomic.delete(folder)


def _exchange(one: Path, other: Path) -> bool:
    """Swap the names of two folders in one step, where system and file system can; return whether they did."""
    if sys.platform != "linux":
        return False
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if swap is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if swap(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(one))


# --------------------------------------------------------------------------------------------- read


def is_committed(folder: Path) -> bool:
    """Return whether ``folder`` has a manifest; whether it fits is another question."""
    return (folder / MANIFEST).is_file()


def manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint folder.

    Raises:
        CheckpointDamagedError: if there is none, or it is damaged.
        CheckpointError: if a newer Leyden wrote it.
    """
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        found, wanted = content.pop("crc32"), _checksum(content)
    except FileNotFoundError as error:
        raise CheckpointDamagedError(
            f"The checkpoint {str(folder)!r} is a folder without {MANIFEST}: writing it was cut short, or it is no"
            " checkpoint. Use another one."
        ) from error
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointDamagedError(f"The checkpoint {str(folder)!r} is damaged: its manifest: {error}.") from error
    if found != wanted:
        raise CheckpointDamagedError(
            f"The checkpoint {str(folder)!r} is damaged: the checksum of its manifest is wrong."
        )
    version = content.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise CheckpointError(
            f"{folder} has format {version}; this version of Leyden reads up to format {FORMAT}. Update Leyden."
        )
    if not _is_ours(content):
        raise CheckpointDamagedError(f"The checkpoint {str(folder)!r} has a manifest that Leyden did not write.")
    return dict(content)


def _is_ours(content: Mapping[str, Any]) -> bool:
    """Whether a manifest has what ours have, and speaks of files in its own folder only."""
    name, noted = content.get("name"), content.get("files")
    return (
        isinstance(content.get("format"), int)
        and isinstance(content.get("record"), dict)
        and isinstance(name, str)
        and PurePath(name).name == name
        and isinstance(noted, dict)
        and all(
            isinstance(about, dict)
            and {"bytes", "crc32"} <= about.keys()
            and not PurePath(file).is_absolute()
            and ".." not in PurePath(file).parts
            for file, about in noted.items()
        )
    )


def check(folder: Path, rank: int = 0, world_size: int = 1) -> dict[str, Any]:
    """Return the manifest if every file is there with its size and checksum.

    Several processes share out the checksums: this one compares those of every ``world_size``-th file.

    Raises:
        CheckpointDamagedError: naming the first file that is not.
    """
    content = manifest(folder)
    noted = dict(list(content["files"].items())[rank::world_size])
    for name, wanted in noted.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            raise CheckpointDamagedError(
                f"The checkpoint {str(folder)!r} is damaged: {name!r} cannot be read: {error}. Use another one."
            ) from error
        if size != wanted["bytes"]:
            raise CheckpointDamagedError(
                f"The checkpoint {str(folder)!r} is damaged: {name!r} has {size} bytes, it was written with"
                f" {wanted['bytes']}. Use another one."
            )
    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            sums = list(threads.map(atomic.checksum, [folder / name for name in noted]))
    except OSError as error:
        raise CheckpointDamagedError(
            f"The checkpoint {str(folder)!r} cannot be read: {error}. Use another one."
        ) from error
    for name, found in zip(noted, sums, strict=True):
        if found != noted[name]["crc32"]:
            raise CheckpointDamagedError(
                f"The checkpoint {str(folder)!r} is damaged: the checksum of {name!r} is wrong. Use another one."
            )
    return content


def waiting(path: Path) -> Path | None:
    """Return the committed folder that stands for ``path`` after its process died, None if there is none.

    Only where two folders cannot change names in one step: then, for a moment, neither of them is called ``path``.
    """
    if os.path.lexists(path):
        return None
    return next((entry for entry, target in _in_waiting(path.parent) if target == path), None)


def _in_waiting(parent: Path) -> list[tuple[Path, Path]]:
    """Return committed folders of dead processes, the new ones before the replaced, and what each should be called."""
    found = []
    for entry in sorted(atomic.leftovers(parent), key=lambda entry: entry.suffix, reverse=True):  # .tmp before .old
        if entry.suffix in (".tmp", ".old") and not entry.is_symlink() and is_committed(entry):
            with contextlib.suppress(CheckpointError):
                found.append((entry, parent / manifest(entry)["name"]))
    return found


def sweep(parent: Path) -> None:
    """Put folders in place that dead processes had committed, and remove the leftovers that they had not."""
    for entry, target in _in_waiting(parent):
        if not os.path.lexists(target):
            with contextlib.suppress(OSError):
                os.rename(entry, target)
                atomic.sync_folder(parent)
    for entry in atomic.leftovers(parent):
        if entry.is_dir() and not entry.is_symlink():
            _discard(entry)


def stand_ins(parent: Path) -> list[Path]:
    """Return the committed folders in ``parent`` that stand for one that is missing: see :func:`waiting`."""
    first: dict[Path, Path] = {}
    for entry, target in _in_waiting(parent):
        if not os.path.lexists(target):
            first.setdefault(target, entry)
    return list(first.values())


def remove(path: Path) -> None:
    """Remove a checkpoint folder: it stops being one in one step, whatever happens while its files go.

    Raises:
        CheckpointError: for a folder that has no manifest: it is not ours to remove.
    """
    if not is_committed(path):
        raise CheckpointError(
            f"The checkpoint {str(path)!r} could not be removed: it is a folder without {MANIFEST}, which is no checkpoint"
            " of ours."
        )
    sweep(path.parent)  # first, so that no former version of it comes back
    former = path.parent / atomic.temporary_name(path.name, "del")
    os.rename(path, former)
    try:
        atomic.sync_folder(path.parent)
    finally:
        _discard(former)
