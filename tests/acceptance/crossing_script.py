# SPDX-License-Identifier: Apache-2.0
"""Fits that leave checkpoints at several moments, and go on from those that the other framework left.

    python tests/acceptance/crossing_script.py leyden whole FOLDER [CASE ...]             write checkpoints and figures
    python tests/acceptance/crossing_script.py lightning.pytorch resume FOLDER [CASE ...] go on from each of them
    python tests/acceptance/crossing_script.py lightning.pytorch record tests/acceptance/recorded

``whole`` leaves ``FOLDER/CASE/MOMENT.ckpt`` and ``FOLDER/CASE/figures.json``. Figures are in hexadecimal where they are
floats, so that equal means equal to the last bit. ``record`` packs what ``whole`` left into one archive.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

BATCHES, EPOCHS = 6, 4
MOMENTS = {"epoch": (1, 6), "steps": (1, 2), "inside": (1, 3)}
"""At the end of an epoch, after a step inside one, in the validation inside one: how many epochs and batches are done."""

Case = dict[str, Any]
CASES: dict[str, Callable[[], Case]] = {}


def case(make: Callable[[], Case]) -> Callable[[], Case]:
    """Register a case under the name of its function."""
    CASES[make.__name__] = make
    return make


@case
def plain() -> Case:
    return {}


@case
def manual() -> Case:
    def training_step(self: Any, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        loss = self.loss(batch)
        self.manual_backward(loss)
        first.step()
        if batch_idx % 2:
            second.step()
            second.zero_grad()
        first.zero_grad()
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self: Any) -> Any:
        optimizers = [
            torch.optim.Adam(self.net[0].parameters(), lr=0.05),
            torch.optim.SGD(self.net[2].parameters(), lr=0.1, momentum=0.9),
        ]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(each, 0.95) for each in optimizers]

    return {"manual": True, "training_step": training_step, "configure_optimizers": configure_optimizers}


@case
def accumulate() -> Case:
    return {"trainer": {"accumulate_grad_batches": 2}}


@case
def schedulers() -> Case:
    def configure_optimizers(self: Any) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler
        return [optimizer], [
            {
                "scheduler": schedule.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
                "interval": "step",
                "frequency": 2,
            },
            {"scheduler": schedule.StepLR(optimizer, 1, gamma=0.7), "interval": "epoch"},
            {"scheduler": schedule.ReduceLROnPlateau(optimizer, patience=0), "monitor": "val_loss"},
        ]

    return {"configure_optimizers": configure_optimizers}


@case
def callbacks() -> Case:
    return {
        "callbacks": lambda c, folder: [
            c.EarlyStopping("val_loss", patience=2, min_delta=0.01),
            c.ModelCheckpoint(folder / "best", "{epoch}-{step}", monitor="val_loss", save_top_k=2),
            c.Timer({"hours": 1}),
            c.LearningRateMonitor(),
        ]
    }


@case
def bf16() -> Case:
    return {"trainer": {"precision": "bf16-mixed"}}


@case
def float16_with_a_scaler() -> Case:
    def plugins(package: str) -> Any:
        precision = importlib.import_module(
            f"{package}.plugins.precision" if "lightning" in package else "leyden.precision"
        )
        return precision.MixedPrecision(
            "16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
        )

    return {"plugins": plugins}


@case
def lbfgs() -> Case:
    def configure_optimizers(self: Any) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    return {"configure_optimizers": configure_optimizers}


@case
def clipping() -> Case:
    return {"trainer": {"gradient_clip_val": 0.5}}


@case
def several_checks() -> Case:
    return {"trainer": {"check_val_every_n_epoch": 2, "val_check_interval": 1.0}}


@case
def data_module() -> Case:
    return {"data_module": True}


class Counted:
    """A loader of fixed batches that knows where it stands."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.done, self.restored = batches, 0, False

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        self.done = self.done if self.restored else 0
        self.restored = False
        for batch in self.batches[self.done :]:
            self.done += 1
            yield batch
        self.done = 0

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done, self.restored = state["done"], True


def make(L: Any, what: Case) -> tuple[Any, Any, list[Any]]:
    """Return module, data and the batches of validation."""
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randn(4, 2, generator=generator) for _ in range(BATCHES)]
    validation = DataLoader(torch.randn(4, 2, generator=generator), batch_size=2)

    class Module(L.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self, width: int = 3, rate: float = 0.05, tags: Any = ("a", "b")) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.automatic_optimization = not what.get("manual", False)
            self.net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1))
            self.rows: dict[str, Any] = {}

        def loss(self, batch: Any) -> Any:
            loss = ((self.net(batch) - batch.sum(1, keepdim=True)) ** 2).mean()
            rates = [group["lr"] for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
            at = f"{self.trainer.current_epoch}/{self.seen}"
            self.rows.setdefault(at, [float(loss).hex(), [rate.hex() for rate in rates], self.trainer.global_step])
            self.log("loss", loss)
            self.log("loss_of_epoch", loss, on_step=False, on_epoch=True)
            return loss

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.seen = batch_idx

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", ((self.net(batch) - batch.sum(1, keepdim=True)) ** 2).mean())

        def on_validation_epoch_end(self) -> None:
            if not self.trainer.sanity_checking:
                value = self.trainer.callback_metrics["val_loss"]
                self.rows[f"{self.trainer.current_epoch}/{self.seen}/val"] = float(value).hex()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.rate)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)]

        def on_save_checkpoint(self, checkpoint: Any) -> None:
            checkpoint["mine"] = {"epoch": self.trainer.current_epoch}

        def on_load_checkpoint(self, checkpoint: Any) -> None:
            self.rows["mine"] = checkpoint["mine"]["epoch"]

    class Data(L.LightningDataModule):  # type: ignore[name-defined, misc]
        def __init__(self, size: int = 4, root: str = "somewhere") -> None:
            super().__init__()
            self.save_hyperparameters()
            self.epochs: list[int] = []

        def train_dataloader(self) -> Any:
            return Counted(batches)

        def val_dataloader(self) -> Any:
            return validation

        def state_dict(self) -> Any:
            return {"epochs": [*self.epochs, self.trainer.current_epoch]}

        def load_state_dict(self, state: Any) -> None:
            self.epochs = state["epochs"]

    methods = {name: value for name, value in what.items() if name in ("training_step", "configure_optimizers")}
    torch.manual_seed(1)
    module = type("Module", (Module,), methods)()
    data = {"datamodule": Data()} if what.get("data_module") else {
        "train_dataloaders": Counted(batches), "val_dataloaders": validation,
    }  # fmt: skip
    return module, data, batches


def fit(package: str, name: str, folder: Path, checkpoint: Path | None = None) -> dict[str, Any]:
    """Fit the case ``name``, from the beginning or from a checkpoint; return its figures."""
    L: Any = importlib.import_module(package)
    own: Any = importlib.import_module(f"{package}.callbacks")
    what = CASES[name]()
    module, data, _ = make(L, what)

    class Writer(L.Callback):  # type: ignore[name-defined, misc]
        def at(self, trainer: Any, moment: str, batch: int) -> None:
            if checkpoint is None and (trainer.current_epoch, batch) == MOMENTS[moment] and not trainer.sanity_checking:
                trainer.save_checkpoint(folder / f"{moment}.ckpt")
                if moment == "epoch":
                    trainer.save_checkpoint(folder / "weights.ckpt", weights_only=True)

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.at(trainer, "steps", batch_idx + 1)

        def on_validation_end(self, trainer: Any, module: Any) -> None:
            self.at(trainer, "inside", getattr(module, "seen", -1) + 1)

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            self.at(trainer, "epoch", module.seen + 1)

    callbacks = [*what.get("callbacks", lambda c, folder: [])(own, folder), Writer()]
    arguments: dict[str, Any] = {
        "max_epochs": EPOCHS, "val_check_interval": 3, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "accelerator": "cpu", "log_every_n_steps": 1, "num_sanity_val_steps": 0,
        "enable_checkpointing": any(isinstance(each, own.Checkpoint) for each in callbacks),
        "callbacks": [each for each in callbacks if not isinstance(each, own.LearningRateMonitor)],
        **what.get("trainer", {}),
    }  # fmt: skip
    if package == "leyden":
        arguments["semantics"] = "lightning"
    if "plugins" in what:
        arguments["plugins"] = what["plugins"](package)
    trainer = L.Trainer(**arguments)
    trainer.fit(module, **data, ckpt_path=checkpoint)
    sums = [
        float(state[key].double().sum()).hex()
        for optimizer in trainer.optimizers
        for _, state in sorted(optimizer.state_dict()["state"].items())
        for key in sorted(state)
        if isinstance(state[key], torch.Tensor)
    ]
    figures = {
        "rows": module.rows,
        "epoch": trainer.current_epoch,
        "step": trainer.global_step,
        "weights": {key: [float(v).hex() for v in value.flatten()] for key, value in module.state_dict().items()},
        "optimizers": sums,
        "schedulers": [
            {key: value for key, value in config.scheduler.state_dict().items() if isinstance(value, (int, float))}
            for config in trainer.lr_scheduler_configs
        ],
        "callbacks": {},
    }
    for each in callbacks:
        if isinstance(each, own.EarlyStopping):
            figures["callbacks"]["stopping"] = [each.wait_count, each.stopped_epoch, float(each.best_score).hex()]
        if isinstance(each, own.ModelCheckpoint):
            kept = {Path(path).name: float(value).hex() for path, value in each.best_k_models.items()}
            figures["callbacks"]["checkpoint"] = [
                Path(each.best_model_path).name,
                float(each.best_model_score).hex(),
                kept,
            ]
    if "datamodule" in data:
        figures["data"] = type(data["datamodule"]).__qualname__
        module.rows["of the data module"] = list(data["datamodule"].epochs)
    return figures


def whole(package: str, folder: Path, names: list[str]) -> None:
    """Fit every case from the beginning; leave its checkpoints and figures."""
    for name in names:
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        (place / "figures.json").write_text(json.dumps(fit(package, name, place), indent=1), encoding="utf-8")


def resume(package: str, folder: Path, names: list[str]) -> dict[str, Any]:
    """Go on from every checkpoint of every case; return the figures, or what was raised."""
    result: dict[str, Any] = {}
    for name in names:
        for moment in [*MOMENTS, "weights"]:
            path = folder / name / f"{moment}.ckpt"
            if not path.exists():
                continue
            with tempfile.TemporaryDirectory() as new:
                try:
                    result[f"{name}/{moment}"] = fit(package, name, Path(new), path)
                except Exception as error:
                    if moment != "weights":
                        raise
                    result[f"{name}/{moment}"] = {"error": f"{type(error).__name__}: {error}"}
    return result


def record(package: str, target: Path) -> None:
    """Write the archive of all that ``whole`` leaves."""
    with tempfile.TemporaryDirectory() as new:
        whole(package, Path(new), list(CASES))
        with zipfile.ZipFile(target / "lightning-2.6.6-crossing.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(Path(new).rglob("*")):
                if path.is_file() and path.parent.parent == Path(new):
                    archive.write(path, path.relative_to(new))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    which, action, where, *chosen = sys.argv[1:]
    if action == "whole":
        whole(which, Path(where), chosen or list(CASES))
    elif action == "resume":
        print(json.dumps({"result": resume(which, Path(where), chosen or list(CASES))}))
    else:
        record(which, Path(where))
