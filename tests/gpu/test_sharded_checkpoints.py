# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in shards of one process on one GPU, over NCCL: at once and behind the training, and a run that goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
import torch
from torch.utils.data import DataLoader, TensorDataset
import leyden as L
from leyden import files
from leyden.callbacks import ModelCheckpoint
from leyden.strategies.fsdp import FSDPStrategy

class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
        self.losses = []
    def training_step(self, batch, batch_idx):
        loss = (torch.dropout(self.layer(batch[0]), 0.1, True) - batch[1]).square().mean()
        self.losses.append(loss.detach())
        return loss
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01)

x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
loader = lambda: DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 8, shuffle=True)

def fit(folder, behind, ckpt_path=None):
    L.seed_everything(2 if ckpt_path is None else 9, verbose=False)
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1, async_save=behind)
    net = Net()
    trainer = L.Trainer(accelerator=sys.argv[1], devices=1, strategy=FSDPStrategy(state_dict_type="sharded"), max_epochs=2,
        logger=False, callbacks=[saving], enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(net, loader(), ckpt_path=ckpt_path)
    return torch.stack(net.losses).cpu(), {name: value.cpu() for name, value in net.state_dict().items()}

losses, weights = fit("now", False)
fit("behind", True)
for step in range(3, 16, 3):
    one, other = (files.load(f"{folder}/step={step}.ckpt") for folder in ("now", "behind"))
    assert all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items()), step
    moments = [content["optimizer_states"][0]["state"][0]["exp_avg"] for content in (one, other)]
    assert torch.equal(*moments), step
    assert moments[0].device.type == "cpu"
again, theirs = fit("again", False, "behind/step=6.ckpt")
assert torch.equal(again, losses[6:]), (again, losses)
assert all(torch.equal(value, theirs[name]) for name, value in weights.items())
print("exact")
"""


def test_f3_shards_of_a_gpu_are_those_of_the_step_and_the_run_goes_on(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script, "gpu"], capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "exact" in done.stdout
