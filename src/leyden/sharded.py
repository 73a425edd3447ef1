# SPDX-License-Identifier: Apache-2.0
"""Checkpoint folders of torch.distributed.checkpoint: read, whole or in part, without running their code.

In the folder are the files of ``torch.distributed.checkpoint`` (``.metadata`` and ``*.distcp``) with what is sharded,
and ``meta.pt`` with the rest of the checkpoint. Torch's own reader unpickles the first of them, and every value in it
that is no tensor; those here read plain data only.
"""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader

from leyden import archive, folders
from leyden.errors import CheckpointDamagedError, CheckpointError
from leyden.runtime.ranks import rank_zero_warn

META = "meta.pt"
"""The file with all of a checkpoint that is not sharded."""

_DATA_CLASSES = {
    **{
        (metadata.__name__, name): getattr(metadata, name)
        for name in (
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
            "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        )
    },
    **{(filesystem.__name__, name): getattr(filesystem, name) for name in ("_StorageInfo", "_StoragePrefix")},
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): getattr(torch.serialization, "_get_layout", None),
    ("collections", "OrderedDict"): dict,
}  # fmt: skip


class _Metadata(pickle.Unpickler):
    """Reads the table of contents: only the classes that it consists of."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.startswith("pathlib") and name.endswith("Path"):
            return PurePath
        try:
            return _DATA_CLASSES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name}") from None


class Reader(FileSystemReader):
    """Torch's reader of a checkpoint folder, that does not run what is in it. For ``dcp.load(storage_reader=...)``."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        """Return the table of contents.

        Raises:
            CheckpointError: if it holds anything else, or points outside the folder.
        """
        path = Path(self.path) / ".metadata"
        try:
            with open(path, "rb") as file:
                found = _Metadata(file).load()
            places = [PurePath(str(info.relative_path)) for info in found.storage_data.values()]
        except OSError as error:
            raise CheckpointDamagedError(f"The checkpoint {str(self.path)!r} cannot be read: {error}.") from error
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"The checkpoint {str(self.path)!r} contains {str(error)!r}, which is code, not plain data, so it was not"
                " opened."
            ) from error
        except Exception as error:
            raise CheckpointDamagedError(
                f"The checkpoint {str(self.path)!r} is damaged: its table of contents: {error}. Use another one."
            ) from error
        for place in places:
            if place.is_absolute() or ".." in place.parts:
                raise CheckpointError(f"The checkpoint {str(self.path)!r} points to {str(place)!r}, outside of it.")
        if getattr(found, "storage_meta", None) is None:
            found.storage_meta = metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class Planner(DefaultLoadPlanner):
    """Torch's plan for loading a checkpoint folder, that unpickles plain data only. For ``dcp.load(planner=...)``.

    Args:
        weights_only: False unpickles anything, which lets the checkpoint run code.
        **kwargs: As of ``DefaultLoadPlanner``.
    """

    def __init__(self, weights_only: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.weights_only = weights_only

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """Take a value that is no tensor."""
        name = read_item.dest_index.fqn
        loaded = archive.read(value, repr(name), "cpu", self.weights_only)
        if not self.flatten_state_dict:
            self.state_dict[name] = loaded
            return
        # torch puts the value into the nested dict itself, from bytes that it unpickles: these are ours
        again = io.BytesIO()
        torch.save(loaded, again)
        again.seek(0)
        super().load_bytes(read_item, again)


def load(folder: Path, map_location: Any = None, weights_only: bool = True, *, verify: bool = True) -> dict[str, Any]:
    """Return the whole of a checkpoint folder as the dict that a checkpoint file would hold, in this process's memory.

    Folders of Lightning are read too: they have no manifest, so that they cannot be compared with anything.

    Raises:
        CheckpointError: if the folder is damaged, incomplete, or would run code.
    """
    if folders.is_committed(folder):
        (folders.check if verify else folders.manifest)(folder)
    result = _rest(folder, map_location, weights_only)
    if not folders.is_committed(folder):
        if "leyden" in result:
            folders.manifest(folder)  # ours: without a manifest it is not complete
        rank_zero_warn(f"The checkpoint {str(folder)!r} has no manifest: whether it is complete cannot be known.")
    if not (folder / ".metadata").is_file():
        return result
    reader = Reader(folder)
    contents = reader.read_metadata()
    with _read(folder):
        flat = _values(reader, contents, weights_only)
        return {**result, **_as_file(_nested(_moved(flat, map_location), contents.planner_data))}


@contextlib.contextmanager
def _read(folder: Path) -> Iterator[None]:
    """Turn what torch's reader raises in the block, a dozen kinds for damage of a dozen kinds, into one error."""
    try:
        yield
    except (CheckpointError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise CheckpointDamagedError(
            f"The checkpoint {str(folder)!r} cannot be read: {type(error).__name__}: {error}. Use another one."
        ) from error


def _values(reader: Reader, contents: Any, weights_only: bool) -> dict[str, Any]:
    """Read all of a checkpoint folder, tensors to the CPU; values by the flat names that torch gave them."""
    flat: dict[str, Any] = {}
    for name, entry in contents.state_dict_metadata.items():
        is_tensor = isinstance(entry, metadata.TensorStorageMetadata)
        flat[name] = torch.empty(entry.size, dtype=entry.properties.dtype) if is_tensor else None
    planner = Planner(weights_only, flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(flat, contents, True)
    reader.set_up_storage_reader(contents, True)
    plan = reader.prepare_global_plan([reader.prepare_local_plan(planner.create_local_plan())])[0]
    reader.read_data(planner.finish_plan(plan), planner).wait()
    return flat


def look(folder: Path) -> dict[str, Any]:
    """Return what is in a checkpoint folder, with empty tensors and without opening any value."""
    result = _rest(folder, "meta", True, any_name=True)
    if folders.is_committed(folder):
        ours = result.get("leyden")
        content = folders.manifest(folder)
        result = {
            **content["record"],
            **result,
            "leyden": {**(ours if isinstance(ours, dict) else {}), "folder": content},
        }
    if not (folder / ".metadata").is_file():
        return result
    contents = Reader(folder).read_metadata()
    with _read(folder):
        flat = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            if isinstance(entry, metadata.TensorStorageMetadata)
            else "<a value>"
            for name, entry in contents.state_dict_metadata.items()
        }
        return {**result, **_as_file(_nested(flat, contents.planner_data))}


def _rest(folder: Path, map_location: Any, weights_only: bool, *, any_name: bool = False) -> dict[str, Any]:
    path = folder / META
    if not path.is_file():
        return {}
    found = archive.read(path, repr(str(path)), map_location, weights_only, any_name=any_name)
    if not isinstance(found, Mapping):
        raise CheckpointError(
            f"The checkpoint {str(folder)!r} holds a {type(found).__name__} in {META}, where a dict is."
        )
    return dict(found)


def _moved(flat: Mapping[str, Any], map_location: Any) -> dict[str, Any]:
    """Put tensors where ``map_location`` says, as torch.load would."""
    if map_location is None:
        return dict(flat)
    tensors = {name: value for name, value in flat.items() if isinstance(value, Tensor)}
    if isinstance(map_location, (str, torch.device)):
        return {**flat, **{name: value.to(map_location) for name, value in tensors.items()}}
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    buffer.seek(0)
    return {**flat, **torch.load(buffer, map_location=map_location, weights_only=True)}


def _nested(flat: Mapping[str, Any], paths: Mapping[str, Any] | None) -> dict[str, Any]:
    """Undo the flattening of nested dicts and lists: each value goes to the path of keys that was noted for it."""
    root: dict[Any, Any] = {}
    for name, value in flat.items():
        *parents, last = (paths or {}).get(name, (name,))
        inner = root
        for key in parents:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return dict(_with_lists(root))


def _with_lists(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if value and all(isinstance(key, int) for key in value):
        return [_with_lists(value[key]) for key in sorted(value)]
    return {key: _with_lists(item) for key, item in value.items()}


def _as_file(content: dict[str, Any]) -> dict[str, Any]:
    """Bring Lightning's names of what is sharded to those of its files: ``model``, ``optimizer_0`` …"""
    if "model" in content and "state_dict" not in content:
        content["state_dict"] = content.pop("model")
    numbers = sorted(int(name[10:]) for name in content if name.startswith("optimizer_") and name[10:].isdigit())
    if numbers and "optimizer_states" not in content:
        content["optimizer_states"] = [_with_numbers(content.pop(f"optimizer_{number}")) for number in numbers]
    return content


def _with_numbers(optimizer: dict[str, Any]) -> dict[str, Any]:
    """Give an optimizer's state back the numbers of its parameters, which torch turned into text."""
    state = optimizer.get("state")
    if isinstance(state, dict):
        optimizer["state"] = {int(key) if str(key).isdigit() else key: value for key, value in state.items()}
    return optimizer
