# SPDX-License-Identifier: Apache-2.0
"""What can be read of a Trainer, before, during and after its runs; and data modules through all entry points."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.errors import LeydenWarning, MisconfigurationException
from leyden.strategies import SingleDeviceStrategy
from leyden.types import RunningStage, TrainerFn, TrainerStatus

QUIET: dict[str, Any] = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    "accelerator": "cpu",
}  # fmt: skip

STATE = ["state", "interrupted", "training", "validating", "testing", "predicting", "evaluating", "sanity_checking",
    "received_sigterm", "should_stop"]  # fmt: skip
PROGRESS = ["global_step", "current_epoch", "max_epochs", "min_epochs", "max_steps", "min_steps", "is_last_batch",
    "num_training_batches", "num_val_batches", "num_sanity_val_batches", "num_test_batches", "num_predict_batches"]  # fmt: skip
DATA = ["train_dataloader", "val_dataloaders", "test_dataloaders", "predict_dataloaders", "datamodule",
    "distributed_sampler_kwargs", "enable_validation"]  # fmt: skip
METRICS = ["callback_metrics", "logged_metrics", "progress_bar_metrics", "logger", "loggers", "log_dir",
    "log_every_n_steps"]  # fmt: skip
PARTS = ["model", "lightning_module", "optimizers", "lr_scheduler_configs", "scaler", "precision", "precision_plugin",
    "accelerator", "strategy", "global_rank", "local_rank", "node_rank", "world_size", "num_nodes", "num_devices",
    "device_ids", "is_global_zero", "callbacks", "checkpoint_callback", "checkpoint_callbacks",
    "early_stopping_callback", "early_stopping_callbacks", "progress_bar_callback", "ckpt_path", "default_root_dir",
    "profiler"]  # fmt: skip
PLAIN = ["accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "fast_dev_run", "overfit_batches",
    "limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "val_check_interval",
    "val_check_batch", "check_val_every_n_epoch", "num_sanity_val_steps", "reload_dataloaders_every_n_epochs",
    "barebones", "enable_autolog_hparams", "fit_loop", "validate_loop", "test_loop", "predict_loop"]  # fmt: skip
READABLE = [*STATE, *PROGRESS, *DATA, *METRICS, *PARTS, *PLAIN]


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1)
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(self.trainer.state.stage)
        loss = self.net(batch).mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(self.trainer.state.stage)
        self.log("val_loss", self.net(batch).mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(self.trainer.state.stage)

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(self.trainer.state.stage)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def loader(n: int = 4) -> Any:
    return DataLoader(torch.ones(n, 2))


def trainer(**arguments: Any) -> L.Trainer:
    return L.Trainer(**{**QUIET, "max_epochs": 1, **arguments})


def read_all(run: L.Trainer) -> dict[str, Any]:
    values = {name: getattr(run, name) for name in READABLE}
    return {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}


def test_before_any_run() -> None:
    run = trainer()
    read = read_all(run)
    assert run.state.fn is run.state.stage is None
    assert run.state.status is TrainerStatus.INITIALIZING
    assert not any(read[name] for name in STATE if name != "state")
    assert (run.global_step, run.current_epoch, run.max_epochs, run.max_steps) == (0, 0, 1, -1)
    assert run.lightning_module is run.model is run.datamodule is run.logger is run.ckpt_path is run.profiler is None
    assert run.callback_metrics == run.logged_metrics == run.progress_bar_metrics == {}
    assert run.train_dataloader is run.val_dataloaders is run.test_dataloaders is run.predict_dataloaders is None
    assert run.num_val_batches == run.num_test_batches == run.num_predict_batches == run.optimizers == []
    assert (run.world_size, run.global_rank, run.num_nodes, run.num_devices, run.is_global_zero) == (1, 0, 1, 1, True)
    assert isinstance(run.strategy, SingleDeviceStrategy)
    assert run.precision == "32-true"
    assert run.scaler is None


def test_during_and_after_the_runs() -> None:
    read: list[dict[str, Any]] = []

    class Reads(L.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            read.append(read_all(trainer))
            assert trainer.training
            assert trainer.state.fn is TrainerFn.FITTING
            assert trainer.state.status is TrainerStatus.RUNNING
            assert trainer.estimated_stepping_batches == 4

        def on_validation_batch_end(self, trainer: Any, *args: Any) -> None:
            assert trainer.evaluating
            assert trainer.validating != trainer.sanity_checking

        def on_test_batch_end(self, trainer: Any, *args: Any) -> None:
            assert trainer.testing
            assert trainer.evaluating

        def on_predict_batch_end(self, trainer: Any, *args: Any) -> None:
            assert trainer.predicting
            assert not trainer.evaluating

    run, model = trainer(callbacks=Reads()), Model()
    train, val = loader(), loader(3)
    run.fit(model, train, val)
    assert [each["is_last_batch"] for each in read] == [False, False, False, True]
    assert [each["global_step"] for each in read] == [1, 2, 3, 4]
    assert read[0]["num_training_batches"] == 4
    assert read[0]["num_val_batches"] == [3]
    assert read[0]["num_sanity_val_batches"] == [2]
    assert read[0]["enable_validation"]
    assert set(read[-1]["callback_metrics"]) == {"loss"}
    assert run.train_dataloader is train
    assert run.val_dataloaders is val
    assert run.lightning_module is run.model is model
    assert len(run.optimizers) == len(run.lr_scheduler_configs) == 1
    assert set(run.callback_metrics) == {"loss", "val_loss"}
    assert all(isinstance(value, Tensor) and value.ndim == 0 for value in run.callback_metrics.values())
    assert isinstance(run.progress_bar_metrics["loss"], float)
    assert run.state.status is TrainerStatus.FINISHED
    assert run.state.stage is None
    run.test(model, loader(2), verbose=False)
    run.predict(model, loader(5))
    assert (run.num_test_batches, run.num_predict_batches) == ([2], [5])
    assert set(model.seen) == {
        RunningStage.TRAINING, RunningStage.VALIDATING, RunningStage.SANITY_CHECKING, RunningStage.TESTING,
        RunningStage.PREDICTING,
    }  # fmt: skip
    read_all(run)


def test_what_can_be_set() -> None:
    run = trainer()
    for stage in ("training", "validating", "testing", "predicting", "sanity_checking"):
        setattr(run, stage, True)
        assert getattr(run, stage)
        setattr(run, stage, False)
        assert run.state.stage is None
    optimizers = [torch.optim.SGD([torch.ones(1)], lr=1)]
    run.optimizers, run.loggers, run.should_stop = optimizers, [], True
    assert run.optimizers[0] is optimizers[0]
    run.fit_loop.max_epochs = 5
    run.should_stop = False


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"max_epochs": 3}, 12),
        ({"max_epochs": 3, "accumulate_grad_batches": 3}, 6),
        ({"max_epochs": 3, "max_steps": 5}, 5),
        ({"max_epochs": -1, "max_steps": 7}, 7),
        ({"max_epochs": -1}, math.inf),
        ({"max_epochs": 3, "limit_train_batches": 2}, 6),
        ({"max_epochs": 3, "limit_train_batches": 0.5}, 6),
        ({"fast_dev_run": True}, 1),
    ],
    ids=str,
)
def test_SC5_estimated_stepping_batches_has_no_side_effect(arguments: dict[str, Any], expected: float) -> None:
    estimates: list[float] = []

    class Asks(Model):
        def configure_optimizers(self) -> Any:
            estimates.append(self.trainer.estimated_stepping_batches)
            return super().configure_optimizers()

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            estimates.append(self.trainer.estimated_stepping_batches)
            self.trainer.should_stop = estimates[0] == math.inf

    def train(model: Model) -> Tensor:
        torch.manual_seed(4)
        trainer(**arguments).fit(model, DataLoader(torch.rand(4, 2), shuffle=True), loader(1))
        return torch.cat([value.flatten() for value in model.state_dict().values()])

    torch.manual_seed(3)
    asks = Asks()
    plain = Model()
    plain.load_state_dict(asks.state_dict())
    weights = train(asks)
    if expected < math.inf:
        assert torch.equal(weights, train(plain))
    assert set(estimates) == {expected}


def test_estimated_stepping_batches_outside_of_fit_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="is known inside fit"):
        _ = trainer().estimated_stepping_batches


def test_fit_goes_on_with_the_same_module_and_anew_with_another() -> None:
    run, model = trainer(), Model()
    run.fit(model, loader(), loader(1))
    run.fit_loop.max_epochs = 3
    run.fit(model, loader(), loader(1))
    assert (run.current_epoch, run.global_step) == (3, 12)
    other = Model()
    run.fit(other, loader(), loader(1))
    assert (run.current_epoch, run.global_step) == (3, 12)
    assert len(other.seen) == 3 * 5 + 1


def test_two_modules_may_log_the_same_name_differently() -> None:
    class Other(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = self.net(batch).mean()
            self.log("loss", loss, on_epoch=True, on_step=False)
            return loss

    run = trainer()
    run.fit(Model(), loader(), loader(1))
    run.fit(Other(), loader(), loader(1))
    assert set(run.callback_metrics) == {"loss", "val_loss"}


def test_a_module_knows_its_trainer_only_while_there_is_one() -> None:
    model = Model()
    with pytest.raises(RuntimeError, match="not attached to a Trainer"):
        _ = model.trainer
    run = trainer()
    run.fit(model, loader(), loader(1))
    assert model.trainer is run
    del run
    with pytest.raises(RuntimeError, match="not attached to a Trainer"):
        _ = model.trainer
    with pytest.warns(LeydenWarning, match="called without a Trainer"):
        model.log("x", 1.0)


# ---------------------------------------------------------------------------------------------- data modules


class Data(L.LightningDataModule):
    """Notes the order in which it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def prepare_data(self) -> None:
        self.calls.append("prepare_data")

    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        self.calls.append(f"setup {stage}")

    def teardown(self, stage: str) -> None:
        self.calls.append(f"teardown {stage}")

    def train_dataloader(self) -> Any:
        self.calls.append("train")
        return loader(2)

    def val_dataloader(self) -> Any:
        self.calls.append("val")
        return loader(1)

    def test_dataloader(self) -> Any:
        self.calls.append("test")
        return loader(1)

    def predict_dataloader(self) -> Any:
        self.calls.append("predict")
        return loader(1)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.calls.append("before")
        return batch

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        self.calls.append(f"to {device}")
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.calls.append("after")
        return batch


def test_a_data_module_in_each_entry_point() -> None:
    move = ["before", "to cpu", "after"]
    run, model, data = trainer(num_sanity_val_steps=0), Model(), Data()
    expected = {
        "fit": ["prepare_data", "setup fit", "train", "val", *move * 3, "teardown fit"],
        "validate": ["prepare_data", "setup validate", "val", *move, "teardown validate"],
        "test": ["prepare_data", "setup test", "test", *move, "teardown test"],
        "predict": ["prepare_data", "setup predict", "predict", *move, "teardown predict"],
    }
    for entry, calls in expected.items():
        data.calls = []
        getattr(run, entry)(model, datamodule=data)
        assert data.calls == calls
        assert run.datamodule is data
        assert data.trainer is run
    data.calls = []
    run.test(model, data)  # in the place of the loaders
    assert data.calls == expected["test"]


def test_a_data_module_need_not_call_our_constructor() -> None:
    class Bare(Data):
        def __init__(self) -> None:
            self.calls = []

    data = Bare()
    assert data.trainer is None
    trainer().fit(Model(), datamodule=data)


def test_the_module_provides_what_the_data_module_does_not() -> None:
    class Partly(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader(2)

    class Loads(Model):
        def val_dataloader(self) -> Any:
            return loader(3)

    run = trainer()
    run.fit(Loads(), datamodule=Partly())
    assert run.num_val_batches == [3]


def test_from_datasets() -> None:
    data = L.LightningDataModule.from_datasets(
        TensorDataset(torch.ones(6, 2)), [TensorDataset(torch.ones(4, 2))] * 2,
        TensorDataset(torch.ones(2, 2)), TensorDataset(torch.ones(5, 2)), batch_size=2,
    )  # fmt: skip
    assert len(data.train_dataloader()) == 3
    assert [len(each) for each in data.val_dataloader()] == [2, 2]
    assert len(data.test_dataloader()) == 1
    assert len(data.predict_dataloader()) == 3
    assert isinstance(data.train_dataloader().sampler, torch.utils.data.RandomSampler)
    assert "Train dataset: size=6" in str(data)


def test_hyperparameters_of_module_and_data_module_with_one_name(tmp_path: Path) -> None:
    class HasRate(Model):
        def __init__(self, rate: float = 1.0) -> None:
            super().__init__()
            self.save_hyperparameters()

    class AlsoHasRate(Data):
        def __init__(self, rate: float = 2.0) -> None:
            super().__init__()
            self.save_hyperparameters()

    run = trainer(logger=L.loggers.CSVLogger(tmp_path))
    run.fit(HasRate(), datamodule=AlsoHasRate())
    assert "datamodule/rate: 2.0" in Path(run.log_dir or "", "hparams.yaml").read_text()


def test_data_modules_given_twice_are_an_error() -> None:
    with pytest.raises(MisconfigurationException, match="Two data modules"):
        trainer().fit(Model(), Data(), datamodule=Data())
