# SPDX-License-Identifier: Apache-2.0
"""A run goes on with another number of processes: no sample lost or seen twice, and updates of as many samples (R4, SC3)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from torch.utils.data import DataLoader, RandomSampler, Sampler

import leyden as L
from ranks import Net, data, make_trainer, on_ranks

COUNT = 36
SIZES = (1, 2, 3, 4)


class _Batches(Sampler[list[int]]):
    """A batch sampler of a user's own: batches of several sizes, in an order from a generator of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(5)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(COUNT, generator=self.generator).tolist()
        for place in range(0, COUNT, 6):
            yield order[place : place + 2]
            yield order[place + 2 : place + 6]

    def __len__(self) -> int:
        return COUNT // 3


def _loader(kind: str) -> Any:
    samples = data(COUNT)
    if kind == "sequential":
        return DataLoader(samples, 3)
    if kind == "shuffled":
        return DataLoader(samples, 3, shuffle=True)
    if kind == "own":
        return DataLoader(samples, 3, sampler=RandomSampler(samples, generator=torch.Generator().manual_seed(9)))
    if kind == "batches":
        return DataLoader(samples, batch_sampler=_Batches())
    if kind == "workers":
        return DataLoader(samples, 3, shuffle=True, num_workers=1, persistent_workers=True)
    assert kind == "uneven"
    return DataLoader(data(COUNT + 1), 3, shuffle=True)


class Counted(Net):
    """Records the samples of each batch, by epoch and update, and saves after batch ``at``."""

    def __init__(self, path: Path | None = None, at: int = -1) -> None:
        super().__init__()
        self.path, self.at = path, at
        self.seen: list[tuple[int, int, list[int]]] = []
        self.epochs: list[dict[str, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        ids = batch[2].float()
        self.log("mean", ids.mean(), on_step=False, on_epoch=True)
        for name, value in (("sum", ids.sum()), ("min", ids.min()), ("max", ids.max())):
            self.log(name, value, on_step=False, on_epoch=True, reduce_fx=name)
        self.seen.append((self.trainer.current_epoch, self.trainer.global_step, batch[2].tolist()))
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if len(self.seen) == self.at:
            assert self.path is not None
            self.trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self) -> None:
        self.epochs.append({name: float(self.trainer.callback_metrics[name]) for name in ("sum", "min", "max")})

    def result(self) -> dict[str, Any]:
        return {
            "seen": self.seen, "epochs": self.epochs, "losses": self.losses, "rates": self.rates,
            "steps": self.trainer.global_step, "mean": self.trainer.callback_metrics.get("mean"),
            "history": [row["mean"] for row in self.trainer.history if "mean" in row],
            "weights": [p.tolist() for p in self.parameters()],
        }  # fmt: skip


def _fit(size: int, kind: str, path: Path, at: int, accumulate: int, resumes: bool, **arguments: Any) -> dict[str, Any]:
    warnings.filterwarnings("ignore", "The lr scheduler OneCycleLR was made for")
    L.seed_everything(4, verbose=False)
    torch.rand(3 * resumes)
    module = Counted(path, -1 if resumes else at)
    trainer = make_trainer(size, max_epochs=2, accumulate_grad_batches=accumulate, **arguments)
    trainer.fit(module, _loader(kind), ckpt_path=path if resumes else None)
    return module.result()


def _begin(size: int, folder: Path, cases: list[tuple[str, int, int]]) -> Any:
    return [_fit(size, kind, folder / f"{size}-{kind}-{acc}.ckpt", at, acc, False) for kind, at, acc in cases]


def _go_on(size: int, folder: Path, former: list[int], cases: list[tuple[str, int, int]]) -> Any:
    return [
        [_fit(size, kind, folder / f"{one}-{kind}-{acc}.ckpt", at, acc, True) for kind, at, acc in cases]
        for one in former
    ]


def _check(whole: list[Any], rest: list[Any], kind: str, at: int) -> None:
    """Compare the ranks of a run that went on with those of the one whose checkpoint it had."""
    former, size, count = len(whole), len(rest), COUNT + (kind == "uneven")
    seen: dict[int, list[int]] = {0: [], 1: []}
    for rank in whole:
        for epoch, _, ids in rank["seen"][:at]:
            seen[epoch] += ids
    for rank in rest:
        for epoch, _, ids in rank["seen"]:
            seen[epoch] += ids
    most = former if former % size == 0 else size
    for epoch, ids in seen.items():
        assert set(ids) == set(range(count)), (former, size, kind, epoch)
        padded = most * 4 if kind == "batches" else most - 1
        assert len(ids) - count <= padded, (former, size, kind, epoch, sorted(ids))
    for epoch, logged in enumerate(rest[0]["epochs"]):
        assert logged == {"sum": sum(seen[epoch]), "min": 0, "max": count - 1}
    assert rest[0]["history"][0] == pytest.approx(sum(seen[0]) / len(seen[0]), abs=1e-4)
    if former % size == 0:
        turns = former // size
        assert rest[0]["steps"] == whole[0]["steps"]
        assert rest[0]["history"] == pytest.approx(whole[0]["history"][: len(rest[0]["history"])], abs=1e-4)
        expected = [batch for batches in zip(*(rank["seen"][at:] for rank in whole), strict=True) for batch in batches]
        found = [batch for batches in zip(*(rank["seen"] for rank in rest), strict=True) for batch in batches]
        assert found == expected  # each batch is one that there would have been, in the same update
        assert rest[0]["rates"] == [rate for rate in whole[0]["rates"][at:] for _ in range(turns)]
        losses = [loss for losses in zip(*(rank["losses"][at:] for rank in whole), strict=True) for loss in losses]
        theirs = [loss for losses in zip(*(rank["losses"] for rank in rest), strict=True) for loss in losses]
        assert theirs == pytest.approx(losses, abs=1e-5)
        for one, other in zip(whole[0]["weights"], rest[0]["weights"], strict=True):
            assert torch.allclose(torch.tensor(one), torch.tensor(other), atol=1e-5)


def _matrix(folder: Path, former: tuple[int, ...], now: tuple[int, ...], cases: list[tuple[str, int, int]]) -> None:
    whole = {size: on_ranks(size, _begin, size, folder, cases) for size in former}
    for size in now:
        others = [one for one in former if one != size]
        rest = on_ranks(size, _go_on, size, folder, others, cases)
        for number, one in enumerate(others):
            for place, (kind, at, _) in enumerate(cases):
                _check([rank[place] for rank in whole[one]], [rank[number][place] for rank in rest], kind, at)


def test_r4_other_numbers_of_ranks_go_on_at_the_next_sample(tmp_path: Path) -> None:
    _matrix(tmp_path, SIZES, SIZES, [("sequential", 2, 1), ("own", 1, 1), ("batches", 2, 1), ("uneven", 2, 1)])


# ---------------------------------------------------------------------------------------------- what a run may have


class Weighed(Counted):
    """Declares the weight of each batch, and counts with metric objects whose states are reduced in several ways."""

    def __init__(self, path: Path | None = None, at: int = -1) -> None:
        super().__init__(path, at)
        self.metrics = torch.nn.ModuleDict({
            "total": torchmetrics.SumMetric(), "least": torchmetrics.MinMetric(), "average": torchmetrics.MeanMetric(),
            "all": torchmetrics.CatMetric(),
        })  # fmt: skip
        self.every: list[list[float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss, ids = super().training_step(batch, batch_idx), batch[2].float()
        for metric in self.metrics.values():
            metric.update(ids)  # type: ignore[operator]
        self.log("average", self.metrics["average"], on_step=False, on_epoch=True)  # type: ignore[arg-type]
        return {"loss": loss, "num_items": len(ids)}

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        values = [float(self.metrics[name].compute()) for name in ("total", "least")]  # type: ignore[operator]
        every = self.metrics["all"].compute()  # type: ignore[operator]
        self.every.append([*values, *sorted(every.flatten().tolist())])
        for name in ("total", "least", "all"):
            self.metrics[name].reset()  # type: ignore[operator]

    def result(self) -> dict[str, Any]:
        return {**super().result(), "every": self.every, "average": self.trainer.callback_metrics["average"].item()}


def _run(size: int, module: Counted, loaders: Any, path: Path | None, **arguments: Any) -> dict[str, Any]:
    L.seed_everything(4, verbose=False)
    trainer = make_trainer(size, **{"max_epochs": 2, **arguments})
    trainer.fit(module, *(loaders if isinstance(loaders, tuple) else (loaders,)), ckpt_path=path)
    return module.result()


def _open(size: int, path: Path | None, at: int, resumes: bool) -> Any:
    loader = DataLoader(data(COUNT + 5), 2, shuffle=True)
    return _run(
        size, Weighed(path, -1 if resumes else at), loader, path if resumes else None, accumulate_grad_batches=2
    )


@pytest.mark.parametrize(("at", "now"), [(1, 1), (3, 2)])
def test_r4_an_open_update_weights_and_metrics_go_on_in_fewer_processes(tmp_path: Path, at: int, now: int) -> None:
    path = tmp_path / "open.ckpt"
    whole = on_ranks(4, _open, 4, path, at, False)
    rest = on_ranks(now, _open, now, path, at, True)
    assert rest[0]["steps"] == whole[0]["steps"] == 6
    assert rest[0]["every"] == whole[0]["every"]
    assert rest[0]["average"] == pytest.approx(whole[0]["average"], abs=1e-5)
    for one, other in zip(whole[0]["weights"], rest[0]["weights"], strict=True):
        assert torch.allclose(torch.tensor(one), torch.tensor(other), atol=1e-5)
