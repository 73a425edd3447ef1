# SPDX-License-Identifier: Apache-2.0
"""Callbacks that touch weights: Lightning's figures to the last bit, and runs that were killed anywhere and go on.

The figures of Lightning were recorded by numbers_script.py; on another machine than that of the record the last bits may
differ, and are given some room.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numbers_script as script
import pytest
import torch

import leyden as L
from leyden import callbacks as C
from leyden.config import set_default_semantics

RECORDED = json.loads(Path(__file__).with_name("numbers_of_lightning_2_6_6.json").read_text(encoding="utf-8"))


@pytest.fixture(params=["lightning"])
def semantics(request: pytest.FixtureRequest) -> Any:
    """The default of every Trainer in the test."""
    before = set_default_semantics(request.param)
    yield request.param
    set_default_semantics(before)


def alike(ours: Any, theirs: Any) -> bool:
    """Whether figures are equal but for rounding."""
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(alike(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, list):
        return len(ours) == len(theirs) and all(alike(*pair) for pair in zip(ours, theirs, strict=True))
    if isinstance(theirs, str) and "0x" in theirs and "," not in theirs:
        return float.fromhex(ours) == pytest.approx(float.fromhex(theirs), rel=1e-4, abs=1e-6)
    return True if isinstance(theirs, str) and "0x" in theirs else ours == theirs


@pytest.mark.parametrize("name", [name for name in RECORDED if name != "machine"])
def test_the_figures_are_those_of_lightning(name: str, semantics: str, tmp_path: Path) -> None:
    if name == "device":
        pytest.importorskip("psutil")
    ours = script.result(name, L, tmp_path)
    if RECORDED["machine"] == script.machine():
        assert ours == RECORDED[name]
    else:
        assert alike(ours, RECORDED[name])


# ---------------------------------------------------------------------------------------------------------- resume


class Thaws(C.BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=0.02)


MADE: dict[str, Callable[[], tuple[Any, list[Any], dict[str, Any]]]] = {
    "swa": lambda: (script.build(L), [C.StochasticWeightAveraging(0.05, 2, 3)], {}),
    "swa of a schedule": lambda: (
        script.build(L, norm=False, schedule=True),
        [C.StochasticWeightAveraging(0.05, 0.5, 3, "linear"), C.LearningRateMonitor()],
        {"accumulate_grad_batches": 2},
    ),
    "average": lambda: (script.build(L), [C.WeightAveraging()], {"val_check_interval": 0.5}),
    "ema": lambda: (script.build(L), [C.EMAWeightAveraging(None, True, 0.8, 2, 3, 1)], {"gradient_clip_val": 0.5}),
    "backbone": lambda: (script.build(L, norm=False, only_head=True), [C.BackboneFinetuning(1, lambda epoch: 1.5, 0.2)], {}),
    "thawed": lambda: (script.build(L, only_head=True, schedule=True), [Thaws()], {"accumulate_grad_batches": 4}),
    "thawed, fused": lambda: (script.build(L, only_head=True), [Thaws()], {"fused_optimizers": True}),
    "pruned": lambda: (script.build(L), [C.ModelPruning("l1_unstructured", amount=0.2)], {}),
    "pruned, with masks": lambda: (
        script.build(L),
        [C.ModelPruning("random_unstructured", amount=0.2, make_pruning_permanent=False, resample_parameters=True)],
        {},
    ),
    "pruned by layer": lambda: (
        script.build(L),
        [
            C.ModelPruning(
                "l1_unstructured", use_global_unstructured=False, amount=1, use_lottery_ticket_hypothesis=False,
                parameter_names=["weight"],
            )
        ],
        {},
    ),
    "spikes": lambda: (script.build(L), [C.SpikeDetection(window=3, rtol=1e9)], {}),
}  # fmt: skip


class SavesAll(L.Callback):
    """Saves after each batch, and at the end of each epoch; those of ``names`` only, if there are any."""

    def __init__(self, folder: Path | None, names: Iterable[str] = ()) -> None:
        self.folder, self.names = folder, list(names)
        self.saved: list[Path] = []

    def save(self, trainer: Any, name: str) -> None:
        if self.folder is not None and (name in self.names or not self.names):
            self.saved.append(self.folder / f"{name}.ckpt")
            trainer.save_checkpoint(self.saved[-1])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.save(trainer, f"{trainer.current_epoch}-{batch_idx}")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.save(trainer, f"{trainer.current_epoch}-end")


def fit(
    name: str, folder: Path | None, ckpt_path: Path | None = None, names: Iterable[str] = (), **more: Any
) -> tuple[dict[str, Any], list[Path]]:
    """Fit; return all that is left of it, and what was saved on the way."""
    L.seed_everything(1, verbose=False)
    model, callbacks, arguments = MADE[name]()
    saves = SavesAll(folder, names)
    trainer = L.Trainer(
        **{"max_epochs": 4, "log_every_n_steps": 1, **arguments, **more},
        accelerator="cpu",
        logger=False,
        callbacks=[callback for callback in callbacks if not isinstance(callback, C.LearningRateMonitor)] + [saves],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, script.data(), script.data(8), ckpt_path=ckpt_path)
    left = {
        "weights": script.figures(model.state_dict()),
        "losses": model.seen["losses"],
        "val": model.seen["val"],
        "state": script.figures({str(i): c.state_dict() for i, c in enumerate(callbacks)}),
        "optimizer": script.figures(trainer.optimizers[0].state_dict()),
        "trained": [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        "step": trainer.global_step,
    }
    average = getattr(callbacks[0], "_average_model", None)
    if average is not None:
        left["average"] = script.figures(average.state_dict())
    return left, saves.saved


def compare(name: str, tmp_path: Path, *names: str, **more: Any) -> None:
    """Fit, and fit again from each of the checkpoints of these names; of all without a name."""
    whole, saved = fit(name, tmp_path, names=names, **more)
    assert len(saved) == len(names) if names else len(saved) >= 28
    for path in saved:
        again, _ = fit(name, None, path, **more)
        for key in ("losses", "val"):
            part = again.pop(key)
            assert part == whole[key][len(whole[key]) - len(part) :], (path.name, key)
        for key, value in again.items():
            assert value == whole[key], (path.name, key)


@pytest.mark.parametrize("name", MADE)
def test_a_run_that_is_killed_goes_on_with_the_same_bits(name: str, tmp_path: Path) -> None:
    compare(name, tmp_path, "0-5", "2-3", "3-end", *(["4-2", "4-end"] if name == "swa" else []))


@pytest.mark.slow
@pytest.mark.parametrize("rules", ["leyden", "lightning"])
@pytest.mark.parametrize("name", MADE)
def test_it_does_so_from_every_batch_and_epoch(name: str, rules: str, tmp_path: Path) -> None:
    compare(name, tmp_path, semantics=rules)


def test_it_does_so_in_mixed_precision(tmp_path: Path) -> None:
    compare("ema", tmp_path, "1-2", "3-5", precision="bf16-mixed")


class InFormat(L.Callback):
    """Notes the number format of the average."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.dtype = next(trainer.callbacks[0]._average_model.parameters()).dtype


def test_it_does_so_in_half_and_double_precision(tmp_path: Path) -> None:
    """The average of bfloat16 weights is kept in float32, that of float64 weights in float64."""
    for precision, expected in (("bf16-true", torch.float32), ("64-true", torch.float64)):
        notes = InFormat()
        trainer = L.Trainer(
            max_epochs=1, accelerator="cpu", precision=precision, logger=False, enable_checkpointing=False,
            callbacks=[C.EMAWeightAveraging(), notes], enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(script.build(L), script.data(), script.data(8))
        assert notes.dtype is expected
        compare("ema", tmp_path / precision, "1-2", precision=precision)
