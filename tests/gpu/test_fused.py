# SPDX-License-Identifier: Apache-2.0
"""Fused optimizers and the advisor on a GPU: the same but for rounding, under loss scaling too; memory in the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, Adagrad, Adam, AdamW
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.precision.mixed import MixedPrecision

KINDS: dict[str, Any] = {
    "adam": lambda p: Adam(p, 0.01),
    "adamw": lambda p: AdamW(p, 0.01, amsgrad=True),
    "momentum": lambda p: SGD(p, 0.05, momentum=0.9),
    "adagrad": lambda p: Adagrad(p, 0.05),
}


class Net(L.LightningModule):
    """Two layers; saves in the middle if it is told where."""

    def __init__(self, kind: str, saves: Path | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
        self.kind, self.saves = kind, saves

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> Any:
        return KINDS[self.kind](self.parameters())

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.saves is not None and self.global_step == 7:
            self.trainer.save_checkpoint(self.saves)

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        data = TensorDataset(torch.randn(80, 8, generator=generator), torch.randn(80, 1, generator=generator))
        return DataLoader(data, batch_size=4)


def trained(net: Net, ckpt_path: Path | None = None, **settings: Any) -> tuple[Tensor, L.Trainer]:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    run = L.Trainer(**{"max_epochs": 2, "accelerator": "cuda", "devices": 1, **quiet, **settings})
    run.fit(net, ckpt_path=ckpt_path)
    return torch.cat([p.detach().flatten() for p in net.parameters()]), run


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_but_for_rounding(kind: str) -> None:
    plain, _ = trained(Net(kind))
    fused, run = trained(Net(kind), fused_optimizers=True)
    if kind != "adagrad":  # not every version of torch has its kernel
        assert run.optimizers[0].param_groups[0]["fused"]
    torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_run_goes_on_exactly(kind: str, tmp_path: Path) -> None:
    whole, _ = trained(Net(kind, tmp_path / "seven.ckpt"), fused_optimizers=True)
    resumed, _ = trained(Net(kind), tmp_path / "seven.ckpt", fused_optimizers=True)
    assert torch.equal(resumed, whole)


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_scaling_and_clipping(kind: str, clip: float | None) -> None:
    def run(fused: bool) -> tuple[Tensor, L.Trainer]:
        plugin = MixedPrecision("16-mixed", "cuda", GradScaler("cuda", init_scale=2.0**26))
        return trained(Net(kind), plugins=plugin, gradient_clip_val=clip, fused_optimizers=fused)

    (plain, one), (fused, other) = run(False), run(True)
    assert one.global_step == other.global_step < 40, "the first steps overflow"
    torch.testing.assert_close(fused, plain, rtol=1e-2, atol=1e-3)


def test_advice_on_a_gpu() -> None:
    run = L.Trainer(max_epochs=50, accelerator="cuda", devices=1, logger=False, enable_checkpointing=False)
    net = Net("adam")
    advice = run.advise(net, seconds=0.3)
    rows = {row["candidate"]: row for row in advice.rows}
    assert rows["as it is"]["memory"] > 0
    assert rows["fused optimizers"]["ratio"] is not None
    assert rows["TF32"]["verdict"] != "not applicable" or "TF32" in rows["TF32"]["reason"]
    assert rows["CUDA graphs"]["reason"] != "needs CUDA"
    assert next(net.parameters()).device.type == "cpu"
