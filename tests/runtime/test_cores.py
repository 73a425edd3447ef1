# SPDX-License-Identifier: Apache-2.0
"""The cores of a process are those that the system, SLURM and its neighbours leave to it."""

from __future__ import annotations

import os

import pytest

from leyden.runtime.cores import cores


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 8), ({"SLURM_CPUS_PER_TASK": "3"}, 3), ({"SLURM_CPUS_PER_TASK": "64"}, 8), ({"LOCAL_WORLD_SIZE": "4"}, 2),
        ({"LOCAL_WORLD_SIZE": "16"}, 1), ({"SLURM_CPUS_PER_TASK": "4", "LOCAL_WORLD_SIZE": "4"}, 4),
        ({"SLURM_CPUS_PER_TASK": "", "LOCAL_WORLD_SIZE": "many"}, 8),
    ],
)  # fmt: skip
def test_what_is_allowed_and_given(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: int) -> None:
    for name in ("SLURM_CPUS_PER_TASK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert cores() == expected


def test_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_CPUS_PER_TASK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert cores() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores() == 1
