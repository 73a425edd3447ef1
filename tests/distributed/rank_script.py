# SPDX-License-Identifier: Apache-2.0
"""A script as users write them, for the tests that start it: by itself, by torchrun, or as SLURM would.

    python rank_script.py FOLDER MODE

Each rank writes what it saw to ``FOLDER/<rank>.json``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

import leyden as L
from leyden.callbacks import ModelCheckpoint
from ranks import Judged, data, make_trainer

FOLDER, MODE = Path(sys.argv[1]), sys.argv[2]
WHO = 0 if MODE.endswith("0") else 1
KIND = MODE.rstrip("01")


class Data(torch.utils.data.Dataset[Any]):
    def __init__(self, count: int) -> None:
        self.samples = data(count)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        if KIND in ("dataset", "worker") and index == 24 + WHO:
            raise IndexError(f"broken on rank {WHO}")
        return self.samples[index]


class Module(Judged):
    """Does on one rank what the mode says, in the fifth batch."""

    def act(self, kind: str) -> None:
        if kind != KIND or self.global_rank != WHO:
            return
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "exit":
            sys.exit(3)
        if kind == "leave":
            os._exit(0)
        if kind == "memory":
            raise MemoryError(f"broken on rank {WHO}")
        raise ValueError(f"broken on rank {WHO}")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 4:
            for kind in ("step", "kill", "exit", "leave", "memory"):
                self.act(kind)
            if KIND == "term" and self.global_rank == WHO and self.global_step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
        if KIND in ("term", "wait"):
            (FOLDER / f"pid{self.global_rank}").write_text(str(os.getpid()))
            time.sleep(0.02)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if not self.trainer.sanity_checking:
            self.act("validation")

    def on_train_epoch_end(self) -> None:
        self.act("hook")

    def prepare_data(self) -> None:
        self.act("prepare")

    def setup(self, stage: str) -> None:
        self.act("setup")

    def configure_optimizers(self) -> Any:
        self.act("optimizers")
        return super().configure_optimizers()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.act("save")


class Callback(L.Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 4:
            pl_module.act("callback")


def main() -> None:
    lines = ["above"]
    if KIND == "early" and os.environ.get("RANK", "0") == str(WHO):
        raise ValueError(f"broken on rank {WHO}")
    L.seed_everything(1, verbose=False)
    module = Module()
    epochs = 1000 if KIND in ("term", "wait") else 2
    saves: dict[str, Any] = {"callbacks": [Callback()]}
    if KIND in ("term", "save"):
        saves = {"callbacks": [ModelCheckpoint(FOLDER, save_last=True)], "enable_checkpointing": True}
    trainer = make_trainer(2, max_epochs=epochs, default_root_dir=FOLDER, **saves)
    train, val = DataLoader(Data(40), 4, shuffle=True, num_workers=int(KIND == "worker")), DataLoader(data(9), 2)
    trainer.fit(module, train, val)
    lines.append("fit")
    steps = trainer.global_step
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, train, val)
    found = trainer.test(module, val, verbose=False)
    predicted = trainer.predict(module, val)
    assert predicted is not None
    lines.append("predict")
    alone = make_trainer(1).validate(module, val, verbose=False)
    (FOLDER / f"{trainer.global_rank}.json").write_text(
        json.dumps({
            "lines": lines, "steps": [steps, trainer.global_step], "world": trainer.world_size, "test": found,
            "predicted": [int(i) for batch in predicted for i in batch], "alone": alone, "pid": os.getpid(),
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "weight": module.layer[0].weight.tolist(), "local_rank": trainer.local_rank,
        })
    )  # fmt: skip


if __name__ == "__main__":
    main()
