# SPDX-License-Identifier: Apache-2.0
"""LightningCLI makes of a command line what Lightning 2.6.6 makes of it."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from leyden import compat

HERE = Path(__file__).parent
RECORDED = json.loads((HERE / "recorded" / "lightning-2.6.6-command-line.json").read_text())
OURS = {
    "keep_global_batch",
    "semantics",
    "compile",
    "cuda_graphs",
    "fused_optimizers",
    "fast_data",
    "num_workers",
    "gather",
}
"""Arguments of Trainer and its methods that Lightning has not."""
DELIBERATE = {
    # one batch is asked for. There, an accident of typing's cache reads 1 as 1.0, which is the whole epoch
    "config of a group": {"step": (6, 3)},
}
QUICK = (
    "fit", "data", "configs", "config of a subcommand", "classes in a config", "injected", "callbacks appended", "links",
    "plateau by name", "own subcommand", "environment", "print what is set", "saved", "unknown key", "config of a group",
)  # fmt: skip


@pytest.fixture(scope="module")
def scenarios() -> Iterator[Any]:
    """The module of command lines, which imports Lightning's names, answered by Leyden."""
    with compat.installed():
        spec = importlib.util.spec_from_file_location("cli_scenarios", HERE / "cli_scenarios.py")
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules["cli_scenarios"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
        del sys.modules["cli_scenarios"]


def without_ours(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_ours(item) for key, item in value.items() if key not in OURS}
    return [without_ours(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in sorted(RECORDED)]
)
@pytest.mark.filterwarnings("ignore")
def test_a_command_line_makes_what_it_makes_on_lightning(name: str, scenarios: Any) -> None:
    ours = without_ours(json.loads(json.dumps(scenarios.run(name))))
    theirs = dict(RECORDED[name])
    for key, (there, here) in DELIBERATE.get(name, {}).items():
        assert theirs[key] == there
        theirs[key] = here
    assert ours == theirs


def test_all_command_lines_are_recorded(scenarios: Any) -> None:
    assert set(scenarios.SCENARIOS) == set(RECORDED)
    assert set(QUICK) <= set(RECORDED)
