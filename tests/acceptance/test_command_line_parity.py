# SPDX-License-Identifier: Apache-2.0
"""LightningCLI makes of a command line what Lightning 2.6.6 makes of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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
def ours(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the command lines make on Leyden, in a fresh process: jsonargparse looks at all classes that there are."""
    wanted = [
        item.callspec.params["name"]
        for item in request.session.items
        if item.path == Path(__file__) and "name" in getattr(getattr(item, "callspec", None), "params", ())
    ]
    folder = tmp_path_factory.mktemp("command_lines")
    script = [sys.executable, "-W", "ignore", "-m", "leyden", "run", str(HERE / "cli_scenarios.py")]
    given = {name: value for name, value in os.environ.items() if not name.startswith("PL_")}  # settings of other tests
    subprocess.run(
        [*script, str(folder / "made.json"), *wanted],
        cwd=folder,
        env=given,
        check=True,
        capture_output=True,
        timeout=110,
    )
    return json.loads((folder / "made.json").read_text())


def without_ours(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_ours(item) for key, item in value.items() if key not in OURS}
    return [without_ours(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in sorted(RECORDED)]
)
def test_a_command_line_makes_what_it_makes_on_lightning(name: str, ours: Any) -> None:
    made = without_ours(ours[name])
    theirs = dict(RECORDED[name])
    for key, (there, here) in DELIBERATE.get(name, {}).items():
        assert theirs[key] == there
        theirs[key] = here
    assert made == theirs


def test_all_command_lines_are_recorded() -> None:
    listed = re.findall(r'^    "([a-z ]+)": ', (HERE / "cli_scenarios.py").read_text(), flags=re.MULTILINE)
    assert set(RECORDED) <= set(listed)
    assert set(QUICK) <= set(RECORDED)
