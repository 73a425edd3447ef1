# SPDX-License-Identifier: Apache-2.0
"""A Trainer in a job of a real SLURM: told to end, it saves, has the job requeued, and goes on; see conftest.py."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("requeue_script.py")


def submit(slurm: Any, folder: Path, pause: float, *options: str, arguments: str = "") -> str:
    text = f"#!/bin/bash\nsrun {sys.executable} {SCRIPT} {folder} {pause} {arguments}\n"
    (folder / "job.sh").write_text(text)
    done = subprocess.run(
        ["sbatch", "--parsable", "--requeue", "--open-mode=append", f"--output={folder}/job.out", "--job-name=train",
         "--mem=500", *options, folder / "job.sh"],
        env=slurm.environment, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return done.stdout.strip()


def whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import requeue_script

    folder.mkdir()
    state: dict[str, torch.Tensor] = requeue_script.fit(folder, 0.0, False).lightning_module.state_dict()
    return state


def assert_goes_on_and_ends_the_same(slurm: Any, folder: Path, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    output = folder / "job.out"
    slurm.wait_for(lambda: output.exists() and "steps 30" in output.read_text(), seconds, folder)
    text = output.read_text()
    starts = (folder / "starts").read_text().split()
    assert len(starts) > 1, text
    assert starts == [str(number) for number in range(len(starts))]
    assert "was started anew: it goes on from" in text
    found, expected = torch.load(folder / "weights.pt"), whole(folder / "whole", monkeypatch)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    "checkpoints",
    ["", pytest.param("plain", marks=pytest.mark.slow)],
    ids=["with ModelCheckpoint", "without"],
)
def test_P2_a_job_that_is_told_to_end_is_requeued_and_goes_on(
    checkpoints: str, slurm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(slurm, tmp_path, 0.1, arguments=checkpoints)
    slurm.wait_for((tmp_path / "begun").exists, 60, tmp_path)
    time.sleep(0.5)  # a few steps
    slurm.ask("scancel", "--signal=USR1", job)
    slurm.wait_for((tmp_path / "hpc_ckpt_1.ckpt").exists, 60, tmp_path)
    assert_goes_on_and_ends_the_same(slurm, tmp_path, 90, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_P2_a_job_whose_time_is_too_short_goes_on_in_the_next(
    slurm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # SLURM counts in minutes, and looks at the clock every half minute
    submit(slurm, tmp_path, 0.7, "--time=1", "--signal=USR1@30")
    assert_goes_on_and_ends_the_same(slurm, tmp_path, 350, monkeypatch)
