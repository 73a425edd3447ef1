# SPDX-License-Identifier: Apache-2.0
"""Snapshots of tensors on a GPU: of the moment of the call, in pinned host memory, with no memory of the GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import leyden as L
from leyden.callbacks import ModelCheckpoint
from leyden.checkpoint_io.staging import Staging


def test_what_the_gpu_does_next_does_not_show() -> None:
    staging = Staging()
    weights = [torch.zeros(5_000_000, device="cuda") for _ in range(4)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    addresses = []
    for turn in range(3):
        staging.begin()
        snapshot = staging.take({"weights": weights, "view": weights[0][10:20]})
        staging.end()
        for weight in weights:
            weight += 1  # queued before the copies are done
        built = snapshot.build()
        for weight in built["weights"]:
            assert weight.is_pinned()
            assert bool((weight == turn).all())
        assert built["view"].data_ptr() == built["weights"][0].data_ptr() + 40
        addresses.append(built["weights"][0].data_ptr())
    assert len(set(addresses)) == 1
    assert torch.cuda.max_memory_allocated() == before


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(1_000_000)) for _ in range(4))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return -torch.stack([weight.sum() for weight in self.weights]).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.zeros(30, 1))


def test_files_are_of_one_step_and_of_the_host(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, every_n_train_steps=7, save_top_k=-1, async_save=True, filename="{step}")
    L.Trainer(
        max_epochs=1, callbacks=callback, logger=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="gpu", devices=1,
    ).fit(Model())  # fmt: skip
    assert len(list(tmp_path.iterdir())) == 4
    for path in tmp_path.iterdir():
        content = torch.load(path, weights_only=True)
        for weight in content["state_dict"].values():
            assert weight.device.type == "cpu"
            assert bool((weight == content["global_step"]).all())
