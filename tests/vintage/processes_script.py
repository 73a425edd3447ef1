# SPDX-License-Identifier: Apache-2.0
"""A script of the end of 2019 that trains in two processes on the CPU; each says what it saw.

python processes_script.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import leyden as ptl


class CoolModel(ptl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.l1 = torch.nn.Linear(4, 2)
        self.seen: list[float] = []

    def training_step(self, batch: Any, batch_nb: int) -> Any:
        x, y = batch
        self.seen += x[:, 0].tolist()
        return {"loss": torch.nn.functional.cross_entropy(self.l1(x), y)}

    def validation_step(self, batch: Any, batch_nb: int) -> Any:
        x, y = batch
        return {"val_loss": torch.nn.functional.cross_entropy(self.l1(x), y)}

    def validation_end(self, outputs: Any) -> Any:
        return {"avg_val_loss": torch.stack([x["val_loss"] for x in outputs]).mean()}

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), lr=0.02)]

    @ptl.data_loader
    def tng_dataloader(self) -> Any:
        x = torch.arange(64.0).reshape(16, 4)
        return DataLoader(TensorDataset(x / 64, (x[:, 0] > 30).long()), batch_size=2)

    @ptl.data_loader
    def val_dataloader(self) -> Any:
        return self.tng_dataloader()


if __name__ == "__main__":
    folder, model = Path(sys.argv[1]), CoolModel()
    trainer = ptl.Trainer(
        max_nb_epochs=1, distributed_backend="ddp_cpu", num_processes=2, default_root_dir=folder, progress_bar=False,
        checkpoint_callback=False, logger=False, print_weights_summary=False,
    )  # fmt: skip
    assert trainer.fit(model) == 1
    (folder / f"{trainer.global_rank}.json").write_text(
        json.dumps({"weight": model.l1.weight.tolist(), "seen": model.seen, "size": trainer.world_size})
    )
