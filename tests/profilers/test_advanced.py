# SPDX-License-Identifier: Apache-2.0
"""Each action's own functions, the outer one's too after an inner one, in a report and in files."""

from __future__ import annotations

import pickle
import pstats
from pathlib import Path

import pytest

from leyden.errors import MisconfigurationException
from leyden.profilers import AdvancedProfiler


def early() -> None: ...


def inner() -> None: ...


def late() -> None: ...


def used(profiler: AdvancedProfiler) -> AdvancedProfiler:
    with profiler.profile("outer"):
        early()
        with profiler.profile("inner"):
            inner()
        late()
    return profiler


def functions(profiler: AdvancedProfiler, action: str) -> set[str]:
    return {name for _, _, name in pstats.Stats(profiler.profiled_actions[action]).stats}  # type: ignore[attr-defined]


def test_actions_inside_others_are_theirs_alone() -> None:
    profiler = used(AdvancedProfiler())
    assert {"early", "late"} <= functions(profiler, "outer")
    assert "inner" not in functions(profiler, "outer")
    assert "inner" in functions(profiler, "inner")


def test_the_report_lists_each_action_and_goes_to_a_file(tmp_path: Path) -> None:
    profiler = AdvancedProfiler(dirpath=tmp_path, filename="profile")
    profiler.setup("fit", local_rank=0)
    used(profiler).describe()
    text = (tmp_path / "fit-profile-0.txt").read_text()
    assert text.startswith("FIT Profiler Report")
    assert text.count("Profile stats for:") == 2
    assert "(early)" in text


def test_fewer_lines() -> None:
    def rows(restriction: float) -> int:
        return used(AdvancedProfiler(line_count_restriction=restriction)).summary().count("(")

    assert rows(1) < rows(1.0)


def test_raw_numbers(tmp_path: Path) -> None:
    profiler = AdvancedProfiler(dirpath=tmp_path, filename="profile", dump_stats=True)
    profiler.setup("test", local_rank=1)
    used(profiler).summary()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "test-profile-1-inner.prof",
        "test-profile-1-outer.prof",
    ]
    assert any(name == "inner" for _, _, name in pstats.Stats(str(tmp_path / "test-profile-1-inner.prof")).stats)  # type: ignore[attr-defined]
    with pytest.raises(MisconfigurationException, match="needs a folder"):
        used(AdvancedProfiler(dump_stats=True)).summary()


def test_an_action_that_never_began() -> None:
    with pytest.raises(ValueError, match="never started"):
        AdvancedProfiler().stop("x")


def test_nothing_stays_after_teardown_and_it_travels() -> None:
    profiler = used(AdvancedProfiler(line_count_restriction=3))
    copied = pickle.loads(pickle.dumps(profiler))
    assert (copied.profiled_actions, copied.line_count_restriction) == ({}, 3)
    profiler.teardown("fit")
    assert profiler.summary() == ""
