# SPDX-License-Identifier: Apache-2.0
"""``leyden verify-resume`` answers scripts that import Lightning's names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import torch
import lightning.pytorch as pl


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


pl.seed_everything({seed})
data = torch.utils.data.TensorDataset(torch.randn(40, 2))
pl.Trainer(max_epochs=2, accelerator="cpu").fit(Net(), torch.utils.data.DataLoader(data, batch_size=2, shuffle=True))
"""


def verify(tmp_path: Path, seed: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(seed=seed))
    command = [sys.executable, "-m", "leyden", "verify-resume", "--steps", "4", str(script)]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)


def test_a_script_with_lightnings_names_is_verified(tmp_path: Path) -> None:
    done = verify(tmp_path, "7")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "exact" in done.stdout


@pytest.mark.slow
def test_one_that_is_seeded_by_the_clock_is_found_out(tmp_path: Path) -> None:
    done = verify(tmp_path, "__import__('time').time_ns() % 2**32")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "without a seed" in done.stdout
