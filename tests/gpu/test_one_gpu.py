# SPDX-License-Identifier: Apache-2.0
"""What is promised on one GPU: training runs there, waits for it only when a row is due, and gives memory back."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.callbacks import ModelCheckpoint


class Net(L.LightningModule):
    """A line through noisy points; remembers the device, type and mode that its step saw."""

    def __init__(self, log: bool = True) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)
        self.log_loss = log
        self.seen: set[tuple[str, torch.dtype, torch.dtype]] = set()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        out = self.layer(x)
        self.seen.add((x.device.type, self.layer.weight.dtype, out.dtype))
        loss = (out.float() - y).pow(2).mean()
        if self.log_loss:
            self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", (self.layer(x).float() - y).pow(2).mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def data(batches: int = 20) -> DataLoader[Any]:
    torch.manual_seed(3)
    x = torch.randn(16 * batches, 8)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=16)


def trainer(folder: Path, accelerator: str = "cuda", **arguments: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": accelerator,
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(folder),
    }
    return L.Trainer(**{**defaults, **arguments})


def test_auto_takes_the_gpu_and_trains_there(tmp_path: Path) -> None:
    module = Net()
    run = trainer(tmp_path, accelerator="auto")
    run.fit(module, data(), data(2))
    assert {device for device, _, _ in module.seen} == {"cuda"}
    assert run.callback_metrics["loss_epoch"] < 0.1


def test_the_gpu_gives_what_the_cpu_gives(tmp_path: Path) -> None:
    weights = []
    for accelerator in ("cpu", "cuda"):
        L.seed_everything(5, verbose=False)
        module = Net()
        trainer(tmp_path, accelerator, gradient_clip_val=0.5, accumulate_grad_batches=2).fit(module, data())
        weights.append(module.layer.weight.detach().cpu())
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("precision", "parameters", "outputs"),
    [
        ("32-true", torch.float32, torch.float32),
        ("64-true", torch.float64, torch.float64),
        ("16-mixed", torch.float32, torch.float16),
        ("bf16-mixed", torch.float32, torch.bfloat16),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
        ("16-true", torch.float16, torch.float16),
    ],
)
def test_precisions(tmp_path: Path, precision: str, parameters: torch.dtype, outputs: torch.dtype) -> None:
    module = Net()
    run = trainer(tmp_path, precision=precision, max_epochs=1)
    run.fit(module, data(40))
    assert module.seen == {("cuda", parameters, outputs)}
    assert run.callback_metrics["loss"].isfinite()
    assert run.callback_metrics["loss"] < 1.0


@pytest.mark.parametrize("fused", [False, True])
def test_A1_the_norm_after_clipping_holds_under_a_scaler(tmp_path: Path, fused: bool) -> None:
    norms = []

    class Clipped(Net):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.01, fused=fused)

        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            super().configure_gradient_clipping(optimizer, *args, **kwargs)
            gradients = [p.grad.flatten() for p in self.parameters() if p.grad is not None]
            norms.append(torch.cat(gradients).norm().item())

    trainer(tmp_path, precision="16-mixed", gradient_clip_val=0.1).fit(Clipped(), data())
    finite = [norm for norm in norms if norm == norm and norm != float("inf")]
    assert len(finite) > 20
    assert max(finite) <= 0.1 * 1.01


def test_a_step_that_logs_does_not_wait_for_the_device(tmp_path: Path) -> None:
    """With every wait turned into an error, the steps between two rows run: ``self.log`` reads nothing back."""

    class Strict(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            torch.cuda.set_sync_debug_mode("error" if batch_idx >= 1 else "default")

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == len(on_device) - 1:  # what follows is the end of the epoch, where reading is due
                torch.cuda.set_sync_debug_mode("default")

    on_device = [(torch.randn(16, 8, device="cuda"), torch.randn(16, 1, device="cuda")) for _ in range(20)]

    class Batches:
        def __iter__(self) -> Any:
            return iter(on_device)

        def __len__(self) -> int:
            return len(on_device)

    try:
        trainer(tmp_path, max_epochs=1, log_every_n_steps=1000, callbacks=[Strict()]).fit(Net(), Batches())
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_E1_memory_on_the_device_is_given_back(tmp_path: Path) -> None:
    def once() -> None:
        run, module = trainer(tmp_path, max_epochs=1), Net()
        run.fit(module, data(2), data(1))

    once()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    gc.disable()
    try:
        once()
        assert torch.cuda.memory_allocated() == before
    finally:
        gc.enable()


def test_a_checkpoint_from_the_gpu_opens_on_the_cpu_and_resumes(tmp_path: Path) -> None:
    keep = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    trainer(tmp_path, enable_checkpointing=True, callbacks=[keep], precision="16-mixed").fit(Net(), data())
    opened = Net.load_from_checkpoint(keep.last_model_path, map_location="cpu")
    assert opened.layer.weight.device.type == "cpu"
    module = Net()
    resumed = trainer(tmp_path, max_epochs=3, precision="16-mixed")
    resumed.fit(module, data(), ckpt_path=keep.last_model_path)
    assert resumed.global_step == 60
    assert resumed.current_epoch == 3


@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
def test_other_entry_points_run_on_the_gpu(tmp_path: Path, entry: str) -> None:
    class More(Net):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("device_is_cuda", float(batch[0].is_cuda))

        def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.layer(batch[0])

    call: Callable[..., Any] = getattr(trainer(tmp_path), entry)
    result = call(More(), data(3))
    assert len(result) == (3 if entry == "predict" else 1)
    if entry == "test":
        assert result[0]["device_is_cuda"] == 1.0
