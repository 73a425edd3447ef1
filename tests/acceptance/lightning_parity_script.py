# SPDX-License-Identifier: Apache-2.0
"""One training script, written for Lightning, that runs on either framework; it prints every figure it produced.

    python tests/acceptance/lightning_parity_script.py leyden              > ours.json
    python tests/acceptance/lightning_parity_script.py lightning.pytorch   > theirs.json
    python tests/acceptance/lightning_parity_script.py lightning.pytorch --output tests/acceptance/golden/parity.json

An MLP with dropout on scikit-learn's digits, Adam, StepLR, clipping, accumulation by a divisor of the epoch's batches,
validation twice an epoch, metrics by step and by epoch, a learning-rate monitor. Figures are written in hexadecimal, so
that equal means equal to the last bit.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import platform
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def machine() -> dict[str, str]:
    """Return what the last bit of a figure may depend on."""
    return {
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "arch": platform.machine(),
        "build": torch.__config__.show(),
    }


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Return 1,280 handwritten digits to train on (40 batches of 32) and 517 to validate on."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images / 16.0).float(), torch.from_numpy(labels).long()
    return TensorDataset(x[:1280], y[:1280]), TensorDataset(x[1280:], y[1280:])


def run(L: Any, semantics: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train on the framework ``L`` and return its logged rows, learning rates, metrics and final weights.

    Args:
        L: The framework's namespace, for example ``lightning.pytorch``.
        semantics: More arguments for the Trainer.
    """
    callbacks = importlib.import_module(f"{L.__name__}.callbacks")
    loggers = importlib.import_module(f"{L.__name__}.loggers")

    class Classifier(L.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Dropout(0.2), nn.Linear(48, 10))
            self.losses: list[str] = []
            self.rates: list[str] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)  # type: ignore[no-any-return]

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            x, y = batch
            logits = self(x)
            loss = nn.functional.cross_entropy(logits, y)
            self.log("train_loss", loss, prog_bar=True)
            self.log("train_loss_both", loss, on_step=True, on_epoch=True)
            self.log("train_accuracy", (logits.argmax(1) == y).float().mean(), on_step=False, on_epoch=True)
            self.log("train_worst", loss, on_step=False, on_epoch=True, reduce_fx="max")
            self.losses.append(loss.item().hex())
            self.rates.append(self.optimizers().param_groups[0]["lr"].hex())
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            logits = self(x)
            accuracy = (logits.argmax(1) == y).float().mean()
            self.log_dict({"val_loss": nn.functional.cross_entropy(logits, y), "val_accuracy": accuracy})

        def on_train_epoch_end(self) -> None:
            self.log("epochs_done", float(self.current_epoch + 1))

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), lr=1e-2, weight_decay=1e-4)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)]

    class Memory(loggers.Logger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.rows: list[tuple[int, str, str]] = []

        @property
        def name(self) -> str:
            return "memory"

        @property
        def version(self) -> int:
            return 0

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            self.rows += [(int(step or 0), name, float(value).hex()) for name, value in metrics.items()]

        def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
            pass

    L.seed_everything(7, verbose=False)
    train, val = digits()
    module, memory = Classifier(), Memory()
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            deterministic=True,
            max_epochs=3,
            gradient_clip_val=0.5,
            accumulate_grad_batches=4,
            val_check_interval=0.5,
            log_every_n_steps=3,
            logger=memory,
            callbacks=[callbacks.LearningRateMonitor(logging_interval="step")],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            **(semantics or {}),
        )
        trainer.fit(module, DataLoader(train, batch_size=32, shuffle=True), DataLoader(val, batch_size=64))
        last = {name: float(value).hex() for name, value in sorted(trainer.callback_metrics.items())}
        (validated,) = trainer.validate(module, DataLoader(val, batch_size=64), verbose=False)
    return {
        "rows": sorted(set(memory.rows)),  # how often one figure is repeated for one step is not compared
        "losses": module.losses,
        "rates": module.rates,
        "callback_metrics": last,
        "validated": {name: float(value).hex() for name, value in sorted(validated.items())},
        "global_step": trainer.global_step,
        "current_epoch": trainer.current_epoch,
        "weights": {name: value.numpy().tobytes().hex() for name, value in module.state_dict().items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("framework", help="the module to import as L: leyden or lightning.pytorch")
    parser.add_argument("--output", type=Path, help="write the figures here instead of to the standard output")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    L = importlib.import_module(options.framework)
    logging.getLogger(options.framework).setLevel(logging.ERROR)
    text = json.dumps({"machine": machine(), "result": run(L)}, indent=0)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
