# SPDX-License-Identifier: Apache-2.0
"""Checkpoints cross over: a run of Lightning goes on here, and ours there, as if it had not been interrupted.

Lightning's checkpoints and figures are in ``recorded/lightning-2.6.6-crossing.zip``, which ``crossing_script.py`` wrote.
Where Lightning is installed it goes on from ours too; elsewhere ours must have in them what its own have.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from crossing_script import CASES, MOMENTS, fit
from leyden import files
from leyden.errors import CheckpointError

HERE = Path(__file__).parent

pytestmark = pytest.mark.filterwarnings("ignore")

OPEN_WINDOW = "accumulate/inside"
"""Lightning's layout has no place for gradients of an open window: neither side's file gives them to Lightning, nor to us."""
QUICK = ("manual", "callbacks", "float16_with_a_scaler", "data_module")


def slow(case: str, name: str) -> Any:
    return pytest.param(name, marks=[] if case in QUICK else [pytest.mark.slow])


EVERY = [slow(case, case) for case in CASES]
THEIRS = [
    slow(case, f"{case}/{moment}")
    for case in CASES
    for moment in MOMENTS
    if (case, moment) != ("several_checks", "inside")  # it does not validate inside an epoch
]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theirs")
    with zipfile.ZipFile(HERE / "recorded" / "lightning-2.6.6-crossing.zip") as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the whole runs of Leyden leave what they do."""
    return tmp_path_factory.mktemp("ours")


def whole(folder: Path, case: str) -> Path:
    """Return ``folder`` once the whole run of ``case`` has left its checkpoints and figures there."""
    if not (folder / case).exists():
        (folder / case).mkdir()
        (folder / case / "figures.json").write_text(json.dumps(fit("leyden", case, folder / case)), encoding="utf-8")
    return folder


def tail(figures: dict[str, Any], moment: str) -> dict[str, Any]:
    """Return what a run that goes on from ``moment`` has yet to do."""
    rows = {}
    for at, row in figures["rows"].items():
        if at[0].isdigit() and tuple(map(int, at.split("/")[:2])) >= MOMENTS[moment]:
            rows[at] = row
    return {**figures, "rows": rows}


def differences(mine: Any, yours: Any, where: str = "") -> Iterator[str]:
    """Say where two values part; floats, in hexadecimal or not, may differ as those of two machines do."""
    if isinstance(mine, dict) and isinstance(yours, dict):
        for key in [*mine, *(key for key in yours if key not in mine)]:
            if key not in mine or key not in yours:
                yield f"{where}/{key}: only {'mine' if key in mine else 'yours'}"
            else:
                yield from differences(mine[key], yours[key], f"{where}/{key}")
    elif isinstance(mine, (list, tuple)) and type(mine) is type(yours) and len(mine) == len(yours):
        for index, pair in enumerate(zip(mine, yours, strict=True)):
            yield from differences(*pair, f"{where}/{index}")
    elif isinstance(mine, torch.Tensor) and isinstance(yours, torch.Tensor):
        if mine.dtype != yours.dtype or mine.shape != yours.shape or not torch.allclose(mine, yours, 1e-3, 1e-4):
            yield f"{where}: {mine} is not {yours}"
    elif type(mine) is not type(yours):
        yield f"{where}: {mine!r} is not {yours!r}"
    elif number(mine) is not None and number(yours) is not None:
        if number(mine) != pytest.approx(number(yours), rel=1e-3, abs=1e-4):
            yield f"{where}: {mine!r} is not {yours!r}"
    elif mine != yours:
        yield f"{where}: {mine!r} is not {yours!r}"


def number(value: Any) -> float | None:
    if isinstance(value, float):
        return value
    return float.fromhex(value) if isinstance(value, str) and "0x" in value[:3] else None


def figures_of(folder: Path, case: str) -> dict[str, Any]:
    return json.loads((folder / case / "figures.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", EVERY)
def test_whole_runs_are_alike(case: str, ours: Path, theirs: Path) -> None:
    assert not list(differences(figures_of(whole(ours, case), case), figures_of(theirs, case)))


@pytest.mark.parametrize("which", [each for each in THEIRS if OPEN_WINDOW not in each.values])
def test_a_run_of_lightning_goes_on_here(which: str, theirs: Path, tmp_path: Path) -> None:
    case, moment = which.split("/")
    result = fit("leyden", case, tmp_path, theirs / case / f"{moment}.ckpt")
    assert result["rows"].pop("mine") == 1  # its hook has seen what its hook put in
    if case == "data_module":
        assert result["rows"].pop("of the data module") == [1]
    expected = tail(figures_of(theirs, case), moment)
    if (
        case == "schedulers"
    ):  # their own resumed runs have 3 too: one that has a metric is not counted on when it is saved
        for each in (result, expected):
            del each["schedulers"][2]["last_epoch"]
    assert not list(differences(result, expected))


@pytest.mark.parametrize("which", THEIRS)
def test_our_checkpoints_hold_what_theirs_do(which: str, ours: Path, theirs: Path) -> None:
    case, moment = which.split("/")
    mine, yours = (
        files.load(folder / case / f"{moment}.ckpt", weights_only=False) for folder in (whole(ours, case), theirs)
    )
    assert mine.pop("leyden")["format"] == 1
    found = list(differences(comparable(mine), comparable(yours)))
    assert not found, "\n".join(found)


def comparable(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is of one run only, paths and times, and counters that no resume reads."""
    loops = {}
    for loop, parts in checkpoint["loops"].items():
        loops[loop] = {name: part for name, part in parts.items() if "val_loop" not in name and name != "state_dict"}
        for name in ("optimizer", "step", "optim_progress", "scheduler_progress", "optim_step_progress"):
            for key in [key for key in loops[loop] if key.endswith(name)]:
                loops[loop][key] = totals(loops[loop][key])
    callbacks = {}
    for key, state in checkpoint["callbacks"].items():
        if not key.startswith("Timer"):
            callbacks[key] = {
                name: value
                for name, value in state.items()
                if "path" not in name and name not in ("dirpath", "best_k_models", "run")
            }
    keys = {loop: sorted(parts) for loop, parts in checkpoint["loops"].items()}
    return {**checkpoint, "callbacks": callbacks, "loops": loops, "keys of loops": keys}


def totals(tracker: dict[str, Any]) -> dict[str, Any]:
    """Leave out how much of a count is of this epoch."""
    return {
        key: totals(value) if isinstance(value, dict) else value
        for key, value in tracker.items()
        if key not in ("current", "zero_grad")
    }


@pytest.mark.parametrize("case", ["plain", "manual"])
def test_weights_only_cannot_go_on(case: str, theirs: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds weights only"):
        fit("leyden", case, tmp_path, theirs / case / "weights.ckpt")


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="Lightning is not installed")
def test_our_runs_go_on_on_lightning(ours: Path) -> None:
    for case in CASES:
        whole(ours, case)
    command = [sys.executable, str(HERE / "crossing_script.py"), "lightning.pytorch", "resume", str(ours)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=110)
    assert done.returncode == 0, done.stderr
    results: Mapping[str, Any] = json.loads(done.stdout.splitlines()[-1])["result"]
    for which in (f"{case}/{moment}" for case in CASES for moment in MOMENTS):
        if which not in results:
            continue
        case, moment = which.split("/")
        result = results[which]
        result["rows"].pop("mine")
        result["rows"].pop("of the data module", None)
        expected = tail(figures_of(ours, case), moment)
        if which != OPEN_WINDOW:
            assert not list(differences({**result, "schedulers": 0}, {**expected, "schedulers": 0})), which
