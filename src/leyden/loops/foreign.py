# SPDX-License-Identifier: Apache-2.0
"""Objects of another trainer's classes in a run of ours: which work as they are, and why the others cannot.

A callback, a logger or a data module is known by its methods, so one that is derived from another library's class works. What
reads the private state of the Trainer that it was written for cannot, and is refused before a run begins.
"""

from __future__ import annotations

from typing import Any

_PRIVATE = {
    "BatchSizeFinder": "drives the loops of its own Trainer",
    "DeviceStatsMonitor": "logs through the private state of its own Trainer",
    "GradientAccumulationScheduler": "changes the loops of its own Trainer",
    "LearningRateFinder": "drives the loops of its own Trainer",
    "LearningRateMonitor": "logs through the private state of its own Trainer",
    "ModelSummary": "reads the private state of its own module",
    "ThroughputMonitor": "logs through the private state of its own Trainer",
    "WeightAveraging": "wants a module of its own library's",
}
"""Callbacks, by the name of their class, and what they do that no other Trainer has."""


def kinds(obj: Any) -> set[str]:
    """Return the names of the classes, other than ours, that an object is of."""
    return {cls.__name__ for cls in type(obj).__mro__ if cls.__module__.partition(".")[0] != "leyden"}


def why_not(callback: Any) -> str:
    """Return why a callback of another library cannot run here, as a sentence; empty if it can."""
    name = next((cls.__name__ for cls in type(callback).__mro__ if cls.__name__ in _PRIVATE), "")
    home = type(callback).__module__.partition(".")[0]
    if not name or "Callback" not in kinds(callback):
        return ""
    return (
        f"{type(callback).__name__} of {home!r} {_PRIVATE[name]}. Use leyden.callbacks.{name} in its place, or start the"
        " program with `leyden run`, so that all its imports are Leyden's."
    )


def of_another(model: Any) -> str:
    """Return why a module of another library's LightningModule cannot run here, as a sentence; empty if it is none."""
    if "LightningModule" not in kinds(model):
        return ""
    home = next(cls.__module__ for cls in type(model).__mro__ if cls.__name__ == "LightningModule")
    return (
        f"{type(model).__name__} is a LightningModule of {home.partition('.')[0]!r}, whose log(), optimizers() and"
        " manual_backward() speak to that library's own Trainer. Start the program with `leyden run`, so that all its"
        " imports are Leyden's, or derive the class from leyden.LightningModule."
    )
