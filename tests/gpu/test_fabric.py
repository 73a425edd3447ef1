# SPDX-License-Identifier: Apache-2.0
"""Fabric on a GPU: the numbers of the loop by hand, scaled gradients, modules made on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from leyden import Fabric


def make_net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))


def samples() -> TensorDataset:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(7))
    return TensorDataset(x, x.sum(1, keepdim=True))


def loss_of(model: Any, batch: Any) -> Tensor:
    loss: Tensor = (model(batch[0]) - batch[1]).square().mean()
    return loss


def by_hand() -> list[Tensor]:
    net = make_net().cuda()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for batch in DataLoader(samples(), 8, shuffle=True):
        loss_of(net, [item.cuda() for item in batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return list(net.parameters())


@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp"])
def test_the_numbers_are_those_of_the_loop_by_hand(strategy: str) -> None:
    fabric = Fabric(accelerator="cuda", devices=1, strategy=strategy)
    fabric.launch()
    net = make_net()
    model, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters(), 0.01))
    assert model.device == fabric.device
    for batch in fabric.setup_dataloaders(DataLoader(samples(), 8, shuffle=True)):
        assert batch[0].device == fabric.device
        fabric.backward(loss_of(model, batch))
        optimizer.step()
        optimizer.zero_grad()
    for mine, theirs in zip(model.parameters(), by_hand(), strict=True):
        whole = mine.full_tensor() if hasattr(mine, "full_tensor") else mine
        torch.testing.assert_close(whole, theirs, rtol=0, atol=0 if strategy == "auto" else 1e-5)


def test_scaled_gradients_are_unscaled_steps_with_infinity_are_left_out_and_the_scale_is_kept(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cuda", devices=1, precision="16-mixed")
    net = make_net()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), 0.01))
    (batch,) = fabric.setup_dataloaders(DataLoader(samples(), 64))
    assert model(batch[0]).dtype == torch.float32
    with pytest.raises(RuntimeError, match=r"fabric.backward\(loss\)"):
        loss_of(model, batch).backward()
    optimizer.zero_grad()
    fabric.backward(loss_of(model, batch))
    norm = fabric.clip_gradients(model, optimizer, max_norm=1e9)
    loss_of(plain := make_net().cuda(), batch).backward()
    expected = torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None]).norm()
    torch.testing.assert_close(norm, expected, rtol=1e-2, atol=1e-3)
    optimizer.step()
    optimizer.zero_grad()
    before = net[0].weight.clone()
    fabric.backward(loss_of(model, batch) * float("inf"))
    optimizer.step()
    assert net[0].weight.equal(before)
    precision = fabric.strategy.precision
    fabric.save(tmp_path / "a.ckpt", {"precision": precision})
    scale = precision.state_dict()["scale"]
    other = Fabric(accelerator="cuda", devices=1, precision="16-mixed").strategy.precision
    fabric.load(tmp_path / "a.ckpt", {"precision": other})
    assert other.state_dict()["scale"] == scale == 2.0**15


def test_modules_and_tensors_are_made_on_the_device() -> None:
    fabric = Fabric(accelerator="cuda", devices=1, precision="bf16-true")
    with fabric.init_module():
        net = nn.Linear(3, 3)
    with fabric.init_tensor():
        tensor = torch.zeros(3)
    assert {net.weight.device, tensor.device, fabric.to_device(torch.ones(1)).device} == {fabric.device}
    assert net.weight.dtype == tensor.dtype == torch.bfloat16
