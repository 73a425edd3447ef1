# SPDX-License-Identifier: Apache-2.0
"""fully_shard over NCCL, with one process on one GPU: the numbers of one device, in every way to shard."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.distributed.fsdp import MixedPrecisionPolicy
import leyden as L
from leyden.strategies import FSDPStrategy

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 8)
    def forward(self, x):
        return x + self.two(torch.relu(self.one(x)))

class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Linear(4, 8), nn.Linear(8, 1)
        self.blocks = nn.Sequential(Block(), Block())
        self.scale = nn.Parameter(torch.tensor(1.0))
    def loss(self, batch):
        return (self.leave(self.blocks(self.enter(batch[0]))) * self.scale - batch[1]).square().mean()
    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss, on_epoch=True, on_step=True, sync_dist=True)
        return loss
    def validation_step(self, batch, batch_idx):
        self.log("val", self.loss(batch))
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01, fused=FUSED)

how, precision, path = sys.argv[1], sys.argv[2], sys.argv[3]
FUSED = how == "fused"
ways = {
    "plain": {}, "fused": {}, "offload": {"cpu_offload": True}, "recomputed": {"activation_checkpointing_policy": {Block}},
    "grad op": {"sharding_strategy": "SHARD_GRAD_OP"}, "hybrid": {"sharding_strategy": "HYBRID_SHARD"},
    "16 bits": {"mixed_precision": MixedPrecisionPolicy(torch.bfloat16, torch.float32)},
}
x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
samples = TensorDataset(x, x.sum(1, keepdim=True))
found = []
for strategy in ("single_device", FSDPStrategy(auto_wrap_policy={Block}, **ways[how])):
    L.seed_everything(2, verbose=False)
    net = Net()
    trainer = L.Trainer(accelerator="gpu", devices=1, strategy=strategy, max_epochs=3, logger=False, precision=precision,
        gradient_clip_val=0.5, accumulate_grad_batches=2, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=2)
    trainer.fit(net, DataLoader(samples, 8, shuffle=True), DataLoader(samples, 8))
    assert net.enter.weight.device.type == "cpu" and type(net.enter.weight) is nn.Parameter
    for state in trainer.optimizers[0].state.values():
        assert state["exp_avg"].device.type == "cpu"
    trainer.save_checkpoint(path)
    state = torch.load(path, weights_only=True)
    assert all(value.device.type == "cpu" for value in state["state_dict"].values())
    trainer.fit_loop.max_epochs = 4
    trainer.fit(net, DataLoader(samples, 8, shuffle=True), DataLoader(samples, 8), ckpt_path=path)
    found.append([p.detach() for p in net.parameters()] + [torch.as_tensor(v).cpu() for v in trainer.callback_metrics.values()])
tolerance = 5e-2 if how == "16 bits" or precision != "32-true" else 1e-5
assert torch.distributed.is_initialized()
assert all(torch.allclose(a, b, atol=tolerance) for a, b in zip(*found)), found
print("the same")
"""
WAYS = ("plain", "fused", "offload", "recomputed", "grad op", "hybrid", "16 bits")


@pytest.mark.parametrize(
    ("how", "precision"), [(how, "32-true") for how in WAYS] + [("plain", "bf16-mixed"), ("plain", "16-mixed")]
)
def test_f1_a1_one_process_over_nccl_gives_the_numbers_of_one_device(tmp_path: Path, how: str, precision: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script, how, precision, tmp_path / "a.ckpt"],
        capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "the same" in done.stdout
