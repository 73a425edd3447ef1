# SPDX-License-Identifier: Apache-2.0
"""Profilers measure what the parts of a run cost; the file of one is imported when its name is first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from leyden.profilers.base import PassThroughProfiler, Profiler
from leyden.profilers.simple import SimpleProfiler

if TYPE_CHECKING:
    from leyden.profilers.advanced import AdvancedProfiler
    from leyden.profilers.pytorch import PyTorchProfiler
    from leyden.profilers.xla import XLAProfiler

_HOME = {
    "AdvancedProfiler": "leyden.profilers.advanced",
    "PyTorchProfiler": "leyden.profilers.pytorch",
    "XLAProfiler": "leyden.profilers.xla",
}

__all__ = ["AdvancedProfiler", "PassThroughProfiler", "Profiler", "PyTorchProfiler", "SimpleProfiler", "XLAProfiler"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # the next use finds it without coming here
    return value
