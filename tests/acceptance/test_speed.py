# SPDX-License-Identifier: Apache-2.0
"""What a step costs, by counting and not by the clock: H1, O2, O3 and O4 of PAINS.md."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import leyden
import leyden as L
from leyden.loggers import CSVLogger, TensorBoardLogger

SOURCE = str(Path(leyden.__file__).parent)


class Operations(TorchDispatchMode):
    """While it is entered, notes every operation of torch, and at which step of training it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.step = -1
        self.seen: list[tuple[int, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append((self.step, str(func)))
        return func(*args, **(kwargs or {}))


class Readers(TorchFunctionMode):
    """While it is entered, notes every call that brings a tensor to the host: on a CPU they leave no operation behind."""

    NAMES = ("item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__", "__index__", "__array__")

    def __init__(self, operations: Operations) -> None:
        super().__init__()
        self.operations = operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, values = getattr(func, "__name__", ""), [*args, *(kwargs or {}).values()]
        # a device that is an object is that of another tensor, not the host by name
        to_host = name == "to" and any(isinstance(value, str) and value == "cpu" for value in values)
        if name in self.NAMES or to_host:
            self.operations.seen.append((self.operations.step, f"host.{name}"))
        return func(*args, **(kwargs or {}))


WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")


def waits(operations: Operations) -> Counter[int]:
    """Return how often each step read a value back or brought a tensor to the host."""
    seen = [(step, name.split(".")) for step, name in operations.seen if step >= 0]
    return Counter(step for step, (space, name, *_) in seen if space == "host" or name in WAITS)


class Watched(L.LightningModule):
    """Five metrics, one on the bar; one optimizer and a schedule that steps with it."""

    def __init__(self, operations: Operations | None = None) -> None:
        super().__init__()
        self.net = nn.Linear(4, 2)
        self.operations = operations

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.operations is not None:
            self.operations.step = batch_idx

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output = self.net(batch)
        loss = output.pow(2).mean()
        self.log("loss", loss, prog_bar=True)
        self.log("mean", output.mean(), on_epoch=True)
        self.log("most", output.detach().max(), reduce_fx="max", on_step=False, on_epoch=True)
        self.log("number", 2.5)
        self.log_dict({"norm": self.net.weight.norm()})
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(module: L.LightningModule, batches: int, folder: Path, **arguments: Any) -> L.Trainer:
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        accelerator="cpu", devices=1, enable_model_summary=False, default_root_dir=folder, **{**options, **arguments}
    )
    trainer.fit(module, DataLoader(torch.randn(2 * batches, 4), batch_size=2))
    return trainer


@pytest.mark.parametrize("bar", [False, True])
def test_O2_nothing_is_read_back_off_the_log_boundaries(bar: bool, tmp_path: Path, capsys: Any) -> None:
    operations = Operations()
    batches = [torch.randn(2, 4) for _ in range(100)]
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, gradient_clip_val=0.5, log_every_n_steps=25,
        logger=CSVLogger(tmp_path), enable_checkpointing=False, enable_progress_bar=bar, enable_model_summary=False,
    )  # fmt: skip
    with operations, Readers(operations):
        trainer.fit(Watched(operations), DataLoader(batches, batch_size=None))
    assert trainer.global_step == 100
    assert {step for step, _ in operations.seen} >= set(range(100))
    read = waits(operations)
    # at each boundary the three metrics of a step that are tensors are read; a bar that is no terminal's shows them then
    assert set(read) == {24, 49, 74, 99}, read
    assert min(read.values()) >= 3


@pytest.mark.parametrize(
    "read", [torch.Tensor.item, torch.Tensor.cpu, torch.nonzero, float, lambda loss: loss.to("cpu")]
)
def test_O2_the_instrument_sees_a_module_that_waits(read: Any, tmp_path: Path) -> None:
    operations = Operations()

    class Waits(Watched):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            read(loss.detach())
            return loss

    with operations, Readers(operations):
        fit(Waits(operations), 10, tmp_path, log_every_n_steps=0)
    assert set(waits(operations)) >= set(range(9))


# --- H1 -------------------------------------------------------------------------------------------------------------


def costs_of(log: Callable[[L.LightningModule], None], folder: Path) -> tuple[int, list[str]]:
    """Return how many Python functions of ours one ``log`` calls after its first call, and the operations of torch."""
    found: list[tuple[int, list[str]]] = []

    class Logs(Watched):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            calls = [0]

            def note(frame: FrameType, event: str, argument: Any) -> None:
                if event == "call" and frame.f_code.co_filename.startswith(SOURCE):
                    calls[0] += 1

            operations = Operations()
            sys.setprofile(note)
            try:
                log(self)
            finally:
                sys.setprofile(None)
            counted = calls[0]
            with operations:
                log(self)
            found.append((counted, [name for _, name in operations.seen]))
            return self.net(batch).mean()

    fit(Logs(), 5, folder)
    assert found[1:] == found[1:2] * 4  # the third and fourth cost what the second did
    return found[-1]


VALUE = torch.tensor(1.5)


def test_H1_a_number_in_host_memory_costs_nothing_of_torch(tmp_path: Path) -> None:
    for value in (VALUE, torch.tensor(1.5, requires_grad=True)):
        calls, operations = costs_of(lambda module, value=value: module.log("loss", value), tmp_path)
        assert calls <= 4
        assert operations == []


def test_H1_any_other_tensor_costs_one_copy_and_one_view_where_it_has_a_graph(tmp_path: Path) -> None:
    value = VALUE.double()
    calls, operations = costs_of(lambda module: module.log("loss", value), tmp_path)
    assert calls <= 4
    assert operations == ["aten.clone.default"]  # the caller may go on with its tensor
    value.requires_grad_()
    calls, operations = costs_of(lambda module: module.log("loss", value), tmp_path)
    assert calls <= 4
    assert operations == ["aten.detach.default", "aten.clone.default"]


def test_H1_a_mean_over_the_epoch_accumulates_and_a_number_costs_nothing_of_torch(tmp_path: Path) -> None:
    def log(module: L.LightningModule) -> None:
        module.log("loss", VALUE, on_step=False, on_epoch=True, batch_size=2)

    calls, operations = costs_of(log, tmp_path)
    assert calls <= 6
    assert operations == ["aten.mul.Tensor", "aten.add.Tensor"]  # weighted, and added up
    assert costs_of(lambda module: module.log("loss", 1.5), tmp_path)[1] == []


# --- O3 -------------------------------------------------------------------------------------------------------------


def calls_per_batch(folder: Path, **arguments: Any) -> float:
    """Return how many Python functions of ours one more batch calls."""
    totals = []
    for batches in (10, 60):
        calls = [0]

        def note(frame: FrameType, event: str, argument: Any, calls: list[int] = calls) -> None:
            if event == "call" and frame.f_code.co_filename.startswith(SOURCE):
                calls[0] += 1

        sys.setprofile(note)
        try:
            fit(Quiet(), batches, folder, **arguments)
        finally:
            sys.setprofile(None)
        totals.append(calls[0])
    return (totals[1] - totals[0]) / 50


class Quiet(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Silent(L.Callback):
    """Writes one hook, and none of those that a batch has."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        pass


class Speaks(L.Callback):
    """Writes a hook of each batch; its own call is not counted, it is not ours."""

    def on_train_batch_end(self, *args: Any) -> None:
        pass


def test_O3_hooks_that_nobody_wrote_cost_nothing(tmp_path: Path) -> None:
    calls_per_batch(tmp_path)  # what is done only once in a process
    bare = calls_per_batch(tmp_path)
    assert 0 < bare <= 40
    assert calls_per_batch(tmp_path, callbacks=[Silent() for _ in range(20)]) == bare
    # one that is written costs the detached outputs that all share, and nothing of ours for each further callback
    one, twenty = (calls_per_batch(tmp_path, callbacks=[Speaks() for _ in range(n)]) for n in (1, 20))
    assert bare <= one == twenty


# --- O4 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logger", ["none", "csv", "tensorboard"])
def test_O4_epoch_1000_costs_what_epoch_10_cost(logger: str, tmp_path: Path) -> None:
    """Calls of any Python function and operations of torch in the main thread, epoch by epoch."""
    watched = {10: [0, 0], 11: [0, 0], 999: [0, 0], 1000: [0, 0]}
    operations = Operations()

    class Epochs(Watched):
        def on_train_epoch_start(self) -> None:
            counts = watched.get(self.current_epoch + 1)
            if counts is None:
                return

            def note(frame: FrameType, event: str, argument: Any) -> None:
                counts[0] += event in ("call", "c_call")

            operations.seen.clear()
            operations.__enter__()  # type: ignore[no-untyped-call]
            sys.setprofile(note)

        def on_train_epoch_end(self) -> None:
            counts = watched.get(self.current_epoch + 1)
            if counts is not None:
                sys.setprofile(None)
                operations.__exit__(None, None, None)
                counts[1] = len(operations.seen)

    made: Any = {"none": False, "csv": CSVLogger(tmp_path), "tensorboard": TensorBoardLogger(tmp_path)}[logger]
    batches = [torch.randn(2, 4) for _ in range(2)]
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=1000, log_every_n_steps=1, logger=made, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Epochs(), DataLoader(batches, batch_size=None))
    early, late = [watched[epoch] for epoch in (10, 11)], [watched[epoch] for epoch in (999, 1000)]
    assert early[0][0] > 100
    assert early[0][1] > 10
    assert [counts[1] for counts in early + late] == [early[0][1]] * 4
    # a queue that is full at one moment and not at another makes a difference of a few calls
    assert abs(late[0][0] - early[0][0]) <= 0.05 * early[0][0], watched
    assert abs(late[1][0] - early[1][0]) <= 0.05 * early[1][0], watched
