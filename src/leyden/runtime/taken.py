# SPDX-License-Identifier: Apache-2.0
"""Which GPUs of this machine other processes compute on, as the driver's own tool ``nvidia-smi`` says."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping

import torch

_TIMEOUT = 10.0
"""Seconds that the tool has to answer; a driver that hangs must not keep a run from starting."""


def taken(ask: Callable[[str], list[list[str]]] | None = None) -> dict[int, str]:
    """Return, by their index in torch, the GPUs that other processes compute on, and which processes these are.

    Empty where nobody can tell: without the tool, or where this process is not among those that it lists, as in some
    containers, though it has opened CUDA.

    Args:
        ask: Returns the rows that ``nvidia-smi --query-<argument>`` prints; None runs it.
    """
    ask = ask or _ask
    processes = ask("compute-apps=gpu_uuid,pid,process_name")
    if not processes:
        return {}
    mine = str(os.getpid())
    if torch.cuda.is_initialized() and all(row[1] != mine for row in processes):  # type: ignore[no-untyped-call]
        return {}
    on: dict[str, list[str]] = {}
    for identity, number, name in (row for row in processes if len(row) == 3):
        if number != mine and "mps-server" not in name:
            on.setdefault(identity, []).append(f"process {number} ({os.path.basename(name)})")
    visible = visible_identities([row[1] for row in sorted(ask("gpu=index,uuid"), key=lambda row: int(row[0]))])
    return {index: ", ".join(on[identity]) for index, identity in enumerate(visible) if identity in on}


def visible_identities(all_of_them: list[str], environment: Mapping[str, str] | None = None) -> list[str]:
    """Return the identities of the GPUs that torch sees, in its order, given those of all in the order of the driver."""
    given = (os.environ if environment is None else environment).get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return all_of_them
    found = []
    for word in (word.strip() for word in given.split(",")):
        if word.isdigit():
            if int(word) >= len(all_of_them):
                break  # as CUDA does: what follows one that is not there is not seen
            found.append(all_of_them[int(word)])
        else:
            found.append(next((identity for identity in all_of_them if word and identity.startswith(word)), word))
    return found


def _ask(query: str) -> list[list[str]]:
    command = ["nvidia-smi", f"--query-{query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return [[word.strip() for word in line.split(",", 2)] for line in lines if line.strip()]
