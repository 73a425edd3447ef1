# SPDX-License-Identifier: Apache-2.0
"""A run that saves asynchronously, for tests that kill it: ``python async_checkpoint_script.py FOLDER MOMENT``.

MOMENT is ``N:what``: in the N-th save, SIGKILL at the beginning of the write (``begin``), after so many bytes of the
temporary file (a number), after it is complete but not renamed (``rename``), or after that (``end``). ``sigterm`` sends
that signal at the beginning of the write, and takes its time.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import leyden as L
from leyden.callbacks import ModelCheckpoint
from leyden.checkpoint_io import TorchCheckpointIO

SIZE = 200_000


class Model(L.LightningModule):
    """Every weight equals the number of steps made: a file whose weights differ mixes steps."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(SIZE)) for _ in range(4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return -torch.stack([weight.sum() for weight in self.weights]).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.zeros(5, 1))


class Killed(TorchCheckpointIO):
    """Kills this process in the middle of a write."""

    def __init__(self, moment: str) -> None:
        number, self.what = moment.split(":")
        self.left = int(number)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.left -= 1
        if self.left == 0:
            self.arm()
        super().save_checkpoint(checkpoint, path, storage_options)
        if self.left == 0 and self.what != "sigterm":
            os.kill(os.getpid(), signal.SIGKILL)

    def arm(self) -> None:
        if self.what == "begin":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "sigterm":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1.0)
        if self.what == "rename":
            os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        if self.what.isdigit():
            save = torch.save

            def part(obj: Any, file: Any) -> None:
                save(obj, file)
                file.flush()
                os.truncate(file.fileno(), int(self.what))
                os.kill(os.getpid(), signal.SIGKILL)

            torch.save = part


def main(folder: Path, moment: str) -> None:
    """Train three epochs of five steps and save at each third step."""
    callback = ModelCheckpoint(folder, every_n_train_steps=3, save_last=True, async_save=True, filename="{step}")
    trainer = L.Trainer(
        max_epochs=3, callbacks=callback, logger=False, enable_progress_bar=False, enable_model_summary=False,
        plugins=[Killed(moment)], accelerator="cpu",
    )  # fmt: skip
    trainer.fit(Model(), ckpt_path="last" if folder.is_dir() else None)
    print(trainer.global_step)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
