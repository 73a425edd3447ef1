# SPDX-License-Identifier: Apache-2.0
"""How many cores this process may use."""

from __future__ import annotations

import os


def cores() -> int:
    """Return the number of cores that this process may use: what the system allows it, and what SLURM gave the task.

    Processes that a launcher started side by side on one machine share what the system allows.
    """
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        allowed = os.cpu_count() or 1
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if given.isdigit() and int(given):
        return min(allowed, int(given))
    beside = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, allowed // int(beside)) if beside.isdigit() and int(beside) else allowed
