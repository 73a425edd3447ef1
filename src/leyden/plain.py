# SPDX-License-Identifier: Apache-2.0
"""Turn settings into plain data that a safe load can read, and back; pickle what cannot be, apart from it."""

from __future__ import annotations

import io
import pickle
import sys
import types
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor, nn

from leyden.errors import CheckpointError, did_you_mean
from leyden.runtime.ranks import rank_zero_warn


class AttributeDict(dict[str, Any]):
    """A dict whose items can be read, set and deleted as attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r}.{did_you_mean(name, map(str, self))}"
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        del self[name]

    def __repr__(self) -> str:
        width = max((len(str(key)) for key in self), default=0) + 3
        return "\n".join(f'"{key}":'.ljust(width) + f" {self[key]}" for key in sorted(self, key=str))


_TAG = "__leyden_type__"
# what is no plain data, but safely becomes some: name -> (type, to plain, from plain)
_TAGGED: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "Path": (PurePath, str, Path),
    "AttributeDict": (AttributeDict, dict, AttributeDict),
    "Namespace": (Namespace, lambda value: dict(vars(value)), lambda value: Namespace(**value)),
    "SimpleNamespace": (
        types.SimpleNamespace,
        lambda value: dict(vars(value)),
        lambda value: types.SimpleNamespace(**value),
    ),
    "frozenset": (frozenset, list, frozenset),
    "timedelta": (timedelta, lambda v: [v.days, v.seconds, v.microseconds], lambda v: timedelta(*v)),
}
_ATOMS = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    Tensor,
    nn.Parameter,
    torch.Size,
    torch.dtype,
    torch.device,
)


class _NotPlain(Exception):
    """Some part of a value cannot be stored as plain data."""


def plain_hparams(hparams: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split hyperparameters into what ``torch.load(weights_only=True)`` can read back, and the rest.

    The first dict is ready to be stored: paths, namespaces and a few more are in it as tagged dicts, which
    :func:`restore_hparams` turns back. The second holds the other values as they are, for :func:`pack`.
    """
    plain: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for name, value in hparams.items():
        try:
            plain[name] = _to_plain(value)
        except (_NotPlain, RecursionError):
            others[name] = value
    return plain, others


def restore_hparams(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Undo what :func:`plain_hparams` did to the values that it could store."""
    return {name: _from_plain(value) for name, value in plain.items()}


def _to_plain(value: Any) -> Any:
    kind = type(value)
    if kind in _ATOMS:
        return value.detach() if isinstance(value, Tensor) else value
    if kind in (list, tuple, set):
        return kind([_to_plain(item) for item in value])
    if kind in (dict, OrderedDict):
        if _TAG in value:
            raise _NotPlain
        return kind((_to_plain(key), _to_plain(item)) for key, item in value.items())
    for tag, (tagged, encode, _) in _TAGGED.items():
        if kind is tagged or (tagged is PurePath and isinstance(value, PurePath)):
            return {_TAG: tag, "value": _to_plain(encode(value))}
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        return _to_plain(value.item())
    raise _NotPlain


def _from_plain(value: Any) -> Any:
    kind = type(value)
    if kind in (list, tuple, set):
        return kind([_from_plain(item) for item in value])
    if kind in (dict, OrderedDict):
        if value.get(_TAG) in _TAGGED:
            return _TAGGED[value[_TAG]][2](_from_plain(value["value"]))
        return kind((_from_plain(key), _from_plain(item)) for key, item in value.items())
    return value


def pack(values: Mapping[str, Any]) -> bytes:
    """Pickle values that are not plain data into one bytes value.

    A value that cannot be pickled (a lambda, an open file) is left out, and a warning names it and the remedy.
    """
    packed: dict[str, bytes] = {}
    for name, value in values.items():
        buffer = io.BytesIO()
        try:
            torch.save(value, buffer)  # rather than pickle: it can map tensors to another device when read
        except Exception as error:
            rank_zero_warn(
                f"The hyperparameter {name!r} ({type(value).__name__}) cannot be pickled and is not in the checkpoint "
                f"({error}). Leave it out with save_hyperparameters(ignore=[{name!r}]), and pass it to "
                "load_from_checkpoint."
            )
        else:
            packed[name] = buffer.getvalue()
    return pickle.dumps(packed)


def unpack(data: bytes, map_location: Any = None) -> dict[str, Any]:
    """Unpickle what :func:`pack` made. IT CAN RUN CODE: only for who asked for ``weights_only=False``."""
    values: dict[str, Any] = {}
    for name, packed in pickle.loads(data).items():
        try:
            values[name] = torch.load(io.BytesIO(packed), map_location=map_location, weights_only=False)
        except (ImportError, AttributeError) as error:
            raise CheckpointError(
                f"The hyperparameter {name!r} of the checkpoint needs code that is not here: {error}. "
                f"Make it importable, or pass {name}=... to load_from_checkpoint."
            ) from error
    return values
