# SPDX-License-Identifier: Apache-2.0
"""Memory: what a run made is gone as soon as the user lets go of it, without the cyclic collector; nothing grows."""

from __future__ import annotations

import gc
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import leyden as L
from leyden.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, Timer, TQDMProgressBar
from leyden.loggers import CSVLogger, TensorBoardLogger


class Module(L.LightningModule):
    def __init__(self, lbfgs: bool = False, manual: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(4, 1)
        self.automatic_optimization = not manual
        self.lbfgs = lbfgs

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = (self.net(batch) ** 2).mean()
        self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = (self.net(batch) ** 2).mean()
        self.log("val_loss", loss)
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.net(batch).mean())

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch)

    def configure_optimizers(self) -> Any:
        if self.lbfgs:
            return torch.optim.LBFGS(self.parameters(), max_iter=2)
        optimizer = torch.optim.Adam(self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class Data(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(torch.ones(8, 4), batch_size=4)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Fails(L.Callback):
    def on_train_batch_end(self, *args: Any) -> None:
        raise RuntimeError("on purpose")


class Interrupts(L.Callback):
    def on_train_batch_end(self, *args: Any) -> None:
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Have other people's modules imported: some keep an exception, and with it our frames, while they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _go(tmp_path_factory.mktemp("imported"), ["fit", "test"], [TQDMProgressBar()], {}, profiler="simple")


@pytest.fixture
def no_collector(imported: None) -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def _go(
    folder: Path, entries: list[str], callbacks: list[Any], module: dict[str, Any], **options: Any
) -> dict[str, Any]:
    """Run, and return weak references to everything that took part; nothing else of it survives this call."""
    trainer = L.Trainer(
        **{"max_epochs": 2, "default_root_dir": folder, **options}, callbacks=callbacks, accelerator="cpu"
    )
    model, data = Module(**module), Data()
    parts: dict[str, Any] = {"trainer": trainer, "model": model, "weights": model.net.weight, "data": data}
    for entry in entries:
        with suppress(RuntimeError):
            getattr(trainer, entry)(model, datamodule=data)
    parts |= {type(callback).__name__: callback for callback in trainer.callbacks}
    parts |= {type(logger).__name__: logger for logger in trainer.loggers}
    parts |= {f"optimizer {i}": optimizer for i, optimizer in enumerate(trainer.optimizers)}
    parts |= {"fit loop": trainer.fit_loop, "strategy": trainer.strategy}
    return {name: weakref.ref(part) for name, part in parts.items()}


EVERYTHING = ["fit", "validate", "test", "predict"]
CASES: dict[str, tuple[list[str], Callable[[Path], list[Any]], dict[str, Any], dict[str, Any]]] = {
    "defaults": (["fit"], lambda folder: [], {}, {}),
    "all entries": (EVERYTHING, lambda folder: [], {}, {}),
    "validate": (["validate"], lambda folder: [], {}, {}),
    "predict": (["predict"], lambda folder: [], {}, {}),
    "an exception": (["fit"], lambda folder: [Fails()], {}, {}),
    "an interrupt": (["fit", "fit"], lambda folder: [Interrupts()], {}, {}),
    "callbacks": (
        ["fit"],
        lambda folder: [
            EarlyStopping("val_loss"), LearningRateMonitor("step"), Timer(interval="step"), TQDMProgressBar(),
            ModelCheckpoint(monitor="val_loss", save_top_k=2, save_last=True, every_n_train_steps=1),
        ],
        {},
        {"max_time": "00:01:00:00"},
    ),
    "loggers": (
        ["fit"],
        lambda folder: [],
        {},
        {"logger": lambda folder: [CSVLogger(folder), TensorBoardLogger(folder)], "log_every_n_steps": 1},
    ),
    "profiler": (["fit"], lambda folder: [], {}, {"profiler": "simple"}),
    "bare": (["fit"], lambda folder: [], {}, {"barebones": True}),
    "fast_dev_run": (["fit"], lambda folder: [], {}, {"fast_dev_run": True}),
    "LBFGS": (["fit"], lambda folder: [], {"lbfgs": True}, {}),
    "manual": (["fit"], lambda folder: [], {"manual": True}, {}),
    "accumulation": (["fit"], lambda folder: [], {}, {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0}),
    "bf16": (["fit"], lambda folder: [], {}, {"precision": "bf16-mixed"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("no_collector")
def test_E1_all_is_freed_without_the_collector(case: str, tmp_path: Path) -> None:
    entries, callbacks, module, options = CASES[case]
    if callable(options.get("logger")):
        options = {**options, "logger": options["logger"](tmp_path)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        references = _go(tmp_path, entries, callbacks(tmp_path), module, **options)
    del options
    assert [name for name, reference in references.items() if reference() is not None] == []


@pytest.mark.usefixtures("no_collector")
def test_E1_a_module_that_is_replaced_is_freed(tmp_path: Path) -> None:
    trainer = _quiet()
    first = Module()
    trainer.fit(first, datamodule=Data())
    reference = weakref.ref(first)
    del first
    trainer.fit(Module(), datamodule=Data())
    assert reference() is None


def _quiet(**options: Any) -> L.Trainer:
    return L.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu", **options,
    )  # fmt: skip


class Output:
    """What a step returns: an object that can be referred to weakly."""

    alive: weakref.WeakSet[Output] = weakref.WeakSet()
    most = 0

    def __init__(self, value: Tensor) -> None:
        self.value = value
        Output.alive.add(self)
        Output.most = max(Output.most, len(Output.alive))


@pytest.fixture
def outputs() -> type[Output]:
    Output.alive, Output.most = weakref.WeakSet(), 0
    return Output


@pytest.mark.usefixtures("no_collector")
def test_E2_predict_keeps_nothing_unless_asked(outputs: type[Output]) -> None:
    class Model(Module):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return Output(self.net(batch))

    trainer, data = _quiet(), DataLoader(torch.ones(100, 4))
    assert trainer.predict(Model(), data, return_predictions=False) is None
    assert outputs.most <= 2
    assert len(outputs.alive) == 0
    kept = trainer.predict(Model(), data)
    assert len(kept) == len(outputs.alive) == 100
    del kept
    assert len(outputs.alive) == 0


def test_E2_predict_is_flat_in_memory() -> None:
    class Model(Module):
        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return batch.repeat(1, 64)

    class Batches:
        def __len__(self) -> int:
            return 1000

        def __iter__(self) -> Iterator[Tensor]:
            return (torch.ones(256, 16) for _ in range(1000))  # a megabyte of predictions each

    process, trainer = psutil.Process(), _quiet()
    trainer.predict(Model(), DataLoader(torch.ones(8, 4)), return_predictions=False)
    before = process.memory_info().rss
    trainer.predict(Model(), Batches(), return_predictions=False)
    assert process.memory_info().rss - before < 100 * 2**20


@pytest.mark.usefixtures("no_collector")
def test_E2_predictions_are_not_kept_after_an_exception(outputs: type[Output]) -> None:
    class Model(Module):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 3:
                raise RuntimeError("on purpose")
            return Output(self.net(batch))

    trainer = _quiet()
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.predict(Model(), DataLoader(torch.ones(8, 4)))
    sys.last_exc = None  # type: ignore[attr-defined]
    assert trainer.predict_loop.predictions == []


@pytest.mark.usefixtures("no_collector")
def test_E4_no_output_outlives_its_batch(outputs: type[Output]) -> None:
    class Model(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": self.net(batch).mean(), "extra": Output(batch)}

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return Output(batch)

        def test_step(self, batch: Any, batch_idx: int) -> Any:
            return Output(batch)

    trainer, model = _quiet(), Model()
    loader = DataLoader(torch.ones(20, 4))
    trainer.fit(model, loader, loader)
    assert (outputs.most, len(outputs.alive)) == (1, 0)
    trainer.test(model, loader, verbose=False)
    assert (outputs.most, len(outputs.alive)) == (1, 0)


@pytest.mark.usefixtures("no_collector")
def test_E4_the_graph_of_a_loss_is_gone_when_the_next_batch_begins() -> None:
    class Model(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert not losses or losses[-1]() is None
            loss = (self.net(batch) ** 2).mean()
            self.log("loss", loss, on_step=True, on_epoch=True)
            losses.append(weakref.ref(loss))
            return loss

    losses: list[Any] = []
    _quiet(limit_val_batches=0).fit(Model(), datamodule=Data())
    assert len(losses) == 2


def test_E3_fifty_fits_leave_nothing_behind(tmp_path: Path) -> None:
    def count() -> int:
        gc.collect()
        return len(gc.get_objects())

    def fit(trainer: L.Trainer | None = None) -> None:
        (trainer or _quiet(log_every_n_steps=1)).fit(Module(), datamodule=Data())

    for _ in range(3):
        fit()
    before = count()
    for _ in range(25):
        fit()
    assert count() - before < 100
    trainer = _quiet(log_every_n_steps=1)
    for _ in range(3):
        fit(trainer)
    before = count()
    for _ in range(25):
        fit(trainer)
    assert count() - before < 100


def test_L1_importing_the_package_loads_little() -> None:
    code = (
        "import torch, sys; before = set(sys.modules); import leyden; "
        "from leyden import Trainer, LightningModule, LightningDataModule, Callback, seed_everything; "
        "new = {name for name in set(sys.modules) - before}; "
        "heavy = [n for n in new if n.split('.')[0] in "
        "('rich', 'tensorboard', 'yaml', 'fsspec', 'torchmetrics', 'lightning', 'tqdm', 'pandas', 'jsonargparse')]; "
        "print(len([n for n in new if n.split('.')[0] == 'leyden']), len(new), heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    ours, everything, heavy = done.stdout.split(maxsplit=2)
    assert heavy.strip() == "[]"
    assert int(ours) <= 60
    assert int(everything) <= 90


def test_Q1_four_frames_of_ours_between_fit_and_the_step() -> None:
    frames: list[str] = []

    class Model(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            frame: Any = sys._getframe(1)
            while frame is not None and frame.f_code.co_name != "test_Q1_four_frames_of_ours_between_fit_and_the_step":
                frames.append(frame.f_code.co_name)
                frame = frame.f_back
            return super().training_step(batch, batch_idx)

    _quiet(limit_train_batches=1, limit_val_batches=0).fit(Model(), datamodule=Data())
    assert frames == ["training_step", "train_batch", "run", "fit"]
