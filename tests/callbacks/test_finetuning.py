# SPDX-License-Identifier: Apache-2.0
"""Freezing and thawing layers, and what an optimizer has of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import leyden as L
from leyden.callbacks import BackboneFinetuning, BaseFinetuning
from leyden.errors import MisconfigurationException


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()))


def test_leaves_and_parents_with_weights_of_their_own_are_found_once() -> None:
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.inner = nn.Linear(2, 2)

    parent, more = Parent(), layers()
    assert BaseFinetuning.flatten_modules(parent) == [parent, parent.inner]
    assert BaseFinetuning.flatten_modules([parent, [more]]) == [parent, parent.inner, more[0], more[1][0], more[1][1]]
    assert BaseFinetuning.flatten_modules(nn.ModuleDict({"a": more})) == [more[0], more[1][0], more[1][1]]
    assert len(list(BaseFinetuning.filter_params(parent))) == 3


@pytest.mark.parametrize("train_bn", [True, False])
def test_freezing_leaves_batch_norms_if_they_are_to_train(train_bn: bool) -> None:
    model = layers()
    BaseFinetuning.freeze(model, train_bn=train_bn)
    assert not any(p.requires_grad for p in model[0].parameters())
    assert all(p.requires_grad is train_bn for p in model[1].parameters())
    assert model[1][0].track_running_stats is train_bn
    assert len(list(BaseFinetuning.filter_params(model, train_bn=False, requires_grad=False))) == 2
    BaseFinetuning.make_trainable(model)
    assert all(p.requires_grad for p in model.parameters())
    assert model[1][0].track_running_stats


def test_what_is_thawed_gets_a_group_of_its_own() -> None:
    model = layers()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.2)
    BaseFinetuning.unfreeze_and_add_param_group(model[1], optimizer)
    BaseFinetuning.unfreeze_and_add_param_group(nn.Linear(2, 2), optimizer, lr=0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.02, 0.5]
    with pytest.warns(UserWarning, match="2 of the parameters to thaw are in a group"):
        BaseFinetuning.unfreeze_and_add_param_group(model[0], optimizer)
    assert len(optimizer.param_groups) == 3


def test_a_model_without_a_backbone_is_told_so() -> None:
    class Model(L.LightningModule):
        pass

    with pytest.raises(MisconfigurationException, match="no attribute `backbone`"):
        BackboneFinetuning().on_fit_start(None, Model())  # type: ignore[arg-type]


def test_both_methods_must_be_overridden() -> None:
    callback = BaseFinetuning()
    calls: list[Any] = [
        lambda: callback.freeze_before_training(None),
        lambda: callback.finetune_function(None, 0, None),
    ]  # type: ignore[arg-type]
    for call in calls:
        with pytest.raises(NotImplementedError, match="must override"):
            call()


def test_state_of_old_files_is_the_groups_alone() -> None:
    callback = BaseFinetuning()
    callback.load_state_dict({0: [{"params": ["a"], "lr": 0.1}]})  # type: ignore[dict-item]
    assert callback.state_dict() == {"internal_optimizer_metadata": {0: [{"params": ["a"], "lr": 0.1}]}}
