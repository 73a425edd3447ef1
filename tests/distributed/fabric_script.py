# SPDX-License-Identifier: Apache-2.0
"""A loop of one's own as users write it, for the tests that start it: by itself, or by torchrun.

    python fabric_script.py FOLDER MODE

Each rank writes what it saw to ``FOLDER/<rank>.json``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from leyden import Fabric
from ranks import data

FOLDER, MODE = Path(sys.argv[1]), sys.argv[2]
WHO = 0 if MODE.endswith("0") else 1
KIND = MODE.rstrip("01")


def act(fabric: Fabric, step: int) -> None:
    """Do on one rank what the mode says, in the fourth step."""
    if KIND == "wait":
        (FOLDER / f"pid{fabric.global_rank}").write_text(str(os.getpid()))
        time.sleep(0.05)
    if step != 3 or fabric.global_rank != WHO:
        return
    if KIND == "raise":
        raise ValueError(f"broken on rank {WHO}")
    if KIND == "exit":
        sys.exit(3)
    if KIND == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    print("above", flush=True)
    fabric = Fabric(accelerator="cpu", devices=2)
    fabric.launch()
    fabric.launch()
    fabric.seed_everything(1, verbose=False)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9))
    loader = fabric.setup_dataloaders(DataLoader(data(40), 4, shuffle=True))
    samples, step = [], 0
    for _ in range(1000 if KIND == "wait" else 2):
        for x, y, number in loader:
            samples += number.tolist()
            act(fabric, step)
            loss = (model(x) - y).square().mean()
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    if KIND == "uneven" and fabric.global_rank == 1:
        time.sleep(1.0)
    report = {
        "world": fabric.world_size, "rank": fabric.global_rank, "local_rank": fabric.local_rank, "samples": samples,
        "weight": model.state_dict()["0.weight"].tolist(), "pid": os.getpid(),
    }  # fmt: skip
    (FOLDER / f"{fabric.global_rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
