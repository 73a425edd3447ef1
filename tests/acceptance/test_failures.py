# SPDX-License-Identifier: Apache-2.0
"""What happens when something goes wrong: exceptions of the user's come out as they are, and the Trainer can go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import traceback
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import leyden as L
from leyden.errors import LeydenWarning, MisconfigurationException
from leyden.hooks import HOOKS
from leyden.types import TrainerStatus

QUIET: dict[str, Any] = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    "accelerator": "cpu", "max_epochs": 1,
}  # fmt: skip


class Mine(Exception):
    """An exception of the user's."""


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.net(batch).mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class Data(L.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.told: list[BaseException] = []

    def train_dataloader(self) -> Any:
        return DataLoader(torch.ones(4, 2), batch_size=2)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader

    def on_exception(self, exception: BaseException) -> None:
        self.told.append(exception)


class Told(L.Callback):
    def __init__(self) -> None:
        self.told: list[BaseException] = []

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        assert trainer.interrupted
        self.told.append(exception)


def _raises(*args: Any, **kwargs: Any) -> Any:
    raise Mine("an argument", 7)


def _entry(name: str) -> str:
    for entry in ("test", "predict"):
        if entry in name:
            return entry
    return "fit"


NEVER = {
    "on_exception", "on_load_checkpoint", "load_state_dict", "configure_sharded_model", "clip_gradients", "state_dict",
    "on_save_checkpoint", "manual_backward",
}  # fmt: skip
CASES = [
    (owner, hook.name)
    for hook in HOOKS
    for owner in hook.owners
    if hook.name not in NEVER and not (owner == "D" and hook.name.endswith("_dataloader"))
]


@pytest.mark.parametrize(("owner", "hook"), CASES, ids=[f"{owner}-{hook}" for owner, hook in CASES])
def test_Q3_an_exception_in_any_hook_comes_out_as_it_is(owner: str, hook: str) -> None:
    module, data, callback, told = Module(), Data(), L.Callback(), Told()
    target = {"M": module, "D": data, "C": callback}[owner]
    object.__setattr__(target, hook, _raises)
    trainer = L.Trainer(**QUIET, callbacks=[callback, told], gradient_clip_val=1.0)
    use_data = not (owner == "M" and hook in dir(Data) and hook not in ("setup", "teardown", "prepare_data"))
    source: dict[str, Any] = {"datamodule": data}
    if not use_data and hook.endswith("_dataloader"):
        source = {}
        for name in ("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader"):
            if name != hook:
                object.__setattr__(module, name, data.train_dataloader)

    with pytest.raises(Mine) as caught:
        getattr(trainer, _entry(hook))(module, **source)
    raised = caught.value
    assert type(raised) is Mine
    assert raised.args == ("an argument", 7)
    assert raised.__cause__ is None
    assert raised.__context__ is None
    assert traceback.extract_tb(raised.__traceback__)[-1].name == "_raises"
    assert told.told == [raised]
    assert data.told == ([raised] if source else [])
    assert trainer.interrupted
    assert trainer.state.status is TrainerStatus.INTERRUPTED
    # and the trainer can be used again
    object.__delattr__(target, hook)
    trainer.fit(module, datamodule=data)
    assert not trainer.interrupted
    assert trainer.state.status is TrainerStatus.FINISHED
    assert trainer.current_epoch == 1


@pytest.mark.parametrize(
    "error", [Mine("x"), SystemExit(3), StopIteration("s"), GeneratorExit(), AssertionError(), MemoryError()]
)
def test_Q3_any_kind_of_exception_comes_out(error: BaseException) -> None:
    def step(*args: Any) -> Any:
        raise error

    module, told = Module(), Told()
    module.training_step = step  # type: ignore[method-assign]
    with pytest.raises(type(error)) as caught:
        L.Trainer(**QUIET, callbacks=told).fit(module, datamodule=Data())
    assert caught.value is error
    assert told.told == [error]


def test_Q3_an_exception_keeps_the_cause_that_it_has() -> None:
    def step(*args: Any) -> Any:
        try:
            raise KeyError("first")
        except KeyError as first:
            raise Mine("second") from first

    module = Module()
    module.training_step = step  # type: ignore[method-assign]
    with pytest.raises(Mine) as caught:
        L.Trainer(**QUIET).fit(module, datamodule=Data())
    assert isinstance(caught.value.__cause__, KeyError)


def test_Q3_exceptions_of_data_sets_and_loaders_come_out() -> None:
    class Broken(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Any:
            raise Mine(index)

    def generator() -> Any:
        yield torch.ones(1, 2)
        raise Mine("in the generator")

    for loader in (DataLoader(Broken()), generator()):
        with pytest.raises(Mine):
            L.Trainer(**QUIET, limit_val_batches=0).fit(Module(), loader, DataLoader(torch.ones(2, 2)))


def test_Q3_an_exception_in_on_exception_does_not_take_the_place_of_the_first() -> None:
    class Worse(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise Mine("first")

        def on_exception(self, *args: Any) -> None:
            raise ValueError("second")

    told, data = Told(), Data()
    with (
        pytest.warns(LeydenWarning, match=r"Worse.on_exception failed while Mine ended the run: ValueError: second"),
        pytest.raises(Mine, match="first") as caught,
    ):
        L.Trainer(**QUIET, callbacks=[Worse(), told]).fit(Module(), datamodule=data)
    assert told.told == data.told == [caught.value]


def test_all_settings_are_back_after_a_run_that_failed() -> None:
    before = _settings()
    module = Module()

    def step(*args: Any) -> Any:
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_anomaly_enabled()
        assert signal.getsignal(signal.SIGINT) is not before["sigint"]
        raise Mine

    module.training_step = step  # type: ignore[method-assign]
    with pytest.raises(Mine):
        L.Trainer(**QUIET, deterministic=True, benchmark=True, detect_anomaly=True).fit(module, datamodule=Data())
    assert _settings() == before


@pytest.mark.parametrize("entry", ["fit", "validate", "test", "predict"])
def test_all_settings_are_back_after_a_run(entry: str, tmp_path: Path) -> None:
    before = _settings()
    trainer = L.Trainer(
        deterministic="warn", benchmark=True, max_epochs=1, default_root_dir=tmp_path, profiler="simple"
    )
    getattr(trainer, entry)(Module(), datamodule=Data())
    assert _settings() == before


def _settings() -> dict[str, Any]:
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn": torch.is_deterministic_algorithms_warn_only_enabled(),
        "benchmark": torch.backends.cudnn.benchmark,
        "anomaly": torch.is_anomaly_enabled(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": {thread.name for thread in threading.enumerate()},
        "torch_threads": torch.get_num_threads(),
        "environment": dict(os.environ),
        "handlers": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "sigint": signal.getsignal(signal.SIGINT),
        "hook": sys.excepthook,
        "thread_hook": threading.excepthook,
        "directory": os.getcwd(),
        "warnings": list(warnings.filters),
    }


# ---------------------------------------------------------------------------------------------- Ctrl-C


@pytest.mark.parametrize("entry", ["fit", "validate", "test", "predict"])
def test_J4_a_keyboard_interrupt_returns(entry: str) -> None:
    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    module, told = Module(), Told()
    step = {"fit": "training", "validate": "validation"}.get(entry, entry) + "_step"
    object.__setattr__(module, step, interrupted)
    trainer = L.Trainer(**QUIET, callbacks=told)
    getattr(trainer, entry)(module, datamodule=Data())
    assert trainer.interrupted
    assert [type(each) for each in told.told] == [KeyboardInterrupt]
    object.__delattr__(module, step)
    trainer.fit(module, datamodule=Data())
    assert not trainer.interrupted


def test_J4_lightning_semantics_exit() -> None:
    module = Module()

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    module.training_step = interrupted  # type: ignore[method-assign]
    with pytest.raises(SystemExit) as caught:
        L.Trainer(**QUIET, semantics="lightning").fit(module, datamodule=Data())
    assert caught.value.code == 1


def test_J4_ctrl_c_finishes_the_step_and_returns() -> None:
    events: list[str] = []

    class Pressing(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 0:
                os.kill(os.getpid(), signal.SIGINT)
                events.append("step goes on")
            return loss

        def on_train_batch_end(self, *args: Any) -> None:
            events.append("batch end")

    told = Told()
    trainer = L.Trainer(**QUIET, callbacks=told, limit_val_batches=0)
    trainer.fit(Pressing(), datamodule=Data())
    assert events == ["step goes on", "batch end"]
    assert trainer.global_step == 1
    assert trainer.interrupted
    assert len(told.told) == 1


@pytest.mark.parametrize("moment", ["on_train_epoch_end", "on_train_end", "on_validation_end"])
def test_J4_ctrl_c_near_the_end_is_not_lost(moment: str) -> None:
    callback = L.Callback()

    def press(trainer: Any, *args: Any) -> None:
        if not trainer.sanity_checking:
            os.kill(os.getpid(), signal.SIGINT)

    setattr(callback, moment, press)
    trainer = L.Trainer(**QUIET, callbacks=callback)
    trainer.fit(Module(), datamodule=Data())
    assert trainer.interrupted


SCRIPT = """
import os, signal, sys, threading, time
import torch
import leyden as L
from torch.utils.data import DataLoader

class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        {step}
        return self.net(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

trainer = L.Trainer(
    accelerator="cpu", max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False, {arguments}
)
trainer.fit(Module(), DataLoader(torch.ones(8, 2)))
print("returned", trainer.interrupted, signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""
PRESS = "threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start() if trainer.global_step == 3 else None"
TWICE = (
    "[os.kill(os.getpid(), signal.SIGINT) for _ in range(2)] if trainer.global_step == 3 else None; "
    "print('after') if trainer.global_step == 3 else None"
)


@pytest.mark.parametrize(
    ("step", "arguments", "code", "out"),
    [
        (PRESS, "", 0, "returned True True"),
        (TWICE, "", 0, "returned True True"),
        (PRESS, "semantics='lightning'", 1, ""),
    ],
    ids=["once", "twice", "lightning"],
)
def test_J4_ctrl_c_in_a_script(step: str, arguments: str, code: int, out: str) -> None:
    script = textwrap.dedent(SCRIPT).format(step=step, arguments=arguments)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (code, out), done.stderr


def test_P6_a_handler_of_the_users_own_is_called_as_well() -> None:
    caught: list[int] = []
    former = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        module = Module()
        module.on_train_batch_start = lambda *args: os.kill(os.getpid(), signal.SIGINT)  # type: ignore[method-assign]
        trainer = L.Trainer(**QUIET, limit_val_batches=0)
        trainer.fit(module, datamodule=Data())
        assert caught == [signal.SIGINT]
        assert trainer.interrupted
        assert trainer.global_step == 1
    finally:
        signal.signal(signal.SIGINT, former)


def test_a_run_in_a_thread_touches_no_signal() -> None:
    trainer = L.Trainer(**QUIET)
    thread = threading.Thread(target=trainer.fit, args=(Module(),), kwargs={"datamodule": Data()})
    thread.start()
    thread.join()
    assert trainer.state.status is TrainerStatus.FINISHED


# ---------------------------------------------------------------------------------------------- before any training


def test_misspelt_hooks_of_module_callback_and_data_module_are_told() -> None:
    class Wrong(Module):
        def on_train_epochs_end(self) -> None: ...

    class WrongCallback(L.Callback):
        def on_validation_batch_ends(self, *args: Any) -> None: ...

    class WrongData(Data):
        def train_dataloaders(self) -> None: ...

    with pytest.warns(LeydenWarning) as caught:
        L.Trainer(**QUIET, callbacks=WrongCallback()).fit(Wrong(), datamodule=WrongData())
    texts = " ".join(str(warning.message) for warning in caught)
    assert "Wrong.on_train_epochs_end() is no hook" in texts
    assert "Did you mean 'on_train_epoch_end'?" in texts
    assert "WrongCallback.on_validation_batch_ends() is no hook" in texts
    assert "WrongData.train_dataloaders() is no hook" in texts


@pytest.mark.parametrize("name", ["training_epoch_end", "validation_epoch_end", "test_epoch_end"])
def test_hooks_that_lightning_removed_are_an_error(name: str) -> None:
    module = type("Old", (Module,), {name: lambda self, outputs: None})()
    with pytest.raises(MisconfigurationException, match=rf"Old\.{name}\(\) is not called any more.*on_"):
        L.Trainer(**QUIET).fit(module, datamodule=Data())


def test_a_misspelt_hook_that_is_needed_is_told_with_the_error() -> None:
    class Typo(L.LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> None: ...

        def configure_optimizer(self) -> None: ...

    with (
        pytest.warns(LeydenWarning, match="Did you mean 'configure_optimizers'"),
        pytest.raises(MisconfigurationException, match="No `configure_optimizers"),
    ):
        L.Trainer(**QUIET).fit(Typo(), datamodule=Data())


@pytest.mark.parametrize(
    ("missing", "entry", "match"),
    [
        ("training_step", "fit", r"No `training_step\(\)` method defined to run `Trainer.fit`.*Partial"),
        ("configure_optimizers", "fit", r"No `configure_optimizers\(\)` method defined in Partial"),
        ("validation_step", "validate", r"No `validation_step\(\)` method defined to run `Trainer.validate`.*Partial"),
        ("test_step", "test", r"No `test_step\(\)` method defined.*Partial"),
        ("predict_step", "predict", r"Partial has neither predict_step\(\) nor forward\(\)"),
    ],
)
def test_what_is_missing_is_an_error_before_any_hook(missing: str, entry: str, match: str) -> None:
    parts = {
        name: getattr(Module, name)
        for name in (
            "__init__",
            "training_step",
            "validation_step",
            "test_step",
            "predict_step",
            "configure_optimizers",
        )
        if name != missing
    }
    parts["__init__"] = lambda self: L.LightningModule.__init__(self) or setattr(self, "net", nn.Linear(2, 1))
    parts["setup"] = _raises
    module = type("Partial", (L.LightningModule,), parts)()
    with pytest.raises(MisconfigurationException, match=match):
        getattr(L.Trainer(**QUIET), entry)(module, datamodule=Data())


@pytest.mark.parametrize("entry", ["fit", "validate", "test", "predict"])
def test_no_data_is_an_error(entry: str) -> None:
    with pytest.raises(MisconfigurationException, match=rf"no data for Trainer\.{entry}\(\): pass \w+= or datamodule="):
        getattr(L.Trainer(**QUIET), entry)(Module())


@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
def test_no_module_is_an_error(entry: str) -> None:
    with pytest.raises(
        MisconfigurationException, match="requires a `LightningModule`: this Trainer has not run one yet"
    ):
        getattr(L.Trainer(**QUIET), entry)()


def test_something_that_is_no_module_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"must be a `LightningModule`, got `Linear` of torch\.nn\.modules\.linear"):
        L.Trainer(**QUIET).fit(nn.Linear(2, 1), DataLoader(torch.ones(2, 2)))


def test_data_given_twice_is_an_error() -> None:
    with pytest.raises(MisconfigurationException, match="Both loaders and a datamodule"):
        L.Trainer(**QUIET).fit(Module(), DataLoader(torch.ones(2, 2)), datamodule=Data())
    with pytest.raises(MisconfigurationException, match="Both loaders and a datamodule"):
        L.Trainer(**QUIET).fit(Module(), val_dataloaders=DataLoader(torch.ones(2, 2)), datamodule=Data())


@pytest.mark.parametrize(
    "callback",
    [
        L.callbacks.EarlyStopping(monitor="val_los"),
        L.callbacks.ModelCheckpoint(monitor="val_los"),
    ],
    ids=["EarlyStopping", "ModelCheckpoint"],
)
def test_K5_a_monitor_that_is_never_logged_is_an_error_at_the_first_chance(callback: Any, tmp_path: Path) -> None:
    class Logs(Module):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.net(batch).mean())

    options = {**QUIET, "enable_checkpointing": None, "default_root_dir": tmp_path, "max_epochs": 5}
    trainer = L.Trainer(**options, callbacks=callback)
    with pytest.raises(Exception, match=r"val_los.*Did you mean 'val_loss'\?"):
        trainer.fit(Logs(), datamodule=Data())
    assert trainer.current_epoch == 0
