# SPDX-License-Identifier: Apache-2.0
"""Scripts as people run them: into a pipe that closes, in odd places, with the mistakes that everybody makes once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import leyden as L

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "max_epochs": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(2, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


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


class Lost:
    """A loader whose workers have ended, as spawned ones do when Ctrl-C is pressed."""

    def __init__(self, press: bool) -> None:
        self.press = press

    def __iter__(self) -> Iterator[Tensor]:
        yield torch.ones(1, 2)
        if self.press:
            os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("DataLoader worker (pid(s) 4711) exited unexpectedly")


def test_ctrl_c_that_ends_the_workers_first_is_still_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[BaseException] = []
    callback = L.Callback()
    callback.on_exception = lambda trainer, module, error: seen.append(error)  # type: ignore[method-assign]
    trainer = L.Trainer(**QUIET, callbacks=callback)
    trainer.fit(Module(), Lost(press=True))
    assert trainer.interrupted
    assert [type(error) for error in seen] == [KeyboardInterrupt]
    assert "Press Ctrl-C again to stop at once" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="4711"):
        L.Trainer(**QUIET).fit(Module(), Lost(press=False))


def test_ctrl_c_during_preparation_trains_nothing() -> None:
    class Slow(Module):
        def prepare_data(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    trainer = L.Trainer(**QUIET)
    trainer.fit(Slow(), [torch.ones(1, 2)])
    assert trainer.interrupted
    assert trainer.global_step == 0
