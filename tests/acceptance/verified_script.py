# SPDX-License-Identifier: Apache-2.0
"""Scripts for ``leyden verify-resume``: one whose fit resumes exactly, and several with one mistake each."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import leyden as L
from verified_model import Net, loaders

COUNT = 0


def count() -> Iterator[int]:
    """Count, in a frame that nobody can look into."""
    number = 0
    while True:
        number += 1
        yield number


HIDDEN = count()


class Stream(IterableDataset):
    """Counts on from pass to pass."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[Any]:
        for _ in range(16):
            self.position += 1
            yield (torch.full((3,), float(self.position)),)


class Case(Net):
    """One mistake in the step."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case
        self.noise = torch.Generator().manual_seed(1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        global COUNT
        COUNT += self.case == "global"
        factor = {
            "generator": lambda: torch.rand(1, generator=self.noise),
            "global": lambda: COUNT,
            "hidden": lambda: next(HIDDEN),
            "time": lambda: time.time() % 1,
            "hash": lambda: hash("word") % 1000,
        }.get(self.case, lambda: 1)()
        return super().training_step([batch[0] * factor], batch_idx)


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case")
    parser.add_argument("--epochs", type=int, default=4)
    given = parser.parse_args()
    if given.case != "unseeded":
        L.seed_everything(1, verbose=False)
    train, val = loaders()
    if given.case == "stream":
        train = DataLoader(Stream(), batch_size=4)
    if given.case == "unseeded":
        train = DataLoader(TensorDataset(torch.randn(16, 3)), batch_size=4)
    trainer = L.Trainer(max_epochs=given.epochs, accelerator="cpu", log_every_n_steps=1)
    try:
        trainer.fit(Case(given.case), train, val)
    except BaseException as error:
        raise SystemExit("the script went on after fit") from error
    raise SystemExit("the script went on after fit")


if __name__ == "__main__":
    main()
