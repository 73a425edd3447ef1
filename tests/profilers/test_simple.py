# SPDX-License-Identifier: Apache-2.0
"""SimpleProfiler: what it records and the table it prints."""

from __future__ import annotations

import pickle

import pytest

from leyden.errors import MisconfigurationException
from leyden.profilers import SimpleProfiler
from leyden.profilers import simple as module


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests set by hand."""

    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def run(profiler, clock, action, *durations):
    for duration in durations:
        with profiler.profile(action):
            clock.now += duration


def test_extended_report(clock):
    profiler = SimpleProfiler()
    profiler.setup("fit", local_rank=0)
    run(profiler, clock, "short", 0.5, 1.5)
    run(profiler, clock, "long", 6.0)
    report = profiler.summary().splitlines()
    cells = [[cell.strip() for cell in line.split("|")] for line in report if "|" in line]
    assert report[0] == "FIT Profiler Report"
    assert cells == [
        ["Action", "Mean duration (s)", "Num calls", "Total time (s)", "Percentage %"],
        ["Total", "-", "3", "8.0", "100"],
        ["long", "6.0", "1", "6.0", "75.0"],
        ["short", "1.0", "2", "2.0", "25.0"],
    ]


def test_short_report(clock):
    profiler = SimpleProfiler(extended=False)
    run(profiler, clock, "a", 2.0)
    cells = [[cell.strip() for cell in line.split("|")] for line in profiler.summary().splitlines() if "|" in line]
    assert cells == [
        ["Action", "Mean duration (s)", "Total time (s)"],
        ["Total", "-", "2.0"],
        ["a", "2.0", "2.0"],
    ]


@pytest.mark.parametrize("extended", [True, False])
def test_a_report_of_nothing_is_still_a_table(clock, extended):
    assert "Total" in SimpleProfiler(extended=extended).summary()


def test_the_whole_time_begins_with_the_run(clock):
    profiler = SimpleProfiler()
    clock.now = 1000.0
    profiler.setup("fit")
    run(profiler, clock, "a", 1.0)
    profiler.setup("test")  # a second entry point goes on counting
    assert [cell.strip() for cell in profiler.summary().splitlines()[4].split("|")][3] == "1.0"


def test_an_action_cannot_run_twice_at_once():
    profiler = SimpleProfiler()
    profiler.start("a")
    with pytest.raises(MisconfigurationException, match="start\\('a'\\).*already started"):
        profiler.start("a")


def test_an_action_must_start_before_it_stops():
    profiler = SimpleProfiler()
    profiler.start("b")
    with pytest.raises(ValueError, match="stop\\('a'\\).*never started.*'b'"):
        profiler.stop("a")


def test_durations_are_kept_and_can_be_pickled(clock):
    profiler = SimpleProfiler()
    run(profiler, clock, "a", 1.0, 2.0)
    assert list(pickle.loads(pickle.dumps(profiler)).recorded_durations["a"]) == [1.0, 2.0]
