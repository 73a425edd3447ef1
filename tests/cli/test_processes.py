# SPDX-License-Identifier: Apache-2.0
"""``leyden run --devices``: several processes of one program by torchrun, their exit status, and who ends with whom."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from leyden.cli import main, processes
from leyden.cli.run import split
from leyden.errors import MisconfigurationException

DISTRIBUTED = Path(__file__).parents[1] / "distributed"
WHO = """
import os, sys
print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], *sys.argv[1:], os.environ["MASTER_ADDR"], flush=True)
print(*(f"{name}={os.environ[name]}" for name in sorted(os.environ) if name.startswith(("LT_", "PL_TRAINER_"))), flush=True)
import lightning
sys.exit(3 if os.environ["RANK"] == "1" and "fail" in sys.argv else 0)
"""


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(DISTRIBUTED), *(entry for entry in sys.path if entry)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def _run(*words: str, command: str = "run") -> Any:
    return subprocess.run(
        [sys.executable, "-m", "leyden", command, *words], capture_output=True, text=True, check=False, timeout=100,
        env=_environment(),
    )  # fmt: skip


def test_each_process_is_a_rank_and_arguments_are_the_programs(tmp_path: Path) -> None:
    (tmp_path / "who.py").write_text(WHO)
    done = _run(
        "--devices", "2", "--accelerator=cpu", "--precision", "bf16-mixed", str(tmp_path / "who.py"), "--devices", "9"
    )
    assert done.returncode == 0, done.stderr
    assert sorted(line for line in done.stdout.splitlines() if line.startswith("rank")) == [
        f"rank {rank} of 2 --devices 9 127.0.0.1" for rank in (0, 1)
    ]
    for wanted in (
        "LT_ACCELERATOR=cpu", "LT_DEVICES=2", "LT_NUM_NODES=1", "LT_PRECISION=bf16-mixed", "PL_TRAINER_ACCELERATOR=cpu",
        "PL_TRAINER_PRECISION=bf16-mixed",
    ):  # fmt: skip
        assert done.stdout.count(wanted) == 2
    assert done.stderr == ""


def test_the_exit_status_is_that_of_the_process_that_failed_first(tmp_path: Path) -> None:
    (tmp_path / "who.py").write_text(WHO)
    done = _run("run", "--devices=2", "--accelerator=cpu", str(tmp_path / "who.py"), "fail", command="fabric")
    assert done.returncode == 3, done.stderr
    assert re.search(r"leyden run: rank 1 \(process \d+\) ended first, with exit code 3\.", done.stderr)


def _started(folder: Path) -> tuple[Any, list[Any]]:
    words = ["-m", "leyden", "run", "--devices", "2", str(DISTRIBUTED / "elastic_script.py"), str(folder), "-1", "0.2"]
    process = subprocess.Popen(
        [sys.executable, *words], env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    until = time.monotonic() + 80
    while len(list(folder.glob("seen-*"))) < 2 and time.monotonic() < until and process.poll() is None:
        time.sleep(0.05)
    return process, psutil.Process(process.pid).children(recursive=True)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 128 + signal.SIGUSR1, marks=pytest.mark.slow),
    ],
)
def test_p2_a_signal_reaches_all_ranks_and_the_fit_is_saved(tmp_path: Path, number: int, code: int) -> None:
    process, ranks = _started(tmp_path)
    assert len(ranks) == 2
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert "is saved in" in output or "has nothing to save" in output
    assert list(tmp_path.rglob("*.ckpt")), output
    assert not any(_runs(rank) for rank in ranks)


@pytest.mark.slow
def test_no_process_outlives_the_command(tmp_path: Path) -> None:
    process, ranks = _started(tmp_path)
    process.kill()
    process.communicate(timeout=60)
    until = time.monotonic() + 30
    while any(_runs(rank) for rank in ranks) and time.monotonic() < until:
        time.sleep(0.05)
    assert len(ranks) == 2
    assert not any(_runs(rank) for rank in ranks)


def _runs(process: Any) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


# ---------------------------------------------------------------------------------------------- words


def test_options_end_where_the_program_begins() -> None:
    words = ["--nproc=4", "--num_nodes", "1:2", "-m", "package.module", "--devices", "9"]
    assert split(words) == ({"devices": "4", "nodes": "1:2"}, ["-m", "package.module", "--devices", "9"])
    assert split(["script.py", "--nodes", "2"]) == ({}, ["script.py", "--nodes", "2"])


@pytest.mark.parametrize(
    ("wishes", "expected"),
    [
        ({"nodes": "2", "node_rank": "1", "main_address": "a"}, ["--nnodes", "2", "--node-rank", "1", "--master-addr", "a"]),
        ({"nodes": "1:2", "main_address": "a"}, ["--nnodes", "1:2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "a:29400"]),
        (
            {"nodes": "2", "main_address": "a", "main_port": "7", "max_restarts": "1", "node_rank": "0"},
            ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "a:7"],
        ),
    ],
)  # fmt: skip
def test_torchrun_is_told_where_the_machines_meet(wishes: dict[str, str], expected: list[str]) -> None:
    found = processes._where(wishes)
    assert found[: len(expected)] == expected
    if wishes.get("max_restarts"):
        assert found[-2:] == ["--rdzv-conf", "is_host=1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "2", "x.py"], r"There is no option '--device'\. Did you mean '--devices'\?"),
        (["--devices"], "--devices: its value is missing"),
        (["--devices", "2"], "What is to run"),
        (["--devices", "0", "x.py"], "--devices 0: it must be 1 or more"),
        (["--accelerator", "cpu", "--devices", "many", "x.py"], "many"),
        (["--nodes", "2:1", "x.py"], "--nodes 2:1: it must be a number of machines, or MIN:MAX"),
        (["--nodes", "2", "x.py"], "--main-address and --node-rank missing"),
        (["--nodes", "2", "--node-rank", "2", "--main-address", "a", "x.py"], "ranks go from 0 to 1"),
        (["--max-restarts", "-1", "x.py"], "--max-restarts -1: it must be a whole number >= 0"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *words]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_fabric_has_run_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fabric", "consolidate"]) == 1
    assert "There is 'leyden fabric run'" in capsys.readouterr().err


def test_an_unknown_option_is_an_error_of_ours() -> None:
    with pytest.raises(MisconfigurationException, match="--nnodes"):
        split(["--nnodes", "2", "x.py"])
