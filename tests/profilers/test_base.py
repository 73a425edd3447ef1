# SPDX-License-Identifier: Apache-2.0
"""The base of profilers: files, names, the context manager, and the profiler that measures nothing."""

from __future__ import annotations

import pytest

from leyden.profilers import PassThroughProfiler, Profiler


class Recorder(Profiler):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.events = []

    def start(self, action_name):
        self.events.append(("start", action_name))

    def stop(self, action_name):
        self.events.append(("stop", action_name))

    def summary(self):
        return f"{self.title}\n{len(self.events)} events"


def test_profile_stops_the_action_also_when_it_fails():
    profiler = Recorder()
    with pytest.raises(KeyError), profiler.profile("work") as name:
        assert name == "work"
        raise KeyError("mine")
    assert profiler.events == [("start", "work"), ("stop", "work")]


def test_a_failing_start_is_not_followed_by_stop():
    class Broken(Recorder):
        def start(self, action_name):
            raise RuntimeError("no clock")

    profiler = Broken()
    with pytest.raises(RuntimeError, match="no clock"), profiler.profile("work"):
        pass
    assert profiler.events == []


def test_report_is_printed_on_the_main_process_only(capsys):
    profiler = Recorder()
    profiler.setup("fit", local_rank=1)
    profiler.describe()
    assert capsys.readouterr().out == ""
    profiler.setup("fit", local_rank=0)
    profiler.describe()
    assert capsys.readouterr().out == "FIT Profiler Report\n0 events\n"


def test_report_is_appended_to_a_file_in_the_log_folder(tmp_path, capsys):
    profiler = Recorder(filename="perf")
    profiler.setup("fit", local_rank=0, log_dir=str(tmp_path / "logs"))
    profiler.describe()
    profiler.describe()
    assert (tmp_path / "logs" / "fit-perf-0.txt").read_text() == "FIT Profiler Report\n0 events\n" * 2
    assert capsys.readouterr().out == ""


def test_a_given_folder_wins_over_the_log_folder(tmp_path):
    profiler = Recorder(dirpath=tmp_path / "mine", filename="perf")
    profiler.setup("test", local_rank=3, log_dir=str(tmp_path / "logs"))
    profiler.describe()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.txt")] == ["mine/test-perf-3.txt"]


def test_a_remote_folder(tmp_path):
    profiler = Recorder(dirpath=f"file://{tmp_path}", filename="perf")
    profiler.describe()
    assert (tmp_path / "perf.txt").read_text().startswith("Profiler Report")


def test_file_names_hold_no_separators():
    profiler = Recorder()
    assert profiler.prepare_filename() == "profile.txt"
    profiler.setup("fit", local_rank=0)
    assert profiler.prepare_filename("[Strategy]a/b:c?", extension=".prof") == "fit-0-[Strategy]a_b_c_.prof"


def test_the_null_profiler_measures_and_says_nothing(capsys):
    profiler = PassThroughProfiler()
    profiler.setup("fit", local_rank=0)
    profiler.start("a")
    profiler.start("a")
    profiler.stop("never started")
    with profiler.profile("b") as name:
        assert name == "b"
    profiler.describe()
    profiler.teardown("fit")
    assert profiler.summary() == ""
    assert capsys.readouterr().out == ""
