# SPDX-License-Identifier: Apache-2.0
"""A small data set moves to the GPU once in a run: batches are indexed there, nothing waits, and memory is given back."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

import leyden as L
from leyden.data import resident

N = 640


class Net(L.LightningModule):
    """A line through points."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = (self.layer(x) - y).pow(2).mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", (self.layer(x) - y).pow(2).mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def data() -> TensorDataset:
    x = torch.randn(N, 8, generator=torch.Generator().manual_seed(3))
    return TensorDataset(x, x.sum(1, keepdim=True))


def trainer(folder: Path, **arguments: Any) -> L.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(
        **{"accelerator": "cuda", "devices": 1, "max_epochs": 3, "default_root_dir": str(folder), **quiet, **arguments}
    )


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The tensors of data sets that were moved."""
    seen: list[Any] = []

    class Counted(resident.Copy):
        def __init__(self, source: torch.Tensor, device: torch.device) -> None:
            seen.append(source)
            super().__init__(source, device)

    monkeypatch.setattr(resident, "Copy", Counted)
    return seen


def weights(folder: Path, loader: Any, **arguments: Any) -> torch.Tensor:
    L.seed_everything(5, verbose=False)
    module = Net()
    trainer(folder, **arguments).fit(module, loader)
    return module.layer.weight.detach().cpu()


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("pin_memory", [False, True])
def test_weights_are_those_of_the_standard_way(
    tmp_path: Path, moved: list[Any], shuffle: bool, pin_memory: bool
) -> None:
    loader = DataLoader(data(), 33, shuffle=shuffle, pin_memory=pin_memory)
    fast = weights(tmp_path, loader)
    assert len(moved) == 2
    assert torch.equal(fast, weights(tmp_path, loader, fast_data=False))
    assert len(moved) == 2


def test_train_and_validation_share_what_they_are_subsets_of(tmp_path: Path, moved: list[Any]) -> None:
    base = data()
    train, val = DataLoader(Subset(base, range(500)), 16, shuffle=True), DataLoader(Subset(base, range(500, N)), 16)
    trainer(tmp_path).fit(Net(), train, val)
    assert [id(tensor) for tensor in moved] == [id(tensor) for tensor in base.tensors]


def test_no_batch_is_copied_and_no_step_waits_for_the_device(tmp_path: Path) -> None:
    """From the second epoch on: what waits is an error, and of all that goes to the device only indices are left."""

    class Strict(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 1 and batch_idx == 1:
                torch.cuda.set_sync_debug_mode("error")

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == N // 16 - 1:
                torch.cuda.set_sync_debug_mode("default")

    try:
        trainer(tmp_path, log_every_n_steps=10_000, callbacks=[Strict()]).fit(
            Net(), DataLoader(data(), 16, shuffle=True)
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("way", ["torch", "numpy"])
def test_changes_between_epochs_are_seen(tmp_path: Path, way: str) -> None:
    array = np.zeros((N, 8), dtype=np.float32)
    base = TensorDataset(torch.from_numpy(array), torch.zeros(N, 1))
    seen = []

    class Changing(L.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if way == "torch":
                base.tensors[0].fill_(trainer.current_epoch)
            else:
                array[:] = trainer.current_epoch

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append((trainer.current_epoch, batch[0].mean().item()))

    trainer(tmp_path, callbacks=[Changing()]).fit(Net(), DataLoader(base, 64))
    assert len(seen) == 30
    assert all(epoch == value for epoch, value in seen)


def test_a_hook_that_touches_batches_gets_them_from_the_host(tmp_path: Path, moved: list[Any]) -> None:
    places = set()

    class Hooked(Net):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            places.add(batch[0].device.type)
            return batch

    trainer(tmp_path).fit(Hooked(), DataLoader(data(), 64))
    assert places == {"cpu"}
    assert moved == []


def test_too_large_is_said_once(
    tmp_path: Path, moved: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(resident, "SHARE", 1e-12)
    with caplog.at_level(logging.INFO, logger="leyden"):
        trainer(tmp_path).fit(Net(), DataLoader(data(), 64), DataLoader(data(), 64))
    assert moved == []
    assert len([record for record in caplog.records if "batch by batch" in record.message]) == 1


def test_E1_memory_of_the_data_is_given_back(tmp_path: Path) -> None:
    large = TensorDataset(torch.zeros(N, 10_000), torch.zeros(N, 1))

    class Wide(Net):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(10_000, 1)

    def once() -> None:
        run, module = trainer(tmp_path, max_epochs=1), Wide()
        run.fit(module, DataLoader(large, 64), DataLoader(large, 64))
        assert torch.cuda.max_memory_allocated() > before + large.tensors[0].nbytes

    before = 0
    once()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gc.disable()
    try:
        once()
        assert torch.cuda.memory_allocated() == before
    finally:
        gc.enable()


def test_data_that_lies_on_the_device_already_is_read_there(tmp_path: Path, moved: list[Any]) -> None:
    there = TensorDataset(*(tensor.cuda() for tensor in data().tensors))
    L.seed_everything(5, verbose=False)
    wanted = weights(tmp_path, DataLoader(data(), 16, shuffle=True))
    moved.clear()
    assert torch.equal(wanted, weights(tmp_path, DataLoader(there, 16, shuffle=True)))
    assert moved == []
    assert torch.equal(wanted, weights(tmp_path, DataLoader(there, 16, shuffle=True), fast_data=False))
