# SPDX-License-Identifier: Apache-2.0
"""Pruning: arguments that cannot be, what is pruned, and what is left on the model."""

from __future__ import annotations

import logging
from typing import Any

import numbers_script as script
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import leyden as L
from leyden.callbacks import ModelPruning
from leyden.errors import MisconfigurationException


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pruning_fn": "l1_unstructurd"}, "Did you mean"),
        ({"pruning_fn": prune.l1_unstructured}, "or a class derived"),
        ({"pruning_fn": prune.L1Unstructured, "use_global_unstructured": False}, "use_global_unstructured=True"),
        ({"pruning_fn": "ln_structured"}, "needs pruning_dim"),
        ({"pruning_fn": "ln_structured", "pruning_dim": 0}, "needs pruning_norm"),
        ({"pruning_fn": "random_structured", "pruning_dim": 0}, "Set it to False"),
        ({"parameter_names": ["wieght"]}, "parameter_names="),
        ({"amount": "half"}, "amount='half'"),
        ({"verbose": 3}, "verbose=3"),
    ],
)
def test_a_wrong_argument_is_named(arguments: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        ModelPruning(**{"pruning_fn": "l1_unstructured", **arguments})


def test_which_parameters_are_meant() -> None:
    model = script.build(L)
    found = ModelPruning.sanitize_parameters_to_prune(model, (), ["weight"])
    assert found == [(model.backbone[0], "weight"), (model.backbone[1], "weight"), (model.head, "weight")]
    assert ModelPruning.sanitize_parameters_to_prune(model, [(model.head, "bias")]) == [(model.head, "bias")]
    for wrong in ([(nn.Linear(1, 1), "weight")], [(model.head, "wieght")], ["weight"]):
        with pytest.raises(MisconfigurationException):
            ModelPruning.sanitize_parameters_to_prune(model, wrong)  # type: ignore[arg-type]


def fit(callback: Any, model: Any, **arguments: Any) -> L.Trainer:
    trainer = L.Trainer(
        **{"max_epochs": 2, **arguments}, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=callback,
    )  # fmt: skip
    trainer.fit(model, script.data(), script.data(8))
    return trainer


def test_a_fit_leaves_zeros_and_no_mask(caplog: pytest.LogCaptureFixture) -> None:
    model = script.build(L)
    caplog.set_level(logging.INFO)
    fit(ModelPruning("l1_unstructured", amount=0.5, verbose=2), model)
    assert sum(int((p == 0).sum()) for p in model.parameters()) >= 38
    assert not any("_mask" in name for name in model.state_dict())
    assert "Pruned: 0/51 (0.00%) ->" in caplog.text


def test_the_lottery_ticket_puts_first_values_back_each_time() -> None:
    """Here the training writes to the memory of no first value; under semantics="lightning" it does, as it does there."""
    for rules, same in (("leyden", True), ("lightning", False)):
        model = script.build(L, norm=False)
        first = model.head.weight.detach().clone()
        seen: list[torch.Tensor] = []

        class Notes(ModelPruning):
            def apply_lottery_ticket_hypothesis(self) -> None:
                super().apply_lottery_ticket_hypothesis()
                seen.append(self._parameters_to_prune[1][0].weight_orig.detach().clone())  # noqa: B023

        fit(Notes("l1_unstructured", amount=0.1), model, semantics=rules, max_epochs=3)
        assert len(seen) == 3
        assert torch.equal(seen[0], first)
        assert torch.equal(seen[2], first) is same
        seen.clear()
