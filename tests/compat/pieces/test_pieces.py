# SPDX-License-Identifier: Apache-2.0
"""The small things that Lightning has under names of its own."""

from __future__ import annotations

import pytest
import torch

from leyden.compat.pieces import GradClipAlgorithmType, LRSchedulerTypeTuple, grad_norm, move_data_to_device


def test_grad_norm_is_that_of_each_gradient_and_of_all() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Linear(1, 1))
    assert grad_norm(module, 2) == {}
    module[0].weight.grad, module[0].bias.grad = torch.tensor([[3.0, 4.0]]), torch.tensor([12.0])
    found = grad_norm(module, norm_type=2)
    assert {name: value.item() for name, value in found.items()} == {
        "grad_2.0_norm/0.weight": 5.0,
        "grad_2.0_norm/0.bias": 12.0,
        "grad_2.0_norm_total": 13.0,
    }
    assert grad_norm(module, "inf", group_separator=".")["grad_inf_norm.0.bias"] == 12.0
    assert grad_norm(module, 1)["grad_1.0_norm_total"] == 19.0


@pytest.mark.parametrize("p", [0, -1, float("nan")])
def test_grad_norm_needs_a_p_above_0(p: float) -> None:
    with pytest.raises(ValueError, match="must be more than 0"):
        grad_norm(torch.nn.Linear(1, 1), p)


@pytest.mark.parametrize("device", ["meta", torch.device("meta")])
def test_move_data_to_device_takes_the_device_in_words(device: str | torch.device) -> None:
    moved = move_data_to_device({"x": [torch.ones(1)], "name": "a"}, device)
    assert moved["x"][0].device.type == "meta"
    assert moved["name"] == "a"


def test_words_compare_as_those_of_lightning() -> None:
    assert GradClipAlgorithmType("norm") == "norm"
    assert GradClipAlgorithmType.supported_types() == ["value", "norm"]
    assert GradClipAlgorithmType.supported_type("value")
    assert not GradClipAlgorithmType.supported_type("none")
    scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.ones(1)], lr=1.0), 1)
    assert isinstance(scheduler, LRSchedulerTypeTuple)
