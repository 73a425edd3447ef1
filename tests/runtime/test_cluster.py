# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

import leyden as L
from leyden.errors import LeydenWarning, MisconfigurationException
from leyden.runtime.cluster import SLURMEnvironment


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    return monkeypatch


def test_a_job_is_one_that_sbatch_has_started(job: pytest.MonkeyPatch) -> None:
    assert SLURMEnvironment.detect()
    assert SLURMEnvironment.job_name() == "train"
    for name in ("bash", "interactive"):
        job.setenv("SLURM_JOB_NAME", name)
        assert not SLURMEnvironment.detect()
    job.setenv("SLURM_JOB_NAME", "train")
    job.delenv("SLURM_JOB_ID")
    assert not SLURMEnvironment.detect()


def test_the_number_of_a_job_in_an_array_is_that_of_the_array_and_the_task(job: pytest.MonkeyPatch) -> None:
    assert SLURMEnvironment.job_id() == "71"
    job.setenv("SLURM_ARRAY_JOB_ID", "70")
    job.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert SLURMEnvironment.job_id() == "70_1"


def test_the_signal_must_be_one_that_ends_a_run() -> None:
    assert SLURMEnvironment().requeue_signal == signal.SIGUSR1
    assert SLURMEnvironment(requeue_signal=signal.SIGUSR2).requeue_signal == signal.SIGUSR2
    with pytest.raises(MisconfigurationException, match=r"requeue_signal=.*SIGHUP.*must be signal.SIGUSR1"):
        SLURMEnvironment(requeue_signal=signal.SIGHUP)


def test_a_trainer_finds_its_job(job: pytest.MonkeyPatch) -> None:
    def chosen(**options: Any) -> Any:
        return L.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", **options)._cluster

    own = SLURMEnvironment(requeue_signal=signal.SIGUSR2)
    assert isinstance(chosen(), SLURMEnvironment)
    assert chosen(plugins=own) is own
    assert chosen(plugins=[own]) is own
    assert chosen(plugins=SLURMEnvironment(auto_requeue=False)) is None
    with pytest.raises(MisconfigurationException, match="give one cluster environment"):
        chosen(plugins=[own, own])
    job.setenv("SLURM_JOB_NAME", "bash")
    assert chosen() is None
    job.delenv("SLURM_JOB_ID")
    assert chosen(plugins=own) is None


def fake_scontrol(folder: Path, job: pytest.MonkeyPatch, code: int) -> None:
    program = folder / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\necho no such job >&2\nexit {code}\n')
    program.chmod(0o755)
    job.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_requeue_asks_scontrol(job: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_scontrol(tmp_path, job, 0)
    assert SLURMEnvironment().requeue()
    assert (tmp_path / "asked").read_text() == "requeue 71\n"


def test_a_refusal_is_said_with_slurms_words(job: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_scontrol(tmp_path, job, 1)
    with pytest.warns(LeydenWarning, match=r"refused to requeue the job 71 \(exit code 1\): no such job"):
        assert not SLURMEnvironment().requeue()
    job.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.warns(LeydenWarning, match="The job 71 cannot be requeued"):
        assert not SLURMEnvironment().requeue()
