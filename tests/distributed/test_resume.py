# SPDX-License-Identifier: Apache-2.0
"""A run of two processes goes on, on each rank, bit for bit as if nothing had happened (R4)."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import leyden as L
from leyden import files
from leyden.callbacks import ModelCheckpoint
from leyden.strategies import DDPStrategy
from ranks import Judged, Net, data, make_trainer, on_ranks


class _Random(Judged):
    """Draws random numbers, on each rank others, and more on one than on the other."""

    def __init__(self, folder: Path, at: int) -> None:
        super().__init__()
        self.folder, self.at = folder, at
        self.record: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_rank == 1:
            torch.rand(2)
        noisy = [batch[0] + 0.1 * torch.randn_like(batch[0]), *batch[1:]]
        loss = super().training_step(noisy, batch_idx)
        self.record.append((self.trainer.global_step, batch[2].tolist(), loss.item(), random.random()))
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.fit_loop.last is not None and len(self.record) == self.at:
            self.trainer.save_checkpoint(self.folder / f"{self.at}.ckpt")


def _fit(folder: Path, at: int, resumes: bool, workers: int) -> Any:
    L.seed_everything(4, verbose=False)
    torch.manual_seed(torch.initial_seed() + make_trainer().global_rank + 50 * resumes)
    module = _Random(folder, -1 if resumes else at)
    trainer = make_trainer(
        max_epochs=3, log_every_n_steps=1, accumulate_grad_batches=2, val_check_interval=2, gradient_clip_val=0.5
    )
    trainer.fit(
        module, DataLoader(data(35), 4, shuffle=True, num_workers=workers), DataLoader(data(9), 2),
        ckpt_path=folder / f"{at}.ckpt" if resumes else None,
    )  # fmt: skip
    return module.record, [dict(row) for row in trainer.history], [p.tolist() for p in module.parameters()]


@pytest.mark.parametrize(
    ("at", "workers"),
    [(1, 0), (7, 0), pytest.param(5, 0, marks=pytest.mark.slow), pytest.param(10, 0, marks=pytest.mark.slow)]
    + [pytest.param(at, 2, marks=pytest.mark.slow) for at in (1, 5, 7)],
)
def test_r4_two_ranks_go_on_exactly(tmp_path: Path, at: int, workers: int) -> None:
    whole = on_ranks(2, _fit, tmp_path, at, False, workers)
    resumed = on_ranks(2, _fit, tmp_path, at, True, workers)
    assert whole[0][0][0][1] != whole[1][0][0][1]
    for (record, rows, weights), (their_record, their_rows, their_weights) in zip(whole, resumed, strict=True):
        assert len(record) == 15
        assert their_record == record[at:]
        assert their_weights == weights
        assert their_rows == rows[-len(their_rows) :]


def _save_best(folder: Path) -> Any:
    saving = ModelCheckpoint(folder, monitor="val", save_top_k=1, save_last=True)
    module = Judged()
    trainer = make_trainer(max_epochs=2, callbacks=[saving], enable_checkpointing=True, default_root_dir=folder)
    loaders = DataLoader(data(16), 2), DataLoader(data(5), 2)
    trainer.fit(module, *loaders)
    best = trainer.test(None, loaders[1], ckpt_path="best", verbose=False)
    last = trainer.test(module, loaders[1], ckpt_path="last", verbose=False)
    return saving.best_model_path, saving.last_model_path, best, last


def test_best_and_last_are_the_same_on_all_ranks_and_one_rank_writes(tmp_path: Path) -> None:
    zero, one = on_ranks(2, _save_best, tmp_path)
    assert zero == one
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == sorted({Path(zero[0]).name, "last.ckpt"})
    ranks = files.load(tmp_path / "last.ckpt")["leyden"]["ranks"]
    assert len(ranks) == 2


class _Plain(_Random):
    """Without a schedule, which would have to know how many steps there are."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05)


def _save(folder: Path) -> Any:
    module = _Plain(folder, 3)
    make_trainer(max_epochs=1).fit(module, DataLoader(data(32), 4), DataLoader(data(4), 2))
    return [batch for _, batch, *_ in module.record[:3]]


def test_one_process_goes_on_from_two_at_the_next_sample_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    done = on_ranks(2, _save, tmp_path)
    module = _Plain(tmp_path, -1)
    make_trainer(1, max_epochs=1, keep_global_batch=False).fit(
        module, DataLoader(data(32), 4), DataLoader(data(4), 2), ckpt_path=tmp_path / "3.ckpt"
    )
    assert "made by 2 processes and are made by 1 process now, each with its own batches" in caplog.text
    rest = [i for _, batch, *_ in module.record for i in batch]
    assert sorted(i for rank in done for batch in rank for i in batch) + rest == list(range(32))


def _by_step(folder: Path) -> Any:
    saving = ModelCheckpoint(folder, "{step}-{loss_step:.3f}", "loss_step", save_top_k=2, every_n_train_steps=2)
    trainer = make_trainer(max_epochs=2, callbacks=[saving], enable_checkpointing=True)
    trainer.fit(_Local(), DataLoader(data(16), 2), DataLoader(data(4), 2))
    return sorted(saving.best_k_models), saving.best_model_path


class _Local(Judged):
    """Each rank monitors a value of its own."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss_step", loss + self.global_rank * (batch_idx % 3))
        return loss


def test_files_that_are_named_after_the_value_of_a_step_are_rank_zeros(tmp_path: Path) -> None:
    (kept, best), _ = on_ranks(2, _by_step, tmp_path)
    assert len(kept) == 2
    assert best in kept
    assert sorted(str(path) for path in tmp_path.glob("*.ckpt")) == kept


class _OtherOrder(Net):
    """Its layers are used in another order than they are made in, so that gradients come in another than is guessed."""

    def __init__(self, folder: Path, at: int) -> None:
        super().__init__()
        self.last, self.first, self.middle = torch.nn.Linear(48, 1), torch.nn.Linear(4, 48), torch.nn.Linear(48, 48)
        self.folder, self.at = folder, at
        self.losses: list[float] = []

    def loss(self, batch: Any) -> Any:
        hidden = self.middle(self.first(batch[0]).relu()).tanh()
        return (self.last(hidden) - batch[1].reshape(-1, 1)).square().mean() + 0.0 * super().loss(batch)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if len(self.losses) == self.at:
            self.trainer.save_checkpoint(self.folder / "at.ckpt")

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.05)


def _of_three(folder: Path, at: int, resumes: bool, arguments: dict[str, Any]) -> Any:
    L.seed_everything(4, verbose=False)
    module = _OtherOrder(folder, -1 if resumes else at)
    trainer = make_trainer(3, max_epochs=2, strategy=DDPStrategy(**arguments), accumulate_grad_batches=1 + (at == 3))
    trainer.fit(module, DataLoader(data(60), 2, shuffle=True), ckpt_path=folder / "at.ckpt" if resumes else None)
    return module.losses, [p.tolist() for p in module.parameters()]


@pytest.mark.parametrize(("at", "arguments"), [(1, {}), (3, {}), (8, {"gradient_as_bucket_view": True})])
def test_r4_three_ranks_add_up_their_gradients_in_the_same_order(
    tmp_path: Path, at: int, arguments: dict[str, Any]
) -> None:
    whole = on_ranks(3, _of_three, tmp_path, at, False, arguments)
    resumed = on_ranks(3, _of_three, tmp_path, at, True, arguments)
    for (losses, weights), (their_losses, their_weights) in zip(whole, resumed, strict=True):
        assert their_losses == losses[at:]
        assert their_weights == weights
