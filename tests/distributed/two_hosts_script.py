# SPDX-License-Identifier: Apache-2.0
"""A script for two machines, one process on each: python two_hosts_script.py FOLDER NAME PAUSE. It goes on by itself."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

import leyden as L
from leyden.callbacks import ModelCheckpoint
from leyden.strategies import DDPStrategy
from ranks import Net, data, make_trainer

FOLDER, NAME, PAUSE = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])


class Module(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(PAUSE)
        return super().training_step(batch, batch_idx)


def main() -> None:
    L.seed_everything(1, verbose=False)
    module = Module()
    # shorter than the time-outs of the system's network, as on a cluster where waiting costs
    strategy = DDPStrategy(timeout=timedelta(seconds=12), hang_timeout=timedelta(seconds=4))
    saving = ModelCheckpoint(FOLDER / NAME, every_n_train_steps=5, save_last=True, filename="{step}")
    trainer = make_trainer(
        1, num_nodes=2, strategy=strategy, max_epochs=3, callbacks=[saving], enable_checkpointing=True
    )
    last = FOLDER / NAME / "last.ckpt"
    trainer.fit(module, DataLoader(data(96), 4, shuffle=True), ckpt_path=last if last.exists() else None)
    torch.save(module.state_dict(), FOLDER / f"{NAME}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main()
