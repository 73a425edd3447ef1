# SPDX-License-Identifier: Apache-2.0
"""The processes of one run, and which of them this one is: as torchrun, SLURM, MPI or LSF say, or as we start them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from leyden.errors import MisconfigurationException

LOCALHOST = "127.0.0.1"
OURS = "LEYDEN_LAUNCHED"
"""Set in the processes that our own launcher starts."""


@dataclass(frozen=True)
class World:
    """Which process this is, among how many, and where they meet.

    Attributes:
        rank: Index of this process among all.
        size: Number of processes.
        local_rank: Index of this process on its node.
        local_size: Number of processes on this node.
        node: Index of this node.
        address: Where rank 0 can be reached.
        port: At which port; 0 is not known yet: whoever starts the processes chooses a free one.
        starter: Who starts the processes: ``"leyden"``, ``"torchrun"``, ``"slurm"``, ``"mpi"``, ``"lsf"``, ``"kubeflow"``,
            or the class of the user's own cluster environment.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node: int = 0
    address: str = LOCALHOST
    port: int = 0
    starter: str = "leyden"

    @property
    def nodes(self) -> int:
        """How many nodes there are."""
        return max(self.size // max(self.local_size, 1), 1)

    def environment(self, local_rank: int) -> dict[str, str]:
        """Return the variables that tell process ``local_rank`` of this node who it is."""
        rank = self.node * self.local_size + local_rank
        return {
            "RANK": str(rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_size),
            "GROUP_RANK": str(self.node),
            "NODE_RANK": str(self.node),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
            OURS: "1",
        }


try:
    BEGAN_IN: str | None = os.getcwd()
    """The working directory of this process when it imported this."""
except OSError:  # it is gone
    BEGAN_IN = None

_STARTED: dict[int, World] = {}
"""By process, the world that its script has started: all its Trainers that use several processes share it."""


def started(world: World) -> None:
    """Remember the world whose other processes this one has started."""
    _STARTED[os.getpid()] = world


def has_started() -> bool:
    """Whether this process has started the others of its world already."""
    return os.getpid() in _STARTED


def joined(environment: Mapping[str, str] | None = None) -> World | None:
    """Return the world that somebody has started this process in, or None if nobody has.

    Args:
        environment: The environment variables; None takes this process's.

    Raises:
        MisconfigurationException: for variables that contradict each other.
    """
    if environment is None and has_started():
        return _STARTED[os.getpid()]
    given = os.environ if environment is None else environment
    for find in (_torchrun, _slurm, _lsf, _mpi):
        found = find(given)
        if found is not None:
            return sound(found)
    return None


def sound(world: World) -> World:
    """Return ``world``.

    Raises:
        MisconfigurationException: where its numbers contradict each other.
    """
    if not 0 <= world.rank < world.size or not 0 <= world.local_rank < world.local_size:
        raise MisconfigurationException(
            f"The environment of this process says that it is rank {world.rank} of {world.size} (local rank"
            f" {world.local_rank} of {world.local_size}), which cannot be. It was read as {world.starter} sets it."
        )
    return world


def read_as(launcher: str, environment: Mapping[str, str] | None = None) -> World | None:
    """Return the world as one launcher has set its variables (``"torchrun"``, ``"slurm"``, …); None if it has not."""
    found = _READERS[launcher](os.environ if environment is None else environment)
    return None if found is None else sound(found)


def planned(local_size: int, nodes: int, environment: Mapping[str, str] | None = None) -> World:
    """Return the world that we start ourselves: ``local_size`` processes on each of ``nodes`` machines.

    With several machines the script is started once on each, and ``NODE_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT`` say
    which one it is and where the first one is.

    Raises:
        MisconfigurationException: with several machines, when these variables are missing.
    """
    given = os.environ if environment is None else environment
    if nodes == 1:
        return World(size=local_size, local_size=local_size)
    node = given.get("NODE_RANK", given.get("GROUP_RANK", ""))
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not given.get(name)]
    missing += [] if node.isdigit() else ["NODE_RANK"]
    if missing or int(node) >= nodes:
        what = f"{', '.join(missing)} not set" if missing else f"NODE_RANK={node} is too large"
        raise MisconfigurationException(
            f"Trainer(num_nodes={nodes}): no launcher has started this process, and {what} in its environment. Start the"
            " script with torchrun or srun; or by hand, once on each machine, with NODE_RANK (0 on the first),"
            " MASTER_ADDR and MASTER_PORT (of the first) set."
        )
    index = int(node)
    return World(
        rank=index * local_size, size=local_size * nodes, local_size=local_size, node=index,
        address=given["MASTER_ADDR"], port=int(given["MASTER_PORT"]),
    )  # fmt: skip


def _number(given: Mapping[str, str], *names: str) -> int | None:
    for name in names:
        value = given.get(name, "").strip()
        if value.isdigit():
            return int(value)
    return None


def _torchrun(given: Mapping[str, str]) -> World | None:
    """RANK, WORLD_SIZE and LOCAL_RANK: torchrun's variables, and ours."""
    rank, size, local = (_number(given, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if rank is None or size is None or local is None:
        return None
    local_size = _number(given, "LOCAL_WORLD_SIZE") or size
    node = _number(given, "GROUP_RANK", "NODE_RANK")
    return World(
        rank, size, local, local_size, rank // local_size if node is None else node,
        given.get("MASTER_ADDR", LOCALHOST), _number(given, "MASTER_PORT") or 29500,
        "leyden" if given.get(OURS) else "torchrun",
    )  # fmt: skip


def _slurm(given: Mapping[str, str]) -> World | None:
    """A job that nobody sits in front of."""
    return None if given.get("SLURM_JOB_NAME") in ("bash", "interactive") else _srun(given)


def _srun(given: Mapping[str, str]) -> World | None:
    """What ``srun`` sets in each task; a job with one task is none."""
    rank, local = _number(given, "SLURM_PROCID"), _number(given, "SLURM_LOCALID")
    size = _number(given, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    if rank is None or local is None or size is None or size < 2:
        return None
    nodes = _number(given, "SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES") or 1
    names = given.get("SLURM_STEP_NODELIST") or given.get("SLURM_NODELIST") or given.get("SLURM_JOB_NODELIST")
    address = given.get("MASTER_ADDR") or (first_host(names) if names and nodes > 1 else LOCALHOST)
    port = _number(given, "MASTER_PORT") or 15000 + int(given.get("SLURM_JOB_ID", "0")[-4:] or 0)
    return World(rank, size, local, max(size // nodes, 1), _number(given, "SLURM_NODEID") or 0, address, port, "slurm")


def first_host(names: str) -> str:
    """Return the first host of a list as SLURM writes it: ``node[007-009,12],other`` begins with ``node007``."""
    head = re.match(r"([^\[,\s]*)(?:\[([^\],-]*)[^\]]*\])?([^,\s]*)", names.strip())
    assert head is not None
    return "".join(part or "" for part in head.groups())


def _lsf(given: Mapping[str, str]) -> World | None:
    """What ``jsrun`` of LSF sets."""
    rank, size = _number(given, "JSM_NAMESPACE_RANK"), _number(given, "JSM_NAMESPACE_SIZE")
    local = _number(given, "JSM_NAMESPACE_LOCAL_RANK")
    if rank is None or size is None or local is None:
        return None
    local_size = _number(given, "JSM_NAMESPACE_LOCAL_SIZE") or size
    # the first name is the machine that the job was submitted from
    hosts = given.get("LSB_HOSTS", "").split()[1:]
    address = given.get("MASTER_ADDR") or (hosts[0] if hosts and size > local_size else LOCALHOST)
    port = _number(given, "MASTER_PORT") or 10000 + (_number(given, "LSB_JOBID") or 0) % 1000
    return World(rank, size, local, local_size, rank // local_size, address, port, "lsf")


def _mpi(given: Mapping[str, str]) -> World | None:
    """What ``mpirun`` of Open MPI, or of MPICH and Intel, sets."""
    rank, size = _number(given, "OMPI_COMM_WORLD_RANK", "PMI_RANK"), _number(given, "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
    if rank is None or size is None or size < 2:
        return None
    local_size = _number(given, "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS") or size
    local = _number(given, "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
    if size > local_size and not given.get("MASTER_ADDR"):
        raise MisconfigurationException(
            f"mpirun has started {size} processes on several machines; set MASTER_ADDR to the name of the one with rank"
            " 0 (mpirun -x MASTER_ADDR=...)."
        )
    port = _number(given, "MASTER_PORT") or 15000 + os.getppid() % 15000  # of mpirun's daemon: the same for all
    return World(
        rank, size, rank % local_size if local is None else local, local_size, rank // local_size,
        given.get("MASTER_ADDR", LOCALHOST), port, "mpi",
    )  # fmt: skip


def _kubeflow(given: Mapping[str, str]) -> World | None:
    """What a PyTorchJob of Kubeflow sets in each pod, which runs one process."""
    rank, size, port = (_number(given, name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if rank is None or size is None or not port or not given.get("MASTER_ADDR"):
        return None
    return World(rank, size, 0, 1, rank, given["MASTER_ADDR"], port, "kubeflow")


_READERS = {"torchrun": _torchrun, "slurm": _srun, "lsf": _lsf, "mpi": _mpi, "kubeflow": _kubeflow}
