# SPDX-License-Identifier: Apache-2.0
"""What is inside a checkpoint file: read without running its code, compared with its checksums and its manifest."""

from __future__ import annotations

import io
import pickle
import re
import struct
import tarfile
import threading
import zipfile
from argparse import Namespace
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.serialization import safe_globals

from leyden.errors import CheckpointDamagedError, CheckpointError
from leyden.runtime.ranks import rank_zero_warn

Source = Path | IO[bytes]
_ZIP = b"PK\x03\x04"
_BEFORE_ZIP = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How a file begins that torch wrote before version 1.6, or was told to write that way: it has no checksums."""
_FOLDER = 0x10
"""The attribute of a folder: where one bit makes it of an entry, torch reads nothing there, and says nothing."""
_REFUSED = re.compile(r"GLOBAL (\S+) (was not an allowed global|whose module \S+ is blocked)")


# --------------------------------------------------------------------------------------------- read


def read(
    source: Source,
    name: str,
    map_location: Any = None,
    weights_only: bool = True,
    *,
    mmap: bool = False,
    any_name: bool = False,
) -> Any:
    """Return the content of a checkpoint file; ``name`` is what errors call it.

    With ``weights_only`` no code runs. A few classes that hold nothing but data, and that older versions of Lightning
    wrote, are read as what they hold. ``any_name`` reads all others too, as inert objects that only know their names:
    for who wants to look at a file, not to use it.

    Raises:
        CheckpointError: saying what is wrong.
    """
    map_location = _to_what_is_here if map_location is None else map_location
    options: dict[str, Any] = {
        "map_location": map_location,
        "weights_only": weights_only,
        **({"mmap": True} if mmap else {}),
    }
    stand_ins: dict[str, Any] = {}
    start = None if isinstance(source, Path) else source.tell()
    while True:
        try:
            if start is not None and not isinstance(source, Path):
                source.seek(start)
            loaded = _load_with(stand_ins, source, options) if stand_ins else torch.load(source, **options)
        except (MemoryError, torch.OutOfMemoryError):
            raise  # says all there is to say, and nothing is wrong with the file
        except Exception as error:
            refused = _REFUSED.search(str(error))
            wanted = refused[1] if refused is not None else ""
            wanted = wanted if "." in wanted else f"builtins.{wanted}"
            stand_in = _stand_in(wanted, any_name) if refused is not None and "blocked" not in refused[2] else None
            if stand_in is None or wanted in stand_ins or not weights_only:
                raise _unreadable(source, name, error, weights_only) from error
            stand_ins[wanted] = stand_in
        else:
            return _without_classes(loaded) if stand_ins else loaded


_lock = threading.Lock()


def _load_with(stand_ins: Mapping[str, Any], source: Source, options: Mapping[str, Any]) -> Any:
    # torch keeps the names that it may read in one list for all threads
    with _lock, safe_globals([(value, key) for key, value in stand_ins.items()]):
        return torch.load(source, **options)


def _unreadable(source: Source, name: str, error: Exception, weights_only: bool) -> CheckpointError:
    """Return the error that says what is wrong with a file that could not be read."""
    trust = "If you trust whoever wrote it, pass weights_only=False; that lets the file run any code."
    if isinstance(error, PermissionError):
        return CheckpointError(f"The checkpoint {name} cannot be read: {error}. Change its permissions.")
    refused = _REFUSED.search(str(error))
    if refused is not None:
        return CheckpointError(
            f"The checkpoint {name} contains {refused[1]!r}, which is code, not plain data, so it was not opened. {trust}"
        )
    if "legacy .tar format" in str(error):
        return CheckpointError(
            f"The checkpoint {name} is a tar file, torch's first format, which cannot be read without running its code,"
            f" so it was not opened. {trust}"
        )
    try:
        check(source, name)
    except CheckpointError as reason:
        return reason
    if isinstance(error, (ImportError, AttributeError)):
        return CheckpointError(
            f"The checkpoint {name} needs code that is not here ({error}). Make it importable, or open the file with"
            " weights_only=True if it is only weights you need."
        )
    if weights_only and isinstance(error, pickle.UnpicklingError):
        return CheckpointError(
            f"The checkpoint {name} contains more than plain data ({_first_line(error)}), so it was not opened. {trust}"
        )
    return CheckpointError(f"The checkpoint {name} cannot be read: {type(error).__name__}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    """Return what matters of an error; torch's begin with advice to open the file with weights_only=False."""
    text = str(error).rpartition("WeightsUnpickler error: ")[2]
    return text.strip().partition("\n")[0].rstrip(".")


def _to_what_is_here(storage: Any, location: str) -> Any:
    """Leave tensors on the CPU if the device they were saved from is not here."""
    kind, _, index = location.partition(":")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        return storage
    if kind == "mps" and not torch.backends.mps.is_available():
        return storage
    return None


# --------------------------------------------------------------------------------------------- classes that only hold data

_LIGHTNING = ("pytorch_lightning", "lightning", "lightning_fabric", "lightning_lite", "lightning_utilities")


class Opaque:
    """An object in a checkpoint whose class was not looked for; it holds nothing, and nothing of it has run."""

    origin = ""

    def __new__(cls, *_: Any, **__: Any) -> Opaque:
        """Take whatever the class would have been called with."""
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Take whatever the object held, and drop it."""

    def __repr__(self) -> str:
        return f"<{self.origin.encode('unicode_escape').decode()}>"  # it may be shown on a terminal


def _stand_in(name: str, any_name: bool) -> Any:
    """Return what to read the class or function ``name`` as; None if it must not be read."""
    module, _, attribute = name.rpartition(".")
    if name in _HARMLESS:
        return _HARMLESS[name]
    if module.partition(".")[0] == "pathlib" and attribute.endswith("Path"):
        return Path
    from_lightning = module.partition(".")[0] in _LIGHTNING
    if from_lightning and attribute == "AttributeDict":
        return dict
    # up to Lightning 1.4 the states of callbacks were kept under their classes
    if any_name or (from_lightning and ".callbacks" in module):
        # the name of a class may not be any text, its qualified name may
        return type("Opaque", (Opaque,), {"origin": name, "__qualname__": attribute})
    return None


def _without_classes(loaded: Any) -> Any:
    """Replace the classes under which callbacks are kept by their names."""
    if isinstance(loaded, dict) and isinstance(loaded.get("callbacks"), dict):
        loaded["callbacks"] = {
            key.__qualname__ if isinstance(key, type) else key: state for key, state in loaded["callbacks"].items()
        }
    return loaded


class _Dtype:
    """Reads the type of a number of numpy's, of which it keeps what is needed to read the number."""

    def __init__(self, code: str, align: Any = False, copy: Any = False) -> None:
        self.code, self.order = str(code), "="

    def __setstate__(self, state: Any) -> None:
        self.order = str(state[1])


def _number(kind: Any, data: Any) -> Any:
    """Read a number of numpy's."""
    dtype = np.dtype(kind.code) if isinstance(kind, _Dtype) else None
    if dtype is None or dtype.kind not in "biufc" or not isinstance(data, bytes):
        raise pickle.UnpicklingError("numpy values that are no numbers")
    return np.frombuffer(data, dtype.newbyteorder("=" if kind.order == "|" else kind.order))[0]


def _encode(text: str, encoding: str) -> bytes:
    """Read the bytes of such a number, which old pickles hold as text."""
    return text.encode(encoding)


_HARMLESS: dict[str, Any] = {
    "argparse.Namespace": Namespace,
    "types.SimpleNamespace": SimpleNamespace,
    "datetime.timedelta": timedelta,
    "numpy.dtype": _Dtype,
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
    "_codecs.encode": _encode,
}


# --------------------------------------------------------------------------------------------- is it what was written?


def check(source: Source, name: str, *, tensors: bool = True) -> bool:
    """Compare a file with its checksums; ``tensors=False`` leaves out the content of tensors.

    Returns:
        Whether it has any: files in the format before torch 1.6 have none, nor have those of who switched them off.

    Raises:
        CheckpointDamagedError: if it is cut off, damaged or no checkpoint at all.
    """
    start = None if isinstance(source, Path) else source.tell()
    try:
        return _check(source, name, tensors)
    finally:
        if start is not None and not isinstance(source, Path):
            source.seek(start)


def _check(source: Source, name: str, tensors: bool) -> bool:
    if not _is_zip(source, name):
        return False
    try:
        with zipfile.ZipFile(source) as archive:
            entries = archive.infolist()
            if not any(entry.CRC for entry in entries):
                return False
            for entry in entries:
                if entry.external_attr & _FOLDER:
                    raise zipfile.BadZipFile(f"{entry.filename!r} is marked as a folder")
                if tensors or "/data/" not in entry.filename:
                    with archive.open(entry) as record:
                        while record.read(1 << 20):  # raises at the end, if the checksum is wrong
                            pass
    except MemoryError:
        raise
    except Exception as error:  # zipfile and what it uses raise a dozen kinds for damage of a dozen kinds
        raise CheckpointDamagedError(f"The checkpoint {name} is damaged: {error}. Use another one.") from error
    return True


def _is_zip(source: Source, name: str) -> bool:
    """Return False for the older formats of torch; raise for what is cut off, or was never a checkpoint."""
    try:
        if zipfile.is_zipfile(source):
            return True
        if isinstance(source, Path):
            with open(source, "rb") as file:
                head = file.read(len(_BEFORE_ZIP))
            is_tar = tarfile.is_tarfile(source)
        else:
            source.seek(0)
            head, is_tar = source.read(len(_BEFORE_ZIP)), False
    except PermissionError as error:
        raise CheckpointError(f"The checkpoint {name} cannot be read: {error}. Change its permissions.") from error
    except (OSError, zipfile.BadZipFile) as error:  # is_zipfile raises too
        raise CheckpointDamagedError(f"The checkpoint {name} cannot be read: {error}. Use another one.") from error
    if head == _BEFORE_ZIP or is_tar:
        return False
    if head.startswith(_ZIP):
        raise CheckpointDamagedError(
            f"The checkpoint {name} is cut off: writing or copying it was cut short. Use another one."
        )
    raise CheckpointDamagedError(f"The checkpoint {name} is not a checkpoint, or damaged beyond recognition.")


def outline(source: IO[bytes], copy: IO[bytes]) -> bool:
    """Write to ``copy`` all of a checkpoint file but its tensors: it is as long, and has holes in their place.

    Of a remote file that fetches little, and what is no tensor can be read from the copy as from the file.

    Returns:
        False if the file is not of the format, or is cut off; then ``copy`` is as before.
    """
    if not zipfile.is_zipfile(source):
        return False
    with zipfile.ZipFile(source) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        ends = [*(entry.header_offset for entry in entries[1:]), archive.start_dir]
        copy.truncate(source.seek(0, io.SEEK_END))
        for entry, end in zip(entries, ends, strict=False):
            copy.seek(entry.header_offset)
            if (
                "/data/" in entry.filename
            ):  # for its name only, which torch looks for: the padding after it does not matter
                name = entry.filename.encode()
                copy.write(struct.pack("<4s22xHH", _ZIP, len(name), 0) + name)
            else:
                source.seek(entry.header_offset)
                copy.write(source.read(end - entry.header_offset))
        source.seek(archive.start_dir)
        copy.seek(archive.start_dir)
        copy.write(source.read())
    return True


MANIFEST = "manifest"
"""The key, under ``leyden``, of what a checkpoint holds: for each of its keys the number of tensors and of their bytes."""


def with_manifest(checkpoint: Any) -> Any:
    """Return a checkpoint of ours with its manifest in it; anything else as it is."""
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("leyden"), dict):
        return checkpoint
    return {**checkpoint, "leyden": {**checkpoint["leyden"], MANIFEST: contents(checkpoint)}}


def contents(checkpoint: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return, for each key but ``leyden``, the number of tensors under it and of their bytes."""
    found = {}
    for key, value in checkpoint.items():
        if key != "leyden":
            sizes = [0 if is_lazy(tensor) else tensor.numel() * tensor.element_size() for tensor in _tensors(value)]
            found[str(key)] = [len(sizes), sum(sizes)]
    return found


def _tensors(value: Any, above: tuple[int, ...] = ()) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple, set, frozenset)) and id(value) not in above:  # it may contain itself
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item, (*above, id(value)))


def changes(checkpoint: Any) -> list[str]:
    """Return in what a checkpoint is not what its manifest says, a sentence for each key; nothing if it has none."""
    ours = checkpoint.get("leyden") if isinstance(checkpoint, Mapping) else None
    wanted = ours.get(MANIFEST) if isinstance(ours, Mapping) else None
    if not isinstance(wanted, Mapping):
        return []
    found = contents(checkpoint)
    lines = [f"{key!r} is missing" for key in wanted if key not in found]
    lines += [f"{key!r} was added" for key in found if key not in wanted]
    for key, (tensors, size) in found.items():
        noted = wanted.get(key, [tensors, size])
        if not isinstance(noted, (list, tuple)) or len(noted) != 2:
            lines.append(f"what is noted of {key!r} is {noted!r}")
        elif list(noted) != [tensors, size]:
            lines.append(f"{key!r} has {tensors} tensors of {size} bytes, it was written with {noted[0]} of {noted[1]}")
    return lines


def warn_of_changes(checkpoint: Any, name: str) -> None:
    """Warn if a checkpoint is not what its manifest says: whole it is, so that somebody has changed it."""
    lines = changes(checkpoint)
    if lines:
        rank_zero_warn(
            f"The checkpoint {name} was changed since a run wrote it: {'; '.join(lines)}. If that was on purpose, delete"
            f" checkpoint['leyden'][{MANIFEST!r}] before you save it."
        )
