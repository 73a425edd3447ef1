# SPDX-License-Identifier: Apache-2.0
"""What strategies share whose parameters are DTensors: one norm over any mesh, whole and spread states, a plain module."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from leyden.progress import Progress
from leyden.signals import Interrupt
from leyden.strategies import mesh
from leyden.strategies.mesh import MeshStrategy
from ranks import on_ranks

SHAPES = [(5, 3), (4, 4), (3,), (7, 2), (1, 6)]


class Spread(MeshStrategy):
    """Two dimensions, and parameters spread over one of them, both, or none."""

    def mesh_shape(self) -> dict[str, int]:
        return {"data_parallel": 2, "tensor_parallel": 2}

    def spread(self, module: nn.Module, fitting: bool) -> None:
        ways: list[Any] = [[Shard(0), Replicate()], [Replicate(), Shard(1)], None, [Shard(0), Shard(1)], [Shard(1)] * 2]
        flat = init_device_mesh("cpu", (4,))
        for (name, parameter), way in zip(list(module.named_parameters()), ways, strict=True):
            on = flat if name == "p0" else self.device_mesh
            if way is not None:
                spread = distribute_tensor(parameter.detach(), on, way[: on.ndim])
                setattr(module, name, nn.Parameter(spread))


def plain() -> nn.Module:
    generator = torch.Generator().manual_seed(4)
    module = nn.Module()
    for index, shape in enumerate(SHAPES):
        setattr(module, f"p{index}", nn.Parameter(torch.randn(shape, generator=generator)))
    module.register_buffer("count", torch.arange(3.0))
    return module


def prepared() -> tuple[Any, nn.Module, list[torch.Tensor]]:
    strategy, module = Spread([torch.device("cpu")] * 4), plain()
    strategy.assign([torch.device("cpu")] * 4, 1)
    strategy.launch(Interrupt(), Progress())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += strategy.global_rank  # those of rank 0 count
    strategy.connect(module)
    strategy.setup()
    strategy.distribute(True)
    generator = torch.Generator().manual_seed(5)
    grads = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return strategy, module, grads


def give(module: nn.Module, grads: list[torch.Tensor]) -> None:
    for parameter, gradient in zip(module.parameters(), grads, strict=True):
        if isinstance(parameter, DTensor):
            parameter.grad = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        else:
            parameter.grad = gradient.clone()


def clip() -> Any:
    strategy, module, grads = prepared()
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    found = []
    for value, algorithm in ((0.5, "norm"), (1e9, "norm"), (0.3, "value")):
        give(module, grads)
        norm = strategy.clip_gradients(optimizer, value, algorithm)
        assert norm is None or type(norm) is torch.Tensor
        found.append((None if norm is None else norm.item(), strategy.whole([p.grad for p in module.parameters()])))
    partial = DTensor.from_local(torch.full((2, 2), 0.25), init_device_mesh("cpu", (4,)), [Partial()])
    found.append(strategy.total_norm([partial]).item())
    give(module, grads)
    strategy.scale_gradients(optimizer, torch.tensor(2.0))
    found.append(strategy.whole([p.grad for p in module.parameters()]))
    roles = strategy.data_rank, strategy.data_size, tuple(strategy.device_mesh.mesh_dim_names)
    strategy.land()
    return strategy.global_rank, roles, found


def test_f2_the_norm_of_any_mixture_is_that_of_one_process() -> None:
    generator = torch.Generator().manual_seed(5)
    grads = [torch.randn(shape, generator=generator) for shape in SHAPES]
    expected = torch.cat([gradient.reshape(-1) for gradient in grads]).norm()
    for rank, roles, (first, second, third, partial, scaled) in on_ranks(4, clip):
        assert roles == (rank // 2, 2, ("data_parallel", "tensor_parallel"))
        assert first[0] == pytest.approx(expected.item(), rel=1e-6)
        assert second[0] == pytest.approx(expected.item(), rel=1e-6)
        assert third[0] is None
        assert partial == pytest.approx(2.0)
        if rank == 0:
            for index, gradient in enumerate(grads):
                assert torch.allclose(first[1][index], gradient * 0.5 / expected, atol=1e-6)
                assert torch.equal(second[1][index], gradient)
                assert torch.equal(third[1][index], gradient.clamp(-0.3, 0.3))
                assert torch.equal(scaled[index], gradient * 2)
        else:
            assert [value.is_meta for value in scaled] == [True, True, False, True, True]


def states() -> Any:
    strategy, module, grads = prepared()
    optimizer = torch.optim.Adam(module.parameters(), 0.1)
    give(module, grads)
    optimizer.step()
    weights, moments = strategy.module_state_dict(), strategy.optimizer_state(optimizer)
    own = strategy.own_module_state()
    assert isinstance(own["p0"], DTensor)
    box = [copy.deepcopy((weights, moments)) if strategy.is_global_zero else None]
    torch.distributed.broadcast_object_list(box, 0)
    whole_weights, whole_moments = box[0]
    again = torch.optim.Adam(module.parameters(), 0.3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    strategy.load_module_state_dict(whole_weights, True, "it")
    strategy.load_optimizer_state(again, whole_moments)
    for one, two in zip(optimizer.state.values(), again.state.values(), strict=True):
        assert type(one["exp_avg"]) is type(two["exp_avg"])
        assert torch.equal(mesh.local(one["exp_avg"]), mesh.local(two["exp_avg"]))
        assert one["step"] == two["step"]
    left = strategy.gradients()
    for parameter in module.parameters():
        parameter.grad = None
    strategy.load_gradients(left)
    assert len(strategy.gradients()) == len(SHAPES)
    moved = strategy.at_home(optimizer.state[module.p1]["exp_avg"])
    assert torch.equal(moved.full_tensor(), optimizer.state[module.p1]["exp_avg"].full_tensor())
    strategy.teardown()
    strategy.land()
    return whole_weights, whole_moments, {name: value.detach() for name, value in module.state_dict().items()}


def test_f3_states_are_whole_and_plain_and_come_back() -> None:
    module = plain()
    generator = torch.Generator().manual_seed(5)
    for parameter, shape in zip(module.parameters(), SHAPES, strict=True):
        parameter.grad = torch.randn(shape, generator=generator)
    optimizer = torch.optim.Adam(module.parameters(), 0.1)
    optimizer.step()
    for weights, moments, after in on_ranks(4, states):
        assert list(weights) == list(after) == list(module.state_dict())
        for name, value in module.state_dict().items():
            assert type(after[name]) is torch.Tensor
            assert torch.allclose(weights[name], value)
            assert torch.allclose(after[name], value)
        for index, state in optimizer.state_dict()["state"].items():
            assert torch.allclose(moments["state"][index]["exp_avg"], state["exp_avg"])


def test_a_mesh_that_does_not_say_how_is_no_strategy() -> None:
    with pytest.raises(NotImplementedError, match="does not say how"):
        MeshStrategy().spread(nn.Linear(1, 1), True)
