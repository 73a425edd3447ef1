# SPDX-License-Identifier: Apache-2.0
"""The arguments of 2019 that ask for several devices reach the strategies of today."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import leyden as ptl
from leyden.vintage import translate

SCRIPT = Path(__file__).with_name("processes_script.py")


def test_f4_ddp_cpu_with_two_processes_really_trains_in_two(tmp_path: Path) -> None:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)], env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [rank["size"] for rank in ranks] == [2, 2]
    assert ranks[0]["weight"] == ranks[1]["weight"]
    assert sorted(ranks[0]["seen"] + ranks[1]["seen"]) == [4 * i / 64 for i in range(16)]


@pytest.mark.parametrize(
    ("old", "nodes", "expected"),
    [
        ({"gpus": 2}, 1, ("gpu", [0, 1], "dp")),
        ({"gpus": [0, 1], "distributed_backend": "ddp"}, 1, ("gpu", [0, 1], "ddp")),
        ({"gpus": -1, "distributed_backend": "ddp2"}, 1, ("gpu", [0, 1], "dp")),
        ({"gpus": 2, "distributed_backend": "ddp2", "nb_gpu_nodes": 2}, 1, ("gpu", [0, 1], "ddp")),
        ({"gpus": 2, "distributed_backend": "dp"}, 2, ("gpu", [0, 1], "ddp")),
        ({"gpus": 1}, 1, ("gpu", [0], "auto")),
        ({"distributed_backend": "ddp_cpu", "num_processes": 2}, 1, ("cpu", 2, "ddp")),
        ({"num_processes": 3}, 1, ("cpu", 3, "ddp")),
        ({"distributed_backend": "ddp_cpu"}, 1, ("cpu", 1, "auto")),
    ],
)
def test_each_way_to_ask_for_devices_has_its_strategy(
    old: dict[str, Any], nodes: int, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    given: dict[str, Any] = {"accelerator": "auto", "devices": "auto", "strategy": "auto", "num_nodes": nodes}
    translate._devices(old, given)
    assert (given["accelerator"], given["devices"], given["strategy"]) == expected


def test_num_processes_alone_is_not_of_2019() -> None:
    with pytest.raises(TypeError, match="num_processes.*devices"):
        ptl.Trainer(num_processes=2)


def test_in_a_session_the_processes_are_those_of_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    given: dict[str, Any] = {"accelerator": "auto", "devices": "auto", "strategy": "auto", "num_nodes": 1}
    translate._devices({"num_processes": 2}, given)
    assert given["strategy"] == "ddp_notebook"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_module_of_2019_gets_the_outputs_of_a_whole_batch_under_dp(model: Any) -> None:
    outputs: dict[str, list[Any]] = {}
    weights = []
    for strategy, devices in (("single", 1), ("dp", 2)):
        torch.manual_seed(0)
        module = model()
        end = module.validation_end

        def keep(found: list[Any], strategy: str = strategy, end: Any = end) -> Any:
            outputs[strategy] = found
            return end(found)

        module.validation_end = keep
        trainer = ptl.Trainer(
            max_nb_epochs=1, accelerator="cpu", strategy=strategy, devices=devices, progress_bar=False, logger=False,
            checkpoint_callback=False, print_weights_summary=False,
        )  # fmt: skip
        trainer.fit(module)
        weights.append(module.layer.weight.detach())
        assert "tng_loss" in trainer.callback_metrics
    assert torch.allclose(weights[0], weights[1], atol=1e-5)
    mine, theirs = ([float(x["val_loss"]) for x in outputs[name]] for name in ("single", "dp"))
    assert mine == pytest.approx(theirs, abs=1e-5)
