# SPDX-License-Identifier: Apache-2.0
"""A script that torchrun starts, and starts anew where one of its processes dies, or a machine comes or goes.

    python elastic_script.py FOLDER DIES PACE

The rank ``DIES`` (-1: none) kills itself in the eighth update, the first time. Each rank notes the samples of each batch in
``FOLDER/seen-<pid>.jsonl``; rank 0 writes the weights to ``FOLDER/weights.json``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

import leyden as L
from leyden.callbacks import ModelCheckpoint
from ranks import Net, data, make_trainer

FOLDER, DIES, PACE = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])


class Module(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        trainer = self.trainer
        note = {
            "epoch": trainer.current_epoch, "step": trainer.global_step, "world": trainer.world_size,
            "rank": self.global_rank, "ids": batch[2].tolist(),
        }  # fmt: skip
        with (FOLDER / f"seen-{os.getpid()}.jsonl").open("a") as file:
            print(json.dumps(note), file=file)
        time.sleep(PACE)
        if trainer.global_step == 8 and self.global_rank == DIES and not (FOLDER / "died").exists():
            (FOLDER / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)


def main() -> None:
    L.seed_everything(1, verbose=False)
    module = Module()
    saving = ModelCheckpoint(FOLDER / "saved", every_n_train_steps=3, save_top_k=-1)
    trainer = make_trainer("auto", max_epochs=3, default_root_dir=FOLDER, callbacks=[saving], enable_checkpointing=True)
    trainer.fit(module, DataLoader(data(32), 4, shuffle=True))
    if trainer.is_global_zero:
        (FOLDER / "weights.json").write_text(json.dumps([p.tolist() for p in module.parameters()]))
    print(f"done on rank {trainer.global_rank} of {trainer.world_size}")


if __name__ == "__main__":
    main()
