# SPDX-License-Identifier: Apache-2.0
"""The built-in callbacks under one name each; a callback's file is imported when its name is first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leyden.callback import Callback
    from leyden.callbacks.batch_size_finder import BatchSizeFinder
    from leyden.callbacks.checkpoint import Checkpoint, ModelCheckpoint
    from leyden.callbacks.device_stats_monitor import DeviceStatsMonitor
    from leyden.callbacks.early_stopping import EarlyStopping
    from leyden.callbacks.finetuning import BackboneFinetuning, BaseFinetuning
    from leyden.callbacks.gradient_accumulation_scheduler import GradientAccumulationScheduler
    from leyden.callbacks.lambda_function import LambdaCallback
    from leyden.callbacks.learning_rate_finder import LearningRateFinder
    from leyden.callbacks.learning_rate_monitor import LearningRateMonitor
    from leyden.callbacks.model_pruning import ModelPruning
    from leyden.callbacks.model_summary import ModelSummary, RichModelSummary
    from leyden.callbacks.on_exception_checkpoint import OnExceptionCheckpoint
    from leyden.callbacks.prediction_writer import BasePredictionWriter
    from leyden.callbacks.progress import ProgressBar, RichProgressBar, TQDMProgressBar
    from leyden.callbacks.spike_detection import SpikeDetection
    from leyden.callbacks.stochastic_weight_averaging import StochasticWeightAveraging
    from leyden.callbacks.throughput_monitor import ThroughputMonitor
    from leyden.callbacks.timer import Timer
    from leyden.callbacks.weight_averaging import EMAWeightAveraging, WeightAveraging

_HOME = {
    "BackboneFinetuning": "leyden.callbacks.finetuning",
    "BaseFinetuning": "leyden.callbacks.finetuning",
    "BasePredictionWriter": "leyden.callbacks.prediction_writer",
    "BatchSizeFinder": "leyden.callbacks.batch_size_finder",
    "Callback": "leyden.callback",
    "Checkpoint": "leyden.callbacks.checkpoint",
    "DeviceStatsMonitor": "leyden.callbacks.device_stats_monitor",
    "EMAWeightAveraging": "leyden.callbacks.weight_averaging",
    "EarlyStopping": "leyden.callbacks.early_stopping",
    "GradientAccumulationScheduler": "leyden.callbacks.gradient_accumulation_scheduler",
    "LambdaCallback": "leyden.callbacks.lambda_function",
    "LearningRateFinder": "leyden.callbacks.learning_rate_finder",
    "LearningRateMonitor": "leyden.callbacks.learning_rate_monitor",
    "ModelCheckpoint": "leyden.callbacks.checkpoint",
    "ModelPruning": "leyden.callbacks.model_pruning",
    "ModelSummary": "leyden.callbacks.model_summary",
    "OnExceptionCheckpoint": "leyden.callbacks.on_exception_checkpoint",
    "ProgressBar": "leyden.callbacks.progress",
    "RichModelSummary": "leyden.callbacks.model_summary",
    "RichProgressBar": "leyden.callbacks.progress",
    "SpikeDetection": "leyden.callbacks.spike_detection",
    "StochasticWeightAveraging": "leyden.callbacks.stochastic_weight_averaging",
    "TQDMProgressBar": "leyden.callbacks.progress",
    "ThroughputMonitor": "leyden.callbacks.throughput_monitor",
    "Timer": "leyden.callbacks.timer",
    "WeightAveraging": "leyden.callbacks.weight_averaging",
}

__all__ = [
    "BackboneFinetuning",
    "BaseFinetuning",
    "BasePredictionWriter",
    "BatchSizeFinder",
    "Callback",
    "Checkpoint",
    "DeviceStatsMonitor",
    "EMAWeightAveraging",
    "EarlyStopping",
    "GradientAccumulationScheduler",
    "LambdaCallback",
    "LearningRateFinder",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelPruning",
    "ModelSummary",
    "OnExceptionCheckpoint",
    "ProgressBar",
    "RichModelSummary",
    "RichProgressBar",
    "SpikeDetection",
    "StochasticWeightAveraging",
    "TQDMProgressBar",
    "ThroughputMonitor",
    "Timer",
    "WeightAveraging",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # the next use finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
