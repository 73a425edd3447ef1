# SPDX-License-Identifier: Apache-2.0
"""Cluster environments: who started the processes and where they meet, and what a job can ask its cluster for.

Each is turned into a ``World``, which is all that the rest of the house knows of them.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess

from leyden.errors import MisconfigurationException
from leyden.runtime.ranks import rank_zero_info, rank_zero_warn
from leyden.runtime.world import LOCALHOST, OURS, World, joined, planned, read_as, sound

_INTERACTIVE = ("bash", "interactive")
_FITS = itertools.count()  # a job that is started anew makes the same fits in the same order


class ClusterEnvironment:
    """Says which of the processes of a run this one is, and where they meet; to be subclassed for a cluster of one's own.

    ::

        Trainer(devices=8, num_nodes=4, plugins=[MyEnvironment()])

    All numbers are asked for when a Trainer is made. Where the environment says nothing else, this is the only process.
    """

    def __init__(self) -> None:
        self._rank, self._size = 0, 1

    @property
    def creates_processes_externally(self) -> bool:
        """Whether somebody else starts all processes; False: each node's first process is there, we start the others."""
        return False

    @property
    def main_address(self) -> str:
        """The host of rank 0."""
        return LOCALHOST

    @property
    def main_port(self) -> int:
        """The port of rank 0; 0 lets the process that starts the others choose a free one."""
        return 0

    @staticmethod
    def detect() -> bool:
        """Whether this process is part of such a job."""
        return False

    def world_size(self) -> int:
        """Number of processes on all nodes."""
        return getattr(self, "_size", 1)

    def set_world_size(self, size: int) -> None:
        """Be told the number of processes."""
        self._size = size

    def global_rank(self) -> int:
        """Index of this process among all."""
        return getattr(self, "_rank", 0)

    def set_global_rank(self, rank: int) -> None:
        """Be told the index of this process."""
        self._rank = rank

    def local_rank(self) -> int:
        """Index of this process on its node."""
        return 0

    def node_rank(self) -> int:
        """Index of this node."""
        return 0

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Raise an error where the Trainer asks for what the job has not."""

    def teardown(self) -> None:
        """A run is over."""


class LightningEnvironment(ClusterEnvironment):
    """No cluster: we start the processes of this machine; on several, the script is started by hand on each.

    ``NODE_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT`` then say which one this is, and where the first one is.
    """

    @property
    def creates_processes_externally(self) -> bool:
        """Whether somebody has set ``LOCAL_RANK``, as one does who starts each process."""
        return "LOCAL_RANK" in os.environ

    @property
    def main_address(self) -> str:
        return os.environ.get("MASTER_ADDR", LOCALHOST)

    @property
    def main_port(self) -> int:
        return int(os.environ.get("MASTER_PORT", "0"))

    def local_rank(self) -> int:
        return int(os.environ.get("LOCAL_RANK", "0"))

    def node_rank(self) -> int:
        return int(os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0")))


class _Launched(ClusterEnvironment):
    """Processes that a launcher starts, which tells each by variables who it is."""

    launcher = ""
    how = ""

    def world(self) -> World:
        """Return what the variables say.

        Raises:
            MisconfigurationException: where they are missing.
        """
        found = read_as(self.launcher)
        if found is None:
            raise MisconfigurationException(
                f"{type(self).__name__}: this process has none of the variables that {self.launcher} sets. Start the script"
                f" {self.how}, or leave the plugin out."
            )
        return found

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return self.world().address

    @property
    def main_port(self) -> int:
        return self.world().port

    def world_size(self) -> int:
        return self.world().size

    def set_world_size(self, size: int) -> None:
        """The launcher has said it."""

    def global_rank(self) -> int:
        return self.world().rank

    def set_global_rank(self, rank: int) -> None:
        """The launcher has said it."""

    def local_rank(self) -> int:
        return self.world().local_rank

    def node_rank(self) -> int:
        return self.world().node

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Compare the Trainer's numbers with the job's.

        Raises:
            MisconfigurationException: where they differ.
        """
        size = self.world().size
        if num_devices * num_nodes != size:
            raise MisconfigurationException(
                f"Trainer(devices={num_devices}, num_nodes={num_nodes}) asks for {num_devices * num_nodes} processes, but"
                f" {self.launcher} has started {size}. Ask for as many of both."
            )


class TorchElasticEnvironment(_Launched):
    """Processes of ``torchrun``."""

    launcher, how = "torchrun", "with torchrun"

    @staticmethod
    def detect() -> bool:
        return "TORCHELASTIC_RUN_ID" in os.environ and read_as("torchrun") is not None


class MPIEnvironment(_Launched):
    """Processes of ``mpirun``: of Open MPI, MPICH or Intel. On several machines MASTER_ADDR names the one with rank 0."""

    launcher, how = "mpi", "with mpirun -np 2 (or more)"

    @staticmethod
    def detect() -> bool:
        return read_as("mpi") is not None


class LSFEnvironment(_Launched):
    """Processes of ``jsrun`` in a job of LSF."""

    launcher, how = "lsf", "with jsrun"

    @staticmethod
    def detect() -> bool:
        return read_as("lsf") is not None


class KubeflowEnvironment(_Launched):
    """Pods of a PyTorchJob of Kubeflow, one process in each; is never chosen by itself."""

    launcher, how = "kubeflow", "in a PyTorchJob"


class SLURMEnvironment(_Launched):
    """A job of SLURM: ends a fit with a checkpoint when its time is nearly over, and has the job started anew.

    ::

        Trainer(plugins=[SLURMEnvironment(requeue_signal=signal.SIGUSR2)])

    Without it, a Trainer in a job that ``sbatch`` has started behaves as with ``SLURMEnvironment()``.

    Args:
        auto_requeue: False leaves the job alone; signals then end a run as anywhere else.
        requeue_signal: After this one ``scontrol requeue`` is called; None is SIGUSR1. After the others it is not:
            what SLURM preempts it starts anew by itself, and what a person cancels stays cancelled.

    Raises:
        MisconfigurationException: for a ``requeue_signal`` that does not end a run.
    """

    launcher, how = "slurm", "with srun"

    def __init__(self, auto_requeue: bool = True, requeue_signal: signal.Signals | int | None = None) -> None:
        super().__init__()
        usual = getattr(signal, "SIGUSR1", None)  # Windows has none
        self.auto_requeue = auto_requeue
        self.requeue_signal = usual if requeue_signal is None else requeue_signal
        allowed = [getattr(signal, name, None) for name in ("SIGUSR1", "SIGUSR2", "SIGTERM")]
        if self.requeue_signal not in allowed:
            raise MisconfigurationException(
                f"SLURMEnvironment(requeue_signal={requeue_signal!r}): must be signal.SIGUSR1, SIGUSR2 or SIGTERM."
            )
        self._fit = 0

    @staticmethod
    def detect() -> bool:
        """Whether this process is part of a job that ``sbatch`` has started, and nobody sits in front of."""
        return bool(os.environ.get("SLURM_JOB_ID")) and SLURMEnvironment.job_name() not in _INTERACTIVE

    def world(self) -> World:
        """What srun says to its tasks; outside of several tasks, what other launchers say, or one process."""
        return read_as("slurm") or joined() or World()

    @property
    def creates_processes_externally(self) -> bool:
        """Whether srun, or another launcher, has started several tasks; else they are started as anywhere."""
        return read_as("slurm") is not None or joined() is not None

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        if self.creates_processes_externally:
            super().validate_settings(num_devices, num_nodes)

    @staticmethod
    def job_name() -> str | None:
        """The name of the job; None outside of one."""
        return os.environ.get("SLURM_JOB_NAME")

    @staticmethod
    def job_id() -> str | None:
        """The number of the job, or of the array and the task in it, ``<array>_<task>``; None outside of one."""
        array = os.environ.get("SLURM_ARRAY_JOB_ID")
        if array is not None:
            return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        return os.environ.get("SLURM_JOB_ID")

    def begin_fit(self) -> None:
        """Count a fit of this process."""
        self._fit = next(_FITS)

    @property
    def name_of_fit(self) -> str:
        """What a checkpoint bears that the fit that runs now writes: the same when the job has been started anew."""
        return f"{self.job_id()}/{self._fit}"

    def requeue(self) -> bool:
        """Have the job started anew; return whether SLURM will do that. It ends this process soon, if so."""
        job = self.job_id() or ""
        command = ["scontrol", "requeue", job]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            rank_zero_warn(f"The job {job} cannot be requeued: {error}. It ends here; its checkpoint is saved.")
            return False
        if done.returncode != 0:
            rank_zero_warn(
                f"SLURM refused to requeue the job {job} (exit code {done.returncode}): {done.stderr.strip()}. It ends"
                " here; its checkpoint is saved. Submit the job with --requeue, and see JobRequeue in slurm.conf."
            )
            return False
        rank_zero_info(f"SLURM will start the job {job} anew; it goes on from the checkpoint.")
        return True


def world_of(environment: ClusterEnvironment, local_size: int, nodes: int) -> World:
    """Return the world that a cluster environment describes.

    Args:
        environment: Ours, or the user's own.
        local_size: How many processes the Trainer asks for on each node.
        nodes: How many nodes it asks for.

    Raises:
        MisconfigurationException: for what the environment does not know, or numbers that cannot be.
    """
    if OURS in os.environ and (mine := joined()) is not None:
        return mine  # we have started this process, and told it
    environment.validate_settings(local_size, nodes)
    if isinstance(environment, _Launched) and environment.creates_processes_externally:
        return environment.world()
    if (mine := joined()) is not None and mine.starter == "leyden":
        return mine  # the others are there: an earlier Trainer of this script has started them
    external = environment.creates_processes_externally
    if not external and (isinstance(environment, SLURMEnvironment) or type(environment) is LightningEnvironment):
        return planned(local_size, nodes)
    node, local = environment.node_rank(), environment.local_rank()
    environment.set_world_size(local_size * nodes)
    environment.set_global_rank(node * local_size + local)
    size, rank = int(environment.world_size()), int(environment.global_rank())
    world = World(
        rank, size, local, max(local_size, local + 1), node, str(environment.main_address), int(environment.main_port),
        type(environment).__name__ if external else "leyden",
    )  # fmt: skip
    if world.size > 1 and not world.port and (external or nodes > 1):
        raise MisconfigurationException(
            f"{type(environment).__name__}.main_port is {environment.main_port!r}: where the processes are started by"
            " somebody else it must be the port at which all of them meet (an int > 0)."
        )
    return sound(world)


def environment_of(world: World) -> ClusterEnvironment:
    """Return the environment that describes ``world``, which nobody has named."""
    kinds = {
        kind.launcher: kind for kind in (TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment, MPIEnvironment)
    }
    found = kinds.get(world.starter, LightningEnvironment)()
    found.set_world_size(world.size)
    found.set_global_rank(world.rank)
    return found


__all__ = [
    "ClusterEnvironment", "KubeflowEnvironment", "LSFEnvironment", "LightningEnvironment", "MPIEnvironment",
    "SLURMEnvironment", "TorchElasticEnvironment", "environment_of", "world_of",
]  # fmt: skip
