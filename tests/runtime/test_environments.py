# SPDX-License-Identifier: Apache-2.0
"""Each cluster environment says what its launcher has set, and is turned into the world that the Trainer uses."""

from __future__ import annotations

import os
from typing import Any

import pytest

import leyden as L
from leyden.errors import MisconfigurationException
from leyden.runtime.cluster import (
    ClusterEnvironment,
    KubeflowEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
    environment_of,
    world_of,
)
from leyden.runtime.world import World
from leyden.strategies import DDPStrategy

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1",
    "MASTER_ADDR": "head", "MASTER_PORT": "1234",
}  # fmt: skip
SLURM = {
    "SLURM_JOB_ID": "98765432", "SLURM_JOB_NAME": "interactive", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "gpu[012-015,31]",
}  # fmt: skip
MPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_PORT": "17",
}  # fmt: skip
LSF = {
    "JSM_NAMESPACE_RANK": "2", "JSM_NAMESPACE_SIZE": "4", "JSM_NAMESPACE_LOCAL_RANK": "0",
    "JSM_NAMESPACE_LOCAL_SIZE": "2", "LSB_HOSTS": "batch node1 node1 node2 node2", "LSB_JOBID": "4321",
}  # fmt: skip
KUBEFLOW = {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "pod-0", "MASTER_PORT": "23456"}


@pytest.fixture(autouse=True)
def _nobody_has_started_this(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*TORCHRUN, *SLURM, *MPI, *LSF]:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("kind", "variables", "world", "counts"),
    [
        (TorchElasticEnvironment, TORCHRUN, World(5, 8, 1, 4, 1, "head", 1234, "torchrun"), (4, 2)),
        (SLURMEnvironment, SLURM, World(3, 4, 1, 2, 1, "gpu012", 20432, "slurm"), (2, 2)),
        (MPIEnvironment, MPI, World(1, 2, 1, 2, 0, "127.0.0.1", 17, "mpi"), (2, 1)),
        (LSFEnvironment, LSF, World(2, 4, 0, 2, 1, "node1", 10321, "lsf"), (2, 2)),
        (KubeflowEnvironment, KUBEFLOW, World(1, 3, 0, 1, 1, "pod-0", 23456, "kubeflow"), (1, 3)),
    ],
)
def test_the_environments_of_launchers_say_what_was_set(
    kind: Any, variables: dict[str, str], world: World, counts: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    environment = kind()
    assert world_of(environment, *counts) == world
    assert environment.creates_processes_externally
    said = environment.main_address, environment.main_port, environment.world_size(), environment.global_rank()
    assert said == (world.address, world.port, world.size, world.rank)
    assert (environment.local_rank(), environment.node_rank()) == (world.local_rank, world.node)
    environment.set_world_size(1)  # the launcher knows better
    environment.set_global_rank(0)
    assert (environment.world_size(), environment.global_rank()) == (world.size, world.rank)
    assert kind.detect() is (kind in (MPIEnvironment, LSFEnvironment))  # no torchrun id; somebody sits in front
    with pytest.raises(MisconfigurationException, match=r"devices=7, num_nodes=1\) asks for 7 .* has started"):
        world_of(environment, 7, 1)


@pytest.mark.parametrize("kind", [TorchElasticEnvironment, MPIEnvironment, LSFEnvironment, KubeflowEnvironment])
def test_an_environment_whose_launcher_is_not_there_says_so(kind: Any) -> None:
    with pytest.raises(MisconfigurationException, match=f"{kind.__name__}: this process has none of the variables"):
        L.Trainer(accelerator="cpu", devices=2, strategy="ddp", plugins=[kind()], logger=False)


def test_slurm_without_tasks_is_one_process_that_starts_the_others() -> None:
    assert world_of(SLURMEnvironment(), 2, 1) == World(size=2, local_size=2)
    assert not SLURMEnvironment().creates_processes_externally


class Own(ClusterEnvironment):
    def __init__(self, external: bool = True, port: int = 77) -> None:
        super().__init__()
        self.external, self.port = external, port
        self.calls: list[Any] = []

    @property
    def creates_processes_externally(self) -> bool:
        return self.external

    @property
    def main_address(self) -> str:
        return "chief"

    @property
    def main_port(self) -> int:
        return self.port

    def local_rank(self) -> int:
        return 1

    def node_rank(self) -> int:
        return 2

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        self.calls.append((num_devices, num_nodes))


def test_the_methods_of_the_users_own_environment_are_used() -> None:
    own = Own()
    trainer = L.Trainer(accelerator="cpu", devices=4, num_nodes=3, plugins=own, strategy="ddp", logger=False)
    assert (trainer.global_rank, trainer.world_size, trainer.node_rank, trainer.local_rank) == (9, 12, 2, 1)
    assert own.calls == [(4, 3)]
    assert (own.global_rank(), own.world_size()) == (9, 12)
    assert trainer.strategy.cluster_environment is own
    L.rank_zero_only.rank = 0


def test_ddp_strategy_takes_one_too() -> None:
    strategy = DDPStrategy(cluster_environment=Own())
    assert L.Trainer(accelerator="cpu", devices=4, num_nodes=3, strategy=strategy, logger=False).global_rank == 9
    L.rank_zero_only.rank = 0
    with pytest.raises(MisconfigurationException, match="both name a cluster environment"):
        L.Trainer(accelerator="cpu", devices=2, strategy=DDPStrategy(cluster_environment=Own()), plugins=[Own()])


def test_numbers_that_cannot_be_are_an_error() -> None:
    with pytest.raises(MisconfigurationException, match=r"Own.main_port is 0: where the processes are started by"):
        world_of(Own(port=0), 4, 3)
    own = Own()
    own.world_size = lambda: 3  # type: ignore[method-assign]
    with pytest.raises(MisconfigurationException, match="rank 9 of 3 .* cannot be. It was read as Own sets it"):
        world_of(own, 4, 3)
    with pytest.raises(MisconfigurationException, match="give one cluster environment, not several"):
        L.Trainer(accelerator="cpu", plugins=[Own(), Own()])


def test_the_environment_that_nobody_has_named_fits_what_started_the_processes() -> None:
    assert isinstance(environment_of(World(1, 2, starter="torchrun")), TorchElasticEnvironment)
    own = environment_of(World(1, 2))
    assert isinstance(own, LightningEnvironment)
    assert (own.global_rank(), own.world_size(), own.main_address, own.main_port) == (1, 2, "127.0.0.1", 0)
    assert not own.creates_processes_externally
    assert "LOCAL_RANK" not in os.environ
