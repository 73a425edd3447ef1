# SPDX-License-Identifier: Apache-2.0
"""Bring hyperparameters of any kind into the forms that loggers can write: plain nested data, or one flat row."""

from __future__ import annotations

import dataclasses
import sys
from argparse import Namespace
from collections.abc import Mapping
from enum import Enum
from typing import Any


def params_to_dict(params: Mapping[str, Any] | Namespace | None) -> dict[str, Any]:
    """Return ``params`` as a new dict; None stands for no hyperparameters."""
    if params is None:
        return {}
    return dict(vars(params)) if isinstance(params, Namespace) else dict(params)


def plain_params(value: Any) -> Any:
    """Return ``value`` as nested dicts and lists of None, bool, int, float and str, which any YAML reader accepts.

    Enum members become their name, single numbers of numpy or torch a number, classes and functions their full
    name, everything else its ``str``.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    value = _unwrap(value)
    mapping = _as_mapping(value)
    if mapping is not None:
        return {
            key if type(key) in (bool, int, float, str) else str(key): plain_params(v) for key, v in mapping.items()
        }
    if isinstance(value, (list, tuple)):
        return [plain_params(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain_params(item) for item in value), key=str)
    return _plain_leaf(value)


def flatten_params(params: Mapping[Any, Any], separator: str = "/", prefix: str = "") -> dict[str, Any]:
    """Return one level of ``{"outer/inner": value}``; lists are entered only where every item is a mapping."""
    flat: dict[str, Any] = {}
    for key, item in _unwrap(params).items():
        value = _unwrap(item)
        name = f"{prefix}{separator}{key}" if prefix else str(key)
        mapping = _as_mapping(value)
        if mapping is None and isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            mapping = dict(enumerate(value))
        if mapping is None:
            flat[name] = value
        else:
            flat.update(flatten_params(mapping, separator, name))
    return flat


def sanitize_params(params: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Return ``params`` with each value that is not a bool, int, float or str turned into one of them."""
    return {key: v if type(v) in (bool, int, float, str) else _plain_leaf(v) for key, v in params.items()}


def _unwrap(value: Any) -> Any:
    """Turn a container of OmegaConf into a dict or list: read as a mapping it raises where a value is still missing."""
    omegaconf = sys.modules.get("omegaconf")  # if nobody has imported it, the value is none of its containers
    if omegaconf is not None and omegaconf.OmegaConf.is_config(value):
        return omegaconf.OmegaConf.to_container(value, resolve=True)
    return value


def _as_mapping(value: Any) -> Mapping[Any, Any] | None:
    if isinstance(value, Mapping):
        return value
    if isinstance(value, Namespace):
        return vars(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # not asdict: it would deep-copy every value, models among them
        return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    return None


def _plain_leaf(value: Any) -> bool | int | float | str:
    if isinstance(value, Enum):
        return value.name
    if callable(value) and hasattr(value, "__qualname__"):
        return ".".join(filter(None, (getattr(value, "__module__", None), value.__qualname__)))
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)  # of a subclass, numpy.float64 among them
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        value = value.item()
    return value if isinstance(value, (bool, int, float, str)) else str(value)
