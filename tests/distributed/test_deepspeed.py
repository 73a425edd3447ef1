# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed on real ranks: the numbers of one process, checkpoints that go on exactly, and a module that is plain again."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import leyden as L
from leyden.errors import CheckpointError, MisconfigurationException
from leyden.strategies import DeepSpeedStrategy
from ranks import Judged, data, make_trainer, on_ranks

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
    pytest.mark.filterwarnings("ignore"),  # DeepSpeed's own
]
STAGES = (1, 2, 3)


class Net(Judged):
    """A regression with a parameter of its own, several groups, and a layer that is called twice."""

    def __init__(self, kind: str = "adam") -> None:
        super().__init__()
        self.kind = kind
        self.scale = torch.nn.Parameter(torch.ones(3, 1))
        self.frozen = torch.nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("shift", torch.full((1,), 0.25))

    def loss(self, batch: Any) -> torch.Tensor:
        x = batch[0] + 0.1 * self.frozen(batch[0])
        return ((self.layer(x) * self.scale.mean() + self.layer(-x) + self.shift - batch[1]) ** 2).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.samples.append(batch[2].tolist())
        self.losses.append(loss.item())
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Gradients are the engine's."""

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": [*self.layer.parameters()]},
            {"params": [self.scale, *self.frozen.parameters()], "lr": 0.01},
        ]
        optimizer: Any = torch.optim.SGD(groups, self.lr, momentum=0.9)
        if self.kind == "adam":
            optimizer = torch.optim.AdamW(groups, 0.02)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def weights(module: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def plain(module: Any) -> bool:
    """Whether nothing of DeepSpeed is left on a module."""
    marks = [n for p in module.parameters() for n in vars(p)]
    hooks = [
        h for m in module.modules() for n, hs in vars(m).items() if n.endswith("_hooks") for h in (hs or {}).values()
    ]
    kinds = {type(vars(m)["_parameters"]) for m in module.modules()}
    layer = {*vars(torch.nn.Linear(1, 1))}
    left = [name for m in module.modules() if isinstance(m, torch.nn.Linear) for name in {*vars(m)} - layer]
    own = torch.nn.functional.linear.__module__.startswith("torch")
    return not (marks or hooks or left) and kinds == {dict} and "forward" not in vars(module) and own


def fit(strategy: Any, batch: int, size: int, given: dict[str, Any], module: Any = None, path: Any = None) -> Any:
    """Train; return losses by rank and step, weights, whether the module is plain, and the trainer's optimizer state."""
    module = module or Net()
    count = given.pop("count", 80)
    trainer = make_trainer(size, strategy=strategy, **{"max_epochs": 1, **given})
    trainer.fit(module, DataLoader(data(count), batch), DataLoader(data(13), 3), ckpt_path=path)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return module.losses, weights(module), plain(module), metrics, module.rates


def both(strategy: str, **given: Any) -> tuple[Any, Any]:
    """The same fit in one process and in two: the mean of the losses of two ranks is that of the whole batch."""
    one = fit("single_device", 4, 1, dict(given))
    two = on_ranks(2, fit, strategy, 2, 2, dict(given))
    return one, two


def assert_same(one: Any, two: Any, tolerance: float = 1e-5) -> None:
    losses = torch.tensor([rank[0] for rank in two]).mean(0)
    assert len(losses) == len(one[0])
    torch.testing.assert_close(losses, torch.tensor(one[0]), rtol=0, atol=tolerance)
    for rank in two:
        assert rank[2], "the module is not plain"
        assert rank[1].keys() == one[1].keys()
        for name, value in one[1].items():
            torch.testing.assert_close(rank[1][name], value, rtol=0, atol=tolerance)
        assert rank[4] == one[4]


@pytest.mark.parametrize("stage", STAGES)
def test_twenty_steps_are_those_of_one_process(stage: int) -> None:
    one, two = both(f"deepspeed_stage_{stage}")
    assert len(one[0]) == 20
    assert_same(one, two)
    for rank in two:
        assert rank[3]["val"] == pytest.approx(one[3]["val"], abs=1e-5)
        assert rank[3]["count"] == 13  # each sample once, however many batches a rank has


@pytest.mark.parametrize("stage", STAGES)
def test_accumulation_with_a_short_last_window_and_clipping(stage: int) -> None:
    one, two = both(
        f"deepspeed_stage_{stage}", count=44, accumulate_grad_batches=3, gradient_clip_val=0.3, max_epochs=2
    )
    assert_same(one, two)


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_is_clipped_where_nobody_asks(stage: int) -> None:
    one = fit("single_device", 4, 1, {"count": 24}, Net("sgd"))
    two = on_ranks(2, lambda: fit(f"deepspeed_stage_{stage}", 2, 2, {"count": 24}, Net("sgd")))
    assert_same(one, two)


def resumed(stage: int, folder: str, cut: int, given: dict[str, Any]) -> Any:
    """The losses of a run in one piece, and of one that is saved after ``cut`` batches and goes on in a new process's way."""
    strategy = f"deepspeed_stage_{stage}"
    whole = fit(strategy, 2, 2, {"count": 40, **given})

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx + 1 == cut:
                trainer.save_checkpoint(os.path.join(folder, "cut.ckpt"))
                trainer.should_stop = True

    first = fit(strategy, 2, 2, {"count": 40, **given, "callbacks": [Save()], "limit_val_batches": 0})
    second = fit(strategy, 2, 2, {"count": 40, **given}, path=os.path.join(folder, "cut.ckpt"))
    return whole, first, second


@pytest.mark.parametrize(
    ("stage", "precision"), [(1, "32-true"), (1, "16-mixed"), (2, "bf16-mixed"), (3, "32-true"), (3, "bf16-mixed")]
)
def test_a_run_goes_on_exactly(stage: int, precision: str, tmp_path: Path) -> None:
    for whole, first, second in on_ranks(2, resumed, stage, str(tmp_path), 4, {"precision": precision}):
        assert whole[0] == first[0][:4] + second[0]
        for name, value in whole[1].items():
            assert torch.equal(value, second[1][name]), name


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_goes_on_inside_a_window_of_accumulation(stage: int, tmp_path: Path) -> None:
    given = {"accumulate_grad_batches": 3}
    for whole, first, second in on_ranks(2, resumed, stage, str(tmp_path), 5, given):
        assert whole[0] == first[0][:5] + second[0]
        for name, value in whole[1].items():
            assert torch.equal(value, second[1][name]), name


def test_a_checkpoint_is_one_of_one_process(tmp_path: Path) -> None:
    on_ranks(2, resumed, 3, str(tmp_path), 4, {})
    checkpoint = torch.load(tmp_path / "cut.ckpt", weights_only=True)
    model = Net()
    model.load_state_dict(checkpoint["state_dict"])
    optimizer = model.configure_optimizers()[0][0]
    optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    assert {k: v.shape for k, v in checkpoint["state_dict"].items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    assert all(v["exp_avg"].shape == p.shape for p, v in optimizer.state.items())
    # and goes on in one process
    trainer = make_trainer(1, max_epochs=1)
    with pytest.warns(match="was written by 2 processes"):
        trainer.fit(model, DataLoader(data(40), 4), ckpt_path=tmp_path / "cut.ckpt")
    assert trainer.global_step == 10


def saved_afterwards(folder: str) -> Any:
    module = Net()
    trainer = make_trainer(2, strategy="deepspeed_stage_2", max_epochs=1)
    trainer.fit(module, DataLoader(data(16), 2))
    trainer.save_checkpoint(os.path.join(folder, "end.ckpt"))
    module(torch.ones(1, 4)) if type(module).forward is not L.LightningModule.forward else module.layer(
        torch.ones(1, 4)
    )
    first = list(module.losses)
    trainer = make_trainer(2, strategy="deepspeed_stage_3", max_epochs=1)  # the same module, by another stage
    trainer.fit(module, DataLoader(data(16), 2))
    trainer.validate(module, DataLoader(data(7), 2), verbose=False)
    predicted = trainer.predict(module, DataLoader(data(7), 2))
    return first, module.losses, plain(module), predicted


def test_save_after_the_run_and_train_once_more(tmp_path: Path) -> None:
    for first, losses, is_plain, predicted in on_ranks(2, saved_afterwards, str(tmp_path)):
        assert len(losses) == 2 * len(first)
        assert is_plain
        assert predicted
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert set(checkpoint["optimizer_states"][0]["state"]) == {0, 1, 2, 3, 4}


def refused(how: str) -> str:
    class Several(Net):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.layer.parameters(), 0.1), torch.optim.SGD([self.scale], 0.1)]

    class Skips(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None

    given: dict[str, Any] = {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"} if how == "value" else {}
    module: Any = {"several": Several, "skips": Skips}.get(how, Net)()
    if how == "manual":
        module.automatic_optimization = False
    try:
        fit("deepspeed_stage_2", 2, 2, {"count": 8, **given}, module)
    except MisconfigurationException as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize(
    ("how", "says"),
    [("manual", "automatic_optimization"), ("several", "one optimizer"), ("skips", "0.0 *"), ("value", "norm only")],
)
def test_what_it_cannot_do_is_said(how: str, says: str) -> None:
    for message in on_ranks(2, refused, how):
        assert says in message


def own_hooks(stage: int) -> Any:
    class Hooked(Net):
        def __init__(self) -> None:
            super().__init__("sgd")
            self.seen: list[float] = []

        def on_before_backward(self, loss: torch.Tensor) -> None:
            self.seen.append(loss.item())

        def configure_gradient_clipping(
            self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any
        ) -> None:
            self.clip_gradients(optimizer, 0.2, "norm")

        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer.step(closure=optimizer_closure)

    strategy, batch, size = (f"deepspeed_stage_{stage}", 2, 2) if stage else ("single_device", 4, 1)
    module = Hooked()
    return (*fit(strategy, batch, size, {"count": 24}, module), module.seen)


@pytest.mark.parametrize("stage", STAGES)
def test_hooks_around_backward_and_step_and_own_clipping(stage: int) -> None:
    one, two = own_hooks(0), on_ranks(2, own_hooks, stage)
    assert_same(one, two)
    for rank in two:
        assert rank[5] == rank[0]


@pytest.mark.parametrize(
    "strategy", ["deepspeed_stage_1_offload", "deepspeed_stage_2_offload", "deepspeed_stage_3_offload"]
)
def test_offload_to_the_host(strategy: str) -> None:
    one, two = both(strategy, count=44, accumulate_grad_batches=3, gradient_clip_val=0.3)
    assert_same(one, two)


def weighted(stage: int) -> Any:
    class Weighted(Net):
        """Batches count by how many samples are positive; ranks have different numbers of them."""

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            kept = batch[1].flatten() > 0
            one = (self.layer(batch[0][kept]) - batch[1][kept]) ** 2 * self.scale.mean()
            self.losses.append(one.sum().item())
            return {"loss": one.sum() / kept.sum().clamp(min=1), "num_items": kept.sum()}

    strategy, batch, size = (f"deepspeed_stage_{stage}", 2, 2) if stage else ("single_device", 4, 1)
    given = {"count": 40, "accumulate_grad_batches": 2, "limit_val_batches": 0}
    return fit(strategy, batch, size, given, Weighted("sgd"))[1]


@pytest.mark.parametrize("stage", STAGES)
def test_batches_that_declare_their_weight(stage: int) -> None:
    one, two = weighted(0), on_ranks(2, weighted, stage)
    for rank in two:
        for name, value in one.items():
            torch.testing.assert_close(rank[name], value, rtol=0, atol=1e-5)


def loaded(stage: int) -> Any:
    seen: list[Any] = []

    class Back(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                seen.append({name: value.clone() for name, value in trainer.strategy.module_state_dict().items()})
            if batch_idx == 4:
                first = trainer.strategy.broadcast(seen[0])
                trainer.strategy.load_module_state_dict(first, True, "what was kept")
                seen.append(trainer.strategy.module_state_dict())
                with pytest.raises(CheckpointError, match="fit"):
                    trainer.strategy.load_module_state_dict({**first, "more": torch.ones(1)}, True, "something else")
                trainer.should_stop = True

    fit(f"deepspeed_stage_{stage}", 2, 2, {"count": 40, "callbacks": [Back()], "limit_val_batches": 0})
    return seen


@pytest.mark.parametrize("stage", STAGES)
def test_weights_are_loaded_while_the_engine_has_them(stage: int) -> None:
    before, after = on_ranks(2, loaded, stage)[0]
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def without_frozen(folder: str) -> Any:
    path = os.path.join(folder, "small.ckpt")
    for ckpt_path in (None, path):
        module = Net()
        strategy = DeepSpeedStrategy(stage=3, exclude_frozen_parameters=True)
        trainer = make_trainer(2, strategy=strategy, max_epochs=1 if ckpt_path is None else 2, limit_val_batches=0)

        class Save(L.Callback):
            def on_train_end(self, trainer: Any, module: Any) -> None:
                trainer.save_checkpoint(path, weights_only=True)

        class SaveAll(L.Callback):
            def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
                trainer.save_checkpoint(path)

        trainer.callbacks.append(SaveAll() if ckpt_path is None else Save())
        trainer.fit(module, DataLoader(data(16), 2), ckpt_path=ckpt_path)
    return trainer.global_step, module.losses


def test_checkpoints_without_frozen_parameters(tmp_path: Path) -> None:
    for steps, losses in on_ranks(2, without_frozen, str(tmp_path)):
        assert (steps, len(losses)) == (8, 4)
    state = torch.load(tmp_path / "small.ckpt", weights_only=True)["state_dict"]
    assert "scale" in state
    assert not any(name.startswith("frozen") for name in state)
