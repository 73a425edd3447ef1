# SPDX-License-Identifier: Apache-2.0
"""``leyden advise``: the first fit of a script is measured in its place, the rest of it does not run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import leyden as L
from leyden import cli
from leyden.cli import advise

SCRIPT = """
import sys
import {name} as pl
import torch
from torch.utils.data import DataLoader, TensorDataset


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        loss = self.net(batch[0]).square().mean()
        self.log("loss", loss)
        self.logger.experiment.add_scalar("mine", 1.0, batch_idx)
        return loss

    def configure_optimizers(self):
        {before}
        return torch.optim.Adam(self.parameters())


if __name__ == "__main__":
    print("arguments", sys.argv[1:], __file__)
    trainer = pl.Trainer(max_epochs=100, accelerator="cpu", callbacks=[pl.callbacks.ModelCheckpoint()])
    try:
        {fit}
    except BaseException as error:
        print("caught", error)
    print("after")
"""
FIT = "trainer.fit(Net(), DataLoader(TensorDataset(torch.ones(64, 8)), batch_size=4))"


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Run a script in this process, as the process does that the command starts; return its exit status."""

    class Left(BaseException):
        pass

    def leave(status: int) -> None:
        raise Left(status)

    def run(fit: str = FIT, before: str = "pass", seconds: str = "0.01", name: str = "leyden") -> int:
        script = tmp_path / "train.py"
        # what the script catches it cannot catch where the process has ended
        text = SCRIPT.format(name=name, fit=fit, before=before).replace("except BaseException", "except Exception")
        script.write_text(text)
        with pytest.raises(Left) as left:
            advise.child(seconds, str(tmp_path / "found.json"), str(script), "--lr", "3")
        return int(left.value.args[0])

    monkeypatch.setattr(advise, "_leave", leave)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # compiling takes long
    torch.set_num_threads(1)
    monkeypatch.setattr(L.Trainer, "fit", L.Trainer.fit)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    return run


def test_the_fit_of_a_script_is_measured_and_the_rest_does_not_run(
    child: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    original = L.Trainer.fit
    assert child() == 0
    printed = capsys.readouterr().out
    assert f"arguments ['--lr', '3'] {tmp_path / 'train.py'}\n" in printed
    assert "fused optimizers" in printed
    assert "after" not in printed
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["candidate"] for row in found["rows"]][:3] == ["as it is", "compile", "fused optimizers"]
    assert found["interrupted"] is False
    assert L.Trainer.fit is original
    assert {path.name for path in tmp_path.iterdir()} <= {"train.py", "found.json", "__pycache__"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"fit": "pass"}, "ended without calling Trainer.fit"),
        ({"seconds": "-1"}, "leyden advise: advise(seconds=-1.0) is not valid"),
        ({"fit": "trainer.fit(torch.nn.Linear(1, 1))"}, "TypeError: The model must be a `LightningModule`"),
        ({"before": "raise ValueError('mine')"}, "ValueError: mine"),
    ],
)
def test_what_could_not_be_measured(
    child: Any, settings: dict[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert child(**settings) == 2
    assert said in capsys.readouterr().err


def test_a_call_that_fit_does_not_take_is_the_scripts_own_mistake(
    child: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert child("trainer.fit(Net(), train_loader=[])") == 2
    captured = capsys.readouterr()
    assert "caught got an unexpected keyword argument 'train_loader'" in captured.out


def test_no_such_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["advise", "nowhere.py"]) == 2
    assert capsys.readouterr().err == "leyden advise: there is no script 'nowhere.py'.\n"


def test_the_command_answers_lightnings_names(tmp_path: Path) -> None:
    interrupt = "import os, signal; sys.stdout.flush(); os.kill(os.getpid(), signal.SIGINT) if len(STARTS) == 5 else 0"
    script = SCRIPT.format(name="pytorch_lightning", fit=FIT, before=f"STARTS.append(1); {interrupt}")
    (tmp_path / "train.py").write_text(script.replace("class Net", "STARTS = []\n\n\nclass Net"))
    done = subprocess.run(
        [sys.executable, "-m", "leyden", "advise", "--seconds", "0.01", "--json", "found.json", "train.py", "-x"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100,
        env={**os.environ, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "arguments ['-x'] " in done.stdout
    assert "Interrupted: the rest was not measured." in done.stdout, "Ctrl-C ends it with the table so far"
    assert "caught" not in done.stdout
    assert "after" not in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["interrupted"] is True
    assert {path.name for path in tmp_path.iterdir()} == {"train.py", "found.json"}
