# SPDX-License-Identifier: Apache-2.0
"""The Tuner finds what Lightning's finds, and nothing else changes: a fit that follows is the one without it."""

from __future__ import annotations

import json
import logging
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.callbacks import BatchSizeFinder, EarlyStopping, LearningRateFinder, ModelCheckpoint
from leyden.errors import MisconfigurationException
from leyden.loggers import CSVLogger
from leyden.loops import rehearsal
from leyden.tuning import LRFinder, Tuner

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import scenarios  # noqa: E402  # beside this file, and a script too

sys.path.remove(str(HERE))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # what is so small is only slower with more; put back by tests/conftest.py


@pytest.fixture(scope="module")
def theirs() -> dict[str, Any]:
    recorded = json.loads((HERE / "recorded_with_lightning_2_6_6.json").read_text(encoding="utf-8"))
    if (here := scenarios.machine()) != recorded["machine"]:
        pytest.skip(f"recorded with {recorded['machine']}, this is {here}")
    return recorded["result"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def ours() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(logging.getLogger("leyden"), "disabled", True)  # what the searches say is not compared
        warnings.simplefilter("ignore")
        patch.setattr(rehearsal, "garbage_collection_cuda", lambda: None)  # half a second each, where much is imported
        return scenarios.run("leyden", semantics="lightning")


@pytest.mark.parametrize("what", ["rates", "losses", "suggestion", "lr", "last", "weights"])
def test_the_range_test_is_that_of_lightning_bit_for_bit(ours: Any, theirs: Any, what: str) -> None:
    names = [name for name in theirs if name.startswith("rate")]
    assert len(names) == len(scenarios.RATES)
    assert [name for name in names if ours[name][what] != theirs[name][what]] == []


def test_batch_sizes_are_those_of_lightning(ours: Any, theirs: Any) -> None:
    names = [name for name in theirs if name.startswith("size")]
    assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}


# --------------------------------------------------------------------------------------------- nothing else changes


class Net(L.LightningModule):
    """Something of everything that has a state: dropout, batch norm, Adam, a schedule, a loader's own generator."""

    def __init__(self, lr: float = 0.01, batch_size: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1)
        )
        self.generator = torch.Generator().manual_seed(5)
        self.seen: list[float] = []
        self.limit = 10**6

    def loss(self, batch: Any) -> torch.Tensor:
        if len(batch[0]) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return (self.layers(batch[0]) - batch[1]).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch) * (1 + random.random())
        self.seen.append(loss.item())
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.loss(batch))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), self.hparams.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    def loader(self, shuffle: bool) -> Any:
        x = torch.randn(48, 4, generator=torch.Generator().manual_seed(1))
        data = TensorDataset(x, x.sum(1, keepdim=True))
        return DataLoader(data, self.hparams.batch_size, shuffle=shuffle, generator=self.generator)

    def train_dataloader(self) -> Any:
        return self.loader(True)

    def val_dataloader(self) -> Any:
        return self.loader(False)


class Plain(L.LightningModule):
    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.lr, self.batch_size = lr, 4
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.ones(16, 4)), batch_size=self.batch_size)


def trainer(folder: Path, **arguments: Any) -> L.Trainer:
    given: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 3, "enable_progress_bar": False, "log_every_n_steps": 1,
        "enable_model_summary": False, "default_root_dir": folder, "logger": CSVLogger(folder, version=0),
    }  # fmt: skip
    return L.Trainer(**{**given, **arguments})


def small(folder: Path, **arguments: Any) -> L.Trainer:
    return trainer(folder, logger=False, enable_checkpointing=False, **arguments)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.filterwarnings("ignore:The learning-rate test tried")
@pytest.mark.parametrize("search", ["rate", "size"])
def test_a_fit_after_a_search_is_the_fit_without_it_bit_for_bit(tmp_path: Path, search: str) -> None:
    found: list[Any] = []
    for name in ("with", "without"):
        folder = tmp_path / name
        folder.mkdir()
        L.seed_everything(7, verbose=False)
        module, stop = Net(), EarlyStopping("val", patience=5)
        made = trainer(folder, callbacks=[stop, ModelCheckpoint(monitor="val", save_last=True)])
        if name == "with":
            before = {key: dict(vars(each)) for key, each in enumerate(made.callbacks)}
            tuner = Tuner(made)
            if search == "rate":
                result = tuner.lr_find(module, num_training=30, update_attr=False, early_stop_threshold=None)
                assert result is not None
                assert len(result.results["loss"]) == 18
            else:
                module.limit = 20
                assert tuner.scale_batch_size(module, steps_per_trial=2) == 16
                module.hparams.batch_size, module.limit = 8, 10**6
            assert files(folder) == []
            assert made.global_step == made.current_epoch == 0
            assert {key: dict(vars(each)) for key, each in enumerate(made.callbacks)} == before
            module.seen.clear()
        made.fit(module)
        weights = {key: value.tolist() for key, value in module.state_dict().items()}
        rows = [path.read_text() for path in sorted(folder.rglob("metrics.csv"))]
        found.append((module.seen, weights, rows, files(folder), stop.state_dict(), torch.rand(1).item()))
    assert len(found[0][0]) == 18
    assert found[0] == found[1]


def test_the_trainer_is_as_before(tmp_path: Path) -> None:
    made, module = trainer(tmp_path), Plain()
    before = (made.callbacks, list(made.callbacks), made.loggers, list(made.loggers), made.max_steps, made.config)
    Tuner(made).lr_find(module, num_training=5)
    after = (made.callbacks, list(made.callbacks), made.loggers, list(made.loggers), made.max_steps, made.config)
    assert after == before
    assert module.trainer is made
    assert made.state.finished
    assert files(tmp_path) == []


def test_a_search_that_fails_leaves_the_trainer_as_before(tmp_path: Path) -> None:
    class Fails(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if self.global_step == 3:
                raise KeyError("mine")
            return super().training_step(batch, batch_idx)

    made, module = small(tmp_path), Fails()
    weights = module.layer.weight.detach().clone()
    callbacks = made.callbacks
    with pytest.raises(KeyError, match="mine"):
        Tuner(made).lr_find(module, num_training=8)
    assert made.callbacks is callbacks
    assert made.global_step == 0
    assert torch.equal(module.layer.weight, weights)
    with pytest.raises(KeyError, match="mine"):
        Tuner(made).scale_batch_size(module, steps_per_trial=8)
    assert module.batch_size == 4


# --------------------------------------------------------------------------------------------- what is set


class Data(L.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.batch_size, self.lr = 2, 0.5

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.ones(64, 4)), batch_size=self.batch_size)


@pytest.mark.parametrize("name", ["lr", "learning_rate", "mine"])
def test_the_rate_is_set_where_it_is(tmp_path: Path, name: str) -> None:
    class Module(Plain):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), self.hparams[name])

    module = Module()
    del module.lr
    module.save_hyperparameters({name: 0.1})
    found = Tuner(small(tmp_path, max_epochs=20)).lr_find(
        module, num_training=20, early_stop_threshold=None, attr_name=name if name == "mine" else ""
    )
    assert found is not None
    assert module.hparams[name] == found.suggestion() != 0.1


def test_settings_of_the_data_module(tmp_path: Path) -> None:
    module, data = Plain(), Data()
    assert Tuner(small(tmp_path)).scale_batch_size(module, datamodule=data, max_trials=3) == 8
    assert (module.batch_size, data.batch_size) == (8, 8)


def test_a_rate_that_is_nowhere(tmp_path: Path) -> None:
    module = Plain()
    with pytest.raises(AttributeError, match="neither Plain nor its data module has nowhere"):
        Tuner(small(tmp_path)).lr_find(module, attr_name="nowhere")
    with pytest.raises(MisconfigurationException, match="Field nowhere not found in `model`"):
        Tuner(small(tmp_path)).scale_batch_size(module, batch_arg_name="nowhere")


# --------------------------------------------------------------------------------------------- what is refused


def test_several_optimizers_are_refused(tmp_path: Path) -> None:
    class Two(Plain):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), 0.1) for _ in range(2)]

    with pytest.raises(MisconfigurationException, match="only works with single optimizer"):
        Tuner(small(tmp_path)).lr_find(Two())


def test_bad_arguments(tmp_path: Path) -> None:
    tuner, module, loader = Tuner(small(tmp_path)), Plain(), Plain().train_dataloader()
    with pytest.raises(MisconfigurationException, match="only valid configuration to run lr finder"):
        tuner.lr_find(module, method="test")
    with pytest.raises(ValueError, match="method 'tset' is invalid. .*Did you mean 'test'"):
        tuner.scale_batch_size(module, method="tset")
    with pytest.raises(ValueError, match="`mode` should be either of"):
        tuner.lr_find(module, mode="slow")
    with pytest.raises(ValueError, match="`mode` should be either of"):
        tuner.scale_batch_size(module, mode="slow")
    with pytest.raises(ValueError, match="`margin` should be between 0 and 1"):
        tuner.scale_batch_size(module, margin=1.5)
    with pytest.raises(MisconfigurationException, match="`dataloaders` argument should be None"):
        tuner.lr_find(module, dataloaders=loader)
    with pytest.raises(MisconfigurationException, match="arguments should be None"):
        tuner.scale_batch_size(module, loader, method="validate")
    with pytest.raises(MisconfigurationException, match="cannot be used with dataloaders passed directly"):
        tuner.scale_batch_size(module, loader)
    for callback, search in ((LearningRateFinder(), "lr_find"), (BatchSizeFinder(), "scale_batch_size")):
        with pytest.raises(ValueError, match="already configured with a"):
            getattr(Tuner(small(tmp_path, callbacks=callback)), search)(module)


def test_several_loaders_of_an_evaluation_are_refused(tmp_path: Path) -> None:
    class Several(Plain):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...

        def val_dataloader(self) -> Any:
            return [self.train_dataloader(), self.train_dataloader()]

    with pytest.raises(MisconfigurationException, match="multiple val dataloaders"):
        Tuner(small(tmp_path)).scale_batch_size(Several(), method="validate")


def test_nothing_fits(tmp_path: Path) -> None:
    module = Net()
    module.limit = 0
    with pytest.raises(MisconfigurationException, match="Not even batches of 1 fit in memory"):
        Tuner(small(tmp_path)).scale_batch_size(module)
    assert module.hparams.batch_size == 8


def test_a_first_size_that_is_too_large_is_halved_until_it_fits(tmp_path: Path) -> None:
    for mode in ("power", "binsearch"):
        module = Net()
        module.limit = 5
        size = Tuner(small(tmp_path)).scale_batch_size(module, mode=mode, init_val=32, margin=0.0)
        assert size == module.hparams.batch_size == {"power": 4, "binsearch": 5}[mode]


def test_fast_dev_run_skips_both(tmp_path: Path) -> None:
    tuner = Tuner(small(tmp_path, fast_dev_run=True))
    with pytest.warns(UserWarning, match="Skipping learning rate finder since `fast_dev_run` is enabled"):
        assert tuner.lr_find(Plain()) is None
    with pytest.warns(UserWarning, match="Skipping batch size scaler since `fast_dev_run` is enabled"):
        assert tuner.scale_batch_size(Plain()) is None


def test_accumulation_counts_updates(tmp_path: Path) -> None:
    found = Tuner(small(tmp_path, max_epochs=-1, accumulate_grad_batches=2)).lr_find(
        Plain(), num_training=20, early_stop_threshold=None
    )
    assert isinstance(found, LRFinder)
    assert len(found.results["lr"]) == 20
    assert found._total_batch_idx == 39
