# SPDX-License-Identifier: Apache-2.0
"""Manual optimization: the training step does it all, with the hooks, counters and precision of the Trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.errors import MisconfigurationException


class Net(L.LightningModule):
    """Two parts, each with its own optimizer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(2, 3), nn.Linear(3, 1)
        self.calls = 0

    def loss(self, batch: Any) -> Tensor:
        self.calls += 1
        return (self.head(self.body(batch[0])) - batch[1]).square().mean()

    def losses(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return one loss for each part, over one shared graph."""
        out = self.head(self.body(batch[0]))
        self.calls += 1
        return (out - batch[1]).square().mean(), out.abs().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return SGD(self.body.parameters(), lr=0.05, momentum=0.9), Adam(self.head.parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        return batches()


class ByHand(Net):
    """The same under manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Single(Net):
    """With one LBFGS for everything."""

    def configure_optimizers(self) -> Any:
        return LBFGS(self.parameters(), lr=0.2, max_iter=4)


def batches() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    return DataLoader(
        TensorDataset(torch.randn(12, 2, generator=generator), torch.randn(12, 1, generator=generator)), batch_size=2
    )


def trainer(**settings: Any) -> L.Trainer:
    """Return a quiet Trainer of one epoch."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(**{"max_epochs": 1, "accelerator": "cpu", **quiet, **settings})


def weights(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_a_gan_by_hand() -> None:
    class Gan(ByHand):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            first, second = self.optimizers()
            assert isinstance(first, SGD)
            assert isinstance(second, Optimizer)
            for index, optimizer in enumerate((first, second)):
                self.toggle_optimizer(optimizer)
                own = {id(p) for group in optimizer.param_groups for p in group["params"]}
                assert all(p.requires_grad == (id(p) in own) for p in self.parameters())
                loss = self.losses(batch)[index]
                optimizer.zero_grad()
                self.manual_backward(loss)
                self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
                optimizer.step()
                self.untoggle_optimizer(optimizer)

    net, reference = Gan(), Net()
    made = trainer()
    made.fit(net)
    optimizers = reference.configure_optimizers()
    for batch in batches():
        for index, (optimizer, part) in enumerate(zip(optimizers, (reference.body, reference.head), strict=True)):
            reference.zero_grad()
            reference.losses(batch)[index].backward()
            nn.utils.clip_grad_norm_(part.parameters(), 0.1)
            optimizer.step()
    assert torch.equal(weights(net), weights(reference))
    assert made.global_step == 6


def test_toggles_restore_what_was_frozen_before() -> None:
    class Own(ByHand):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            first, second = self.optimizers()
            self.head.bias.requires_grad = False
            with self.toggled_optimizer(first):
                assert [p.requires_grad for p in self.head.parameters()] == [False, False]
            assert [p.requires_grad for p in self.head.parameters()] == [True, False]
            with pytest.raises(ZeroDivisionError), second.toggle_model():
                assert not any(p.requires_grad for p in self.body.parameters())
                raise ZeroDivisionError
            assert all(p.requires_grad for p in self.body.parameters())

    trainer().fit(Own())


def test_a_closure_by_hand() -> None:
    class Own(ByHand, Single):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = self.loss(batch)
                self.manual_backward(loss)
                return loss

            optimizer.step(closure)

    net, automatic = Own(), Single()
    made = trainer()
    made.fit(net)
    trainer().fit(automatic)
    assert torch.equal(weights(net), weights(automatic))
    assert made.global_step == 6


def test_optimizers_without_the_wrapper_are_those_of_the_user() -> None:
    class Own(ByHand):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            raw = self.optimizers(use_pl_optimizer=False)
            assert [type(optimizer) for optimizer in raw] == [SGD, Adam]
            assert [wrapped.optimizer for wrapped in self.optimizers()] == raw

    trainer().fit(Own())


def test_a_schedule_on_the_wrapper_by_hand() -> None:
    rates: list[float] = []

    class Own(ByHand, Single):
        def configure_optimizers(self) -> Any:
            return SGD(self.parameters(), lr=1.0)

        def on_train_start(self) -> None:
            self.schedule = ExponentialLR(self.optimizers(), 0.5)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch) * 0.01)
            optimizer.step()
            self.schedule.step()
            rates.append(optimizer.param_groups[0]["lr"])

    made = trainer()
    made.fit(Own())
    assert rates == [0.5**n for n in range(1, 7)]
    assert made.global_step == 6


def test_manual_backward_takes_the_arguments_of_backward_and_runs_the_hooks() -> None:
    seen: list[str] = []

    class Own(ByHand):
        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            seen.append(f"backward {sorted(kwargs)}")
            loss.backward(*args, **kwargs)

        def on_before_backward(self, loss: Tensor) -> None:
            seen.append("before")

        def on_after_backward(self) -> None:
            seen.append("after")

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = self.loss(batch)
            self.manual_backward(loss, retain_graph=True)
            self.manual_backward(loss)

    trainer(limit_train_batches=1).fit(Own())
    assert seen == ["before", "backward ['retain_graph']", "after", "before", "backward []", "after"]


def test_manual_backward_is_an_error_elsewhere() -> None:
    class Automatic(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

    with pytest.raises(
        MisconfigurationException, match="for manual optimization: set self.automatic_optimization = False"
    ):
        trainer().fit(Automatic())

    class Validates(ByHand):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(torch.ones((), requires_grad=True))

    net = Validates()
    with pytest.raises(RuntimeError, match="works inside Trainer.fit only"):
        trainer().validate(net, batches(), verbose=False)


@pytest.mark.parametrize("output", [5, "x", [1]])
def test_a_manual_step_returns_a_tensor_a_dict_or_nothing(output: Any) -> None:
    class Own(ByHand):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return output

    with pytest.raises(
        MisconfigurationException, match="under manual optimization it must return a tensor, a dict or None"
    ):
        trainer().fit(Own())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"gradient_clip_val": 0.5}, r"gradient_clip_val=0\.5\) does nothing under manual.*self\.clip_gradients"),
        ({"accumulate_grad_batches": 2}, r"accumulate_grad_batches=2\) does nothing under manual"),
    ],
)
def test_settings_that_mean_nothing_by_hand_are_errors(settings: Any, match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        trainer(**settings).fit(ByHand())


def test_logging_by_hand_is_the_hook_that_runs() -> None:
    class Own(ByHand):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.log(f"at_{type(optimizer).__name__}", 1.0)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.log("before", 1.0, on_epoch=True)
            for optimizer in self.optimizers():
                optimizer.step()
            self.log("after", 2.0)

    made = trainer()
    made.fit(Own())
    assert made.callback_metrics.keys() == {"before", "before_step", "before_epoch", "after", "at_SGD", "at_Adam"}


class Often(ByHand):
    """One optimizer that steps several times in a batch, as with truncated backpropagation through time."""

    def __init__(self, times: int = 4) -> None:
        super().__init__()
        self.times, self.validated = times, list[int]()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        for _ in range(self.times):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def val_dataloader(self) -> Any:
        return batches()

    def on_validation_start(self) -> None:
        self.validated.append(self.trainer.global_step)

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.05)


def test_each_step_of_one_optimizer_is_an_update() -> None:
    made = trainer(max_steps=8, max_epochs=-1)
    made.fit(Often())
    assert made.global_step == 8
    assert made.batches_that_stepped == 2


def test_validation_by_steps_where_a_batch_makes_several() -> None:
    net, made = Often(), trainer(val_check_interval="6 steps", num_sanity_val_steps=0)
    made.fit(net)
    assert made.global_step == 24
    assert net.validated == [8, 12, 20, 24]  # after the batches in which the 6th, 12th, 18th and 24th step was made


@pytest.mark.parametrize(("critic_steps", "critic_first", "updates"), [(3, True, 18), (3, False, 6), (1, True, 6)])
def test_the_optimizer_that_steps_first_makes_the_updates(critic_steps: int, critic_first: bool, updates: int) -> None:
    class Gan(ByHand):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            generator, critic = self.optimizers()
            order = [critic] * critic_steps + [generator] if critic_first else [generator] + [critic] * critic_steps
            for optimizer in order:
                self.manual_backward(self.loss(batch))
                optimizer.step()

    made = trainer()
    made.fit(Gan())
    assert made.global_step == updates
    made = trainer(semantics="lightning")
    made.fit(Gan())
    assert made.global_step == 6 * (critic_steps + 1)
