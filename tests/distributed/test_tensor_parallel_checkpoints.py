# SPDX-License-Identifier: Apache-2.0
"""Runs of groups that work on one batch go on exactly, and their checkpoints are those of any other strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import leyden as L
from leyden.strategies import TensorParallelStrategy
from ranks import make_trainer, on_ranks
from tensor_models import GPT, Perceptron, numbers, texts


class _Drawing(GPT):
    """A GPT with dropout and Adam, that saves itself in the middle of an epoch."""

    def __init__(self, path: Path | None, at: int) -> None:
        super().__init__(0.1)
        self.path, self.at = path, at

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.path is not None and len(self.losses) == self.at:
            self.trainer.save_checkpoint(self.path)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.003)


def _go(path: Path, at: int, devices: int, resumes: bool, kind: str) -> Any:
    L.seed_everything(4 + 50 * resumes, verbose=False)
    module = _Drawing(None if resumes else path, at)
    trainer = make_trainer(
        devices, strategy=TensorParallelStrategy(tensor_parallel_size=2, state_dict_type=kind), max_epochs=2,
        accumulate_grad_batches=2, gradient_clip_val=0.5, log_every_n_steps=1, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(
        module, DataLoader(texts(16), 2, shuffle=True), DataLoader(texts(3), 2), ckpt_path=path if resumes else None
    )
    return module.losses, [dict(row) for row in trainer.history], [p.tolist() for p in module.parameters()]


@pytest.mark.parametrize(
    ("devices", "at", "kind"),
    [(2, 5, "full"), (4, 3, "sharded")]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 5, "sharded"), (4, 3, "full"))],
)
def test_r4_groups_go_on_exactly(tmp_path: Path, devices: int, at: int, kind: str) -> None:
    path = tmp_path / "a.ckpt"
    straight = on_ranks(devices, _go, path, at, devices, False, kind)
    assert path.is_dir() is (kind == "sharded")
    resumed = on_ranks(devices, _go, path, at, devices, True, kind)
    for (losses, rows, weights), (their_losses, their_rows, their_weights) in zip(straight, resumed, strict=True):
        assert their_losses == losses[at:]
        assert their_weights == weights
        assert their_rows == rows[-len(their_rows) :]
    assert straight[0][0] == straight[1][0]  # one batch, the same random numbers


def _stage(path: Path, devices: int, strategy: Any, epochs: int, resumes: bool) -> Any:
    L.seed_everything(3, verbose=False)
    module = Perceptron()
    trainer = make_trainer(devices, strategy=strategy, max_epochs=epochs, num_sanity_val_steps=0)
    loaders = (
        DataLoader(numbers(24), 8 // trainer.strategy.data_size),
        DataLoader(numbers(5), 4),
    )
    trainer.fit(module, *loaders, ckpt_path=path if resumes else None)
    trainer.save_checkpoint(path)
    (tested,) = trainer.test(module, loaders[1], verbose=False)
    predicted = trainer.predict(module, loaders[1])
    assert predicted is not None
    return tested["val"], [int(i) for batch in predicted for i in batch], [p.tolist() for p in module.parameters()]


@pytest.mark.filterwarnings("ignore:.*(was written by|batch size of):UserWarning")
def test_f3_a_checkpoint_goes_from_strategy_to_strategy_and_back(tmp_path: Path) -> None:
    one, path = tmp_path / "one.ckpt", tmp_path / "a.ckpt"
    for epochs in range(1, 6):
        expected = _stage(one, 1, "auto", epochs, epochs > 1)
    _stage(path, 1, "auto", 1, False)
    on_ranks(2, lambda: _stage(path, 2, "tensor_parallel", 2, True))
    on_ranks(2, lambda: _stage(path, 2, "ddp", 3, True))
    on_ranks(4, lambda: _stage(path, 4, TensorParallelStrategy(tensor_parallel_size=2), 4, True))
    found = _stage(path, 1, "auto", 5, True)
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    for one_weight, other in zip(expected[2], found[2], strict=True):
        assert torch.allclose(torch.tensor(one_weight), torch.tensor(other), atol=1e-5)
