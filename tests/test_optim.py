# SPDX-License-Identifier: Apache-2.0
"""Every form of ``configure_optimizers`` becomes one; every wrong form is an error that says what is right."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adam, Optimizer
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR, ReduceLROnPlateau, StepLR

from leyden.errors import MisconfigurationException
from leyden.optim import LightningOptimizer, NoOptimizer, is_optimizer, needs_closure, normalize


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2))]


def sgd(**more: Any) -> SGD:
    return SGD(parameters(), **{"lr": 0.1, **more})


def normal(returned: Any, **changes: Any) -> Any:
    """Call ``normalize`` as a plain fit does."""
    return normalize(returned, **{"automatic": True, "custom_step": False, "bare_scheduler": "step", **changes})


class Foreign:
    """Looks like an optimizer without being one of torch's."""

    def __init__(self) -> None:
        self.param_groups = [{"params": parameters(), "lr": 0.1}]
        self.state: dict[Any, Any] = {}

    def step(self, closure: Any = None) -> Any: ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None: ...


# ------------------------------------------------------------------ forms


def test_optimizers_alone() -> None:
    one, other = sgd(), Adam(parameters())
    assert normal(one) == ([one], [])
    assert normal([one]) == ([one], [])
    assert normal((one, other)) == ([one, other], [])
    assert normal([one, other]) == ([one, other], [])
    assert normal({"optimizer": one}) == ([one], [])
    assert normal([{"optimizer": one}, {"optimizer": other}]) == ([one, other], [])
    assert normal({"optimizer": one, "lr_scheduler": None}) == ([one], [])
    assert normal(([one], [])) == ([one], [])
    assert normal(([one], None)) == ([one], [])


@pytest.mark.parametrize(
    "shape", ["pair of lists", "bare second", "list of pairs", "dict", "dict of dict", "list of dicts"]
)
def test_a_scheduler_in_every_place(shape: str) -> None:
    optimizer = sgd()
    schedule = StepLR(optimizer, 1)
    returned: Any = {
        "pair of lists": ([optimizer], [schedule]),
        "bare second": ([optimizer], schedule),
        "list of pairs": [[optimizer], [schedule]],
        "dict": {"optimizer": optimizer, "lr_scheduler": schedule},
        "dict of dict": {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule}},
        "list of dicts": [{"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule}}],
    }[shape]
    optimizers, (found,) = normal(returned)
    assert optimizers == [optimizer]
    assert (found.scheduler, found.interval, found.frequency) == (schedule, "epoch", 1)
    assert (found.reduce_on_plateau, found.monitor, found.strict, found.name) == (False, None, True, None)


def test_all_keys_of_a_scheduler() -> None:
    optimizer = sgd()
    schedule = ReduceLROnPlateau(optimizer)
    given = {
        "scheduler": schedule, "interval": "step", "frequency": 3, "monitor": "loss", "strict": False, "name": "mine",
        "reduce_on_plateau": True,
    }  # fmt: skip
    _, (found,) = normal({"optimizer": optimizer, "lr_scheduler": given})
    assert vars(found) == given


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("in_list", [False, True])
def test_the_monitor_of_a_plateau_may_stand_beside_it(nested: bool, in_list: bool) -> None:
    optimizer = sgd()
    schedule = ReduceLROnPlateau(optimizer)
    given = {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": schedule} if nested else schedule,
        "monitor": "val_loss",
    }
    _, (found,) = normal([given] if in_list else given)
    assert (found.reduce_on_plateau, found.monitor) == (True, "val_loss")


def test_a_monitor_beside_another_schedule_is_no_matter() -> None:
    optimizer = sgd()
    given = {"optimizer": optimizer, "lr_scheduler": {"scheduler": StepLR(optimizer, 1)}, "monitor": "val_loss"}
    _, (found,) = normal(given, automatic=False)
    assert found.monitor is None


def test_one_schedule_for_each_optimizer() -> None:
    one, other = sgd(), sgd()
    first, second = StepLR(one, 1), ExponentialLR(other, 0.5)
    _, found = normal(([one, other], [first, {"scheduler": second, "interval": "step"}]))
    assert [(config.scheduler, config.interval) for config in found] == [(first, "epoch"), (second, "step")]


def test_an_optimizer_of_others_counts_by_its_verbs() -> None:
    foreign = Foreign()
    assert is_optimizer(foreign)
    assert normal(foreign) == ([foreign], [])
    assert not is_optimizer(SGD)
    assert not is_optimizer(StepLR(sgd(), 1))


@pytest.mark.parametrize(
    "returned",
    [5, "adam", SGD, [], (), [None], [5, 6], iter([]), nn.Linear(1, 1), {}],
    ids=lambda value: str(value)[:20],
)
def test_anything_else_lists_the_forms(returned: Any) -> None:
    with pytest.raises(MisconfigurationException, match="(?s)configure_optimizers.*an Optimizer; a list of them"):
        normal(returned)


def test_an_optimizer_beside_its_scheduler_is_described() -> None:
    optimizer = sgd()
    with pytest.raises(
        MisconfigurationException, match=r"a tuple of \(SGD, StepLR\).*\(\[optimizers\], \[schedulers\]\)"
    ):
        normal((optimizer, StepLR(optimizer, 1)))


def test_a_dict_without_optimizer() -> None:
    with (
        pytest.raises(MisconfigurationException, match="whose 'optimizer' is NoneType"),
        pytest.warns(RuntimeWarning, match="unknown key 'optimiser'.*'optimizer'"),
    ):
        normal({"optimiser": sgd()})


def test_an_unknown_key_is_a_warning_with_the_right_name() -> None:
    optimizer = sgd()
    with pytest.warns(RuntimeWarning, match="unsupported keys in the lr scheduler dict: 'intervall'.*'interval'"):
        normal({"optimizer": optimizer, "lr_scheduler": {"scheduler": StepLR(optimizer, 1), "intervall": "step"}})


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"interval": "stpe"}, MisconfigurationException, "must be \"step\" or \"epoch\"; it is 'stpe'.*'step'"),
        ({"interval": "batch"}, MisconfigurationException, "it is 'batch'"),
        ({"frequency": 0}, MisconfigurationException, "must be an int >= 1; it is 0"),
        ({"frequency": 1.5}, MisconfigurationException, "it is 1.5"),
        ({"scheduler": None}, MisconfigurationException, 'must have the key "scheduler"'),
        ({"scheduler": object()}, TypeError, "must have state_dict"),
        ({"scheduler": StepLR(sgd(), 1)}, MisconfigurationException, "belongs to an optimizer that"),
        ({"scheduler": nn.Linear(1, 1)}, MisconfigurationException, "override.*lr_scheduler_step"),
    ],
)
def test_a_wrong_schedule_says_what_is_right(changes: Any, error: type[Exception], match: str) -> None:
    optimizer = sgd()
    with pytest.raises(error, match=f"(?s){match}"):
        normal({"optimizer": optimizer, "lr_scheduler": {"scheduler": StepLR(optimizer, 1), **changes}})


def test_a_plateau_needs_a_monitor() -> None:
    optimizer = sgd()
    for returned in (
        {"optimizer": optimizer, "lr_scheduler": ReduceLROnPlateau(optimizer)},
        ([optimizer], [ReduceLROnPlateau(optimizer)]),
    ):
        with pytest.raises(
            MisconfigurationException,
            match="must include a monitor when a `ReduceLROnPlateau` scheduler is used.*'monitor'",
        ):
            normal(returned)


def test_an_own_scheduler_step_allows_any_scheduler() -> None:
    optimizer = sgd()
    _, (found,) = normal(([optimizer], [nn.Linear(1, 1)]), custom_step=True)
    assert isinstance(found.scheduler, nn.Linear)


def test_manual_optimization_ignores_monitors_with_a_warning() -> None:
    optimizer = sgd()
    given = {"scheduler": ReduceLROnPlateau(optimizer), "monitor": "loss"}
    with pytest.warns(RuntimeWarning, match="'monitor'.*mean nothing under manual optimization"):
        _, (found,) = normal(([optimizer], [given]), automatic=False)
    assert found.monitor is None


@pytest.mark.parametrize(("bare", "interval"), [("step", "step"), ("epoch", "epoch")])
@pytest.mark.filterwarnings("ignore:OneCycleLR plans 10 steps but")
def test_a_bare_schedule_that_knows_its_total(bare: str, interval: str) -> None:
    optimizer = sgd()
    _, (found,) = normal(([optimizer], [OneCycleLR(optimizer, 1.0, total_steps=10)]), bare_scheduler=bare)
    assert found.interval == interval


# ------------------------------------------------------------------ closures


def test_who_needs_a_closure() -> None:
    class Own(SGD):
        def step(self, closure: Any = None) -> Any: ...

    class Without(SGD):
        def step(self) -> Any: ...  # type: ignore[override]

    assert needs_closure(LBFGS(parameters()))
    assert needs_closure(Own(parameters(), lr=0.1))
    assert needs_closure(Foreign())  # type: ignore[arg-type]
    assert not needs_closure(sgd())
    assert not needs_closure(Adam(parameters(), fused=True))
    assert not needs_closure(Without(parameters(), lr=0.1))
    assert not needs_closure(NoOptimizer())


def test_no_optimizer_has_every_verb() -> None:
    nothing = NoOptimizer()
    nothing.zero_grad()
    assert nothing.step() is None
    assert nothing.step(lambda: 3) == 3
    nothing.load_state_dict(nothing.state_dict())
    assert isinstance(nothing, Optimizer)


# ------------------------------------------------------------------ the wrapper


def wrapped(optimizer: Any = None, peers: Any = ()) -> tuple[LightningOptimizer, list[Any]]:
    """Return a wrapped optimizer and the list of its steps."""
    steps: list[Any] = []

    def step(inner: Any, closure: Any = None, **kwargs: Any) -> Any:
        steps.append((inner, closure, kwargs))
        return inner.step(closure)

    return LightningOptimizer(optimizer or sgd(), step, peers), steps


def test_the_wrapper_passes_for_the_optimizer() -> None:
    wrapper, _ = wrapped()
    assert isinstance(wrapper, SGD)
    assert isinstance(wrapper, Optimizer)
    assert isinstance(wrapper, LightningOptimizer)
    assert not isinstance(wrapper, Adam)
    assert type(wrapper) is LightningOptimizer
    assert wrapper.param_groups is wrapper.optimizer.param_groups
    assert "LightningOptimizer(SGD" in repr(wrapper)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        wrapper.nothing_like_it


def test_state_goes_through_the_wrapper() -> None:
    wrapper, _ = wrapped(sgd(momentum=0.9))
    wrapper.param_groups[0]["params"][0].grad = torch.ones(2)
    wrapper.step()
    other, _ = wrapped(sgd(momentum=0.9))
    other.load_state_dict(wrapper.state_dict())
    assert torch.equal(next(iter(other.optimizer.state.values()))["momentum_buffer"], torch.ones(2))
    wrapper.own = 5
    assert wrapper.optimizer.own == 5  # type: ignore[attr-defined]


def test_step_hands_over_closure_and_arguments() -> None:
    wrapper, steps = wrapped()
    closure = lambda: torch.tensor(2.0)  # noqa: E731
    assert float(wrapper.step(closure, more=1)) == 2.0
    assert steps == [(wrapper.optimizer, closure, {"more": 1})]
    with pytest.raises(MisconfigurationException, match="closure=3.*must be callable"):
        wrapper.step(3)  # type: ignore[arg-type]


def test_a_schedule_on_the_wrapper_steps_once() -> None:
    wrapper, steps = wrapped()
    schedule = StepLR(wrapper, 1, gamma=0.5)  # type: ignore[arg-type]
    wrapper.step()
    schedule.step()  # torch warns here when it has not seen the step
    assert len(steps) == 1
    assert wrapper.param_groups[0]["lr"] == 0.05


def test_after_its_release_the_wrapper_steps_by_itself() -> None:
    wrapper, steps = wrapped()
    wrapper.release()
    wrapper.param_groups[0]["params"][0].grad = torch.ones(2)
    wrapper.step()
    assert float(wrapper.step(lambda: torch.tensor(7.0))) == 7.0
    assert steps == []
    assert wrapper.param_groups[0]["params"][0].tolist() == pytest.approx([0.8, 0.8])


def test_a_copy_has_parameters_of_its_own() -> None:
    wrapper, _ = wrapped()
    wrapper.release()
    copied = copy.deepcopy(wrapper)
    copied.param_groups[0]["lr"] = 7.0
    assert wrapper.param_groups[0]["lr"] == 0.1


def test_toggle_model_freezes_the_others() -> None:
    one, other = sgd(), sgd()
    frozen = other.param_groups[0]["params"][0]
    own = one.param_groups[0]["params"][0]
    wrapper, _ = wrapped(one, [one, other])
    with wrapper.toggle_model():
        assert (own.requires_grad, frozen.requires_grad) == (True, False)
    assert frozen.requires_grad
    frozen.requires_grad = False
    with pytest.raises(ValueError), wrapper.toggle_model():
        raise ValueError
    assert not frozen.requires_grad
