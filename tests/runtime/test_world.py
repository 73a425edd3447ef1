# SPDX-License-Identifier: Apache-2.0
"""Which process this is, as each launcher says it."""

from __future__ import annotations

import pytest

from leyden.errors import MisconfigurationException
from leyden.runtime.world import OURS, World, first_host, joined, planned

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1",
    "MASTER_ADDR": "head", "MASTER_PORT": "1234",
}  # fmt: skip
SLURM = {
    "SLURM_JOB_ID": "98765432", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "gpu[012-015,31]",
}  # fmt: skip
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_PORT": "17",
}  # fmt: skip
LSF = {
    "JSM_NAMESPACE_RANK": "2", "JSM_NAMESPACE_SIZE": "4", "JSM_NAMESPACE_LOCAL_RANK": "0",
    "JSM_NAMESPACE_LOCAL_SIZE": "2", "LSB_HOSTS": "batch node1 node1 node2 node2", "LSB_JOBID": "4321",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "world"),
    [
        ({}, None),
        ({"RANK": "0"}, None),
        (TORCHRUN, World(5, 8, 1, 4, 1, "head", 1234, "torchrun")),
        ({**TORCHRUN, OURS: "1"}, World(5, 8, 1, 4, 1, "head", 1234, "leyden")),
        (SLURM, World(3, 4, 1, 2, 1, "gpu012", 20432, "slurm")),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({**SLURM, "SLURM_JOB_NAME": "interactive"}, None),
        ({**SLURM, **TORCHRUN}, World(5, 8, 1, 4, 1, "head", 1234, "torchrun")),
        (OPENMPI, World(1, 2, 1, 2, 0, "127.0.0.1", 17, "mpi")),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MASTER_PORT": "17"}, World(1, 2, 1, 2, 0, "127.0.0.1", 17, "mpi")),
        (LSF, World(2, 4, 0, 2, 1, "node1", 10321, "lsf")),
    ],
)
def test_what_a_launcher_has_set_is_read(environment: dict[str, str], world: World | None) -> None:
    assert joined(environment) == world


@pytest.mark.parametrize(
    ("names", "first"),
    [
        ("localhost", "localhost"), ("a1,a2", "a1"), ("node[007-009,12],x", "node007"), ("n[3]", "n3"),
        ("gpu-a[1,2]-ib", "gpu-a1-ib"),
    ],
)  # fmt: skip
def test_the_first_host_of_slurms_list(names: str, first: str) -> None:
    assert first_host(names) == first


def test_variables_that_contradict_each_other_are_an_error() -> None:
    with pytest.raises(MisconfigurationException, match=r"rank 8 of 8 \(local rank 1 of 4\), which cannot be"):
        joined({**TORCHRUN, "RANK": "8"})


def test_mpi_on_several_machines_needs_an_address() -> None:
    with pytest.raises(MisconfigurationException, match="set MASTER_ADDR"):
        joined({**OPENMPI, "OMPI_COMM_WORLD_SIZE": "4"})


def test_the_processes_that_we_start_know_who_they_are() -> None:
    world = planned(2, 1, {})
    assert world == World(size=2, local_size=2)
    ready = World(size=2, local_size=2, port=99)
    assert joined(ready.environment(1)) == World(1, 2, 1, 2, 0, "127.0.0.1", 99, "leyden")


def test_several_machines_are_started_by_hand_with_three_variables() -> None:
    given = {"NODE_RANK": "1", "MASTER_ADDR": "head", "MASTER_PORT": "5"}
    world = planned(2, 3, given)
    assert world == World(2, 6, 0, 2, 1, "head", 5, "leyden")
    assert world.nodes == 3
    assert joined(world.environment(1)) == World(3, 6, 1, 2, 1, "head", 5, "leyden")
    with pytest.raises(MisconfigurationException, match="NODE_RANK=3 is too large"):
        planned(2, 3, {**given, "NODE_RANK": "3"})
    with pytest.raises(MisconfigurationException, match="MASTER_ADDR, NODE_RANK not set"):
        planned(2, 2, {"MASTER_PORT": "1"})
