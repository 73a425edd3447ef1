# SPDX-License-Identifier: Apache-2.0
"""WalltimeCheckpoint: a Trainer's run saved between two batches. tests/slurm does it in real jobs."""

from __future__ import annotations

import gc
import json
import os
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import leyden
from leyden.errors import MisconfigurationException
from leyden.search import HyperOptArgumentParser, SlurmCluster, WalltimeCheckpoint


class Net(leyden.LightningModule):
    """Sends itself SIGUSR1 in the middle of the step ``at``."""

    def __init__(self, at: int = -1, validates: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(4, 1)
        self.at = at
        self.steps: list[int] = []
        self.in_validation = validates

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_step == self.at and not self.in_validation:
            os.kill(os.getpid(), signal.SIGUSR1)
        self.steps.append(self.global_step)
        return (self.net(batch[0]) ** 2).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.global_step == self.at and self.in_validation:
            os.kill(os.getpid(), signal.SIGUSR1)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.1)


def loader(seed: int = 0) -> DataLoader[Any]:
    data = torch.randn(24, 4, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(data), batch_size=4)


def fit(model: Net, callbacks: list[Any], ckpt_path: Any = None) -> leyden.Trainer:
    trainer = leyden.Trainer(
        max_epochs=2, callbacks=callbacks, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, loader(), loader(1), ckpt_path=ckpt_path)
    return trainer


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], SlurmCluster]:
    """Make clusters as the jobs of one trial would."""
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text("#!/bin/bash\necho 8\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    for name in ("slurm_trials", "slurm_checkpoints"):
        (tmp_path / "job" / name).mkdir(parents=True)
    file = tmp_path / "job" / "slurm_trials" / "trial_0.json"
    file.write_text(json.dumps({"trial": 0, "values": {}, "script": "x", "checkpoints": 0, "jobs": [], "results": {}}))
    monkeypatch.setenv("LEYDEN_SLURM_TRIAL", str(file))
    return lambda: SlurmCluster(HyperOptArgumentParser().parse_args([]), tmp_path)


def run(cluster: SlurmCluster, fn: Callable[..., Any]) -> Any:
    return cluster.optimize_parallel_cluster_cpu(fn, 1, "job")


@pytest.mark.parametrize("in_validation", [False, True])
@pytest.mark.parametrize("at", [0, 3, 5, 6, 8, 11])
def test_a_signal_in_a_batch_is_acted_on_after_it_and_the_continuation_is_exact(
    job: Callable[[], SlurmCluster], at: int, in_validation: bool
) -> None:
    at = {0: 6, 3: 6}.get(at, 12) if in_validation else at  # validation runs after 6 and after 12 updates
    expected = Net()
    fit(expected, [])
    first, second = Net(at, in_validation), Net()
    cluster = job()
    with pytest.raises(SystemExit) as ended:
        run(cluster, lambda hparams, cluster: fit(first, [WalltimeCheckpoint(cluster)]))
    assert ended.value.code == 0
    run(job(), lambda hparams, cluster: fit(second, [WalltimeCheckpoint(cluster)], cluster.ckpt_path))
    assert first.steps == list(range(at if in_validation else at + 1)), "the batch was finished, and no other begun"
    assert first.steps + second.steps == list(range(12))
    assert torch.equal(second.net.weight, expected.net.weight)
    assert cluster.checkpoint_file is not None
    assert cluster.checkpoint_file.parent.name == "slurm_checkpoints"


def test_a_continuation_that_would_begin_anew_is_refused(job: Callable[[], SlurmCluster]) -> None:
    with pytest.raises(SystemExit):
        run(job(), lambda hparams, cluster: fit(Net(2), [WalltimeCheckpoint(cluster)]))
    with pytest.raises(MisconfigurationException, match=r"fit\(\.\.\., ckpt_path=cluster.ckpt_path\)"):
        run(job(), lambda hparams, cluster: fit(Net(), [WalltimeCheckpoint(cluster)]))


def test_filepath_says_where(job: Callable[[], SlurmCluster], tmp_path: Path) -> None:
    path = tmp_path / "mine.ckpt"
    with pytest.raises(SystemExit):
        run(job(), lambda hparams, cluster: fit(Net(2), [WalltimeCheckpoint(cluster, path)]))
    assert torch.load(path)["global_step"] == 3


def test_outside_of_a_job_nothing_happens(tmp_path: Path) -> None:
    cluster = SlurmCluster(HyperOptArgumentParser().parse_args([]), tmp_path)
    model = Net()
    fit(model, [WalltimeCheckpoint(cluster)], cluster.ckpt_path)
    assert len(model.steps) == 12
    assert not cluster.postponed


def test_after_the_fit_the_cluster_acts_at_once_again_and_keeps_nothing_alive(job: Callable[[], SlurmCluster]) -> None:
    cluster = job()
    model = Net()
    gc.disable()
    try:
        trainer = fit(model, [WalltimeCheckpoint(cluster)])
        assert not cluster.postponed
        ghosts = [weakref.ref(trainer), weakref.ref(model)]
        del trainer, model
        assert [ghost() for ghost in ghosts] == [None, None]
    finally:
        gc.enable()


def test_after_an_exception_the_cluster_acts_at_once_again(job: Callable[[], SlurmCluster]) -> None:
    class Failing(Net):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            raise ZeroDivisionError

    cluster = job()
    with pytest.raises(ZeroDivisionError):
        fit(Failing(), [WalltimeCheckpoint(cluster)])
    assert not cluster.postponed


def test_a_signal_after_the_trainer_is_gone_saves_nothing(job: Callable[[], SlurmCluster], capsys: Any) -> None:
    def train(hparams: Any, cluster: SlurmCluster) -> str:
        fit(Net(), [WalltimeCheckpoint(cluster)])
        gc.collect()
        os.kill(os.getpid(), signal.SIGUSR1)
        return "the trial went on"

    assert run(job(), train) == "the trial went on"
    assert "the Trainer is gone" in capsys.readouterr().err


def test_cluster_must_be_one() -> None:
    with pytest.raises(MisconfigurationException, match="cluster=7: it must be a SlurmCluster"):
        WalltimeCheckpoint(7)


def test_cluster_of_slurm(job: Callable[[], SlurmCluster]) -> None:
    """A Trainer built with the argument of 2019 needs no more than the cluster: it saves, and goes on, by itself."""

    def train(model: Net, cluster: SlurmCluster) -> None:
        trainer = leyden.Trainer(
            cluster=cluster, max_nb_epochs=2, accelerator="cpu", logger=False, checkpoint_callback=False,
            progress_bar=False, print_weights_summary=False,
        )  # fmt: skip
        trainer.fit(model, loader(), loader(1))

    expected, first, second = Net(), Net(7), Net()
    fit(expected, [])
    with pytest.raises(SystemExit):
        run(job(), lambda hparams, cluster: train(first, cluster))
    run(job(), lambda hparams, cluster: train(second, cluster))
    assert first.steps + second.steps == list(range(12))
    assert torch.equal(second.net.weight, expected.net.weight)
