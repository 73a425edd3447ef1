# SPDX-License-Identifier: Apache-2.0
"""Weights without the run: written as safetensors, which any framework reads and no code hides in, and loaded again."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leyden import atomic, files
from leyden.errors import CheckpointDamagedError, CheckpointError, MisconfigurationException
from leyden.loading import apply_state_dict, clean_names
from leyden.types import PathLike

SUFFIX = ".safetensors"
_CHECKSUM = "leyden_crc32"
_ALIASES = "leyden_aliases"


def save_weights(
    model: nn.Module | Mapping[str, Any], path: PathLike, metadata: Mapping[str, str] | None = None
) -> None:
    """Write the weights of ``model`` to a safetensors file, atomically, under the names of an uncompiled model.

    Tensors that share their memory (tied weights) are written once; the file says which is which, in the way that other
    readers know too. It also holds a checksum, which safetensors itself has not.

    Call it on one process.

    Args:
        model: Any module, or a state dict.
        path: Where; the name should end in ``.safetensors``.
        metadata: Text to keep in the file's header.

    Raises:
        MisconfigurationException: if the package safetensors is missing.
        CheckpointError: if the file cannot be written, or a value is no dense tensor.
    """
    write = _safetensors("torch").save_file
    state = clean_names(dict(model.state_dict() if isinstance(model, nn.Module) else model))
    kinds = {name: value.layout if isinstance(value, Tensor) else type(value).__name__ for name, value in state.items()}
    others = [f"{name} ({str(kind).removeprefix('torch.')})" for name, kind in kinds.items() if kind != torch.strided]
    if others:
        raise CheckpointError(
            f"The weights {str(path)!r} could not be written: safetensors holds dense tensors only, and these are none:"
            f" {', '.join(others[:5])}. Save a checkpoint instead, or pass a dict without them."
        )
    tensors, aliases = _untied({name: value.detach() for name, value in state.items()})
    # other readers look for an alias under its own name
    header = {
        "format": "pt",
        **aliases,
        **(metadata or {}),
        _ALIASES: json.dumps(aliases),
        _CHECKSUM: _checksum(tensors),
    }
    with files.explained(path):
        atomic.write_file(files.require_local(path), lambda file: write(tensors, str(file), header), _read)


def load_weights(
    path: PathLike, model: nn.Module | None = None, *, strict: bool = True, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Load weights into ``model``, compiled or not, and return them; without a model, only return them.

    Args:
        path: A safetensors file, of whoever; or a checkpoint of Leyden or Lightning, of which the weights are taken.
        model: Where they go.
        strict: Whether all names must match.
        device: Where the returned tensors are.

    Raises:
        MisconfigurationException: if the package safetensors is missing.
        CheckpointError: if the file is missing, damaged or does not fit; the message lists what does not.
    """
    source = files.require_local(path)
    if _is_safetensors(source):
        state, header = _read(source)
        state.update({name: state[kept] for name, kept in json.loads(header.get(_ALIASES, "{}")).items()})
        state = {name: value.to(device) for name, value in state.items()}
    else:
        content = files.load(source, map_location=device)
        state = content.get("state_dict", content) if isinstance(content, Mapping) else {}
        if not state or not all(isinstance(name, str) for name in state):
            raise CheckpointError(f"{str(path)!r} holds no weights.")
        state = dict(state)
    if model is not None:
        apply_state_dict(model, _with_tied(model, state), strict, str(path))
    return state


def _is_safetensors(path: Path) -> bool:
    """Return whether a file begins as safetensors do: the length of the header, and the header."""
    if path.suffix == SUFFIX or not path.is_file():
        return path.suffix == SUFFIX
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    open_file = _safetensors("").safe_open
    files.require_file(path)
    try:
        with open_file(str(path), framework="pt") as file:
            header = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except (OSError, ValueError, _safetensors("").SafetensorError) as error:
        raise CheckpointDamagedError(f"The weights {str(path)!r} cannot be read: {error}. Use another file.") from error
    if header.get(_CHECKSUM, wanted := _checksum(tensors)) != wanted:
        raise CheckpointDamagedError(
            f"The weights {str(path)!r} are damaged: their checksum is wrong. Use another file."
        )
    return tensors, header


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        if tensors[name].numel():
            data = tensors[name].contiguous().cpu().flatten().view(torch.uint8)
            value = zlib.crc32(data.numpy().data, value)
    return f"{value:08x}"


def _untied(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors that share no memory, and the names that are other names of one of them."""
    kept: dict[Any, str] = {}
    aliases: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    storages: set[Any] = set()
    for name, value in state.items():
        if value.numel() and value.device.type != "meta":
            storage = (value.device, value.untyped_storage().data_ptr())
            place = (*storage, value.storage_offset(), value.dtype, value.shape, value.stride())
            if (first := kept.setdefault(place, name)) != name:
                aliases[name] = first
                continue
            if storage in storages:  # a view of a part of another one: a copy is all that can be kept of it
                value = value.clone()
            storages.add(storage)
        tensors[name] = value.contiguous()
    return tensors, aliases


def _with_tied(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fill in names that a file leaves out because their tensor is, in ``model``, the same as another one's."""
    own = clean_names(dict(model.state_dict()))
    places: dict[int, str] = {}
    for name, value in own.items():
        if isinstance(value, Tensor) and name in state and value.numel() and value.device.type != "meta":
            places.setdefault(value.data_ptr(), name)
    missing = {
        name: state[places[value.data_ptr()]]
        for name, value in own.items()
        if name not in state and isinstance(value, Tensor) and value.numel() and value.data_ptr() in places
    }
    return {**state, **{name: value for name, value in missing.items() if value.shape == own[name].shape}}


def _safetensors(part: str) -> Any:
    try:
        import safetensors.torch  # noqa: PLC0415  # only who exports weights needs it
    except ImportError as error:
        raise MisconfigurationException(
            "Safetensors files need the package safetensors: pip install 'leyden[export]'."
        ) from error
    return safetensors.torch if part else safetensors
