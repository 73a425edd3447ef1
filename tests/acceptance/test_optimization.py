# SPDX-License-Identifier: Apache-2.0
"""Updates of the model: their gradients, their number, their learning rates. Ids are those of the list of pains."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, OneCycleLR, StepLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import leyden as L
from leyden.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from leyden.errors import MisconfigurationException


class Net(L.LightningModule):
    """A linear model on 3 features; every call of its loader is counted."""

    def __init__(self, samples: int = 20, batch_size: int = 2, **methods: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.samples, self.batch_size = samples, batch_size
        self.loads = 0
        self.gradients: list[Tensor] = []
        self.rates: list[float] = []
        for name, method in methods.items():
            setattr(self, name, method.__get__(self))

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.layer(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.gradients.append(torch.cat([p.grad.flatten().clone() for p in self.parameters() if p.grad is not None]))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.05)

    def train_dataloader(self) -> Any:
        self.loads += 1
        return DataLoader(data(self.samples), batch_size=self.batch_size, shuffle=True)


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Batches whose number is not known."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def data(samples: int) -> TensorDataset:
    """Return inputs and targets that are always the same."""
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(samples, 3, generator=generator), torch.randn(samples, 1, generator=generator))


def pieces(lengths: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Cut the data into batches of these lengths."""
    x, y = data(sum(lengths)).tensors
    return list(zip(x.split(lengths), y.split(lengths), strict=True))


def loader(batches: list[Any], sized: bool = True) -> DataLoader[Any]:
    """Return a loader that gives these batches as they are."""
    return DataLoader(batches if sized else Stream(batches), batch_size=None)  # type: ignore[arg-type]


def trainer(**settings: Any) -> L.Trainer:
    """Return a quiet Trainer of one epoch."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(**{"max_epochs": 1, "accelerator": "cpu", **quiet, **settings})


def seeded(*args: Any, **methods: Any) -> Net:
    """Return a net with the weights of seed 0."""
    torch.manual_seed(0)
    return Net(*args, **methods)


def gradient(net: Net, loss: Tensor) -> Tensor:
    """Return the gradient of ``loss``, as ``Net`` notes it."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])


# ------------------------------------------------------------------ accumulation


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize(("batches", "accumulate"), [(7, 3), (8, 4), (5, 4), (3, 10), (1, 4)])
def test_G2_short_window_is_divided_by_its_length(batches: int, accumulate: int, sized: bool) -> None:
    cut = pieces([2] * batches)
    net = seeded(configure_optimizers=lambda self: SGD(self.parameters(), lr=0.0))
    trainer(accumulate_grad_batches=accumulate).fit(net, loader(cut, sized))
    windows = [cut[start : start + accumulate] for start in range(0, batches, accumulate)]
    for found, window in zip(net.gradients, windows, strict=True):
        expected = gradient(net, torch.stack([net.loss(batch) for batch in window]).mean())
        torch.testing.assert_close(found, expected)


def test_G2_lightning_semantics_divides_by_the_constant() -> None:
    cut = pieces([2] * 5)
    net = seeded(configure_optimizers=lambda self: SGD(self.parameters(), lr=0.0))
    trainer(accumulate_grad_batches=4, semantics="lightning").fit(net, loader(cut))
    torch.testing.assert_close(net.gradients[1], gradient(net, net.loss(cut[4]) / 4))


@pytest.mark.parametrize("max_steps", [1, 2, 3])
def test_G2_a_bound_on_steps_ends_at_whole_windows(max_steps: int) -> None:
    net = seeded()
    made = trainer(accumulate_grad_batches=3, max_steps=max_steps, max_epochs=-1)
    made.fit(net, loader(pieces([2] * 7)))
    assert made.global_step == len(net.gradients) == max_steps


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=7), st.integers(1, 4), st.booleans(), st.booleans())
def test_G1_declared_weights_give_the_gradient_of_the_whole_window(
    lengths: list[int], accumulate: int, sized: bool, tensors: bool
) -> None:
    def training_step(self: Net, batch: Any, batch_idx: int) -> Any:
        count = len(batch[0])
        return {"loss": self.loss(batch), "num_items": torch.tensor(count) if tensors else count}

    cut = pieces(lengths)
    net = seeded(training_step=training_step, configure_optimizers=lambda self: SGD(self.parameters(), lr=0.0))
    trainer(accumulate_grad_batches=accumulate).fit(net, loader(cut, sized))
    windows = [cut[start : start + accumulate] for start in range(0, len(cut), accumulate)]
    for found, window in zip(net.gradients, windows, strict=True):
        whole = tuple(torch.cat([batch[part] for batch in window]) for part in (0, 1))
        torch.testing.assert_close(found, gradient(net, net.loss(whole)), atol=1e-6, rtol=1e-4)


def test_G1_weights_are_nothing_special_under_lightning_semantics() -> None:
    def training_step(self: Net, batch: Any, batch_idx: int) -> Any:
        return {"loss": self.loss(batch), "num_items": len(batch[0])}

    ends = []
    for step in (training_step, Net.training_step):
        net = seeded(training_step=step)
        trainer(accumulate_grad_batches=2, semantics="lightning").fit(net, loader(pieces([1, 4, 2])))
        ends.append(net.layer.weight.detach().clone())
    assert torch.equal(*ends)


@pytest.mark.parametrize("which", [0, 1])
def test_G1_a_weight_for_some_batches_of_a_window_only_is_an_error(which: int) -> None:
    def training_step(self: Net, batch: Any, batch_idx: int) -> Any:
        return {"loss": self.loss(batch), **({"num_items": 2} if batch_idx % 2 == which else {})}

    with pytest.raises(MisconfigurationException, match="'num_items' for some batches of a window"):
        trainer(accumulate_grad_batches=2).fit(seeded(training_step=training_step), loader(pieces([2] * 4)))


def test_G1_the_sum_of_the_weights_starts_anew_with_each_window() -> None:
    def training_step(self: Net, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        return None if batch_idx == 2 else {"loss": loss, "num_items": len(batch[0])}

    cut = pieces([1, 3, 2, 4])
    net = seeded(training_step=training_step, configure_optimizers=lambda self: SGD(self.parameters(), lr=0.0))
    trainer(accumulate_grad_batches=2, max_epochs=2).fit(net, loader(cut))
    torch.testing.assert_close(net.gradients[1], gradient(net, net.loss(cut[3])))
    torch.testing.assert_close(net.gradients[3], net.gradients[1])


@pytest.mark.parametrize("zero", [0, torch.tensor(0), torch.tensor(0.0)], ids=str)
def test_G1_a_window_without_items_moves_nothing(zero: Any) -> None:
    net = seeded(training_step=lambda self, batch, i: {"loss": self.loss(batch), "num_items": zero})
    before = net.layer.weight.detach().clone()
    trainer(accumulate_grad_batches=2).fit(net)
    assert torch.equal(net.layer.weight, before)


# ------------------------------------------------------------------ clipping


def total_norm(net: Net) -> float:
    return float(torch.cat([p.grad.double().flatten() for p in net.parameters()]).norm())  # type: ignore[union-attr]


OPTIMIZERS = {
    "sgd": lambda parameters: SGD(parameters, lr=0.05),
    "adam": lambda parameters: Adam(parameters, lr=0.05, eps=1e-3),  # 1e-8 is 0 in float16
    "fused": lambda parameters: Adam(parameters, lr=0.05, fused=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true", "16-true"])
@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_A1_gradients_are_within_bounds_at_the_step(
    precision: str, optimizer: str, manual: bool, algorithm: str
) -> None:
    if optimizer == "fused" and precision == "16-true":
        pytest.skip("torch has no fused Adam for float16 on the CPU")
    bound, seen = 0.01, []

    class Watched(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = 100 * self.loss(batch)
            if not manual:
                return loss
            chosen = self.optimizers()
            chosen.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(chosen, gradient_clip_val=bound, gradient_clip_algorithm=algorithm)
            chosen.step()
            return None

        def configure_optimizers(self) -> Any:
            made = OPTIMIZERS[optimizer](self.parameters())
            made.register_step_pre_hook(lambda *_: seen.append([p.grad.clone() for p in self.parameters()]))
            return made

    torch.manual_seed(0)
    net = Watched()
    net.automatic_optimization = not manual
    clipping = {} if manual else {"gradient_clip_val": bound, "gradient_clip_algorithm": algorithm}
    trainer(precision=precision, limit_train_batches=4, **clipping).fit(net)
    assert len(seen) == 4
    # 16-bit gradients round after they are scaled
    slack = {"bf16-true": 1.01, "16-true": 1.002}.get(precision, 1 + 1e-5)
    for grads in seen:
        flat = torch.cat([g.double().flatten() for g in grads])
        size = float(flat.norm() if algorithm == "norm" else flat.abs().max())
        assert 0.5 * bound < size <= bound * slack


@pytest.mark.parametrize("accumulate", [1, 3])
def test_A1_the_gradient_of_a_whole_window_is_clipped(accumulate: int) -> None:
    norms = []

    def configure_optimizers(self: Net) -> Any:
        made = SGD(self.parameters(), lr=0.05)
        made.register_step_pre_hook(lambda *_: norms.append(total_norm(self)))
        return made

    net = seeded(configure_optimizers=configure_optimizers)
    trainer(gradient_clip_val=0.01, accumulate_grad_batches=accumulate).fit(net, loader(pieces([2] * 7), sized=False))
    assert len(norms) == len(net.gradients) == -(-7 // accumulate)
    assert norms == pytest.approx([0.01] * len(norms), rel=1e-4)


# ------------------------------------------------------------------ schedules


@pytest.mark.parametrize("form", ["list", "dict", "pair"])
def test_SC1_a_bare_schedule_that_knows_its_total_steps_with_every_update(form: str, caplog: Any) -> None:
    def configure_optimizers(self: Net) -> Any:
        optimizer = SGD(self.parameters(), lr=0.05)
        schedule = OneCycleLR(optimizer, max_lr=1.0, total_steps=10)
        return {
            "list": [{"optimizer": optimizer, "lr_scheduler": schedule}],
            "dict": {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule}},
            "pair": ([optimizer], [schedule]),
        }[form]

    net = seeded(configure_optimizers=configure_optimizers)
    with caplog.at_level("INFO"):
        trainer().fit(net)
    reference = SGD([nn.Parameter(torch.zeros(1))], lr=0.05)
    schedule = OneCycleLR(reference, max_lr=1.0, total_steps=10)
    expected = []
    for _ in range(10):
        expected.append(schedule.get_last_lr()[0])
        reference.step()
        if len(expected) < 10:
            schedule.step()
    assert net.rates[:9] == expected[1:]
    assert "OneCycleLR plans 10 steps" in caplog.text


def test_SC1_an_interval_that_was_given_is_kept_with_a_warning() -> None:
    def configure_optimizers(self: Net) -> Any:
        optimizer = SGD(self.parameters(), lr=0.05)
        return [optimizer], [{"scheduler": OneCycleLR(optimizer, max_lr=1.0, total_steps=10), "interval": "epoch"}]

    net = seeded(configure_optimizers=configure_optimizers)
    with pytest.warns(RuntimeWarning, match="plans 10 steps but is stepped once per epoch"):
        trainer(max_epochs=2).fit(net)
    assert len(set(net.rates)) == 3  # the last batch of each epoch shows the rate of the next


def test_SC1_lightning_semantics_steps_it_once_an_epoch() -> None:
    def configure_optimizers(self: Net) -> Any:
        optimizer = SGD(self.parameters(), lr=0.05)
        return [optimizer], [OneCycleLR(optimizer, max_lr=1.0, total_steps=10)]

    net = seeded(configure_optimizers=configure_optimizers)
    with pytest.warns(RuntimeWarning, match="stepped once per epoch"):
        trainer(max_epochs=2, semantics="lightning").fit(net)
    assert len(set(net.rates)) == 3


@pytest.mark.parametrize(
    "make", [lambda o: StepLR(o, 1), lambda o: CyclicLR(o, 0.01, 0.1), lambda o: LambdaLR(o, float)]
)
def test_SC1_other_bare_schedules_step_once_an_epoch(make: Any) -> None:
    def configure_optimizers(self: Net) -> Any:
        optimizer = SGD(self.parameters(), lr=0.05)
        return [optimizer], [make(optimizer)]

    net = seeded(configure_optimizers=configure_optimizers)
    trainer(max_epochs=2).fit(net)
    assert len(set(net.rates[:9])) == 1


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"max_epochs": 3},
    "accumulation": {"max_epochs": 2, "accumulate_grad_batches": 3},
    "max_steps": {"max_epochs": -1, "max_steps": 13},
    "both": {"max_epochs": 2, "max_steps": 7, "accumulate_grad_batches": 2},
    "schedule": {"max_epochs": 4},
    "limit": {"max_epochs": 2, "limit_train_batches": 0.5},
    "reload": {"max_epochs": 5, "reload_dataloaders_every_n_epochs": 2},
}


def run(read: bool, given: dict[str, Any], schedule: bool, iterable: bool = False, **fit: Any) -> dict[str, Any]:
    """Fit, with ``estimated_stepping_batches`` read wherever it can be, or nowhere; return all that could differ."""
    estimates: list[float] = []

    class Reading(Net):
        def look(self, *_: Any) -> None:
            if read:
                estimates.append(self.trainer.estimated_stepping_batches)

        setup = on_fit_start = on_train_start = on_train_epoch_start = on_train_batch_start = look
        on_train_epoch_end = on_train_end = on_fit_end = look

        def configure_optimizers(self) -> Any:
            self.look()
            return super().configure_optimizers()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = nn.functional.dropout(self.loss(batch), 0.3)
            self.log("loss", loss, on_step=True, on_epoch=True)
            return loss

        def train_dataloader(self) -> Any:
            if iterable:
                self.loads += 1
                return loader(pieces([2] * 10), sized=False)
            torch.rand(1)  # as a random split would
            return super().train_dataloader()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", self.loss(batch))

        def val_dataloader(self) -> Any:
            return DataLoader(data(4), batch_size=2)

    L.seed_everything(5, verbose=False)
    net = Reading()
    callbacks = [GradientAccumulationScheduler({0: 1, 1: 4, 3: 2})] if schedule else []
    made = trainer(log_every_n_steps=1, **given)
    made.callbacks = [*made.callbacks, *callbacks]
    made.fit(net, **fit)
    return {
        "estimates": estimates,
        "steps": made.global_step,
        "loads": net.loads,
        "rng": torch.get_rng_state().tolist(),
        "weights": net.layer.weight.tolist(),
        "rows": [dict(row) for row in made.history],
        "rates": net.rates,
    }


@pytest.mark.parametrize("case", SETTINGS)
def test_SC5_reading_the_number_of_steps_changes_nothing(case: str) -> None:
    with_, without = (run(read, SETTINGS[case], case == "schedule") for read in (True, False))
    estimates = with_.pop("estimates")
    assert estimates
    assert set(estimates) == {with_["steps"]}
    assert without.pop("estimates") == []
    assert with_ == without


def test_SC5_data_without_length() -> None:
    for bound, expected in (({"max_epochs": 1}, float("inf")), ({"max_epochs": 2, "max_steps": 7}, 7)):
        with_, without = (run(read, bound, schedule=False, iterable=True) for read in (True, False))
        assert set(with_.pop("estimates")) == {expected}
        assert without.pop("estimates") == []
        assert with_ == without


@pytest.mark.parametrize("cut", [3, 10, 14])
@pytest.mark.parametrize("case", ["plain", "accumulation", "reload"])
def test_SC5_a_run_that_is_resumed(case: str, cut: int, tmp_path: Path) -> None:
    path = tmp_path / "cut.ckpt"

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.progress.batches == cut:
                trainer.save_checkpoint(path)

    given = SETTINGS[case]
    whole = run(False, {**given, "callbacks": [Save()]}, schedule=False)
    with_, without = (run(read, given, schedule=False, ckpt_path=path) for read in (True, False))
    assert set(with_.pop("estimates")) == {whole["steps"]}
    assert without.pop("estimates") == []
    assert with_ == without
    for key in ("steps", "weights"):
        assert with_[key] == whole[key]


def test_SC5_outside_a_fit_it_says_why() -> None:
    with pytest.raises(RuntimeError, match="known inside fit"):
        trainer().estimated_stepping_batches


# ------------------------------------------------------------------ counters


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("k", [2, 3])
def test_X3_every_k_steps_means_the_same_steps_everywhere(accumulate: int, k: int, tmp_path: Path) -> None:
    seen: dict[str, list[int]] = {"row": [], "validation": [], "checkpoint": []}

    class Net3(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

        def on_validation_start(self) -> None:
            seen["validation"].append(self.trainer.global_step)

        def on_save_checkpoint(self, checkpoint: Any) -> None:
            seen["checkpoint"].append(checkpoint["global_step"])

        def val_dataloader(self) -> Any:
            return DataLoader(data(2))

    made = trainer(
        max_epochs=3,
        accumulate_grad_batches=accumulate,
        log_every_n_steps=k,
        val_check_interval=f"{k} steps",
        num_sanity_val_steps=0,
        enable_checkpointing=True,
        callbacks=[ModelCheckpoint(tmp_path, every_n_train_steps=k, save_top_k=-1)],
    )
    made.fit(Net3(20, 2))
    seen["row"] = [row["step"] + 1 for row in made.history if "loss" in row]
    expected = list(range(k, made.global_step + 1, k))
    assert made.global_step == 3 * -(-10 // accumulate)
    assert seen["row"] == seen["validation"] == expected
    assert sorted(set(seen["checkpoint"])) == expected


def two(self: Net) -> Any:
    return SGD([self.layer.weight], lr=0.05), SGD([self.layer.bias], lr=0.05)


@pytest.mark.parametrize(("semantics", "each"), [("leyden", 1), ("lightning", 2)])
def test_X1_two_optimizers_by_hand_are_one_update_of_the_model(semantics: str, each: int) -> None:
    def training_step(self: Net, batch: Any, batch_idx: int) -> None:
        loss = self.loss(batch)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    net = seeded(training_step=training_step, configure_optimizers=two)
    net.automatic_optimization = False
    made = trainer(max_epochs=2, semantics=semantics)
    made.fit(net)
    assert made.global_step == 20 * each
    assert made.progress.optimizer_steps == [20, 20]


def test_X1_two_optimizers_on_their_own_are_one_update_of_the_model() -> None:
    net = seeded(configure_optimizers=two)
    made = trainer(max_epochs=2, accumulate_grad_batches=2, max_steps=7)
    made.fit(net)
    assert made.global_step == 7
    assert made.progress.optimizer_steps == [7, 7]


def test_X1_batches_without_a_step_do_not_count() -> None:
    def training_step(self: Net, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch))
        if batch_idx % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()

    net = seeded(training_step=training_step)
    net.automatic_optimization = False
    made = trainer()
    made.fit(net)
    assert made.global_step == 2


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize("manual", [False, True])
def test_E1_an_optimizer_that_the_module_kept_does_not_keep_the_run(manual: bool) -> None:
    class Keeps(Net):
        def on_train_start(self) -> None:
            self.kept = self.optimizers()
            if manual:
                self.schedule = StepLR(self.kept, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            if not manual:
                return loss
            self.kept.zero_grad()
            self.manual_backward(loss)
            self.kept.step()
            self.schedule.step()
            return None

    net = Keeps()
    net.automatic_optimization = not manual
    made = trainer()
    gc.collect()
    gc.disable()
    try:
        made.fit(net)
        before = net.layer.weight.detach().clone()
        net.layer.weight.grad = torch.ones_like(net.layer.weight)
        net.kept.param_groups[0]["lr"] = 1.0
        net.kept.step()  # after the fit it is the plain step
        assert not torch.equal(before, net.layer.weight)
        gone = [weakref.ref(net), weakref.ref(made)]
        kept = net.kept
        del net, made
        assert [reference() for reference in gone] == [None, None]
        del kept
    finally:
        gc.enable()
