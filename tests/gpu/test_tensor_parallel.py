# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism over NCCL, with one process on one GPU: the numbers of one device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset
import leyden as L
from leyden.strategies import ModelParallelStrategy, TensorParallelStrategy

class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(16, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(inplace=True), nn.Linear(32, 8))
        self.head = nn.Linear(8, 16)
    def training_step(self, batch, batch_idx):
        x = self.net(self.block(self.words(batch[0])))
        loss = nn.functional.cross_entropy(self.head(x).flatten(0, 1), batch[0].flatten())
        self.log("loss", loss, on_epoch=True, on_step=True, sync_dist=True)
        return loss
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

class Own(Net):
    def configure_model(self):
        mesh, self.net[1] = self.device_mesh, nn.ReLU()  # torch's ColwiseParallel gives a view
        parallelize_module(self.net, mesh["tensor_parallel"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(self.net, mesh=mesh["data_parallel"])

x = torch.randint(0, 16, (32, 6), generator=torch.Generator().manual_seed(1))
found = {}
for name, strategy, kind, precision in [
    ("one", "single_device", Net, None), ("tensor", "tensor_parallel", Net, None),
    ("plan", TensorParallelStrategy({"net.0": "colwise", "net.2": "rowwise"}), Net, None),
    ("own", ModelParallelStrategy(), Own, None),
    ("one half", "single_device", Net, "bf16-mixed"), ("tensor half", "tensor_parallel", Net, "bf16-mixed"),
]:
    L.seed_everything(2, verbose=False)
    net = kind()
    trainer = L.Trainer(accelerator="gpu", devices=1, strategy=strategy, max_epochs=2, logger=False, precision=precision,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=0.5)
    trainer.fit(net, DataLoader(TensorDataset(x), 8, shuffle=True))
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in net.parameters()]
    found[name] = [p.detach().cpu() for p in whole] + [v.cpu() for v in trainer.callback_metrics.values()]
    if name in ("tensor", "plan"):
        assert net.head.weight.device.type == "cpu" and type(net.head.weight) is nn.Parameter
        assert trainer.strategy.plan["net.0"] == "colwise", trainer.strategy.plan
assert torch.distributed.is_initialized()
for name in ("tensor", "plan", "own"):
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found["one"], found[name])), name
assert all(torch.allclose(a, b, atol=1e-2) for a, b in zip(found["one half"], found["tensor half"]))
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
