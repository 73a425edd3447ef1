# SPDX-License-Identifier: Apache-2.0
"""``strategy="fsdp"``: each process has a share of the weights, and the numbers are those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

import leyden as L
from leyden.strategies.fsdp import FSDPStrategy
from ranks import data, make_trainer, on_ranks


class Block(nn.Module):
    """A layer that repeats."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.tanh(self.first(x)))


class Deep(L.LightningModule):
    """Blocks between two layers of their own, with weights of every kind that layers can have."""

    def __init__(self, optimizer: str = "sgd", width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.kind = optimizer
        self.enter = nn.Linear(4, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.leave = nn.Linear(width, 1)
        self.scale = nn.Parameter(torch.tensor(1.5))  # a scalar, which cannot be shared out
        self.shift = nn.Parameter(torch.zeros(3))  # used as it is, by no layer
        self.register_buffer("seen", torch.zeros(()))
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.rates: list[float] = []
        self.evaluated: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.leave(x) * self.scale + self.shift.sum()

    def loss(self, batch: Any) -> Tensor:
        return (self(batch[0]) - batch[1]).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.seen += 1
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.losses.append(loss.item())
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluated += batch[2].tolist()
        self.log("val", self.loss(batch))
        self.log("count", float(len(batch[0])), reduce_fx="sum")

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return torch.cat([self(batch[0]), batch[2][:, None]], 1)

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
        norm = self.trainer.strategy.clip_gradients(optimizer, gradient_clip_val or 1e9, gradient_clip_algorithm or "norm")
        if norm is not None:
            assert not isinstance(norm, DTensor)
            self.norms.append(norm.item())

    def configure_optimizers(self) -> Any:
        if self.kind == "adam":
            optimizer: Any = torch.optim.Adam(self.parameters(), 0.01)
        else:
            optimizer = torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.004, 50), "interval": "step"}]


def by_blocks(**arguments: Any) -> FSDPStrategy:
    return FSDPStrategy(auto_wrap_policy={Block}, **arguments)


def weights(module: nn.Module) -> Tensor:
    assert not any(isinstance(p, DTensor) for p in module.parameters())
    return torch.cat([p.detach().reshape(-1).float() for p in module.parameters()])


def train(devices: int, strategy: str, kind: str, options: dict[str, Any], made: Any = Deep) -> Any:
    """Fit 20 global batches of 8 samples in 4 epochs, with validation; return all its numbers."""
    L.seed_everything(11, verbose=False)
    module, loader = made(kind), DataLoader(data(40), 8 // devices, shuffle=True)
    named: Any = by_blocks() if strategy == "blocks" else strategy
    trainer = make_trainer(devices, strategy=named, max_epochs=4, log_every_n_steps=1, **options)
    trainer.fit(module, loader, DataLoader(data(13), 3))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    rows = [dict(row) for row in trainer.history]
    return module.losses, module.norms, module.rates, weights(module), metrics, rows, float(module.seen)


def same(one: Any, ranks: list[Any], tolerance: float = 1e-5) -> None:
    """Compare the numbers of one process with those of several."""
    losses, norms, rates, values, metrics, rows, seen = one
    means = [sum(step) / len(ranks) for step in zip(*(rank[0] for rank in ranks), strict=True)]
    assert means == pytest.approx(losses, abs=tolerance)  # F1
    for rank in ranks:
        assert rank[1] == pytest.approx(norms, abs=tolerance)  # F2
        assert rank[2] == rates  # SC3
        assert torch.allclose(rank[3], values, atol=tolerance)
        assert rank[4] == pytest.approx(metrics, abs=tolerance)  # M1, M5
        assert rank[6] == seen
        for row, theirs in zip(rows, rank[5], strict=True):
            assert theirs == pytest.approx(row, abs=tolerance)


CASES = [
    pytest.param("sgd", {}, id="sgd"),
    pytest.param("adam", {}, id="adam"),
    pytest.param("sgd", {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3}, id="accumulated and clipped"),
    pytest.param("adam", {"accumulate_grad_batches": 3, "gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
                 id="a short window, clipped by value"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_f1_f2_f4_sc3_m1_m5_ddp_and_fsdp_give_the_numbers_of_one_process(kind: str, options: dict[str, Any]) -> None:
    one = train(1, "auto", kind, options)
    assert len(one[0]) == 20
    for strategy in ("ddp", "fsdp", "blocks"):
        same(one, on_ranks(2, train, 2, strategy, kind, options))


# ---------------------------------------------------------------------------------------------- what modules do


class Twice(Deep):
    """Runs forward twice for one loss."""

    def loss(self, batch: Any) -> Tensor:
        return (self(batch[0]) + self(-batch[0]) - batch[1]).square().mean()


class Frozen(Deep):
    """Trains the head and one block only."""

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__(optimizer)
        self.enter.requires_grad_(False)
        self.blocks[0].requires_grad_(False)


class Tied(Deep):
    """Two blocks are one; two more share a weight, and so do the layers around the blocks."""

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__(optimizer)
        self.blocks.append(self.blocks[0])
        self.blocks[1].first.weight = self.blocks[2].first.weight
        self.back = nn.Linear(6, 4)
        self.back.weight = nn.Parameter(self.enter.weight.detach().T.contiguous())
        self.again = nn.Linear(4, 6)
        self.again.weight = self.enter.weight

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + self.again(batch[0]).square().mean() + self.back(self.enter(batch[0])).square().mean()


class Direct(Deep):
    """Calls layers and uses weights in its steps, not in its forward."""

    def loss(self, batch: Any) -> Tensor:
        x = torch.nn.functional.linear(batch[0], self.enter.weight, self.enter.bias)
        x = self.blocks[2](self.blocks[0](x)) + self.shift.mean()
        return (self.leave(x) - batch[1]).square().mean()


class Compiled(Deep):
    """One block is compiled by the user."""

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__(optimizer)
        self.blocks[1] = torch.compile(self.blocks[1], backend="eager")  # type: ignore[call-overload]


class Weighs(Deep):
    """Says how much its batches weigh."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "num_items": len(batch[0])}


class Norms(Deep):
    """With batch norms, whose statistics are those of all ranks."""

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__(optimizer)
        self.blocks.insert(1, nn.BatchNorm1d(6))


class Saved(Deep):
    """A hook calls a layer by itself, and the module for a summary, between batches."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            self.leave(self.blocks[1](self.enter(batch[0])))
            self(batch[0])

    def on_fit_start(self) -> None:
        with torch.no_grad():
            self.blocks[1](self.enter(torch.zeros(2, 4)))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's compiler asks every tensor for it
@pytest.mark.parametrize("made", [Twice, Frozen, Tied, Direct, Compiled, Weighs, Norms, Saved])
def test_f5_whatever_a_module_does_with_its_layers_the_numbers_are_those_of_one_process(made: Any) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    if made is Norms:
        options["sync_batchnorm"] = True
    kind = "sgd" if made is Norms else "adam"  # Adam makes steps of rounding errors, where a norm makes a bias void
    one = train(1, "auto", kind, options, made)
    for strategy in ("fsdp", "blocks"):
        same(one, on_ranks(2, train, 2, strategy, kind, options, made))


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("strategy", ["fsdp", "blocks"])
def test_f5_steps_that_the_trainer_compiles(strategy: str) -> None:
    options: dict[str, Any] = {"compile": {"backend": "eager"}, "accumulate_grad_batches": 2}
    one = train(1, "auto", "sgd", {"accumulate_grad_batches": 2})
    same(one, on_ranks(2, train, 2, strategy, "sgd", options))


class Gan(L.LightningModule):
    """Two networks, two optimizers, by hand: with blocks, or without; with the users' usual calls."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        torch.manual_seed(5)
        self.automatic_optimization = False
        self.kind = kind
        self.generator = nn.Sequential(nn.Linear(4, 6), Block(6), nn.Linear(6, 4))
        self.critic = nn.Sequential(nn.Linear(4, 6), Block(6), nn.Linear(6, 1))
        self.losses: list[float] = []
        self.norms: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, one, two = batch[0], *self.optimizers()
        sigmoid = torch.nn.functional.binary_cross_entropy_with_logits
        self.toggle_optimizer(one)
        loss = sigmoid(self.critic(self.generator(x)), torch.ones(len(x), 1))
        if self.kind == "direct":
            loss.backward()
        else:
            self.manual_backward(loss)
        assert all(p.grad is None for group in two.param_groups for p in group["params"]) or batch_idx
        self.clip_gradients(one, 0.1)
        one.step()
        one.zero_grad()
        self.untoggle_optimizer(one)
        self.toggle_optimizer(two)
        for part in (x, self.generator(x).detach()):  # two backwards for one step
            wanted = torch.full((len(x), 1), float(part is x))
            other = sigmoid(self.critic(part), wanted)
            self.manual_backward(other)
            self.losses.append(other.item())
        two.step()
        two.zero_grad()
        self.untoggle_optimizer(two)
        self.losses.append(loss.item())

    def configure_optimizers(self) -> Any:
        return (
            torch.optim.Adam(self.generator.parameters(), 0.01),
            torch.optim.SGD(self.critic.parameters(), 0.01, momentum=0.9),
        )


def train_gan(devices: int, strategy: str, kind: str) -> Any:
    L.seed_everything(11, verbose=False)
    module, named = Gan(kind), by_blocks() if strategy == "blocks" else strategy
    trainer = make_trainer(devices, strategy=named, max_epochs=2)
    trainer.fit(module, DataLoader(data(40), 8 // devices, shuffle=True))
    return module.losses, weights(module), trainer.global_step


@pytest.mark.parametrize(("strategy", "kind"), [("fsdp", ""), ("blocks", ""), ("fsdp", "direct"), ("blocks", "direct")])
def test_f1_f5_z3_a_gan_by_hand(strategy: str, kind: str) -> None:
    losses, values, steps = train_gan(1, "auto", kind)
    ranks = on_ranks(2, train_gan, 2, strategy, kind)
    assert [sum(pair) / 2 for pair in zip(ranks[0][0], ranks[1][0], strict=True)] == pytest.approx(losses, abs=1e-5)
    for rank in ranks:
        assert torch.allclose(rank[1], values, atol=1e-5)
        assert rank[2] == steps


class Several(Deep):
    """Two optimizers, automatically: on one loss, a loss each, or a call each."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return [loss, loss * 0.5 + self.blocks[2](self.enter(batch[0])).square().mean()] if self.kind == "list" else loss

    def configure_optimizers(self) -> Any:
        own = [*self.blocks[1].parameters(), *self.leave.parameters()]
        ids = {id(p) for p in own}
        rest = [p for p in self.parameters() if id(p) not in ids]
        return torch.optim.Adam(rest, 0.01), torch.optim.SGD(own, 0.001, momentum=0.9)


class Indexed(Several):
    """A call for each optimizer, which alone requires gradients."""

    def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:  # type: ignore[override]
        return Deep.training_step(self, batch, batch_idx) * (1 + optimizer_idx)


class Closure(Deep):
    """Overrides optimizer_step, so that the step runs inside the optimizer's."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)


@pytest.mark.parametrize(
    ("made", "kind"), [(Several, "one"), (Several, "list"), (Indexed, "one"), (Closure, "adam")]
)
def test_f1_f5_other_ways_to_train_a_batch(made: Any, kind: str) -> None:
    options = {"accumulate_grad_batches": 2}
    one = train(1, "auto", kind, options, made)
    for strategy in ("fsdp", "blocks"):
        same(one, on_ranks(2, train, 2, strategy, kind, options, made))


class Skips(Deep):
    """Rank 1 has nothing to learn in some steps: before, or after its forward."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        skips = self.trainer.global_rank == 1 and batch_idx in (1, 2)
        if skips and self.kind == "before":
            return None
        loss = super().training_step(batch, batch_idx)
        return None if skips and self.kind == "after" else loss


def skip(strategy: str, kind: str) -> Any:
    L.seed_everything(11, verbose=False)
    module, named = Skips(kind), by_blocks() if strategy == "blocks" else strategy
    make_trainer(2, strategy=named, max_epochs=1).fit(module, DataLoader(data(40), 4), DataLoader(data(3), 3))
    return weights(module)


@pytest.mark.filterwarnings("ignore:.*returned None")
@pytest.mark.parametrize("kind", ["before", "after"])
def test_d3_a_step_that_returns_none_on_one_rank_counts_with_gradients_of_zero(kind: str) -> None:
    reference = on_ranks(2, skip, "ddp", kind)
    for strategy in ("fsdp", "blocks"):
        for rank in on_ranks(2, skip, strategy, kind):
            assert torch.allclose(rank, reference[0], atol=1e-5)
