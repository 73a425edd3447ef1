# SPDX-License-Identifier: Apache-2.0
"""The page about several devices: its script runs as a laptop runs it, under torchrun, and as a job by its sbatch script."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "distributed.md"


def block(language: str, beginning: str) -> str:
    """The block of the page in a language that begins so."""
    found = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (text,) = [text for text in found if text.startswith(beginning)]
    return str(text)


def script(folder: Path) -> Path:
    path = folder / "train.py"
    path.write_text(block("python", "import torch\n").replace("Trainer(", "Trainer(accelerator='cpu', "))
    return path


def loss(text: str) -> float:
    return float(text.split("loss ")[-1].split()[0])


@pytest.mark.slow
def test_the_script_of_the_page_runs_alone_and_under_torchrun(tmp_path: Path) -> None:
    path, environment = script(tmp_path), {**os.environ, "OMP_NUM_THREADS": "1"}
    alone = [sys.executable, str(path)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(path)]
    found = []
    for words, started in ((alone, "1 processes on 1 nodes"), (torchrun, "2 processes on 1 nodes")):
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=120, check=False, env=environment, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        assert started in done.stdout
        found.append(loss(done.stdout))
    assert all(0 < each < 100 for each in found)


def test_the_sbatch_script_of_the_page_is_a_job_of_several_processes(slurm: Any, tmp_path: Path) -> None:
    script(tmp_path)
    text = block("bash", "#!/bin/bash\n#SBATCH")
    # what this one machine without GPUs has not
    for theirs, ours in (("nodes=4", "nodes=1"), ("per-node=8", "per-node=2"), ("cpus-per-task=8", "cpus-per-task=1")):
        assert theirs in text
        text = text.replace(theirs, ours)
    text = re.sub(r"#SBATCH --gpus.*\n", "", text).replace("srun python", f"srun {sys.executable}")
    (tmp_path / "train.sbatch").write_text(text)
    done = subprocess.run(
        ["sbatch", "train.sbatch"], env=slurm.environment, capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    slurm.wait_until_idle(120, tmp_path)
    (out,) = tmp_path.glob("slurm-*.out")
    assert "2 processes on 1 nodes, loss " in out.read_text(), out.read_text()
