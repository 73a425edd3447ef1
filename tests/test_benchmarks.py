# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, and all contenders of ours do the same work as the loop; what they measure is not asserted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import bench
import checkpoint
import fresh
import harness
import overhead


@pytest.mark.parametrize("part", ["a", "b", "c", "d"])
def test_training_ends_with_the_weights_of_the_loop_by_hand(part: str) -> None:
    (section,) = bench.sections(bench.SMOKE, "leyden", part)
    assert len(section.rows) == {"a": 6, "b": 4}.get(part, 2)
    assert all((row.ratio or 0) > 0 and row.figure > 0 for row in section.rows)
    assert all(row.weights in ("equal", "close" if "fused" in row.name else "equal") for row in section.rows)
    for shown in (harness.as_text(section), harness.as_markdown(section)):
        assert section.title in shown
        assert all(row.name in shown for row in section.rows)


def test_cost_against_metrics_callbacks_and_epochs() -> None:
    (section,) = bench.sections(bench.SMOKE, "leyden", "g")
    assert len(section.rows) == 2 + 2 + 2 + 2
    assert all(row.least <= row.figure <= row.most for row in section.rows)


def test_several_processes_end_with_the_weights_of_the_loop_by_hand() -> None:
    (section,) = bench.sections(bench.SMOKE, "leyden", "h")
    assert [row.weights for row in section.rows] == ["equal", "equal"]
    assert all((row.ratio or 0) > 0 and row.figure > 0 for row in section.rows)


@pytest.mark.parametrize("statement", fresh.IMPORTS["leyden"])
def test_imports_are_counted(statement: str) -> None:
    milliseconds, modules = fresh.import_cost(statement)
    assert milliseconds > 0
    assert modules >= 1


def test_a_fresh_process_tells_when_its_first_step_was_and_how_much_it_held() -> None:
    programs = fresh.processes("leyden")
    assert list(programs) == ["by hand", "leyden, nothing attached", "leyden, as it is"]
    milliseconds, megabytes = fresh.one(programs["leyden, nothing attached"], steps=2)
    assert milliseconds > 0
    assert megabytes > 10


def test_a_contender_that_makes_fewer_updates_is_found_out() -> None:
    def prepare(steps: int) -> harness.Prepare:
        def make(folder: str) -> harness.Prepared:
            layer = torch.nn.Linear(2, 2)
            optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
            return harness.Prepared(lambda: [optimizer.step() for _ in range(steps)], layer.parameters)

        return make

    loops = {"loop": prepare(3)}
    assert harness.compare(loops, [harness.Contender("same", prepare(3), "loop")], 1, 3)[0].weights == "equal"
    with pytest.raises(RuntimeError, match="lazy made 2 updates where 3 were expected"):
        harness.compare(loops, [harness.Contender("lazy", prepare(2), "loop")], 1, 3)


def test_weights_that_differ_are_told_apart() -> None:
    one = [torch.ones(3)]
    assert harness.same(one, [torch.ones(3)]) == "equal"
    assert harness.same(one, [torch.ones(3) + 1e-5]) == "close"
    assert harness.same(one, [torch.zeros(3)]) == "own order"


def test_results_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "QUICK", bench.SMOKE)
    page, rows = tmp_path / "RESULTS.md", tmp_path / "results.json"
    monkeypatch.setattr(
        "sys.argv", ["bench", "--quick", "--only", "leyden", "--parts", "a", "--write", str(page), "--json", str(rows)]
    )
    bench.main()
    assert "(a) overhead" in page.read_text(encoding="utf-8")
    assert "┃" in page.read_text(encoding="utf-8")
    assert json.loads(rows.read_text(encoding="utf-8"))["sections"][0]["rows"]


def test_the_overhead_can_be_measured_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["overhead", "--steps", "5", "--rounds", "1", "--only", "nothing logged"])
    overhead.main()
    assert "leyden, nothing logged" in capsys.readouterr().out


def test_stall_and_memory_of_a_checkpoint_are_measured(tmp_path: Path) -> None:
    rows = checkpoint.stalls(megabytes=13, saves=2, folder=str(tmp_path))
    assert {name: len(each) for name, each in rows.items()} == {"sync": 2, "async": 2}
    assert all(row["steps"] >= checkpoint.STEPS_AFTER and row["call"] > 0 for each in rows.values() for row in each)
    if sys.platform == "linux":
        assert checkpoint.peak(13, "async", str(tmp_path)) > 0
