# SPDX-License-Identifier: Apache-2.0
"""A small stand-in for the Trainer: it counts, calls the callbacks' hooks in order, and saves and resumes for real."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from leyden.checkpoint_io import TorchCheckpointIO
from leyden.types import TrainerFn, TrainerState


class Kill(BaseException):
    """Ends the process at once, as SIGKILL would: no hook hears of it."""


class FakeIO(TorchCheckpointIO):
    """Tells the trainer of what it writes; a kill that meets it on the thread of an asynchronous save is the trainer's."""

    def __init__(self, trainer: FakeTrainer) -> None:
        self.trainer = trainer

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.trainer.happens(f"save {os.path.basename(path)}")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        torch.save(checkpoint, f"{path}.part")
        os.replace(f"{path}.part", path)
        self.trainer.happens(f"saved {os.path.basename(path)}")


class FakeStrategy:
    saves_shards = False
    root_device = torch.device("cpu")
    world_size = 1

    def __init__(self, trainer: FakeTrainer) -> None:
        self.trainer = trainer
        self.checkpoint_io: Any = FakeIO(trainer)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return decision

    def barrier(self, name: str | None = None) -> None: ...

    def remove_checkpoint(self, filepath: str) -> None:
        self.trainer.happens(f"delete {os.path.basename(filepath)}")
        Path(filepath).unlink(missing_ok=True)


class FakeLogger:
    name: str | None = "run"
    version: int | str | None = 3

    def __init__(self, save_dir: str | None) -> None:
        self.save_dir = save_dir
        self.rows: list[tuple[dict[str, float], int | None]] = []
        self.told: list[Any] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((dict(metrics), step))

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        self.told.append(checkpoint_callback)


class FakeTrainer:
    """Attributes as a Trainer has them; ``fit`` runs ``epochs`` of ``batches`` and validates as it is told.

    ``metrics(when, trainer)`` returns what is logged at ``"batch"``, ``"validation"``, ``"epoch"``. ``fails`` maps an
    event (``"save epoch=0-step=4.ckpt"``, ``"batch 3"`` ...) to what is raised when it is about to happen.
    """

    def __init__(
        self,
        root: Path | str = ".",
        callbacks: Iterable[Any] = (),
        epochs: int = 2,
        batches: int = 4,
        val_check_interval: Any = 1.0,
        check_val_every_n_epoch: int | None = 1,
        val_batches: int = 1,
        sanity: bool = False,
        accumulate: int = 1,
        metrics: Callable[[str, FakeTrainer], dict[str, float]] = lambda when, trainer: {},
    ) -> None:
        self.default_root_dir = str(root)
        self.callbacks = sorted(callbacks, key=lambda callback: callback.order)
        self.max_epochs, self.num_training_batches = epochs, batches
        self.val_check_interval, self.check_val_every_n_epoch = val_check_interval, check_val_every_n_epoch
        self.num_val_batches = [val_batches] if val_batches else []
        self.sanity, self.accumulate_grad_batches, self.metrics = sanity, accumulate, metrics
        self.state = TrainerState()
        self.state.fn = TrainerFn.FITTING
        self.strategy = FakeStrategy(self)
        self.loggers: list[Any] = []
        self.optimizers: list[Any] = []
        self.lr_scheduler_configs: list[Any] = []
        self.callback_metrics: dict[str, torch.Tensor] = {}
        self.fast_dev_run, self.should_stop, self.sanity_checking = False, False, False
        self.is_global_zero, self.global_rank, self.world_size = True, 0, 1
        self.current_epoch, self.global_step, self.batches_that_stepped = 0, 0, 0
        self.log_every_n_steps = 50
        self.ckpt_path: str | None = None
        self.named_ckpt_path: str | None = None
        self.events: list[str] = []
        self.fails: dict[str, BaseException] = {}
        self.failure: BaseException | None = None  # of a save on a thread
        self.position: tuple[int, str] = (0, "start")  # batches done in this epoch, what happened last
        self.module = SimpleNamespace(automatic_optimization=True)

    @property
    def checkpoint_callbacks(self) -> list[Any]:
        return [callback for callback in self.callbacks if callback.order == 100]

    @property
    def enable_validation(self) -> bool:
        return bool(self.num_val_batches)

    def record(self, metrics: Mapping[str, float], step: int) -> None:
        for logger in self.loggers:
            logger.log_metrics(metrics, step=step)

    def validation_due(self) -> bool:
        if not self.enable_validation:
            return False
        done, every = self.position[0], self.val_check_interval
        at = every if isinstance(every, int) else max(1, int(self.num_training_batches * every))
        return done % at == 0 and (self.current_epoch + 1) % (self.check_val_every_n_epoch or 1) == 0

    def happens(self, event: str) -> None:
        self.events.append(event)
        if event in self.fails:
            raise self.fails.pop(event)

    def call(self, name: str, *args: Any, only: bool | None = None) -> None:
        for callback in self.callbacks:
            if only is None or callback.monitors is only:
                unused = getattr(callback, "unused_hooks", lambda trainer: frozenset())(self)
                if name not in unused:
                    getattr(callback, name)(self, self.module, *args)

    def log(self, when: str) -> None:
        for name, value in self.metrics(when, self).items():
            self.callback_metrics[name] = torch.tensor(value)

    def save_checkpoint(self, filepath: Any, weights_only: bool | None = None, storage_options: Any = None) -> None:
        self.strategy.checkpoint_io.settle()
        states = {callback.state_key: callback.state_dict() for callback in self.callbacks}
        content = {
            "global_step": self.global_step,
            "epoch": self.current_epoch,
            "position": list(self.position),
            "metrics": dict(self.callback_metrics),
            **({} if weights_only else {"callbacks": states}),
        }
        self.strategy.checkpoint_io.save_checkpoint(content, filepath)

    def fit(self, ckpt_path: str | None = None, named: bool = False) -> None:
        """``named``: the user gave the path; otherwise it was found, as by ``ckpt_path="last"``."""
        self.ckpt_path = ckpt_path
        self.named_ckpt_path = ckpt_path if named else None
        self.call("setup", "fit")
        self.strategy.checkpoint_io.listen(lambda error: setattr(self, "failure", error))
        if ckpt_path is not None:
            content = torch.load(ckpt_path, weights_only=True)
            self.global_step, self.current_epoch = content["global_step"], content["epoch"]
            self.position, self.callback_metrics = tuple(content["position"]), content["metrics"]
            for callback in self.callbacks:
                if callback.state_key in content["callbacks"]:
                    callback.load_state_dict(content["callbacks"][callback.state_key])
        try:
            self.run()
            self.call("teardown", "fit")
        except Kill:
            raise
        except BaseException as error:
            with suppress(Exception):
                self.strategy.checkpoint_io.settle()
            self.call("on_exception", error)
            raise

    def run(self) -> None:
        self.call("on_fit_start")
        if self.sanity:
            self.sanity_checking = True
            self.call("on_validation_start")
            self.call("on_validation_end")
            self.sanity_checking = False
        self.call("on_train_start")
        while self.current_epoch < self.max_epochs and not self.should_stop:
            self.run_epoch()
        self.call("on_train_end")
        self.call("on_fit_end")

    def run_epoch(self) -> None:
        done, last = self.position
        if last == "start":
            self.call("on_train_epoch_start")
        if last == "batch" and self.validation_due():
            self.validate()
        while done < self.num_training_batches and last != "epoch" and not self.should_stop:
            self.happens(f"batch {self.batches_that_stepped}")
            self.call("on_train_batch_start", None, done)
            done += 1
            self.position = (done, "batch")
            self.global_step += done % self.accumulate_grad_batches == 0 or done == self.num_training_batches
            self.log("batch")
            self.call("on_train_batch_end", None, None, done - 1)
            self.batches_that_stepped += 1
            if self.failure is not None:
                raise self.failure
            if self.validation_due():
                self.validate()
        if last != "epoch":
            self.position = (done, "epoch")
            self.log("epoch")
            self.call("on_train_epoch_end", only=False)
            self.call("on_train_epoch_end", only=True)
        self.position = (0, "start")
        self.current_epoch += 1

    def validate(self) -> None:
        self.position = (self.position[0], "validation")
        self.call("on_validation_start")
        self.log("validation")
        self.call("on_validation_end")


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., FakeTrainer]:
    """Build a stand-in Trainer whose ``default_root_dir`` is ``tmp_path``."""

    def make(callbacks: Iterable[Any] = (), **arguments: Any) -> FakeTrainer:
        return FakeTrainer(tmp_path, callbacks, **arguments)

    return make


@pytest.fixture
def kill() -> type[Kill]:
    return Kill


@pytest.fixture
def make_logger() -> Callable[..., FakeLogger]:
    return FakeLogger
