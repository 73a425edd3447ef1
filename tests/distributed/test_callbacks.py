# SPDX-License-Identifier: Apache-2.0
"""Callbacks that touch weights, on two ranks: the same weights on both, and the same bits when the run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numbers_script as script
import pytest

import leyden as L
from leyden import callbacks as C
from ranks import on_ranks

MADE: dict[str, Any] = {
    "ema": lambda: (C.EMAWeightAveraging(decay=0.7), {}),
    "swa": lambda: (C.StochasticWeightAveraging(0.05, 2, 3), {}),
    "backbone": lambda: (C.BackboneFinetuning(1, lambda epoch: 1.5, 0.2), {"norm": False, "only_head": True}),
    "pruned": lambda: (C.ModelPruning("l1_unstructured", amount=0.2), {}),
    "spikes": lambda: (C.SpikeDetection(window=3, rtol=1e9), {"norm": False}),
}


class Saves(L.Callback):
    def __init__(self, path: Path | None) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.path is not None and (trainer.current_epoch, batch_idx) == (2, 1):
            trainer.save_checkpoint(self.path)


def fit(name: str, save: Path | None, ckpt_path: Path | None) -> dict[str, Any]:
    """Fit on two ranks; return what is left."""
    L.seed_everything(1, verbose=False)
    callback, arguments = MADE[name]()
    model = script.build(L, **arguments)
    trainer = L.Trainer(
        max_epochs=4, accelerator="cpu", devices=2, strategy="ddp", logger=False, callbacks=[callback, Saves(save)],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, script.data(), script.data(8), ckpt_path=ckpt_path)
    average = getattr(callback, "_average_model", None)
    return {
        "weights": script.figures(dict(model.named_parameters())),
        "average": None if average is None else script.figures(average.state_dict()),
        "buffers": script.figures(dict(model.named_buffers())),
        "last": model.seen["losses"][-1],
        "val": model.seen["val"][-2:],
        "trained": [name for name, p in model.named_parameters() if p.requires_grad],
    }


@pytest.mark.parametrize(
    "name", [name if name == "ema" else pytest.param(name, marks=pytest.mark.slow) for name in MADE]
)
def test_two_ranks_end_with_the_same_weights_and_go_on_with_the_same_bits(name: str, tmp_path: Path) -> None:
    whole = on_ranks(2, fit, name, tmp_path / "saved.ckpt", None)
    assert whole[0]["weights"] == whole[1]["weights"]
    again = on_ranks(2, fit, name, None, tmp_path / "saved.ckpt")
    assert again == whole
