# SPDX-License-Identifier: Apache-2.0
"""T1: the other processes of a script come to the same lines, however the script was started and whatever it changes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("loop_script.py")


def _run(command: list[str], folder: Path, text: str | None = None) -> tuple[int, str]:
    path = os.pathsep.join([str(SCRIPT.parent), *(entry for entry in sys.path if entry)])
    done = subprocess.run(
        command, cwd=folder, input=text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=110,
        check=False, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return done.returncode, done.stdout


def _both(folder: Path, code: int, output: str) -> None:
    assert code == 0, output
    one, other = (json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one == other
    for turn in one[0]:
        assert turn == [8, 7, list(range(7)), str(folder / "outputs")]
    lines = (folder / "lines").read_text().splitlines()
    assert sorted(lines) == [f"above {rank} {folder}" for rank in (0, 1)]  # once for each rank, in the same folder


@pytest.mark.slow
def test_t1_a_loop_of_runs_without_a_main_guard_whose_folder_and_arguments_change(tmp_path: Path) -> None:
    shutil.copy(SCRIPT, tmp_path / "train.py")
    _both(tmp_path, *_run([sys.executable, "train.py", "."], tmp_path))


@pytest.mark.slow
def test_t1_under_torchrun_we_only_join(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    _both(tmp_path, *_run([*torchrun, "--nproc-per-node", "2", str(SCRIPT), "."], tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["module", "code"])
def test_t1_a_module_of_a_package_and_code_of_the_command_line_run_again(tmp_path: Path, way: str) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(SCRIPT, package / "train.py")
    command = {"module": ["-m", "package.train", "."], "code": ["-c", SCRIPT.read_text(), "."]}[way]
    _both(tmp_path, *_run([sys.executable, *command], tmp_path))


@pytest.mark.slow
def test_a_script_from_a_pipe_cannot_run_again_and_says_so(tmp_path: Path) -> None:
    code, output = _run([sys.executable, "-", "."], tmp_path, SCRIPT.read_text())
    assert code == 1
    assert "there is no script: this is an interactive session or a notebook, or the program came from a pipe" in output
    assert "strategy='ddp_notebook'" in output
