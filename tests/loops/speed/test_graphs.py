# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs, with a stand-in for the graph: what Python does around captures and replays, and when there is neither.

The stand-in runs the captured function anew at each replay, on the tensors of the capture, and writes what comes of it to
where the capture put it. All else is the real thing.
"""

from __future__ import annotations

import copy
import gc
import logging
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.loops.speed import graphs
from leyden.loops.speed.capturable import Captured
from leyden.loops.speed.graphs import MOST, WARMUP
from leyden.tree import leaves


class StandIn:
    """Stands for ``CudaGraphs``: capturing changes no state; what it writes holds nothing before the first replay."""

    def __init__(self, fails: Exception | None = None) -> None:
        self.fails = fails
        self.module: Any = None
        self.replays = self.captured = self.asides = self.watched = 0
        self.found_waits: list[str] = []
        self.on_host: Callable[[], dict[str, Any]] = dict

    @contextmanager
    def aside(self) -> Iterator[None]:
        self.asides += 1
        yield

    @contextmanager
    def waits(self) -> Iterator[list[str]]:
        self.watched += 1
        yield self.found_waits

    def host_generators(self) -> dict[str, Any]:
        return self.on_host()

    def _state(self) -> list[Tensor]:
        optimizers = self.module.trainer.optimizers
        states = [value for one in optimizers for state in one.state.values() for value in state.values()]
        return [*self.module.parameters(), *self.module.buffers(), *(v for v in states if isinstance(v, Tensor))]

    def record(self, region: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        before, generator = copy.deepcopy([tensor.detach() for tensor in self._state()]), torch.get_rng_state()
        try:
            result = region()
        finally:
            with torch.no_grad():
                for tensor, old in zip(self._state(), before, strict=True):
                    tensor.copy_(old)
            torch.set_rng_state(generator)
        if self.fails is not None:
            raise self.fails
        self.captured += 1
        written = [leaf for leaf in leaves(result) if isinstance(leaf, Tensor)]
        for tensor in written:
            tensor.fill_(float("nan"))  # nothing has run

        def replay() -> None:
            self.replays += 1
            fresh = [leaf for leaf in leaves(region()) if isinstance(leaf, Tensor)]
            for static, value in zip(written, fresh, strict=True):
                static.copy_(value)

        return replay, result


class Model(L.LightningModule):
    """Dropout, a batch norm, clipping; logs in all ways; an epoch or two of it are compared with an eager run."""

    def __init__(self, optimizer: str = "sgd", schedule: str = "") -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
        self.kind, self.schedule = optimizer, schedule

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        self.log("most", x.max(), reduce_fx="max", on_step=False, on_epoch=True)
        self.log_dict({"norm": self.net[0].weight.norm(), "number": 2.5})
        return {"loss": loss, "mean": x.mean(), "note": "text"}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        kinds: dict[str, Callable[..., Any]] = {
            "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
            "adam": lambda p: torch.optim.AdamW(p, lr=0.01),
            "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.1),
        }
        optimizer = kinds[self.kind](self.parameters())
        if not self.schedule:
            return optimizer
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": self.schedule}}


class Losses(L.Callback):
    """Keeps the outputs of each step, the learning rates, and the gradients."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.kept: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.kept.append(outputs)
        gradients = [parameter.grad.clone() for parameter in pl_module.parameters()]
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        metrics = {name: value.clone() for name, value in trainer.callback_metrics.items()}
        self.seen.append((trainer.global_step, rates, gradients, metrics, copy.deepcopy(outputs)))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A tiny batch norm on several threads waits for them where others use the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def stand_in(monkeypatch: Any) -> StandIn:
    made = StandIn()
    monkeypatch.setattr(graphs, "device_graphs", lambda device: made)
    return made


def data(samples: int = 23) -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    return TensorDataset(
        torch.randn(samples, 4, generator=generator), torch.randint(2, (samples,), generator=generator)
    )


def loaders() -> tuple[Any, Any]:
    return DataLoader(data(), batch_size=4, shuffle=True), DataLoader(data(8), batch_size=4)


def fit(module: Any, folder: Path, loader: Any = None, stand_in: Any = None, **arguments: Any) -> L.Trainer:
    L.seed_everything(7, verbose=False)
    if stand_in is not None:
        stand_in.module = module
    ckpt_path = arguments.pop("ckpt_path", None)
    options: dict[str, Any] = {
        "max_epochs": 2, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "log_every_n_steps": 2, "gradient_clip_val": 0.5, "num_sanity_val_steps": 0,
    }  # fmt: skip
    trainer = L.Trainer(accelerator="cpu", devices=1, default_root_dir=folder, **{**options, **arguments})
    train, val = loaders()
    trainer.fit(module, loader or train, val, ckpt_path=ckpt_path)
    return trainer


def seed(module: Callable[[], Any]) -> Any:
    torch.manual_seed(5)
    return module()


def eager_and_graphed(make: Callable[[], Any], folder: Path, stand_in: StandIn, **arguments: Any) -> Any:
    """Run both; return for each the module, the trainer and what the callback saw."""
    runs = []
    for replays in (False, True):
        losses, module = Losses(), seed(make)
        more = {"callbacks": [losses], "cuda_graphs": replays, **arguments}
        runs.append((module, fit(module, folder, stand_in=stand_in, **more), losses))
    return runs


def same(first: Any, second: Any, exact: bool = True) -> None:
    if isinstance(first, Tensor):
        assert torch.equal(first, second) if exact else torch.allclose(first, second, rtol=1e-3, atol=1e-5)
    elif isinstance(first, dict):
        assert list(first) == list(second)
        for key in first:
            same(first[key], second[key], exact)
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            same(a, b, exact)
    elif isinstance(first, float):
        assert first == second if exact else first == pytest.approx(second, rel=1e-3)
    else:
        assert first == second


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [
        ("sgd", ""),
        ("sgd", "step"),
        ("sgd", "epoch"),
        ("adam", ""),
        ("adam", "step"),
        ("adagrad", ""),
        ("adagrad", "step"),
    ],
)
def test_a_graphed_fit_equals_an_eager_one(optimizer: str, schedule: str, stand_in: StandIn, tmp_path: Path) -> None:
    """23 samples: the last of 6 batches is ragged, validation follows each epoch, and clears the gradients."""
    (plain, eager, seen), (module, trainer, mine) = eager_and_graphed(
        lambda: Model(optimizer, schedule), tmp_path, stand_in
    )
    assert stand_in.captured == 1
    assert stand_in.replays == 10 - WARMUP
    assert stand_in.asides == WARMUP + 2  # and the ragged ones
    # a learning rate in a tensor has 24 bits, and Adam without a fused kernel computes with it in Python
    exact = not (optimizer == "adam" and schedule)
    same(list(plain.state_dict().values()), list(module.state_dict().values()), exact)
    same(seen.seen, mine.seen, exact)
    same(list(eager.history), list(trainer.history), exact)
    same(dict(eager.callback_metrics), dict(trainer.callback_metrics), exact)
    assert trainer.global_step == 12
    assert vars(trainer.progress) == vars(eager.progress)
    same(eager.optimizers[0].state_dict(), trainer.optimizers[0].state_dict(), exact)
    assert all(isinstance(group["lr"], float) for group in trainer.optimizers[0].param_groups)


def test_outputs_that_somebody_keeps_stay(stand_in: StandIn, tmp_path: Path) -> None:
    losses = Losses()
    fit(seed(Model), tmp_path, stand_in=stand_in, callbacks=[losses], cuda_graphs=True)
    for (_, _, _, _, then), now in zip(losses.seen, losses.kept, strict=True):
        same(then, now)
    assert len({float(outputs["loss"]) for outputs in losses.kept}) == 12


def test_without_anybody_who_looks_at_outputs(stand_in: StandIn, tmp_path: Path) -> None:
    first = fit(seed(Model), tmp_path, stand_in=stand_in)
    second = fit(seed(Model), tmp_path, stand_in=stand_in, cuda_graphs=True)
    assert stand_in.replays == 7
    same(list(first.history), list(second.history))


def test_on_a_cpu_one_line_says_so_and_training_is_what_it_always_is(tmp_path: Path, caplog: Any) -> None:
    plain = fit(seed(Model), tmp_path)
    with caplog.at_level(logging.INFO):
        trainer = fit(seed(Model), tmp_path, cuda_graphs=True)
    said = [record.getMessage() for record in caplog.records if "cuda_graphs" in record.getMessage()]
    assert said == [
        "Trainer(cuda_graphs=True): the steps run eagerly, without a graph: there is no CUDA device in this run, it is on cpu."
    ]
    same(list(plain.history), list(trainer.history))


# --- a module that changes while the run goes on ----------------------------------------------------------------------


class Options:
    def __init__(self) -> None:
        self.temperature = 1.0


class Changes(Model):
    """Does something between two epochs."""

    def __init__(self, change: Callable[[Any], None]) -> None:
        super().__init__()
        self.change, self.factor = change, 1.0
        self.table, self.options, self.offset = {"weights": [1.0, 2.0]}, Options(), torch.tensor(0.5)
        self.seen: list[int] = []
        self.save_hyperparameters({"scale": 1.0})

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        factor = self.factor * self.table["weights"][0] * self.options.temperature * self.hparams.scale + self.offset
        return super().training_step(batch, batch_idx)["loss"] * factor

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append(1)  # read by no step

    def on_train_epoch_start(self) -> None:
        if self.current_epoch:
            self.change(self)


def _set_factor(module: Any) -> None:
    module.factor = 0.5 * module.current_epoch


def _set_in_a_list(module: Any) -> None:
    module.table["weights"][0] *= 0.5


def _set_in_an_object(module: Any) -> None:
    module.options.temperature *= 0.5


def _set_in_the_hyperparameters(module: Any) -> None:
    module.hparams.scale *= 0.5


def _another_tensor(module: Any) -> None:
    module.offset = module.offset * 0.5


def _write_to_the_host(module: Any) -> None:
    module.offset *= 0.5


def _freeze(module: Any) -> None:
    module.net[0].requires_grad_(False)


def _exchange(module: Any) -> None:
    module.net[3].weight.data = module.net[3].weight.data * 0.5


def _decay(module: Any) -> None:
    module.trainer.optimizers[0].param_groups[0]["weight_decay"] = 0.1 * module.current_epoch


def _lower(module: Any) -> None:
    module.trainer.optimizers[0].param_groups[0]["lr"] *= 0.5


def _evaluate(module: Any) -> None:
    module.net[1].eval()


def _another_optimizer_state(module: Any) -> None:
    optimizer = module.trainer.optimizers[0]
    optimizer.load_state_dict(optimizer.state_dict())


def _clip(module: Any) -> None:
    module.trainer.gradient_clip_val = 0.01


@pytest.mark.parametrize(
    "change",
    [
        _set_factor,
        _set_in_a_list,
        _set_in_an_object,
        _set_in_the_hyperparameters,
        _another_tensor,
        _write_to_the_host,
        _freeze,
        _exchange,
        _decay,
        _lower,
        _evaluate,
        _another_optimizer_state,
        _clip,
    ],  # fmt: skip
)
def test_a_change_between_epochs_takes_a_new_graph(change: Any, stand_in: StandIn, tmp_path: Path) -> None:
    weights = []
    for replays in (False, True):
        module = seed(lambda: Changes(change))
        fit(module, tmp_path, stand_in=stand_in, cuda_graphs=replays)
        weights.append(list(module.state_dict().values()))
    assert stand_in.captured >= 2
    same(*weights)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_schedule_that_changes_the_momentum_too(
    optimizer: str, stand_in: StandIn, tmp_path: Path, caplog: Any
) -> None:
    """Adam is captured with its betas; SGD, whose rate is scheduled, steps after the replay and takes what there is."""

    class Cycles(Model):
        def configure_optimizers(self) -> Any:
            made = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.OneCycleLR(made, 0.1, total_steps=100)
            return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    with caplog.at_level(logging.INFO):
        (plain, _, seen), (module, _, mine) = eager_and_graphed(
            lambda: Cycles(optimizer), tmp_path, stand_in, max_epochs=4
        )
    if optimizer == "sgd":
        assert (stand_in.captured, reasons(caplog)) == (1, [])
    else:
        assert reasons(caplog) == ["betas changes again and again, which takes a new graph each time"]
    same(list(plain.state_dict().values()), list(module.state_dict().values()), optimizer == "sgd")
    same([step for step, *_ in seen.seen], [step for step, *_ in mine.seen])


class Metric(nn.Module):
    """Counts in a plain attribute, as those of torchmetrics do."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def update(self) -> None:
        self.count += 1

    def compute(self) -> float:
        return float(self.count)

    def reset(self) -> None:
        self.count = 0


class Validates(Model):
    """Has a metric object that only its validation uses, unless its step does too."""

    def __init__(self, in_step: bool = False) -> None:
        super().__init__()
        self.metric, self.in_step = Metric(), in_step

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.in_step:
            self.metric.update()
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.metric.update()
        self.log("count", self.metric)


def test_metric_objects_of_a_validation_do_not_count_as_changes(stand_in: StandIn, tmp_path: Path) -> None:
    fit(seed(Validates), tmp_path, stand_in=stand_in, cuda_graphs=True)
    assert (stand_in.captured, stand_in.replays) == (1, 7)


def test_metric_objects_of_a_step_do(stand_in: StandIn, tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level(logging.INFO):
        fit(seed(lambda: Validates(True)), tmp_path, stand_in=stand_in, cuda_graphs=True)
    assert reasons(caplog) == ["the step changes the attribute 'metric.count' of the module, which a replay would not"]


def test_what_changes_again_and_again_ends_it(stand_in: StandIn, tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level(logging.INFO):
        fit(seed(lambda: Changes(_decay)), tmp_path, stand_in=stand_in, cuda_graphs=True, max_epochs=9)
    assert stand_in.captured == MOST
    assert reasons(caplog) == ["weight_decay changes again and again, which takes a new graph each time"]


# --- what is not captured ----------------------------------------------------------------------------------------------


def reasons(caplog: Any) -> list[str]:
    begin = "Trainer(cuda_graphs=True): the steps run eagerly, without a graph: "
    found = [record.getMessage() for record in caplog.records if record.getMessage().startswith(begin)]
    return [text.removeprefix(begin).removesuffix(".") for text in found]


def step(body: Callable[[Any, Any, int], Any], **more: Any) -> type[Model]:
    """A class of models whose step does ``body`` as well."""

    class Does(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)["loss"]
            other = body(self, loss, batch_idx)
            return loss if other is None else other

    for name, value in more.items():
        setattr(Does, name, value)
    return Does


class Count:
    """What looks like a metric object."""

    def update(self, *args: Any) -> None: ...
    def compute(self) -> float:
        return 1.0

    def reset(self) -> None: ...


COUNT = Count()


def _remember(module: Any, loss: Any, batch_idx: int) -> None:
    module.last = loss.detach()


def _count(module: Any, loss: Any, batch_idx: int) -> None:
    module.kind = module.kind + "!"


def _append(module: Any, loss: Any, batch_idx: int) -> None:
    module.__dict__.setdefault("losses", []).append(1)


def _count_elsewhere(module: Any, loss: Any, batch_idx: int) -> None:
    module.__dict__.setdefault("tally", SimpleNamespace(total=[0])).total[0] += 1


class Tally:
    def __init__(self) -> None:
        self.total: Any = 0


def _sum_elsewhere(module: Any, loss: Any, batch_idx: int) -> None:
    tally = module.__dict__.setdefault("tally", Tally())
    tally.total = tally.total + loss.detach()


def _assign_buffer(module: Any, loss: Any, batch_idx: int) -> None:
    module.net[1].running_mean = module.net[1].running_mean * 0.9


def _by_step(module: Any, loss: Any, batch_idx: int) -> Any:
    return loss * (1.0 if module.global_step < 2 else 0.5)


def _by_epoch(module: Any, loss: Any, batch_idx: int) -> Any:
    return loss / (1 + module.trainer.current_epoch)


def _by_index(module: Any, loss: Any, batch_idx: int) -> Any:
    return loss if batch_idx % 2 else loss * 0.5


def _stop(module: Any, loss: Any, batch_idx: int) -> None:
    module.trainer.should_stop = False


def _log_object(module: Any, loss: Any, batch_idx: int) -> None:
    module.log("count", COUNT)


def _set_rate(module: Any, loss: Any, batch_idx: int) -> None:
    module.optimizers().param_groups[0]["lr"] *= 0.99


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (_remember, "the step changes the attribute 'last' of the module, which a replay would not"),
        (_count, "the step changes the attribute 'kind' of the module, which a replay would not"),
        (_append, "the step changes the attribute 'losses' of the module, which a replay would not"),
        (_count_elsewhere, "the step changes the attribute 'tally' of the module, which a replay would not"),
        (_sum_elsewhere, "the step changes the attribute 'tally' of the module, which a replay would not"),
        (_assign_buffer, "the step changes the attribute 'net.1._buffers' of the module, which a replay would not"),
        (_by_step, "the step uses trainer.global_step, which a replay would not"),
        (_by_epoch, "the step uses trainer.current_epoch, which a replay would not"),
        (_by_index, "the step computes with batch_idx, which is the same number in every replay"),
        (_stop, "the step uses trainer.should_stop, which a replay would not"),
        (_log_object, "self.log('count') is given a metric object, which counts in Python"),
        (_set_rate, "the step sets a learning rate, which a replay would not"),
    ],
)
def test_a_step_that_does_more_than_a_replay_would_is_not_captured(
    body: Any, why: str, stand_in: StandIn, tmp_path: Path, caplog: Any
) -> None:
    plain = fit(seed(step(body)), tmp_path, stand_in=stand_in)
    with caplog.at_level(logging.INFO):
        trainer = fit(seed(step(body)), tmp_path, stand_in=stand_in, cuda_graphs=True)
    assert reasons(caplog) == [why]
    assert stand_in.captured == 0
    same(list(plain.history), list(trainer.history))


def test_a_step_that_waits_for_the_device(stand_in: StandIn, tmp_path: Path, caplog: Any) -> None:
    stand_in.found_waits.append("model.py:12")
    with caplog.at_level(logging.INFO):
        fit(seed(Model), tmp_path, stand_in=stand_in, cuda_graphs=True)
    assert reasons(caplog) == ["the step waits for the device (model.py:12), as .item() and .cpu() do"]
    assert stand_in.watched == 1


def test_a_step_that_draws_on_the_host(stand_in: StandIn, tmp_path: Path, caplog: Any) -> None:
    def body(module: Any, loss: Any, batch_idx: int) -> Any:
        return loss * random.random()

    stand_in.on_host = lambda: {"python": random.getstate()}
    with caplog.at_level(logging.INFO):
        fit(seed(step(body)), tmp_path, stand_in=stand_in, cuda_graphs=True)
    assert reasons(caplog) == ["the step draws random numbers on the host, which would be the same in every replay"]


HOOKS = (
    "on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step", "backward",
    "optimizer_zero_grad", "configure_gradient_clipping", "clip_gradients",
)  # fmt: skip


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_in_the_middle_of_the_step(name: str, stand_in: StandIn, tmp_path: Path, caplog: Any) -> None:
    hook = getattr(L.LightningModule, name)
    if name == "optimizer_zero_grad":
        more = {name: lambda self, epoch, batch_idx, optimizer: optimizer.zero_grad()}
    else:
        more = {name: lambda self, *args, **kwargs: hook(self, *args, **kwargs)}
    with caplog.at_level(logging.INFO):
        fit(seed(step(lambda *_: None, **more)), tmp_path, stand_in=stand_in, cuda_graphs=True)
    assert reasons(caplog) == [f"the hook {name}() is written, and runs in the middle of the step"]
    assert stand_in.watched == 0


def test_hooks_around_the_step_run_at_each_step(stand_in: StandIn, tmp_path: Path) -> None:
    seen: list[str] = []
    more: dict[str, Any] = {
        name: lambda self, *args, name=name: seen.append(name)
        for name in ("on_train_batch_start", "on_train_batch_end")
    }
    fit(seed(step(lambda *_: None, **more)), tmp_path, stand_in=stand_in, cuda_graphs=True)
    assert stand_in.replays == 7
    assert seen == ["on_train_batch_start", "on_train_batch_end"] * 12


def _by_hand(self: Any) -> None:
    Model.__init__(self)
    self.automatic_optimization = False


@pytest.mark.parametrize(
    ("make", "arguments", "why"),
    [
        (Model, {"accumulate_grad_batches": 3}, "an update takes 3 batches (accumulate_grad_batches)"),
        (Model, {"detect_anomaly": True}, "detect_anomaly looks into every step"),
        (
            step(lambda *_: None, __init__=_by_hand),
            {"gradient_clip_val": None},
            "optimization is manual",
        ),
        (
            step(lambda *_: None, configure_optimizers=lambda self: torch.optim.LBFGS(self.parameters(), max_iter=2)),
            {"max_epochs": 1},
            "an optimizer runs training_step inside its own step, or the module overrides optimizer_step",
        ),
    ],
)
def test_what_is_known_to_stand_against_it(
    make: Any, arguments: Any, why: str, stand_in: StandIn, tmp_path: Path, caplog: Any
) -> None:
    with caplog.at_level(logging.INFO):
        fit(seed(make), tmp_path, stand_in=stand_in, cuda_graphs=True, **arguments)
    assert reasons(caplog) == [why]


def test_hooks_that_are_registered_on_layers_and_optimizers(stand_in: StandIn, tmp_path: Path, caplog: Any) -> None:
    module = seed(Model)
    handle = module.net[0].register_forward_hook(lambda *args: None)
    with caplog.at_level(logging.INFO):
        fit(module, tmp_path, stand_in=stand_in, cuda_graphs=True)
        handle.remove()

        class Hooked(Model):
            def configure_optimizers(self) -> Any:
                optimizer = super().configure_optimizers()
                optimizer.register_step_post_hook(lambda *args: None)
                return optimizer

        fit(seed(Hooked), tmp_path, stand_in=stand_in, cuda_graphs=True)
    assert reasons(caplog) == ["hooks are registered on net.0", "hooks are registered on an optimizer"]


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: operation not permitted\nmore"), ValueError("theirs")])
def test_a_capture_that_fails_leaves_no_trace(error: Any, stand_in: StandIn, tmp_path: Path, caplog: Any) -> None:
    stand_in.fails = error
    with caplog.at_level(logging.INFO):
        (plain, eager, seen), (module, trainer, mine) = eager_and_graphed(Model, tmp_path, stand_in)
    text = str(error).partition("\n")[0]
    assert reasons(caplog) == [f"it cannot be captured: {type(error).__name__}: {text}"]
    same(list(plain.state_dict().values()), list(module.state_dict().values()))
    same(seen.seen, mine.seen)
    same(list(eager.history), list(trainer.history))
    assert vars(trainer.progress) == vars(eager.progress)


def test_batches_of_ever_new_shapes(stand_in: StandIn, tmp_path: Path, caplog: Any) -> None:
    batches = [(torch.randn(3 + i % 2, 4), torch.zeros(3 + i % 2, dtype=torch.long)) for i in range(20)]
    with caplog.at_level(logging.INFO):
        fit(seed(Model), tmp_path, DataLoader(batches, batch_size=None), stand_in, cuda_graphs=True)
    assert reasons(caplog) == ["no two batches in a row have the same shapes and plain values"]


def test_batches_that_hold_other_things(stand_in: StandIn, tmp_path: Path, caplog: Any) -> None:
    class Thing:
        pass

    class Takes(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch[:2], batch_idx)

    batches = [(torch.randn(3, 4), torch.zeros(3, dtype=torch.long), Thing()) for _ in range(20)]
    with caplog.at_level(logging.INFO):
        fit(seed(Takes), tmp_path, DataLoader(batches, batch_size=None), stand_in, cuda_graphs=True)
    assert reasons(caplog) == ["a batch holds a Thing"]


def test_plain_values_of_a_batch_choose_between_graph_and_eager(stand_in: StandIn, tmp_path: Path) -> None:
    class Takes(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step((batch["x"], batch["y"]), batch_idx)["loss"] * batch["factor"]

    def batches() -> Any:
        generator = torch.Generator().manual_seed(3)
        return [
            {"x": torch.randn(3, 4, generator=generator), "y": torch.zeros(3, dtype=torch.long), "factor": i // 8 + 1}
            for i in range(20)
        ]

    runs = []
    for replays in (False, True):
        module = seed(Takes)
        loader = DataLoader(batches(), batch_size=None)
        fit(module, tmp_path, loader, stand_in, cuda_graphs=replays)
        runs.append(list(module.state_dict().values()))
    assert stand_in.replays == 5 + 8
    same(*runs)


def test_skipped_batches(stand_in: StandIn, tmp_path: Path, caplog: Any) -> None:
    class Skips(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            super().training_step(batch, batch_idx)

    with caplog.at_level(logging.INFO):
        fit(seed(Skips), tmp_path, stand_in=stand_in, cuda_graphs=True)
    assert reasons(caplog) == ["training_step returns no loss"]


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_R1_a_resumed_fit_equals_one_that_ran_through(optimizer: str, stand_in: StandIn, tmp_path: Path) -> None:
    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step in (2, 6, 11):
                trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    module = seed(lambda: Model(optimizer, "step"))
    fit(module, tmp_path, stand_in=stand_in, callbacks=[Saves()], cuda_graphs=True)
    for step in (2, 6, 11):
        path = tmp_path / f"{step}.ckpt"
        resumed = seed(lambda: Model(optimizer, "step"))
        fit(resumed, tmp_path, stand_in=stand_in, ckpt_path=path, cuda_graphs=True)
        same(list(module.state_dict().values()), list(resumed.state_dict().values()))
        states = torch.load(path, weights_only=True)["optimizer_states"]
        assert all(isinstance(group["lr"], float) for state in states for group in state["param_groups"])
    assert stand_in.captured == 3


def test_optimizers_are_capturable_for_the_run_and_not_in_files() -> None:
    """On a CPU no optimizer may be capturable while it steps, so this one does not."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([{"params": [parameter], "lr": 0.25}])
    parameter.sum().backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    strategy: Any = SimpleNamespace(optimizers=[optimizer], lr_scheduler_configs=["one"])
    # a device whose name alone is asked for, and on which tensors are made: they hold nothing there
    captured = Captured(SimpleNamespace(strategy=strategy), torch.device("cpu"), capturable=True)  # type: ignore[arg-type]
    assert captured.outside == []
    (group,) = optimizer.param_groups
    assert group["capturable"] is True
    state = optimizer.state_dict()
    same(before, state)
    with captured.on_device():
        assert isinstance(group["lr"], Tensor)
        captured.write()
    assert group["lr"] == 0.25
    optimizer.load_state_dict(state)  # what a file of a run without graphs does
    captured.undo()
    assert optimizer.param_groups[0]["capturable"] is False
    same(before, optimizer.state_dict())


def test_learning_rates_are_written_where_they_have_changed(stand_in: StandIn, tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([parameter], lr=0.25)
    strategy: Any = SimpleNamespace(optimizers=[optimizer], lr_scheduler_configs=["one"])
    captured = Captured(SimpleNamespace(strategy=strategy), torch.device("cpu"))  # type: ignore[arg-type]
    (group,) = optimizer.param_groups
    seen = []
    for rate in (0.25, 0.25, 0.125, 0.5):
        group["lr"] = rate
        captured.write()
        with captured.on_device():
            seen.append((float(group["lr"]), group["lr"]._version))
    assert [rate for rate, _ in seen] == [0.25, 0.25, 0.125, 0.5]
    assert [version - seen[0][1] for _, version in seen] == [0, 0, 1, 2]
    with captured.on_device():
        group["lr"] = 3.0  # the step itself sets one
    assert group["lr"] == 3.0


def test_an_optimizer_of_others_steps_outside() -> None:
    class Mine(torch.optim.Adam):
        pass

    parameter = nn.Parameter(torch.ones(3))
    made = [Mine([parameter]), torch.optim.SGD([parameter], lr=0.1, fused=True), torch.optim.SGD([parameter], lr=0.1)]
    strategy: Any = SimpleNamespace(optimizers=made, lr_scheduler_configs=["one"])
    captured = Captured(SimpleNamespace(strategy=strategy), torch.device("cpu"))  # type: ignore[arg-type]
    assert captured.outside == [made[0], made[2]]
    strategy.lr_scheduler_configs = []
    captured = Captured(SimpleNamespace(strategy=strategy), torch.device("cpu"))  # type: ignore[arg-type]
    assert captured.outside == [made[0]]


# --- the calls of torch.cuda, of which nothing runs here -----------------------------------------------------------------


class Cuda:
    """Stands for ``torch.cuda``: notes in which order what is called."""

    def __init__(self, monkeypatch: Any, fails: bool = False) -> None:
        self.log: list[str] = []
        self.fails, self.mode, self.current = fails, 0, "main"
        named: dict[str, Any] = {
            "current_stream": lambda device=None: Stream(self.current, self),
            "stream": self.stream,
            "graph": self.graph,
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.log.append("replay")),
            "graph_pool_handle": lambda: (0, 7),
            "current_device": lambda: 0,
            "default_generators": [self],
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": self.set_mode,
        }
        for name, value in named.items():
            monkeypatch.setattr(torch.cuda, name, value, raising=False)
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch.cuda.memory, name, lambda *args, name=name: self.log.append(f"{name}{args}"))
        monkeypatch.setattr(torch, "Generator", lambda device: "fresh")
        monkeypatch.setattr(graphs, "_stream", lambda device: Stream("side", self))

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        """As torch's: where the capture cannot be ended, the stream that was current before does not come back."""
        self.log.append(f"begin {pool} {stream.name} {capture_error_mode}")
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            if self.fails:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            self.current = before

    def set_mode(self, mode: Any) -> None:
        self.mode = {"warn": 1}.get(mode, mode)
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)

    def get_state(self) -> str:
        return "state"

    def set_state(self, state: str) -> None:
        self.log.append(f"set {state}")

    def graphsafe_set_state(self, generator: str) -> None:
        self.log.append(generator)


class Stream:
    def __init__(self, name: str, cuda: Cuda) -> None:
        self.name, self.cuda = name, cuda

    def wait_stream(self, other: Stream) -> None:
        self.cuda.log.append(f"{self.name} waits for {other.name}")


DEVICE = torch.device("cuda", 0)


def test_capturing_with_torch(monkeypatch: Any) -> None:
    cuda = Cuda(monkeypatch)
    real = graphs.CudaGraphs(DEVICE)
    with real.aside():
        assert cuda.current == "side"
    replay, result = real.record(lambda: (cuda.current, gc.isenabled()))
    assert result == ("side", False)
    replay()
    assert cuda.log == [
        "side waits for main", "main waits for side", "begin (0, 7) side thread_local", "replay",
    ]  # fmt: skip
    assert (cuda.current, gc.isenabled()) == ("main", True)


@pytest.mark.parametrize("ends", [False, True])
def test_a_capture_of_torch_that_fails(ends: bool, monkeypatch: Any) -> None:
    cuda = Cuda(monkeypatch, fails=not ends)
    real = graphs.CudaGraphs(DEVICE)

    def region() -> None:
        raise ValueError("theirs")

    with pytest.raises((ValueError, RuntimeError)) as caught:
        real.record(region)
    assert graphs._reason(caught.value) == "it cannot be captured: ValueError: theirs"
    assert cuda.log[1:] == [
        "_cuda_endAllocateToPool(0, (0, 7))", "_cuda_releasePool(0, (0, 7))", "fresh", "set state",
    ]  # fmt: skip
    assert (cuda.current, gc.isenabled()) == ("main", True)


def test_a_pool_that_torch_has_ended_itself_is_not_released_twice(monkeypatch: Any) -> None:
    cuda = Cuda(monkeypatch, fails=True)

    def refuses(*args: Any) -> None:
        raise RuntimeError("not recording to this pool")

    monkeypatch.setattr(torch.cuda.memory, "_cuda_endAllocateToPool", refuses)
    with pytest.raises(RuntimeError, match="previous error during capture"):
        graphs.CudaGraphs(DEVICE).record(lambda: None)
    assert cuda.log[1:] == ["fresh", "set state"]


def test_waits_are_found_and_other_warnings_passed_on(monkeypatch: Any) -> None:
    cuda = Cuda(monkeypatch)
    real = graphs.CudaGraphs(DEVICE)

    def step() -> list[str]:
        with real.waits() as found:
            assert cuda.mode == 1
            warnings.warn("called a synchronizing CUDA operation (Triggered internally at ...)", stacklevel=1)
            warnings.warn("theirs", stacklevel=1)
        return found

    with pytest.warns(UserWarning, match="^theirs$") as caught:
        found = step()
    assert len(caught) == 1
    assert len(found) == 1
    assert "test_graphs.py" in found[0]
    assert cuda.mode == 0


def test_a_step_that_raises_while_it_is_watched_takes_the_watch_off(monkeypatch: Any) -> None:
    cuda = Cuda(monkeypatch)
    with pytest.raises(KeyError), graphs.CudaGraphs(DEVICE).waits():
        raise KeyError
    assert cuda.mode == 0
