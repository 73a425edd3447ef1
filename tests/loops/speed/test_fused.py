# SPDX-License-Identifier: Apache-2.0
"""Fused optimizers: the same but for rounding, in the place of the same object, and in no checkpoint."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.loops.speed.fused import fuse, is_dense, why_not
from leyden.precision.mixed import MixedPrecision

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": lambda p: Adam(p, 0.01),
    "amsgrad": lambda p: Adam(p, 0.01, amsgrad=True, weight_decay=0.1),
    "adamw": lambda p: AdamW(p, 0.01, weight_decay=0.1),
    "maximize": lambda p: AdamW(p, 0.001, maximize=True),
    "tensor lr": lambda p: Adam(p, torch.tensor(0.01)),
    "sgd": lambda p: SGD(p, 0.05),
    "momentum": lambda p: SGD(p, 0.05, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: SGD(p, 0.05, momentum=0.9, nesterov=True),
    "adagrad": lambda p: Adagrad(p, 0.05, lr_decay=0.01),
    "groups": lambda p: Adam([{"params": [each], "lr": 0.01 / n} for n, each in enumerate(p, 1)]),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Threads of tiny kernels wait for each other where others compute, too."""
    torch.set_num_threads(1)


class Net(L.LightningModule):
    """Two layers on random data; notes its losses."""

    def __init__(self, make: Callable[..., Any] = OPTIMIZERS["adam"], schedule: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
        self.make, self.schedule = make, schedule
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        return ([optimizer], [StepLR(optimizer, 1, gamma=0.7)]) if self.schedule else optimizer

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        data = TensorDataset(torch.randn(40, 8, generator=generator), torch.randn(40, 1, generator=generator))
        return DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(2))


def trainer(**settings: Any) -> L.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(**{"max_epochs": 2, "accelerator": "cpu", **quiet, **settings})


def trained(net: Net, **settings: Any) -> Any:
    """Return the weights after a fit, and the Trainer."""
    run = trainer(**settings)
    run.fit(net)
    return torch.cat([p.detach().flatten() for p in net.parameters()]), run


def is_fused(optimizer: Any) -> bool:
    return bool(optimizer.defaults["fused"]) and all(group["fused"] for group in optimizer.param_groups)


def step(optimizer: Optimizer, gradients: list[Tensor | None]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.clone()
    optimizer.step()


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "fused_optimizers" in record.getMessage()]


# ------------------------------------------------------------------ the same but for rounding


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_same_but_for_rounding(name: str) -> None:
    plain, _ = trained(Net(OPTIMIZERS[name], schedule=name != "tensor lr"))
    fused, run = trained(Net(OPTIMIZERS[name], schedule=name != "tensor lr"), fused_optimizers=True)
    assert is_fused(run.optimizers[0])
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)


def test_it_is_what_the_fused_optimizer_of_torch_does() -> None:
    ours, _ = trained(Net(), fused_optimizers=True)
    theirs, _ = trained(Net(lambda p: Adam(p, 0.01, fused=True)))
    assert torch.equal(ours, theirs)


def test_off_by_default() -> None:
    _, run = trained(Net())
    assert run.optimizers[0].param_groups[0]["fused"] is None
    assert "add_param_group" not in vars(run.optimizers[0])


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_in_every_precision(precision: str) -> None:
    plain, _ = trained(Net(), precision=precision)
    fused, run = trained(Net(), precision=precision, fused_optimizers=True)
    assert is_fused(run.optimizers[0])
    loose = 1e-6 if precision == "64-true" else 0.05
    torch.testing.assert_close(fused, plain, rtol=loose, atol=loose)


# ------------------------------------------------------------------ the same object


def test_schedulers_and_others_keep_their_optimizer() -> None:
    made: list[Optimizer] = []

    def make(parameters: Any) -> Optimizer:
        made.append(Adam(parameters, 0.01))
        return made[0]

    _, run = trained(Net(make, schedule=True), fused_optimizers=True)
    assert run.optimizers[0] is made[0] is run.lr_scheduler_configs[0].scheduler.optimizer
    assert made[0].param_groups[0]["lr"] == pytest.approx(0.01 * 0.7**2)


def test_a_later_fit_that_does_not_ask_for_it_steps_as_the_optimizer_was_built() -> None:
    net = Net()
    kept = Adam(net.parameters(), 0.01)
    net.make = lambda _: kept
    trained(net, fused_optimizers=True)
    assert is_fused(kept)
    trained(net, fused_optimizers=True)
    assert is_fused(kept)
    trained(net)
    assert kept.defaults["fused"] is None
    assert kept.param_groups[0]["fused"] is None
    assert all(state["step"].item() == 60 for state in kept.state.values())
    assert not {"add_param_group", "_leyden_fused", "_step_supports_amp_scaling"} & vars(kept).keys()


def test_nobody_who_counts_steps_counts_a_trial() -> None:
    counted: list[Optimizer] = []
    hook = register_optimizer_step_post_hook(lambda optimizer, args, kwargs: counted.append(optimizer))
    try:
        _, run = trained(Net(), fused_optimizers=True)
    finally:
        hook.remove()
    assert is_fused(run.optimizers[0])
    assert counted == [run.optimizers[0]] * 20


def test_nothing_keeps_the_optimizer_alive() -> None:
    layer = nn.Linear(2, 2)
    optimizer = Adam(layer.parameters())
    fuse([optimizer], layer)
    gone = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert gone() is None
    finally:
        gc.enable()


# ------------------------------------------------------------------ checkpoints


def test_a_checkpoint_says_nothing_of_the_form() -> None:
    layer = nn.Linear(2, 2)
    plain, fused = Adam(layer.parameters()), Adam(layer.parameters())
    fuse([fused], layer)
    assert fused.state_dict()["param_groups"] == plain.state_dict()["param_groups"]
    state = copy.deepcopy(plain.state_dict())
    fused.load_state_dict(state)
    assert is_fused(fused)
    assert state["param_groups"][0]["fused"] is None, "what was loaded is not changed"


@pytest.mark.parametrize("name", ["adam", "amsgrad", "momentum", "adagrad"])
@pytest.mark.parametrize(("first", "second"), [(True, True), (False, True), (True, False)])
def test_a_run_of_either_form_goes_on_in_either(name: str, first: bool, second: bool, tmp_path: Path) -> None:
    class Saving(Net):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.global_step == 7:
                self.trainer.save_checkpoint(tmp_path / "seven.ckpt")

    whole = Saving(OPTIMIZERS[name])
    expected, _ = trained(whole, fused_optimizers=first)
    resumed, run = Net(OPTIMIZERS[name]), trainer(fused_optimizers=second)
    run.fit(resumed, ckpt_path=tmp_path / "seven.ckpt")
    optimizer = run.optimizers[0]
    assert is_fused(optimizer) is second
    got = torch.cat([p.detach().flatten() for p in resumed.parameters()])
    if first == second:
        assert torch.equal(got, expected)
        assert resumed.losses == whole.losses[7:]
    else:
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    steps = [state["step"] for state in optimizer.state.values() if "step" in state]
    assert [(each.item(), each.dtype) for each in steps] == [(20, torch.float32)] * len(steps)


def test_state_of_another_memory_layout_is_laid_out_like_the_parameters() -> None:
    def net(layout: torch.memory_format) -> tuple[nn.Module, Optimizer]:
        torch.manual_seed(0)
        layer = nn.Conv2d(4, 4, 3).to(memory_format=layout)
        return layer, Adam(layer.parameters(), 0.1)

    torch.manual_seed(5)
    inputs = torch.randn(2, 4, 5, 5)
    (plain, straight), (last, other) = net(torch.contiguous_format), net(torch.channels_last)
    fuse([other], last)
    assert is_fused(other)
    plain(inputs).square().sum().backward()
    straight.step()
    last.load_state_dict(plain.state_dict())
    other.load_state_dict(copy.deepcopy(straight.state_dict()))
    for layer, optimizer in ((plain, straight), (last, other)):
        optimizer.zero_grad()
        layer(inputs).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(last.weight, plain.weight)


# ------------------------------------------------------------------ loss scaling


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "momentum", "adagrad"])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_loss_scaling_and_clipping(name: str, clip: float | None) -> None:
    def weights(fused: bool) -> Any:
        # the first steps overflow, which leaves weights, momentum and counters as they are
        plugin = MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=2.0**26))
        return trained(Net(OPTIMIZERS[name]), plugins=plugin, gradient_clip_val=clip, fused_optimizers=fused)

    (plain, one), (fused, other) = weights(False), weights(True)
    assert is_fused(other.optimizers[0])
    assert one.global_step == other.global_step < 20, "some steps are left out"
    torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------ gradients that come late


@pytest.mark.parametrize("name", ["momentum", "nesterov", "adam", "adagrad"])
def test_a_parameter_that_gets_its_first_gradient_late(name: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    plain, fused = (OPTIMIZERS[name]([nn.Parameter(p.detach().clone()) for p in layer.parameters()]) for _ in range(2))
    fuse([fused], layer)
    for number in range(4):
        weight, bias = torch.randn(3, 3), torch.randn(3)
        for optimizer in (plain, fused):
            step(optimizer, [weight, None if number < 2 else bias])
    for ours, theirs in zip(fused.param_groups[0]["params"], plain.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_group_that_is_added_is_fused_too(caplog: pytest.LogCaptureFixture) -> None:
    layer, late = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = SGD(layer.parameters(), 0.1, momentum=0.9)
    fuse([optimizer], layer)
    optimizer.add_param_group({"params": list(late.parameters()), "lr": 0.5})
    assert is_fused(optimizer)
    assert [group["fused"] for group in optimizer.state_dict()["param_groups"]] == [None, None]
    step(optimizer, [torch.ones(2, 2), torch.ones(2), torch.ones(2, 2), None])
    caplog.set_level(logging.INFO, "leyden")
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, dtype=torch.complex64))]})
    assert [group["fused"] for group in optimizer.param_groups] == [None, None, None]
    assert "complex64" in lines(caplog)[0]
    step(optimizer, [torch.ones(2, 2), torch.ones(2), None, None, torch.ones(2, dtype=torch.complex64)])


# ------------------------------------------------------------------ what stays as it is


class Own(Adam):
    """Steps in its own way."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Renamed(Adam):
    """Builds itself in its own way, and steps as Adam does."""

    def __init__(self, rate: float, *parameters: Any) -> None:
        super().__init__(parameters, lr=rate)


@pytest.mark.parametrize(
    ("optimizer", "why"),
    [
        (lambda p: LBFGS(p), "no fused form"),
        (lambda p: torch.optim.RMSprop(p), "no fused form"),
        (lambda p: Adam(p, foreach=True), "foreach=True"),
        (lambda p: SGD(p, 0.1, fused=False), "fused=False"),
        (lambda p: Adam(p, differentiable=True), "differentiable=True"),
        (lambda p: SGD(p, 0.1, momentum=0.9, dampening=0.1), "dampen"),
        (lambda p: Own(p), "overrides step()"),
        (lambda p: Adam([nn.Parameter(torch.zeros(2, dtype=torch.complex64))]), "complex64 on cpu"),
        (lambda p: Adam([nn.Parameter(torch.zeros(4, 4)[:, :2])]), "view with gaps"),
        (lambda p: Adam([nn.UninitializedParameter()]), "UninitializedParameter"),
    ],
)
def test_what_cannot_be_fused_stays_as_it_is_and_is_named(
    optimizer: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    layer = nn.Linear(2, 2)
    made = optimizer(list(layer.parameters()))
    before = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in made.param_groups])
    caplog.set_level(logging.INFO, "leyden")
    fuse([made], layer)
    assert before == [{k: v for k, v in g.items() if k != "params"} for g in made.param_groups]
    (line,) = lines(caplog)
    assert line.startswith(f"Trainer(fused_optimizers=True): {type(made).__name__} stays as it is: ")
    assert why in line


def test_sparse_gradients_stay_unfused_and_train(caplog: pytest.LogCaptureFixture) -> None:
    class Words(Net):
        def __init__(self) -> None:
            super().__init__(lambda p: SGD(p, 0.1))
            self.words = nn.Embedding(5, 1, sparse=True)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + self.words(torch.tensor([1, 2])).square().sum()

    caplog.set_level(logging.INFO, "leyden")
    _, run = trained(Words(), fused_optimizers=True)
    assert not run.optimizers[0].param_groups[0]["fused"]
    assert "sparse gradients" in lines(caplog)[0]


def test_a_subclass_that_steps_as_torch_does_is_fused() -> None:
    _, run = trained(Net(lambda p: Renamed(0.01, *p)), fused_optimizers=True)
    assert type(run.optimizers[0]) is Renamed
    assert is_fused(run.optimizers[0])


def test_one_that_is_fused_already_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    layer = nn.Linear(2, 2)
    optimizer = Adam(layer.parameters(), fused=True)
    caplog.set_level(logging.INFO, "leyden")
    assert why_not(optimizer, set()) == ""
    fuse([optimizer], layer)
    assert optimizer.state_dict()["param_groups"][0]["fused"] is True
    assert not lines(caplog)


def test_of_several_optimizers_each_as_it_can() -> None:
    class Two(Net):
        def configure_optimizers(self) -> Any:
            return [Adam(self.net[0].parameters()), torch.optim.RMSprop(self.net[2].parameters())]

    _, run = trained(Two(), fused_optimizers=True)
    assert is_fused(run.optimizers[0])
    assert "fused" not in run.optimizers[1].defaults


def test_without_an_optimizer_there_is_nothing_to_fuse(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "leyden")
    with pytest.warns(UserWarning, match="with no optimizer"):
        trainer(max_epochs=1, fused_optimizers=True).fit(Net(lambda _: None))
    assert not lines(caplog)


def test_dense_in_any_order_of_dimensions() -> None:
    assert is_dense(torch.zeros(3, 4))
    assert is_dense(torch.zeros(3, 4).t())
    assert is_dense(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    assert not is_dense(torch.zeros(3, 4)[:, ::2])
    assert not is_dense(torch.zeros(3, 1).expand(3, 4))


# ------------------------------------------------------------------ what comes in the middle of a run


class Exchange(L.Callback):
    """Puts another weight in the place of one."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            layer, group = pl_module.net[0], trainer.optimizers[0].param_groups[0]
            fresh = nn.Parameter(layer.weight.detach() * 0.5)
            group["params"] = [fresh if each is layer.weight else each for each in group["params"]]
            layer.weight = fresh


class Momentum(L.Callback):
    """Begins with momentum, and thaws a layer a little later."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.net[0].requires_grad_(trainer.global_step > 12)
        if trainer.current_epoch == 1:
            trainer.optimizers[0].param_groups[0]["momentum"] = 0.9


@pytest.mark.parametrize(("callback", "momentum"), [(Exchange, 0.9), (Momentum, 0.0)])
def test_a_momentum_that_is_not_there_for_all_begins_at_zero(callback: Any, momentum: float) -> None:
    weights = [
        trained(Net(lambda p: SGD(p, 0.02, momentum=momentum)), fused_optimizers=fused, callbacks=[callback()])[0]
        for fused in (False, True)
    ]
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


class Rows(Net):
    """Has sparse gradients that no layer of torch announces."""

    def __init__(self, make: Callable[..., Any]) -> None:
        super().__init__(make)
        self.table = nn.Parameter(torch.ones(10, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        rows = nn.functional.embedding(torch.tensor([batch_idx % 10]), self.table, sparse=True)
        return super().training_step(batch, batch_idx) + rows.square().sum()


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("kind", [SGD, Adagrad])
def test_a_sparse_gradient_that_nobody_announced_ends_the_fused_form(kind: Any, caplog: Any) -> None:
    plain, _ = trained(Rows(lambda p: kind(p, 0.05)))
    with caplog.at_level(logging.INFO):
        mine, run = trained(Rows(lambda p: kind(p, 0.05)), fused_optimizers=True)
    assert [line.rpartition(": ")[2] for line in lines(caplog)] == ["it has got sparse gradients."]
    assert not is_fused(run.optimizers[0])
    assert torch.equal(mine, plain)


class PassesOn:
    """A wrapper that hands on what it is asked for."""

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["wrapped"], name)


def test_an_optimizer_of_an_earlier_fit_may_come_wrapped() -> None:
    net = Net()
    optimizer = Adam(net.parameters(), 0.01)
    for given, fused in ((optimizer, True), (PassesOn(optimizer), False)):
        net.configure_optimizers = lambda given=given: given  # type: ignore[misc]
        trained(net, fused_optimizers=fused)
    assert optimizer.param_groups[0]["fused"] is None
