# SPDX-License-Identifier: Apache-2.0
"""SlurmCluster against a real SLURM, started for these tests: see conftest.py."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from leyden.search import HyperOptArgumentParser, SlurmCluster

SCRIPT = Path(__file__).with_name("slurm_script.py")
SLOW = pytest.mark.slow


def submit(slurm: Any, *arguments: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments], env=slurm.environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.replace("'", '"'))  # type: ignore[no-any-return]


def submit_and_wait_for_it_to_begin(slurm: Any, what: str, folder: Path, *arguments: str) -> str:
    (job,) = submit(slurm, what, str(folder), *arguments)
    slurm.wait_for((folder / "begun").exists, 60, folder)
    return job


def records(folder: Path) -> list[dict[str, Any]]:
    return SlurmCluster(HyperOptArgumentParser().parse_args([]), folder / "logs").results("tests")


def logs(folder: Path, kind: str, trial: int = 0) -> str:
    (path,) = (folder / "logs" / "tests" / f"slurm_{kind}_logs").glob(f"trial_{trial}_*.{kind}")
    return path.read_text()


def assert_weights_of_an_uninterrupted_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import slurm_model

    model, trainer = slurm_model.fit(argparse.Namespace(lr=0.1, pause=0.0, data_workers=0), [], None)
    assert trainer.global_step == 30
    found, expected = torch.load(path), model.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_search_of_four_trials_runs_as_jobs(slurm: Any, tmp_path: Path) -> None:
    jobs = submit(slurm, "search", str(tmp_path))
    assert len(set(jobs)) == 4
    slurm.wait_until_idle(60, tmp_path)
    found = records(tmp_path)
    assert [record["values"] for record in found] == [{"lr": lr} for lr in (0.1, 0.2, 0.3, 0.4)]
    assert [record["state"] for record in found] == ["done", "done", "failed", "done"]
    assert [record["jobs"] for record in found] == [[job] for job in jobs]
    assert [record["results"].get("loss") for record in found] == [(0.1 - 0.2) ** 2, 0.0, None, (0.4 - 0.2) ** 2]
    for trial, lr in enumerate((0.1, 0.2, 0.3, 0.4)):
        assert logs(tmp_path, "out", trial).splitlines()[0] == f"lr={lr}"
        assert "on stderr" in logs(tmp_path, "err", trial)
    assert "RuntimeError: this learning rate explodes" in logs(tmp_path, "err", 2)
    failed = slurm.ask("scontrol", "show", "job", jobs[2])
    assert "JobState=FAILED" in failed
    assert "ExitCode=1:0" in failed
    shown = slurm.ask("scontrol", "show", "job", jobs[1])
    for words in ("JobName=leydenv1", "JobState=COMPLETED", "TimeLimit=00:15:00", "MinMemoryNode=500M", "CPUs/Task=1"):
        assert words in shown
    assert f"WorkDir={Path.cwd()}" in shown


@pytest.mark.parametrize(
    ("what", "data_workers"), [("train", 1), ("train_2019", 1), pytest.param("train", 0, marks=SLOW)]
)
def test_a_continuation_ends_with_the_weights_of_an_uninterrupted_run(
    slurm: Any, tmp_path: Path, what: str, data_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # SLURM sends the signal because it is told to, at whatever batch this is; for the clock's see the slow test below
    folder = tmp_path / "a folder's name, with spaces"
    folder.mkdir()
    arguments = ("--pause", "0.05", "--data-workers", str(data_workers))
    job = submit_and_wait_for_it_to_begin(slurm, what, folder, *arguments)
    slurm.ask("scancel", "--signal=USR1", job)
    slurm.wait_for(lambda: len(records(folder)[0]["jobs"]) > 1, 60, folder)
    (folder / "begun").unlink()  # each batch of the first job made it anew
    slurm.wait_for((folder / "begun").exists, 60, folder)
    second = records(folder)[0]["jobs"][-1]
    slurm.ask("scancel", "--signal=USR1", second)  # twice in a row
    slurm.wait_until_idle(90, folder)
    (record,) = records(folder)
    assert record["state"] == "done", logs(folder, "err")
    assert record["checkpoints"] == 2
    assert record["jobs"][:2] == [job, second]
    assert len(set(record["jobs"])) == 3
    assert record["results"]["global_step"] == 30
    assert isinstance(record["results"]["loss"], float)
    err = logs(folder, "err")
    assert err.count("saving a checkpoint") == 2, "not once more in a worker of the data loader"
    assert f"the continuation is job {second}" in err
    assert logs(folder, "out").count("lr=0.1") == 3, "all jobs write to the same log"
    assert "JobState=COMPLETED" in slurm.ask("scontrol", "show", "job", job)
    assert_weights_of_an_uninterrupted_run(folder / "weights.pt", monkeypatch)


def test_functions_of_the_user_save_and_load(slurm: Any, tmp_path: Path) -> None:
    job = submit_and_wait_for_it_to_begin(slurm, "count", tmp_path)
    slurm.ask("scancel", "--signal=USR1", job)
    slurm.wait_until_idle(60, tmp_path)
    (record,) = records(tmp_path)
    assert record["results"] == {"began_at": [0, 60], "at": 100}
    assert len(record["jobs"]) == 2


def test_a_cancelled_trial_saves_and_stays_cancelled_until_it_is_submitted_again(slurm: Any, tmp_path: Path) -> None:
    job = submit_and_wait_for_it_to_begin(slurm, "count", tmp_path)
    slurm.ask("scancel", job)
    slurm.wait_until_idle(30, tmp_path)
    (record,) = records(tmp_path)
    assert (record["state"], record["checkpoints"], record["jobs"]) == ("checkpointed", 1, [job])
    slurm.ask("sbatch", record["script"])
    slurm.wait_until_idle(60, tmp_path)
    assert records(tmp_path)[0]["results"] == {"began_at": [0, 60], "at": 100}


@SLOW
@pytest.mark.parametrize("what", ["train", "train_2019"])
def test_a_cancelled_training_goes_on_too(
    slurm: Any, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit_and_wait_for_it_to_begin(slurm, what, tmp_path, "--pause", "0.05")
    slurm.ask("scancel", job)
    slurm.wait_until_idle(30, tmp_path)
    (record,) = records(tmp_path)
    assert (record["state"], record["checkpoints"], record["jobs"]) == ("checkpointed", 1, [job])
    slurm.ask("sbatch", record["script"])
    slurm.wait_until_idle(60, tmp_path)
    assert_weights_of_an_uninterrupted_run(tmp_path / "weights.pt", monkeypatch)


@SLOW
@pytest.mark.timeout(600)
def test_a_walltime_that_is_too_short_for_the_epochs(
    slurm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 60 batches of 2.5 s are more than the 2 minutes of the job; SLURM tells it between one and two minutes before
    submit(slurm, "walltime", str(tmp_path), "--pause", "2.5")
    slurm.wait_until_idle(500, tmp_path)
    (record,) = records(tmp_path)
    assert record["state"] == "done", logs(tmp_path, "err")
    assert record["checkpoints"] >= 1
    assert len(record["jobs"]) == record["checkpoints"] + 1
    assert "TIME LIMIT" not in logs(tmp_path, "err")
    assert_weights_of_an_uninterrupted_run(tmp_path / "weights.pt", monkeypatch)
