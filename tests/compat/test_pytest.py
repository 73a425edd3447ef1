# SPDX-License-Identifier: Apache-2.0
"""The pytest plug-in: a suite written for Lightning, its conftest and the processes that it starts find the names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CONFTEST = (
    "import lightning.pytorch as pl\nimport pytest\n\n@pytest.fixture\ndef trainer_class():\n    return pl.Trainer\n"
)
SUITE = """
import subprocess, sys
import leyden
from pytorch_lightning import Trainer

def test_the_names_are_there(trainer_class):
    assert trainer_class is Trainer is leyden.Trainer

def test_a_process_has_them_too():
    subprocess.run([sys.executable, "-c", "import lightning; assert lightning.__spec__.origin == 'leyden.compat'"], check=True)
"""
INSIDE = """
import os, sys, pytest
before = dict(os.environ), list(sys.meta_path)
status = pytest.main(["-p", "leyden.compat.pytest", "-p", "no:cacheprovider", "-q", "--rootdir=.", "-c", os.devnull, "."])
after = dict(os.environ)
for own in ("PYTEST_VERSION", "PYTEST_CURRENT_TEST"):
    before[0].pop(own, None), after.pop(own, None)
assert after == before[0]
left = [finder for finder in sys.meta_path if type(finder).__module__ == "leyden.compat.hook"]
assert left == [] and "lightning" not in sys.modules
sys.exit(status)
"""


def test_a_suite_runs_with_the_names_and_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_suite.py").write_text(SUITE)
    done = subprocess.run(
        [sys.executable, "-c", INSIDE], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def test_the_report_says_who_answers(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text("def test(): pass\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "leyden.compat.pytest", "-p", "no:cacheprovider", "test_suite.py"],
        cwd=tmp_path, capture_output=True, text=True, check=True, timeout=100,
    )  # fmt: skip
    assert "answers lightning, pytorch_lightning" in done.stdout
