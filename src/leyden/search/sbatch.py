# SPDX-License-Identifier: Apache-2.0
"""What SLURM is told: a submit script as text, a walltime in seconds, and the call of sbatch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from leyden.errors import LeydenError, MisconfigurationException

_TIME = re.compile(r"(?:(?P<days>\d+)-(?P<of_day>\d+(?::\d+){0,2})|(?P<clock>\d+(?::\d+){0,2}))")
_PAUSES = (1.0, 5.0)
"""Seconds before the second and the third attempt: a busy controller refuses for a moment."""
_BUSY = ("Socket timed out", "Unable to contact")
_OF_A_JOB = ("SLURM_", "SLURMD_", "SRUN_", "PMI_", "PMIX_")
_OF_ITS_GPUS = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ZE_AFFINITY_MASK")


class Directive(NamedTuple):
    """One ``#SBATCH`` line and the comment above it."""

    name: str
    value: object
    comment: str


def walltime_seconds(job_time: str) -> int:
    """Return the seconds of a walltime as SLURM reads it.

    ``[[days-]hours:]minutes:seconds``, and SLURM's own short forms: ``minutes``, ``days-hours``, ``days-hours:minutes``.

    Raises MisconfigurationException for anything else.
    """
    found = _TIME.fullmatch(str(job_time).strip())
    if found is None:
        raise MisconfigurationException(
            f"job_time={job_time!r}: must be [[days-]hours:]minutes:seconds, such as '15:00' for a quarter of an hour or"
            " '2-00:00:00' for two days."
        )
    if found["days"] is not None:
        hours, minutes, seconds = ([int(part) for part in found["of_day"].split(":")] + [0, 0])[:3]
        return ((int(found["days"]) * 24 + hours) * 60 + minutes) * 60 + seconds
    parts = [int(part) for part in found["clock"].split(":")]
    if len(parts) == 1:
        return parts[0] * 60
    hours, minutes, seconds = [0, *parts][-3:]
    return (hours * 60 + minutes) * 60 + seconds


def script(
    title: str,
    directives: Iterable[Directive],
    exports: Mapping[str, str],
    modules: Sequence[str],
    commands: Sequence[str],
    run: str,
) -> str:
    """Return a submit script: directives, environment, modules, the user's commands, and ``run`` as the job's one step."""
    lines = ["#!/bin/bash", *(f"# {line}" for line in title.splitlines())]
    for name, value, comment in directives:
        text = f"--{name.lstrip('-')}" + ("" if value is None or value == "" else f"={_quoted(str(value))}")
        if "\n" in text + comment:
            raise MisconfigurationException(f"A line of a submit script cannot hold a line break: {text + comment!r}.")
        lines += ["", *([f"# {comment}"] if comment else []), f"#SBATCH {text}"]
    lines.append("")
    lines += [f"export {name}={value}" for name, value in exports.items()]
    lines += [f"module load {module}" for module in modules]
    lines += commands
    lines += ["", f"srun {run}", ""]
    return "\n".join(lines)


def log_name(path: Path) -> str:
    """Return ``path`` as the value of --output or --error, where ``%`` begins a placeholder."""
    return str(path).replace("%", "%%")


def _quoted(value: str) -> str:
    if '"' in value:
        raise MisconfigurationException(f"A value of #SBATCH cannot hold a double quote: {value!r}.")
    return f'"{value}"' if re.search(r"[\s#'\\]", value) else value


def find_sbatch() -> str:
    """Return the path of sbatch; raise MisconfigurationException where there is none."""
    found = shutil.which("sbatch")
    if found is None:
        raise MisconfigurationException(
            "SlurmCluster: there is no `sbatch` on the path. Start the search where jobs can be submitted (a login node of"
            " the cluster); on a machine without SLURM use optimize_parallel_cpu or optimize_parallel_gpu."
        )
    return found


def submit(path: Path, environment: Mapping[str, str]) -> str:
    """Submit a script; return the number of the job.

    Raises LeydenError with SLURM's own words if it is refused, the third time too.
    """
    command = [find_sbatch(), "--parsable", str(path)]
    pauses = list(_PAUSES)
    while True:
        done = subprocess.run(command, env=dict(environment), capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip().split(";")[0]  # "job" or "job;cluster"
        if not pauses or not any(words in done.stderr for words in _BUSY):
            break
        print(f"{done.stderr.strip()}; trying again", file=sys.stderr, flush=True)
        time.sleep(pauses.pop(0))
    raise LeydenError(
        f"sbatch refused {path} (exit code {done.returncode}): {done.stderr.strip()}\nThe script stays where it is: look"
        " at it, change what SLURM does not like (attributes of SlurmCluster, add_slurm_cmd), and try again."
    )


def outside_of_the_job(environment: Mapping[str, str]) -> dict[str, str]:
    """Return ``environment`` without what SLURM put there for this job, which would leak into one submitted from here."""
    dropped = _OF_ITS_GPUS if {"SLURM_JOB_GPUS", "SLURM_STEP_GPUS"} & set(environment) else ()
    return {
        name: value
        for name, value in environment.items()
        if name == "SLURM_CONF" or not (name.startswith(_OF_A_JOB) or name in dropped)
    }


def python_program() -> list[str]:
    """Return what python was started with: ``script.py`` or ``-m module``, and its arguments.

    Raises MisconfigurationException in an interactive session, which no job can repeat.
    """
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        name = spec.name.removesuffix(".__main__")
        return ["-m", name, *sys.argv[1:]]
    path = getattr(main, "__file__", None)
    if path is None:
        raise MisconfigurationException(
            "SlurmCluster: each job runs the script that submits it, and this is an interactive session. Put the search"
            " into a .py file."
        )
    return [os.path.abspath(path), *sys.argv[1:]]
