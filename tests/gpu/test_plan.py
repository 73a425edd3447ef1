# SPDX-License-Identifier: Apache-2.0
"""A plan against the memory of a real GPU: the most that tensors took in a fit."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import leyden as L


class Net(L.LightningModule):
    """A small transformer, 50 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8000, 768)
        layer = (nn.TransformerEncoderLayer(768, 12, 3072, 0.0, batch_first=True) for _ in range(6))
        self.blocks = nn.ModuleList(layer)
        self.head = nn.Linear(768, 8000, bias=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = self.embed(batch[0])
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), batch[0].flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


@pytest.mark.parametrize("strategy", ["single", "ddp"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_measured_memory_is_that_of_the_plan(precision: Any, strategy: str) -> None:
    tokens = torch.randint(0, 8000, (64, 256))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    name = {"single": "single_device"}.get(strategy, strategy)
    trainer = L.Trainer(accelerator="gpu", devices=1, strategy=name, max_steps=6, precision=precision, **quiet)
    module = Net()
    plan = trainer.plan(module, devices=1 if strategy == "single" else 2, batch=[tokens[:8]])
    row = next(each for each in plan.rows if each["strategy"] == strategy)
    assert plan.memory == torch.cuda.get_device_properties(0).total_memory
    assert row["fits"]
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    trainer.fit(module, DataLoader(TensorDataset(tokens), 8))
    measured = torch.cuda.max_memory_allocated() - before
    # what a library takes for itself while it computes is in no plan
    assert measured == pytest.approx(row["total"], rel=0.15)
