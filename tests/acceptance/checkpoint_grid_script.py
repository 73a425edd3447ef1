# SPDX-License-Identifier: Apache-2.0
"""Which files ModelCheckpoint leaves, over a grid of its settings, under Leyden or under Lightning.

    python checkpoint_grid_script.py lightning.pytorch OUT.json       # with Lightning 2.6.6 installed

``recorded/lightning-2.6.6-checkpoint-grid.json`` holds what Lightning leaves and, where Leyden differs on purpose, what
it leaves, and why. The test compares.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

LOSSES = [0.9, 0.5, 0.7, 0.3, 0.6, 0.2, 0.8, 0.1, 0.4, 0.35]
RANKED = [
    (None, 1),
    (None, 0),
    (None, -1),
    ("val", 1),
    ("val", 2),
    ("val", -1),
    ("val", 0),
    ("loss", 2),
    ("epoch_loss", 2),
]
DUE: list[dict[str, int]] = [{}, {"every_n_train_steps": 3}, {"every_n_train_steps": 4}, {"every_n_epochs": 2}]
VALIDATES = [(1.0, 1), (0.5, 1), (2, 1), (1.0, 2), None]


def cases(count: int) -> list[dict[str, Any]]:
    """Return ``count`` of all combinations, always the same."""
    grid = itertools.product(
        RANKED, (None, True, "link"), DUE, VALIDATES, (None, True, False), (1, 3), (None, "max_steps", "exception")
    )
    found = [
        {"monitor": monitor, "save_top_k": k, "save_last": last, "due": due, "validates": validates,
         "save_on_train_epoch_end": at_end, "accumulate": accumulate, "ends": ends}
        for (monitor, k), last, due, validates, at_end, accumulate, ends in grid
        if validates is not None or monitor != "val"
    ]  # fmt: skip
    random.Random(0).shuffle(found)
    return found[:count]


def run(framework: str, case: dict[str, Any], folder: str) -> dict[str, Any]:
    """Train three epochs of four batches; return the files (their step, and whether they are links) and the books."""
    L: Any = importlib.import_module(framework)
    losses = iter(LOSSES * 9)

    class Model(L.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net, self.batches, self.validations = torch.nn.Linear(1, 1), 0, 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if case["ends"] == "exception" and self.batches == 9:
                raise ZeroDivisionError
            self.log("loss", LOSSES[self.batches % 10])
            if case["monitor"] == "epoch_loss":
                self.log("epoch_loss", next(losses), on_step=False, on_epoch=True)
            self.batches += 1
            return self.net(batch).sum()

        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

        def on_validation_epoch_end(self) -> None:
            self.log("val", LOSSES[self.validations % 10])
            self.validations += 1

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    interval, every = case["validates"] or (1.0, 1)
    callback = importlib.import_module(f"{framework}.callbacks").ModelCheckpoint(
        folder, monitor=case["monitor"], save_top_k=case["save_top_k"], save_last=case["save_last"], **case["due"],
        save_on_train_epoch_end=case["save_on_train_epoch_end"],
    )  # fmt: skip
    trainer = L.Trainer(
        max_epochs=3, max_steps=5 if case["ends"] == "max_steps" else -1, callbacks=[callback], logger=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", val_check_interval=interval,
        check_val_every_n_epoch=every, accumulate_grad_batches=case["accumulate"], num_sanity_val_steps=0,
    )  # fmt: skip
    error = ""
    try:
        trainer.fit(Model(), DataLoader(torch.ones(4, 1)), DataLoader(torch.ones(1, 1)) if case["validates"] else None)
    except Exception as exception:
        error = type(exception).__name__

    def name(path: str) -> str:
        return os.path.basename(path)

    return {
        "files": {path.name: [_step(path), path.is_symlink()] for path in sorted(Path(folder).glob("*.ckpt"))},
        "best": name(callback.best_model_path),
        "last": name(callback.last_model_path),
        "k": {name(path): round(float(score), 4) for path, score in callback.best_k_models.items()},
        "error": error,
    }


def _step(path: Path) -> Any:
    return torch.load(path, weights_only=False)["global_step"] if path.exists() else "nothing"


def main(framework: str, out: str, count: str = "150") -> None:
    """Run all cases and write what they leave."""
    results = []
    for case in cases(int(count)):
        with tempfile.TemporaryDirectory() as folder:
            results.append({"case": case, "result": run(framework, case, f"{folder}/c")})
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
