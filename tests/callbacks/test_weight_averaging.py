# SPDX-License-Identifier: Apache-2.0
"""Averages of weights: what checkpoints hold at any moment, and what a model has afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numbers_script as script
import pytest
import torch

import leyden as L
from leyden.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging


def trainer(*callbacks: Any, **arguments: Any) -> L.Trainer:
    return L.Trainer(
        **{"max_epochs": 2, "enable_checkpointing": False, **arguments}, accelerator="cpu", logger=False,
        callbacks=list(callbacks), enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


class InValidation(L.Callback):
    """Does something in the second validation."""

    def __init__(self, act: Any) -> None:
        self.act = act

    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == 1 and not trainer.sanity_checking:
            self.act(trainer)


def test_what_is_saved_in_a_validation_has_the_average_and_the_weights_in_their_places(tmp_path: Path) -> None:
    saves = InValidation(lambda trainer: trainer.save_checkpoint(tmp_path / "in.ckpt"))

    class After(L.Callback):
        def on_validation_end(self, trainer: Any, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "after.ckpt")

    trainer(EMAWeightAveraging(decay=0.5), saves, After()).fit(script.build(L), script.data(), script.data(8))
    inside, after = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("in", "after"))
    for key in ("state_dict", "current_model_state", "averaging_state"):
        assert script.figures(inside[key]) == script.figures(after[key])
    assert script.figures(after["state_dict"]) != script.figures(after["current_model_state"])


def test_an_exception_in_a_validation_leaves_the_model_its_own_weights(tmp_path: Path) -> None:
    def fail(trainer: Any) -> None:
        raise ValueError("no")

    model = script.build(L)
    own: dict[str, Any] = {}

    class Notes(L.Callback):
        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            own.update(script.figures(pl_module.state_dict()))

    with pytest.raises(ValueError, match="no"):
        trainer(EMAWeightAveraging(decay=0.5), Notes(), InValidation(fail)).fit(model, script.data(), script.data(8))
    assert script.figures(model.state_dict()) == own


@pytest.mark.parametrize(("rules", "equal"), [("leyden", True), ("lightning", False)])
def test_a_checkpoint_of_weights_alone_has_the_average(rules: str, equal: bool, tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, "alone", save_weights_only=True)
    average = EMAWeightAveraging(decay=0.5)
    model = script.build(L)
    trainer(average, saves, enable_checkpointing=True, semantics=rules).fit(model, script.data(), script.data(8))
    saved = torch.load(tmp_path / "alone.ckpt", weights_only=True)["state_dict"]
    assert (script.figures(saved) == script.figures(model.state_dict())) is equal


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's compiler looks at it
def test_a_compiled_layer_changes_no_name(tmp_path: Path) -> None:
    model = script.build(L)
    model.head = torch.compile(model.head, backend="eager")
    run = trainer(EMAWeightAveraging(decay=0.5), max_epochs=1)
    run.fit(model, script.data(), script.data(8))
    run.save_checkpoint(tmp_path / "saved.ckpt")
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == set(script.build(L).state_dict()) == set(saved["current_model_state"])
    again = script.build(L)
    trainer(EMAWeightAveraging(decay=0.5)).fit(again, script.data(), script.data(8), ckpt_path=tmp_path / "saved.ckpt")


def test_weights_saved_on_a_thread_are_those_of_the_moment(tmp_path: Path) -> None:
    from leyden.checkpoint_io import AsyncCheckpointIO

    found = []
    for plugins in (None, AsyncCheckpointIO()):
        L.seed_everything(1, verbose=False)
        folder = tmp_path / str(plugins is None)
        saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1)
        run = trainer(WeightAveraging(), saves, enable_checkpointing=True, plugins=plugins)
        run.fit(script.build(L), script.data(), script.data(8))
        files = sorted(folder.glob("*.ckpt"))
        found.append([script.figures(torch.load(path, weights_only=True)["state_dict"]) for path in files])
    assert len(found[0]) == 4
    assert found[0] == found[1]


def test_another_checkpoint_begins_an_average(tmp_path: Path) -> None:
    run = trainer(max_epochs=1)
    run.fit(script.build(L), script.data(), script.data(8))
    run.save_checkpoint(tmp_path / "saved.ckpt")
    average = WeightAveraging()
    with pytest.warns(UserWarning, match="was written without WeightAveraging"):
        trainer(average).fit(script.build(L), script.data(), script.data(8), ckpt_path=tmp_path / "saved.ckpt")
    assert average._average_model.n_averaged == 6


@pytest.mark.parametrize(
    ("arguments", "updates"),
    [
        ({}, ([0, 1, 2, 3, 4, 5], [])),
        ({"update_every_n_steps": 2}, ([0, 2, 4], [])),
        ({"update_every_n_steps": 3, "update_starting_at_step": 2}, ([3], [])),
        ({"update_every_n_steps": 0, "update_starting_at_epoch": 1}, ([], [1, 2])),
    ],
)
def test_when_an_exponential_average_is_updated(arguments: Any, updates: Any) -> None:
    average = EMAWeightAveraging(**arguments)
    steps = [step for step in range(6) if average.should_update(step_idx=step)]
    assert (steps, [epoch for epoch in range(3) if average.should_update(epoch_idx=epoch)]) == updates
