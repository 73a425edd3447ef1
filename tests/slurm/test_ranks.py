# SPDX-License-Identifier: Apache-2.0
"""Two tasks of a real ``srun``: they train together, and a rank that raises ends both."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "distributed" / "rank_script.py"


def _srun(slurm: Any, folder: Path, mode: str) -> tuple[int, str]:
    path = os.pathsep.join([str(SCRIPT.parent), *(entry for entry in sys.path if entry)])
    environment = {**slurm.environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["srun", "--job-name=ranks", "-n2", "--mem=1000", sys.executable, str(SCRIPT), str(folder), mode],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=110, check=False,
        cwd=folder,
    )  # fmt: skip
    return done.returncode, done.stdout


def test_d1_under_srun_a_rank_that_raises_ends_both(slurm: Any, tmp_path: Path) -> None:
    code, output = _srun(slurm, tmp_path, "step1")
    assert code not in (0, None), output
    first = re.search(r"^(?:\[rank\d\]: )?(\w*(?:Error|Exception)\b.*)$", output, re.M)
    assert first is not None, output
    assert first[1] == "ValueError: broken on rank 1"
    assert not list(tmp_path.glob("*.json"))
    slurm.wait_until_idle(30, tmp_path)  # no task is left


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["kill1", "exit1", "memory0", "validation1", "callback1"])
def test_d1_under_srun_wherever_a_rank_breaks(slurm: Any, tmp_path: Path, mode: str) -> None:
    code, output = _srun(slurm, tmp_path, mode)
    assert code not in (0, None), output
    slurm.wait_until_idle(30, tmp_path)


@pytest.mark.slow
def test_two_tasks_of_srun_train_together(slurm: Any, tmp_path: Path) -> None:
    code, output = _srun(slurm, tmp_path, "whole")
    assert code == 0, output
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0]["weight"] == ranks[1]["weight"]
    assert [rank["world"] for rank in ranks] == [2, 2]
