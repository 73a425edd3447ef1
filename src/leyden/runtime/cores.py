# SPDX-License-Identifier: Apache-2.0
"""How many cores this process may use."""

from __future__ import annotations

import os


def allowed_cores() -> int:
    """Return the number of cores that the system lets this process use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def cores() -> int:
    """Return the number of cores that this process may use: what the system allows it, and what SLURM gave the task.

    Processes that a launcher started side by side on one machine share what the system allows.
    """
    allowed = allowed_cores()
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if given.isdigit() and int(given):
        return min(allowed, int(given))
    beside = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, allowed // int(beside)) if beside.isdigit() and int(beside) else allowed
