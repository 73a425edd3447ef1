# SPDX-License-Identifier: Apache-2.0
"""The built-in callbacks under one name each; a callback's file is imported when its name is first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leyden.callback import Callback
    from leyden.callbacks.batch_size_finder import BatchSizeFinder
    from leyden.callbacks.checkpoint import Checkpoint, ModelCheckpoint
    from leyden.callbacks.early_stopping import EarlyStopping
    from leyden.callbacks.gradient_accumulation_scheduler import GradientAccumulationScheduler
    from leyden.callbacks.lambda_function import LambdaCallback
    from leyden.callbacks.learning_rate_finder import LearningRateFinder
    from leyden.callbacks.learning_rate_monitor import LearningRateMonitor
    from leyden.callbacks.model_summary import ModelSummary, RichModelSummary
    from leyden.callbacks.on_exception_checkpoint import OnExceptionCheckpoint
    from leyden.callbacks.prediction_writer import BasePredictionWriter
    from leyden.callbacks.progress import ProgressBar, RichProgressBar, TQDMProgressBar
    from leyden.callbacks.throughput_monitor import ThroughputMonitor
    from leyden.callbacks.timer import Timer

_HOME = {
    "BasePredictionWriter": "leyden.callbacks.prediction_writer",
    "BatchSizeFinder": "leyden.callbacks.batch_size_finder",
    "Callback": "leyden.callback",
    "Checkpoint": "leyden.callbacks.checkpoint",
    "EarlyStopping": "leyden.callbacks.early_stopping",
    "GradientAccumulationScheduler": "leyden.callbacks.gradient_accumulation_scheduler",
    "LambdaCallback": "leyden.callbacks.lambda_function",
    "LearningRateFinder": "leyden.callbacks.learning_rate_finder",
    "LearningRateMonitor": "leyden.callbacks.learning_rate_monitor",
    "ModelCheckpoint": "leyden.callbacks.checkpoint",
    "ModelSummary": "leyden.callbacks.model_summary",
    "OnExceptionCheckpoint": "leyden.callbacks.on_exception_checkpoint",
    "ProgressBar": "leyden.callbacks.progress",
    "RichModelSummary": "leyden.callbacks.model_summary",
    "RichProgressBar": "leyden.callbacks.progress",
    "TQDMProgressBar": "leyden.callbacks.progress",
    "ThroughputMonitor": "leyden.callbacks.throughput_monitor",
    "Timer": "leyden.callbacks.timer",
}

__all__ = [
    "BasePredictionWriter",
    "BatchSizeFinder",
    "Callback",
    "Checkpoint",
    "EarlyStopping",
    "GradientAccumulationScheduler",
    "LambdaCallback",
    "LearningRateFinder",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelSummary",
    "OnExceptionCheckpoint",
    "ProgressBar",
    "RichModelSummary",
    "RichProgressBar",
    "TQDMProgressBar",
    "ThroughputMonitor",
    "Timer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # the next use finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
