# SPDX-License-Identifier: Apache-2.0
"""TQDMProgressBar with objects of tqdm, as subclasses make and use them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from leyden import LightningModule, Trainer
from leyden.callbacks import TQDMProgressBar

pytest.importorskip("tqdm")


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: Any) -> Any:
        loss = self.layer(batch).mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any) -> None:
        self.log("val", self.layer(batch).mean())

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.ones(6, 2), batch_size=2)

    val_dataloader = test_dataloader = train_dataloader


class Own(TQDMProgressBar):
    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []
        self.seen: list[tuple[int, Any, str]] = []

    def init_train_tqdm(self) -> Any:
        self.made.append("train")
        bar = super().init_train_tqdm()
        bar.set_description("my training")
        return bar

    def init_validation_tqdm(self) -> Any:
        self.made.append("validation")
        bar = super().init_validation_tqdm()
        bar.set_description("my validation")
        return bar

    def init_sanity_tqdm(self) -> Any:
        self.made.append("sanity")
        return super().init_sanity_tqdm()

    def init_test_tqdm(self) -> Any:
        self.made.append("test")
        return super().init_test_tqdm()

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        return {"mine": 7, **super().get_metrics(trainer, pl_module)}

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        bar = self.train_progress_bar
        self.seen.append((bar.total, bar.postfix, bar.desc))


def trainer(bar: Any, **more: Any) -> Trainer:
    return Trainer(
        max_epochs=2, callbacks=[bar], logger=False, enable_checkpointing=False, enable_model_summary=False,
        accelerator="cpu", **more,
    )  # fmt: skip


def test_a_subclass_makes_and_changes_the_objects(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Own()
    with pytest.raises(TypeError, match="Own has no train bar now"):
        _ = bar.train_progress_bar
    run = trainer(bar)
    run.fit(Model())
    assert bar.made == ["sanity", "train", "validation", "validation"]
    assert [total for total, _, _ in bar.seen] == [3] * 6
    assert "mine=7" in bar.train_progress_bar.postfix
    assert bar.seen[0][2].startswith("my training")
    assert bar.train_progress_bar.n == 3
    out = capsys.readouterr().out
    assert "my validation" in out
    assert "my training" in out
    run.test(Model(), verbose=False)
    assert bar.made[-1] == "test"
    assert bar.test_progress_bar.n == 3


@pytest.mark.parametrize(("semantics", "has"), [("leyden", False), ("lightning", True)])
def test_the_plain_bar_has_objects_with_lightnings_semantics(
    semantics: str, has: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = TQDMProgressBar()
    trainer(bar, semantics=semantics).fit(Model())
    assert bool(bar.bars) is has
    assert ("Epoch 2/2" in capsys.readouterr().out) is has
