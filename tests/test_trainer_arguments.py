# SPDX-License-Identifier: Apache-2.0
"""The arguments of the Trainer: names, defaults, forms, errors, and what each of them does."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import leyden as L
from leyden.callbacks import EarlyStopping, ModelCheckpoint, ModelSummary, Timer, TQDMProgressBar
from leyden.errors import LeydenWarning, MisconfigurationException
from leyden.loggers import CSVLogger, DummyLogger, TensorBoardLogger
from leyden.profilers import SimpleProfiler
from leyden.strategies import SingleDeviceStrategy

OURS = {
    "semantics": None, "compile": False, "cuda_graphs": False, "fused_optimizers": False, "fast_data": True,
    "num_workers": None, "keep_global_batch": True,
}  # fmt: skip
DEFAULTS = {
    "accelerator": "auto", "strategy": "auto", "devices": "auto", "num_nodes": 1, "precision": None, "logger": None,
    "callbacks": None, "fast_dev_run": False, "max_epochs": None, "min_epochs": None, "max_steps": -1, "min_steps": None,
    "max_time": None, "limit_train_batches": None, "limit_val_batches": None, "limit_test_batches": None,
    "limit_predict_batches": None, "overfit_batches": 0.0, "val_check_interval": None, "check_val_every_n_epoch": 1,
    "num_sanity_val_steps": None, "log_every_n_steps": None, "enable_checkpointing": None, "enable_progress_bar": None,
    "enable_model_summary": None, "accumulate_grad_batches": 1, "gradient_clip_val": None,
    "gradient_clip_algorithm": None, "deterministic": None, "benchmark": None, "inference_mode": True,
    "use_distributed_sampler": True, "profiler": None, "detect_anomaly": False, "barebones": False, "plugins": None,
    "sync_batchnorm": False, "reload_dataloaders_every_n_epochs": 0, "default_root_dir": None,
    "enable_autolog_hparams": True, "model_registry": None,
}  # fmt: skip
QUIET: dict[str, Any] = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    "accelerator": "cpu",
}  # fmt: skip


def trainer(**arguments: Any) -> L.Trainer:
    return L.Trainer(**{**QUIET, "max_epochs": 1, "num_sanity_val_steps": 0, **arguments})


class Counting(L.LightningModule):
    """Counts its batches, and after how many of training it was validated."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1)
        self.counts = dict.fromkeys(("train", "val", "test", "predict"), 0)
        self.validated_at: list[int] = []
        self.inference: list[bool] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.counts["train"] += 1
        loss = self.net(batch).mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.counts["val"] += 1
        self.log("val_loss", self.net(batch).mean())

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.validated_at.append(self.counts["train"])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.counts["test"] += 1
        self.inference.append(torch.is_inference_mode_enabled())

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        self.counts["predict"] += 1

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader(n: int = 10) -> Any:
    return DataLoader(torch.ones(n, 2))


class NoLength:
    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.ones(self.n, 1, 2))


def test_the_arguments_are_lightnings_with_its_defaults() -> None:
    parameters = dict(inspect.signature(L.Trainer.__init__).parameters)
    assert parameters.pop("self")
    assert {name: parameters.pop(name).default for name in OURS} == OURS
    assert {name: parameter.default for name, parameter in parameters.items()} == DEFAULTS
    assert {parameter.kind for parameter in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("max_epoch", "max_epochs"),
        ("precison", "precision"),
        ("callback", "callbacks"),
        ("limit_training_batches", "limit_train_batches"),
    ],
)
def test_an_unknown_argument_is_an_error_with_the_closest_one(name: str, meant: str) -> None:
    with pytest.raises(TypeError, match=rf"got an unexpected keyword argument '{name}'\. Did you mean '{meant}'\?"):
        L.Trainer(**{name: 3})


def test_arguments_go_by_name() -> None:
    with pytest.raises(TypeError, match="by name only; 'cpu' was given without one"):
        L.Trainer("cpu")  # type: ignore[misc]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"accelerator": "cpus"}, r"accelerator='cpus'.*Did you mean 'cpu'\?"),
    ({"accelerator": "tpu"}, "accelerator='tpu'`"),
    ({"devices": 0}, "devices=0"),
    ({"devices": "0"}, "devices='0'"),
    ({"devices": []}, r"devices=\[\]"),
    ({"devices": "many"}, "devices='many'"),
    ({"num_nodes": 2}, r"Trainer\(num_nodes=2\): no launcher has started this process"),
    (
        {"devices": 2, "strategy": "single_device"},
        r"Trainer\(devices=2, num_nodes=1\) asks for 2 devices.*Use strategy='ddp'",
    ),
    ({"num_nodes": 0}, r"Trainer\(num_nodes=0\) is not valid: it must be an int >= 1"),
    ({"strategy": "xla"}, r"Trainer\(strategy='xla'\) is not there: TPUs"),
    ({"strategy": "singledevice"}, "Did you mean 'single_device'"),
    ({"precision": "16mixed"}, "Precision '16mixed' is invalid.*Did you mean '16-mixed'"),
    ({"precision": 8}, "Precision 8 is invalid"),
    ({"logger": "tensorboard"}, r"Trainer\(logger='tensorboard'\): a logger must be"),
    ({"logger": [3]}, r"Trainer\(logger=3\)"),
    ({"callbacks": 3}, r"Trainer\(callbacks=3\): a callback must be a Callback object, not int"),
    ({"callbacks": [Timer]}, r"Trainer\(callbacks=Timer\).*not a class. Did you mean Timer\(\.\.\.\)"),
    ({"callbacks": [TQDMProgressBar(), TQDMProgressBar()], "enable_progress_bar": True}, "2 progress bars"),
    ({"callbacks": ModelCheckpoint()}, r"Trainer\(enable_checkpointing=False\) contradicts the ModelCheckpoint"),
    ({"callbacks": ModelSummary()}, r"Trainer\(enable_model_summary=False\) contradicts the ModelSummary"),
    ({"callbacks": TQDMProgressBar()}, r"Trainer\(enable_progress_bar=False\) contradicts the TQDMProgressBar"),
    ({"fast_dev_run": -1}, "fast_dev_run=-1"),
    ({"fast_dev_run": "yes"}, "fast_dev_run='yes'.*number of batches, or True or False"),
    ({"max_epochs": -2}, "max_epochs=-2.*a non-negative integer or -1"),
    ({"max_epochs": 1.5}, r"max_epochs=1\.5"),
    ({"max_epochs": "3"}, "max_epochs='3'"),
    ({"max_epochs": True}, "max_epochs=True"),
    ({"min_epochs": -1}, "min_epochs=-1"),
    ({"max_steps": -2}, "max_steps=-2"),
    ({"max_steps": None}, "max_steps=None"),
    ({"min_steps": 1.0}, r"min_steps=1\.0"),
    ({"max_time": "1:2"}, "max_time='1:2'.*'DD:HH:MM:SS'"),
    ({"max_time": 5}, "max_time=5"),
    ({"max_time": {"hour": 1}}, "max_time=.*datetime.timedelta"),
    ({"limit_train_batches": 1.5}, r"limit_train_batches=1\.5.*a fraction from 0\.0 to 1\.0"),
    ({"limit_val_batches": -1}, "limit_val_batches=-1"),
    ({"limit_test_batches": "3"}, "limit_test_batches='3'"),
    ({"limit_predict_batches": True}, "limit_predict_batches=True"),
    ({"overfit_batches": 1.5}, r"overfit_batches=1\.5"),
    ({"val_check_interval": 1.5}, r"val_check_interval=1\.5.*a fraction of an epoch"),
    ({"val_check_interval": -1}, "val_check_interval=-1"),
    ({"val_check_interval": "5 foo"}, "val_check_interval='5 foo'.*'500 steps'"),
    ({"val_check_interval": "0 steps"}, "val_check_interval='0 steps'"),
    ({"check_val_every_n_epoch": 0}, "check_val_every_n_epoch=0"),
    ({"check_val_every_n_epoch": None, "val_check_interval": 0.5}, "check_val_every_n_epoch=None counts batches"),
    (
        {"check_val_every_n_epoch": None, "val_check_interval": "0.5 epoch"},
        "check_val_every_n_epoch=None counts batches",
    ),
    ({"num_sanity_val_steps": -2}, "num_sanity_val_steps=-2"),
    ({"log_every_n_steps": -1}, "log_every_n_steps=-1"),
    ({"accumulate_grad_batches": 0}, "accumulate_grad_batches=0"),
    ({"accumulate_grad_batches": {0: 2}}, "accumulate_grad_batches={0: 2}"),
    ({"gradient_clip_val": "1"}, "gradient_clip_val='1'.*an int or a float, or None"),
    ({"gradient_clip_algorithm": "nrm"}, "gradient_clip_algorithm='nrm'.*Did you mean 'norm'"),
    ({"deterministic": "yes"}, "deterministic='yes'.*'warn'"),
    ({"benchmark": "yes"}, "benchmark='yes'"),
    ({"inference_mode": "no"}, "inference_mode='no'"),
    ({"use_distributed_sampler": 3}, "use_distributed_sampler=3"),
    ({"keep_global_batch": "no"}, "keep_global_batch='no'"),
    ({"detect_anomaly": "x"}, "detect_anomaly='x'"),
    ({"enable_progress_bar": "x"}, "enable_progress_bar='x'"),
    ({"profiler": "simpel"}, "profiler='simpel'.*Did you mean 'simple'"),
    ({"profiler": 3}, "profiler=3"),
    ({"plugins": "x"}, "plugins='x'"),
    ({"sync_batchnorm": 3}, "sync_batchnorm=3"),
    ({"reload_dataloaders_every_n_epochs": -1}, "reload_dataloaders_every_n_epochs=-1"),
    ({"default_root_dir": 3}, "default_root_dir=3.*a path"),
    ({"semantics": "lightnin"}, "semantics='lightnin'.*Did you mean 'lightning'"),
]


@pytest.mark.parametrize(("arguments", "match"), WRONG, ids=[", ".join(map(str, each)) for each, _ in WRONG])
def test_a_value_that_cannot_be_is_an_error_that_names_it(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises((MisconfigurationException, TypeError), match=match):
        L.Trainer(**{**QUIET, **arguments})


def named(value: Any) -> str:
    """The name of a case, which is the same in each process: without addresses."""
    return re.sub(r" at 0x\w+", "", str(value))


RIGHT: list[dict[str, Any]] = [
    {"accelerator": "CPU"}, {"devices": "1"}, {"devices": -1}, {"devices": "auto"}, {"strategy": "SINGLE_DEVICE"},
    {"strategy": SingleDeviceStrategy("cpu")}, {"precision": 64}, {"precision": "bf16"}, {"precision": "32"},
    {"max_time": "00:01:00:00"}, {"max_time": "30min"}, {"max_time": timedelta(hours=1)}, {"max_time": {"hours": 2}},
    {"val_check_interval": 3}, {"val_check_interval": 0.25}, {"val_check_interval": "500 steps"},
    {"val_check_interval": "100 batches"}, {"val_check_interval": "0.25 epoch"}, {"val_check_interval": "30min"},
    {"val_check_interval": "00:00:10:00"}, {"val_check_interval": timedelta(minutes=5)},
    {"val_check_interval": {"minutes": 5}}, {"check_val_every_n_epoch": None, "val_check_interval": 500},
    {"max_epochs": np.int64(3), "limit_train_batches": np.int32(4), "limit_val_batches": np.float32(0.5)},
    {"gradient_clip_val": 1, "gradient_clip_algorithm": "value"}, {"profiler": SimpleProfiler()}, {"plugins": []},
    {"callbacks": (EarlyStopping("x"),)}, {"logger": (logger for logger in [CSVLogger("x")])}, {"overfit_batches": 0.5},
]  # fmt: skip


@pytest.mark.parametrize("arguments", RIGHT, ids=named)
def test_every_form_is_taken(arguments: dict[str, Any]) -> None:
    made = L.Trainer(**{**QUIET, **arguments})
    assert made.max_epochs is None or isinstance(made.max_epochs, int)


def test_16_mixed_on_a_cpu_becomes_bf16_mixed() -> None:
    with pytest.warns(LeydenWarning, match="using 'bf16-mixed'"):
        assert trainer(precision="16-mixed").precision == "bf16-mixed"


def test_the_environment_stands_for_arguments_that_are_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_TRAINER_MAX_EPOCHS", "7")
    monkeypatch.setenv("PL_TRAINER_PRECISION", "64-true")
    monkeypatch.setenv("PL_TRAINER_LIMIT_VAL_BATCHES", "0.5")
    monkeypatch.setenv("PL_TRAINER_MIN_STEPS", "")
    made = L.Trainer(**QUIET, limit_val_batches=3)
    assert (made.max_epochs, made.precision, made.limit_val_batches, made.min_steps) == (7, "64-true", 3, None)


# ---------------------------------------------------------------------------------------------- loggers, callbacks


def test_the_defaults(tmp_path: Path) -> None:
    made = L.Trainer(default_root_dir=tmp_path, accelerator="cpu")
    assert list(tmp_path.iterdir()) == []  # nothing is written before somebody asks where
    assert isinstance(made.logger, TensorBoardLogger)
    assert made.log_dir == str(tmp_path / "leyden_logs" / "version_0")
    assert [type(callback).__name__ for callback in made.callbacks] == [
        "RichProgressBar",
        "ModelSummary",
        "ModelCheckpoint",
    ]


def test_default_root_dir_expands_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert trainer(default_root_dir="~/runs").default_root_dir == str(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    assert trainer().default_root_dir == str(tmp_path)


def test_callbacks_run_in_their_order_with_checkpoints_last(tmp_path: Path) -> None:
    first, second = L.Callback(), EarlyStopping("x")
    made = L.Trainer(callbacks=[ModelCheckpoint(tmp_path), first, second], accelerator="cpu", enable_progress_bar=False)
    names = [type(callback).__name__ for callback in made.callbacks]
    assert names == ["Callback", "EarlyStopping", "ModelSummary", "ModelCheckpoint"]
    assert made.checkpoint_callbacks == [made.checkpoint_callback]
    assert made.early_stopping_callbacks == [second]


def test_two_callbacks_with_one_state_key_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="same state_key"):
        trainer(callbacks=[EarlyStopping("x"), EarlyStopping("x")])
    trainer(callbacks=[EarlyStopping("x"), EarlyStopping("y")])


def test_the_callbacks_of_the_module_replace_those_of_their_type() -> None:
    class Model(Counting):
        def configure_callbacks(self) -> Any:
            return [mine]

    mine, theirs, other = EarlyStopping("val_loss"), EarlyStopping("nonsense"), L.Callback()
    fit = trainer(callbacks=[theirs, other])
    fit.fit(Model(), loader(), loader(1))
    assert fit.callbacks == [other, mine] or fit.callbacks == [mine, other]
    assert theirs not in fit.callbacks


def test_a_timer_in_callbacks_wins_over_max_time() -> None:
    timer = Timer(timedelta(hours=1))
    assert trainer(callbacks=timer, max_time="00:00:00:01").callbacks == [timer]


def test_max_time_ends_the_fit() -> None:
    fit = trainer(max_time=timedelta(milliseconds=1), max_epochs=-1)
    fit.fit(Counting(), loader(), loader(1))
    assert any(isinstance(callback, Timer) for callback in fit.callbacks)


# ---------------------------------------------------------------------------------------------- bounds


@pytest.mark.parametrize(
    ("arguments", "steps", "epochs"),
    [
        ({"max_epochs": 2}, 20, 2),
        ({"max_epochs": 0}, 0, 0),
        ({"max_epochs": 5, "max_steps": 13}, 13, 2),
        ({"max_epochs": -1, "max_steps": 13}, 13, 2),
        ({"max_epochs": None, "max_steps": 3}, 3, 1),
        ({"max_epochs": 3, "max_steps": 0}, 0, 0),
        ({"max_epochs": 2, "max_steps": 4, "accumulate_grad_batches": 4}, 4, 2),
        ({"max_epochs": 2, "limit_train_batches": 0}, 0, 0),
    ],
)
def test_bounds(arguments: dict[str, Any], steps: int, epochs: int) -> None:
    fit = trainer(**arguments)
    fit.fit(Counting(), loader(), loader(1))
    assert (fit.global_step, fit.current_epoch) == (steps, epochs)


def test_no_bound_is_a_thousand_epochs_with_a_warning() -> None:
    fit = L.Trainer(**QUIET)
    stop = L.Callback()
    stop.on_train_batch_end = lambda trainer, *args: setattr(trainer, "should_stop", True)  # type: ignore[method-assign]
    fit.callbacks.append(stop)
    with pytest.warns(LeydenWarning, match="stops after 1000 epochs"):
        fit.fit(Counting(), loader(), loader(1))
    assert fit.max_epochs == 1000


@pytest.mark.parametrize(
    ("arguments", "batches"),
    [
        ({}, 3),
        ({"min_epochs": 2}, 20),
        ({"min_steps": 7}, 10),  # the least number of steps means at least an epoch, as with Lightning
        ({"min_epochs": 0, "min_steps": 7}, 7),
        ({"min_steps": 12}, 12),
        ({"min_epochs": 1, "min_steps": 2}, 10),
        ({"min_epochs": 1, "min_steps": 15}, 15),
        ({"min_steps": 5, "max_steps": 4}, 4),
    ],
)
def test_a_wish_to_stop_is_granted_after_the_least_that_is_asked_for(arguments: dict[str, Any], batches: int) -> None:
    class Stops(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                trainer.should_stop = True

    model = Counting()
    trainer(max_epochs=5, callbacks=Stops(), limit_val_batches=0, **arguments).fit(model, loader(), loader(1))
    assert model.counts["train"] == batches


# ---------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize(("limit", "count"), [(1.0, 10), (0.5, 5), (3, 3), (1, 1), (99, 10), (None, 10)])
def test_limits(limit: Any, count: int) -> None:
    names = ("train", "val", "test", "predict")
    run, model = trainer(**{f"limit_{name}_batches": limit for name in names}), Counting()
    run.fit(model, loader(), loader())
    run.test(model, loader(), verbose=False)
    run.predict(model, loader())
    assert model.counts == dict.fromkeys(names, count)
    assert run.num_training_batches == count
    assert run.num_val_batches == run.num_test_batches == run.num_predict_batches == [count]


def test_a_limit_of_zero_runs_nothing() -> None:
    run, model = trainer(limit_val_batches=0, limit_test_batches=0.0, limit_predict_batches=0), Counting()
    run.fit(model, loader(), loader())
    assert run.validate(model, loader()) == []
    assert run.test(model, loader()) == []
    assert run.predict(model, loader()) == []
    assert model.counts == {"train": 10, "val": 0, "test": 0, "predict": 0}
    assert not run.enable_validation


def test_a_fraction_of_less_than_a_batch_or_of_an_unknown_length_is_an_error() -> None:
    with pytest.raises(MisconfigurationException, match=r"limit_train_batches=0\.05.*less than one"):
        trainer(limit_train_batches=0.05).fit(Counting(), loader(), loader(1))
    with pytest.raises(MisconfigurationException, match=r"limit_val_batches=0\.5.*not known"):
        trainer(limit_val_batches=0.5).fit(Counting(), loader(), NoLength(3))


@pytest.mark.parametrize(("n", "batches"), [(True, 1), (1, 1), (3, 3)])
def test_fast_dev_run(n: Any, batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stopping = EarlyStopping("never_logged")
    run = L.Trainer(
        fast_dev_run=n, max_epochs=7, logger=True, callbacks=[stopping, ModelCheckpoint(monitor="nonsense")],
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, val_check_interval=0.1,
    )  # fmt: skip
    model = Counting()
    run.fit(model, loader(), loader())
    run.test(model, loader(), verbose=False)
    run.predict(model, loader())
    assert model.counts == {"train": batches, "val": batches, "test": batches, "predict": batches}
    assert (run.max_epochs, run.max_steps, run.current_epoch) == (1, batches, 1)
    assert isinstance(run.logger, DummyLogger)
    assert list(tmp_path.rglob("*")) == []
    assert run.fast_dev_run


# ---------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize(
    ("arguments", "data", "at"),
    [
        ({}, loader(), [10, 20]),
        ({"val_check_interval": 0.5}, loader(), [5, 10, 15, 20]),
        ({"val_check_interval": 0.3}, loader(), [3, 6, 9, 13, 16, 19]),
        ({"val_check_interval": 4}, loader(), [4, 8, 14, 18]),
        ({"val_check_interval": 1}, loader(3), [1, 2, 3, 4, 5, 6]),
        ({"val_check_interval": 15}, loader(), [15]),
        ({"val_check_interval": 7, "check_val_every_n_epoch": None}, loader(), [7, 14]),
        ({"val_check_interval": "4 steps"}, loader(), [4, 8, 12, 16, 20]),
        ({"val_check_interval": "2 steps", "accumulate_grad_batches": 3}, loader(), [6, 10, 16, 20]),
        ({"val_check_interval": "5 batches"}, loader(), [5, 10, 15, 20]),
        ({"val_check_interval": "0.5 epoch"}, loader(), [5, 10, 15, 20]),
        ({"val_check_interval": timedelta(seconds=0)}, loader(2), [1, 2, 3, 4]),
        ({"val_check_interval": timedelta(hours=1)}, loader(), []),
        ({"check_val_every_n_epoch": 2}, loader(), [20]),
        ({"check_val_every_n_epoch": 3}, loader(), []),
        ({"val_check_interval": 4}, NoLength(10), [4, 8, 14, 18]),
        ({"val_check_interval": 1.0}, NoLength(10), [10, 20]),
        ({"limit_train_batches": 0.5}, loader(), [5, 10]),
        ({"limit_val_batches": 0}, loader(), []),
    ],
    ids=named,
)
def test_V1_when_validation_runs(arguments: dict[str, Any], data: Any, at: list[int]) -> None:
    model = Counting()
    trainer(max_epochs=2, **arguments).fit(model, data, loader(1))
    assert model.validated_at == at


def test_V1_a_fraction_of_an_unknown_epoch_is_an_error() -> None:
    with pytest.raises(MisconfigurationException, match=r"val_check_interval=0\.5.*has no\s+length"):
        trainer(val_check_interval=0.5).fit(Counting(), NoLength(3), loader(1))


@pytest.mark.parametrize(("steps", "batches"), [(0, 0), (1, 1), (2, 2), (99, 5), (-1, 5), (None, 2)])
def test_sanity_steps(steps: Any, batches: int) -> None:
    class Sanity(L.Callback):
        def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
            counts.append(pl_module.counts["val"])
            assert trainer.num_sanity_val_batches == [batches]

    counts: list[int] = []
    run, model = trainer(num_sanity_val_steps=steps, callbacks=Sanity()), Counting()
    run.fit(model, loader(1), loader(5))
    assert counts == ([batches] if batches else [])
    assert run.num_sanity_val_steps == (math.inf if steps == -1 else 2 if steps is None else steps)


def test_the_sanity_check_leaves_no_trace() -> None:
    seen: list[Any] = []

    class Model(Counting):
        def on_train_start(self) -> None:
            seen.append((dict(self.trainer.callback_metrics), dict(self.trainer.logged_metrics), torch.rand(1).item()))

    for steps in (0, 2):
        torch.manual_seed(3)
        run = trainer(num_sanity_val_steps=steps)
        run.fit(Model(), DataLoader(torch.ones(2, 2), shuffle=True), DataLoader(torch.ones(3, 2), shuffle=True))
    assert seen[0][:2] == ({}, {})
    assert seen[0] == seen[1]


@pytest.mark.parametrize("every", [0, 1, 2])
def test_reload_dataloaders_every_n_epochs(every: int) -> None:
    asked: list[Any] = []

    class Model(Counting):
        def train_dataloader(self) -> Any:
            asked.append(("train", self.current_epoch))
            return loader(2)

        def val_dataloader(self) -> Any:
            asked.append(("val", self.current_epoch))
            return loader(1)

    trainer(max_epochs=4, reload_dataloaders_every_n_epochs=every).fit(Model())
    epochs = {0: [0], 1: [0, 1, 2, 3], 2: [0, 2]}[every]
    assert asked == [(name, epoch) for epoch in epochs for name in ("train", "val")]


# ---------------------------------------------------------------------------------------------- the rest


def test_deterministic_holds_for_the_run_only() -> None:
    class Model(Counting):
        def on_train_start(self) -> None:
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.backends.cudnn.benchmark

    torch.backends.cudnn.benchmark = True
    try:
        trainer(deterministic=True).fit(Model(), loader(1), loader(1))
        assert torch.backends.cudnn.benchmark
    finally:
        torch.backends.cudnn.benchmark = False
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("inference", [True, False])
def test_inference_mode(inference: bool) -> None:
    model = Counting()
    trainer(inference_mode=inference).test(model, loader(1), verbose=False)
    assert model.inference == [inference]


def test_detect_anomaly_finds_the_operation() -> None:
    class Model(Counting):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return torch.sqrt(self.net(batch).sum() * 0 - 1)

    with pytest.warns(UserWarning, match="Error detected in SqrtBackward0"), pytest.raises(RuntimeError, match="nan"):
        trainer(detect_anomaly=True).fit(Model(), loader(1), loader(1))
    assert not torch.is_anomaly_enabled()


def test_the_simple_profiler_reports(tmp_path: Path) -> None:
    profiler = SimpleProfiler(dirpath=tmp_path, filename="report")
    run = trainer(profiler=profiler)
    assert run.profiler is profiler
    run.fit(Counting(), loader(2), loader(1))
    text = "".join(path.read_text() for path in tmp_path.iterdir())
    for action in (
        "[Strategy]SingleDeviceStrategy.training_step", "[Strategy]SingleDeviceStrategy.backward", "run_training_batch",
        "[Strategy]SingleDeviceStrategy.optimizer_step", "[Strategy]SingleDeviceStrategy.validation_step",
        "[_TrainingEpochLoop].train_dataloader_next", "[LightningModule]Counting.on_validation_epoch_end",
    ):  # fmt: skip
        assert action in text
    assert isinstance(trainer(profiler="simple").profiler, SimpleProfiler)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_init_module_builds_in_the_precision_of_the_run(precision: Any) -> None:
    run = trainer(precision=precision)
    with run.init_module():
        layer = nn.Linear(2, 2)
    assert layer.weight.dtype == {"64-true": torch.float64, "bf16-true": torch.bfloat16}[precision]
    assert torch.get_default_dtype() == torch.float32
    with run.init_module(empty_init=True):
        nn.Linear(2, 2)


@pytest.mark.parametrize(
    "arguments",
    [
        {"enable_checkpointing": True}, {"logger": True}, {"enable_progress_bar": True}, {"log_every_n_steps": 1},
        {"enable_model_summary": True}, {"num_sanity_val_steps": 1}, {"fast_dev_run": True}, {"detect_anomaly": True},
        {"profiler": "simple"},
    ],
    ids=named,
)  # fmt: skip
def test_barebones_contradicts_what_costs_time(arguments: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match=rf"barebones=True, {next(iter(arguments))}="):
        L.Trainer(barebones=True, **arguments)


def test_barebones_has_nothing_attached() -> None:
    run = L.Trainer(barebones=True, max_epochs=1, accelerator="cpu")
    assert (run.callbacks, run.loggers, run.log_every_n_steps, run.num_sanity_val_steps) == ([], [], 0, 0)
    with pytest.warns(LeydenWarning, match="does nothing under Trainer\\(barebones=True\\)"):
        run.fit(Counting(), loader(2), loader(1))
    assert run.callback_metrics == {}


def test_several_loggers_all_get_rows(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path, name="one"), CSVLogger(tmp_path, name="two")]
    run = trainer(logger=loggers, log_every_n_steps=2)
    run.fit(Counting(), loader(4), loader(1))
    assert run.loggers == loggers
    assert run.logger is loggers[0]
    texts = [Path(logger.log_dir, "metrics.csv").read_text() for logger in loggers]
    assert texts[0] == texts[1]
    assert "loss" in texts[0]


def test_knobs_can_be_turned_between_runs_and_are_checked() -> None:
    run, model = trainer(), Counting()
    run.limit_train_batches = 3
    run.fit(model, loader(), loader(1))
    assert model.counts["train"] == 3
    with pytest.raises(MisconfigurationException, match="limit_train_batches=-1"):
        run.limit_train_batches = -1
