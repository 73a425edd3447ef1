# SPDX-License-Identifier: Apache-2.0
"""Small fits over a matrix of optimizers, schedules, precisions and hooks, written for Lightning, run on either framework.

    python tests/acceptance/optimization_matrix_script.py leyden              > ours.json
    python tests/acceptance/optimization_matrix_script.py lightning.pytorch   > theirs.json
    python tests/acceptance/optimization_matrix_script.py lightning.pytorch --output tests/acceptance/golden/matrix.json

Each case says what it changes of one plain fit: arguments of the Trainer, methods of the module. Losses, learning
rates, logged rows, metrics, counters and a digest of the weights are kept, in hexadecimal where they are floats.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import logging
import math
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
    StepLR,
)
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_parity_script import machine

Case = dict[str, Any]
CASES: dict[str, Callable[[], Case]] = {}


def case(make: Callable[[], Case]) -> Callable[[], Case]:
    """Register a case under the name of its function."""
    CASES[make.__name__] = make
    return make


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Batches without a length."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


def data(samples: int, seed: int) -> TensorDataset:
    """Return inputs of 6 features and a target that depends on them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 6, generator=generator)
    return TensorDataset(x, (x @ torch.linspace(-1, 1, 6)).sin().unsqueeze(1))


def make_module(L: Any, methods: Case) -> Any:
    """Return a plain module of the framework ``L``, with ``methods`` in place of its own."""

    class Net(L.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.1))
            self.head = nn.Linear(8, 1)
            self.losses: list[str] = []
            self.rates: list[list[str]] = []
            self.notes: list[Any] = []
            self.automatic_optimization = not methods.get("manual", False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x))  # type: ignore[no-any-return]

        def loss(self, batch: Any) -> torch.Tensor:
            x, y = batch
            loss = nn.functional.mse_loss(self(x), y)
            self.losses.append(float(loss.detach()).hex())
            found = self.optimizers()
            found = found if isinstance(found, list) else [found]
            self.rates.append([float(group["lr"]).hex() for one in found for group in one.param_groups])
            return loss

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.log("loss", loss, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            self.log("val_loss", nn.functional.mse_loss(self(x), y))

        def configure_optimizers(self) -> Any:
            return SGD(self.parameters(), lr=0.1, momentum=0.9)

    body = {name: value for name, value in methods.items() if name != "manual"}
    return type("Net", (Net,), body)()


# ---------------------------------------------------------------------- the cases


@case
def plain() -> Case:
    return {}


@case
def accumulate_divides() -> Case:
    return {"trainer": {"accumulate_grad_batches": 2}}


@case
def accumulate_short_window() -> Case:
    return {"trainer": {"accumulate_grad_batches": 4}, "semantics": True}


@case
def accumulate_longer_than_epoch() -> Case:
    return {"trainer": {"accumulate_grad_batches": 20}, "semantics": True}


@case
def accumulate_by_schedule() -> Case:
    return {
        "callbacks": lambda c: [c.GradientAccumulationScheduler({0: 2, 1: 5, 2: 1})],
        "trainer": {"max_epochs": 4},
        "estimate_differs": True,  # on purpose: theirs does not know the schedule
    }


@case
def clip_norm() -> Case:
    return {"trainer": {"gradient_clip_val": 0.05}}


@case
def clip_value() -> Case:
    return {"trainer": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}}


@case
def clip_own() -> Case:
    def configure_gradient_clipping(
        self: Any, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any
    ) -> None:
        self.notes.append([gradient_clip_val, gradient_clip_algorithm])
        self.clip_gradients(optimizer, gradient_clip_val=0.03, gradient_clip_algorithm="norm")
        self.log("clipped", 0.03)

    return {"methods": {"configure_gradient_clipping": configure_gradient_clipping}}


@case
def clip_and_accumulate() -> Case:
    return {"trainer": {"gradient_clip_val": 0.05, "accumulate_grad_batches": 5}}


@case
def stream() -> Case:
    return {
        "stream": True,
        "trainer": {"accumulate_grad_batches": 2, "val_check_interval": 3},
        "semantics": True,
        "estimate_differs": True,  # theirs is -1 where the number is not known, ours infinity
    }


@case
def limits_and_intervals() -> Case:
    return {"trainer": {"limit_train_batches": 7, "val_check_interval": 0.4, "limit_val_batches": 0.5, "max_epochs": 3}}


@case
def intervals_across_epochs() -> Case:
    return {"trainer": {"val_check_interval": 7, "check_val_every_n_epoch": None, "max_epochs": 3}}


@case
def every_second_epoch() -> Case:
    return {"trainer": {"check_val_every_n_epoch": 2, "max_epochs": 4}}


@case
def steps_bound() -> Case:
    return {"trainer": {"max_epochs": -1, "max_steps": 23, "accumulate_grad_batches": 2}}


def scheduled(make: Callable[[Any], Any], optimizer: Any = SGD, lr: float = 0.1, **more: Any) -> Case:
    def configure_optimizers(self: Any) -> Any:
        made = optimizer(self.parameters(), lr=lr)
        return {"optimizer": made, "lr_scheduler": {"scheduler": make(made), **more}}

    return {"configure_optimizers": configure_optimizers}


@case
def schedule_by_epoch() -> Case:
    return {"methods": scheduled(lambda o: StepLR(o, 1, gamma=0.5)), "trainer": {"max_epochs": 4}}


@case
def schedule_by_epoch_frequency() -> Case:
    return {"methods": scheduled(lambda o: ExponentialLR(o, 0.5), frequency=2), "trainer": {"max_epochs": 5}}


@case
def schedule_by_step() -> Case:
    return {"methods": scheduled(lambda o: CosineAnnealingLR(o, 20), interval="step", name="mine")}


@case
def schedule_by_step_accumulated() -> Case:
    methods = scheduled(lambda o: ExponentialLR(o, 0.9), interval="step", frequency=2)
    return {"methods": methods, "trainer": {"accumulate_grad_batches": 2}}


@case
def schedule_one_cycle_by_step() -> Case:
    def configure_optimizers(self: Any) -> Any:
        optimizer = Adam(self.parameters(), lr=0.01)
        total = self.trainer.estimated_stepping_batches
        self.notes.append(total)
        schedule = OneCycleLR(optimizer, max_lr=0.1, total_steps=total)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    return {
        "methods": {"configure_optimizers": configure_optimizers},
        "trainer": {"accumulate_grad_batches": 3, "max_epochs": 3},
        "semantics": True,
    }


@case
def schedule_one_cycle_bare() -> Case:
    methods = scheduled(lambda o: OneCycleLR(o, max_lr=0.1, total_steps=20))
    return {"methods": methods, "trainer": {"max_epochs": 3}, "semantics": True}


@case
def schedule_plateau() -> Case:
    methods = scheduled(lambda o: ReduceLROnPlateau(o, patience=0, threshold=0.5), monitor="val_loss")
    return {"methods": methods, "trainer": {"max_epochs": 5}}


@case
def schedule_plateau_mid_epoch() -> Case:
    methods = scheduled(lambda o: ReduceLROnPlateau(o, patience=0, threshold=0.5), monitor="val_loss", frequency=2)
    return {"methods": methods, "trainer": {"max_epochs": 6, "val_check_interval": 5}}


@case
def schedule_plateau_by_step() -> Case:
    methods = scheduled(
        lambda o: ReduceLROnPlateau(o, patience=1, threshold=0.9), monitor="val_loss", interval="step", frequency=3,
        strict=False,
    )  # fmt: skip
    return {"methods": methods, "trainer": {"max_epochs": 3, "val_check_interval": 3}}


@case
def schedule_plateau_on_training_loss() -> Case:
    methods = scheduled(lambda o: ReduceLROnPlateau(o, patience=0, threshold=0.9), monitor="loss_epoch")
    return {"methods": methods, "trainer": {"max_epochs": 5}}


@case
def schedule_several() -> Case:
    def configure_optimizers(self: Any) -> Any:
        optimizer = SGD([{"params": self.body.parameters()}, {"params": self.head.parameters(), "lr": 0.05}], lr=0.1)
        return [optimizer], [
            {"scheduler": LambdaLR(optimizer, lambda n: 1 / (1 + n)), "interval": "step", "frequency": 4},
            StepLR(optimizer, 1, gamma=0.3),
        ]

    return {"methods": {"configure_optimizers": configure_optimizers}, "trainer": {"max_epochs": 3}}


@case
def schedule_own_step() -> Case:
    class Schedule:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer, self.count = optimizer, 0

        def advance(self) -> None:
            self.count += 1
            for group in self.optimizer.param_groups:
                group["lr"] = 0.1 / (1 + self.count)

        def state_dict(self) -> Any:
            return {"count": self.count}

        def load_state_dict(self, state: Any) -> None:
            self.count = state["count"]

    def lr_scheduler_step(self: Any, scheduler: Any, metric: Any) -> None:
        self.notes.append([metric, self.trainer.current_epoch, self.trainer.global_step])
        scheduler.advance()

    return {"methods": {**scheduled(Schedule, interval="step", frequency=3), "lr_scheduler_step": lr_scheduler_step}}


@case
def warm_up() -> Case:
    def optimizer_step(self: Any, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        optimizer.step(closure=optimizer_closure)
        if self.trainer.global_step < 12:
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * (self.trainer.global_step + 1) / 12
        self.notes.append([epoch, batch_idx, self.trainer.global_step])

    return {"methods": {"optimizer_step": optimizer_step}, "trainer": {"gradient_clip_val": 0.1}}


@case
def warm_up_accumulated() -> Case:
    made = warm_up()
    made["trainer"]["accumulate_grad_batches"] = 2
    return made


@case
def zero_grad_own() -> Case:
    def optimizer_zero_grad(self: Any, epoch: int, batch_idx: int, optimizer: Any) -> None:
        self.notes.append([epoch, batch_idx])
        optimizer.zero_grad(set_to_none=False)

    return {"methods": {"optimizer_zero_grad": optimizer_zero_grad}, "trainer": {"accumulate_grad_batches": 2}}


@case
def backward_own() -> Case:
    def backward(self: Any, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        self.log("scaled", loss.detach())
        (2 * loss).backward(*args, **kwargs)

    return {"methods": {"backward": backward}, "trainer": {"accumulate_grad_batches": 2}}


@case
def skipped_batches() -> Case:
    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        if batch_idx % 3 == 1:
            return None
        self.log("loss", loss)
        return {"loss": loss, "more": batch_idx}

    def on_train_batch_end(self: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.notes.append(sorted(outputs) if outputs else None)

    return {"methods": {"training_step": training_step, "on_train_batch_end": on_train_batch_end}}


@case
def skipped_batches_in_windows() -> Case:
    made = skipped_batches()
    made["trainer"] = {"accumulate_grad_batches": 2}
    return made


@case
def skipped_epoch() -> Case:
    def on_train_batch_start(self: Any, batch: Any, batch_idx: int) -> Any:
        return -1 if batch_idx == 6 and self.current_epoch == 1 else None

    return {"methods": {"on_train_batch_start": on_train_batch_start}, "trainer": {"max_epochs": 3}}


@case
def lbfgs() -> Case:
    def configure_optimizers(self: Any) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.3, max_iter=4, line_search_fn="strong_wolfe")

    return {"methods": {"configure_optimizers": configure_optimizers}}


@case
def lbfgs_clipped() -> Case:
    made = lbfgs()
    made["trainer"] = {"gradient_clip_val": 0.1}
    return made


@case
def no_optimizer() -> Case:
    return {"methods": {"configure_optimizers": lambda self: None, "rates": []}}


def manual_two(self: Any, batch: Any, batch_idx: int) -> None:
    first, second = self.optimizers()
    self.toggle_optimizer(first)
    loss = self.loss(batch)
    first.zero_grad()
    self.manual_backward(loss)
    self.clip_gradients(first, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
    first.step()
    self.untoggle_optimizer(first)
    with self.toggled_optimizer(second):
        loss = self.loss(batch)
        self.manual_backward(loss)
        if (batch_idx + 1) % 2 == 0:
            self.clip_gradients(second, gradient_clip_val=0.02, gradient_clip_algorithm="value")
            second.step()
            second.zero_grad()
    for schedule in self.lr_schedulers() or ():
        schedule.step()
    self.log("loss", loss, on_step=True, on_epoch=True)


def two_optimizers(self: Any) -> Any:
    first, second = SGD(self.body.parameters(), lr=0.1), Adam(self.head.parameters(), lr=0.01)
    return [first, second], [ExponentialLR(first, 0.97), CosineAnnealingLR(second, 30)]


@case
def manual_two_optimizers() -> Case:
    methods = {"manual": True, "training_step": manual_two, "configure_optimizers": two_optimizers}
    return {"methods": methods, "semantics": True}


@case
def manual_closure() -> Case:
    def training_step(self: Any, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()

        def closure() -> torch.Tensor:
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)

    def configure_optimizers(self: Any) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.3, max_iter=3)

    return {"methods": {"manual": True, "training_step": training_step, "configure_optimizers": configure_optimizers}}


@case
def manual_accumulation() -> Case:
    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        optimizer = self.optimizers()
        loss = self.loss(batch) / 3
        self.manual_backward(loss)
        if (batch_idx + 1) % 3 == 0 or self.trainer.is_last_batch:
            optimizer.step()
            optimizer.zero_grad()
        self.log("loss", loss)
        self.notes.append([self.trainer.global_step, self.trainer.is_last_batch])
        return {"anything": 1}

    return {"methods": {"manual": True, "training_step": training_step}, "trainer": {"log_every_n_steps": 4}}


def precise(name: str) -> Case:
    def hooked(self: Any, optimizer: Any) -> None:
        self.notes.append(str(next(iter(self.parameters())).grad.dtype))

    return {
        "trainer": {"precision": name, "gradient_clip_val": 0.1, "accumulate_grad_batches": 2},
        "methods": {"on_before_optimizer_step": hooked},
    }


for _name in ("32-true", "64-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed"):
    CASES["precision_" + _name.replace("-", "_")] = lambda name=_name: precise(name)  # type: ignore[misc]


@case
def precision_64_and_lbfgs() -> Case:
    return {**lbfgs(), "trainer": {"precision": "64-true"}}


@case
def logging_everywhere() -> Case:
    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss, prog_bar=True)
        self.log("both", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("epoch", loss, on_step=False, on_epoch=True)
        self.log("hidden", loss, logger=False, on_epoch=True)
        self.log("one", 0.1, on_epoch=True)
        self.log("int", 3, on_epoch=True)
        self.log("int_tensor", torch.tensor(batch_idx), on_epoch=True)
        self.log("flag", batch_idx % 2 == 0, on_epoch=True)
        self.log("double", loss.double() / 3, on_epoch=True)
        self.log("shaped", loss.reshape(1, 1), on_epoch=True)
        self.log("sum", loss, on_epoch=True, reduce_fx="sum")
        self.log("min", loss, on_epoch=True, reduce_fx=torch.min)
        self.log("max", loss, on_epoch=True, reduce_fx="max")
        self.log("weighted", loss, on_epoch=True, batch_size=batch_idx + 1)
        self.log_dict({"group/a": loss, "group/b": 2 * loss}, on_epoch=True)
        return loss

    def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
        x, y = batch
        loss = nn.functional.mse_loss(self(x), y)
        self.log("val_loss", loss, prog_bar=True)
        self.log("val_both", loss, on_step=True, on_epoch=True)
        self.log("val_max", loss, reduce_fx="max")

    def note(name: str) -> Any:
        def hook(self: Any, *args: Any) -> None:
            self.log(name, float(self.trainer.global_step))

        return hook

    names = (
        "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_train_batch_end", "on_before_zero_grad",
        "on_after_backward", "on_before_optimizer_step", "on_validation_start", "on_validation_epoch_start",
        "on_validation_batch_start", "on_validation_batch_end", "on_validation_epoch_end", "on_train_epoch_end",
    )  # fmt: skip
    hooks = {name: note(name) for name in names}
    return {
        "methods": {**hooks, "training_step": training_step, "validation_step": validation_step},
        "trainer": {"val_check_interval": 5, "log_every_n_steps": 3, "accumulate_grad_batches": 2},
    }


@case
def step_of_the_user() -> Case:
    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss)
        self.log("step", float(1000 + 10 * self.trainer.global_step))
        return loss

    def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", 1.0)
        self.log("step", float(self.current_epoch))

    return {"methods": {"training_step": training_step, "validation_step": validation_step}}


@case
def no_step_logging() -> Case:
    return {"trainer": {"log_every_n_steps": 0}}


# ---------------------------------------------------------------------- running them


def run_case(L: Any, name: str) -> dict[str, Any]:
    """Run one case on the framework ``L`` and return its figures."""
    loggers = importlib.import_module(f"{L.__name__}.loggers")
    callbacks = importlib.import_module(f"{L.__name__}.callbacks")
    chosen = CASES[name]()

    class Memory(loggers.Logger):  # type: ignore[name-defined, misc]
        name, version = "memory", 0

        def __init__(self) -> None:
            super().__init__()
            self.rows: set[tuple[int, str, str]] = set()

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            self.rows |= {(int(step or 0), key, float(value).hex()) for key, value in metrics.items()}

        def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
            pass

    L.seed_everything(11, verbose=False)
    train: Any = data(80, 1)
    val = DataLoader(data(20, 2), batch_size=8)
    train = DataLoader(train, batch_size=8, shuffle=True)
    if chosen.get("stream"):
        train = DataLoader(Stream([train.dataset[8 * i : 8 * i + 8] for i in range(9)]), batch_size=None)
    memory = Memory()
    with tempfile.TemporaryDirectory() as folder:
        settings = {"max_epochs": 2, "log_every_n_steps": 2, **chosen.get("trainer", {})}
        if chosen.get("semantics") and L.__name__ == "leyden":
            settings["semantics"] = "lightning"
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            logger=memory,
            callbacks=chosen.get("callbacks", lambda _: [])(callbacks),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            **settings,
        )
        module = make_module(L, chosen.get("methods", {}))
        trainer.fit(module, train, val)
    weights = b"".join(value.contiguous().view(torch.uint8).numpy().tobytes() for value in module.state_dict().values())
    metrics = {key: float(value).hex() for key, value in sorted(trainer.callback_metrics.items())}
    assert module.losses
    assert all(math.isfinite(float.fromhex(loss)) for loss in module.losses)
    return {
        "losses": module.losses,
        "rates": module.rates,
        "notes": module.notes,
        "rows": sorted(memory.rows),
        "callback_metrics": metrics,
        "progress_bar": {key: float(value).hex() for key, value in sorted(trainer.progress_bar_metrics.items())},
        "logged": {key: float(value).hex() for key, value in sorted(trainer.logged_metrics.items())},
        "dtypes": {key: str(value.dtype) for key, value in sorted(trainer.callback_metrics.items())},
        "global_step": trainer.global_step,
        "current_epoch": trainer.current_epoch,
        "estimated": None if chosen.get("estimate_differs") else trainer.estimated_stepping_batches,
        "weights": hashlib.sha256(weights).hexdigest(),
    }


def run(framework: str, names: list[str] | None = None) -> dict[str, Any]:
    """Run the cases on the framework of that import name; return ``{case: figures}``."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    L = importlib.import_module(framework)
    for logger in (framework, "lightning", "lightning.pytorch"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    return {name: run_case(L, name) for name in names or CASES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("framework", help="the module to import as L: leyden or lightning.pytorch")
    parser.add_argument("cases", nargs="*", help="only these cases")
    parser.add_argument("--output", type=Path, help="write the figures here instead of to the standard output")
    options = parser.parse_args()
    text = json.dumps({"machine": machine(), "result": run(options.framework, options.cases)})
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
