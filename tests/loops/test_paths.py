# SPDX-License-Identifier: Apache-2.0
"""Batches in a closure, with several optimizers, with an own ``optimizer_step``, and with all of these together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.errors import MisconfigurationException
from leyden.optim import LightningOptimizer


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


def gradients(losses: Any, net: Net) -> None:
    """Give each part the gradients of its own loss."""
    for loss, part in zip(losses, (net.body, net.head), strict=True):
        for parameter, gradient in zip(
            part.parameters(), torch.autograd.grad(loss, list(part.parameters()), retain_graph=True), strict=True
        ):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


# ------------------------------------------------------------------ several optimizers under automatic optimization


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_all_optimizers_step_on_one_loss(accumulate: int, clip: float | None) -> None:
    net, reference = Net(), Net()
    made = trainer(accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    made.fit(net)
    optimizers = reference.configure_optimizers()
    data = list(batches())
    for start in range(0, 6, accumulate):
        window = data[start : start + accumulate]
        for optimizer in optimizers:
            optimizer.zero_grad()
        for batch in window:
            (reference.loss(batch) / len(window)).backward()
        for optimizer, part in zip(optimizers, (reference.body, reference.head), strict=True):
            if clip:
                nn.utils.clip_grad_norm_(part.parameters(), clip)
            optimizer.step()
    assert torch.equal(weights(net), weights(reference))
    assert made.global_step == -(-6 // accumulate)


DRESSES = {
    "list": lambda first, second: [first, second],
    "tuple": lambda first, second: (first, second),
    "dict of list": lambda first, second: {"loss": [first, second]},
    "dict of names": lambda first, second: {"loss_g": first, "loss_d": second, "other": 1},
}


@pytest.mark.parametrize("dress", DRESSES)
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_each_optimizer_steps_on_its_own_loss(dress: str, accumulate: int) -> None:
    class Own(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return DRESSES[dress](*self.losses(batch))

    net, reference = Own(), Net()
    trainer(accumulate_grad_batches=accumulate, gradient_clip_val=0.5).fit(net)
    optimizers = reference.configure_optimizers()
    data = list(batches())
    for start in range(0, 6, accumulate):
        window = data[start : start + accumulate]
        reference.zero_grad()
        for batch in window:
            gradients([loss / len(window) for loss in reference.losses(batch)], reference)
        for optimizer, part in zip(optimizers, (reference.body, reference.head), strict=True):
            nn.utils.clip_grad_norm_(part.parameters(), 0.5)
            optimizer.step()
    torch.testing.assert_close(weights(net), weights(reference))


@pytest.mark.parametrize("which", [0, 1])
def test_none_in_the_list_skips_an_optimizer(which: int) -> None:
    class Own(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            losses: list[Any] = list(self.losses(batch))
            losses[which] = None
            return losses

    net, before = Own(), Net()
    trainer().fit(net)
    parts = [(net.body, before.body), (net.head, before.head)]
    moved = [not torch.equal(weights(now), weights(then)) for now, then in parts]
    assert moved == [which == 1, which == 0]


def test_an_optimizer_of_frozen_parameters_is_left_out() -> None:
    class Own(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return list(self.losses(batch))

    net = Own()
    net.body.requires_grad_(False)
    before = weights(net.body)
    trainer().fit(net)
    assert torch.equal(weights(net.body), before)
    assert not torch.equal(weights(net.head), weights(Net().head))


def test_declared_weights_count_once_for_all_losses() -> None:
    class Own(Net):
        weigh = True

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": list(self.losses(batch)), **({"num_items": 7} if self.weigh else {})}

    nets = [Own(), Own()]
    nets[1].weigh = False  # equal weights are no weights
    for net in nets:
        trainer(accumulate_grad_batches=3).fit(net)
    torch.testing.assert_close(weights(nets[0]), weights(nets[1]))


def test_too_few_losses() -> None:
    class Own(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return [self.loss(batch)]

    with pytest.raises(
        MisconfigurationException, match="1 losses for 2 optimizers; return one loss for all, or one for"
    ):
        trainer().fit(Own())


def test_an_own_backward_gets_what_each_loss_needs() -> None:
    seen: list[set[str]] = []

    class Own(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return list(self.losses(batch))

        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            seen.append(set(kwargs))
            self.log("seen", len(seen))
            loss.backward(*args, **kwargs)

    class Plain(Own):
        backward = L.LightningModule.backward

    own, plain = Own(), Plain()
    trainer().fit(own)
    trainer().fit(plain)
    assert torch.equal(weights(own), weights(plain))
    assert seen == [{"inputs", "retain_graph"}] * 12


def test_on_train_batch_end_gets_all_losses() -> None:
    seen: list[Any] = []

    class Own(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return list(self.losses(batch))

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append([loss.requires_grad for loss in outputs["loss"]])

    trainer().fit(Own())
    assert seen == [[False, False]] * 6


class Indexed(Net):
    """The form of 2019: a training step for each optimizer."""

    def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:
        frozen = self.head if optimizer_idx == 0 else self.body
        assert not any(p.requires_grad for p in frozen.parameters())
        loss: Tensor = self.losses(batch)[optimizer_idx]
        return loss


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_optimizer_idx_gives_each_optimizer_a_step_of_its_own(accumulate: int) -> None:
    net, reference = Indexed(), Net()
    made = trainer(accumulate_grad_batches=accumulate)
    made.fit(net)
    optimizers = reference.configure_optimizers()
    for batch_idx, batch in enumerate(data := list(batches())):
        start = batch_idx - batch_idx % accumulate
        length = min(accumulate, len(data) - start)
        for index, (optimizer, part) in enumerate(zip(optimizers, (reference.body, reference.head), strict=True)):
            if batch_idx == start:
                optimizer.zero_grad()
            loss = reference.losses(batch)[index] / length
            for parameter, gradient in zip(
                part.parameters(), torch.autograd.grad(loss, list(part.parameters())), strict=True
            ):
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            if batch_idx + 1 == start + length:
                optimizer.step()
    torch.testing.assert_close(weights(net), weights(reference))
    assert made.global_step == -(-6 // accumulate)
    assert all(p.requires_grad for p in net.parameters())


def test_optimizer_idx_with_weights_and_a_skipped_optimizer() -> None:
    class Own(Indexed):
        def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx, optimizer_idx)
            return None if optimizer_idx == 1 and batch_idx % 2 else {"loss": loss, "num_items": 2 + 3 * optimizer_idx}

    class Unweighed(Indexed):
        def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx, optimizer_idx)
            # the mean over the batches that there are
            return None if optimizer_idx == 1 and batch_idx % 2 else 2 * loss if optimizer_idx else loss

    own, plain = Own(), Unweighed()
    trainer(accumulate_grad_batches=2).fit(own)
    trainer(accumulate_grad_batches=2).fit(plain)
    torch.testing.assert_close(weights(own), weights(plain))


def test_several_optimizers_are_for_manual_optimization_under_lightning_semantics() -> None:
    with pytest.raises(
        MisconfigurationException, match="2 optimizers; with semantics='lightning'.*automatic_optimization"
    ):
        trainer(semantics="lightning").fit(Net())


# ------------------------------------------------------------------ closures


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_equals_the_loop_by_hand(search: str | None) -> None:
    class Own(Single):
        def configure_optimizers(self) -> Any:
            return LBFGS(self.parameters(), lr=0.2, max_iter=4, line_search_fn=search)

    net, reference = Own(), Own()
    made = trainer(max_epochs=2)
    made.fit(net)
    optimizer = reference.configure_optimizers()
    for _ in range(2):
        for batch in batches():

            def closure(batch: Any = batch) -> Tensor:
                optimizer.zero_grad()
                loss = reference.loss(batch)
                loss.backward()
                return loss

            optimizer.step(closure)
    assert torch.equal(weights(net), weights(reference))
    assert net.calls == reference.calls > 12
    assert made.global_step == 12


def test_lbfgs_converges() -> None:
    class Whole(Single):
        def configure_optimizers(self) -> Any:
            return LBFGS(self.parameters(), line_search_fn="strong_wolfe")

        def train_dataloader(self) -> Any:
            return DataLoader(batches().dataset, batch_size=12)

    net = Whole()
    trainer(max_epochs=20).fit(net)
    x, y = batches().dataset.tensors  # type: ignore[attr-defined]
    least = torch.linalg.lstsq(torch.cat([x, torch.ones(12, 1)], 1), y).solution
    best = (torch.cat([x, torch.ones(12, 1)], 1) @ least - y).square().mean()
    assert net.loss((x, y)).item() == pytest.approx(float(best), rel=1e-4)


def test_lbfgs_on_a_window_of_accumulation_is_a_clear_error() -> None:
    with pytest.raises(MisconfigurationException, match="closure more than once.*accumulate_grad_batches=1"):
        trainer(accumulate_grad_batches=2).fit(Single())


class Twice(SGD):
    """An optimizer of the user that looks ahead, as sharpness-aware ones do: two evaluations for each step."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        assert closure is not None
        with torch.enable_grad():
            closure()
        first = [[p.grad.clone() for p in group["params"]] for group in self.param_groups]
        with torch.no_grad():
            for group, grads in zip(self.param_groups, first, strict=True):
                for parameter, gradient in zip(group["params"], grads, strict=True):
                    parameter.add_(gradient, alpha=0.1)
        with torch.enable_grad():
            loss = closure()
        with torch.no_grad():
            for group, grads in zip(self.param_groups, first, strict=True):
                for parameter, gradient in zip(group["params"], grads, strict=True):
                    parameter.sub_(gradient, alpha=0.1)
        super().step()
        return loss


def look_ahead(reference: Net, optimizer: SGD, parameters: list[Any], batch: Any) -> None:
    first = torch.autograd.grad(reference.loss(batch), parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, first, strict=True):
            parameter.add_(gradient, alpha=0.1)
    second = torch.autograd.grad(reference.loss(batch), parameters)
    with torch.no_grad():
        for parameter, gradient, there in zip(parameters, first, second, strict=True):
            parameter.sub_(gradient, alpha=0.1)
            parameter.grad = there
    optimizer.step()


def test_an_optimizer_that_evaluates_twice() -> None:
    class Own(Net):
        def configure_optimizers(self) -> Any:
            return Twice(self.parameters(), lr=0.05)

    net, reference = Own(), Net()
    made = trainer()
    made.fit(net)
    optimizer = SGD(reference.parameters(), lr=0.05)
    for batch in batches():
        look_ahead(reference, optimizer, list(reference.parameters()), batch)
    torch.testing.assert_close(weights(net), weights(reference))
    assert made.global_step == 6


def test_a_closure_beside_a_plain_optimizer() -> None:
    class Own(Net):
        def configure_optimizers(self) -> Any:
            return SGD(self.body.parameters(), lr=0.05), Twice(self.head.parameters(), lr=0.05)

    net, reference = Own(), Net()
    trainer().fit(net)
    body, head = SGD(reference.body.parameters(), lr=0.05), SGD(reference.head.parameters(), lr=0.05)
    for batch in batches():
        reference.zero_grad()
        reference.loss(batch).backward()
        first = [p.grad for p in reference.head.parameters()]
        body.step()
        parameters = list(reference.head.parameters())
        with torch.no_grad():
            for parameter, gradient in zip(parameters, first, strict=True):
                parameter.add_(gradient, alpha=0.1)  # type: ignore[arg-type]
        second = torch.autograd.grad(reference.loss(batch), parameters)
        with torch.no_grad():
            for parameter, gradient, there in zip(parameters, first, second, strict=True):
                parameter.sub_(gradient, alpha=0.1)  # type: ignore[arg-type]
                parameter.grad = there
        head.step()
    torch.testing.assert_close(weights(net), weights(reference))
    assert net.calls == 12


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("order", [0, 1])
def test_lbfgs_beside_a_plain_optimizer_learns(indexed: bool, order: int) -> None:
    class Own(Indexed if indexed else Net):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            made = [SGD(self.body.parameters(), lr=0.05), LBFGS(self.head.parameters(), lr=0.3, max_iter=3)]
            return made if order == 0 else made[::-1]

        def training_step(self, batch: Any, batch_idx: int, *index: int) -> Any:
            return self.loss(batch)

        if indexed:

            def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:
                return self.loss(batch)

        def train_dataloader(self) -> Any:
            return whole

    net, whole = Own(), DataLoader(batches().dataset, batch_size=12)
    made = trainer(max_epochs=8)
    first = net.loss(next(iter(whole))).item()
    made.fit(net)
    assert net.loss(next(iter(whole))).item() < 0.7 * first
    assert made.global_step == 8
    assert made.progress.optimizer_steps == [8, 8]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_one_loss_each_inside_closures_equals_the_straight_way(accumulate: int) -> None:
    class Straight(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return dict(zip(("loss_a", "loss_b"), self.losses(batch), strict=True))

    class Closures(Straight):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer.step(closure=optimizer_closure)

    nets = Straight(), Closures()
    for net in nets:
        trainer(accumulate_grad_batches=accumulate, gradient_clip_val=0.3).fit(net)
    assert torch.equal(weights(nets[0]), weights(nets[1]))
    assert nets[0].calls == nets[1].calls == 6


def test_lbfgs_without_a_loss_has_nothing_to_search() -> None:
    class Skips(Single):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None

    with pytest.raises(MisconfigurationException, match="LBFGS.*training_step.*None"):
        trainer().fit(Skips())


# ------------------------------------------------------------------ an overridden optimizer_step


def test_optimizer_step_sees_the_count_from_before_and_the_wrapped_optimizer() -> None:
    seen: list[Any] = []

    class Own(Single):
        def configure_optimizers(self) -> Any:
            return SGD(self.parameters(), lr=0.05)

        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer.step(closure=optimizer_closure)
            seen.append((epoch, batch_idx, self.global_step, type(optimizer) is LightningOptimizer))

    made = trainer(max_epochs=2, limit_train_batches=2)
    made.fit(Own())
    assert seen == [(0, 0, 0, True), (0, 1, 1, True), (1, 0, 2, True), (1, 1, 3, True)]
    assert made.global_step == 4


def test_optimizer_step_may_step_the_raw_optimizer() -> None:
    class Own(Single):
        def configure_optimizers(self) -> Any:
            return SGD(self.parameters(), lr=0.05)

        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer.optimizer.step(closure=optimizer_closure)

    net, before = Own(), weights(Net())
    made = trainer(max_epochs=-1, max_steps=4)
    made.fit(net)
    assert made.global_step == 4
    assert not torch.equal(weights(net), before)


def test_optimizer_step_may_leave_a_step_out() -> None:
    class Own(Single):
        def configure_optimizers(self) -> Any:
            return SGD(self.parameters(), lr=0.05)

        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            if batch_idx % 2:
                optimizer_closure()
            else:
                optimizer.step(closure=optimizer_closure)

    net, reference = Own(), Own()
    trainer().fit(net)
    optimizer = reference.configure_optimizers()
    for batch in list(batches())[::2]:
        optimizer.zero_grad()
        reference.loss(batch).backward()
        optimizer.step()
    assert torch.equal(weights(net), weights(reference))
    assert net.calls == 6


def test_optimizer_step_that_forgets_the_closure_is_an_error() -> None:
    class Own(Net):
        def optimizer_step(self, *_: Any) -> None: ...

    with pytest.raises(MisconfigurationException, match=r"Own\.optimizer_step\(\) did not run its optimizer_closure"):
        trainer().fit(Own())


@pytest.mark.parametrize("indexed", [False, True])
def test_optimizer_step_runs_for_each_optimizer(indexed: bool) -> None:
    seen: list[Any] = []

    class Own(Indexed if indexed else Net):  # type: ignore[misc]
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            seen.append(type(optimizer.optimizer))
            optimizer.step(closure=optimizer_closure)

    class Plain(Indexed if indexed else Net):  # type: ignore[misc]
        pass

    own, plain = Own(), Plain()
    trainer(accumulate_grad_batches=2).fit(own)
    trainer(accumulate_grad_batches=2).fit(plain)
    assert torch.equal(weights(own), weights(plain))
    assert seen == [SGD, Adam] * 3
