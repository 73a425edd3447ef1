# SPDX-License-Identifier: Apache-2.0
"""Several processes work on one batch, and give the numbers of one: layers split by columns and rows, alone and sharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

import leyden as L
from leyden.errors import MisconfigurationException
from leyden.strategies import TensorParallelStrategy
from ranks import make_trainer, on_ranks
from tensor_models import GPT, Llama, Perceptron, numbers, texts, whole

PLAN = {"net.0": "colwise", "net.3": "rowwise", "head": "rowwise_split", "norm": "replicate"}
CASES: dict[str, tuple[Any, Any, Any]] = {
    "perceptron": (Perceptron, numbers, None),
    "gpt": (GPT, texts, None),
    "llama": (Llama, texts, None),
    "plan": (Perceptron, numbers, PLAN),
}


def _train(case: str, devices: int, size: int, **options: Any) -> dict[str, Any]:
    kind, data, plan = CASES[case]
    L.seed_everything(11, verbose=False)
    module = kind(**options.pop("module", {}))
    strategy = TensorParallelStrategy(plan, size) if devices > 1 else "auto"
    trainer = make_trainer(devices, strategy=strategy, max_epochs=4, log_every_n_steps=1, **options)
    batch = 8 // (devices // size)
    trainer.fit(module, DataLoader(data(40), batch, shuffle=True), DataLoader(data(13), 3))
    assert not any(isinstance(p, DTensor) for p in module.parameters())
    assert all(p.device.type == "cpu" for p in module.parameters())
    return {
        "losses": module.losses, "norms": module.norms, "samples": module.samples,
        "rows": [dict(row) for row in trainer.history], "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
        "weights": {name: p.detach().clone() for name, p in module.named_parameters()},
        "plan": dict(getattr(trainer.strategy, "plan", {})), "evaluated": sorted(module.evaluated),
    }  # fmt: skip


def _same(one: dict[str, Any], ranks: list[dict[str, Any]], size: int) -> None:
    """All ranks together have done what one process did."""
    groups = [ranks[first : first + size] for first in range(0, len(ranks), size)]
    for number in range(20):
        together = sum((group[0]["samples"][number] for group in groups), [])
        assert sorted(together) == sorted(one["samples"][number])  # the same global batches
        mean = sum(group[0]["losses"][number] for group in groups) / len(groups)
        assert mean == pytest.approx(one["losses"][number], abs=1e-5)  # F1
    for group in groups:
        for rank in group:
            assert rank["samples"] == group[0]["samples"]
            assert rank["losses"] == group[0]["losses"]
            assert rank["evaluated"] == group[0]["evaluated"]
    evaluated = sorted(sum((group[0]["evaluated"] for group in groups), []))
    assert evaluated == one["evaluated"]  # U1
    for rank in ranks:
        assert rank["norms"] == pytest.approx(one["norms"], abs=1e-5, rel=1e-4)  # F2
        assert rank["metrics"] == pytest.approx(one["metrics"], abs=1e-5)  # M1
        assert rank["metrics"]["count"] == 13
        assert rank["metrics"]["seen"] == 40
        for row, theirs in zip(one["rows"], rank["rows"], strict=True):
            assert theirs == pytest.approx(row, abs=1e-5)
        for name, weight in rank["weights"].items():
            assert torch.allclose(weight, one["weights"][name], atol=1e-5), name
            assert torch.equal(weight, ranks[0]["weights"][name]), name


@pytest.mark.parametrize("case", CASES)
def test_f1_f2_u1_m1_two_processes_on_one_batch_give_the_numbers_of_one(case: str) -> None:
    options: dict[str, Any] = {"gradient_clip_val": 0.5}
    _same(_train(case, 1, 1, **options), on_ranks(2, lambda: _train(case, 2, 2, **options)), 2)


@pytest.mark.parametrize("case", ["perceptron", "gpt"])
def test_f1_f2_u1_m1_groups_of_two_share_out_the_data_and_the_parameters(case: str) -> None:
    options: dict[str, Any] = {"gradient_clip_val": 0.5}
    _same(_train(case, 1, 1, **options), on_ranks(4, lambda: _train(case, 4, 2, **options)), 2)
