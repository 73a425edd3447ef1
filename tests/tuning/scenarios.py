# SPDX-License-Identifier: Apache-2.0
"""Searches that give the same on Lightning and on Leyden; run by itself, records what one of the two gives.

python scenarios.py lightning.pytorch > recorded_with_lightning_2_6_6.json
"""

from __future__ import annotations

import importlib
import json
import platform
import sys
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

QUIET: dict[str, Any] = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "max_epochs": 3,
}  # fmt: skip
RATES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "patient": {"early_stop_threshold": 40.0},
    "over several epochs": {"early_stop_threshold": None, "num_training": 150},
    "more than there are": {"early_stop_threshold": None, "num_training": 310},
    "linear": {"mode": "linear", "min_lr": 1e-4, "max_lr": 0.5, "early_stop_threshold": None},
    "other bounds": {"min_lr": 1e-4, "max_lr": 10.0, "early_stop_threshold": 20.0},
}
SIZES: dict[str, tuple[dict[str, Any], int]] = {
    "power": ({}, 100),
    "power, bounded": ({"max_trials": 3}, 10**6),
    "power, no trial": ({"max_trials": 0}, 10**6),
    "power, all of it": ({}, 10**6),
    "power, largest": ({"max_val": 64}, 10**6),
    "binsearch": ({"mode": "binsearch"}, 100),
    "binsearch, no margin": ({"mode": "binsearch", "margin": 0.0, "init_val": 3}, 77),
    "binsearch, all of it": ({"mode": "binsearch"}, 10**6),
}
METHODS = ("validate", "test", "predict")


def machine() -> dict[str, str]:
    """What floating-point results depend on."""
    return {
        "torch": torch.__version__,
        "cpu": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def module_class(L: Any) -> Any:
    """A small regression with dropout, whose steps run out of memory above ``limit`` samples."""

    class Net(L.LightningModule):  # type: ignore[misc]
        def __init__(self, limit: int = 10**6) -> None:
            super().__init__()
            self.lr, self.batch_size, self.limit = 0.1, 4, limit
            self.net = torch.nn.Sequential(
                torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 1)
            )

        def _loss(self, batch: Any) -> Any:
            if len(batch[0]) > self.limit:
                raise RuntimeError("CUDA error: out of memory")
            return (self.net(batch[0]) - batch[1]).square().mean()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self._loss(batch)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", self._loss(batch))

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test", self._loss(batch))

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self._loss(batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)

        def train_dataloader(self) -> Any:
            x = torch.randn(400, 8, generator=torch.Generator().manual_seed(1))
            return DataLoader(
                TensorDataset(x, x.sum(1, keepdim=True)), batch_size=self.batch_size, shuffle=self.fitting
            )

        @property
        def fitting(self) -> bool:
            return bool(self.trainer.state.fn == "fit")

        val_dataloader = test_dataloader = predict_dataloader = train_dataloader

    return Net


def run(framework: str, **arguments: Any) -> dict[str, Any]:
    """Run all searches; floats are given in hex."""
    torch.set_num_threads(1)  # what is so small is only slower with more
    L, T = (
        importlib.import_module(framework),
        importlib.import_module("lightning.pytorch.tuner" if framework != "leyden" else "leyden.tuning"),
    )
    Net, found = module_class(L), {}
    for name, settings in RATES.items():
        torch.manual_seed(3)
        module, trainer = Net(), L.Trainer(**QUIET, **arguments)
        result = T.Tuner(trainer).lr_find(module, **settings)
        found[f"rate, {name}"] = {
            "rates": [rate.hex() for rate in result.results["lr"]],
            "losses": [loss.hex() for loss in result.results["loss"]],
            "suggestion": str(result.suggestion()), "lr": module.lr.hex(), "last": result._total_batch_idx,
            "weights": [float(parameter.detach().sum()).hex() for parameter in module.parameters()],
        }  # fmt: skip
    for name, (settings, limit) in SIZES.items():
        torch.manual_seed(3)
        module, trainer = Net(limit), L.Trainer(**QUIET, **arguments)
        size = T.Tuner(trainer).scale_batch_size(module, **settings)
        found[f"size, {name}"] = [size, module.batch_size, trainer.train_dataloader.batch_size]
    for method in METHODS:
        module, trainer = Net(50), L.Trainer(**QUIET, **arguments)
        size = T.Tuner(trainer).scale_batch_size(module, method=method)
        found[f"size, {method}"] = [size, module.batch_size]
    return found


if __name__ == "__main__":
    print(json.dumps({"machine": machine(), "result": run(sys.argv[1])}, indent=1))
