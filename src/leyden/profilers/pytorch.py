# SPDX-License-Identifier: Apache-2.0
"""A profiler that lets torch.profiler record a run: a table of operations, and a trace for a browser."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.profiler import ProfilerAction, record_function

from leyden.errors import MisconfigurationException, did_you_mean
from leyden.profilers.base import Profiler
from leyden.runtime.ranks import rank_zero_warn
from leyden.types import PathLike

_BATCH = "run_training_batch"
_STEP_OF = {"fit": "training_step", "validate": "validation_step", "test": "test_step", "predict": "predict_step"}
_FEWEST = 5
"""So many steps are needed to skip one, warm up in one, and record three."""


class PyTorchProfiler(Profiler):
    """Records operations of torch with ``torch.profiler``, and the actions and layers in which they run.

    A step of the schedule is a batch of the run: in a fit a whole training batch, backward and update included, while
    batches of a validation inside it do not count. The default skips a step, warms up in one, and records three; a run of
    fewer is recorded as a whole.

    Args:
        dirpath: See ``Profiler``. Traces go there as well.
        filename: See ``Profiler``.
        group_by_input_shapes: Tell operations apart by the shapes of their inputs; with ``record_shapes=True``.
        emit_nvtx: Mark ranges for Nsight Systems instead of recording: ``nsys profile -c cudaProfilerApi python ...``.
        export_to_chrome: Write a trace, for chrome://tracing or Perfetto.
        row_limit: Rows of the table; -1 is all.
        sort_by_key: One of ``AVAILABLE_SORT_KEYS``; None is the whole time on the device.
        record_module_names: Record the forward of each layer under its name.
        table_kwargs: More arguments of ``torch.autograd.profiler_util.EventList.table``.
        **profiler_kwargs: Arguments of ``torch.profiler.profile``: ``schedule``, ``activities``, ``on_trace_ready``,
            ``record_shapes``, ``profile_memory``, ``with_stack``, ...; and ``export_to_flame_graph=True``, with ``metric``.

    Attributes:
        function_events: What was recorded, after ``summary``.

    Raises:
        MisconfigurationException: for another key, or a schedule that gives no ``torch.profiler.ProfilerAction``.
        KeyError: for an argument that the table does not take.
    """

    STEP_FUNCTIONS: ClassVar[set[str]] = set(_STEP_OF.values())
    AVAILABLE_SORT_KEYS: ClassVar[set[str]] = {
        "cpu_time", "cuda_time", "cpu_time_total", "cuda_time_total", "cpu_memory_usage", "cuda_memory_usage",
        "self_cpu_memory_usage", "self_cuda_memory_usage", "count",
    }  # fmt: skip

    def __init__(
        self,
        dirpath: PathLike | None = None,
        filename: str | None = None,
        group_by_input_shapes: bool = False,
        emit_nvtx: bool = False,
        export_to_chrome: bool = True,
        row_limit: int = 20,
        sort_by_key: str | None = None,
        record_module_names: bool = True,
        table_kwargs: dict[str, Any] | None = None,
        **profiler_kwargs: Any,
    ) -> None:
        super().__init__(dirpath=dirpath, filename=filename)
        self._group_by_input_shapes = group_by_input_shapes and bool(profiler_kwargs.get("record_shapes", False))
        self._emit_nvtx, self._export_to_chrome, self._row_limit = emit_nvtx, export_to_chrome, row_limit
        self._record_module_names, self._table_kwargs = record_module_names, dict(table_kwargs or {})
        self._profiler_kwargs = profiler_kwargs
        self._schedule = profiler_kwargs.get("schedule")
        on_device = "cuda" if torch.cuda.is_available() else "cpu"
        activities = profiler_kwargs.get("activities")
        if activities and torch.profiler.ProfilerActivity.CUDA not in activities:
            on_device = "cpu"
        self._sort_by_key = sort_by_key or f"{on_device}_time_total"
        self.profiler: Any = None
        self.function_events: Any = None
        self._module: nn.Module | None = None
        self._open: dict[str, Any] = {}
        self._handles: list[Any] = []
        self._around = ExitStack()
        self._step_action = ""
        """The action of the step that ended last, by which a trace is named."""
        self._check()

    def _check(self) -> None:
        if self._sort_by_key not in self.AVAILABLE_SORT_KEYS:
            raise MisconfigurationException(
                f"PyTorchProfiler: Found sort_by_key: {self._sort_by_key}. Should be within"
                f" {sorted(self.AVAILABLE_SORT_KEYS)}.{did_you_mean(self._sort_by_key, self.AVAILABLE_SORT_KEYS)}"
            )
        from torch.autograd.profiler_util import EventList  # noqa: PLC0415  # only who profiles

        known = set(inspect.signature(EventList.table).parameters) - {"self", "sort_by", "row_limit"}
        for key in self._table_kwargs:
            if key not in known:
                raise KeyError(
                    f"PyTorchProfiler: Found invalid table_kwargs key: {key}. Should be within {sorted(known)}; sort_by and"
                    " row_limit are arguments of the profiler itself."
                )
        if self._schedule is not None:
            if not callable(self._schedule):
                raise MisconfigurationException(
                    f"PyTorchProfiler: Schedule should be a callable. Found: {self._schedule!r}"
                )
            action = self._schedule(0)
            if not isinstance(action, ProfilerAction):
                raise MisconfigurationException(
                    f"PyTorchProfiler: Schedule should return a `torch.profiler.ProfilerAction`. Found: {action!r}"
                )

    def attend(self, module: nn.Module) -> None:
        """Called by the Trainer with the module of a run."""
        self._module = module

    # ------------------------------------------------------------------ actions

    def start(self, action_name: str) -> None:
        """Begin to record an action; the first one of a run begins the recording."""
        if self.profiler is None:
            if not self._begins(action_name):
                return
            self._begin()
        if action_name not in self._open:
            # the prefix by which viewers know what is no operation
            recording: Any = record_function(f"[pl][profile]{action_name}")
            self._open[action_name] = recording
            recording.__enter__()

    def stop(self, action_name: str) -> None:
        """End the recording of an action, and the step that it may stand for."""
        if (recording := self._open.pop(action_name, None)) is not None:
            recording.__exit__(None, None, None)
        name = action_name.rpartition(".")[2]
        if name in self.STEP_FUNCTIONS:
            self._step_action = action_name
        if self.profiler is None or self._emit_nvtx:
            return
        if self._stage is None:
            counts = name in self.STEP_FUNCTIONS
        elif self._stage == "fit":
            counts = action_name == _BATCH
        else:
            counts = name == _STEP_OF.get(self._stage)
        if counts:
            self.profiler.step()

    def _begins(self, action: str) -> bool:
        """Whether the recording begins with this action: in a run with the first batch, when its length is known."""
        name = action.rpartition(".")[2]
        return self._module is None or action == _BATCH or name.endswith("_next") or name in self.STEP_FUNCTIONS

    def _begin(self) -> None:
        if self._emit_nvtx:
            self._around.enter_context(torch.cuda.profiler.profile())
            marks: Any = torch.autograd.profiler.emit_nvtx
            self.profiler = marks()
        else:
            known = inspect.signature(torch.profiler.profile.__init__).parameters
            arguments = {key: value for key, value in self._profiler_kwargs.items() if key in known}
            arguments["with_stack"] = bool(arguments.get("with_stack")) or self._flames
            arguments["schedule"] = self._schedule or self._default_schedule()
            arguments.setdefault("on_trace_ready", self._write_trace)
            self.profiler = torch.profiler.profile(**arguments)
        self.profiler.__enter__()
        if self._module is not None and self._record_module_names:
            for name, child in self._module.named_modules():
                if name:
                    self._record(f"[pl][module]{type(child).__module__}.{type(child).__name__}: {name}", child)

    def _record(self, name: str, child: nn.Module) -> None:
        open_now: list[Any] = []

        def enter(*_: Any) -> None:
            open_now.append(record_function(name))
            open_now[-1].__enter__()

        def leave(*_: Any) -> None:
            if open_now:
                open_now.pop().__exit__(None, None, None)

        self._handles += [
            child.register_forward_pre_hook(enter),
            child.register_forward_hook(leave, always_call=True),
        ]

    @property
    def _flames(self) -> bool:
        return bool(self._profiler_kwargs.get("export_to_flame_graph", False))

    def _default_schedule(self) -> Callable[[int], ProfilerAction] | None:
        """Record three steps after two; None, which records all, where there are not so many, or no Trainer."""
        steps = self._steps()
        if self._module is None or steps < _FEWEST:
            return None
        return torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1)

    def _steps(self) -> float:
        trainer: Any = getattr(self._module, "trainer", None) if self._module is not None else None
        if trainer is None:
            return 0
        if self._stage == "fit":
            epochs, most = trainer.max_epochs, trainer.max_steps
            steps = trainer.num_training_batches * (float("inf") if epochs in (None, -1) else epochs)
            return float(steps if most == -1 else min(steps, most))
        name = {"validate": "num_val_batches", "test": "num_test_batches"}.get(str(self._stage), "num_predict_batches")
        return float(sum(getattr(trainer, name)))

    def _write_trace(self, profiler: Any) -> None:
        if self.dirpath is None:
            rank_zero_warn(
                "The PyTorchProfiler failed to export trace as `dirpath` is None: give it a folder, or the Trainer a logger"
                " that has one."
            )
            return
        if self._export_to_chrome:
            worker = self.prepare_filename(action_name=self._step_action or None, extension="")
            torch.profiler.tensorboard_trace_handler(str(self.dirpath), worker)(profiler)
        if self._flames:
            name = self.prepare_filename(action_name=self._step_action or None, extension=".stack")
            Path(str(self.dirpath)).mkdir(parents=True, exist_ok=True)
            profiler.export_stacks(
                str(Path(str(self.dirpath)) / name), metric=self._profiler_kwargs.get("metric", "self_cpu_time_total")
            )

    # ------------------------------------------------------------------ the end

    def summary(self) -> str:
        """End the recording, and return the table of operations; empty for ``emit_nvtx``, or if nothing was recorded."""
        self._end()
        if not self.function_events:
            return ""
        averages = self.function_events.key_averages(self._group_by_input_shapes)
        key = self._sort_by_key
        if "cuda" in key and averages and not hasattr(averages[0], key):
            key = key.replace("cuda", "device")  # its name in newer versions of torch
        table = averages.table(sort_by=key, row_limit=self._row_limit, **self._table_kwargs)
        return f"{self.title}\nProfile stats for: records rank: {self.local_rank}\n{table}"

    def _end(self) -> None:
        for name in reversed(list(self._open)):
            self._open.pop(name).__exit__(None, None, None)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        profiler, self.profiler = self.profiler, None
        if profiler is not None:
            profiler.__exit__(None, None, None)
            if not self._emit_nvtx:
                recorded = profiler.profiler is not None
                self.function_events = profiler.events() if recorded else None
        self._around.close()

    def teardown(self, stage: str | None) -> None:
        """End the recording, and take the hooks off the module."""
        self._end()
        self._module = None

    def __getstate__(self) -> dict[str, Any]:
        gone: dict[str, Any] = {"profiler": None, "function_events": None, "_module": None, "_open": {}, "_handles": []}
        return {**vars(self), **gone, "_around": ExitStack()}
