# SPDX-License-Identifier: Apache-2.0
"""DistributedDataParallel over NCCL, with one process on one GPU: the numbers of one device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
import torch
from torch.utils.data import DataLoader, TensorDataset
import leyden as L

class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
    def training_step(self, batch, batch_idx):
        loss = (self.layer(batch[0]) - batch[1]).square().mean()
        self.log("loss", loss, on_epoch=True, on_step=True, sync_dist=True)
        return loss
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)

x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
found = []
for strategy in ("single_device", "ddp"):
    L.seed_everything(2, verbose=False)
    net = Net()
    trainer = L.Trainer(accelerator="gpu", devices=1, strategy=strategy, max_epochs=3, logger=False, sync_batchnorm=True,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=2)
    trainer.fit(net, DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 8, shuffle=True))
    assert net.layer[0].weight.device.type == "cpu"
    found.append([p.detach() for p in net.parameters()] + list(trainer.callback_metrics.values()))
assert torch.distributed.is_initialized()
assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found)), found
print("the same")
"""


def test_f1_one_process_over_nccl_gives_the_numbers_of_one_device(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "the same" in done.stdout
