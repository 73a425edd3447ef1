# SPDX-License-Identifier: Apache-2.0
"""A fit that torchrun starts anew goes on from the newest checkpoint that it has written itself, and from no other."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.callbacks import ModelCheckpoint
from leyden.runtime import agent


class _Net(L.LightningModule):
    def __init__(self, stops: int = -1) -> None:
        super().__init__()
        self.layer, self.stops = torch.nn.Linear(2, 1), stops
        self.steps: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == self.stops:
            raise RuntimeError("a machine is lost")
        self.steps.append(self.trainer.global_step)
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def _launch(monkeypatch: pytest.MonkeyPatch, folder: Path, attempt: int) -> None:
    """Be a process that torchrun has just started."""
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / f"attempt_{attempt}" / "0" / "error.json"))
    monkeypatch.setattr(agent, "_FITS", itertools.count())


def _fit(folder: Path, stops: int = -1, given: Any = None, **saving: Any) -> list[int]:
    module = _Net(stops)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=[ModelCheckpoint(every_n_train_steps=2, **saving)],
    )  # fmt: skip
    loader = DataLoader(TensorDataset(torch.randn(20, 2)), 2)
    if stops >= 0:
        with pytest.raises(RuntimeError, match="a machine is lost"):
            trainer.fit(module, loader, ckpt_path=given)
    else:
        trainer.fit(module, loader, ckpt_path=given)
    return module.steps


@pytest.mark.filterwarnings("ignore:The checkpoint folder")
@pytest.mark.parametrize("folder", [None, "mine"])
def test_a_fit_that_is_started_anew_goes_on_and_a_second_launch_begins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    saving = {} if folder is None else {"dirpath": tmp_path / folder}
    _launch(monkeypatch, tmp_path / "first", 0)
    assert _fit(tmp_path, 5, **saving) == [0, 1, 2, 3, 4]
    _launch(monkeypatch, tmp_path / "first", 0)  # a change of machines, which is not counted
    assert _fit(tmp_path, 7, **saving) == [4, 5, 6]
    _launch(monkeypatch, tmp_path / "first", 1)
    assert _fit(tmp_path, **saving) == [6, 7, 8, 9]
    assert caplog.text.count("torchrun has started this fit anew: it goes on from") == 2
    assert _fit(tmp_path, 1, **saving) == [0]  # the second fit of the script
    _launch(monkeypatch, tmp_path / "second", 0)
    assert _fit(tmp_path, 3, **saving) == [0, 1, 2]
    assert caplog.text.count("torchrun has started this fit anew") == 2


@pytest.mark.filterwarnings("ignore:The checkpoint folder")
def test_a_fit_that_had_saved_nothing_begins_as_it_was_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _launch(monkeypatch, tmp_path / "first", 0)
    assert _fit(tmp_path, 3) == [0, 1, 2]
    (start,) = tmp_path.rglob("*.ckpt")
    _launch(monkeypatch, tmp_path / "second", 0)
    assert _fit(tmp_path / "other", 3, given=start) == [2]
    _launch(monkeypatch, tmp_path / "second", 1)
    assert _fit(tmp_path / "other", 3, given=start) == [2]
    assert f"it had saved no checkpoint in a local folder: it begins with ckpt_path={start!r}" in caplog.text
