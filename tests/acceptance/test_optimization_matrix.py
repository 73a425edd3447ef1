# SPDX-License-Identifier: Apache-2.0
"""Small fits over a matrix of settings end with the figures of Lightning, bit for bit.

Where Lightning is installed it runs beside us. Elsewhere its figures are read from ``golden/matrix.json``, which holds
for the torch build and the kind of CPU on which it was recorded, and for no other.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lightning_parity_script
from optimization_matrix_script import CASES

HERE = Path(__file__).parent


def run(framework: str) -> dict[str, Any]:
    """Run all cases in a process of its own, so that neither framework sees the other's threads or settings."""
    command = [sys.executable, str(HERE / "optimization_matrix_script.py"), framework]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=110)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["result"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def theirs() -> dict[str, Any]:
    if importlib.util.find_spec("lightning"):
        return run("lightning.pytorch")
    golden = json.loads((HERE / "golden" / "matrix.json").read_text(encoding="utf-8"))
    here = lightning_parity_script.machine()
    different = [key for key, value in here.items() if golden["machine"][key] != value]
    if different:
        pytest.skip(f"Lightning is not installed, and its figures were recorded elsewhere: {different} differ")
    return golden["result"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def ours() -> dict[str, Any]:
    return run("leyden")


@pytest.mark.parametrize("case", CASES)
def test_figures_are_those_of_lightning(ours: dict[str, Any], theirs: dict[str, Any], case: str) -> None:
    mine, yours = ours[case], theirs[case]
    assert mine.keys() == yours.keys()
    different = [what for what in mine if mine[what] != yours[what]]
    assert not different, {what: (mine[what], yours[what]) for what in different}


def test_the_cases_are_different_runs(ours: dict[str, Any]) -> None:
    # a case whose setting has no effect would prove nothing: these alone may end with the weights of another
    alike = {"plain", "no_step_logging", "step_of_the_user"}
    ends = [figures["weights"] for case, figures in ours.items() if case not in alike]
    assert len(ends) - len(set(ends)) <= 3  # windows of accumulation cleared in two ways, plateaus, half precisions
