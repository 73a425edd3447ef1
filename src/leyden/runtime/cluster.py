# SPDX-License-Identifier: Apache-2.0
"""What a process is told about the job that it is part of, and what it can ask the cluster for: SLURM's part."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess

from leyden.errors import MisconfigurationException
from leyden.runtime.ranks import rank_zero_info, rank_zero_warn

_INTERACTIVE = ("bash", "interactive")
_FITS = itertools.count()  # a job that is started anew makes the same fits in the same order


class ClusterEnvironment:
    """Base of what describes the job that a process is part of."""

    @staticmethod
    def detect() -> bool:
        """Whether this process is part of such a job."""
        return False


class SLURMEnvironment(ClusterEnvironment):
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

    def __init__(self, auto_requeue: bool = True, requeue_signal: signal.Signals | int | None = None) -> None:
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


__all__ = ["ClusterEnvironment", "SLURMEnvironment"]
