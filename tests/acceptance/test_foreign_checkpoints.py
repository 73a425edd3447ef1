# SPDX-License-Identifier: Apache-2.0
"""B3, B4: files of Lightning 1.x and 2.x load here; files that hold only what was trained go on from ``fit(ckpt_path)``."""

from __future__ import annotations

import sys
import types
import warnings
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.utils.data import DataLoader

import leyden as L
from leyden import files
from leyden.callbacks import EarlyStopping, ModelCheckpoint
from leyden.errors import CheckpointError, LeydenWarning

HERE = Path(__file__).parent
QUIET: dict[str, Any] = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    "accelerator": "cpu",
}  # fmt: skip


class Model(L.LightningModule):
    def __init__(self, width: int = 2, rate: float = 0.1, root: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(2, width)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.net(batch).pow(2).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.rate, momentum=0.9)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.ones(4, 2), batch_size=2)


@pytest.fixture
def lightning_1() -> Iterator[types.ModuleType]:
    """The classes that Lightning 1.x pickled into its files, under their names; gone when the file is read."""
    names = {
        "pytorch_lightning.callbacks.early_stopping": "EarlyStopping",
        "pytorch_lightning.callbacks.model_checkpoint": "ModelCheckpoint",
        "pytorch_lightning.utilities.parsing": "AttributeDict",
    }
    held = types.ModuleType("held")
    for module, name in names.items():
        base = dict if name == "AttributeDict" else object
        cls = type(name, (base,), {"__module__": module, "__qualname__": name})
        setattr(held, name, cls)
        for depth in range(1, module.count(".") + 2):
            parent = ".".join(module.split(".")[:depth])
            sys.modules.setdefault(parent, types.ModuleType(parent))
        setattr(sys.modules[module], name, cls)
    yield held
    forget()


def forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "pytorch_lightning"]:
        del sys.modules[name]


def of_lightning_1(held: Any, **changes: Any) -> dict[str, Any]:
    """A checkpoint in the layout of Lightning 1.0 to 1.4: states of callbacks under their classes, no loops."""
    model = Model(width=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model.net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return {
        "epoch": 2,
        "global_step": 4,
        "pytorch-lightning_version": "1.2.0",
        "state_dict": model.state_dict(),
        "callbacks": {
            held.EarlyStopping: {"wait_count": 1, "stopped_epoch": 0, "best_score": torch.tensor(0.5), "patience": 7},
            held.ModelCheckpoint: {"best_model_path": "/gone/a.ckpt", "best_model_score": torch.tensor(0.5)},
        },
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": held.AttributeDict(width=3, rate=np.float64(0.05), root=Path("data")),
        **changes,
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_B3_a_file_of_lightning_1(tmp_path: Path, lightning_1: Any, zipped: bool) -> None:
    path = tmp_path / "old.ckpt"
    content = of_lightning_1(lightning_1)
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    forget()
    with pytest.raises(Exception, match="not an allowed global"):
        torch.load(path, weights_only=True)  # what Lightning 2.6 does
    model = Model.load_from_checkpoint(path)
    assert dict(model.hparams) == {"width": 3, "rate": 0.05, "root": Path("data")}
    assert torch.equal(model.net.weight, content["state_dict"]["net.weight"])
    assert files.newest(tmp_path) == path
    stopping = EarlyStopping("loss", patience=1)
    trainer = L.Trainer(**QUIET, max_epochs=4, callbacks=stopping)
    with pytest.warns(LeydenWarning, match="holds the state of callbacks that this Trainer does not have"):
        trainer.fit(Model(width=3), ckpt_path=path)
    assert (trainer.current_epoch, trainer.global_step) == (4, 8)
    assert stopping.patience == 7
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.05


def test_B3_a_file_of_2020_keeps_what_its_callbacks_knew(tmp_path: Path, lightning_1: Any) -> None:
    """Before 1.0 that stood at the top of the file; the hyperparameters were a namespace, under ``hparams``."""
    content = of_lightning_1(
        lightning_1, checkpoint_callback_best=torch.tensor(0.25), checkpoint_callback_best_model_path="/gone/b.ckpt",
        early_stop_callback_wait=2, early_stop_callback_patience=9, hparams=Namespace(width=3, rate=0.5),
    )  # fmt: skip
    for name in ("callbacks", "hyper_parameters", "hparams_name"):
        del content[name]
    torch.save(content, tmp_path / "old.ckpt")
    forget()
    assert Model.load_from_checkpoint(tmp_path / "old.ckpt").hparams.width == 3
    stopping, saver = EarlyStopping("loss", patience=1), ModelCheckpoint(tmp_path / "new", monitor="loss")
    trainer = L.Trainer(**{**QUIET, "enable_checkpointing": True}, max_epochs=2, callbacks=[stopping, saver])
    trainer.fit(Model(width=3), ckpt_path=tmp_path / "old.ckpt")
    assert (stopping.wait_count, stopping.patience) == (2, 9)
    assert saver.best_model_path == "/gone/b.ckpt"


def test_B3_the_recorded_file_of_lightning_2() -> None:
    path = HERE / "recorded" / "lightning-2.6.6.ckpt"
    assert files.verify(path)
    assert files.recorded_step(path) == files.load(path)["global_step"] == 6


class Custom:
    """A class of somebody's own."""


@pytest.mark.parametrize("value", [Custom(), np.array([1.0]), np.array([None], dtype=object), np.datetime64(0, "s")])
def test_B1_anything_else_is_refused_by_name(tmp_path: Path, value: Any) -> None:
    torch.save({"state_dict": {}, "hyper_parameters": {"x": value}}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"contains .*not opened"):
        Model.load_from_checkpoint(tmp_path / "a.ckpt")


# ---------------------------------------------------------------------------------------------- B4: only what was trained


class Adapted(Model):
    """A frozen backbone and an adapter; the checkpoint holds the adapter only."""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False
        self.net.requires_grad_(False)
        nn.init.ones_(self.net.weight)
        self.adapter = nn.Linear(2, 2)
        nn.init.ones_(self.adapter.weight)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.net(batch) + self.adapter(batch)).pow(2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.adapter.parameters(), lr=0.1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items() if key in trained}


def test_B4_a_run_that_saves_its_adapter_only_goes_on_exactly(tmp_path: Path) -> None:
    def fit(epochs: int, ckpt_path: Any = None) -> Adapted:
        torch.manual_seed(1)
        model = Adapted()
        saver = ModelCheckpoint(tmp_path / f"{epochs}", save_last=True)
        L.Trainer(**{**QUIET, "enable_checkpointing": True}, max_epochs=epochs, callbacks=saver).fit(
            model, ckpt_path=ckpt_path
        )
        return model

    whole = fit(5)
    fit(2)
    assert set(files.load(tmp_path / "2" / "last.ckpt")["state_dict"]) == {"adapter.weight", "adapter.bias"}
    with pytest.warns(LeydenWarning, match="The checkpoint folder has changed"):
        resumed = fit(5, tmp_path / "2" / "last.ckpt")
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_B4_weights_of_which_none_fits_are_not_passed_over_in_silence(tmp_path: Path) -> None:
    files.save({"state_dict": {"backbone.w": torch.ones(2), "backbone.b": torch.ones(2)}}, tmp_path / "a.ckpt")
    with pytest.warns(LeydenWarning, match=r"None of the 2 weights in .*a.ckpt is in Model.*backbone.w, backbone.b"):
        Model.load_from_checkpoint(tmp_path / "a.ckpt", strict=False)


def test_B4_a_newer_format_is_refused_by_load_from_checkpoint_too(tmp_path: Path) -> None:
    files.save({"state_dict": Model().state_dict(), "leyden": {"format": 99}}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"format 99; this version of Leyden reads up to format 1. Update Leyden"):
        Model.load_from_checkpoint(tmp_path / "a.ckpt")


# ---------------------------------------------------------------------------------------------- folders


def test_C5_a_run_goes_on_from_a_folder_as_from_a_file(tmp_path: Path) -> None:
    def fit(epochs: int, ckpt_path: Any = None, folder: Path = tmp_path) -> Model:
        torch.manual_seed(1)
        model = Model()
        saver = ModelCheckpoint(folder, filename="saved", save_top_k=1)
        L.Trainer(**{**QUIET, "enable_checkpointing": True}, max_epochs=epochs, callbacks=saver).fit(
            model, ckpt_path=ckpt_path
        )
        return model

    def write(folder: Path) -> None:
        content = files.load(tmp_path / "saved.ckpt")
        sharded = {"model": content.pop("state_dict")}
        sharded |= {f"optimizer_{index}": state for index, state in enumerate(content.pop("optimizer_states"))}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that there is one process
            dcp.save(sharded, checkpoint_id=folder, no_dist=True)
        torch.save(content, folder / "meta.pt")

    whole = fit(4, folder=tmp_path / "whole")
    fit(2)
    files.save_folder(tmp_path / "folder" / "last.ckpt", write, {"global_step": 4, "epoch": 1})
    with pytest.warns(LeydenWarning, match="holds 1 checkpoint|The checkpoint folder has changed"):
        resumed = fit(4, "last", tmp_path / "folder")
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    loaded = Model.load_from_checkpoint(tmp_path / "folder" / "last.ckpt")
    assert loaded.hparams.width == 2
