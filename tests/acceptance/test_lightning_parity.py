# SPDX-License-Identifier: Apache-2.0
"""The same script gives the same figures as on Lightning, bit for bit: metrics, learning rates, weights.

Where Lightning is installed it runs beside us. Elsewhere the figures that it gave are read from ``golden/parity.json``,
which holds for the torch build and the kind of CPU on which it was recorded, and for no other.
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

HERE = Path(__file__).parent
SCRIPT = HERE / "lightning_parity_script.py"


def run(framework: str) -> dict[str, Any]:
    """Run the script in a process of its own, so that neither framework sees the other's seeds, threads or settings."""
    command = [sys.executable, str(SCRIPT), framework]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=110)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["result"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def theirs() -> dict[str, Any]:
    if importlib.util.find_spec("lightning"):
        return run("lightning.pytorch")
    golden = json.loads((HERE / "golden" / "parity.json").read_text(encoding="utf-8"))
    here = lightning_parity_script.machine()
    different = [key for key, value in here.items() if golden["machine"][key] != value]
    if different:
        pytest.skip(f"Lightning is not installed, and its figures were recorded elsewhere: {different} differ")
    return golden["result"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def ours() -> dict[str, Any]:
    return run("leyden")


def test_the_run_is_long_enough_to_mean_something(ours: dict[str, Any]) -> None:
    assert len(ours["losses"]) == 120
    assert ours["global_step"] == 30
    assert float.fromhex(ours["validated"]["val_accuracy"]) > 0.8


@pytest.mark.parametrize("what", ["losses", "rates", "callback_metrics", "validated", "global_step", "current_epoch"])
def test_figures_are_those_of_lightning(ours: dict[str, Any], theirs: dict[str, Any], what: str) -> None:
    assert ours[what] == theirs[what]


def test_logged_rows_are_those_of_lightning(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    mine, yours = ([tuple(row) for row in result["rows"]] for result in (ours, theirs))
    assert mine == yours, {"only ours": set(mine) - set(yours), "only theirs": set(yours) - set(mine)}


def test_final_weights_are_those_of_lightning(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours["weights"].keys() == theirs["weights"].keys()
    assert [name for name in ours["weights"] if ours["weights"][name] != theirs["weights"][name]] == []
