# SPDX-License-Identifier: Apache-2.0
"""Mistakes that everybody makes once: each is an error before any training that says what to write instead."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.callbacks import EarlyStopping, ModelCheckpoint
from leyden.errors import CheckpointError, CheckpointNotFoundError, MisconfigurationException, PossibleUserWarning
from leyden.loggers import CSVLogger

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

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0] if isinstance(batch, (list, tuple)) else batch).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


DATA = TensorDataset(torch.ones(4, 2))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"max_epoch": 3}, "unexpected keyword argument 'max_epoch'. Did you mean 'max_epochs'?"),
        ({"tpu_cores": 1}, "unexpected keyword argument 'tpu_cores'. Use accelerator and devices."),
        ({"resume_from_checkpoint": "x"}, "Use Trainer.fit(ckpt_path=...)."),
        ({"progress_bar_refresh_rate": 1}, "Use enable_progress_bar, or callbacks=[TQDMProgressBar(refresh_rate=n)]."),
        ({"weights_summary": "full"}, "Use enable_model_summary, or callbacks=[ModelSummary(max_depth=n)]."),
    ],
)
def test_an_unknown_argument_says_what_to_write_today(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(TypeError, match=re.escape(text)):
        L.Trainer(**arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"enable_progress_bar": "no"}, "Trainer(enable_progress_bar='no') is not valid: it must be True or False."),
        ({"enable_checkpointing": ModelCheckpoint()}, "it must be True or False."),
        ({"enable_model_summary": "full"}, "Trainer(enable_model_summary='full')"),
        ({"benchmark": "x"}, "Trainer(benchmark='x')"),
        ({"inference_mode": 2}, "Trainer(inference_mode=2)"),
        ({"detect_anomaly": "x"}, "Trainer(detect_anomaly='x')"),
        ({"sync_batchnorm": "x"}, "Trainer(sync_batchnorm='x')"),
        ({"overfit_batches": -1}, "Trainer(overfit_batches=-1) is not valid"),
        ({"limit_train_batches": 10.0}, "Did you mean 10?"),
        ({"val_check_interval": 100.0}, "Did you mean 100?"),
        ({"default_root_dir": 3}, "Trainer(default_root_dir=3) is not valid: it must be a path, a URL or None."),
        (
            {"callbacks": [EarlyStopping]},
            "Trainer(callbacks=EarlyStopping): a callback must be a Callback object, not a",
        ),
        ({"callbacks": EarlyStopping}, "Did you mean EarlyStopping(...)?"),
        ({"logger": CSVLogger}, "Did you mean CSVLogger(...)?"),
    ],
)
def test_a_value_that_cannot_be_names_its_argument(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(MisconfigurationException, match=re.escape(text)):
        L.Trainer(**arguments)


def test_half_a_batch_gets_no_hint() -> None:
    with pytest.raises(MisconfigurationException) as caught:
        L.Trainer(limit_train_batches=1.5)
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize("switch", [True, False, None, 1, 0])
def test_switches(switch: Any) -> None:
    trainer = L.Trainer(**{**QUIET, "enable_model_summary": switch}, benchmark=switch)
    assert any(type(callback).__name__ == "ModelSummary" for callback in trainer.callbacks) is (switch in (None, True))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda trainer: trainer.fit(Module, [torch.ones(1, 2)]),
            "is the class Module; pass an object of it: Module(...)",
        ),
        (lambda trainer: trainer.fit(Module(), datamodule=5), "must be a LightningDataModule object; it is 5."),
        (
            lambda trainer: trainer.fit(Module(), datamodule=L.LightningDataModule),
            "it is the class LightningDataModule.",
        ),
    ],
)
def test_a_class_in_the_place_of_an_object(call: Callable[[L.Trainer], None], text: str) -> None:
    with pytest.raises(TypeError, match=re.escape(text)):
        call(L.Trainer(**QUIET))


@pytest.mark.parametrize(
    ("loader", "text"),
    [
        ([], "train_dataloaders gave no batch: the list is empty."),
        (DataLoader(TensorDataset(torch.ones(0, 2))), "gave no batch: the DataLoader is empty."),
        (DataLoader(DATA, 16, drop_last=True), "its 4 samples are fewer than batch_size=16, and drop_last=True drops"),
        (DataLoader(DATA, batch_sampler=[]), "the length of the DataLoader is 0, though its data set has 4 samples."),
    ],
)
def test_a_loader_without_batches_says_why(loader: Any, text: str) -> None:
    with pytest.raises(MisconfigurationException, match=re.escape(text)):
        L.Trainer(**QUIET).fit(Module(), loader)


def test_a_data_set_in_the_place_of_a_loader() -> None:
    with pytest.warns(PossibleUserWarning, match=r"train_dataloaders is a data set \(TensorDataset\), not a loader"):
        L.Trainer(**QUIET).fit(Module(), DATA)
    with pytest.warns(PossibleUserWarning, match="this list holds tensors, of which each row counts as a batch"):
        L.Trainer(**QUIET).fit(Module(), [torch.ones(4, 2), torch.ones(4, 2)])


# ---------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    trainer = L.Trainer(**QUIET)
    trainer.fit(Module(), DataLoader(DATA))
    trainer.save_checkpoint(tmp_path / "good.ckpt")
    return tmp_path / "good.ckpt"


def test_load_from_checkpoint_on_an_object_would_change_nothing(checkpoint: Path) -> None:
    module = Module()
    with pytest.raises(TypeError, match=r"as in model = Module\.load_from_checkpoint\(path\)"):
        module.load_from_checkpoint(checkpoint)
    assert isinstance(Module.load_from_checkpoint(checkpoint), Module)
    with pytest.raises(TypeError, match="makes a new object"):
        L.LightningDataModule().load_from_checkpoint(checkpoint)


def test_bare_weights_are_no_checkpoint(tmp_path: Path) -> None:
    torch.save(Module().state_dict(), tmp_path / "weights.pt")
    for use in (
        lambda path: Module.load_from_checkpoint(path),
        lambda path: L.Trainer(**QUIET).fit(Module(), DataLoader(DATA), ckpt_path=path),
    ):
        with pytest.raises(CheckpointError, match=r"no 'state_dict' \(found: \['net.bias', 'net.weight'\]\)"):
            use(tmp_path / "weights.pt")


def test_only_files_of_its_kind_are_offered_for_one_that_is_missing(checkpoint: Path) -> None:
    (checkpoint.parent / "goods.txt").write_text("")
    with pytest.raises(CheckpointNotFoundError, match=r"Did you mean 'good.ckpt'\?"):
        Module.load_from_checkpoint(checkpoint.with_name("goods.ckpt"))


def test_a_folder_that_cannot_be_written_is_known_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    module = Module()
    module.training_step = pytest.fail  # type: ignore[method-assign]
    checkpoints = ModelCheckpoint(dirpath=tmp_path / "file" / "checkpoints")
    with pytest.raises(CheckpointError, match=r"of that path there is '.*file', and that is not a folder"):
        L.Trainer(**{**QUIET, "enable_checkpointing": True}, callbacks=checkpoints).fit(module, DataLoader(DATA))
    with pytest.raises(MisconfigurationException, match=r"logger cannot make a folder in .*file.*logger=False"):
        L.Trainer(**{**QUIET, "logger": True}, default_root_dir=tmp_path / "file").fit(module, DataLoader(DATA))


def test_last_without_any_checkpoint_says_what_happens(tmp_path: Path) -> None:
    module = Module()
    module.test_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    for entry, text in (("fit", "the fit starts anew"), ("test", "the weights stay as they are")):
        trainer = L.Trainer(**QUIET, default_root_dir=tmp_path)
        with pytest.warns(PossibleUserWarning, match=text):
            getattr(trainer, entry)(module, DataLoader(DATA), ckpt_path="last")
