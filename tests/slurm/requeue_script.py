# SPDX-License-Identifier: Apache-2.0
"""A training that knows nothing of SLURM: python requeue_script.py <folder> <pause in seconds> [<plain>]."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from slurm_model import Net
from torch.utils.data import DataLoader, TensorDataset

import leyden


def fit(folder: Path, pause: float, checkpoints: bool) -> leyden.Trainer:
    """Train for three epochs of 20 batches, two to an update."""
    leyden.seed_everything(1, verbose=False)
    model = Net(argparse.Namespace(lr=0.1, pause=pause, folder=folder))
    loader = DataLoader(TensorDataset(torch.randn(80, 4)), batch_size=4, shuffle=True, num_workers=1)
    trainer = leyden.Trainer(
        max_epochs=3, accumulate_grad_batches=2, default_root_dir=folder, accelerator="cpu", logger=False,
        enable_checkpointing=checkpoints, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, loader)
    return trainer


if __name__ == "__main__":
    folder, pause = Path(sys.argv[1]), float(sys.argv[2])
    with (folder / "starts").open("a") as starts:
        starts.write(f"{os.environ.get('SLURM_RESTART_COUNT', '0')}\n")
    trainer = fit(folder, pause, checkpoints=len(sys.argv) < 4)
    torch.save(trainer.lightning_module.state_dict(), folder / "weights.pt")
    print("steps", trainer.global_step)
