# SPDX-License-Identifier: Apache-2.0
"""What the advisor promises: every candidate is in the table with its evidence, and nothing of the user's has changed."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import leyden as L
from leyden.callbacks import EarlyStopping
from leyden.loggers import CSVLogger


class Pictures(Dataset[Any]):
    """Random pictures, noisy each time; remembers how often it was asked."""

    def __init__(self) -> None:
        self.images = torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        self.rng = np.random.default_rng(5)
        self.asked = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.asked += 1
        noise = float(self.rng.random()) + random.random() + float(np.random.rand()) + torch.rand(()).item()
        return self.images[index] + 0.1 * noise, index % 4


class Net(L.LightningModule):
    """A convolution, batch statistics and dropout; the class counts optimizers and steps."""

    made: ClassVar[int] = 0
    kinds: ClassVar[set[tuple[bool, bool, torch.dtype]]] = set()

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(288, 4)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        scores = self.net(batch[0])
        fused = bool(self.trainer.optimizers[0].param_groups[0]["fused"])
        last = self.net[0].weight.is_contiguous(memory_format=torch.channels_last)
        self.kinds.add((fused, last, scores.dtype))
        loss = nn.functional.cross_entropy(scores.float(), batch[1])
        self.log("loss", loss, prog_bar=True)
        self.logger.log_metrics({"mine": 1.0})
        return loss

    def configure_optimizers(self) -> Any:
        Net.made += 1
        return torch.optim.AdamW(self.parameters(), 0.01)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        raise AssertionError("no checkpoint is made")


def everything(trainer: L.Trainer, module: Net, loader: DataLoader[Any]) -> dict[str, Any]:
    """Return all that must not change, as far as one can look at it."""
    data: Any = loader.dataset
    return {
        "weights": {name: value.tolist() for name, value in module.state_dict().items()},
        "gradients": [parameter.grad for parameter in module.parameters()],
        "modes": [part.training for part in module.modules()],
        "module": sorted(vars(module)),
        "attached": module.attached,
        "python": random.getstate(),
        "numpy": repr(np.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "order": loader.generator.get_state().tolist(),
        "data": (data.asked, repr(data.rng.bit_generator.state)),
        "loader": sorted(vars(loader)),
        "trainer": sorted(vars(trainer)),
        "config": trainer.config,
        "progress": copy.deepcopy(trainer.progress.state_dict()),
        "rows": list(trainer.history),
        "callbacks": [type(callback) for callback in trainer.callbacks],
        "optimizers": list(trainer.optimizers),
        "stage": (trainer.state.stage, trainer.state.status, trainer.state.fn),
        "matmul": torch.get_float32_matmul_precision(),
        "determinism": torch.are_deterministic_algorithms_enabled(),
    }


@pytest.fixture(autouse=True)
def _quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes half a minute: only the slow test does. Threads would wait for each other on a busy machine."""
    torch.set_num_threads(1)
    if "slow" not in request.keywords:
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")


@pytest.mark.slow
def test_nothing_changes_where_it_compiles(tmp_path: Path) -> None:
    test_nothing_changes(tmp_path, False)


@pytest.mark.parametrize("trained", [False, True])
def test_nothing_changes(tmp_path: Path, trained: bool) -> None:
    def make() -> tuple[L.Trainer, Net, DataLoader[Any]]:
        L.seed_everything(3, verbose=False)
        trainer = L.Trainer(
            max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, logger=CSVLogger(tmp_path), log_every_n_steps=1,
            callbacks=[EarlyStopping("loss", patience=99)], enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False,
        )  # fmt: skip
        order = torch.Generator().manual_seed(7)
        return trainer, Net(), DataLoader(Pictures(), batch_size=8, shuffle=True, generator=order)

    trainer, module, loader = make()
    if trained:
        trainer.fit(module, loader)
    before = everything(trainer, module, loader)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    trainer.advise(module, loader, seconds=0.01)
    assert everything(trainer, module, loader) == before
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    if not trained:
        trainer.fit(module, loader)
        other, same, its_loader = make()
        other.fit(same, its_loader)
        ours, theirs = everything(trainer, module, loader), everything(other, same, its_loader)
        for name in ("weights", "torch", "numpy", "python", "order", "data", "progress"):
            assert ours[name] == theirs[name], f"the fit that follows is the one without advice: {name}"


def test_every_candidate_is_measured_on_the_users_own_step(capsys: pytest.CaptureFixture[str]) -> None:
    Net.kinds.clear()
    L.seed_everything(3, verbose=False)
    trainer = L.Trainer(max_epochs=5, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.loggers = [CSVLogger("nowhere")]
    advice = trainer.advise(Net(), DataLoader(Pictures(), batch_size=8, shuffle=True), seconds=0.05)
    rows = {row["candidate"]: row for row in advice.rows}
    assert {(False, False, torch.float32), (True, False, torch.float32), (False, True, torch.float32)} <= Net.kinds
    assert (False, False, torch.bfloat16) in Net.kinds
    assert list(rows)[:4] == ["as it is", "compile", "fused optimizers", "bf16-mixed"]
    assert {"channels_last", "TF32", "CUDA graphs"} <= set(rows)
    assert rows["TF32"]["reason"] == rows["CUDA graphs"]["reason"] == "needs CUDA"
    for name in ("as it is", "fused optimizers", "bf16-mixed", "channels_last"):
        row = rows[name]
        assert row["verdict"] in ("baseline", "faster", "slower", "within noise"), row
        assert row["least"] <= row["ratio"] <= row["most"]
        assert row["seconds"] > 0
        assert row["batches"] >= 7
        assert row["memory"] is None, "on a CPU there is no honest figure"
    assert rows["as it is"]["loss_difference"] == 0, "the same seed gives the same losses"
    assert rows["fused optimizers"]["loss_difference"] == pytest.approx(0, abs=1e-4)
    assert 0 < abs(rows["bf16-mixed"]["loss_difference"]) < 0.5
    assert rows["fused optimizers"]["write"] == "Trainer(fused_optimizers=True)"
    assert str(advice) in capsys.readouterr().out
    L.Trainer(accelerator="cpu", logger=False, **advice.arguments)
    assert not Path("nowhere").exists()


def test_a_candidate_that_fails_is_a_row_and_not_an_end() -> None:
    class Delicate(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if self.trainer.precision == "bf16-mixed":
                raise RuntimeError("out of memory\nwith bf16")
            return loss

    trainer = L.Trainer(max_epochs=5, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.loggers = [CSVLogger("nowhere")]
    advice = trainer.advise(Delicate(), DataLoader(Pictures(), batch_size=8), seconds=0.01)
    rows = {row["candidate"]: row for row in advice.rows}
    assert (rows["bf16-mixed"]["verdict"], rows["bf16-mixed"]["reason"]) == ("failed", "RuntimeError: out of memory")
    assert rows["channels_last"]["ratio"] is not None
    assert "precision" not in advice.arguments
