# SPDX-License-Identifier: Apache-2.0
"""Hooks are called in Lightning's order: every scenario gives the recorded trace, call by call.

The traces in ``golden/`` were recorded with Lightning 2.6.6 by ``record_lightning_traces.py``. Where Lightning is
installed they are recorded once more and must not have changed.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

import leyden
from golden_trace_script import SCENARIOS, calls, run_scenario
from record_lightning_traces import GOLDEN, KINDS, record

# Where the state of a run differs on purpose (the order of the calls never does).
MEANINGS = {
    "manual": "global_step counts updates of the model, not steps of optimizers",
}


def golden(name: str) -> dict[str, list[str]]:
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def first_difference(ours: list[str], theirs: list[str]) -> str:
    """Return the place where two traces part, with what stands around it; empty if they are equal."""
    for index in range(max(len(ours), len(theirs))):
        mine, yours = ours[index : index + 1], theirs[index : index + 1]
        if mine != yours:
            before = "".join(f"\n      both  {line}" for line in theirs[max(0, index - 4) : index])
            after_yours = "".join(f"\n  expected  {line}" for line in theirs[index : index + 6])
            after_mine = "".join(f"\n       got  {line}" for line in ours[index : index + 6])
            return f"the traces part at line {index}:{before}{after_yours}{after_mine}"
    return ""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_hook_is_called_in_the_recorded_order(name: str, kind: str, tmp_path: Path) -> None:
    trace = run_scenario(name, leyden, kind, tmp_path)
    difference = first_difference(calls(trace), calls(golden(name)[kind]))
    assert not difference, difference


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_hook_sees_the_recorded_state(name: str, kind: str, tmp_path: Path) -> None:
    switches: dict[str, Any] = {"semantics": "lightning"} if name in MEANINGS else {}
    difference = first_difference(run_scenario(name, leyden, kind, tmp_path, **switches), golden(name)[kind])
    assert not difference, difference


def test_there_is_one_golden_file_for_each_scenario() -> None:
    assert {path.stem for path in GOLDEN.glob("*.json")} - {"parity", "matrix", "lightning-2.6.6-resumed"} == set(
        SCENARIOS
    )


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="Lightning is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SCENARIOS)
def test_lightning_still_gives_the_golden_trace(name: str) -> None:
    import lightning.pytorch as L

    recorded = golden(name)
    for kind, trace in record(name, L).items():
        difference = first_difference(trace, recorded[kind])
        assert not difference, difference
