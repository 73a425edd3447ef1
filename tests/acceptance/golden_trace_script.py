# SPDX-License-Identifier: Apache-2.0
"""Small runs in which every hook call is written down; the framework to trace is an argument.

    run_scenario("plain", lightning.pytorch, "full", tmp_dir) -> ["S.fit()", "M.configure_callbacks()", ...]
    run_scenario("plain", leyden, "full", tmp_dir)            -> the same list, if hooks run in the same order

A scenario is one script: a module, loaders, arguments of the Trainer, one or more entry points. Nothing in it knows
which framework it runs on. One line is one call, in the order of entry, so that nesting shows as order:

    who.hook(arguments that matter)

with who = M (module), C (callback), D (data module), O (a callback that the module itself brings), S (the script: which
entry point it called, what that raised). Before the first call of each new state of the run stands a line that says it:

    | entry/stage epoch step mode gradients

In a "full" trace the module overrides every hook that exists. In a "light" one it overrides only what users commonly
do, so that a framework may take its fast path.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

MODULE_HOOKS = """
configure_callbacks() prepare_data() setup(stage) teardown(stage) configure_model() configure_optimizers()
zero_grad(set_to_none=True) state_dict(*args, **kwargs) load_state_dict(state_dict, strict=True, assign=False)
on_save_checkpoint(checkpoint) on_load_checkpoint(checkpoint)
train_dataloader() val_dataloader() test_dataloader() predict_dataloader()
on_before_batch_transfer(batch, dataloader_idx) on_after_batch_transfer(batch, dataloader_idx)
transfer_batch_to_device(batch, device, dataloader_idx)
on_fit_start() on_fit_end()
on_train_start() on_train_end() on_train_epoch_start() on_train_epoch_end()
on_train_batch_start(batch, batch_idx) on_train_batch_end(outputs, batch, batch_idx)
training_step(batch, batch_idx)
on_before_zero_grad(optimizer) on_before_backward(loss) on_after_backward() on_before_optimizer_step(optimizer)
optimizer_step(epoch, batch_idx, optimizer, optimizer_closure=None) optimizer_zero_grad(epoch, batch_idx, optimizer)
backward(loss, *args, **kwargs) lr_scheduler_step(scheduler, metric)
configure_gradient_clipping(optimizer, gradient_clip_val=None, gradient_clip_algorithm=None)
clip_gradients(optimizer, gradient_clip_val=None, gradient_clip_algorithm=None)
on_validation_start() on_validation_end() on_validation_epoch_start() on_validation_epoch_end()
on_validation_batch_start(batch, batch_idx, dataloader_idx=0)
on_validation_batch_end(outputs, batch, batch_idx, dataloader_idx=0)
validation_step(batch, batch_idx, dataloader_idx=0)
on_validation_model_zero_grad() on_validation_model_eval() on_validation_model_train()
on_test_start() on_test_end() on_test_epoch_start() on_test_epoch_end()
on_test_batch_start(batch, batch_idx, dataloader_idx=0) on_test_batch_end(outputs, batch, batch_idx, dataloader_idx=0)
test_step(batch, batch_idx, dataloader_idx=0) on_test_model_eval() on_test_model_train()
on_predict_start() on_predict_end() on_predict_epoch_start() on_predict_epoch_end()
on_predict_batch_start(batch, batch_idx, dataloader_idx=0)
on_predict_batch_end(outputs, batch, batch_idx, dataloader_idx=0)
predict_step(batch, batch_idx, dataloader_idx=0) on_predict_model_eval()
"""

LIGHT_MODULE_HOOKS = """
configure_optimizers() setup(stage) teardown(stage) on_fit_start() on_fit_end()
train_dataloader() val_dataloader() test_dataloader() predict_dataloader()
on_train_start() on_train_end() on_train_epoch_start() on_train_epoch_end()
on_train_batch_start(batch, batch_idx) on_train_batch_end(outputs, batch, batch_idx) training_step(batch, batch_idx)
on_before_zero_grad(optimizer) on_after_backward() on_before_optimizer_step(optimizer)
on_validation_start() on_validation_end() on_validation_epoch_start() on_validation_epoch_end()
validation_step(batch, batch_idx, dataloader_idx=0) on_validation_batch_end(outputs, batch, batch_idx, dataloader_idx=0)
on_test_start() on_test_epoch_end() on_test_end() test_step(batch, batch_idx, dataloader_idx=0)
predict_step(batch, batch_idx, dataloader_idx=0) on_predict_epoch_end()
on_save_checkpoint(checkpoint) on_load_checkpoint(checkpoint)
"""

CALLBACK_HOOKS = """
setup(trainer, pl_module, stage) teardown(trainer, pl_module, stage)
on_fit_start(trainer, pl_module) on_fit_end(trainer, pl_module)
on_sanity_check_start(trainer, pl_module) on_sanity_check_end(trainer, pl_module)
on_train_start(trainer, pl_module) on_train_end(trainer, pl_module)
on_train_epoch_start(trainer, pl_module) on_train_epoch_end(trainer, pl_module)
on_train_batch_start(trainer, pl_module, batch, batch_idx)
on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
on_before_zero_grad(trainer, pl_module, optimizer) on_before_backward(trainer, pl_module, loss)
on_after_backward(trainer, pl_module) on_before_optimizer_step(trainer, pl_module, optimizer)
on_validation_start(trainer, pl_module) on_validation_end(trainer, pl_module)
on_validation_epoch_start(trainer, pl_module) on_validation_epoch_end(trainer, pl_module)
on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx=0)
on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0)
on_test_start(trainer, pl_module) on_test_end(trainer, pl_module)
on_test_epoch_start(trainer, pl_module) on_test_epoch_end(trainer, pl_module)
on_test_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx=0)
on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0)
on_predict_start(trainer, pl_module) on_predict_end(trainer, pl_module)
on_predict_epoch_start(trainer, pl_module) on_predict_epoch_end(trainer, pl_module)
on_predict_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx=0)
on_predict_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0)
on_exception(trainer, pl_module, exception) state_dict() load_state_dict(state_dict)
on_save_checkpoint(trainer, pl_module, checkpoint) on_load_checkpoint(trainer, pl_module, checkpoint)
"""

DATA_HOOKS = """
prepare_data() setup(stage) teardown(stage) on_exception(exception) state_dict() load_state_dict(state_dict)
train_dataloader() val_dataloader() test_dataloader() predict_dataloader()
on_before_batch_transfer(batch, dataloader_idx) on_after_batch_transfer(batch, dataloader_idx)
transfer_batch_to_device(batch, device, dataloader_idx)
"""


def _word(value: Any) -> str:
    """The text of an enum's member or of a plain string."""
    return str(getattr(value, "value", value))


def _kind(value: Any) -> str:
    """Say what was handed to a hook without saying anything that differs from machine to machine."""
    if isinstance(value, dict):
        return "{" + ",".join(sorted(map(str, value))) + "}"
    return "None" if value is None else type(value).__name__


SHOWN: dict[str, Callable[[Any], str]] = {
    "batch_idx": str,
    "dataloader_idx": str,
    "epoch": str,
    "stage": _word,
    "status": _word,
    "strict": str,
    "gradient_clip_val": str,
    "gradient_clip_algorithm": _word,
    "metric": _kind,
    "outputs": _kind,
    "loss": _kind,
    "exception": _kind,
    "optimizer_closure": lambda closure: "None" if closure is None else "given",
    "optimizer": lambda optimizer: next(
        (group["label"] for group in optimizer.param_groups if "label" in group), "none"
    ),
    "scheduler": lambda scheduler: type(scheduler).__name__,
}


class Recorder:
    """The list of calls, and the Trainer and module whose state is shown between them."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.trainer: Any = None
        self.module: Any = None
        self._state = ""

    def __call__(self, who: str, hook: str, arguments: dict[str, Any]) -> None:
        state = self._describe_state()
        if state != self._state:
            self.lines.append(f"| {state}")
            self._state = state
        shown = ", ".join(f"{name}={SHOWN[name](value)}" for name, value in arguments.items() if name in SHOWN)
        self.lines.append(f"{who}.{hook}({shown})")

    def _describe_state(self) -> str:
        if self.trainer is None:
            return "no trainer yet"
        state = self.trainer.state
        entry, stage = _word(state.fn), _word(state.stage)
        mode = "train" if self.module.training else "eval"
        gradients = (
            "inference" if torch.is_inference_mode_enabled() else "grad" if torch.is_grad_enabled() else "no_grad"
        )
        return f"{entry}/{stage} epoch={self.trainer.current_epoch} step={self.trainer.global_step} {mode} {gradients}"


def calls(trace: list[str]) -> list[str]:
    """Return the calls of a trace without the lines that tell the state of the run."""
    return [line for line in trace if not line.startswith("|")]


def traced(base: type, hooks: str, who: str, record: Recorder) -> type:
    """Return a subclass of ``base`` that overrides each hook with its signature: records, then calls the original."""
    lines = ["class Traced(base):"]
    for hook in hooks.replace(") ", ")\n").split("\n"):
        if not hook.strip():
            continue
        name, parameters = hook.strip().removesuffix(")").split("(", 1)
        split = [parameter.strip() for parameter in parameters.split(",") if parameter.strip()]
        plain = [parameter.split("=")[0] for parameter in split if not parameter.startswith("*")]
        passed = [parameter if parameter.startswith("*") else parameter.split("=")[0] for parameter in split]
        lines += [
            f"    def {name}({', '.join(['self', *split])}):",
            f"        record({who!r}, {name!r}, {{{', '.join(f'{parameter!r}: {parameter}' for parameter in plain)}}})",
            f"        return super().{name}({', '.join(passed)})",
        ]
    scope: dict[str, Any] = {"base": base, "record": record, "__name__": __name__}
    exec("\n".join(lines), scope)  # real signatures: frameworks look at them to know which arguments to pass
    cls = scope["Traced"]
    cls.__qualname__ = cls.__name__ = f"{who}Traced"
    return cls  # type: ignore[no-any-return]


METRIC_BY_EPOCH = (1.0, 0.5, 0.75, 0.8, 0.9, 0.95)


def make_net(L: Any) -> type:
    """Return the module that all scenarios train: one linear layer, one logged loss, a metric with known values."""

    class Net(L.LightningModule):
        def __init__(self, plan: dict[str, Any]) -> None:
            super().__init__()
            self.plan = plan
            self.layer = torch.nn.Linear(4, 2)
            self.automatic_optimization = not plan.get("manual", False)

        def loss(self, batch: Any) -> torch.Tensor:
            while isinstance(batch, dict):
                batch = batch["a"]
            return self.layer(batch[0]).pow(2).mean()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            act = self.plan.get("at_step", {}).get(batch_idx)
            if act == "raise":
                raise RuntimeError("the user's own error")
            if act == "skip":
                return None
            if act == "stop":
                self.trainer.should_stop = True
            loss = self.loss(batch)
            self.log("train_loss", loss)
            if not self.automatic_optimization:
                return self.manual_step(batch, batch_idx)
            return {"loss": loss, "extra": batch_idx} if self.plan.get("returns") == "dict" else loss

        def manual_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                self.toggle_optimizer(optimizer)
                self.manual_backward(self.loss(batch))
                self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
                optimizer.step()
                optimizer.zero_grad()
                self.untoggle_optimizer(optimizer)
            if self.trainer.is_last_batch:
                for scheduler in self.lr_schedulers():
                    scheduler.step()

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> torch.Tensor:
            loss = self.loss(batch)
            self.log("val_loss", loss, add_dataloader_idx=True)
            self.log("metric", METRIC_BY_EPOCH[min(self.current_epoch, 5)], add_dataloader_idx=True)
            return loss

        def on_validation_epoch_end(self) -> None:
            if self.plan.get("raise_in") == "on_validation_epoch_end" and not self.trainer.sanity_checking:
                raise RuntimeError("the user's own error")

        def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> torch.Tensor:
            loss = self.loss(batch)
            self.log("test_loss", loss)
            return loss

        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> torch.Tensor:
            return self.layer(batch[0])

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if self.plan.get("end_epoch_at") == (self.current_epoch, batch_idx) else None

        def configure_optimizers(self) -> Any:
            kind = self.plan.get("optimizer", "sgd")
            schedulers = torch.optim.lr_scheduler
            if kind == "none":
                return None
            if kind == "lbfgs":
                return torch.optim.LBFGS(labelled(self, "only"), lr=0.1, max_iter=2)
            optimizer = torch.optim.SGD(labelled(self, "first"), lr=0.1)
            if kind == "two":
                second = torch.optim.SGD(labelled(self, "second"), lr=0.1)
                return [optimizer, second], [schedulers.StepLR(optimizer, 1), schedulers.StepLR(second, 1)]
            if kind == "schedulers":
                return [optimizer], [
                    {"scheduler": schedulers.StepLR(optimizer, 1), "interval": "step", "frequency": 2},
                    {"scheduler": schedulers.ExponentialLR(optimizer, 0.9)},
                    {"scheduler": schedulers.ReduceLROnPlateau(optimizer), "monitor": "metric"},
                    {"scheduler": schedulers.ReduceLROnPlateau(optimizer), "monitor": "train_loss", "interval": "step"},
                ]
            if kind == "every_other_epoch":
                scheduler = {"scheduler": schedulers.StepLR(optimizer, 1), "frequency": 2}
                return {"optimizer": optimizer, "lr_scheduler": scheduler}
            return optimizer

        def configure_callbacks(self) -> list[Any]:
            return [self.plan["own_callback"]] if "own_callback" in self.plan else []

        def train_dataloader(self) -> Any:
            return loaders(self.plan, "train", 4)

        def val_dataloader(self) -> Any:
            return loaders(self.plan, "val", 2)

        def test_dataloader(self) -> Any:
            return loaders(self.plan, "test", 2)

        def predict_dataloader(self) -> Any:
            return loaders(self.plan, "predict", 2)

    return Net


def labelled(module: torch.nn.Module, label: str) -> list[dict[str, Any]]:
    """Return one parameter group that bears a name, by which the trace tells optimizers apart."""
    return [{"params": list(module.parameters()), "label": label}]


class Stream(IterableDataset[tuple[torch.Tensor]]):
    """Rows without a known length."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter((torch.ones(4),) for _ in range(self.rows))


def loaders(plan: dict[str, Any], stage: str, batches: int) -> Any:
    """Return what a ``*_dataloader`` hook returns for this plan: one loader, a list or a dict of them, or None."""
    shape = plan.get(f"{stage}_loaders", batches)
    if isinstance(shape, int):
        return DataLoader(TensorDataset(torch.ones(2 * shape, 4)), batch_size=2)
    if isinstance(shape, str):  # "stream:5"
        return DataLoader(Stream(2 * int(shape.split(":")[1])), batch_size=2)
    if isinstance(shape, dict):
        return {name: loaders({f"{stage}_loaders": each}, stage, batches) for name, each in shape.items()}
    return [loaders({f"{stage}_loaders": each}, stage, batches) for each in shape]


# plan: what the module does. trainer: arguments of the Trainer. entries: what the script calls, in order.
# callbacks: how many tracing callbacks (default 1); checkpoint, early_stopping: attach them; data: use a data module.
SCENARIOS: dict[str, dict[str, Any]] = {
    "plain": {"trainer": {"max_epochs": 2, "gradient_clip_val": 1.0}},
    "no_validation": {"trainer": {"max_epochs": 2, "limit_val_batches": 0}},
    "step_returns_dict": {
        "plan": {"returns": "dict"},
        "trainer": {"max_epochs": 1, "gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
    },
    "accumulation": {"plan": {"train_loaders": 5}, "trainer": {"max_epochs": 2, "accumulate_grad_batches": 2}},
    "accumulation_of_a_stream": {
        "plan": {"train_loaders": "stream:5", "val_loaders": "stream:2"},
        "trainer": {"max_epochs": 2, "accumulate_grad_batches": 2},
    },
    "manual": {"plan": {"manual": True, "optimizer": "two"}, "trainer": {"max_epochs": 2}},
    "validation_inside_epoch": {"trainer": {"max_epochs": 2, "val_check_interval": 0.5}},
    "validation_every_3_batches": {
        "trainer": {
            "max_epochs": 2, "val_check_interval": 3, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0,
        },
    },
    "validation_every_2_epochs": {"trainer": {"max_epochs": 3, "check_val_every_n_epoch": 2}},
    "two_validation_loaders": {"plan": {"val_loaders": [2, 1]}, "trainer": {"max_epochs": 1}},
    "two_training_loaders": {"plan": {"train_loaders": {"a": 3, "b": 2}}, "trainer": {"max_epochs": 1}},
    "test": {"entries": ["test"]},
    "two_test_loaders": {"plan": {"test_loaders": [1, 2]}, "entries": ["test"]},
    "predict": {"entries": ["predict"]},
    "two_predict_loaders": {"plan": {"predict_loaders": [2, 1]}, "entries": ["predict"]},
    "validate": {"entries": ["validate"], "trainer": {"inference_mode": False}},
    "exception_in_training_step": {"plan": {"at_step": {1: "raise"}}, "trainer": {"max_epochs": 1}, "data": True},
    "exception_in_validation": {"plan": {"raise_in": "on_validation_epoch_end"}, "trainer": {"max_epochs": 1}},
    "skipped_step": {"plan": {"at_step": {1: "skip"}}, "trainer": {"max_epochs": 1}},
    "max_steps": {"plan": {"train_loaders": 5}, "trainer": {"max_steps": 3, "max_epochs": 5}},
    "max_steps_with_validation_inside": {"trainer": {"max_steps": 6, "val_check_interval": 2}},
    "max_epochs_0": {"trainer": {"max_epochs": 0}},
    "should_stop": {"plan": {"at_step": {1: "stop"}}, "trainer": {"max_epochs": 3}},
    "should_stop_min_epochs": {"plan": {"at_step": {1: "stop"}}, "trainer": {"max_epochs": 3, "min_epochs": 2}},
    "end_epoch_from_batch_start": {"plan": {"end_epoch_at": (0, 2)}, "trainer": {"max_epochs": 2}},
    "end_epoch_from_first_batch_start": {"plan": {"end_epoch_at": (0, 0)}, "trainer": {"max_epochs": 2}},
    "schedulers": {"plan": {"optimizer": "schedulers"}, "trainer": {"max_epochs": 2}},
    "scheduler_every_other_epoch": {"plan": {"optimizer": "every_other_epoch"}, "trainer": {"max_epochs": 3}},
    "schedulers_with_accumulation": {
        "plan": {"optimizer": "schedulers", "train_loaders": 5},
        "trainer": {"max_epochs": 2, "accumulate_grad_batches": 2},
    },
    "lbfgs": {"plan": {"optimizer": "lbfgs"}, "trainer": {"max_epochs": 1}},
    "no_optimizer": {"plan": {"optimizer": "none"}, "trainer": {"max_epochs": 1}},
    "limits": {"trainer": {"max_epochs": 2, "limit_train_batches": 2, "limit_val_batches": 1}},
    "fast_dev_run": {"trainer": {"fast_dev_run": 2}},
    "overfit_batches": {"trainer": {"max_epochs": 2, "overfit_batches": 1}},
    "reload_dataloaders": {"trainer": {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1}},
    "all_sanity_batches": {"plan": {"val_loaders": [3, 1]}, "trainer": {"max_epochs": 1, "num_sanity_val_steps": -1}},
    "checkpoint_and_early_stopping": {
        "trainer": {"max_epochs": 6},
        "checkpoint": {"monitor": "metric"},
        "early_stopping": {"patience": 2},
    },
    "checkpoint_without_validation": {"trainer": {"max_epochs": 2, "limit_val_batches": 0}, "checkpoint": {}},
    "checkpoint_every_2_steps": {
        "trainer": {"max_epochs": 2}, "checkpoint": {"every_n_train_steps": 2, "save_top_k": -1},
    },
    "two_callbacks": {"trainer": {"max_epochs": 1}, "callbacks": 2, "own_callback": True, "checkpoint": {}},
    "data_module": {"trainer": {"max_epochs": 1}, "data": True, "checkpoint": {}},
    "fit_then_test": {"trainer": {"max_epochs": 1}, "entries": ["fit", "validate", "test", "predict"]},
    "fit_twice": {"trainer": {"max_epochs": 1}, "entries": ["fit", "more", "fit"]},
    "test_the_best": {
        "trainer": {"max_epochs": 3}, "checkpoint": {"monitor": "metric"}, "entries": ["fit", "test best"],
    },
    "save_and_resume": {"trainer": {"max_epochs": 1}, "data": True, "entries": ["fit", "save", "resume"]},
    "resume_inside_epoch": {"trainer": {"max_steps": 6}, "entries": ["fit", "save", "resume"]},
}  # fmt: skip


def run_scenario(name: str, L: Any, kind: str, folder: Path, **trainer_arguments: Any) -> list[str]:
    """Run one scenario on the framework ``L`` and return its trace.

    Args:
        name: A key of ``SCENARIOS``.
        L: The framework's namespace: Trainer, LightningModule, LightningDataModule, Callback, ``callbacks``.
        kind: ``"full"`` (the module overrides every hook) or ``"light"``.
        folder: An empty folder for whatever is written.
        trainer_arguments: More arguments for the Trainer, for a framework with switches of its own.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _Run(name, L, kind, folder, trainer_arguments).trace()


class _Run:
    """One scenario while it runs."""

    def __init__(self, name: str, L: Any, kind: str, folder: Path, more: dict[str, Any]) -> None:
        torch.manual_seed(1)
        self.spec = SCENARIOS[name]
        self.L, self.folder = L, folder
        self.record = Recorder()
        self.plan = dict(self.spec.get("plan", {}))
        if self.spec.get("own_callback"):
            self.plan["own_callback"] = self.make_callback("O")
        self.module = traced(make_net(L), MODULE_HOOKS if kind == "full" else LIGHT_MODULE_HOOKS, "M", self.record)(
            self.plan
        )
        self.record.module = self.module
        self.datamodule = self.make_datamodule() if self.spec.get("data") else None
        self.trainer_arguments = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": "checkpoint" in self.spec,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(folder),
            **self.spec.get("trainer", {}),
            **more,
        }
        self.trainer = self.make_trainer()

    def make_callback(self, who: str) -> Any:
        class Keyed(self.L.Callback):  # type: ignore[name-defined, misc]
            @property
            def state_key(self) -> str:
                return who

            def state_dict(self) -> dict[str, Any]:
                return {"seen": 1}

        return traced(Keyed, CALLBACK_HOOKS, who, self.record)()

    def make_datamodule(self) -> Any:
        plan = self.plan

        class Data(self.L.LightningDataModule):  # type: ignore[name-defined, misc]
            def train_dataloader(self) -> Any:
                return loaders(plan, "train", 4)

            def val_dataloader(self) -> Any:
                return loaders(plan, "val", 2)

            def state_dict(self) -> dict[str, Any]:
                return {"position": 1}

        return traced(Data, DATA_HOOKS, "D", self.record)()

    def make_trainer(self, **changes: Any) -> Any:
        count = self.spec.get("callbacks", 1)
        callbacks = [self.make_callback("C" if index == 0 else f"C{index + 1}") for index in range(count)]
        if "checkpoint" in self.spec:
            path = str(self.folder / "checkpoints")
            callbacks.insert(0, self.L.callbacks.ModelCheckpoint(dirpath=path, **self.spec["checkpoint"]))
        if "early_stopping" in self.spec:
            callbacks.append(self.L.callbacks.EarlyStopping("metric", **self.spec["early_stopping"]))
        trainer = self.L.Trainer(callbacks=callbacks, **{**self.trainer_arguments, **changes})
        self.record.trainer = trainer
        return trainer

    def trace(self) -> list[str]:
        for entry in self.spec.get("entries", ["fit"]):
            self.record("S", entry.replace(" ", "_"), {})
            try:
                self.enter(entry)
            except RuntimeError as error:
                self.record("S", "raised", {"exception": error})
            self.record("S", "returned", {"status": self.trainer.state.status})
        return self.record.lines

    def enter(self, entry: str) -> None:
        trainer, data = self.trainer, {} if self.datamodule is None else {"datamodule": self.datamodule}
        path = str(self.folder / "saved.ckpt")
        if entry == "save":
            trainer.save_checkpoint(path)
        elif entry == "resume":
            limit = "max_steps" if "max_steps" in self.spec["trainer"] else "max_epochs"
            self.trainer = self.make_trainer(**{limit: self.spec["trainer"][limit] + 2})
            self.trainer.fit(self.module, ckpt_path=path, **data)
        elif entry == "more":
            # Lightning keeps the number of epochs where this can be changed between two fits.
            (trainer.fit_loop if hasattr(trainer, "fit_loop") else trainer).max_epochs = 2
        elif entry == "test best":
            trainer.test(self.module, ckpt_path="best", verbose=False)
        elif entry in ("test", "validate"):
            getattr(trainer, entry)(self.module, verbose=False)
        else:
            getattr(trainer, entry)(self.module, **data)
