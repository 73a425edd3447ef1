# SPDX-License-Identifier: Apache-2.0
"""Scripts as people write them for Lightning 2.x and 1.x and for 2019 run unchanged, to the numbers that they gave there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from leyden.compat.check import check

HERE = Path(__file__).resolve().parent
RECORDED = json.loads((HERE / "recorded_with_lightning_2_6_6.json").read_text(encoding="utf-8"))
SCRIPTS = sorted((HERE / "scripts").glob("*.py"))


def run(name: str, folder: Path, *words: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "leyden", "run", str(HERE / "scripts" / f"{name}.py"), *words],
        cwd=folder, capture_output=True, text=True, check=False, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "name",
    [name if name in ("classifier", "gan") else pytest.param(name, marks=pytest.mark.slow) for name in RECORDED],
)
def test_a_script_gives_what_it_gave_on_lightning_2_6_6(name: str, tmp_path: Path) -> None:
    found = run(name, tmp_path)
    assert numbers(found) == pytest.approx(numbers(RECORDED[name]), rel=1e-6)
    assert words(found) == words(RECORDED[name])


def numbers(tree: Any) -> list[float]:
    """All numbers in a tree of dicts and lists, in order."""
    if isinstance(tree, dict):
        return [number for value in tree.values() for number in numbers(value)]
    if isinstance(tree, list):
        return [number for value in tree for number in numbers(value)]
    return [float(tree)] if isinstance(tree, (int, float)) else []


def words(tree: Any) -> Any:
    """The tree with all numbers that are not whole taken out."""
    if isinstance(tree, dict):
        return {name: words(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [words(value) for value in tree]
    return None if isinstance(tree, float) else tree


def test_a_script_of_1_x_trains_as_a_loop(tmp_path: Path) -> None:
    found = run("years_1", tmp_path)
    torch.manual_seed(7)
    batches = torch.randn(40, 2).split(8)
    layer = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for batch in [*batches, *batches]:
        loss = (layer(batch) - 1).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert found == {"loss": loss.item(), "rows": list(range(10)), "epochs": 2}


def test_a_script_of_2019_trains_as_a_loop(tmp_path: Path) -> None:
    options = "--max_nb_epochs 3 --early_stop_metric val_loss --model_save_monitor_value val_loss --model_save_monitor_mode min"
    found = run("year_2019", tmp_path, *options.split(), "-en", "mine")
    torch.manual_seed(8)
    first, second = torch.nn.Linear(2, 8), torch.nn.Linear(8, 1)
    x = torch.randn(64, 2)
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (first, second)]
    for number, batch in enumerate(x.split(16) * 3):
        loss = torch.nn.functional.mse_loss(second(torch.tanh(first(batch))), torch.ones(16, 1))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        if number == 10:  # val_check_interval was 0.95 then: ahead of the last of four batches
            scores = second(torch.tanh(first(x)))
    assert found["weight"] == first.weight.sum().item()
    assert found["loss"] == pytest.approx(torch.nn.functional.mse_loss(scores, torch.ones(64, 1)).item())
    assert (found["trained"], found["steps"], found["saved"]) == (1, 12, 1)
    assert {"media", "meta.experiment", "meta_tags.csv", "metrics.csv", "tf"} <= set(found["files"])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_check_finds_nothing_missing_in_a_script_that_runs(path: Path) -> None:
    report = check([path])
    assert report.missing == []
    assert report.uses >= 3
