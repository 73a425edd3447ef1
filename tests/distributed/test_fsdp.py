# SPDX-License-Identifier: Apache-2.0
"""``strategy="fsdp"``: each process has a share of the weights, and the numbers are those of one process."""

from __future__ import annotations

import contextlib
import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffload, MixedPrecisionPolicy, ShardingStrategy
from torch.distributed.fsdp import MixedPrecision as MixedPrecision1
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

import leyden as L
from leyden.errors import CheckpointError, MisconfigurationException
from leyden.precision.mixed import MixedPrecision
from leyden.strategies import mesh
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
        norm = self.trainer.strategy.clip_gradients(
            optimizer, gradient_clip_val or 1e9, gradient_clip_algorithm or "norm"
        )
        if norm is not None:
            assert not isinstance(norm, DTensor)
            self.norms.append(norm.item())

    def configure_optimizers(self) -> Any:
        if self.kind == "adam":
            optimizer: Any = torch.optim.Adam(self.parameters(), 0.01)
        else:
            optimizer = torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.004, 50), "interval": "step"}
        ]


def by_blocks(**arguments: Any) -> FSDPStrategy:
    return FSDPStrategy(**{"auto_wrap_policy": {Block}, **arguments})


def weights(module: nn.Module) -> Tensor:
    assert not any(isinstance(p, DTensor) for p in module.parameters())
    return torch.cat([p.detach().reshape(-1).float() for p in module.parameters()])


def train(devices: int, strategy: str, kind: str, options: dict[str, Any], made: Any = Deep) -> Any:
    """Fit 20 global batches of 8 samples in 4 epochs, with validation; return all its numbers."""
    L.seed_everything(11, verbose=False)
    module, loader = made(kind), DataLoader(data(40), 8 // devices, shuffle=True)
    named: Any = by_blocks() if strategy == "blocks" else strategy
    trainer = make_trainer(devices, strategy=named, log_every_n_steps=1, **{"max_epochs": 4, **options})
    trainer.fit(module, loader, DataLoader(data(13), 3))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    rows = [dict(row) for row in trainer.history]
    return module.losses, module.norms, module.rates, weights(module), metrics, rows, float(module.seen)


def train_each(devices: int, strategies: tuple[Any, ...], *rest: Any) -> Any:
    """The same under several strategies, one after the other in the same processes."""
    return [train(devices, by_blocks(**one) if isinstance(one, dict) else one, *rest) for one in strategies]


def compare(one: Any, devices: int, strategies: tuple[Any, ...], *rest: Any) -> None:
    """Compare the numbers of one process with those of several, under each of some strategies."""
    for ranks in zip(*on_ranks(devices, train_each, devices, strategies, *rest), strict=True):
        same(one, list(ranks))


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
    pytest.param("sgd", {}, id="sgd", marks=pytest.mark.slow),
    pytest.param("adam", {}, id="adam", marks=pytest.mark.slow),
    pytest.param("sgd", {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3}, id="accumulated and clipped"),
    pytest.param("adam", {"accumulate_grad_batches": 3, "gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
                 id="a short window, clipped by value"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_f1_f2_f4_sc3_m1_m5_ddp_and_fsdp_give_the_numbers_of_one_process(kind: str, options: dict[str, Any]) -> None:
    one = train(1, "auto", kind, options)
    assert len(one[0]) == 20
    compare(one, 2, ("ddp", "fsdp", "blocks"), kind, options)


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
        return (
            super().loss(batch) + self.again(batch[0]).square().mean() + self.back(self.enter(batch[0])).square().mean()
        )


class Direct(Deep):
    """Calls layers and uses weights in its steps, not in its forward; two of them it leaves out."""

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__(optimizer)
        self.blocks[1].requires_grad_(False)
        self.scale.requires_grad_(False)

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
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "max_epochs": 2}
    if made is Norms:
        options["sync_batchnorm"] = True
    kind = "sgd" if made is Norms else "adam"  # Adam makes steps of rounding errors, where a norm makes a bias void
    one = train(1, "auto", kind, options, made)
    compare(one, 2, ("fsdp", "blocks"), kind, options, made)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("strategy", ["fsdp", "blocks"])
def test_f5_steps_that_the_trainer_compiles(strategy: str) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "max_epochs": 2}
    one = train(1, "auto", "sgd", options)
    compare(one, 2, (strategy,), "sgd", {**options, "compile": {"backend": "eager"}})


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


GANS = [("fsdp", ""), ("blocks", ""), ("fsdp", "direct"), ("blocks", "direct")]


def train_gans() -> Any:
    return [train_gan(2, *how) for how in GANS]


def test_f1_f5_z3_a_gan_by_hand() -> None:
    losses, values, steps = train_gan(1, "auto", "")
    for ranks in zip(*on_ranks(2, train_gans), strict=True):
        check_gan(losses, values, steps, ranks)


def check_gan(losses: list[float], values: Tensor, steps: int, ranks: Any) -> None:
    assert [sum(pair) / 2 for pair in zip(ranks[0][0], ranks[1][0], strict=True)] == pytest.approx(losses, abs=1e-5)
    for rank in ranks:
        assert torch.allclose(rank[1], values, atol=1e-5)
        assert rank[2] == steps


class Several(Deep):
    """Two optimizers, automatically: on one loss, a loss each, or a call each."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return (
            [loss, loss * 0.5 + self.blocks[2](self.enter(batch[0])).square().mean()] if self.kind == "list" else loss
        )

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


@pytest.mark.parametrize(("made", "kind"), [(Several, "one"), (Several, "list"), (Indexed, "one"), (Closure, "adam")])
def test_f1_f5_other_ways_to_train_a_batch(made: Any, kind: str) -> None:
    options = {"accumulate_grad_batches": 2, "max_epochs": 2}
    one = train(1, "auto", kind, options, made)
    compare(one, 2, ("fsdp", "blocks"), kind, options, made)


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
    for reference, *others in on_ranks(2, skip_each, kind):
        for other in others:
            assert torch.allclose(other, reference, atol=1e-5)


def skip_each(kind: str) -> Any:
    return [skip(strategy, kind) for strategy in ("ddp", "fsdp", "blocks")]


# ---------------------------------------------------------------------------------------------- memory


class Looks(Deep):
    """Counts, in the middle of a fit, what this process holds."""

    def __init__(self, kind: str = "adam") -> None:
        super().__init__(kind, 8)
        self.held: list[tuple[int, int, int]] = []
        self.types: set[type] = set()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        spread = [p for p in self.parameters() if isinstance(p, DTensor)]
        states = [s for p, s in optimizer.state.items() if isinstance(p, DTensor)]
        self.held.append(
            (
                sum(p.to_local().numel() for p in spread),
                sum(p.grad.to_local().numel() for p in spread),  # type: ignore[union-attr]
                sum(s["exp_avg"].to_local().numel() + s["exp_avg_sq"].to_local().numel() for s in states),
            )
        )
        self.types = {type(p) for p in self.parameters() if p.dim()}


def look(shape: dict[str, Any], devices: int) -> Any:
    module = Looks()
    total = sum(p.numel() for p in module.parameters() if p.dim())
    strategy = by_blocks(**shape)
    make_trainer(devices, strategy=strategy, max_epochs=1).fit(module, DataLoader(data(16), 2), DataLoader(data(3), 3))
    return (
        total,
        module.held[-1],
        module.types,
        dict(zip(strategy.device_mesh.mesh_dim_names, strategy.device_mesh.shape, strict=True)),
    )


@pytest.mark.parametrize(
    ("devices", "shape", "copies"),
    [
        (2, {}, 1),
        (2, {"sharding_strategy": "SHARD_GRAD_OP"}, 1),
        (2, {"sharding_strategy": "NO_SHARD"}, 2),
        (4, {"sharding_strategy": "HYBRID_SHARD", "device_mesh": (2, 2)}, 2),
    ],
    ids=["full", "grad op", "none", "hybrid"],
)
def test_f4_each_rank_holds_its_share_of_weights_gradients_and_optimizer_state(
    devices: int, shape: dict[str, Any], copies: int
) -> None:
    for total, (held, gradients, states), types, sizes in on_ranks(devices, look, shape, devices):
        share = total * copies / devices
        assert share * 0.8 <= held <= share * 1.2  # what does not divide evenly is on the first ranks
        assert gradients == held
        assert states == 2 * held
        assert types == {DTensor} or all(issubclass(kind, DTensor) for kind in types)
        assert sizes["data_parallel"] == devices // copies


WAYS: dict[int, tuple[dict[str, Any], ...]] = {
    1: ({}, {"sharding_strategy": "HYBRID_SHARD"}),
    2: (
        {"sharding_strategy": "SHARD_GRAD_OP"},
        {"sharding_strategy": "NO_SHARD"},
        {"cpu_offload": True},
        {"activation_checkpointing_policy": {Block}},
        {"activation_checkpointing_policy": {nn.Linear}, "sharding_strategy": "SHARD_GRAD_OP"},
        {"auto_wrap_policy": lambda layer: isinstance(layer, nn.Linear)},
        {"ignored_modules": []},
    ),
    4: ({"sharding_strategy": "HYBRID_SHARD", "device_mesh": (2, 2)},),
}


@pytest.mark.parametrize("devices", WAYS)
def test_f1_every_way_to_shard_gives_the_numbers_of_one_process(devices: int) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "max_epochs": 2}
    compare(train(1, "auto", "adam", options), devices, WAYS[devices], "adam", options)


# ---------------------------------------------------------------------------------------------- a run, and after it


def lives(strategy: str) -> Any:
    L.seed_everything(11, verbose=False)
    module, loader = Deep("adam"), DataLoader(data(16), 2)
    named: Any = by_blocks() if strategy == "blocks" else strategy
    trainer = make_trainer(2, strategy=named, max_epochs=1)
    x = torch.ones(2, 4)
    found = []
    trainer.fit(module, loader, DataLoader(data(3), 3))
    assert type(module) is Deep
    assert type(module.blocks[0]) is Block
    if trainer.global_rank == 0:  # alone: the others do not wait
        found.append(module(x).detach())
        assert list(module.state_dict()) == list(Deep().state_dict())
        copy.deepcopy(module)
    state = trainer.optimizers[0].state_dict()["state"]
    assert state[2]["exp_avg"].shape == module.enter.weight.shape
    found.append(trainer.test(module, DataLoader(data(13), 3), verbose=False)[0]["val"])
    predicted = trainer.predict(module, DataLoader(data(5), 2))
    assert predicted is not None
    found.append(torch.cat(list(predicted)) if predicted else torch.zeros(0, 5))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader, DataLoader(data(3), 3))  # goes on
    found.append(weights(module))
    trainer.validate(module, DataLoader(data(7), 2), verbose=False)
    found.append(trainer.callback_metrics["val"])
    assert not [p for p in module.parameters() if p.is_inference()]
    make_trainer(1, strategy="single_device", max_epochs=1).fit(module, loader, DataLoader(data(3), 3))
    return found, trainer.global_step


def lives_each() -> Any:
    return [lives(strategy) for strategy in ("ddp", "fsdp", "blocks")]


def test_t1_fit_test_predict_fit_and_a_plain_module_after_each() -> None:
    for rank in on_ranks(2, lives_each):
        for strategy in rank[1:]:
            check_lives(rank[0], strategy)


def check_lives(ddp: Any, sharded: Any) -> None:
    for (theirs, steps), (mine, my_steps) in zip([ddp], [sharded], strict=True):
        assert steps == my_steps == 8
        for one, two in zip(theirs, mine, strict=True):
            assert torch.allclose(torch.as_tensor(one), torch.as_tensor(two), atol=1e-5)


class Listens(Deep):
    """Looks at everything in its evaluation, of two loaders."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return super().predict_step(batch, batch_idx)


def evaluate(shape: dict[str, Any]) -> Any:
    found = []
    for counts in ((1, 7), (3, 1), (13, 2), (12, 12)):
        L.seed_everything(1, verbose=False)
        module, trainer = Listens(), make_trainer(2, strategy=by_blocks(**shape))
        loaders = [DataLoader(data(count), 2) for count in counts]
        values = trainer.validate(module, loaders, verbose=False)
        seen = list(module.evaluated)
        module.evaluated.clear()
        predicted = trainer.predict(module, loaders)
        assert predicted is not None
        found.append((values, seen, [row for loader in predicted for batch in loader for row in batch.tolist()]))
    return found


@pytest.mark.parametrize("shape", [{}, {"sharding_strategy": "SHARD_GRAD_OP"}], ids=["full", "grad op"])
def test_m1_m5_an_evaluation_of_which_a_rank_has_fewer_batches_or_none(shape: dict[str, Any]) -> None:
    ranks = on_ranks(2, evaluate, shape)
    for index, counts in enumerate(((1, 7), (3, 1), (13, 2), (12, 12))):
        L.seed_everything(1, verbose=False)
        expected = make_trainer(1).validate(Listens(), [DataLoader(data(c), 2) for c in counts], verbose=False)
        zero, one = ranks[0][index], ranks[1][index]
        assert sorted(zero[1] + one[1]) == sorted([*range(counts[0]), *range(counts[1])])
        assert len(zero[2]) + len(one[2]) == sum(counts)
        for rank in (zero, one):
            for values, theirs in zip(expected, rank[0], strict=True):
                assert theirs == pytest.approx(values, abs=1e-5)


# ---------------------------------------------------------------------------------------------- checkpoints


class Records(Deep):
    """Draws random numbers in its steps, and remembers the samples."""

    def __init__(self, kind: str = "adam") -> None:
        super().__init__(kind)
        self.samples: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.samples.append(batch[2].tolist())
        return super().training_step([batch[0] + 0.1 * torch.rand_like(batch[0]), *batch[1:]], batch_idx)


def go_on(devices: int, strategy: str, path: str | None, save: str | None, options: dict[str, Any]) -> Any:
    """Train up to batch ``options["stop"]``, or from ``path`` to the end; save where it stands."""
    L.seed_everything(11, verbose=False)
    options = dict(options)
    stop, made = options.pop("stop", None), options.pop("made", Records)
    module = made("adam")
    named: Any = by_blocks() if strategy == "blocks" else strategy
    callbacks = [] if stop is None else [_Saves(stop, save)]
    trainer = make_trainer(devices, strategy=named, max_epochs=2, callbacks=callbacks, **options)
    loader = DataLoader(data(40), 8 // devices, shuffle=True)
    trainer.fit(module, loader, DataLoader(data(6), 6 // devices), ckpt_path=path)
    return module.samples, module.losses, weights(module), trainer.global_step


class _Saves(L.Callback):
    """Saves after some batch, and goes on."""

    def __init__(self, batch: int, path: str | None) -> None:
        self.batch, self.path = batch, path

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.progress.batches == self.batch:
            trainer.save_checkpoint(self.path)


def resume(strategy: str, folder: str, stop: int) -> Any:
    path, options = f"{folder}/{strategy}.ckpt", {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    whole = go_on(2, strategy, None, path, {**options, "stop": stop})
    return whole, go_on(2, strategy, path, None, options)


@pytest.mark.parametrize(("strategy", "stop"), [("fsdp", 4), ("blocks", 3)])
def test_r4_a_run_goes_on_exactly_also_inside_a_window_of_accumulation(tmp_path: Any, strategy: str, stop: int) -> None:
    for rank, resumed in on_ranks(2, resume, strategy, str(tmp_path), stop):
        assert resumed[0] == rank[0][stop:]
        assert resumed[1] == rank[1][stop:]
        assert torch.equal(resumed[2], rank[2])
        assert resumed[3] == rank[3]


@pytest.mark.filterwarnings("ignore:.*was written by")
def test_f3_a_full_checkpoint_goes_on_under_every_strategy_and_back(tmp_path: Any) -> None:
    path, options = str(tmp_path / "a.ckpt"), {"gradient_clip_val": 0.5, "made": Deep2}
    written = on_ranks(2, go_on, 2, "blocks", None, path, {**options, "stop": 4})
    state = torch.load(path, weights_only=True)
    assert list(state["state_dict"]) == list(Deep2().state_dict())
    assert not any(isinstance(value, DTensor) for value in state["state_dict"].values())
    moments = state["optimizer_states"][0]["state"][2]
    assert moments["exp_avg"].shape == (6, 4)
    cases = ((1, ("auto", "fsdp")), (2, ("ddp", "fsdp")))
    for devices, strategies in cases:
        # gone on with by these, which write in their turn
        for rank in on_ranks(devices, go_on_each, devices, strategies, path, str(tmp_path), options):
            for _, _, values, steps in rank:
                assert torch.allclose(values, written[0][2], atol=1e-5)
                assert steps == written[0][3]
    paths = [str(tmp_path / f"{strategy}{devices}.ckpt") for devices, strategies in cases for strategy in strategies]
    for rank in on_ranks(2, go_on_from, paths, options):
        for _, _, values, _ in rank:
            assert torch.allclose(values, written[0][2], atol=1e-5)


def go_on_each(devices: int, strategies: tuple[str, ...], path: str, folder: str, options: Any) -> Any:
    for strategy in strategies:
        go_on(devices, strategy, None, f"{folder}/{strategy}{devices}.ckpt", {**options, "stop": 5})
    return [go_on(devices, strategy, path, None, options) for strategy in strategies]


def go_on_from(paths: list[str], options: Any) -> Any:
    return [go_on(2, "blocks", path, None, options) for path in paths]


class Deep2(Records):
    """Draws no random numbers, so that any number of processes gives the same."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.samples.append(batch[2].tolist())
        return Deep.training_step(self, batch, batch_idx)


# ---------------------------------------------------------------------------------------------- how it is built


class Later(L.LightningModule):
    """Builds its layers in configure_model, on the meta device or not."""

    kind = ""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.kind = kind
        self.held: list[int] = []
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if hasattr(self, "blocks"):
            return
        torch.manual_seed(9)
        with torch.device("meta") if self.kind == "meta" else contextlib.nullcontext():
            self.enter = nn.Linear(4, 6)
            self.blocks = nn.Sequential(Block(6), nn.LayerNorm(6), Block(6))
            self.leave = nn.Linear(6, 4)
            self.again = nn.Linear(4, 6)
            self.again.weight = self.enter.weight

    def setup(self, stage: str) -> None:
        assert self.device_mesh is None or tuple(self.device_mesh.mesh_dim_names) == ("data_parallel",)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = (self.leave(self.blocks(self.enter(batch[0])) + self.again(batch[0])) - batch[1]).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        assert self.again.weight is self.enter.weight
        assert len(list(self.parameters())) == 15
        return torch.optim.SGD(self.parameters(), 0.01)


def build(devices: int, kind: str, strategy: str, path: str | None) -> Any:
    L.seed_everything(3, verbose=False)
    module = Later(kind)
    named: Any = by_blocks() if strategy == "blocks" else strategy
    trainer = make_trainer(devices, strategy=named, max_epochs=1 if path is None else 2)
    trainer.fit(module, DataLoader(data(24), 8 // devices), ckpt_path=path)
    return module.losses, weights(module)


@pytest.mark.parametrize("kind", ["", "meta"])
def test_f1_layers_that_are_built_in_configure_model_begin_with_the_values_of_one_process(kind: str) -> None:
    losses, values = build(1, "", "auto", None)
    for mine, theirs in on_ranks(2, build, 2, kind, "blocks", None):
        assert len(mine) == len(losses)
        assert torch.allclose(theirs, values, atol=1e-5)


class Nameless(nn.Module):
    """Has a parameter of its own, and does not say what its first values are."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class LaterNameless(Deep):
    """Builds one such layer on the meta device."""

    def configure_model(self) -> None:
        with torch.device("meta"):
            self.extra = Nameless()


def build_nameless(path: str | None) -> Any:
    module = LaterNameless()
    if path is None:
        with pytest.raises(MisconfigurationException, match="Nameless was built on the meta device"):
            make_trainer(1, strategy="fsdp", max_epochs=1).fit(module, DataLoader(data(8), 4), DataLoader(data(2), 2))
        return None
    make_trainer(1, strategy="fsdp").test(module, DataLoader(data(8), 4), ckpt_path=path, verbose=False)
    return module.extra.factor.tolist()


def test_f3_layers_on_the_meta_device_get_their_values_from_a_checkpoint(tmp_path: Any) -> None:
    on_ranks(1, build_nameless, None)
    module = LaterNameless()
    module.extra = Nameless()
    with torch.no_grad():
        module.extra.factor.fill_(3.0)
    torch.save({"state_dict": module.state_dict(), "epoch": 0, "global_step": 0}, tmp_path / "a.ckpt")
    assert on_ranks(1, build_nameless, str(tmp_path / "a.ckpt")) == [[3.0] * 4]


class Resizes(Deep):
    """Changes its layers to what a checkpoint holds, before the weights come."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        width = checkpoint["state_dict"]["leave.weight"].shape[0]
        self.leave = nn.Linear(6, width)


def load_resized(path: str, strict: bool) -> Any:
    module = Resizes() if strict else Deep()
    trainer = make_trainer(2, strategy=by_blocks())
    if strict:
        trainer.test(module, DataLoader(data(8), 2), ckpt_path=path, verbose=False)
        return module.leave.weight.shape
    with pytest.raises(CheckpointError, match="leave.weight: \\(2, 6\\) in the file, \\(1, 6\\) in the model"):
        trainer.test(module, DataLoader(data(8), 2), ckpt_path=path, verbose=False)
    return None


def test_f3_a_module_may_change_itself_to_fit_a_checkpoint_and_what_does_not_fit_is_listed(tmp_path: Any) -> None:
    module = Deep()
    module.leave = nn.Linear(6, 2)
    torch.save({"state_dict": module.state_dict(), "epoch": 0, "global_step": 0}, tmp_path / "a.ckpt")
    assert on_ranks(2, load_resized, str(tmp_path / "a.ckpt"), True) == [torch.Size([2, 6])] * 2
    assert on_ranks(2, load_resized, str(tmp_path / "a.ckpt"), False) == [None, None]


# ---------------------------------------------------------------------------------------------- number formats


def train_in(devices: int, strategy: str, precision: str) -> Any:
    L.seed_everything(11, verbose=False)
    module = Deep("sgd")
    named: Any = by_blocks() if strategy == "blocks" else strategy
    if strategy == "given":
        named = by_blocks(mixed_precision=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    trainer = make_trainer(devices, strategy=named, max_epochs=2, precision=precision, accumulate_grad_batches=2)
    trainer.fit(module, DataLoader(data(40), 8 // devices, shuffle=True), DataLoader(data(3), 3))
    return module.losses, weights(module), {p.dtype for p in module.parameters()}


@pytest.mark.parametrize(
    ("precision", "strategy", "tolerance"),
    [
        ("bf16-mixed", "blocks", 1e-5),
        ("64-true", "blocks", 1e-9),
        ("bf16-true", "blocks", 2e-2),
        ("32-true", "given", 2e-2),
    ],
)
def test_f1_other_number_formats(precision: str, strategy: str, tolerance: float) -> None:
    reference = on_ranks(2, train_in, 2, "ddp", precision)
    for mine, theirs in zip(on_ranks(2, train_in, 2, strategy, precision), reference, strict=True):
        assert mine[0] == pytest.approx(theirs[0], abs=tolerance * 10, rel=0.05 if tolerance > 1e-3 else 1e-5)
        assert torch.allclose(mine[1], theirs[1], atol=tolerance)
        assert mine[2] == theirs[2]


def train_scaled(devices: int, strategy: str) -> Any:
    """float16 with loss scaling, as on a GPU: with a scale that is too large at first."""
    L.seed_everything(11, verbose=False)
    module = Deep("sgd")
    named: Any = by_blocks() if strategy == "blocks" else strategy
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**18))
    trainer = make_trainer(devices, strategy=named, max_epochs=2, plugins=precision, gradient_clip_val=0.5)
    trainer.fit(module, DataLoader(data(40), 8 // devices), DataLoader(data(3), 3))
    return weights(module), trainer.global_step, precision.state_dict()


def test_a1_a2_a_gradient_that_overflows_on_one_rank_skips_the_step_on_all() -> None:
    values, steps, state = train_scaled(1, "auto")
    assert 0 < steps < 10
    for mine, my_steps, my_state in on_ranks(2, train_scaled, 2, "blocks"):
        assert my_steps == steps
        assert my_state["scale"] == state["scale"]
        assert torch.allclose(mine, values, atol=1e-2)


# ---------------------------------------------------------------------------------------------- what is said of a mistake


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"shard_strategy": "FULL"}, "is not known.*Did you mean 'sharding_strategy'"),
        ({"sharding_strategy": "FULLSHARD"}, "Did you mean 'FULL_SHARD'"),
        ({"state_dict_type": "shards"}, "must be one of \\['full', 'sharded'\\]"),
        ({"auto_wrap_policy": 3}, "set of classes"),
        ({"auto_wrap_policy": {Block(2)}}, "which is no class of layers"),
        ({"activation_checkpointing_policy": {3}}, "activation_checkpointing_policy=.*holds 3"),
        ({"activation_checkpointing": [Block], "activation_checkpointing_policy": {Block}}, "both say the same"),
        ({"mixed_precision": "bf16"}, "MixedPrecisionPolicy"),
        ({"device_mesh": 4}, "how many copies"),
        ({"device_mesh": (2, 2)}, "is for 'HYBRID_SHARD'"),
        ({"use_orig_params": False}, "Leave it out"),
        ({"start_method": "thread"}, "must be one of"),
    ],
)
def test_arguments_that_cannot_be_are_errors_that_say_what_can(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(MisconfigurationException, match=says):
        FSDPStrategy(**arguments)


def test_arguments_of_torchs_first_fsdp_are_taken() -> None:
    strategy = FSDPStrategy(
        use_orig_params=True,
        sync_module_states=True,
        limit_all_gathers=True,
        activation_checkpointing=[Block],
        cpu_offload=CPUOffload(offload_params=True),
        mixed_precision=MixedPrecision1(param_dtype=torch.bfloat16, cast_forward_inputs=True),
        sharding_strategy=ShardingStrategy.SHARD_GRAD_OP,
    )
    assert strategy.cpu_offload
    assert strategy.sharding_strategy == "SHARD_GRAD_OP"
    assert strategy.mixed_precision == MixedPrecisionPolicy(torch.bfloat16, None, None, True)
    assert make_trainer(1, strategy="fsdp_cpu_offload").strategy.cpu_offload
    with pytest.raises(RuntimeError, match="from the beginning of a run"):
        _ = strategy.device_mesh


class Uncalled(Deep):
    """Uses a layer that is sharded by itself without calling it."""

    def loss(self, batch: Any) -> Tensor:
        return self.blocks[0].first(self.enter(batch[0])).square().mean()


def use_uncalled(shape: dict[str, Any], match: str) -> None:
    module = Uncalled()
    with pytest.raises((RuntimeError, MisconfigurationException), match=match):
        make_trainer(2, strategy=by_blocks(**shape), max_epochs=1).fit(
            module, DataLoader(data(8), 4), DataLoader(data(2), 1)
        )


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ({}, "a layer that is sharded by itself must be called"),
        ({"sharding_strategy": "HYBRID_SHARD", "device_mesh": (2, 2)}, "is 4 processes, but there are 2"),
    ],
)
def test_a_mistake_that_shows_in_a_run_is_explained(shape: dict[str, Any], match: str) -> None:
    on_ranks(2, use_uncalled, shape, match)


class Large(Deep):
    """Does not fit, says somebody."""


def stays(strategy: str) -> Any:
    mesh._free_memory = lambda: 1.0  # type: ignore[assignment]
    module, loader = Large("adam"), DataLoader(data(16), 2)
    trainer = make_trainer(2, strategy=by_blocks(), max_epochs=1)
    trainer.fit(module, loader, DataLoader(data(3), 3))
    assert all(isinstance(p, DTensor) for p in module.parameters() if p.dim())
    x = torch.ones(2, 4)
    alone = module(x).detach()  # on all ranks
    trainer.test(module, loader, verbose=False)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader, DataLoader(data(3), 3))
    mesh._free_memory = lambda: math.inf
    make_trainer(2, strategy="fsdp").test(module, loader, verbose=False)  # another strategy takes it as it is
    return weights(module), alone


def test_a_module_that_memory_does_not_hold_for_each_process_stays_spread_between_runs() -> None:
    ranks = on_ranks(2, stays, "")
    reference = on_ranks(2, twice)
    for values, alone in ranks:
        assert torch.allclose(values, reference[0][0], atol=1e-5)
        assert torch.allclose(alone, reference[0][1], atol=1e-5)


def twice() -> Any:
    module, loader = Large("adam"), DataLoader(data(16), 2)
    trainer = make_trainer(2, strategy="ddp", max_epochs=1)
    trainer.fit(module, loader, DataLoader(data(3), 3))
    alone = module(torch.ones(2, 4)).detach()
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader, DataLoader(data(3), 3))
    return weights(module), alone


class Chooses(Deep):
    """Each rank uses other parts of a layer."""

    def loss(self, batch: Any) -> Tensor:
        x = self.enter(batch[0])
        for block in self.blocks:
            x = block(x)
        used = self.leave.weight if self.trainer.global_rank == 0 else self.leave.bias[:, None]
        return (x.sum(1, keepdim=True) * used.sum() - batch[1]).square().mean()


def choose(strategy: str) -> Any:
    L.seed_everything(11, verbose=False)
    module = Chooses()
    named: Any = by_blocks(find_unused_parameters=True) if strategy == "blocks" else strategy
    make_trainer(2, strategy=named, max_epochs=1).fit(module, DataLoader(data(40), 4), DataLoader(data(4), 2))
    return weights(module)


def choose_each() -> Any:
    return choose("ddp_find_unused_parameters_true"), choose("blocks")


def test_d4_parameters_that_take_part_on_one_rank_only() -> None:
    for theirs, mine in on_ranks(2, choose_each):
        assert torch.allclose(mine, theirs, atol=1e-5)


class Fails(Deep):
    """Raises in the middle of a step, between layers that are together and layers that are not."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 2 and self.kind == "adam":
            self.blocks[0](self.enter(batch[0]))
            raise ValueError("in the middle")
        return super().training_step(batch, batch_idx)


def fail() -> Any:
    module, loader = Fails("adam"), DataLoader(data(16), 4)
    trainer = make_trainer(1, strategy=by_blocks(), max_epochs=1, fused_optimizers=True)
    with pytest.raises(ValueError, match="in the middle"):
        trainer.fit(module, loader, DataLoader(data(3), 3))
    found = module(torch.ones(1, 4)).item(), type(module.blocks[0])
    module.kind = "sgd"
    trainer.fit(module, loader, DataLoader(data(3), 3))
    return *found, weights(module).isfinite().all().item()


def test_a_module_is_plain_again_after_a_step_that_raised() -> None:
    ((value, kind, finite),) = on_ranks(1, fail)
    assert math.isfinite(value)
    assert kind is Block
    assert finite
