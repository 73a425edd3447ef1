# SPDX-License-Identifier: Apache-2.0
"""What the Trainer's arguments may be: the types of its signature, which editors, type checkers and LightningCLI read."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, Literal, TypeAlias, Union

from leyden.callback import Callback as Callback
from leyden.checkpoint_io import CheckpointIO
from leyden.loggers.base import Logger
from leyden.precision import Precision
from leyden.profilers import Profiler as Profiler
from leyden.runtime.cluster import ClusterEnvironment
from leyden.runtime.devices import Accelerator as Accelerator
from leyden.strategies import Strategy as Strategy

PathLike: TypeAlias = Union[str, os.PathLike[str]]
Devices: TypeAlias = Union[list[int], str, int]
Duration: TypeAlias = Union[str, timedelta, dict[str, int]]
Loggers: TypeAlias = Union[Logger, Iterable[Logger], bool]
Callbacks: TypeAlias = Union[list[Callback], Callback]
Plugin: TypeAlias = Union[Precision, ClusterEnvironment, CheckpointIO]
Plugins: TypeAlias = Union[Plugin, list[Plugin]]
PrecisionName: TypeAlias = Literal[
    64, 32, 16, "16-true", "16-mixed", "bf16-true", "bf16-mixed", "32-true", "64-true", "64", "32", "16", "bf16"
]
CompileArguments: TypeAlias = Union[bool, dict[str, Any]]
