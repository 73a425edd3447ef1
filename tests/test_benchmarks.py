# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run; what they measure is not asserted."""

from __future__ import annotations

import pytest

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
