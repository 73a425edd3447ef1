# SPDX-License-Identifier: Apache-2.0
"""What the tests of Ray train: the actors, whose processes are others, import it from here."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from ranks import Net


class Dies(Net):
    """Rank 1 is killed, once, in the middle of the second epoch; each start of rank 0 leaves a line."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_start(self) -> None:
        if self.global_rank == 0:
            with (self.folder / "starts").open("a") as file:
                file.write(f"{self.global_step}\n")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        mark = self.folder / "died"
        if self.global_rank == 1 and self.global_step == 6 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)


class Waits(Net):
    """Takes its time, and says when it has begun."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        (self.folder / f"waits{self.global_rank}").touch()
        time.sleep(0.02)
        return super().training_step(batch, batch_idx)
