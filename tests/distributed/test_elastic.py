# SPDX-License-Identifier: Apache-2.0
"""A run goes on with another number of processes: no sample lost or seen twice, and updates of as many samples (R4, SC3)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
import torchmetrics
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, Sampler

import leyden as L
from ranks import Net, data, make_trainer, on_ranks

COUNT = 36
SIZES = (1, 2, 3, 4)
LONGER = "The lr scheduler OneCycleLR was made for"


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
        self.log("mean", ids.mean(), on_step=False, on_epoch=True, batch_size=len(ids))
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
    warnings.filterwarnings("ignore", LONGER)
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


CASES = [("sequential", 2, 1), ("own", 1, 1), ("batches", 2, 1), ("uneven", 2, 1)]


def test_r4_other_numbers_of_ranks_go_on_at_the_next_sample(tmp_path: Path) -> None:
    _matrix(tmp_path, (1, 4), (1, 2, 3), CASES)


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 2])
def test_r4_every_number_of_ranks_goes_on_from_every_other(tmp_path: Path, at: int) -> None:
    more = [("shuffled", at, 1), ("workers", at, 1), ("uneven", at, 2), ("batches", at, 2)]
    _matrix(tmp_path, SIZES, SIZES, [*CASES, *more])


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
    warnings.filterwarnings("ignore", LONGER)
    L.seed_everything(4, verbose=False)
    trainer = make_trainer(size, **{"max_epochs": 2, **arguments})
    trainer.fit(module, *(loaders if isinstance(loaders, tuple) else (loaders,)), ckpt_path=path)
    return module.result()


def _open(size: int, path: Path | None, at: int, resumes: bool) -> Any:
    loader = DataLoader(data(COUNT + 5), 2, shuffle=True)
    return _run(
        size, Weighed(path, -1 if resumes else at), loader, path if resumes else None, accumulate_grad_batches=2
    )


@pytest.mark.parametrize(("at", "now"), [(1, 1), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_r4_an_open_update_weights_and_metrics_go_on_in_fewer_processes(tmp_path: Path, at: int, now: int) -> None:
    path = tmp_path / "open.ckpt"
    whole = on_ranks(4, _open, 4, path, at, False)
    rest = on_ranks(now, _open, now, path, at, True)
    assert rest[0]["steps"] == whole[0]["steps"] == 6
    assert rest[0]["every"] == whole[0]["every"]
    assert rest[0]["average"] == pytest.approx(whole[0]["average"], abs=1e-5)
    for one, other in zip(whole[0]["weights"], rest[0]["weights"], strict=True):
        assert torch.allclose(torch.tensor(one), torch.tensor(other), atol=1e-5)


class Checked(Counted):
    """Validates inside the epoch, and notes when."""

    def __init__(self, path: Path | None = None, at: int = -1) -> None:
        super().__init__(path, at)
        self.validated: list[tuple[int, int]] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.loss(batch))

    def on_validation_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.validated.append((self.trainer.current_epoch, self.trainer.global_step))

    def result(self) -> dict[str, Any]:
        return {**super().result(), "validated": self.validated}


class Paired(Counted):
    """Trains on two loaders together."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        first, second = batch["a"], batch["b"]
        loss = super().training_step(first, batch_idx) + self.loss(second)
        self.seen[-1][2].extend(1000 + index for index in second[2].tolist())
        return loss


def _trained(name: str, size: int, path: Path, at: int, resumes: bool) -> dict[str, Any]:
    """One of the things that a run may have, by its name."""
    saves = path, -1 if resumes else at
    given = path if resumes else None
    val = DataLoader(data(8), 2)
    if name == "validates":
        loaders = DataLoader(data(COUNT + 5), 2, shuffle=True), val
        return _run(size, Checked(*saves), loaders, given, val_check_interval=2, limit_train_batches=5)
    if name == "fraction":
        loaders = DataLoader(data(COUNT + 5), 2, drop_last=True), val
        return _run(size, Checked(*saves), loaders, given, val_check_interval=0.5, limit_train_batches=0.8)
    if name == "lightning":
        return _run(size, Counted(*saves), DataLoader(data(COUNT + 5), 2), given, semantics="lightning")
    if name == "accumulates":
        return _run(size, Counted(*saves), DataLoader(data(COUNT + 5), 2), given, accumulate_grad_batches=3)
    if name == "pairs":
        pair = {"a": DataLoader(data(COUNT), 2, shuffle=True), "b": DataLoader(data(12), 2, shuffle=True)}
        return _run(size, Paired(*saves), pair, given)
    if name == "own size":
        return _run(size, Counted(*saves), DataLoader(data(48), 24 // size, shuffle=True), given)
    assert name == "switched off"
    return _run(size, Counted(*saves), DataLoader(data(48), 3, shuffle=True), given, keep_global_batch=False)


def _all(size: int, folder: Path, names: dict[str, int], resumes: bool) -> Any:
    return {name: _trained(name, size, folder / f"{name}.ckpt", at, resumes) for name, at in names.items()}


def _seen(ranks: list[Any], name: str, epoch: int, most: int | None = None) -> list[int]:
    return [i for rank in ranks for when, _, ids in rank[name]["seen"][:most] if when == epoch for i in ids]


def _updates(ranks: list[Any], name: str) -> dict[int, list[int]]:
    """The samples of each update."""
    found: dict[int, list[int]] = {}
    for rank in ranks:
        for _, step, ids in rank[name]["seen"]:
            found.setdefault(step, []).extend(ids)
    return {step: sorted(ids) for step, ids in found.items()}


KEPT = {"validates": 3, "fraction": 1, "lightning": 3, "accumulates": 2, "pairs": 2}


@pytest.mark.parametrize("now", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_r4_fewer_processes_make_the_updates_of_as_many_as_before(tmp_path: Path, now: int) -> None:
    whole = on_ranks(4, _all, 4, tmp_path, KEPT, False)
    rest = on_ranks(now, _all, now, tmp_path, KEPT, True)
    for name, at in KEPT.items():
        one, other = whole[0][name], rest[0][name]
        assert other["steps"] == one["steps"], name
        expected, found = _updates(whole, name), _updates(rest, name)
        first = min(found) + (name == "accumulates")  # that update was open: its first batches were done before
        assert {step: ids for step, ids in found.items() if step >= first} == {
            step: ids for step, ids in expected.items() if step >= first
        }, name
        assert set(_seen(whole, name, 0, at)) | set(_seen(rest, name, 0)) == set(_seen(whole, name, 0)), name
        assert other.get("validated", []) == [when for when in one.get("validated", []) if when[1] > min(found)], name
        for before, after in zip(one["weights"], other["weights"], strict=True):
            assert torch.allclose(torch.tensor(before), torch.tensor(after), atol=1e-5), name


@pytest.mark.parametrize(
    ("former", "now"), [(4, 3), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((2, 4), (3, 2)))]
)
def test_r4_processes_that_cannot_keep_the_update_lose_no_sample(tmp_path: Path, former: int, now: int) -> None:
    names = {"pairs": 2, "own size": 1, "switched off": 2, "accumulates": 2}
    whole = on_ranks(former, _all, former, tmp_path, names, False)
    rest = on_ranks(now, _all, now, tmp_path, names, True)
    for name, at in names.items():
        count = 48 if name in ("own size", "switched off") else COUNT + 5 * (name == "accumulates")
        for epoch in (0, 1):
            seen = [i for i in _seen(whole, name, epoch, at) + _seen(rest, name, epoch) if i < 1000]
            assert set(seen) == set(range(count)), name
            assert len(seen) - count < max(former, now), name
    assert rest[0]["own size"]["steps"] == whole[0]["own size"]["steps"] == 4
    for before, after in zip(whole[0]["own size"]["weights"], rest[0]["own size"]["weights"], strict=True):
        assert torch.allclose(torch.tensor(before), torch.tensor(after), atol=1e-5)


# ---------------------------------------------------------------------------------------------- again and again


class Twice(Counted):
    """Saves after each batch of the first epoch."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.path is not None and self.trainer.current_epoch == 0:
            self.trainer.save_checkpoint(f"{self.path}-{self.trainer.fit_loop.turns}-{len(self.seen)}")


def _again(size: int, path: Path, given: str | None, accumulate: int = 1) -> Any:
    loader = DataLoader(data(COUNT + 5), 2, shuffle=True, num_workers=0)
    where = Path(given) if given is not None else None
    return _run(size, Twice(path), loader, where, accumulate_grad_batches=accumulate)


def _differs(one: Any, other: Any) -> float:
    pairs = zip(one["weights"], other["weights"], strict=True)
    return max((torch.tensor(a) - torch.tensor(b)).abs().max().item() for a, b in pairs)


def test_r4_a_run_that_lost_processes_and_got_them_back_is_the_one_that_did_not(tmp_path: Path) -> None:
    whole = on_ranks(4, _again, 4, tmp_path / "whole", None)
    on_ranks(2, _again, 2, tmp_path / "fewer", str(tmp_path / "whole-1-2"))
    back = on_ranks(4, _again, 4, tmp_path / "back", str(tmp_path / "fewer-2-2"))
    assert [rank["seen"] for rank in back] == [rank["seen"][3:] for rank in whole]
    assert _differs(back[0], whole[0]) < 1e-5
    # three cannot make updates of four, in the middle of which two were besides; what it began with is not forgotten
    three = on_ranks(3, _again, 3, tmp_path / "three", str(tmp_path / "fewer-2-1"))
    seen = [i for rank in three for epoch, _, ids in rank["seen"] if epoch == 0 for i in ids]
    done = [i for rank in whole for _, _, ids in rank["seen"][:2] for i in ids]
    assert set(done).isdisjoint(seen[: COUNT + 5 - len(done)]) or len(set(done) & set(seen)) <= 2
    assert set(done) | set(seen) == set(range(COUNT + 5))
    two = on_ranks(2, _again, 2, tmp_path / "two", str(tmp_path / "three-1-1"))
    more = [i for rank in three for _, _, ids in rank["seen"][:1] for i in ids]
    rest = [i for rank in two for epoch, _, ids in rank["seen"] if epoch == 0 for i in ids]
    assert set(done) | set(more) | set(rest) == set(range(COUNT + 5))
    assert len(done) + len(more) + len(rest) <= COUNT + 5 + 3
    assert two[0]["steps"] - three[0]["seen"][1][1] > 0


@pytest.mark.slow
def test_r4_a_second_restart_in_an_epoch_that_others_began_is_exact(tmp_path: Path) -> None:
    whole = on_ranks(4, _again, 4, tmp_path / "whole", None)
    three = on_ranks(3, _again, 3, tmp_path / "three", str(tmp_path / "whole-1-1"))
    again = on_ranks(3, _again, 3, tmp_path / "again", str(tmp_path / "three-1-2"))
    assert [rank["seen"] for rank in again] == [rank["seen"][2:] for rank in three]
    # not to the last bit: a sum of three depends on the order, and DistributedDataParallel has another in its first step
    for one, other in zip(again, three, strict=True):
        assert one["losses"] == pytest.approx(other["losses"][2:], abs=1e-5)
    assert _differs(again[0], three[0]) < 1e-5
    assert again[0]["history"] == three[0]["history"]
    alone = on_ranks(1, _again, 1, tmp_path / "alone", str(tmp_path / "three-1-2"))
    seen = [i for rank in whole for _, _, ids in rank["seen"][:1] for i in ids]
    seen += [i for rank in three for _, _, ids in rank["seen"][:2] for i in ids]
    seen += [i for epoch, _, ids in alone[0]["seen"] if epoch == 0 for i in ids]
    on_four = on_ranks(4, _again, 4, tmp_path / "last", str(tmp_path / "alone-4-1"))
    assert set(seen) == set(range(COUNT + 5))
    assert len(seen) <= COUNT + 5 + 3
    assert on_four[0]["steps"] == alone[0]["steps"]


# ---------------------------------------------------------------------------------------------- what cannot be exact


class _Stream(IterableDataset[Any]):
    """Gives each rank numbers of its own."""

    def __iter__(self) -> Iterator[Any]:
        rank, size = (
            dist.get_rank() if dist.is_initialized() else 0,
            dist.get_world_size() if dist.is_initialized() else 1,
        )
        yield from (data(24)[i] for i in range(rank, 24, size))


def _left_alone(size: int, path: Path, resumes: bool) -> Any:
    rank = int(os.environ["RANK"])
    own = DistributedSampler(data(24), size, rank, shuffle=True, seed=3)
    loaders = {"sampler": DataLoader(data(24), 2, sampler=own), "stream": DataLoader(_Stream(), 2)}
    found = {}
    for name, loader in loaders.items():
        file = path / name
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found[name] = _run(
                size, Counted(file, -1 if resumes else 2), loader, file if resumes else None, max_epochs=1
            )
        found[name]["said"] = [str(one.message) for one in caught]
    return found


def test_r4_what_leyden_does_not_share_out_is_named(tmp_path: Path) -> None:
    whole = on_ranks(3, _left_alone, 3, tmp_path, False)
    rest = on_ranks(2, _left_alone, 2, tmp_path, True)
    (said,) = [text for text in rest[0]["sampler"]["said"] if "of its own, which is left alone" in text]
    assert "12 samples of its order count as done" in said
    done = [i for rank in whole for _, _, ids in rank["sampler"]["seen"][:2] for i in ids]
    left = [i for rank in rest for _, _, ids in rank["sampler"]["seen"] for i in ids]
    assert sorted(done + left) == list(range(24))
    assert any(
        "is not shared out by Leyden, and the epoch goes on with 2 processes" in s for s in rest[0]["stream"]["said"]
    )
    assert [len(rank["stream"]["seen"]) for rank in rest] == [4, 4]


def _drawn(size: int, path: Path, alike: bool, resumes: bool) -> Any:
    L.seed_everything(4, verbose=False)
    if not alike:
        torch.manual_seed(int(os.environ["RANK"]) + 50 * resumes)
    module = Noisy(path, -1 if resumes else 1)
    make_trainer(size, max_epochs=1).fit(module, DataLoader(data(24), 2), ckpt_path=path if resumes else None)
    return module.drawn


class Noisy(Counted):
    """Draws a number in each batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.drawn = [*getattr(self, "drawn", []), torch.rand(()).item()]
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("alike", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_r4_generators_go_on_on_their_rank_and_new_ranks_get_their_own(tmp_path: Path, alike: bool) -> None:
    whole = on_ranks(2, _drawn, 2, tmp_path / "rng.ckpt", alike, False)
    rest = on_ranks(3, _drawn, 3, tmp_path / "rng.ckpt", alike, True)
    same = on_ranks(3, _drawn, 3, tmp_path / "rng.ckpt", alike, True)
    assert rest == same
    assert [rank[0] for rank in rest[:2]] == [rank[1] for rank in whole]
    assert (rest[2][0] == rest[0][0]) is alike
    assert len({numbers[0] for numbers in rest}) == (1 if alike else 3)


# ---------------------------------------------------------------------------------------------- torchrun

SCRIPT = Path(__file__).with_name("elastic_script.py")


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(SCRIPT.parent), *(entry for entry in sys.path if entry)])
    # without the last one, torchrun remembers where the first machines met, and one that joins later waits in vain
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def _port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _torchrun(folder: Path, dies: int, *words: str, nproc: int = 2, pace: float = 0.0) -> Any:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(nproc), *words]
    with (folder / f"output-{len(list(folder.glob('output-*')))}").open("w") as output:
        return subprocess.Popen(
            [*command, str(SCRIPT), str(folder), str(dies), str(pace)], env=_environment(), stdout=output, stderr=output,
            cwd=folder,
        )  # fmt: skip


def _noted(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in folder.glob("seen-*") for line in path.read_text().splitlines()]


def _end(process: Any, timeout: float = 110.0) -> int:
    try:
        return int(process.wait(timeout))
    finally:
        for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else ():
            child.kill()
        process.kill()
        process.wait()


def _weights(folder: Path) -> Any:
    return json.loads((folder / "weights.json").read_text())


def _unbroken(size: int) -> Any:
    """What the script does, in processes that nothing happens to: the notes of a rank, and the weights."""
    L.seed_everything(1, verbose=False)
    module = Net()
    trainer = make_trainer(size, max_epochs=3)
    trainer.fit(module, DataLoader(data(32), 4, shuffle=True))
    notes = [{"step": step, "rank": trainer.global_rank, "ids": ids} for step, ids in enumerate(module.samples)]
    return notes, [p.tolist() for p in module.parameters()]


def test_r4_what_torchrun_starts_anew_after_a_kill_is_the_run_that_was_not_killed(tmp_path: Path) -> None:
    whole = on_ranks(2, _unbroken, 2)
    words = ("--master-addr", "127.0.0.1", "--master-port", str(_port()), "--max-restarts", "1")
    broken, output = _torchrun(tmp_path, 1, *words), tmp_path / "output-0"
    assert _end(broken) == 0, output.read_text()
    assert (tmp_path / "died").exists()
    assert "torchrun has started this fit anew: it goes on from" in output.read_text()
    found = [(note["step"], note["rank"], note["ids"]) for note in _noted(tmp_path)]
    expected = [(note["step"], note["rank"], note["ids"]) for notes, _ in whole for note in notes]
    # what came after the last checkpoint, of step 6, was done once more
    assert sorted(found) == sorted([*expected, *(note for note in expected if note[0] in (6, 7, 8))])
    assert _weights(tmp_path) == whole[0][1]


@pytest.mark.slow
def test_r4_a_machine_that_is_lost_leaves_a_run_that_goes_on_with_fewer_processes(tmp_path: Path) -> None:
    unbroken = on_ranks(4, _unbroken, 4)
    place, folder = f"127.0.0.1:{_port()}", tmp_path / "lost"
    words = (
        "--nnodes", "1:2", "--rdzv-backend", "c10d", "--rdzv-endpoint", place, "--rdzv-id", "lost", "--max-restarts", "3",
        "--local-addr", "127.0.0.1", "--rdzv-conf",
        "last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=2",
    )  # fmt: skip
    first = _torchrun(folder, -1, *words, pace=0.3)
    time.sleep(2)  # the one that serves the others comes first
    second = _torchrun(folder, -1, *words, pace=0.3)
    until = time.monotonic() + 100
    while not any(note["step"] >= 5 and note["world"] == 4 for note in _noted(folder)) and time.monotonic() < until:
        time.sleep(0.05)
    for child in psutil.Process(second.pid).children(recursive=True):
        child.kill()
    second.kill()
    second.wait()
    output = folder / "output-0"
    assert _end(first) == 0, output.read_text()
    assert "torchrun has started this fit anew: it goes on from" in output.read_text()
    assert "each takes 2 batches where it took one, so that an update keeps its 16 samples" in output.read_text()
    whole, found = [note for notes, _ in unbroken for note in notes], _noted(folder)
    fewer = [note for note in found if note["world"] == 2]
    assert fewer
    for step in {note["step"] for note in whole}:
        of_step = [sorted(i for note in notes if note["step"] == step for i in note["ids"]) for notes in (whole, fewer)]
        assert of_step[1] in ([], of_step[0])
    last = min(note["step"] for note in fewer)
    assert {note["step"] for note in found} == {note["step"] for note in whole}
    assert {note["step"] for note in fewer} == {note["step"] for note in whole if note["step"] >= last}
    for one, other in zip(unbroken[0][1], _weights(folder), strict=True):
        assert torch.allclose(torch.tensor(one), torch.tensor(other), atol=1e-5)


@pytest.mark.slow
def test_r4_a_machine_that_joins_later_takes_its_part(tmp_path: Path) -> None:
    place, folder = f"127.0.0.1:{_port()}", tmp_path / "joined"
    words = (
        "--nnodes", "1:2", "--rdzv-backend", "c10d", "--rdzv-endpoint", place, "--rdzv-id", "joined", "--max-restarts", "3",
        "--local-addr", "127.0.0.1", "--rdzv-conf", "last_call_timeout=1",
    )  # fmt: skip
    first = _torchrun(folder, -1, *words, nproc=1, pace=0.4)
    until = time.monotonic() + 60
    while not any(note["step"] >= 2 for note in _noted(folder)) and time.monotonic() < until:
        time.sleep(0.05)
    second = _torchrun(folder, -1, *words, nproc=1, pace=0.4)
    output = folder / "output-0"
    assert _end(first) == 0, output.read_text()
    assert _end(second) == 0
    found = _noted(folder)
    assert {note["world"] for note in found} == {1, 2}
    assert "torchrun has started this fit anew: it goes on from" in output.read_text()
    for epoch in (0, 1, 2):
        ids = [i for note in found if note["epoch"] == epoch for i in note["ids"]]
        assert sorted(ids) == list(range(32))  # the signal of torchrun saved the run between two batches
