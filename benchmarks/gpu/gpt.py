# SPDX-License-Identifier: Apache-2.0
"""A GPT in bf16, compiled, with fused AdamW: tokens per second against a loop by hand, Lightning and Accelerate."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from contest import Prepare, Table, contest
from workloads import GPT, Windows

LAYERS, WIDTH, HEADS, CONTEXT, BATCH = 12, 768, 12, 512, 16
TOKENS = CONTEXT * BATCH
FEW = 5
"""Steps ahead of the clock, in which torch compiles."""


def network() -> nn.Module:
    """About 86 M parameters."""
    return GPT(LAYERS, WIDTH, HEADS, CONTEXT)


def loader(steps: int) -> DataLoader[Any]:
    """Return ``steps`` batches in host memory, shuffled; with workers, or the loader would be all that is measured."""
    return DataLoader(
        Windows(BATCH * steps, CONTEXT), batch_size=BATCH, shuffle=True, num_workers=4, pin_memory=True, drop_last=True
    )


def loss_of(net: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of the next byte."""
    x, y = batch
    return nn.functional.cross_entropy(net(x).float().reshape(-1, 256), y.reshape(-1))


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    """AdamW in its fused form."""
    return torch.optim.AdamW(net.parameters(), lr=3e-4, fused=True)


def by_hand(steps: int, folder: str) -> Callable[[], None]:
    """The loop of somebody who knows how: compiled, bf16, fused, pinned, nothing read back."""
    net = network().cuda()
    compiled, optimizer = torch.compile(net), optimizer_of(net)

    def run(batches: Any) -> None:
        losses = []
        for batch in batches:
            x, y = (part.cuda(non_blocking=True) for part in batch)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = loss_of(compiled, (x, y))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())

    return _ready(run, steps)


def _ready(run: Callable[[Any], None], steps: int) -> Callable[[], None]:
    """Run a few steps, and return the run of all of them."""
    run(loader(FEW))
    batches = loader(steps)
    return lambda: run(batches)


def with_trainer(steps: int, folder: str, name: str, *, inside: bool = True, **arguments: Any) -> Callable[[], None]:
    """A Trainer: ``"leyden"`` or ``"lightning.pytorch"``; ``inside`` compiles the network in the module."""
    L = importlib.import_module(name)

    class Module(L.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.compiled = [torch.compile(self.net) if inside else self.net]  # a list: its weights are not doubled

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            loss = loss_of(self.compiled[0], batch)
            self.log("loss", loss, batch_size=BATCH)
            return loss

        def configure_optimizers(self) -> Any:
            return optimizer_of(self.net)

    module = Module()

    def run(batches: Any) -> None:
        trainer = L.Trainer(
            accelerator="cuda", devices=1, max_epochs=1, precision="bf16-mixed", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, **arguments,
        )  # fmt: skip
        trainer.fit(module, batches)

    return _ready(run, steps)


def with_accelerate(steps: int, folder: str) -> Callable[[], None]:
    """The loop by hand through the objects of Accelerate."""
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="bf16")
    net = network()
    net, optimizer = accelerator.prepare(net, optimizer_of(net))
    compiled = torch.compile(net)

    def run(batches: Any) -> None:
        losses = []
        for batch in accelerator.prepare(batches):
            with accelerator.autocast():
                loss = loss_of(compiled, batch)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            losses.append(loss.detach())

    return _ready(run, steps)


def contenders() -> dict[str, Prepare]:
    """Return those that are installed."""
    table: dict[str, Prepare] = {
        "a compiled loop by hand, bf16": by_hand,
        "leyden, the network compiled": lambda steps, folder: with_trainer(steps, folder, "leyden"),
        "leyden, compile=True": lambda steps, folder: with_trainer(steps, folder, "leyden", inside=False, compile=True),
    }
    if importlib.util.find_spec("lightning") is not None:
        table["lightning"] = lambda steps, folder: with_trainer(steps, folder, "lightning.pytorch")
    if importlib.util.find_spec("accelerate") is not None:
        table["accelerate"] = with_accelerate
    return table


def measure(steps: int, rounds: int) -> Table:
    """Let all run by turns."""
    size = sum(parameter.numel() for parameter in network().parameters()) / 1e6
    return contest(
        f"A GPT of {size:.0f} M parameters",
        f"{LAYERS} layers of width {WIDTH} on the bytes of this repository's texts, batches of {BATCH} x {CONTEXT}, bf16,"
        f" torch.compile, fused AdamW; {steps} steps, {rounds} rounds; ratios of tokens per second. The aim is at least 0.99.",
        contenders(),
        steps,
        rounds,
        warm=FEW,
        per_step=TOKENS,
    )
