# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run; what they measure is not asserted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import checkpoint
import imports
import overhead


def test_every_contender_of_ours_gives_a_row() -> None:
    with overhead.quiet():
        rows = overhead.measure(steps=30, rounds=1, only="leyden")
    assert [row["name"] for row in rows] == [name for name in overhead.contenders()[1] if "leyden" in name]
    assert all(row["ratio"] > 0 and row["us_per_step"] > 0 for row in rows)


@pytest.mark.parametrize("statement", imports.STATEMENTS["leyden"])
def test_imports_are_counted(statement: str) -> None:
    seconds, modules = imports.cost(statement)
    assert seconds > 0
    assert modules >= 1


def test_stall_and_memory_of_a_checkpoint_are_measured(tmp_path: Path) -> None:
    rows = checkpoint.stalls(megabytes=13, saves=2, folder=str(tmp_path))
    assert {name: len(each) for name, each in rows.items()} == {"sync": 2, "async": 2}
    assert all(row["steps"] >= checkpoint.STEPS_AFTER and row["call"] > 0 for each in rows.values() for row in each)
    if sys.platform == "linux":
        assert checkpoint.peak(13, "async", str(tmp_path)) > 0
