# SPDX-License-Identifier: Apache-2.0
"""Parts of runs whose resume is tested: data that draw random numbers, samplers of all kinds, a module that notes all."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

import leyden as L


class Noisy(Dataset):
    """Samples that know their index, changed at random by every generator there is; notes which were asked for."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.rng = np.random.default_rng(5)
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        self.asked.append(int(index))
        noise = torch.rand(4) + random.random() + float(np.random.rand()) + float(self.rng.random())
        return int(index), torch.sin(torch.arange(4.0) + int(index)) + 0.1 * noise.float()


class Noting(Dataset):
    """The samples of Noisy with nothing that changes: workers can be kept. Notes in a file which process loads."""

    def __init__(self, size: int, notes: Path) -> None:
        self.size, self.notes = size, notes
        self.rng = np.random.default_rng(5)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        with self.notes.open("a") as file:
            file.write(f"{os.getpid()}\n")
        noise = torch.rand(4) + random.random() + float(np.random.rand()) + float(self.rng.random())
        return int(index), torch.sin(torch.arange(4.0) + int(index)) + 0.1 * noise.float()


class Quiet(Dataset):
    """The same samples without chance."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, torch.sin(torch.arange(4.0) + index)


class Lazy(Sampler[int]):
    """Draws from a global generator for each sample, without looking ahead."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.size):
            yield random.randrange(self.size) if torch.rand(1) < 0.5 else int(np.random.randint(self.size))

    def __len__(self) -> int:
        return self.size


class Eager(Sampler[int]):
    """Draws all when it is asked for its iterator, and counts how often that was, as some samplers on the net do."""

    def __init__(self, size: int) -> None:
        self.size, self.rounds = size, 0

    def __iter__(self) -> Iterator[int]:
        self.rounds += 1
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.rounds)).tolist()
        order = [order[i] for i in torch.randperm(self.size).tolist()]
        return iter(order)

    def __len__(self) -> int:
        return self.size


class Buckets(Sampler[list[int]]):
    """A batch sampler that shuffles bucket by bucket, when it comes to one, with a generator of its own and a global one."""

    def __init__(self, size: int, batch: int, sized: bool = True) -> None:
        self.size, self.batch = size, batch
        self.rng = random.Random(3)
        if sized:
            self.length = -(-size // batch)

    def __iter__(self) -> Iterator[list[int]]:
        waiting: list[int] = []
        buckets = [list(range(start, min(start + 7, self.size))) for start in range(0, self.size, 7)]
        self.rng.shuffle(buckets)
        for bucket in buckets:
            waiting += [bucket[i] for i in torch.randperm(len(bucket)).tolist()]
            while len(waiting) >= self.batch:
                yield waiting[: self.batch]
                waiting = waiting[self.batch :]
        if waiting:
            yield waiting

    def __len__(self) -> int:
        if not hasattr(self, "length"):
            raise TypeError
        return self.length


class Remembers(Sampler[int]):
    """A sampler with a state of its own."""

    def __init__(self, size: int) -> None:
        self.size, self._round = size, 0

    def __iter__(self) -> Iterator[int]:
        self._round += 1
        yield from torch.randperm(self.size, generator=torch.Generator().manual_seed(self._round)).tolist()

    def __len__(self) -> int:
        return self.size

    def state_dict(self) -> dict[str, Any]:
        return {"round": self._round}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._round = state["round"]


class Moves(DataLoader):
    """A loader of one's own: it makes its iterator late, and counts."""

    passes = 0

    def __iter__(self) -> Any:
        self.passes += 1
        for index, x in super().__iter__():
            yield index, x + 0.01 * self.passes


class Stream(IterableDataset):
    """An iterable data set that knows where it stands."""

    def __init__(self, size: int) -> None:
        self.size, self.at = size, 0

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        while self.at < self.size:
            self.at += 1
            yield self.at, torch.full((4,), float(self.at)) + 0.1 * torch.rand(4)
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Batches:
    """Batches with an index, and no loader around them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index >= self.size:
            raise IndexError
        self.asked.append(index)
        return torch.tensor([index]), torch.full((1, 4), float(index)) + torch.rand(4)


def loader(kind: str, size: int = 14, batch: int = 2, data: Any = None, **kwargs: Any) -> Any:
    """Return a loader of the ``kind``."""
    data = Noisy(size) if data is None else data
    if kwargs.get("num_workers"):
        kwargs = {"multiprocessing_context": "fork", **kwargs}
    generator = torch.Generator().manual_seed(11)
    samplers = {
        "lazy": lambda: Lazy(size),
        "eager": lambda: Eager(size),
        "remembers": lambda: Remembers(size),
        "subset": lambda: SubsetRandomSampler(range(size)),
        "weighted": lambda: WeightedRandomSampler(torch.arange(1.0, size + 1), size),
        "replacement": lambda: RandomSampler(data, replacement=True, num_samples=size * 5),
        "own": lambda: RandomSampler(data, replacement=True, num_samples=size * 5, generator=generator),
        "list": lambda: list(range(size))[::-1],
    }
    if kind == "buckets":
        return DataLoader(data, batch_sampler=Buckets(size, batch), **kwargs)
    if kind == "unsized":
        return DataLoader(data, batch_sampler=Buckets(size, batch, sized=False), **kwargs)
    if kind == "nested":
        return DataLoader(data, batch_sampler=BatchSampler(Lazy(size), batch, drop_last=True), **kwargs)
    if kind == "single":
        return DataLoader(data, batch_size=None, shuffle=True, **kwargs)
    if kind == "generator":
        return DataLoader(data, batch_size=batch, shuffle=True, generator=generator, **kwargs)
    if kind == "moves":
        return Moves(data, batch_size=batch, shuffle=True, **kwargs)
    if kind == "stream":
        return DataLoader(Stream(size), batch_size=batch, **kwargs)
    if kind == "batches":
        return Batches(size // batch)
    if kind in samplers:
        return DataLoader(data, batch_size=batch, sampler=samplers[kind](), **kwargs)
    return DataLoader(data, batch_size=batch, shuffle=kind == "shuffle", **kwargs)


def indices(batch: Any) -> Any:
    """Return the indices of the samples in a batch of any structure."""
    if isinstance(batch, dict):
        return {name: indices(part) for name, part in batch.items()}
    if batch is None:
        return None
    return torch.as_tensor(batch[0]).tolist()


def total(batch: Any) -> Tensor:
    """Return the inputs of a batch of any structure, added up."""
    if isinstance(batch, dict):
        parts = [total(part) for part in batch.values() if part is not None]
        return torch.stack([part.mean(0) for part in parts]).sum(0, keepdim=True)
    x: Tensor = batch[1]
    return x.reshape(-1, 4)


class Recording(L.LightningModule):
    """Writes down everything that a run does: samples, losses, learning rates, validations."""

    def __init__(self, manual: bool = False, optimizers: int = 1) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 1))
        self.other = nn.Linear(4, 1)
        self.events: list[Any] = []
        self.automatic_optimization = not manual
        self.optimizers_wanted = optimizers

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = (self.net(total(batch)) ** 2).mean() + (self.other(total(batch)) ** 2).mean()
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.events.append(("train", self.current_epoch, batch_idx, indices(batch), loss.item(), rate))
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=2)
        if batch_idx == 1:
            self.log("once", loss, on_step=False, on_epoch=True, reduce_fx="max", batch_size=2)
        if not self.automatic_optimization:
            optimizers = self.optimizers(use_pl_optimizer=True)
            self.manual_backward(loss)
            for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
                if batch_idx % 2:
                    optimizer.step()
                    optimizer.zero_grad()
            return None
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = (self.net(total(batch)) ** 2).mean()
        self.events.append(("val", batch_idx, indices(batch), loss.item()))
        self.log("val_loss", loss, batch_size=2)
        self.log("val_step", loss, on_step=True, on_epoch=False, batch_size=2)

    def configure_optimizers(self) -> Any:
        total = self.trainer.estimated_stepping_batches
        total = 100 if total == float("inf") else total
        if self.optimizers_wanted == 2:
            return [torch.optim.Adam(self.net.parameters(), lr=0.05), torch.optim.SGD(self.other.parameters(), lr=0.1)]
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (total + 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Drawing(L.Callback):
    """Draws random numbers in every hook, as careless users do."""

    def _draw(self, *args: Any) -> None:
        torch.rand(3)
        random.random()
        np.random.rand()

    on_train_start = on_train_epoch_start = on_train_batch_start = on_validation_start = _draw
    on_validation_epoch_end = on_validation_batch_end = on_train_epoch_end = on_validation_end = _draw


class SaveEverywhere(L.Callback):
    """Saves at every moment at which a callback can, and remembers how much had happened by then."""

    order: ClassVar[int] = 100

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved: dict[str, tuple[int, int]] = {}

    def save(self, trainer: Any, pl_module: Any, moment: str) -> None:
        path = self.folder / f"{len(self.saved):03d}-{moment}.ckpt"
        trainer.save_checkpoint(path)
        self.saved[str(path)] = (len(pl_module.events), len(list(trainer.history)))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.save(trainer, pl_module, "batch_end")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.save(trainer, pl_module, "validation_end")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.save(trainer, pl_module, "epoch_end")


class Watch(L.Callback):
    """Notes what a callback would decide on: the metrics at each batch."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        known = {name: value.item() for name, value in trainer.callback_metrics.items()}
        pl_module.events.append(("known", known, dict(trainer.progress_bar_metrics), trainer.global_step))


def in_order(size: int, batch: int) -> DataLoader:
    """Return a loader of quiet data, for validation."""
    return DataLoader(Quiet(size), batch_size=batch, sampler=SequentialSampler(range(size)))
