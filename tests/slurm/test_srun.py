# SPDX-License-Identifier: Apache-2.0
"""Tasks that a real ``srun`` starts, described by a cluster environment that is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent.parent / "distributed" / "environment_script.py"


def test_slurm_environment_joins_the_tasks_of_srun(slurm: Any, tmp_path: Path) -> None:
    path = os.pathsep.join([str(SCRIPT.parent), *(entry for entry in sys.path if entry)])
    done = subprocess.run(
        ["srun", "--ntasks=2", "--job-name=train", sys.executable, str(SCRIPT), str(tmp_path), "SLURMEnvironment"],
        env={**slurm.environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, cwd=tmp_path, capture_output=True,
        text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + slurm.logs()
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [(rank["size"], rank["local"], rank["environment"]) for rank in ranks] == [
        (2, 0, "SLURMEnvironment"), (2, 1, "SLURMEnvironment"),
    ]  # fmt: skip
    assert ranks[0]["weight"] == ranks[1]["weight"]
