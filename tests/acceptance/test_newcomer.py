# SPDX-License-Identifier: Apache-2.0
"""Scripts as people run them: into a pipe that closes, in odd places, with the mistakes that everybody makes once."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import leyden as L
from leyden.callbacks import BasePredictionWriter, EarlyStopping
from leyden.errors import LeydenWarning
from leyden.runtime.devices import CPUAccelerator, CUDAAccelerator
from leyden.strategies import SingleDeviceStrategy

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

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


SCRIPT = """
import sys
import torch
import leyden as L
from torch.utils.data import DataLoader

class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        loss = self.net(batch).mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch, batch_idx):
        self.log("test", 1.0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

trainer = L.Trainer(accelerator="cpu", max_epochs=3, logger=False, enable_checkpointing=False)
loader = DataLoader(torch.ones(8, 2))
trainer.fit(Module(), loader)
results = trainer.test(dataloaders=loader)
sys.stderr.write(f"{results} after {trainer.global_step} steps")
sys.stderr.flush()
"""


def test_a_reader_that_has_gone_ends_no_run(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)], stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        timeout=60, check=False, env={**os.environ, "PYTHONPATH": os.path.abspath("src")},
    )  # fmt: skip
    os.close(write)
    assert "[{'test': 1.0}] after 24 steps" in done.stderr, done.stderr


class Lost:
    """A loader whose workers have ended, as spawned ones do when Ctrl-C is pressed."""

    def __init__(self, press: bool) -> None:
        self.press = press

    def __iter__(self) -> Iterator[Tensor]:
        yield torch.ones(1, 2)
        if self.press:
            os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("DataLoader worker (pid(s) 4711) exited unexpectedly")


def test_ctrl_c_that_ends_the_workers_first_is_still_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[BaseException] = []
    callback = L.Callback()
    callback.on_exception = lambda trainer, module, error: seen.append(error)  # type: ignore[method-assign]
    trainer = L.Trainer(**QUIET, callbacks=callback)
    trainer.fit(Module(), Lost(press=True))
    assert trainer.interrupted
    assert [type(error) for error in seen] == [KeyboardInterrupt]
    assert "Press Ctrl-C again to stop at once" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="4711"):
        L.Trainer(**QUIET).fit(Module(), Lost(press=False))


def test_ctrl_c_during_preparation_trains_nothing() -> None:
    class Slow(Module):
        def prepare_data(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    trainer = L.Trainer(**QUIET)
    trainer.fit(Slow(), DataLoader(torch.ones(1, 2)))
    assert trainer.interrupted
    assert trainer.global_step == 0


def test_predictions_are_written_by_workers_that_persist() -> None:
    class Writer(BasePredictionWriter):
        def __init__(self) -> None:
            super().__init__("batch")
            self.seen: list[list[int]] = []

        def write_on_batch_end(self, trainer: Any, module: Any, prediction: Any, indices: Any, *rest: Any) -> None:
            self.seen.append(list(indices))

    module, writer = Module(), Writer()
    module.predict_step = lambda batch, batch_idx: batch  # type: ignore[method-assign]
    loader = DataLoader(torch.ones(5, 2), 2, num_workers=1, persistent_workers=True)
    trainer = L.Trainer(**QUIET, callbacks=writer)
    for _ in range(2):
        trainer.predict(module, loader)
    assert writer.seen == [[0, 1], [2, 3], [4]] * 2


def test_a_callback_may_call_something_of_its_own_log() -> None:
    class Noting(L.Callback):
        def __init__(self) -> None:
            self.log = logging.getLogger("mine")

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            self.log.debug("fine")
            self.log_dict({"seen": 1.0})  # type: ignore[attr-defined]

    callback = Noting()
    for _ in range(2):
        trainer = L.Trainer(**QUIET, callbacks=callback)
        trainer.fit(Module(), DataLoader(torch.ones(1, 2)))
        assert trainer.callback_metrics["seen"] == 1
    assert vars(callback) == {"log": logging.getLogger("mine")}


@pytest.mark.parametrize(("outside", "argument"), [(True, False), (False, True), (False, False)])
def test_anomaly_detection_is_on_where_either_side_asks(outside: bool, argument: bool) -> None:
    module, seen = Module(), list[bool]()
    module.on_train_batch_start = lambda *args: seen.append(torch.is_anomaly_enabled())  # type: ignore[method-assign]
    with torch.autograd.set_detect_anomaly(outside):
        L.Trainer(**QUIET, detect_anomaly=argument).fit(module, DataLoader(torch.ones(1, 2)))
    assert seen == [outside or argument]
    assert not torch.is_anomaly_enabled()


def test_init_module_leaves_weights_alone_where_asked() -> None:
    trainer = L.Trainer(**{**QUIET, "precision": "bf16-true"})
    before = torch.get_rng_state()
    with trainer.init_module(empty_init=True):
        layer = torch.nn.Linear(64, 64)
    assert torch.equal(torch.get_rng_state(), before)  # nothing was drawn
    assert layer.weight.dtype is torch.bfloat16
    with trainer.init_module():
        layer = torch.nn.Linear(64, 64)
    assert not torch.equal(torch.get_rng_state(), before)


def test_storage_options_reach_the_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    find = fsspec.core.url_to_fs
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url, **options: (given.append(options), find(url))[1])
    trainer = L.Trainer(**QUIET)
    trainer.fit(Module(), DataLoader(torch.ones(1, 2)))
    trainer.save_checkpoint("memory://folder/a.ckpt", storage_options={"token": "mine"})
    assert given == [{"token": "mine"}]


def test_the_device_of_a_run_is_the_current_one_while_it_lasts() -> None:
    told: list[str] = []

    class Board(CPUAccelerator):
        def setup_device(self, device: torch.device) -> None:
            told.append(f"set up {device}")

        def teardown(self) -> None:
            told.append("given back")

    module = Module()
    module.prepare_data = lambda: told.append("prepare")  # type: ignore[method-assign]
    L.Trainer(**{**QUIET, "accelerator": Board()}).fit(module, DataLoader(torch.ones(1, 2)))
    assert told == ["set up cpu", "prepare", "given back"]


def test_the_accelerator_is_that_of_the_strategy() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CUDAAccelerator, "is_available", staticmethod(lambda: True))
        patch.setattr(CUDAAccelerator, "auto_device_count", staticmethod(lambda: 1))
        patch.setattr(CUDAAccelerator, "parse_devices", staticmethod(lambda devices: [0]))
        trainer = L.Trainer(**{**QUIET, "accelerator": "auto"}, strategy=SingleDeviceStrategy("cpu"))
    assert isinstance(trainer.accelerator, CPUAccelerator)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"verbose": False},
            "Trainer.fit stopped: EarlyStopping: x = 1 did not improve in the last 2 checks; the best",
        ),
        ({"verbose": True}, "Trainer.fit stopped: by EarlyStopping."),
        (None, "Trainer.fit stopped: trainer.should_stop was set."),
    ],
)
def test_a_fit_that_is_stopped_says_by_whom(
    settings: dict[str, Any] | None, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Still(Module):
        def on_train_epoch_end(self) -> None:
            self.log("x", 1.0)
            if settings is None:
                self.trainer.should_stop = True

    callbacks = [] if settings is None else [EarlyStopping("x", patience=2, **settings)]
    trainer = L.Trainer(**{**QUIET, "max_epochs": 9}, callbacks=callbacks)
    trainer.fit(Still(), DataLoader(torch.ones(1, 2)))
    assert trainer.current_epoch < 9
    assert text in caplog.messages[-1]


def test_callbacks_that_remember_another_module_are_named() -> None:
    trainer = L.Trainer(**QUIET, callbacks=[EarlyStopping("x", strict=False), L.Callback()])
    loader = DataLoader(torch.ones(1, 2))
    first = Module()
    trainer.fit(first, loader)
    trainer.fit(first, loader)
    with pytest.warns(
        LeydenWarning, match="another module than last time.* EarlyStopping go on with what they have seen"
    ):
        trainer.fit(Module(), loader)
    assert trainer.global_step == 1
