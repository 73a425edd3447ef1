# SPDX-License-Identifier: Apache-2.0
"""Runs callbacks that touch weights, written for Lightning, on either framework; returns every figure that they left.

    python tests/callbacks/numbers_script.py lightning.pytorch > tests/callbacks/numbers_of_lightning_2_6_6.json

Figures are in hexadecimal, so that equal means equal to the last bit.
"""

from __future__ import annotations

import importlib
import json
import logging
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

SAVED = "saved.ckpt"


def machine() -> dict[str, str]:
    """Return what the last bit of a figure may depend on."""
    return {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability(), "arch": platform.machine()}


def figures(state: Any) -> Any:
    """Return plain data in which each number is written to the last bit."""
    if isinstance(state, torch.Tensor):
        return [float(value).hex() for value in state.detach().double().flatten()]
    if isinstance(state, dict):
        return {str(key): figures(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [figures(value) for value in state]
    if isinstance(state, float):
        return state.hex()
    return state if isinstance(state, (int, str, bool, type(None))) else type(state).__name__


def data(samples: int = 24) -> DataLoader:
    """Return six batches of four, or as many as there are samples."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(samples, 6, generator=generator)
    return DataLoader(TensorDataset(x, (x.sum(1, keepdim=True) * 0.3).sin()), batch_size=4)


def build(L: Any, norm: bool = True, schedule: bool = False, only_head: bool = False) -> Any:
    """Return a model with a backbone, with or without batch norm, and a head."""

    class Model(L.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5) if norm else nn.Tanh(), nn.ReLU())
            self.head = nn.Linear(5, 1)
            self.seen: dict[str, list[str]] = {"losses": [], "val": [], "rates": []}

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            loss = nn.functional.mse_loss(self.head(self.backbone(x)), y)
            self.seen["losses"].append(loss.item().hex())
            self.seen["rates"].append(",".join(float(g["lr"]).hex() for g in self.trainer.optimizers[0].param_groups))
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            loss = nn.functional.mse_loss(self.head(self.backbone(x)), y)
            self.seen["val"].append(loss.item().hex())
            self.log("val_loss", loss)

        def configure_optimizers(self) -> Any:
            given = filter(lambda p: p.requires_grad, self.parameters()) if only_head else self.parameters()
            optimizer = torch.optim.SGD(given, lr=0.1, momentum=0.9)
            if not schedule:
                return optimizer
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]

    torch.manual_seed(7)
    return Model()


def run(L: Any, folder: Path, model: Any, callbacks: list[Any], save_at: int = 9, **arguments: Any) -> dict[str, Any]:
    """Fit and return what is left: losses, weights, rows, and a checkpoint that was saved at an update."""
    base = importlib.import_module(
        f"{L.__name__}.loggers.logger" if "lightning" in L.__name__ else "leyden.loggers"
    ).Logger
    rows: list[Any] = []

    class Rows(base):  # type: ignore[misc, valid-type]
        name, version = "rows", 0

        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            rows.append([step, sorted(metrics)])

        def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    class Saves(L.Callback):  # type: ignore[name-defined, misc]
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == save_at:
                trainer.save_checkpoint(folder / SAVED)

    trainer = L.Trainer(
        **{"max_epochs": 4, "log_every_n_steps": 3, **arguments},
        accelerator="cpu",
        logger=Rows(),
        callbacks=[*callbacks, Saves()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    failure = None
    try:
        trainer.fit(model, data(), data(8))
    except RuntimeError as error:
        failure = [type(error).__name__, str(error)]
    found = {
        **model.seen,
        "weights": figures(model.state_dict()),
        "rows": sorted(rows),
        "failure": failure,
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "max_epochs": trainer.max_epochs,
        "accumulate": trainer.accumulate_grad_batches,
        "groups": [
            {k: figures(v) for k, v in group.items() if k in ("lr", "momentum", "swa_lr", "initial_lr")}
            | {"params": len(group["params"])}
            for group in trainer.optimizers[0].param_groups
        ],
    }
    if (folder / SAVED).exists():
        saved = torch.load(folder / SAVED, weights_only=False)
        states = saved["callbacks"]
        states = {key: figures(state) for key, state in states.items()}
        for state in states.values():  # what torch's own schedule keeps of itself is torch's affair
            if isinstance(state.get("scheduler_state"), dict):
                state["scheduler_state"] = sorted(state["scheduler_state"])
            for name in ("running", "mean", "bad_batches_path"):
                state.pop(name, None)
        keys = sorted(set(saved) - {"leyden", "loops", "hparams_name", "datamodule_hparams_name"})
        found["saved"] = {"keys": keys, "callbacks": states, "weights": figures(saved["state_dict"])}
        for name in ("current_model_state", "averaging_state"):
            if name in saved:
                found["saved"][name] = figures(saved[name])
    return found


def _swa(L: Any, C: Any, folder: Path) -> Any:
    return run(L, folder, build(L), [C.StochasticWeightAveraging(0.05, 2, 2)], 15)


def _swa_of_a_schedule(L: Any, C: Any, folder: Path) -> Any:
    callback = C.StochasticWeightAveraging([0.03], 0.5, 3, "linear", device=None)
    return run(L, folder, build(L, norm=False, schedule=True), [callback], 15)


def _swa_of_its_own(L: Any, C: Any, folder: Path) -> Any:
    callback = C.StochasticWeightAveraging(
        0.05, 1, avg_fn=lambda average, weights, count: average * 0.5 + weights * 0.5
    )
    return run(L, folder, build(L), [callback], accumulate_grad_batches=2, save_at=5)


def _swa_stopped(L: Any, C: Any, folder: Path) -> Any:
    return run(L, folder, build(L, norm=False), [C.StochasticWeightAveraging(0.05, 2)], max_steps=13)


def _average(L: Any, C: Any, folder: Path) -> Any:
    return run(L, folder, build(L), [C.WeightAveraging()])


def _average_without_buffers(L: Any, C: Any, folder: Path) -> Any:
    return run(L, folder, build(L), [C.WeightAveraging("cpu", False)], accumulate_grad_batches=4, save_at=5)


def _ema(L: Any, C: Any, folder: Path) -> Any:
    return run(L, folder, build(L, schedule=True), [C.EMAWeightAveraging(decay=0.8)], val_check_interval=0.5)


def _ema_later(L: Any, C: Any, folder: Path) -> Any:
    callback = C.EMAWeightAveraging(None, True, 0.9, 2, 5, 1)
    return run(L, folder, build(L), [callback], gradient_clip_val=0.5)


def _ema_in_bfloat16(L: Any, C: Any, folder: Path) -> Any:
    return run(L, folder, build(L, norm=False), [C.EMAWeightAveraging(decay=0.8)], precision="bf16-mixed")


def _backbone(L: Any, C: Any, folder: Path) -> Any:
    callback = C.BackboneFinetuning(1, lambda epoch: 1.5, 0.2, should_align=True, train_bn=False)
    return run(L, folder, build(L, only_head=True), [callback], 15, max_epochs=5)


def _backbone_by_hand(L: Any, C: Any, folder: Path) -> Any:
    class Thaws(C.BaseFinetuning):  # type: ignore[name-defined, misc]
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.backbone, train_bn=False)

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.backbone[1], optimizer, initial_denom_lr=5.0)
            if epoch == 2:
                self.unfreeze_and_add_param_group([pl_module.backbone[0]], optimizer, lr=0.01)

    return run(L, folder, build(L, only_head=True, schedule=True), [Thaws()], 9)


def _pruned(L: Any, C: Any, folder: Path) -> Any:
    return run(L, folder, build(L), [C.ModelPruning("l1_unstructured", amount=0.3)])


def _pruned_without_lottery(L: Any, C: Any, folder: Path) -> Any:
    callback = C.ModelPruning(
        "random_unstructured", parameter_names=["weight"], amount=lambda epoch: 0.2 if epoch else 0.1,
        use_lottery_ticket_hypothesis=False, make_pruning_permanent=False,
    )  # fmt: skip
    return run(L, folder, build(L), [callback])


def _pruned_by_layer(L: Any, C: Any, folder: Path) -> Any:
    model = build(L, norm=False)
    callback = C.ModelPruning(
        "ln_structured", [(model.backbone[0], "weight")], use_global_unstructured=False, pruning_dim=0, pruning_norm=1,
        amount=1, use_lottery_ticket_hypothesis=lambda epoch: epoch == 1, prune_on_train_epoch_end=False,
        apply_pruning=lambda epoch: epoch < 3,
    )  # fmt: skip
    return run(L, folder, model, [callback])


def _pruned_and_drawn_again(L: Any, C: Any, folder: Path) -> Any:
    return run(L, folder, build(L, norm=False), [C.ModelPruning("l1_unstructured", amount=3, resample_parameters=True)])


def _spike(L: Any, C: Any, folder: Path) -> Any:
    class Jumps(C.Callback):  # type: ignore[name-defined, misc]
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 10:
                batch[1].add_(40.0)

    torch.manual_seed(0)
    callback = C.SpikeDetection(window=3, rtol=3.0, atol=0.5)
    found = run(L, folder, build(L, norm=False), [Jumps(), callback])
    found["bad_batches"] = json.loads((folder / "skip_batches.json").read_text())
    found["mean"] = figures(callback.running_mean.compute())
    return found


def _device(L: Any, C: Any, folder: Path) -> Any:
    return run(L, folder, build(L), [C.DeviceStatsMonitor()], limit_train_batches=4, log_every_n_steps=2)


def _all_together(L: Any, C: Any, folder: Path) -> Any:
    callbacks = [C.LearningRateMonitor(), C.EMAWeightAveraging(decay=0.7), C.StochasticWeightAveraging(0.05, 2, 2)]
    return run(L, folder, build(L, schedule=True), callbacks, 15)


RUNS: dict[str, Callable[..., Any]] = {
    name.lstrip("_"): value
    for name, value in list(globals().items())
    if getattr(value, "__code__", None) and name[0] == "_"
}


def result(name: str, L: Any, folder: Path) -> Any:
    """Run one of ``RUNS`` on the framework ``L``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        L.seed_everything(1)
        return json.loads(json.dumps(RUNS[name](L, importlib.import_module(f"{L.__name__}.callbacks"), folder)))


def main() -> None:
    """Print the figures of all runs."""
    framework = importlib.import_module(sys.argv[1])
    logging.disable(logging.WARNING)
    found: dict[str, Any] = {"machine": machine()}
    for name in sys.argv[2:] or RUNS:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = result(name, framework, Path(folder))
    print("{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in found.items()) + "\n}")


if __name__ == "__main__":
    main()
