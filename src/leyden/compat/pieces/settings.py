# SPDX-License-Identifier: Apache-2.0
"""Hyperparameters and metrics in the forms that loggers take, as loggers of others ask for them."""

from __future__ import annotations

import inspect
import json
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from leyden.loggers.params import flatten_params


def convert_params(params: dict[str, Any] | Namespace | None) -> dict[str, Any]:
    """Return hyperparameters as a dict: of a namespace its variables, of None nothing, a dict as it is."""
    return vars(params) if isinstance(params, Namespace) else params if params is not None else {}


def flatten_dict(params: Mapping[Any, Any], delimiter: str = "/", parent_key: str = "") -> dict[str, Any]:
    """Return one level of ``{"outer/inner": value}``."""
    return flatten_params(params, delimiter, parent_key)


def sanitize_callable_params(params: dict[str, Any]) -> dict[str, Any]:
    """Return ``params`` with what a function without arguments returns in its place; classes, and functions that need
    arguments, by their name."""

    def plain(value: Any) -> Any:
        if inspect.isclass(value):
            return value.__name__
        if not callable(value):
            return value
        try:
            result = value()
        except Exception:  # whatever a stranger's function raises without arguments: its name is what can be said
            return getattr(value, "__name__", None)
        return value.__name__ if callable(result) else result

    return {name: plain(value) for name, value in params.items()}


def sanitize_params(params: dict[str, Any]) -> dict[str, Any]:
    """Turn, in place, each value that is no bool, number, string or tensor into its text; return ``params``."""
    for name, value in params.items():
        if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
            value = value.item()
        params[name] = value if type(value) in (bool, int, float, str, Tensor) else str(value)
    return params


def convert_json_serializable(params: dict[str, Any]) -> dict[str, Any]:
    """Return ``params`` with the text of each value that JSON cannot hold."""
    return {name: value if _is_json(value) else str(value) for name, value in params.items()}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, OverflowError):
        return isinstance(value, (list, dict))
    return True


def add_prefix(metrics: Mapping[str, Any], prefix: str, separator: str) -> Mapping[str, Any]:
    """Return metrics with ``prefix`` and ``separator`` ahead of each name; as they are without a prefix."""
    return {f"{prefix}{separator}{name}": value for name, value in metrics.items()} if prefix else metrics


def merge_dicts(
    dicts: Sequence[Mapping[str, Any]],
    agg_key_funcs: Mapping[str, Any] | None = None,
    default_func: Callable[[Sequence[float]], Any] = np.mean,
) -> dict[str, Any]:
    """Return one dict with the values of several under each name, aggregated.

    Args:
        dicts: Values by name, nested.
        agg_key_funcs: A function for each name that has its own, nested likewise.
        default_func: For the others; the mean.
    """
    functions = agg_key_funcs or {}
    merged: dict[str, Any] = {}
    for name in dict.fromkeys(name for one in dicts for name in one):
        values = [one[name] for one in dicts if name in one]
        function = functions.get(name)
        if isinstance(values[0], Mapping):
            merged[name] = merge_dicts(values, function, default_func)
        else:
            merged[name] = (function or default_func)(values)
    return merged
