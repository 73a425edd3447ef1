# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what they hold, what can be wrong with one, hyperparameters in them, and those that Lightning writes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import checkpoint_grid_script
import leyden as L
import lightning_checkpoint_script
from leyden.callbacks import ModelCheckpoint
from leyden.callbacks.checkpoint_files import bears
from leyden.errors import CheckpointError, CheckpointNotFoundError, LeydenWarning, MisconfigurationException
from leyden.loggers import CSVLogger

HERE = Path(__file__).parent
QUIET: dict[str, Any] = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    "accelerator": "cpu",
}  # fmt: skip


@dataclass
class Settings:
    depth: int = 3


class Model(L.LightningModule):
    def __init__(self, width: int = 2, settings: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(2, width)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.net(batch).mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("weight", self.net.weight.sum())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(L.LightningDataModule):
    def __init__(self, size: int = 4, width: int = 7) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.position = 0

    def train_dataloader(self) -> Any:
        return DataLoader(torch.ones(self.hparams.size, 2), batch_size=2)

    val_dataloader = test_dataloader = train_dataloader

    def state_dict(self) -> dict[str, Any]:
        return {"position": 5}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.position = state_dict["position"]


def trainer(**arguments: Any) -> L.Trainer:
    return L.Trainer(**{**QUIET, "max_epochs": 1, **arguments})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    run = trainer()
    run.fit(Model(), datamodule=Data())
    run.save_checkpoint(tmp_path / "saved.ckpt")
    return tmp_path / "saved.ckpt"


def test_a_checkpoint_has_lightnings_keys_and_is_plain_data(saved: Path) -> None:
    content = torch.load(saved, weights_only=True)
    assert set(content) == {
        "epoch", "global_step", "pytorch-lightning_version", "state_dict", "loops", "callbacks", "optimizer_states",
        "lr_schedulers", "hparams_name", "hyper_parameters", "datamodule_hparams_name", "datamodule_hyper_parameters",
        "Data", "leyden",
    }  # fmt: skip
    assert content["epoch"] == 1
    assert content["global_step"] == 2


def test_weights_only_leaves_out_what_a_resume_needs(tmp_path: Path) -> None:
    run = trainer(enable_checkpointing=None, callbacks=ModelCheckpoint(tmp_path, save_weights_only=True))
    run.fit(Model(), datamodule=Data())
    path = run.checkpoint_callback.best_model_path
    content = torch.load(path, weights_only=True)
    assert not {"callbacks", "optimizer_states", "lr_schedulers"} & set(content)
    assert bears(path, run.checkpoint_callback.mark)  # a later run knows it as its own
    with pytest.raises(CheckpointError, match=r"holds weights only .*optimizer_states"):
        trainer(max_epochs=2).fit(Model(), datamodule=Data(), ckpt_path=path)
    assert trainer().test(Model(), datamodule=Data(), ckpt_path=path, verbose=False)


def test_saving_before_any_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match="has no module yet"):
        trainer().save_checkpoint(tmp_path / "x.ckpt")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- B4: files that are wrong


def test_B4_a_missing_file(tmp_path: Path) -> None:
    for entry in ("fit", "test"):
        with pytest.raises(CheckpointNotFoundError, match=r"none\.ckpt"):
            getattr(trainer(), entry)(Model(), datamodule=Data(), ckpt_path=tmp_path / "none.ckpt")
    with pytest.raises(FileNotFoundError):
        Model.load_from_checkpoint(tmp_path / "none.ckpt")


@pytest.mark.parametrize("size", [0, 100, -200])
def test_B4_a_truncated_file(saved: Path, size: int) -> None:
    saved.write_bytes(saved.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"saved\.ckpt"):
        trainer(max_epochs=2).fit(Model(), datamodule=Data(), ckpt_path=saved)


def test_B4_a_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"no 'state_dict' \(found: \['weight'\]\)"):
        trainer().test(Model(), datamodule=Data(), ckpt_path=tmp_path / "weights.pt")


def test_B4_weights_of_another_shape_are_listed_before_any_training(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"net\.weight: \(2, 2\) in the file, \(5, 2\) in the model"):
        trainer(max_epochs=2).fit(Model(width=5), datamodule=Data(), ckpt_path=saved)
    with pytest.raises(CheckpointError, match=r"net\.weight: \(2, 2\) in the file, \(5, 2\) in the model"):
        Model.load_from_checkpoint(saved, width=5)


def test_B4_weights_of_another_model_are_listed(saved: Path) -> None:
    class Other(Model):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2, 2)
            del self.net

    with pytest.raises(
        CheckpointError, match=r"missing in the file: head\.weight.*\n.*unknown to the model: net\.weight"
    ):
        trainer().test(Other(), datamodule=Data(), ckpt_path=saved)


def test_B4_other_optimizers(saved: Path) -> None:
    class Two(Model):
        def configure_optimizers(self) -> Any:
            return [super().configure_optimizers(), torch.optim.Adam(self.net.parameters())]

    with pytest.raises(CheckpointError, match=r"state of 1 optimizers, but configure_optimizers\(\) returned 2"):
        trainer(max_epochs=2).fit(Two(), datamodule=Data(), ckpt_path=saved)


def test_B4_a_newer_format(saved: Path) -> None:
    content = torch.load(saved, weights_only=True)
    content["leyden"]["format"] = 99
    torch.save(content, saved)
    with pytest.raises(CheckpointError, match=r"format 99; this version of Leyden reads up to format 1"):
        trainer(max_epochs=2).fit(Model(), datamodule=Data(), ckpt_path=saved)


def test_a_checkpoint_beyond_max_epochs_is_an_error(saved: Path) -> None:
    run = trainer(max_epochs=3)
    run.fit(Model(), datamodule=Data(), ckpt_path=saved)
    run.save_checkpoint(saved)
    with pytest.raises(MisconfigurationException, match=r"stands at epoch 3, but Trainer\(max_epochs=2\)"):
        trainer(max_epochs=2).fit(Model(), datamodule=Data(), ckpt_path=saved)


# ---------------------------------------------------------------------------------------------- ckpt_path


def test_best_and_last(tmp_path: Path) -> None:
    run = trainer(
        max_epochs=3, enable_checkpointing=None,
        callbacks=ModelCheckpoint(tmp_path, monitor="val_loss", mode="max", save_last=True),
    )  # fmt: skip
    model = Model()
    run.fit(model, datamodule=Data())
    last = model.net.weight.sum().item()
    best = (
        torch.load(run.checkpoint_callback.best_model_path, weights_only=True)["state_dict"]["net.weight"].sum().item()
    )
    assert best != last
    assert run.test(datamodule=Data(), ckpt_path="best", verbose=False) == [{"weight": pytest.approx(best)}]
    assert run.ckpt_path == run.checkpoint_callback.best_model_path
    assert run.test(datamodule=Data(), ckpt_path="last", verbose=False) == [{"weight": pytest.approx(last)}]
    assert run.test(datamodule=Data(), verbose=False) == [{"weight": pytest.approx(best)}]
    assert run.test(Model(), datamodule=Data(), verbose=False) != [{"weight": pytest.approx(best)}]


def test_best_without_a_best_is_an_error_and_last_without_a_last_a_warning(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="ckpt_path='best'.*no best checkpoint is known"):
        trainer().test(Model(), datamodule=Data(), ckpt_path="best")
    with pytest.warns(LeydenWarning, match="there is no checkpoint in .*the fit starts anew"):
        trainer(default_root_dir=tmp_path).fit(Model(), datamodule=Data(), ckpt_path="last")


def test_ckpt_path_of_the_trainer_holds_until_it_is_reset(saved: Path) -> None:
    weight = torch.load(saved, weights_only=True)["state_dict"]["net.weight"].sum().item()
    run = trainer()
    run.ckpt_path = saved
    for _ in range(2):
        assert run.test(Model(), datamodule=Data(), verbose=False) == [{"weight": pytest.approx(weight)}]
    run.ckpt_path = None
    run.test(Model(), datamodule=Data(), verbose=False)
    assert run.ckpt_path is None
    run.ckpt_path = "somewhere"
    with pytest.warns(LeydenWarning, match="trainer.ckpt_path is 'somewhere'"):
        run.test(Model(), datamodule=Data(), ckpt_path=saved, verbose=False)


def test_the_state_of_the_data_module_and_of_callbacks_comes_back(saved: Path) -> None:
    data = Data()
    trainer(max_epochs=2).fit(Model(), datamodule=data, ckpt_path=saved)
    assert data.position == 5


def test_hooks_may_add_to_a_checkpoint_and_read_it(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Adds(Model):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["mine"] = {"a": 1}

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            seen.append(checkpoint["mine"])

    run = trainer()
    run.fit(Adds(), datamodule=Data())
    run.save_checkpoint(tmp_path / "x.ckpt")
    Adds.load_from_checkpoint(tmp_path / "x.ckpt")
    trainer(max_epochs=2).fit(Adds(), datamodule=Data(), ckpt_path=tmp_path / "x.ckpt")
    assert seen == [{"a": 1}] * 2


# ---------------------------------------------------------------------------------------------- hyperparameters


def test_load_from_checkpoint_builds_module_and_data_module(saved: Path) -> None:
    model, data = Model.load_from_checkpoint(saved), Data.load_from_checkpoint(saved)
    assert dict(model.hparams) == {"width": 2, "settings": None}
    assert dict(data.hparams) == {"size": 4, "width": 7}
    assert data.position == 5
    assert torch.equal(model.net.weight, torch.load(saved, weights_only=True)["state_dict"]["net.weight"])
    assert Data.load_from_checkpoint(saved, size=8).hparams.size == 8


def test_load_from_checkpoint_is_called_on_the_class(saved: Path) -> None:
    for owner, text in ((Model(), "Model"), (Data(), "Data")):
        with pytest.raises(TypeError, match=rf"call it on the class .*{text}\.load_from_checkpoint\(path\)"):
            owner.load_from_checkpoint(saved)


def test_W2_values_that_are_not_plain_are_kept_apart(tmp_path: Path) -> None:
    run = trainer()
    run.fit(Model(settings=Settings(9)), datamodule=Data())
    path = tmp_path / "x.ckpt"
    run.save_checkpoint(path)
    torch.load(path, weights_only=True)  # the file itself stays harmless
    with pytest.warns(LeydenWarning, match=r"not plain data \(settings\); they were left closed.*weights_only=False"):
        assert Model.load_from_checkpoint(path).hparams.settings is None
    assert Model.load_from_checkpoint(path, weights_only=False).hparams.settings == Settings(9)
    assert Model.load_from_checkpoint(path, settings=1).hparams.settings == 1


def test_W3_hyperparameters_of_module_and_data_module_stay_apart_in_logs(tmp_path: Path) -> None:
    run = trainer(logger=CSVLogger(tmp_path))
    run.fit(Model(width=3), datamodule=Data())
    text = Path(run.log_dir, "hparams.yaml").read_text()
    assert sorted(text.split("\n"))[1:] == ["datamodule/width: 7", "settings: null", "size: 4", "width: 3"]


def test_W4_what_is_saved_is_what_was_passed(tmp_path: Path) -> None:
    class Changes(Model):
        def __init__(self, sizes: list[int]) -> None:
            super().__init__()
            sizes.append(99)
            self.save_hyperparameters()

    given = [1, 2]
    run = trainer()
    run.fit(Changes(given), datamodule=Data())
    run.save_checkpoint(tmp_path / "x.ckpt")
    assert given == [1, 2, 99]
    assert torch.load(tmp_path / "x.ckpt", weights_only=True)["hyper_parameters"]["sizes"] == [1, 2]


# ---------------------------------------------------------------------------------------------- Lightning's files


def test_a_run_of_lightning_goes_on_here(tmp_path: Path) -> None:
    expected = json.loads((HERE / "recorded" / "lightning-2.6.6-resumed.json").read_text())["result"]
    theirs = str(HERE / "recorded" / "lightning-2.6.6.ckpt")
    with pytest.warns(LeydenWarning, match="The checkpoint folder has changed"):
        result = lightning_checkpoint_script.run("leyden", 5, str(tmp_path), theirs)
    assert (result["epoch"], result["step"], result["patience"]) == (5, 15, expected["patience"])
    assert result["rates"] == pytest.approx(expected["rates"][6:])
    assert result["losses"] == pytest.approx(expected["losses"][6:], rel=1e-4)
    for name, weight in expected["weights"].items():
        assert torch.allclose(torch.tensor(result["weights"][name]), torch.tensor(weight), rtol=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="Lightning is not installed")
def test_a_run_of_ours_goes_on_in_lightning(tmp_path: Path) -> None:
    def run(framework: str, *arguments: str) -> dict[str, Any]:
        command = [sys.executable, str(HERE / "lightning_checkpoint_script.py"), framework, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=110)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.strip().split("\n")[-1])["result"]  # type: ignore[no-any-return]

    run("leyden", "2", str(tmp_path))
    whole = run("lightning.pytorch", "5", str(tmp_path / "whole"))
    resumed = run("lightning.pytorch", "5", str(tmp_path / "resumed"), str(tmp_path / "last.ckpt"))
    assert resumed["losses"] == whole["losses"][6:]
    assert resumed["rates"] == whole["rates"][6:]
    assert resumed["weights"] == whole["weights"]


# ---------------------------------------------------------------------------------------------- which files remain

GRID = json.loads((HERE / "recorded" / "lightning-2.6.6-checkpoint-grid.json").read_text())
WHY = {
    "K1": "after fit, the last checkpoint is the state after the last step",
    "K2": "a step that also validates is ranked by that validation",
    "K5": "both raise, since the metric is not there; the last checkpoint is saved all the same",
    "waits": "a save that is due before its metric is there waits for it, rather than being dropped or an error",
    "step 0": "step 0 is no multiple of anything, though a window of accumulation has several batches there",
}
"""Where ours differ from Lightning's on purpose; the recording says which of these it is."""


@pytest.mark.parametrize("index", range(len(GRID)))
def test_K1_K5_files_over_a_grid_of_settings(index: int, tmp_path: Path, recwarn: Any) -> None:
    row = GRID[index]
    result = checkpoint_grid_script.run("leyden", row["case"], str(tmp_path))
    assert json.loads(json.dumps(result)) == row.get("leyden", row["lightning"]), row["case"]
    assert ("leyden" in row) == (row.get("why") in WHY)


def test_K5_a_save_that_is_due_before_the_first_epoch_that_validates(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, monitor="val_loss", every_n_train_steps=1, save_top_k=-1)
    run = trainer(
        max_epochs=4, check_val_every_n_epoch=2, num_sanity_val_steps=0, enable_checkpointing=None, callbacks=callback
    )
    run.fit(Model(), datamodule=Data())
    assert sorted(path.name for path in tmp_path.iterdir())[0] == "epoch=1-step=4.ckpt"
