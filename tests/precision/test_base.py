# SPDX-License-Identifier: Apache-2.0
"""The verbs of a precision, in 32 bits; and clipping, which all share."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from leyden.errors import MisconfigurationException
from leyden.precision import Precision
from leyden.precision.base import DefaultDtype


@pytest.fixture
def module():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def grad_norm(module):
    return torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in module.parameters()])).item()


def test_base_changes_nothing(module):
    precision = Precision()
    batch = {"x": torch.ones(2, dtype=torch.float64)}
    assert precision.convert_module(module) is module
    assert precision.convert_input(batch) is batch
    assert precision.convert_output(batch) is batch
    with precision.forward_context(), precision.forward_context(), precision.init_context():
        assert torch.ones(1).dtype == torch.float32
    assert precision.state_dict() == {}
    precision.load_state_dict({})
    assert precision.skipped_step is False


def test_one_context_serves_all_batches():
    precision = Precision()
    assert precision.forward_context() is precision.forward_context()


def test_backward_passes_its_arguments(module):
    precision = Precision()
    loss = module(torch.ones(1, 4)).sum()
    precision.backward(loss, retain_graph=True)
    first = grad_norm(module)
    precision.backward(loss, torch.tensor(2.0))
    assert grad_norm(module) == pytest.approx(3 * first)


def test_optimizer_step_with_and_without_closure(module):
    precision = Precision()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    before = module.weight.clone()
    assert precision.optimizer_step(optimizer) is None  # no gradients yet
    assert torch.equal(before, module.weight)

    def closure():
        loss = module(torch.ones(1, 4)).pow(2).sum()
        precision.backward(loss)
        return loss

    assert precision.optimizer_step(optimizer, closure) > 0
    assert not torch.equal(before, module.weight)


def names_seen_by_a_profiler(work):
    with torch.profiler.profile() as profile:
        work()
    return {event.name for event in profile.events()}


def test_nobody_who_listens_to_an_optimizer_misses_a_step(module, monkeypatch):
    """The short way to ``step`` is taken only where there are no hooks, no profiler, and no other ``step``."""
    module(torch.ones(1, 4)).sum().backward()
    optimizer, heard = torch.optim.SGD(module.parameters(), lr=0.1), []
    step = Precision().optimizer_step
    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd.profiler, "record_function", None)  # the short way does not come by it
        step(optimizer)
    for register in (optimizer.register_step_pre_hook, optimizer.register_step_post_hook,
                     register_optimizer_step_pre_hook,
                     register_optimizer_step_post_hook):  # fmt: skip
        handle = register(lambda *_: heard.append(1))
        step(optimizer)
        handle.remove()
    assert len(heard) == 4
    assert "Optimizer.step#SGD.step" in names_seen_by_a_profiler(lambda: step(optimizer))

    usual = torch.optim.SGD.step

    @functools.wraps(usual)
    def watched(self, closure=None):
        heard.append(2)
        return usual(self, closure)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", watched)  # as others' instruments do
        step(optimizer)
    optimizer.step = lambda: heard.append(3)  # as a schedule does, to count
    step(optimizer)
    assert heard[4:] == [2, 3]


def test_the_short_way_is_the_same_step(module):
    other = copy.deepcopy(module)
    ours, theirs = (torch.optim.AdamW(m.parameters(), lr=0.1, amsgrad=True) for m in (module, other))
    for _ in range(3):
        for each in (module, other):
            each(torch.ones(1, 4)).pow(2).sum().backward()
        Precision().optimizer_step(ours)
        theirs.step()
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("as_optimizer", [True, False])
def test_clip_by_norm_returns_the_norm_before(module, as_optimizer):
    (module(torch.ones(1, 4)).sum() * 100).backward()
    before = grad_norm(module)
    target = torch.optim.SGD(module.parameters(), lr=0.1) if as_optimizer else module.parameters()
    norm = Precision().clip(target, 0.5)
    assert norm.item() == pytest.approx(before)
    assert grad_norm(module) == pytest.approx(0.5, rel=1e-4)


def test_clip_by_value(module):
    (module(torch.ones(1, 4)).sum() * 100).backward()
    assert Precision().clip(module.parameters(), 0.5, "value") is None
    assert all(p.grad.abs().max().item() == 0.5 for p in module.parameters())


@pytest.mark.parametrize("value", [None, 0, 0.0, -1])
def test_clip_switched_off(module, value):
    (module(torch.ones(1, 4)).sum() * 100).backward()
    before = grad_norm(module)
    assert Precision().clip(module.parameters(), value) is None
    assert grad_norm(module) == before


def test_clip_unknown_algorithm(module):
    with pytest.raises(
        MisconfigurationException, match="gradient_clip_algorithm='norms' is unknown.*Did you mean 'norm'"
    ):
        Precision().clip(module.parameters(), 1.0, "norms")


def test_default_dtype_nests_and_survives_exceptions():
    context = DefaultDtype(torch.float64)
    with context:
        with pytest.raises(ZeroDivisionError), DefaultDtype(torch.float16), context:
            assert torch.ones(1).dtype == torch.float64
            1 / 0
        assert torch.get_default_dtype() == torch.float64
    assert torch.get_default_dtype() == torch.float32
