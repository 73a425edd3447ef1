# SPDX-License-Identifier: Apache-2.0
"""16-mixed and bf16-mixed: scaling, clipping what is unscaled (A1), and knowing a skipped step (A2)."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

from leyden.errors import MisconfigurationException
from leyden.precision import MixedPrecision

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "fused adam": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
}


@pytest.fixture
def precision():
    # the scaler works on a CPU as well, which lets these tests run anywhere
    return MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=1024.0, growth_interval=2))


@pytest.fixture
def module():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def backward(precision, module, factor=1.0):
    module.zero_grad()
    precision.backward(module(torch.ones(1, 4)).float().pow(2).sum() * factor)


def grads(module):
    return torch.cat([p.grad.flatten() for p in module.parameters()])


def test_names_are_checked():
    with pytest.raises(MisconfigurationException, match="'32-true'.*use '16-mixed' or 'bf16-mixed'"):
        MixedPrecision("32-true", "cpu")
    with pytest.raises(MisconfigurationException, match="Leave scaler out"):
        MixedPrecision("bf16-mixed", "cpu", GradScaler("cpu"))


@pytest.mark.parametrize(("name", "dtype"), [("16-mixed", torch.float16), ("bf16-mixed", torch.bfloat16)])
def test_autocast_nests(module, name, dtype):
    precision = MixedPrecision(name, "cpu", GradScaler("cpu") if name == "16-mixed" else None)
    with precision.forward_context():
        with precision.forward_context():
            assert module(torch.ones(1, 4)).dtype == dtype
        assert module(torch.ones(1, 4)).dtype == dtype
    assert module(torch.ones(1, 4)).dtype == torch.float32
    assert module.weight.dtype == torch.float32


def test_bf16_scales_nothing(module):
    precision = MixedPrecision("bf16-mixed", "cpu")
    loss = module(torch.ones(1, 4)).sum()
    assert precision.scale(loss) is loss
    assert precision.state_dict() == {}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    precision.unscale(optimizer)
    assert precision.optimizer_step(optimizer, lambda: 5) == 5
    assert precision.skipped_step is False


def test_unscale_is_done_once(precision, module):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(torch.ones(1, 4)).pow(2).sum().backward()
    expected = grads(module)
    backward(precision, module)
    assert torch.allclose(grads(module), expected * 1024)
    for _ in range(3):
        precision.unscale(optimizer)
        assert torch.allclose(grads(module), expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_A1_same_weights_as_without_scaling(precision, name, clip):
    torch.manual_seed(0)
    scaled, plain = nn.Linear(4, 3), nn.Linear(4, 3)
    plain.load_state_dict(scaled.state_dict())
    ours, theirs = OPTIMIZERS[name](scaled.parameters()), OPTIMIZERS[name](plain.parameters())
    for _ in range(5):
        backward(precision, scaled)
        norm = precision.clip(ours, clip)
        precision.optimizer_step(ours)
        assert not precision.skipped_step
        plain.zero_grad()
        plain(torch.ones(1, 4)).pow(2).sum().backward()
        if clip:
            expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), clip)
            assert torch.allclose(norm, expected)
            assert torch.linalg.vector_norm(grads(scaled)) <= clip * 1.0001
        theirs.step()
    assert torch.allclose(scaled.weight, plain.weight, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_A2_skipped_step_is_known(precision, module, name):
    optimizer = OPTIMIZERS[name](module.parameters())
    before = module.weight.clone()
    backward(precision, module, factor=float("inf"))
    precision.clip(optimizer, 1.0)
    precision.optimizer_step(optimizer)
    assert precision.skipped_step
    assert torch.equal(module.weight, before)
    backward(precision, module)
    assert precision.scaler.get_scale() == 512.0
    precision.optimizer_step(optimizer)
    assert not precision.skipped_step
    assert not torch.equal(module.weight, before)


def test_several_optimizers_on_one_loss(precision):
    """The scale may not change between the steps of two optimizers that share one backward pass."""
    torch.manual_seed(0)
    a, b = nn.Linear(4, 4), nn.Linear(4, 3)
    model = nn.Sequential(a, b)
    one, two = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (a, b))
    a.weight.register_hook(lambda g: g * float("inf"))
    start = b.weight.clone()
    backward(precision, model)
    expected = b.weight.grad / 1024
    precision.clip(one, 1e9, "value")
    precision.optimizer_step(one)
    assert precision.skipped_step
    precision.optimizer_step(two)
    assert not precision.skipped_step
    assert torch.allclose(b.weight, start - 0.1 * expected)


def test_two_steps_without_a_new_loss(precision, module):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    backward(precision, module)
    precision.optimizer_step(optimizer)
    precision.optimizer_step(optimizer)
    assert not precision.skipped_step


def test_step_without_gradients(precision, module):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    precision.unscale(optimizer)
    precision.optimizer_step(optimizer)
    assert not precision.skipped_step


def test_closure(precision, module):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    before = module.weight.clone()

    def closure():
        backward(precision, module)
        return 7

    assert precision.optimizer_step(optimizer, closure) == 7
    assert not torch.equal(module.weight, before)


def test_keywords_reach_the_optimizer(precision, module):
    seen = []

    class Keyword(torch.optim.SGD):
        def step(self, closure=None, *, note=None):
            seen.append(note)

    optimizer = Keyword(module.parameters(), lr=0.1)
    precision.optimizer_step(optimizer, note=1)
    backward(precision, module)
    precision.optimizer_step(optimizer, note=2)
    MixedPrecision("bf16-mixed", "cpu").optimizer_step(optimizer, note=3)
    assert seen == [1, 2, 3]


def test_lbfgs_is_refused(precision, module):
    with pytest.raises(MisconfigurationException, match="LBFGS.*bf16-mixed"):
        precision.optimizer_step(torch.optim.LBFGS(module.parameters()), lambda: None)


def test_state_holds_the_updated_scale(precision, module):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    backward(precision, module, factor=float("inf"))
    precision.optimizer_step(optimizer)
    state = precision.state_dict()
    assert state["scale"] == 512.0
    other = MixedPrecision("16-mixed", "cpu", GradScaler("cpu"))
    other.load_state_dict({})  # a checkpoint of another precision has none
    other.load_state_dict(state)
    assert other.scaler.get_scale() == 512.0


def test_no_hook_is_left_on_the_optimizer(precision, module):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    backward(precision, module)
    precision.optimizer_step(optimizer)
    assert not optimizer._optimizer_step_pre_hooks
