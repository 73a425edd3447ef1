# SPDX-License-Identifier: Apache-2.0
"""One batch under automatic optimization: which losses are taken, in which order the hooks run, what they may change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.callbacks import EarlyStopping
from leyden.errors import LeydenWarning, MisconfigurationException
from leyden.loops.optimize import detached


class Net(L.LightningModule):
    """Two layers; ``step(module, batch, batch_idx)`` makes the loss."""

    def __init__(self, step: Callable[..., Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(2, 3), nn.Linear(3, 1)
        self.step_of = step

    def loss(self, batch: Any) -> Tensor:
        return (self.head(self.body(batch[0])) - batch[1]).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch) if self.step_of is None else self.step_of(self, batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.05, momentum=0.9)

    def train_dataloader(self) -> Any:
        return DataLoader(data(), batch_size=2)


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(12, 2, generator=generator), torch.randn(12, 1, generator=generator))


def trainer(**settings: Any) -> L.Trainer:
    """Return a quiet Trainer of one epoch."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(**{"max_epochs": 1, "accelerator": "cpu", **quiet, **settings})


def weights(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().double() for p in net.parameters()])


def by_hand(batches: Any = None, clip: float | None = None, optimizer: Any = None) -> Tensor:
    """Return the weights that a plain loop over the data gives."""
    net = Net()
    made = optimizer(net) if optimizer else net.configure_optimizers()
    for batch in batches or DataLoader(data(), batch_size=2):
        made.zero_grad()
        net.loss(batch).backward()
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        made.step()
    return weights(net)


# ------------------------------------------------------------------ losses


@pytest.mark.parametrize(
    "dress", [lambda loss: loss, lambda loss: {"loss": loss, "x": 1}, lambda loss: loss.reshape(1, 1)]
)
def test_a_loss_alone_in_a_dict_or_with_one_element(dress: Callable[[Tensor], Any]) -> None:
    net = Net(lambda self, batch, i: dress(self.loss(batch)))
    trainer().fit(net)
    assert torch.equal(weights(net), by_hand())


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (1.5, r"returned float '1\.5'; it must return the loss as a tensor"),
        (True, "returned bool 'True'"),
        ("loss", "returned str 'loss'"),
        (object, "returned type"),
        ({"los": 1}, r"dict without the key 'loss'; its keys are \['los'\]"),
        ({}, r"its keys are \[\]"),
        ({"loss": 2.0}, r"a loss of type float \(2\.0\); it must be a tensor.*\.item\(\)"),
        ({"loss": "x"}, "a loss of type str"),
        (torch.ones(2, requires_grad=True), r"a loss of shape \(2,\); it must be a scalar.*loss.mean\(\)"),
        ({"loss": torch.ones(0, requires_grad=True)}, r"shape \(0,\)"),
        (torch.tensor(1.0), "does not require grad"),
        ([torch.tensor(1.0, requires_grad=True)] * 2, "returned 2 losses for 1 optimizers"),
        ([], "returned 0 losses for 1 optimizers"),
        ([1.0], "a loss of type float"),
        ([torch.ones(2, requires_grad=True)], r"shape \(2,\)"),
    ],
    ids=str,
)
def test_a_loss_that_cannot_be_is_a_clear_error(loss: Any, match: str, accumulate: int) -> None:
    with pytest.raises(MisconfigurationException, match=f"(?s)training_step.*{match}"):
        trainer(accumulate_grad_batches=accumulate).fit(Net(lambda *_: loss))


@pytest.mark.parametrize("loss", [1.5, {"los": 1}, torch.ones(2, requires_grad=True), torch.tensor(1.0)], ids=str)
def test_the_errors_are_the_same_inside_a_closure(loss: Any) -> None:
    class Own(Net):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer.step(closure=optimizer_closure)

    with pytest.raises(MisconfigurationException, match="training_step"):
        trainer().fit(Own(lambda *_: loss))


@pytest.mark.parametrize("skip", [None, {"loss": None}])
def test_a_skipped_batch_moves_nothing(skip: Any) -> None:
    net = Net(lambda self, batch, i: skip if i in (0, 2, 3) else self.loss(batch))
    made = trainer()
    made.fit(net)
    batches = list(DataLoader(data(), batch_size=2))
    assert torch.equal(weights(net), by_hand([batches[1], batches[4], batches[5]]))
    assert made.global_step == 6


def test_a_run_of_skipped_batches_ends_where_it_began() -> None:
    net = Net(lambda *_: None)
    before = weights(net)
    trainer(accumulate_grad_batches=2, gradient_clip_val=1.0).fit(net)
    assert torch.equal(weights(net), before)


def test_a_skipped_batch_leaves_the_gradients_of_its_window() -> None:
    net = Net(lambda self, batch, i: None if i % 2 else self.loss(batch))
    trainer(accumulate_grad_batches=2).fit(net)
    reference = Net()
    optimizer = reference.configure_optimizers()
    for batch in list(DataLoader(data(), batch_size=2))[::2]:
        optimizer.zero_grad()
        (reference.loss(batch) / 2).backward()
        optimizer.step()
    assert torch.equal(weights(net), weights(reference))


def test_a_window_that_begins_with_a_skipped_batch_begins_without_gradients() -> None:
    seen = []

    class Looks(Net):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            seen.append(self.head.bias.grad.clone())  # type: ignore[union-attr]

    net = Looks(lambda self, batch, i: None if i % 2 == 0 else 0 * self.loss(batch) + self.head.bias.sum())
    trainer(accumulate_grad_batches=2).fit(net)
    assert [float(gradient) for gradient in seen] == [0.5] * 3


def test_what_on_train_batch_end_gets() -> None:
    seen: list[Any] = []
    outputs = iter([lambda loss: loss, lambda loss: {"loss": loss, "more": 5}, lambda loss: None])

    class Looks(Net):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(outputs)

    trainer(limit_train_batches=3).fit(Looks(lambda self, batch, i: next(outputs)(self.loss(batch))))
    assert [set(found) for found in seen] == [{"loss"}, {"loss", "more"}, set()]
    assert not any(found["loss"].requires_grad for found in seen[:2])


def test_losses_are_detached_in_every_form() -> None:
    loss = torch.ones((), requires_grad=True)
    for output in (loss, [loss], {"loss": loss}, {"loss": [loss, None]}, {"loss_a": loss, "loss_b": loss}):
        found = detached(output)
        for value in found.values():
            for tensor in value if isinstance(value, list) else [value]:
                assert tensor is None or not tensor.requires_grad
    assert detached(None) == detached({}) == {}


# ------------------------------------------------------------------ hooks


def test_the_hooks_of_a_batch_in_their_order() -> None:
    seen: list[str] = []

    class Says(Net):
        def on_before_zero_grad(self, optimizer: Any) -> None:
            seen.append("before zero")

        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
            seen.append("zero")
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

        def on_before_backward(self, loss: Tensor) -> None:
            seen.append("before backward")

        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            seen.append("backward")
            super().backward(loss, *args, **kwargs)

        def on_after_backward(self) -> None:
            seen.append("after backward")

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            seen.append("before step")

        def configure_gradient_clipping(self, optimizer: Any, value: Any = None, algorithm: Any = None) -> None:
            seen.append(f"clip {value} {algorithm}")
            super().configure_gradient_clipping(optimizer, value, algorithm)

    net = Says(lambda self, batch, i: seen.append("step") or self.loss(batch))
    trainer(limit_train_batches=2, accumulate_grad_batches=2, gradient_clip_val=0.5).fit(net)
    backward = ["before backward", "backward", "after backward"]
    assert seen == [
        "step", "before zero", "zero", *backward, "step", *backward, "before step", "clip 0.5 None",
    ]  # fmt: skip


def test_gradients_are_clipped_where_nothing_is_overridden() -> None:
    net = Net()
    trainer(gradient_clip_val=0.1).fit(net)
    assert torch.equal(weights(net), by_hand(clip=0.1))


def test_a_clipping_of_the_user_replaces_ours() -> None:
    class Own(Net):
        def configure_gradient_clipping(self, optimizer: Any, value: Any = None, algorithm: Any = None) -> None:
            nn.utils.clip_grad_norm_(self.parameters(), 0.2)

    net = Own()
    trainer(gradient_clip_val=0.1).fit(net)
    assert torch.equal(weights(net), by_hand(clip=0.2))


@pytest.mark.parametrize("value", ["0.5", True])
def test_clip_gradients_wants_a_number(value: Any) -> None:
    class Own(Net):
        def configure_gradient_clipping(self, optimizer: Any, *_: Any) -> None:
            self.clip_gradients(optimizer, gradient_clip_val=value)

    with pytest.raises(TypeError, match=f"gradient_clip_val={value!r}"):
        trainer().fit(Own())


def test_clip_gradients_knows_the_algorithms() -> None:
    class Own(Net):
        def configure_gradient_clipping(self, optimizer: Any, *_: Any) -> None:
            self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="nrom")

    with pytest.raises(MisconfigurationException, match="gradient_clip_algorithm='nrom'.*'norm'"):
        trainer().fit(Own())


def test_zeroed_gradients_keep_momentum_going() -> None:
    class Own(Net):
        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
            optimizer.zero_grad(set_to_none=False)

    def some(self: Net, batch: Any, i: int) -> Tensor | None:
        return self.loss(batch) if i < 2 else None

    moved, still = Own(some), Net(some)
    for net in (moved, still):
        trainer().fit(net)
    batches = list(DataLoader(data(), batch_size=2))
    assert torch.equal(weights(still), by_hand(batches[:2]))
    assert not torch.equal(weights(moved), weights(still))


def test_an_own_backward_may_take_any_loss() -> None:
    class Own(Net):
        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            loss.backward(torch.full_like(loss, 0.5), *args, **kwargs)

    net = Own(lambda self, batch, i: (self.head(self.body(batch[0])) - batch[1]).square().flatten())
    trainer().fit(net)
    torch.testing.assert_close(weights(net), by_hand(), rtol=1e-5, atol=1e-6)


def test_every_optimizer_of_torch_equals_the_plain_loop() -> None:
    makes = [
        lambda net: Adam(net.parameters(), lr=0.05, amsgrad=True),
        lambda net: torch.optim.AdamW(net.parameters(), lr=0.05, fused=True),
        lambda net: torch.optim.RMSprop(net.parameters(), lr=0.01, foreach=True),
        lambda net: SGD([{"params": net.body.parameters(), "lr": 0.1}, {"params": net.head.parameters()}], lr=0.01),
    ]
    for make in makes:

        class Own(Net):
            def configure_optimizers(self, make: Any = make) -> Any:
                return make(self)

        net = Own()
        trainer().fit(net)
        assert torch.equal(weights(net), by_hand(optimizer=make))


def test_without_an_optimizer_nothing_moves() -> None:
    class Bare(Net):
        def configure_optimizers(self) -> None:
            return None

    net = Bare()
    before = weights(net)
    with pytest.warns(LeydenWarning, match=r"configure_optimizers\(\) returned `None`"):
        trainer(gradient_clip_val=1.0).fit(net)
    assert torch.equal(weights(net), before)


# ------------------------------------------------------------------ numbers that are not finite


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled", "ignore:Error detected in")
def test_detect_anomaly_names_the_operation() -> None:
    with pytest.raises(RuntimeError, match="SqrtBackward.*nan"):
        trainer(detect_anomaly=True).fit(Net(lambda self, batch, i: (self.loss(batch) * 0 - 0.0).sqrt() * 0))
    assert not torch.is_anomaly_enabled()


def test_early_stopping_stops_at_a_loss_that_is_not_finite() -> None:
    def step(self: Net, batch: Any, i: int) -> Tensor:
        loss = self.loss(batch) * (float("nan") if self.current_epoch == 1 else 1.0)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    stop = EarlyStopping("loss", check_finite=True)
    made = trainer(max_epochs=5, callbacks=[stop])
    made.fit(Net(step))
    assert made.current_epoch == 2
    assert "not finite" in (stop.stopping_reason_message or "")


# ------------------------------------------------------------------ precision


@pytest.mark.parametrize(
    ("precision", "stored", "computed"),
    [
        ("32-true", torch.float32, torch.float32),
        ("64-true", torch.float64, torch.float64),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
        ("16-true", torch.float16, torch.float16),
        ("bf16-mixed", torch.float32, torch.bfloat16),
    ],
)
def test_weights_and_activations_of_each_precision(precision: str, stored: Any, computed: Any) -> None:
    seen = set()

    class Looks(Net):
        def loss(self, batch: Any) -> Tensor:
            seen.add((self.head.weight.dtype, self.head(self.body(batch[0])).dtype, torch.get_default_dtype()))
            return super().loss(batch)

    net = Looks()
    before = weights(net)
    trainer(precision=precision).fit(net)
    assert not torch.equal(weights(net), before)
    inside = stored if precision.endswith("true") else torch.float32
    assert seen == {(stored, computed, inside)}
    assert torch.get_default_dtype() is torch.float32


def test_16_mixed_falls_back_on_a_cpu() -> None:
    with pytest.warns(LeydenWarning, match="using 'bf16-mixed'"):
        made = trainer(precision="16-mixed")
    assert made.precision == "bf16-mixed"
    made.fit(Net())


# ------------------------------------------------------------------ the Trainer's list


def test_optimizers_may_be_exchanged_before_the_first_batch() -> None:
    class Own(Net):
        def on_train_start(self) -> None:
            self.trainer.optimizers = [Adam(self.parameters(), lr=0.05)]

    net = Own()
    made = trainer()
    made.fit(net)
    assert torch.equal(weights(net), by_hand(optimizer=lambda net: Adam(net.parameters(), lr=0.05)))
    assert made.global_step == 6


def test_optimizers_are_there_after_the_fit() -> None:
    net = Net()
    made = trainer()
    made.fit(net)
    assert isinstance(net.optimizers(), SGD)
    assert net.optimizers(use_pl_optimizer=False) is made.optimizers[0]


# ------------------------------------------------------------------ optimizers of all kinds


class PassesOn:
    """A wrapper that has no verb of its own: it hands on what it is asked for."""

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["wrapped"], name)


def test_a_wrapper_that_passes_everything_on_is_an_optimizer() -> None:
    net = Net()
    net.configure_optimizers = lambda: PassesOn(SGD(net.parameters(), lr=0.05, momentum=0.9))  # type: ignore[method-assign]
    trainer().fit(net)
    assert torch.equal(weights(net), by_hand())


def test_a_profiler_sees_the_gradients_cleared_and_the_step() -> None:
    with torch.profiler.profile() as profile:
        trainer(limit_train_batches=2).fit(Net())
    counts = {event.key: event.count for event in profile.key_averages() if event.key.startswith("Optimizer.")}
    assert counts == {"Optimizer.zero_grad#SGD.zero_grad": 2, "Optimizer.step#SGD.step": 2}
