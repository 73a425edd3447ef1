# SPDX-License-Identifier: Apache-2.0
"""Spikes in a loss: what counts as one, and what is written down."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from leyden.callbacks.spike_detection import FabricSpikeDetection, RunningMean, SpikeDetection, TrainingSpikeException


def feed(callback: FabricSpikeDetection, *losses: float) -> int | None:
    """Return the batch with which the loss jumps; None if it does not."""
    strategy = SimpleNamespace(
        root_device=torch.device("cpu"), reduce_boolean_decision=lambda decision, all=True: decision
    )
    fabric = SimpleNamespace(strategy=strategy, global_rank=0)
    for batch, loss in enumerate(losses):
        try:
            callback.on_train_batch_end(fabric, torch.tensor(loss), None, batch)
        except TrainingSpikeException as error:
            return error.batch_idx
    return None


@pytest.mark.parametrize(
    ("arguments", "losses", "batch"),
    [
        ({}, (1.0, 1.1, 5.0), 2),
        ({}, (1.0, 1.1, 2.9), None),
        ({"atol": 10.0}, (1.0, 1.1, 5.0), None),
        ({"rtol": None, "atol": 0.5}, (1.0, 1.1, 1.9), 2),
        ({"warmup": 3}, (1.0, 1.1, 50.0), None),
        ({"mode": "max"}, (1.0, 1.1, 50.0), None),
        ({"mode": "max"}, (1.0, 1.1, -5.0), 2),
        ({}, (1.0, math.nan), 1),
        ({"finite_only": False}, (1.0, math.nan, 1.0), None),
        ({"window": 1}, (1.0, 1.0, 2.5, 7.0, 40.0), 4),
    ],
)
def test_what_counts_as_a_spike(arguments: Any, losses: Any, batch: int | None, tmp_path: Path) -> None:
    assert feed(FabricSpikeDetection(exclude_batches_path=tmp_path, **arguments), *losses) == batch
    if batch is not None:
        assert json.loads((tmp_path / "skip_batches.json").read_text()) == [batch - 1, batch]


def test_an_unknown_mode_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mode='mxa'"):
        feed(FabricSpikeDetection(mode="mxa", exclude_batches_path=tmp_path), 1.0, 2.0)  # type: ignore[arg-type]


def test_a_mean_of_the_newest_values_that_resumes() -> None:
    mean = RunningMean(2)
    assert mean.compute().isnan()
    for value in (1.0, 2.0, 4.0):
        mean.update(value)
    assert mean.compute() == 3.0
    again = RunningMean(5)
    again.load_state_dict(mean.state_dict())
    again.update(6.0)
    assert again.compute() == 5.0
    again.load_state_dict({})
    assert again.compute().isnan()


def test_a_step_without_a_loss_is_an_error() -> None:
    with pytest.raises(TypeError, match="returned NoneType"):
        SpikeDetection().on_train_batch_end(None, None, None, None, 0)  # type: ignore[arg-type]


def test_the_exception_travels_between_processes() -> None:
    assert pickle.loads(pickle.dumps(TrainingSpikeException(3))).batch_idx == 3
