# SPDX-License-Identifier: Apache-2.0
"""``leyden plan``: the first fit of a script is planned in its place, the rest of it does not run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import leyden as L
from leyden import cli
from leyden.cli import plan

SCRIPT = """
import sys
import {name} as pl
import torch
from torch.utils.data import DataLoader, TensorDataset


class Data(pl.LightningDataModule):
    def prepare_data(self):
        self.prepared = True

    def setup(self, stage):
        assert self.prepared and stage == "fit"

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(64, 8)), batch_size=4, shuffle=True)


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        assert tuple(batch[0].shape) == (4, 8)
        self.log("loss", 1.0)
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


if __name__ == "__main__":
    print("arguments", sys.argv[1:])
    trainer = pl.Trainer(max_epochs=100, accelerator="cpu")
    trainer.fit({fit})
    print("after")
"""
FITS = {
    "loader": "Net(), Data.train_dataloader(None)",
    "data module": "Net(), datamodule=Data()",
    "data module in the place of loaders": "Net(), Data()",
}


@pytest.mark.parametrize("given", FITS)
def test_the_fit_of_a_script_is_planned_with_its_first_batch(
    given: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    class Left(BaseException):
        pass

    def leave(status: int) -> None:
        raise Left(status)

    monkeypatch.setattr(plan, "_leave", leave)
    monkeypatch.setattr(L.Trainer, "fit", L.Trainer.fit)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    script, target = tmp_path / "train.py", tmp_path / "found.json"
    script.write_text(SCRIPT.format(name="leyden", fit=FITS[given]))
    wanted = json.dumps({"devices": 2, "nodes": 1, "memory": "1GB"})
    with pytest.raises(Left) as left:
        plan.child(wanted, str(target), str(script), "--lr", "3")
    assert left.value.args == (0,)
    printed = capsys.readouterr().out
    assert "arguments ['--lr', '3']" in printed
    assert "Take ddp: it needs " in printed
    assert "after" not in printed
    found = json.loads(target.read_text())
    assert [row["strategy"] for row in found["rows"]][:3] == ["single", "ddp", "fsdp"]
    assert found["recommended"] == "ddp"
    assert found["memory"] == 10**9
    assert all(row["activations"] > 0 for row in found["rows"])


def test_the_command_answers_lightnings_names(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT.format(name="pytorch_lightning", fit=FITS["loader"]))
    done = subprocess.run(
        [sys.executable, "-m", "leyden", "plan", "--devices", "4", "--memory", "1GB", "train.py", "-x"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "arguments ['-x']" in done.stdout
    assert "    Trainer(strategy='ddp', devices=4)" in done.stdout
    assert "after" not in done.stdout


def test_what_cannot_be_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "nowhere.py"]) == 2
    assert capsys.readouterr().err == "leyden plan: there is no script 'nowhere.py'.\n"
    (tmp_path / "train.py").write_text(SCRIPT.format(name="leyden", fit=FITS["loader"]))
    done = subprocess.run(
        [sys.executable, "-m", "leyden", "plan", "--memory", "much", "train.py"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert done.returncode == 2
    assert "leyden plan: plan(memory='much') is not valid" in done.stderr
