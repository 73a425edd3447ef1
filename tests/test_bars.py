# SPDX-License-Identifier: Apache-2.0
"""The bars of the design hold, and the instruments that measure them can tell good from bad. Q1 of PAINS.md."""

from __future__ import annotations

from pathlib import Path

import pytest

import bars


def write(root: Path, files: dict[str, str]) -> dict[str, set[str]]:
    for name, text in files.items():
        path = root / "leyden" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return bars.import_graph(root / "leyden")


def test_Q1_four_frames_of_ours_from_fit_to_training_step() -> None:
    frames = bars.frames_to_training_step()
    assert 1 <= len(frames) <= 4, frames
    assert frames[0] == "trainer.py:fit"


def test_a_batch_costs_at_most_40_calls_with_nothing_attached() -> None:
    assert 0 < bars.calls_per_batch(attached=False) <= 40


def test_a_batch_costs_at_most_90_calls_with_a_log_and_three_callbacks() -> None:
    assert 0 < bars.calls_per_batch(attached=True) <= 90


def test_no_file_stands_in_an_import_circle() -> None:
    assert bars.circles(bars.import_graph()) == []


def test_no_file_is_longer_than_600_lines() -> None:
    assert bars.longest_file()[0] <= 600, bars.longest_file()


def test_the_hot_loop_is_at_most_400_lines() -> None:
    assert bars.lines_of_hot_loop() <= 400


def test_no_function_body_is_longer_than_100_lines() -> None:
    assert bars.longest_function()[0] <= 100, bars.longest_function()


def test_every_file_and_every_public_name_says_what_it_is_for() -> None:
    assert bars.undocumented() == []


@pytest.mark.parametrize(
    "statement", ["import leyden", "from leyden import Callback, LightningDataModule, LightningModule, Trainer"]
)
def test_importing_loads_at_most_60_modules(statement: str) -> None:
    loaded = bars.modules_loaded(statement)
    assert 1 <= len(loaded) <= 60, loaded


def test_circles_are_found_through_lazy_and_typing_imports(tmp_path: Path) -> None:
    graph = write(
        tmp_path,
        {
            "__init__.py": "",
            "a.py": "from leyden import b",
            "b.py": "def f():\n    from leyden.c import x",
            "c.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import leyden.a",
            "d.py": "import leyden.a",
        },
    )
    assert graph["leyden.d"] == {"leyden.a"}
    assert bars.circles(graph) == [["leyden.a", "leyden.b", "leyden.c"]]


def test_init_files_count_and_relative_imports_are_followed(tmp_path: Path) -> None:
    graph = write(
        tmp_path,
        {
            "__init__.py": "",
            "p/__init__.py": "from .one import x",
            "p/one.py": "from . import two, y",
            "p/two.py": "from leyden.p import x",
        },
    )
    assert graph["leyden.p.one"] == {"leyden.p", "leyden.p.two"}
    assert bars.circles(graph) == [["leyden.p", "leyden.p.one", "leyden.p.two"]]


def test_tables_of_strings_are_no_imports(tmp_path: Path) -> None:
    graph = write(tmp_path, {"__init__.py": "NAMES = {'T': 'leyden.t'}", "t.py": "import leyden"})
    assert graph["leyden"] == set()
    assert bars.circles(graph) == []


def test_a_broken_bar_is_broken() -> None:
    assert not bars.Bar("lines", 401, 400).holds
    assert bars.Bar("lines", 400, 400).holds
