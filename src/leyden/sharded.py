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
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader

from leyden import archive, folders, shards
from leyden.errors import CheckpointDamagedError, CheckpointError
from leyden.runtime.ranks import rank_zero_warn

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
    device = torch.device(map_location) if isinstance(map_location, (str, torch.device)) else None
    if device is not None and device.type == "meta":
        empty = Source(folder, "cpu", weights_only).checkpoint  # empty ones mark the places of those in shards
        return as_file(shards.changed(empty, lambda _, tensor: tensor if tensor.is_meta else tensor.to(device)))
    source = Source(folder, map_location, weights_only)
    if device is not None:
        return as_file(source.whole(lambda tensor: torch.empty_like(tensor, device=device)))
    made: list[Tensor] = []

    def make(tensor: Tensor) -> Tensor:
        made.append(torch.empty_like(tensor, device="cpu"))
        return made[-1]

    whole = source.whole(make)
    if map_location is not None:
        moved = dict(zip(map(id, made), _moved(made, map_location), strict=True))
        whole = shards.changed(whole, lambda _, tensor: moved.get(id(tensor), tensor))
    return as_file(whole)


def as_file(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint with the numbers of parameters in its optimizers, as files have them, in the place of names."""
    states = checkpoint.get(shards.OPTIMIZERS)
    if not isinstance(states, list):
        return dict(checkpoint)
    return {**checkpoint, shards.OPTIMIZERS: [shards.numbered(state) for state in states]}


class Source:
    """A checkpoint folder of which no tensor is read yet: an empty one, on the device ``meta``, stands for each.

    Args:
        folder: The folder; its checksums are compared by whoever wants that.
        map_location: For what is not in shards, as in ``torch.load``.
        weights_only: False unpickles anything, which lets the checkpoint run code.

    Attributes:
        checkpoint: What is in the folder, with the keys of a file.

    Raises:
        CheckpointError: if the folder is damaged, incomplete, or would run code.
    """

    def __init__(self, folder: Path, map_location: Any = None, weights_only: bool = True) -> None:
        self.folder, self.weights_only = folder, weights_only
        self._names: dict[int, str] = {}
        self._held: list[Tensor] = []  # or the address of one could pass to another
        rest = _rest(folder, map_location, weights_only)
        if not folders.is_committed(folder):
            if "leyden" in rest:
                folders.manifest(folder)  # ours: without a manifest it is not complete
            rank_zero_warn(f"The checkpoint {str(folder)!r} has no manifest: whether it is complete cannot be known.")
        self.checkpoint = rest
        if not (folder / ".metadata").is_file():
            return
        self._reader = Reader(folder)
        self._contents = self._reader.read_metadata()
        with _read(folder):
            self._note_places(rest)
            self.checkpoint = _joined(rest, self._others())

    def _note_places(self, rest: dict[str, Any]) -> None:
        """Note the names of the empty tensors that stand in a checkpoint of ours."""
        names, there = shards.Names(), self._contents.state_dict_metadata

        def note(path: shards.Path, tensor: Tensor) -> Tensor:
            if tensor.device.type == "meta" and id(tensor) not in self._names:
                name = names.name(path)
                if name not in there:
                    raise CheckpointDamagedError(
                        f"The checkpoint {str(self.folder)!r} has no values of {name!r}. Use another one."
                    )
                self._stands_for(tensor, name)
            return tensor

        shards.changed(rest, note)

    def _others(self) -> dict[str, Any]:
        """What has no place in the rest, by name: empty tensors; values that are no tensors are few, and are read."""
        known = set(self._names.values())
        flat: dict[str, Any] = {}
        for name, entry in self._contents.state_dict_metadata.items():
            if name in known:
                continue
            if isinstance(entry, metadata.TensorStorageMetadata):
                empty = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
                flat[name] = self._stands_for(empty, name)
            else:
                flat[name] = None
        values: dict[str, Any] = {name: None for name, value in flat.items() if value is None}
        if values:
            self._read(values)
        return _nested({**flat, **values}, self._contents.planner_data)

    def _stands_for(self, tensor: Tensor, name: str) -> Tensor:
        self._names[id(tensor)] = name
        self._held.append(tensor)
        return tensor

    def knows(self, tensor: Any) -> bool:
        """Return whether ``tensor`` is one of the empty ones."""
        return id(tensor) in self._names

    def fill(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Read what stands at each first place into the second: of one that is spread, the part of this process.

        Raises:
            CheckpointError: as for the class.
        """
        wanted: dict[str, Any] = {}
        twice: list[tuple[Tensor, Tensor]] = []
        for empty, target in pairs:
            name = self._names[id(empty)]
            if name in wanted and wanted[name] is not target:
                twice.append((wanted[name], target))
            else:
                wanted[name] = target.detach()
        if wanted:
            with _read(self.folder):
                self._read(wanted)
        with torch.no_grad():
            for first, second in twice:
                second.copy_(first)

    def whole(
        self, make: Callable[[Tensor], Tensor], but: Callable[[shards.Path], bool] = lambda _: False
    ) -> dict[str, Any]:
        """Return the checkpoint with tensors that ``make`` makes of the empty ones, filled; ``but`` says where not."""
        made: dict[int, Tensor] = {}

        def real(path: shards.Path, tensor: Tensor) -> Tensor:
            if not self.knows(tensor) or but(path):
                return tensor
            if id(tensor) not in made:  # tied weights stay so
                made[id(tensor)] = make(tensor)
            return made[id(tensor)]

        result = dict(shards.changed(self.checkpoint, real))
        self.fill((empty, made[id(empty)]) for empty in self._held if id(empty) in made)
        return result

    def _read(self, wanted: dict[str, Any]) -> None:
        """Read values by their names: into tensors that are there; others take their place."""
        planner = Planner(self.weights_only, flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(wanted, self._contents, True)
        reader = self._reader
        reader.set_up_storage_reader(self._contents, True)
        plan = reader.prepare_global_plan([reader.prepare_local_plan(planner.create_local_plan())])[0]
        reader.read_data(planner.finish_plan(plan), planner).wait()


@contextlib.contextmanager
def _read(folder: Path) -> Iterator[None]:
    """Turn what torch's reader raises in the block, a dozen kinds for damage of a dozen kinds, into one error."""
    try:
        yield
    except CheckpointDamagedError as error:  # of one of its values, perhaps
        if repr(str(folder)) in str(error):
            raise
        raise CheckpointDamagedError(f"The checkpoint {str(folder)!r} cannot be read: {error}") from error
    except (CheckpointError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise CheckpointDamagedError(
            f"The checkpoint {str(folder)!r} cannot be read: {type(error).__name__}: {error}. Use another one."
        ) from error


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
        paths = contents.planner_data or {}
        flat = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            if isinstance(entry, metadata.TensorStorageMetadata)
            else "<a value>"
            for name, entry in contents.state_dict_metadata.items()
            if not _has_place(result, paths.get(name, (name,)))
        }
        return as_file(_joined(result, _nested(flat, paths)))


def _rest(folder: Path, map_location: Any, weights_only: bool, *, any_name: bool = False) -> dict[str, Any]:
    path = folder / shards.META
    if not path.is_file():
        return {}
    found = archive.read(path, repr(str(path)), map_location, weights_only, any_name=any_name)
    if not isinstance(found, Mapping):
        raise CheckpointError(
            f"The checkpoint {str(folder)!r} holds a {type(found).__name__} in {shards.META}, where a dict is."
        )
    return dict(found)


def _moved(tensors: list[Tensor], map_location: Any) -> list[Tensor]:
    """Put tensors where a function or a table says, as torch.load would."""
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    buffer.seek(0)
    moved: list[Tensor] = torch.load(buffer, map_location=map_location, weights_only=True)
    return moved


def _joined(rest: Mapping[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Put what has no place in the rest of a checkpoint beside it."""
    others = _as_file(others)
    weights = rest.get(shards.WEIGHTS)
    if isinstance(weights, dict) and isinstance(others.get(shards.WEIGHTS), dict):
        others[shards.WEIGHTS] = {**weights, **others[shards.WEIGHTS]}
    return {**rest, **others}


def _has_place(rest: Any, path: tuple[Any, ...]) -> bool:
    """Whether a tensor stands in the rest of a checkpoint where ``path`` leads."""
    first = str(path[0])
    if first.startswith("optimizer_") and first[10:].isdigit():
        path = (shards.OPTIMIZERS, int(first[10:]), *path[1:])
    for key in path:
        try:
            rest = rest[key]
        except (KeyError, IndexError, TypeError):
            return False
    return isinstance(rest, Tensor)


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
