# SPDX-License-Identifier: Apache-2.0
"""Scripts as people run them: into a pipe that closes, in odd places, with the mistakes that everybody makes once."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

SCRIPT = """
import sys
import torch
import leyden as L
from torch.utils.data import DataLoader

class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        loss = self.net(batch).mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch, batch_idx):
        self.log("test", 1.0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

trainer = L.Trainer(accelerator="cpu", max_epochs=3, logger=False, enable_checkpointing=False)
loader = DataLoader(torch.ones(8, 2))
trainer.fit(Module(), loader)
results = trainer.test(dataloaders=loader)
sys.stderr.write(f"{results} after {trainer.global_step} steps")
sys.stderr.flush()
"""


def test_a_reader_that_has_gone_ends_no_run(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)], stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        timeout=60, check=False, env={**os.environ, "PYTHONPATH": os.path.abspath("src")},
    )  # fmt: skip
    os.close(write)
    assert "[{'test': 1.0}] after 24 steps" in done.stderr, done.stderr
