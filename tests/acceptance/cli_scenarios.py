# SPDX-License-Identifier: Apache-2.0
"""Command lines for one set of classes, written with Lightning's import names: it runs on Lightning and on Leyden.

    cd tests/acceptance
    <python with lightning 2.6.6 and jsonargparse> cli_scenarios.py recorded/lightning-2.6.6-command-line.json

records what Lightning makes of them; ``test_command_line.py`` runs them here and compares.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Union
from unittest import mock

import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor
from lightning.pytorch.cli import LightningCLI, LRSchedulerCallable, OptimizerCallable, SaveConfigCallback
from torch.utils.data import DataLoader


class Encoder(torch.nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(32, width)


class Boring(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(32, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.layer(batch).sum()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.layer(batch).sum())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.layer(batch).sum())

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.ones(8, 32), batch_size=4)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Model(Boring):
    """A model.

    Args:
        lr: Step size.
        size: Of something.
    """

    def __init__(self, lr: float = 0.1, size: int = 3, name: str | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.size = lr, size

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Injected(Boring):
    def __init__(
        self,
        encoder: torch.nn.Module,
        optimizer: OptimizerCallable = torch.optim.SGD,
        scheduler: LRSchedulerCallable = torch.optim.lr_scheduler.ConstantLR,
        activation: Union[str, Callable[[torch.Tensor], torch.Tensor]] = "relu",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder, self.optimizer, self.scheduler, self.activation = encoder, optimizer, scheduler, activation

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": self.scheduler(optimizer)}


class Bare(Boring):
    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.size = size


class Sized(Boring):
    def __init__(self, size: int, classes: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.size, self.classes = size, classes


class Data(LightningDataModule):
    def __init__(self, size: int = 8, folder: str = "data") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.size, self.classes = size, 5

    def train_dataloader(self) -> Any:
        return DataLoader(torch.ones(self.size, 32), batch_size=4)


def model_of(lr: float, size: int = 1) -> Model:
    """Make a model."""
    return Model(lr, size)


def trainer_of(max_epochs: int = 1, fast_dev_run: bool = False, callbacks: list[Callback] | None = None) -> Trainer:
    """Make a Trainer."""
    return Trainer(**{**QUIET, "max_epochs": max_epochs, "fast_dev_run": fast_dev_run, "callbacks": callbacks})


QUIET: dict[str, Any] = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
    "enable_checkpointing": False, "max_epochs": 1,
}  # fmt: skip


class Linking(LightningCLI):
    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.link_arguments("data.size", "model.size", compute_fn=lambda size: size * 2)
        parser.link_arguments("data.classes", "model.classes", apply_on="instantiate")


class Adams(LightningCLI):
    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_optimizer_args(torch.optim.Adam)
        parser.add_lr_scheduler_args(torch.optim.lr_scheduler.StepLR)
        parser.set_defaults({"optimizer.lr": 0.5, "lr_scheduler.step_size": 7})


class TwoGroups(LightningCLI):
    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_optimizer_args((torch.optim.SGD, torch.optim.Adam), nested_key="first", link_to="model.first")
        parser.add_optimizer_args(torch.optim.AdamW, nested_key="second", link_to="model.second")


class TwoOptimizers(Boring):
    def __init__(self, first: dict, second: dict) -> None:
        super().__init__()
        self.first, self.second = first, second


class WithCallback(LightningCLI):
    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_lightning_class_args(EarlyStopping, "early")
        parser.set_defaults({"early.monitor": "loss", "early.patience": 9})
        parser.add_argument("--note", type=str, default="none")


class Own(LightningCLI):
    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {**LightningCLI.subcommands(), "lr_of": {"model"}}


class OwnTrainer(Trainer):
    def lr_of(self, model: Any, factor: float = 2.0) -> None:
        """Print a multiple of the learning rate.

        Args:
            factor: Times this.
        """
        print("lr", model.lr * factor)


class Ordered(LightningCLI):
    def before_instantiate_classes(self) -> None:
        print("before_instantiate_classes", hasattr(self, "trainer"))

    def after_instantiate_classes(self) -> None:
        print("after_instantiate_classes", hasattr(self, "trainer"))

    def before_fit(self) -> None:
        print("before_fit")

    def after_fit(self) -> None:
        print("after_fit", self.trainer.global_step)


FILES = {
    "model.yaml": "model:\n  lr: 0.25\n  size: 4\n",
    "fit.yaml": "fit:\n  model:\n    lr: 0.75\n  trainer:\n    max_steps: 1\n",
    "trainer.yaml": "trainer:\n  max_epochs: 2\n  callbacks:\n  - class_path: EarlyStopping\n    init_args: {monitor: loss}\n",
    "classes.yaml": "model:\n  class_path: Model\n  init_args:\n    lr: 0.125\ndata:\n  class_path: Data\n",
    "unknown.yaml": "model:\n  lr: 0.1\n  lrr: 0.3\n",
    "wrong.yaml": "trainer:\n  max_epochs: many\n",
    "only_trainer.yaml": "max_epochs: 3\nlimit_train_batches: 1\n",
}

# name: the class of the command line, its arguments, the words, the environment
SCENARIOS: dict[str, tuple[Any, dict[str, Any], list[str], dict[str, str]]] = {
    "not run": (LightningCLI, {"model_class": Model, "run": False}, ["--model.lr=0.5"], {}),
    "fit": (LightningCLI, {"model_class": Model}, ["fit", "--model.lr", "0.5", "--trainer.max_epochs=2"], {}),
    "validate": (LightningCLI, {"model_class": Model}, ["validate", "--verbose=false"], {}),
    "test": (LightningCLI, {"model_class": Model}, ["test"], {}),
    "predict": (LightningCLI, {"model_class": Model}, ["predict", "--return_predictions=false"], {}),
    "data": (LightningCLI, {"model_class": Model, "datamodule_class": Data}, ["fit", "--data.size=4"], {}),
    "configs": (LightningCLI, {"model_class": Model}, ["fit", "-c", "model.yaml", "-c", "trainer.yaml", "--model.size=9"], {}),
    "config of a subcommand": (LightningCLI, {"model_class": Model}, ["--config=fit.yaml", "fit"], {}),
    "later wins": (LightningCLI, {"model_class": Model}, ["fit", "--model.lr=0.9", "--config=model.yaml"], {}),
    "config of a group": (LightningCLI, {"model_class": Model}, ["fit", "--trainer=only_trainer.yaml"], {}),
    "classes by name": (LightningCLI, {}, ["fit", "--model=Model", "--model.lr=0.4", "--data=Data", "--data.size=4"], {}),
    "classes in a config": (LightningCLI, {}, ["fit", "--config=classes.yaml"], {}),
    "subclass mode": (
        LightningCLI, {"model_class": Boring, "subclass_mode_model": True, "datamodule_class": Data,
        "subclass_mode_data": True}, ["fit", "--model=Sized", "--model.init_args.size=5", "--data=Data"], {},
    ),
    "injected": (
        LightningCLI, {"model_class": Injected},
        ["fit", "--model.encoder=Encoder", "--model.encoder.width=6", "--model.optimizer=Adam", "--model.optimizer.lr=0.3",
         "--model.scheduler=StepLR", "--model.scheduler.step_size=2", "--model.activation=torch.tanh"], {},
    ),
    "callbacks appended": (
        LightningCLI, {"model_class": Model},
        ["fit", "--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=loss", "--trainer.callbacks.patience=4",
         "--trainer.callbacks+=LambdaCallback", "--trainer.callbacks+=Timer", "--trainer.callbacks.interval=epoch"], {},
    ),
    "callbacks of the program": (
        LightningCLI, {"model_class": Model, "trainer_defaults": {"callbacks": [EarlyStopping("loss")]}},
        ["fit", "--trainer.callbacks=LambdaCallback"], {},
    ),
    "a callback with its own arguments": (WithCallback, {"model_class": Model}, ["fit", "--early.patience=2", "--note=x"], {}),
    "links": (Linking, {"model_class": Sized, "datamodule_class": Data}, ["fit", "--data.size=12"], {}),
    "optimizer": (LightningCLI, {"model_class": Bare}, ["fit", "--optimizer=Adam", "--optimizer.lr=0.01"], {}),
    "optimizer and scheduler": (
        LightningCLI, {"model_class": Bare},
        ["fit", "--optimizer=SGD", "--optimizer.lr=0.2", "--lr_scheduler=StepLR", "--lr_scheduler.step_size=50"], {},
    ),
    "plateau": (
        LightningCLI, {"model_class": Bare},
        ["fit", "--optimizer=SGD", "--optimizer.lr=0.2", "--lr_scheduler=lightning.pytorch.cli.ReduceLROnPlateau",
         "--lr_scheduler.monitor=loss"], {},
    ),
    "plateau by name": (
        LightningCLI, {"model_class": Bare},
        ["fit", "--optimizer=SGD", "--optimizer.lr=0.2", "--lr_scheduler=ReduceLROnPlateau", "--lr_scheduler.monitor=loss"], {},
    ),
    "one class of optimizer": (Adams, {"model_class": Bare}, ["fit", "--optimizer.weight_decay=0.1"], {}),
    "optimizers linked": (
        TwoGroups, {"model_class": TwoOptimizers, "run": False},
        ["--first=Adam", "--first.lr=0.1", "--second.lr=0.2"], {},
    ),
    "no optimizers": (LightningCLI, {"model_class": Model, "auto_configure_optimizers": False}, ["fit"], {}),
    "functions": (LightningCLI, {"model_class": model_of, "trainer_class": trainer_of}, ["fit", "--model.lr=0.4"], {}),
    "own subcommand": (Own, {"model_class": Model, "trainer_class": OwnTrainer}, ["lr_of", "--factor=3"], {}),
    "moments": (Ordered, {"model_class": Model}, ["fit"], {}),
    "seed": (LightningCLI, {"model_class": Model, "run": False}, ["--seed_everything=77"], {}),
    "no seed": (LightningCLI, {"model_class": Model, "run": False, "seed_everything_default": False}, [], {}),
    "default seed": (LightningCLI, {"model_class": Model, "run": False, "seed_everything_default": 123}, [], {}),
    "environment": (
        LightningCLI, {"model_class": Model, "parser_kwargs": {"default_env": True}}, ["fit"],
        {"PL_FIT__MODEL__LR": "0.6", "PL_FIT__TRAINER__MAX_STEPS": "1"},
    ),
    "environment names a config": (
        LightningCLI, {"model_class": Model, "parser_kwargs": {"fit": {"default_env": True}, "default_env": True}}, ["fit"],
        {"PL_FIT__CONFIG": "model.yaml"},
    ),
    "default config": (
        LightningCLI, {"model_class": Model, "parser_kwargs": {"fit": {"default_config_files": ["model.yaml"]}}}, ["fit"], {},
    ),
    "print": (LightningCLI, {"model_class": Model, "datamodule_class": Data}, ["fit", "--model.lr=2", "--print_config"], {}),
    "print what is set": (
        LightningCLI, {"model_class": Model}, ["fit", "--model.lr=2", "--print_config=skip_default"], {}),
    "print classes": (LightningCLI, {}, ["fit", "--model=Model", "--print_config=skip_default"], {}),
    "saved": (LightningCLI, {"model_class": Model, "datamodule_class": Data}, ["fit", "--model.name=x", "SAVE"], {}),
    "saved under a name": (
        LightningCLI, {"model_class": Model, "save_config_kwargs": {"config_filename": "it.yaml"}}, ["fit", "SAVE"], {}),
    "not saved": (LightningCLI, {"model_class": Model, "save_config_callback": None}, ["fit", "SAVE"], {}),
    "not saved in a dev run": (LightningCLI, {"model_class": Model}, ["fit", "--trainer.fast_dev_run=1", "SAVE"], {}),
    "unknown option": (LightningCLI, {"model_class": Model}, ["fit", "--model.lrr=1"], {}),
    "unknown key": (LightningCLI, {"model_class": Model}, ["fit", "--config=unknown.yaml"], {}),
    "wrong type": (LightningCLI, {"model_class": Model}, ["fit", "--config=wrong.yaml"], {}),
    "wrong type of an option": (LightningCLI, {"model_class": Model}, ["fit", "--trainer.max_steps=1.5"], {}),
    "unknown class": (LightningCLI, {"model_class": Model}, ["fit", "--trainer.callbacks=EarlyStoping"], {}),
    "unknown class path": (LightningCLI, {}, ["fit", "--model=no.such.Model"], {}),
    "not a subclass": (LightningCLI, {"model_class": Model}, ["fit", "--trainer.callbacks=torch.nn.ReLU"], {}),
    "required": (LightningCLI, {"model_class": Sized}, ["fit"], {}),
    "no model": (LightningCLI, {}, ["fit"], {}),
    "no subcommand": (LightningCLI, {"model_class": Model}, [], {}),
    "unknown subcommand": (LightningCLI, {"model_class": Model}, ["fot"], {}),
    "no such file": (LightningCLI, {"model_class": Model}, ["fit", "--config=none.yaml"], {}),
    "wrong flag": (LightningCLI, {"model_class": Model}, ["fit", "--print_config=nothing"], {}),
}  # fmt: skip


def plain(value: Any) -> Any:
    """Return a config as plain data, without what differs by name only: the home of a class, extra settings."""
    if hasattr(value, "as_dict"):
        value = value.as_dict()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items() if key not in ("config", "__default_config__")}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, str) and value.split(".")[0] in ("lightning", "leyden", "cli_scenarios", "__main__"):
        return value.rpartition(".")[2]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, type):
        return value.__name__
    name = getattr(value, "__name__", None)
    return f"<{name if isinstance(name, str) else type(value).__name__}>"


def run(name: str) -> dict[str, Any]:
    """Run one command line in a new folder; return what came of it."""
    cli_class, kwargs, words, environment = SCENARIOS[name]
    found: dict[str, Any] = {"status": 0}
    out, err, here = io.StringIO(), io.StringIO(), os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for file, text in FILES.items():
                Path(file).write_text(text)
            defaults = {} if "trainer_class" in kwargs and kwargs["trainer_class"] is trainer_of else dict(QUIET)
            arguments = [f"--trainer.default_root_dir={folder}" if word == "SAVE" else word for word in words]
            kwargs = {**kwargs, "trainer_defaults": {**defaults, **kwargs.get("trainer_defaults", {})}}
            with (
                mock.patch("sys.argv", ["any.py", *arguments]),
                mock.patch.dict(os.environ, environment),
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
                warnings.catch_warnings(record=True) as warned,
            ):
                warnings.simplefilter("always")
                cli = cli_class(**kwargs)
                found.update(objects(cli))
            found["overridden"] = any("will be overridden" in str(warning.message) for warning in warned)
        except SystemExit as end:
            found["status"] = end.code
        except Exception as error:  # what ends a command line is part of what is compared
            found["status"] = type(error).__name__
        finally:
            os.chdir(here)
        text = out.getvalue()
        if any(word.startswith("--print_config") for word in words) and found["status"] == 0:
            found["printed"] = plain(yaml.safe_load(text))
        elif found["status"] == 0:
            keep = ("lr", "before", "after")
            found["output"] = [line for line in text.splitlines() if line.startswith(keep)]
        for file in sorted(Path(folder).rglob("*.yaml")):
            if file.name not in FILES:
                saved = plain(yaml.safe_load(file.read_text()))
                (saved.get("trainer") or {}).pop("default_root_dir", None)
                found[f"file {file.name}"] = saved
    return found


def objects(cli: Any) -> dict[str, Any]:
    """Return what a command line has made."""
    config = plain(cli.config)
    for part in (config, config.get(cli.subcommand) or {}):
        (part.get("trainer") or {}).pop("default_root_dir", None)
    found: dict[str, Any] = {
        "subcommand": cli.subcommand,
        "config": config,
        "model": type(cli.model).__name__,
        "hparams": plain(dict(cli.model.hparams)),
        "attributes": {
            key: plain(value)
            for key, value in vars(cli.model).items()
            if key in ("lr", "size", "classes", "first", "second", "activation")
        },
        "data": plain(dict(cli.datamodule.hparams)) if cli.datamodule is not None else None,
        "callbacks": [
            [type(callback).__name__, getattr(callback, "patience", None), getattr(callback, "monitor", None)]
            for callback in cli.trainer.callbacks
            if isinstance(callback, (EarlyStopping, LearningRateMonitor, SaveConfigCallback))
            or type(callback).__name__ in ("LambdaCallback", "Timer")
        ],
        "max_epochs": cli.trainer.max_epochs,
        "step": cli.trainer.global_step,
        "optimizers": [
            [type(one).__name__, one.param_groups[0]["lr"], one.param_groups[0].get("weight_decay")]
            for one in cli.trainer.optimizers
        ],
        "schedulers": [[type(one.scheduler).__name__, one.monitor] for one in cli.trainer.lr_scheduler_configs],
    }
    return found


if __name__ == "__main__":
    sys.modules["cli_scenarios"] = sys.modules["__main__"]
    recorded = {name: run(name) for name in sys.argv[2:] or SCENARIOS}
    Path(sys.argv[1]).write_text(json.dumps(recorded, sort_keys=True, separators=(",", ":")) + "\n")
