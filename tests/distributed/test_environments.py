# SPDX-License-Identifier: Apache-2.0
"""Cluster environments that the user names, in real processes: of mpirun, torchrun, srun, of nobody, and his own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from leyden.runtime.cluster import LightningEnvironment
from leyden.runtime.world import OURS
from leyden.strategies import DDPStrategy
from ranks import Net, data, make_trainer, on_ranks

SCRIPT = Path(__file__).with_name("environment_script.py")


def _free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def _environment(**extra: str) -> dict[str, str]:
    path = os.pathsep.join([str(SCRIPT.parent), *(entry for entry in sys.path if entry)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **extra}


def _run(commands: list[list[str]], folder: Path, extras: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Start the commands together; return what both ranks have written."""
    started = [
        subprocess.Popen(
            command, env=_environment(**extra), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for command, extra in zip(commands, extras, strict=True)
    ]
    try:
        outputs = [process.communicate(timeout=90)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(outputs)
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [(rank["size"], rank["local"], rank["steps"]) for rank in ranks] == [(2, 0, 4), (2, 1, 4)]
    assert ranks[0]["weight"] == ranks[1]["weight"]
    assert ranks[0]["pid"] != ranks[1]["pid"]
    return ranks


def _names(ranks: list[dict[str, Any]], name: str) -> None:
    assert [rank["environment"] for rank in ranks] == [name, name]
    assert [rank["said"] for rank in ranks] == [[0, 2, 0], [1, 2, 1]]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun (the package openmpi-bin)")
def test_mpi_environment_joins_the_processes_of_mpirun(tmp_path: Path) -> None:
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", "--mca", "btl", "self,vader"]
    mpirun += ["--mca", "oob_tcp_if_include", "lo", "-x", "MASTER_PORT"]
    command = [*mpirun, sys.executable, str(SCRIPT), str(tmp_path), "MPIEnvironment"]
    _names(_run([command], tmp_path, [{"MASTER_PORT": _free_port()}]), "MPIEnvironment")


@pytest.mark.slow
def test_torchelastic_environment_joins_the_processes_of_torchrun(tmp_path: Path) -> None:
    where = ["--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", _free_port()]
    command = [sys.executable, "-m", "torch.distributed.run", *where, str(SCRIPT), str(tmp_path)]
    _names(_run([[*command, "TorchElasticEnvironment"]], tmp_path, [{}]), "TorchElasticEnvironment")


@pytest.mark.parametrize(
    ("name", "variables"),
    [
        ("Own", {"OWN_SIZE": "2", "OWN_RANK": "{rank}", "OWN_PORT": "{port}"}),
        pytest.param(
            "LSFEnvironment",
            {
                "JSM_NAMESPACE_RANK": "{rank}", "JSM_NAMESPACE_SIZE": "2", "JSM_NAMESPACE_LOCAL_RANK": "{rank}",
                "LSB_JOBID": "17", "MASTER_PORT": "{port}",
            },
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_processes_that_somebody_else_starts_meet_where_their_environment_says(
    tmp_path: Path, name: str, variables: dict[str, str]
) -> None:
    port = _free_port()
    extras = [{key: value.format(rank=rank, port=port) for key, value in variables.items()} for rank in (0, 1)]
    _names(_run([[sys.executable, str(SCRIPT), str(tmp_path), name]] * 2, tmp_path, extras), name)
    if name == "Own":
        assert {path.name for path in tmp_path.glob("down*")} == {"down0", "down1"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LightningEnvironment", "Starts"])
def test_an_environment_that_starts_nothing_has_us_start_the_others(tmp_path: Path, name: str) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path), name]
    ranks = _run([command], tmp_path, [{"OWN_PORT": _free_port()}])
    assert [rank["said"][:2] for rank in ranks] == [[0, 2], [1, 2]]


@pytest.mark.slow
def test_a_script_that_is_started_by_hand_on_each_machine_starts_the_others_of_it(tmp_path: Path) -> None:
    where = {"NODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    command = [sys.executable, str(SCRIPT), str(tmp_path), "LightningEnvironment"]
    started = [
        subprocess.Popen(
            command, env=_environment(**where, NODE_RANK=str(node)), cwd=tmp_path, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for node in (0, 1)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=200)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    assert [(rank["size"], rank["local"], rank["steps"]) for rank in ranks] == [(4, 0, 2), (4, 1, 2)] * 2
    assert all(rank["weight"] == ranks[0]["weight"] for rank in ranks)


def _in_ray_train(port: str) -> Any:
    """What a worker of Ray Train does: its process group is there, and its classes say which worker it is."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    del os.environ[OURS]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, GLOO_SOCKET_IFNAME="lo")
    torch.distributed.init_process_group("gloo", init_method="env://")

    class RayLightningEnvironment(LightningEnvironment):
        def world_size(self) -> int:
            return size

        def global_rank(self) -> int:
            return rank

        def set_world_size(self, size: int) -> None:
            pass

        def set_global_rank(self, rank: int) -> None:
            pass

    class RayDDPStrategy(DDPStrategy):
        @property
        def root_device(self) -> torch.device:
            return torch.device("cpu")

    module = Net()
    trainer = make_trainer("auto", strategy=RayDDPStrategy(), plugins=[RayLightningEnvironment()], max_epochs=1)
    trainer.fit(module, DataLoader(data(24), 3))
    return trainer.world_size, trainer.global_rank, trainer.global_step, module.layer[0].weight.tolist()


def test_the_environment_and_strategy_of_ray_train_are_drop_ins() -> None:
    ranks = on_ranks(2, _in_ray_train, _free_port())
    assert [rank[:3] for rank in ranks] == [(2, 0, 4), (2, 1, 4)]
    assert ranks[0][3] == ranks[1][3]
