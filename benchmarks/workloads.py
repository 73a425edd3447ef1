# SPDX-License-Identifier: Apache-2.0
"""What is trained: a tiny step, an MLP on MNIST's shapes, a small CNN on digits, a GPT of 10 M parameters on bytes.

Each is a network, a loader of ``(inputs, targets)``, an optimizer and a loss: what every framework can be given.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

ROOT = Path(__file__).resolve().parent.parent
Parameters = Iterable[nn.Parameter]
MOMENTS: list[float] = []
"""When each step of the run began that is measured now: its forward pass, in seconds of the clock."""


@dataclass(frozen=True)
class Workload:
    """One training, the same for all.

    Args:
        name: The title of its table.
        text: What it is, in a sentence.
        network: Makes the model.
        loader: Makes an iterable of batches ``(inputs, targets)`` that has a length.
        optimizer: Its class, of ``torch.optim``.
        lr: Its learning rate.
        loss: Takes outputs and targets.
        epochs: How often the loader is run through.
        batch_size: Samples in a batch.
        threads: Threads that torch computes with.
    """

    name: str
    text: str
    network: Callable[[], nn.Module]
    loader: Callable[[], Any]
    optimizer: type[torch.optim.Optimizer]
    lr: float
    loss: Callable[[Tensor, Tensor], Tensor]
    epochs: int
    batch_size: int
    threads: int

    def timed_network(self) -> nn.Module:
        """Return the model, with a clock: when each of its forward passes begins is noted in ``MOMENTS``."""
        network = self.network()
        forward = network.forward

        def noted(*args: Any) -> Any:
            MOMENTS.append(perf_counter())
            return forward(*args)

        network.forward = noted  # type: ignore[method-assign]
        return network

    @property
    def steps(self) -> int:
        """Batches in one run."""
        return self.epochs * len(self.loader())

    def make_optimizer(self, parameters: Parameters) -> torch.optim.Optimizer:
        """Return the optimizer of ``parameters``."""
        return self.optimizer(parameters, lr=self.lr)  # type: ignore[call-arg]


# --- (a) -----------------------------------------------------------------------------------------------------------


class BatchesInMemory:
    """An iterable of ``steps`` pairs of shapes (4, 32) and (4, 2), made beforehand: 64 of them, over and over."""

    def __init__(self, steps: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        few = [(torch.randn(4, 32, generator=generator), torch.zeros(4, 2)) for _ in range(64)]
        self._batches = [few[index % len(few)] for index in range(steps)]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


def _mean_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.pow(2).mean()


def tiny(steps: int = 5000, epochs: int = 1) -> Workload:
    """A step so small that hardly anything but the framework is measured."""
    batches = BatchesInMemory(steps)
    return Workload(
        "(a) overhead: a tiny step",
        f"Linear(32, 2), batches of 4 that lie in memory, SGD, 1 thread; {steps * epochs} steps. What is timed is the"
        " whole call that trains, set-up and tear-down included; construction and imports are not.",
        lambda: nn.Linear(32, 2), lambda: batches, torch.optim.SGD, 0.01, _mean_square, epochs, 4, 1,
    )  # fmt: skip


# --- (b) -----------------------------------------------------------------------------------------------------------


def _idx(folder: Path, name: str) -> Tensor:
    path = next((path for path in (folder / name, folder / f"{name}.gz") if path.exists()), None)
    if path is None:
        raise SystemExit(f"{folder} has neither {name} nor {name}.gz")
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    shape = [int.from_bytes(raw[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(raw[3])]
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=4 + 4 * raw[3]).reshape(shape)


@cache
def _images(samples: int, folder: Path | None) -> TensorDataset:
    if folder is not None:
        images, labels = _idx(folder, "train-images-idx3-ubyte"), _idx(folder, "train-labels-idx1-ubyte")
        return TensorDataset(images[:samples].float().reshape(-1, 784) / 255, labels[:samples].long())
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (samples,), generator=generator)
    templates = torch.rand(10, 784, generator=generator)
    return TensorDataset((templates[labels] + torch.rand(samples, 784, generator=generator)) / 2, labels)


def mnist(samples: int = 60_000, folder: Path | None = None) -> Workload:
    """The first thing that everybody trains, through the loader that everybody takes."""
    data = _images(samples, folder)
    kind = "MNIST" if folder is not None else "data of MNIST's shape"
    return Workload(
        "(b) MNIST: an MLP through a DataLoader",
        f"784-128-10 on {kind}, {len(data)} samples, DataLoader(TensorDataset, batch_size=32, shuffle=True), Adam, one"
        " epoch, 1 thread.",
        lambda: nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10)),
        lambda: DataLoader(data, batch_size=32, shuffle=True),
        torch.optim.Adam, 1e-3, nn.functional.cross_entropy, 1, 32, 1,
    )  # fmt: skip


# --- (c) -----------------------------------------------------------------------------------------------------------


@cache
def _digits() -> TensorDataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    return TensorDataset(images, torch.tensor(digits.target))


def digits(epochs: int = 10) -> Workload:
    """Real images, small enough for a laptop."""
    data = _digits()
    return Workload(
        "(c) digits: a small CNN",
        f"Two convolutions and a linear layer on scikit-learn's digits ({len(data)} images of 8 x 8), batch 32, shuffled,"
        f" Adam, {epochs} epochs, 1 thread.",
        lambda: nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10),
        ),
        lambda: DataLoader(data, batch_size=32, shuffle=True),
        torch.optim.Adam, 1e-3, nn.functional.cross_entropy, epochs, 32, 1,
    )  # fmt: skip


# --- (d) -----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """One layer of a GPT: causal attention and an MLP, each after a LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, width) to the same shape."""
        batch, time, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """A language model over bytes: (batch, time) of bytes to (batch, time, 256) of logits."""

    def __init__(self, layers: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        places = torch.arange(x.shape[1], device=x.device)
        return self.head(self.norm(self.blocks(self.tokens(x) + self.places(places))))  # type: ignore[no-any-return]


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of ``context`` bytes of the repository's own text, each with the bytes that follow."""

    def __init__(self, windows: int, context: int) -> None:
        files = [ROOT / "LICENSE", *sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
        text = b"\n".join(path.read_bytes() for path in files)
        self._text = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self._starts = torch.linspace(0, len(text) - context - 2, windows).long().tolist()
        self._context = context

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        window = self._text[self._starts[index] : self._starts[index] + self._context + 1]
        return window[:-1], window[1:]


def _next_byte_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.reshape(-1, 256), targets.reshape(-1))


def gpt(steps: int = 10, layers: int = 6, width: int = 368, context: int = 64) -> Workload:
    """A model whose own arithmetic dwarfs any framework."""
    data = Windows(4 * steps, context)
    size = sum(parameter.numel() for parameter in GPT(layers, width, 8, context).parameters()) / 1e6
    cores = max(1, (torch.get_num_threads() or 1))
    return Workload(
        f"(d) GPT of {size:.1f} M parameters",
        f"{layers} layers of width {width} on the bytes of this repository's texts, batches of 4 x {context}, shuffled,"
        f" AdamW, {steps} steps, {cores} threads.",
        lambda: GPT(layers, width, 8, context),
        lambda: DataLoader(data, batch_size=4, shuffle=True),
        torch.optim.AdamW, 3e-4, _next_byte_loss, 1, 4, cores,
    )  # fmt: skip
