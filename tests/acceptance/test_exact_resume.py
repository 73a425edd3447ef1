# SPDX-License-Identifier: Apache-2.0
"""A run that goes on from any checkpoint is, from there, the run that was never interrupted: bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import leyden as L


class Numbered(Dataset):
    """Samples that know their index, so that the order in which they come can be compared."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        return index, torch.sin(torch.arange(4.0) + index)


class Recording(L.LightningModule):
    """Writes down everything that a run does: samples, losses, learning rates, validations."""

    def __init__(self, plateau: str | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 1))
        self.events: list[Any] = []
        self.plateau = plateau

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        index, x = batch
        loss = (self.net(x) ** 2).mean()
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.events.append(("train", self.current_epoch, batch_idx, index.tolist(), loss.item(), rate))
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        if batch_idx == 1:
            self.log("once", loss, on_step=False, on_epoch=True, reduce_fx="max")
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        index, x = batch
        loss = (self.net(x) ** 2).mean()
        self.events.append(("val", batch_idx, index.tolist(), loss.item()))
        self.log("val_loss", loss)
        self.log("val_step", loss, on_step=True, on_epoch=False)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        if self.plateau:
            scheduler: Any = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, mode="max")
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "interval": self.plateau, "monitor": "loss"},
            }
        total = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (total + 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class SaveEverywhere(L.Callback):
    """Saves at every moment at which a callback can, and remembers how much had happened by then."""

    order: ClassVar[int] = 100

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved: dict[str, tuple[int, int]] = {}

    def save(self, trainer: Any, pl_module: Any, moment: str) -> None:
        path = self.folder / f"{len(self.saved):03d}-{moment}.ckpt"
        trainer.save_checkpoint(path)
        self.saved[str(path)] = (len(pl_module.events), len(list(trainer.history)))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.save(trainer, pl_module, "batch_end")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.save(trainer, pl_module, "validation_end")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.save(trainer, pl_module, "epoch_end")


class Watch(L.Callback):
    """Notes what a callback would decide on: the metrics at each batch."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        known = {name: value.item() for name, value in trainer.callback_metrics.items()}
        pl_module.events.append(("known", known, dict(trainer.progress_bar_metrics), trainer.global_step))


def _run(model: L.LightningModule, callbacks: list[Any], path: str | None = None, **kwargs: Any) -> L.Trainer:
    options = {"max_epochs": 3, "accumulate_grad_batches": 3, "val_check_interval": 4, "log_every_n_steps": 1}
    trainer = L.Trainer(
        **{**options, **kwargs}, callbacks=callbacks, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    train = DataLoader(Numbered(22), batch_size=2, shuffle=True)
    trainer.fit(model, train, DataLoader(Numbered(6), batch_size=2), ckpt_path=path)
    return trainer


@pytest.mark.filterwarnings("ignore:Metric `SpearmanCorrcoef` will save all targets")
def test_R1_metric_objects_go_on_with_what_they_have_counted(tmp_path: Path) -> None:
    torchmetrics = pytest.importorskip("torchmetrics")

    class Measured(Recording):
        def __init__(self) -> None:
            super().__init__()
            self.mean = torchmetrics.MeanMetric()
            self.rank = torchmetrics.SpearmanCorrCoef()  # keeps all it has seen, in lists

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            self.mean(loss)
            self.log("mean", self.mean, on_step=True, on_epoch=True)
            self.rank.update(torch.rand(2), torch.rand(2))
            self.log("rank", self.rank, on_step=False, on_epoch=True)
            return loss

    torch.manual_seed(7)
    model, saver = Measured(), SaveEverywhere(tmp_path)
    whole = _run(model, [Watch(), saver], max_epochs=2)
    rows = [dict(row) for row in whole.history]
    assert {"mean_step", "mean_epoch", "rank"} <= {name for row in rows for name in row}
    for path, (events, written) in saver.saved.items():
        again = Measured()
        resumed = _run(again, [Watch()], path, max_epochs=2)
        assert again.events == model.events[events:], path
        assert [dict(row) for row in resumed.history] == rows[written:], path


@pytest.mark.parametrize(
    ("plateau", "options"),
    [
        (None, {}),
        (None, {"val_check_interval": 0.5, "accumulate_grad_batches": 1, "limit_train_batches": 7}),
        (None, {"val_check_interval": "2 steps", "max_steps": 9}),
        (None, {"reload_dataloaders_every_n_epochs": 2}),
        ("step", {"accumulate_grad_batches": 2}),
        ("epoch", {"val_check_interval": 1.0}),
        (None, {"val_check_interval": 5, "check_val_every_n_epoch": None}),
    ],
)
def test_R1_a_resumed_run_is_the_uninterrupted_run(tmp_path: Path, plateau: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(7)
    model, saver = Recording(plateau), SaveEverywhere(tmp_path)
    whole = _run(model, [Watch(), saver], **options)
    rows = [dict(row) for row in whole.history]
    assert len(saver.saved) > 15
    for path, (events, written) in saver.saved.items():
        torch.manual_seed(99)
        again = Recording(plateau)
        resumed = _run(again, [Watch()], path, **options)
        assert again.events == model.events[events:], path
        assert [dict(row) for row in resumed.history] == rows[written:], path
        for name, value in model.state_dict().items():
            assert torch.equal(value, again.state_dict()[name]), path
        assert resumed.global_step == whole.global_step
        assert resumed.progress == whole.progress
        assert {k: v.item() for k, v in resumed.callback_metrics.items()} == {
            k: v.item() for k, v in whole.callback_metrics.items()
        }
