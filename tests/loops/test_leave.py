# SPDX-License-Identifier: Apache-2.0
"""Where a run that a signal ended goes on: by itself in a job of SLURM that is started anew, by ckpt_path="hpc" elsewhere."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import leyden as L
from leyden import files
from leyden.errors import CheckpointNotFoundError, LeydenWarning, SIGTERMException
from leyden.loops import leave
from leyden.loops.leave import is_whole
from leyden.runtime import cluster


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.net(nn.functional.dropout(batch)) ** 2).mean()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.05)


class Stop(L.Callback):
    """Sends a signal in the batch after ``step``."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A job of a SLURM whose scontrol notes what it is asked; call it to start the process of a job anew."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\n')
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def start(number: str = "71", restarts: int = 0) -> None:
        monkeypatch.setenv("SLURM_JOB_ID", number)
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        monkeypatch.setattr(cluster, "_FITS", itertools.count())

    start()
    start.asked = folder / "asked"  # type: ignore[attr-defined]
    start.env = monkeypatch  # type: ignore[attr-defined]
    return start


def fit(folder: Path, *callbacks: Any, ckpt_path: Any = None, **options: Any) -> L.Trainer:
    L.seed_everything(2, verbose=False)
    given: dict[str, Any] = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, **options}
    trainer = L.Trainer(
        callbacks=list(callbacks), default_root_dir=folder, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False, **given,
    )  # fmt: skip
    trainer.fit(Net(), DataLoader(torch.ones(8, 3), batch_size=2, shuffle=True), ckpt_path=ckpt_path)
    return trainer


def assert_same(one: L.Trainer, other: L.Trainer) -> None:
    for name, value in other.lightning_module.state_dict().items():
        assert torch.equal(one.lightning_module.state_dict()[name], value), name


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "bin")


def test_P2_a_job_saves_is_requeued_and_goes_on_by_itself(job: Any, tmp_path: Path) -> None:
    for step, restarts, left in ((3, 0, ["hpc_ckpt_1.ckpt"]), (5, 1, ["hpc_ckpt_2.ckpt"])):
        job(restarts=restarts)
        with pytest.raises(SIGTERMException):
            fit(tmp_path, Stop(step, signal.SIGUSR1))
        assert names(tmp_path) == left
        assert files.recorded_step(tmp_path / left[0]) == step + 1
    assert job.asked.read_text() == "requeue 71\n" * 2
    job(restarts=2)
    resumed = fit(tmp_path)
    job.env.delenv("SLURM_JOB_ID")
    assert_same(resumed, fit(tmp_path / "whole"))


def test_P2_only_the_signal_for_it_requeues(job: Any, tmp_path: Path) -> None:
    with pytest.raises(SIGTERMException):
        fit(tmp_path, Stop(3, signal.SIGTERM))
    assert names(tmp_path) == ["hpc_ckpt_1.ckpt"]  # SLURM may start it anew by itself
    job("72")
    own = cluster.SLURMEnvironment(requeue_signal=signal.SIGUSR2)
    with pytest.raises(SIGTERMException):
        fit(tmp_path, Stop(3, signal.SIGUSR1), plugins=own)
    assert not job.asked.exists()
    job("73")
    with pytest.raises(SIGTERMException):
        fit(tmp_path, Stop(3, signal.SIGUSR2), plugins=[own])
    assert job.asked.read_text() == "requeue 73\n"
    assert names(tmp_path) == ["hpc_ckpt_1.ckpt", "hpc_ckpt_2.ckpt", "hpc_ckpt_3.ckpt"]
    job("74")
    with pytest.raises(SIGTERMException):
        fit(tmp_path, Stop(3, signal.SIGUSR1), plugins=cluster.SLURMEnvironment(auto_requeue=False))
    assert job.asked.read_text() == "requeue 73\n"
    assert len(names(tmp_path)) == 3


def test_P2_a_job_that_is_no_batch_job_is_not_requeued(job: Any, tmp_path: Path) -> None:
    job.env.setenv("SLURM_JOB_NAME", "bash")
    with pytest.raises(SIGTERMException):
        fit(tmp_path, Stop(3, signal.SIGUSR1))
    assert names(tmp_path) == []
    assert not job.asked.exists()


def test_P2_with_a_callback_it_is_one_file_with_two_names(job: Any, tmp_path: Path) -> None:
    with pytest.raises(SIGTERMException):
        fit(tmp_path, Stop(2, signal.SIGUSR1), enable_checkpointing=True)
    saved = tmp_path / "checkpoints" / "interrupted.ckpt"
    assert saved.samefile(tmp_path / "hpc_ckpt_1.ckpt")
    # a node may fail later: the newest of the job's own checkpoints counts, whatever name it has
    job(restarts=1)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, Fails(6), enable_checkpointing=True)
    assert files.recorded_step(tmp_path / "hpc_ckpt_1.ckpt") == 3
    job(restarts=2)
    resumed = fit(tmp_path, enable_checkpointing=True)
    assert Path(resumed.ckpt_path).name == "epoch=0-step=4.ckpt"
    job.env.delenv("SLURM_JOB_ID")
    assert_same(resumed, fit(tmp_path / "whole"))


class Fails(L.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise ZeroDivisionError


def test_P2_each_fit_of_a_job_goes_on_from_its_own(job: Any, tmp_path: Path) -> None:
    first = fit(tmp_path, max_epochs=1)
    with pytest.raises(SIGTERMException):
        fit(tmp_path, Stop(5, signal.SIGUSR1))
    job(restarts=1)
    again = fit(tmp_path, max_epochs=1)
    assert again.ckpt_path is None
    assert_same(again, first)
    assert Path(fit(tmp_path).ckpt_path) == tmp_path / "hpc_ckpt_1.ckpt"


def test_P2_the_own_checkpoint_comes_before_the_one_that_the_script_begins_with(job: Any, tmp_path: Path) -> None:
    begin = tmp_path / "begin.ckpt"
    fit(tmp_path, max_steps=1).save_checkpoint(begin)
    job(restarts=0)
    with pytest.raises(SIGTERMException):
        fit(tmp_path, Stop(3, signal.SIGUSR1), ckpt_path=begin)
    job(restarts=1)
    assert Path(fit(tmp_path, ckpt_path=begin).ckpt_path) == tmp_path / "hpc_ckpt_1.ckpt"


def test_P2_the_checkpoint_of_another_job_is_taken_only_when_asked_for(
    job: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(SIGTERMException):
        fit(tmp_path, Stop(3, signal.SIGUSR1))
    job("72")
    caplog.set_level("INFO", "leyden")
    assert fit(tmp_path, max_epochs=1).ckpt_path is None
    assert "hpc_ckpt_1.ckpt is of another job, and is not used. To go on from it, pass ckpt_path='hpc'" in caplog.text
    assert Path(fit(tmp_path, ckpt_path="hpc").ckpt_path) == tmp_path / "hpc_ckpt_1.ckpt"
    # Lightning's do not say of which job they are: the newest counts, as there
    theirs = files.load(tmp_path / "hpc_ckpt_1.ckpt")
    del theirs["leyden"]["job"]
    files.save(theirs, tmp_path / "hpc_ckpt_12.ckpt")
    assert Path(fit(tmp_path).ckpt_path) == tmp_path / "hpc_ckpt_12.ckpt"


def test_hpc_is_the_one_with_the_highest_number_outside_of_a_job_too(job: Any, tmp_path: Path) -> None:
    job.env.delenv("SLURM_JOB_ID")
    with pytest.raises(CheckpointNotFoundError, match=r"there is no good hpc_ckpt_<n>.ckpt in"):
        fit(tmp_path, ckpt_path="hpc")
    trainer = fit(tmp_path, max_epochs=1)
    for number in (2, 10):
        trainer.save_checkpoint(tmp_path / f"hpc_ckpt_{number}.ckpt")
    assert Path(fit(tmp_path, ckpt_path="hpc").ckpt_path).name == "hpc_ckpt_10.ckpt"
    trainer.test(Net(), DataLoader(torch.ones(2, 3)), ckpt_path="hpc", verbose=False)


def test_P2_a_damaged_checkpoint_is_passed_over_with_a_word(job: Any, tmp_path: Path) -> None:
    for restarts, step in ((0, 2), (1, 5)):
        job(restarts=restarts)
        with pytest.raises(SIGTERMException):
            fit(tmp_path, Stop(step, signal.SIGUSR1), enable_checkpointing=True)
    newest = tmp_path / "hpc_ckpt_2.ckpt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 255
    newest.write_bytes(content)
    job(restarts=2)
    with pytest.warns(LeydenWarning, match="Passed over while looking for where the job goes on"):
        resumed = fit(tmp_path, enable_checkpointing=True)
    assert Path(resumed.ckpt_path).name == "epoch=0-step=4.ckpt"
    newest.write_bytes(content[: len(content) // 2])
    with pytest.warns(LeydenWarning, match="Passed over"), pytest.raises(CheckpointNotFoundError, match="no good hpc"):
        fit(tmp_path, ckpt_path="hpc")


def test_P2_outside_of_fit_a_job_is_not_requeued(job: Any, tmp_path: Path) -> None:
    class Stops(L.Callback):
        def on_test_batch_start(self, *args: Any) -> None:
            os.kill(os.getpid(), signal.SIGUSR1)

    trainer = L.Trainer(
        callbacks=Stops(), logger=False, enable_progress_bar=False, accelerator="cpu", default_root_dir=tmp_path
    )
    with pytest.raises(SIGTERMException):
        trainer.test(Net(), DataLoader(torch.ones(2, 3)))
    assert not job.asked.exists()
    assert names(tmp_path) == []


def test_P2_a_file_that_cannot_have_two_names_is_copied(
    job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*args: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuses)
    with pytest.raises(SIGTERMException):
        fit(tmp_path, Stop(2, signal.SIGUSR1), enable_checkpointing=True)
    assert files.recorded_step(tmp_path / "hpc_ckpt_1.ckpt") == 3
    assert names(tmp_path) == ["checkpoints", "hpc_ckpt_1.ckpt"]


@pytest.mark.parametrize(("where", "saved"), [("loader", True), ("step", False)])
def test_P4_what_workers_that_are_gone_interrupt_is_saved_between_two_steps_only(
    where: str, saved: bool, tmp_path: Path
) -> None:
    gone = RuntimeError("DataLoader worker (pid(s) 4711) exited unexpectedly")

    class Data(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> Tensor:
            if where == "loader" and index == 5:
                os.kill(os.getpid(), signal.SIGTERM)
                raise gone
            return torch.ones(3)

    class Steps(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if where == "step" and batch_idx == 5:
                os.kill(os.getpid(), signal.SIGTERM)
                raise gone
            return super().training_step(batch, batch_idx)

    trainer = L.Trainer(
        max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        accelerator="cpu",
    )  # fmt: skip
    with pytest.raises(SIGTERMException) as caught:
        trainer.fit(Steps(), DataLoader(Data()))
    assert caught.value.__cause__ is gone
    assert (tmp_path / "checkpoints" / "interrupted.ckpt").exists() == saved
    assert not is_whole(trainer, None, ValueError())


def test_a_folder_gets_its_second_name_for_the_job_that_goes_on(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        torch.save({"global_step": 3, "leyden": {"format": 1}}, folder / "meta.pt")

    files.save_folder(tmp_path / "a.ckpt", write, {"global_step": 3})
    leave._second_name(str(tmp_path / "a.ckpt"), str(tmp_path / ".hpc_ckpt.1.tmp"))
    (tmp_path / "hpc_ckpt_1.ckpt").write_text("of another job")
    path = leave._take_name(str(tmp_path / ".hpc_ckpt.1.tmp"), str(tmp_path), 1)
    assert path == str(tmp_path / "hpc_ckpt_2.ckpt")
    files.remove(tmp_path / "a.ckpt")
    assert files.load(path)["global_step"] == 3
    assert names(tmp_path) == ["hpc_ckpt_1.ckpt", "hpc_ckpt_2.ckpt"]
