# SPDX-License-Identifier: Apache-2.0
"""A profiler for TPUs, which need torch_xla."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, ClassVar

from leyden.profilers.base import Profiler


class XLAProfiler(Profiler):
    """Marks the actions of a run in traces of torch_xla, which ``torch_xla.debug.profiler`` captures.

    Args:
        port: Of the profiler's server on this machine.

    Raises:
        ModuleNotFoundError: without torch_xla.
    """

    STEP_FUNCTIONS: ClassVar[set[str]] = {"validation_step", "test_step", "predict_step"}
    RECORD_FUNCTIONS: ClassVar[set[str]] = {"training_step", "backward", *STEP_FUNCTIONS}

    def __init__(self, port: int = 9012) -> None:
        if importlib.util.find_spec("torch_xla") is None:
            raise ModuleNotFoundError(
                "XLAProfiler needs torch_xla, which is not installed: it is for TPUs. On a GPU or CPU use"
                " Trainer(profiler='pytorch')."
            )
        super().__init__()
        self.port = port
        self._profiler: Any = importlib.import_module("torch_xla.debug.profiler")
        self._traces: dict[str, Any] = {}
        self._server: Any = None

    def start(self, action_name: str) -> None:
        """Begin to mark an action, if it is one that a trace shows."""
        name = action_name.rpartition(".")[2]
        if name not in self.RECORD_FUNCTIONS:
            return
        if self._server is None:
            self._server = self._profiler.start_server(self.port)
        kind = self._profiler.StepTrace if name in self.STEP_FUNCTIONS else self._profiler.Trace
        self._traces[action_name] = trace = kind(action_name)
        trace.__enter__()

    def stop(self, action_name: str) -> None:
        """End the mark of an action."""
        if (trace := self._traces.pop(action_name, None)) is not None:
            trace.__exit__(None, None, None)
