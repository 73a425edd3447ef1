# SPDX-License-Identifier: Apache-2.0
"""What torch.profiler records of a run: steps of the schedule are batches, layers and actions have names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerAction
from torch.utils.data import DataLoader

import leyden as L
from leyden.errors import MisconfigurationException
from leyden.profilers import PyTorchProfiler, XLAProfiler

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore:.*profiler.*:UserWarning", "ignore:.*there is no validation data.*"
)


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.layer(batch)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def data(batches: int) -> Any:
    return DataLoader(torch.ones(batches, 4))


def trainer(profiler: Any, **arguments: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, profiler=profiler, **arguments,
    )  # fmt: skip


def names(folder: Path) -> list[str]:
    [trace] = folder.glob("*.pt.trace.json")
    return [str(event.get("name")) for event in json.loads(trace.read_text())["traceEvents"]]


def test_three_batches_of_a_fit_are_recorded_whatever_is_validated(tmp_path: Path) -> None:
    profiler = PyTorchProfiler(dirpath=tmp_path, filename="p")
    trainer(profiler, val_check_interval=1).fit(Net(), data(7), data(2))
    found = names(tmp_path)
    assert sum(name == "[pl][profile]run_training_batch" for name in found) == 3
    assert "[pl][module]torch.nn.modules.linear.Linear: layer" in found
    assert "[pl][profile][Strategy]SingleDeviceStrategy.backward" in found
    [trace] = tmp_path.glob("*.pt.trace.json")
    assert (
        trace.name.startswith("fit-p-0-[Strategy]SingleDeviceStrategy.training step") or "training_step" in trace.name
    )
    report = (tmp_path / "fit-p-0.txt").read_text()
    assert report.startswith("FIT Profiler Report")
    assert "aten::linear" in report


def test_a_short_run_is_recorded_as_a_whole(tmp_path: Path) -> None:
    profiler = PyTorchProfiler(dirpath=tmp_path, filename="p", record_module_names=False)
    trainer(profiler).test(Net(), data(2), verbose=False)
    found = names(tmp_path)
    assert sum(name.endswith(".test_step") for name in found) == 2
    assert not any(name.startswith("[pl][module]") for name in found)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`:UserWarning")
def test_a_schedule_of_ones_own_and_its_arguments(tmp_path: Path) -> None:
    steps: list[int] = []
    traces: list[int] = []

    def schedule(step: int) -> ProfilerAction:
        steps.append(step)
        return ProfilerAction.RECORD_AND_SAVE if step == 2 else ProfilerAction.NONE

    profiler = PyTorchProfiler(
        schedule=schedule, on_trace_ready=lambda each: traces.append(each.step_num), record_shapes=True,
        group_by_input_shapes=True, row_limit=3, sort_by_key="count", table_kwargs={"max_name_column_width": 80},
    )  # fmt: skip
    trainer(profiler).fit(Net(), data(5))
    assert sorted(set(steps)) == [0, 1, 2, 3, 4, 5]
    assert traces == [3]


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`:UserWarning")
def test_hooks_are_taken_off_the_module() -> None:
    net = Net()
    trainer(PyTorchProfiler(export_to_chrome=False)).fit(net, data(2))
    assert not net.layer._forward_hooks
    assert not net.layer._forward_pre_hooks


def test_outside_of_a_trainer() -> None:
    profiler = PyTorchProfiler(export_to_chrome=False)
    with profiler.profile("mine"):
        torch.ones(2) + 1
    assert "[pl][profile]mine" in profiler.summary()


def test_bad_arguments() -> None:
    with pytest.raises(MisconfigurationException, match="Found sort_by_key: cpu_tim. .*Did you mean 'cpu_time'"):
        PyTorchProfiler(sort_by_key="cpu_tim")
    with pytest.raises(KeyError, match="Found invalid table_kwargs key: row_limit"):
        PyTorchProfiler(table_kwargs={"row_limit": 3})
    with pytest.raises(MisconfigurationException, match="Schedule should be a callable"):
        PyTorchProfiler(schedule=3)
    with pytest.raises(MisconfigurationException, match="Schedule should return a `torch.profiler.ProfilerAction`"):
        PyTorchProfiler(schedule=lambda step: step)


def test_what_xla_needs_is_named() -> None:
    with pytest.raises(ModuleNotFoundError, match="torch_xla, which is not installed"):
        XLAProfiler()
    with pytest.raises(ModuleNotFoundError, match="torch_xla"):
        L.Trainer(profiler="xla")


@pytest.mark.parametrize("name", ["simple", "advanced", "pytorch"])
def test_a_profiler_by_its_name(name: str) -> None:
    assert type(L.Trainer(profiler=name, logger=False).profiler).__name__.lower().startswith(name)
