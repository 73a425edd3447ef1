# SPDX-License-Identifier: Apache-2.0
"""An optimizer that steps on the parts of DTensors gives what it gives on whole tensors, and keeps its state as DTensors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from leyden.progress import Progress
from leyden.signals import Interrupt
from leyden.strategies.mesh import MeshStrategy
from leyden.strategies.parts import BY_ELEMENT, Parts, steps_by_parts
from ranks import on_ranks

SHAPES = [(5, 3), (1, 2), (), (4,)]
CASES: list[tuple[str, dict[str, Any]]] = [
    *((kind.__name__, {}) for kind in sorted(BY_ELEMENT, key=lambda kind: kind.__name__)),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("SGD", {"momentum": 0.9, "fused": True}),
    ("Adam", {"amsgrad": True, "weight_decay": 0.1}),
    ("AdamW", {"fused": True}),
    ("Adam", {"foreach": True}),
    ("RMSprop", {"momentum": 0.5, "centered": True}),
]


def values(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def alone(kind: str, options: dict[str, Any]) -> list[torch.Tensor]:
    parameters = [nn.Parameter(value) for value in values(0)]
    optimizer = getattr(torch.optim, kind)(parameters, lr=0.1, **options)
    for step in range(1, 5):
        for parameter, gradient in zip(parameters, values(step), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def spread() -> Any:
    strategy = MeshStrategy([torch.device("cpu")] * 2)
    strategy.assign([torch.device("cpu")] * 2, 1)
    strategy.launch(Interrupt(), Progress())
    on = init_device_mesh("cpu", (2,))
    ways: list[Any] = [[Shard(0)], [Shard(0)], None, [Replicate()]]

    def like(tensors: list[torch.Tensor]) -> list[Any]:
        return [t if way is None else distribute_tensor(t, on, way) for t, way in zip(tensors, ways, strict=True)]

    found = []
    for kind, options in CASES:
        parameters = [nn.Parameter(value) for value in like(values(0))]
        make = lambda parameters=parameters, kind=kind, options=options: getattr(torch.optim, kind)(  # noqa: E731
            parameters, lr=0.1, **options
        )
        optimizer = make()
        assert steps_by_parts(optimizer)
        for step in range(1, 5):
            for parameter, gradient in zip(parameters, like(values(step)), strict=True):
                parameter.grad = gradient
            if step == 2:
                parameters[3].grad = distribute_tensor(values(step)[3], on, [Shard(0)])  # spread in another way
            if step == 3:  # goes on from its own state
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = make()
                strategy.load_optimizer_state(optimizer, state)
            strategy.optimizer_step(optimizer)
        assert optimizer.param_groups[0]["params"] == parameters or all(
            one is two for one, two in zip(optimizer.param_groups[0]["params"], parameters, strict=True)
        )
        for parameter, each in optimizer.state.items():
            for name, value in each.items():
                spread_alike = isinstance(parameter, DTensor) and isinstance(value, torch.Tensor)
                if spread_alike and name != "step" and value.shape == parameter.shape:
                    assert isinstance(value, DTensor)
                    assert value.placements == parameter.placements
        found.append([p.full_tensor().detach() if isinstance(p, DTensor) else p.detach() for p in parameters])
    strategy.land()
    return found


def test_f1_every_optimizer_of_torch_that_goes_by_elements_steps_as_on_whole_tensors() -> None:
    for rank in on_ranks(2, spread):
        for (kind, options), mine in zip(CASES, rank, strict=True):
            for one, two in zip(mine, alone(kind, options), strict=True):
                assert torch.allclose(one, two, atol=1e-6), (kind, options)


def test_other_optimizers_and_hooks_that_look_on_get_what_torch_gives() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    assert not steps_by_parts(torch.optim.SGD([parameter]))
    assert not steps_by_parts(torch.optim.LBFGS([parameter]))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_optimizer_has_its_own_again_after_an_error(error: type[BaseException]) -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], momentum=0.9)
    state = optimizer.state
    with pytest.raises(error), Parts(optimizer).in_place():
        raise error
    assert optimizer.state is state
    assert optimizer.param_groups[0]["params"][0] is parameter
