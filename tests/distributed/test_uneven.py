# SPDX-License-Identifier: Apache-2.0
"""U2: ranks with other numbers of training batches stop with the first, join in until the last is done, or begin anew."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from leyden.callbacks import ModelCheckpoint
from leyden.errors import MisconfigurationException
from leyden.strategies import DDPStrategy
from ranks import Net, data, make_trainer, on_ranks

SAMPLES = data(40)


class _Stream(IterableDataset[Any]):
    """An iterable whose length nobody knows; each rank has another one."""

    def __init__(self, count: int, first: int = 0) -> None:
        self.count, self.first = count, first

    def __iter__(self) -> Iterator[Any]:
        for i in range(self.first, self.first + self.count):
            yield SAMPLES[i]


def _loader(kind: str, rank: int, counts: tuple[int, ...]) -> Any:
    """``counts[rank]`` batches of 2, those of rank ``rank`` begin at sample ``20 * rank``."""
    count, first = counts[rank], 14 * rank
    if kind == "stream":
        return DataLoader(_Stream(2 * count, first), 2)
    whole = [[part[i : i + 2] for part in SAMPLES.tensors] for i in range(first, first + 2 * count, 2)]
    return DataLoader(whole, batch_size=None)  # type: ignore[arg-type]  # a list is a data set


def _fit(kind: str, counts: tuple[int, ...], uneven: str, devices: int, **arguments: Any) -> Any:
    unused = arguments.pop("unused", False)
    module = Net()
    strategy = DDPStrategy(uneven=uneven, find_unused_parameters=unused, hang_timeout=timedelta(seconds=20))
    trainer = make_trainer(
        devices, strategy=strategy, max_epochs=2, use_distributed_sampler=False, log_every_n_steps=1, **arguments
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, _loader(kind, trainer.global_rank, counts))
    flat = torch.cat([p.detach().reshape(-1) for p in module.parameters()]).tolist()
    rows = [row["loss"] for row in trainer.history if "loss" in row and "loss_epoch" not in row]
    return {
        "samples": [i for batch in module.samples for i in batch], "steps": trainer.global_step, "weights": flat,
        "rows": rows, "epoch": float(trainer.callback_metrics["loss_epoch"]), "batches": len(module.samples),
        "rate": module.norms,
    }  # fmt: skip


def _by_hand(counts: tuple[int, ...], accumulate: int = 1, total: int | None = None) -> Any:
    """The same training in one process: the mean over those ranks that have a batch."""
    module = Net()
    optimizer = torch.optim.SGD(module.parameters(), 0.05, momentum=0.9)
    longest, losses = max(counts), []
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total or 2 * -(-longest // accumulate))
    for _ in range(2):
        for step in range(longest):
            if step % accumulate == 0:
                optimizer.zero_grad()
            window = min(accumulate, longest - step // accumulate * accumulate)
            active = [rank for rank, count in enumerate(counts) if step < count]
            for rank in active:
                first = 14 * rank + 2 * step
                loss = module.loss([part[first : first + 2] for part in SAMPLES.tensors])
                losses.append(loss.item())
                (loss / len(active) / window).backward()
            if (step + 1) % accumulate == 0 or step + 1 == longest:
                optimizer.step()
                schedule.step()
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()]).tolist(), losses


@pytest.mark.parametrize("kind", ["list", "stream"])
def test_u2_stop_ends_with_the_rank_that_has_the_fewest(kind: str) -> None:
    zero, one = on_ranks(2, _fit, kind, (5, 3), "stop", 2)
    assert (zero["batches"], one["batches"], zero["steps"]) == (6, 6, 6)
    assert zero["weights"] == one["weights"]


_CASES = [
    ("list", (5, 3), {}), ("list", (2, 5), {"accumulate_grad_batches": 3}), ("list", (5, 3), {"unused": True}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "counts", "arguments"), _CASES, ids=["list", "windows", "unused"])
def test_u2_join_lets_ranks_that_are_done_take_part(kind: str, counts: tuple[int, ...], arguments: Any) -> None:
    accumulate = arguments.get("accumulate_grad_batches", 1)
    ranks = on_ranks(2, _joined, kind, counts, arguments)
    weights, losses = _by_hand(counts, accumulate)
    for rank, found in enumerate(ranks):
        assert found["batches"] == 2 * counts[rank]
        assert found["samples"] == 2 * list(range(14 * rank, 14 * rank + 2 * counts[rank]))  # each once
        assert found["weights"] == pytest.approx(weights, abs=1e-6)
        assert found["steps"] == 2 * -(-max(counts) // accumulate)
        assert found["epoch"] == pytest.approx(sum(losses[len(losses) // 2 :]) / (len(losses) // 2), abs=1e-6)
    assert ranks[0]["weights"] == ranks[1]["weights"]


def _joined(kind: str, counts: tuple[int, ...], arguments: Any) -> Any:
    return _fit(kind, counts, "join", 2, **arguments)


_SLOW = pytest.mark.slow
_STREAMS = [
    ((5, 3), "join"), ((0, 4), "join"), ((5, 3), "pad"), pytest.param((1, 4), "pad", marks=_SLOW),
]  # fmt: skip


@pytest.mark.parametrize(("counts", "uneven"), _STREAMS)
def test_u2_streams_of_unknown_length_train_to_the_policy(counts: tuple[int, ...], uneven: str) -> None:
    ranks = on_ranks(2, _fit, "stream", counts, uneven, 2)
    assert ranks[0]["weights"] == ranks[1]["weights"]
    for rank, found in enumerate(ranks):
        assert found["steps"] == 2 * max(counts)
        own = [14 * rank + i for i in range(2 * counts[rank])]
        if uneven == "join":
            assert found["samples"] == 2 * own
        else:
            again = (own * max(counts))[: 2 * max(counts)]
            assert found["samples"] == 2 * again
    if uneven == "join" and min(counts):
        assert ranks[0]["weights"] == pytest.approx(_by_hand(counts, total=1000)[0], abs=1e-6)


def test_u2_pad_where_the_lengths_are_known() -> None:
    ranks = on_ranks(2, _fit, "list", (5, 2), "pad", 2)
    assert [found["batches"] for found in ranks] == [10, 10]
    assert ranks[1]["samples"][:10] == [14, 15, 16, 17, 14, 15, 16, 17, 14, 15]
    assert ranks[0]["weights"] == ranks[1]["weights"]


def _resumed(folder: Path, kind: str, counts: tuple[int, ...], uneven: str, at: int) -> Any:
    def fit(path: Any) -> Any:
        saving = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        module = Net()
        trainer = make_trainer(
            strategy=DDPStrategy(uneven=uneven), max_epochs=2, use_distributed_sampler=False, callbacks=[saving],
            enable_checkpointing=True,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, _loader(kind, trainer.global_rank, counts), ckpt_path=path)
        return module.samples, torch.cat([p.detach().reshape(-1) for p in module.parameters()]).tolist()

    whole, rest = fit(None), fit(folder / f"step={at}.ckpt")
    return whole[1] == rest[1], whole[0][len(whole[0]) - len(rest[0]) :] == rest[0], len(rest[0])


@pytest.mark.parametrize(
    ("kind", "uneven"),
    [
        pytest.param("list", "join", marks=_SLOW),
        ("stream", "join"),
        ("list", "pad"),
        pytest.param("stream", "pad", marks=_SLOW),
    ],
)
def test_u2_a_run_resumes_where_some_ranks_are_done(tmp_path: Path, kind: str, uneven: str) -> None:
    ranks = on_ranks(2, _resumed, tmp_path, kind, (5, 2), uneven, 4)
    left = [6, 2] if uneven == "join" else [6, 6]
    assert ranks == [(True, True, count) for count in left]


class _Weighs(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.samples.append(batch[2].tolist())
        return {"loss": self.loss(batch), "num_items": len(batch[0])}


def _weighed() -> Any:
    module = _Weighs()
    strategy = DDPStrategy(uneven="join", hang_timeout=timedelta(seconds=20))
    trainer = make_trainer(strategy=strategy, max_epochs=1, use_distributed_sampler=False, accumulate_grad_batches=2)
    trainer.fit(module, _loader("list", trainer.global_rank, (1, 3)))
    return module.layer[0].weight.tolist(), len(module.samples), trainer.global_step


def test_u2_join_with_weights_that_the_step_declares() -> None:
    (weights, batches, steps), (others, more, _) = on_ranks(2, _weighed)
    assert weights == others
    assert (batches, more, steps) == (1, 3, 2)


def _cannot(arguments: dict[str, Any]) -> str:
    module = Net()
    module.automatic_optimization = not arguments.pop("manual", False)
    trainer = make_trainer(
        strategy=DDPStrategy(uneven="join"), max_epochs=1, use_distributed_sampler=False, **arguments
    )
    with pytest.raises(MisconfigurationException) as caught:
        trainer.fit(module, _loader("list", trainer.global_rank, (1, 3)))
    return str(caught.value)


@pytest.mark.parametrize(("arguments", "why"), [({"manual": True}, "manual"), ({"sync_batchnorm": True}, "statistics")])
def test_u2_join_says_where_it_cannot(arguments: dict[str, Any], why: str) -> None:
    for message in on_ranks(2, _cannot, arguments):
        assert "uneven='join'" in message
        assert why in message
        assert "uneven='pad'" in message


def _none_on_one() -> Any:
    module = Net()
    batches = [[part[i : i + 2] for part in SAMPLES.tensors] for i in range(0, 8, 2)]
    strategy = DDPStrategy(hang_timeout=timedelta(seconds=20))
    trainer = make_trainer(strategy=strategy, max_epochs=1, use_distributed_sampler=False)
    with (
        pytest.warns(UserWarning, match="gave None in place of a batch")
        if trainer.is_global_zero
        else (contextlib.nullcontext())
    ):
        mine = [None, *batches[1:]] if trainer.is_global_zero else batches
        trainer.fit(module, DataLoader(mine, batch_size=None))  # type: ignore[arg-type]  # a list is a data set
    return module.layer[0].weight.tolist(), len(module.samples)


def test_d4_a_batch_that_is_none_on_one_rank_counts_with_gradients_of_zero() -> None:
    (weights, batches), (others, more) = on_ranks(2, _none_on_one)
    assert weights == others
    assert (batches, more) == (3, 4)


def test_u2_another_policy_is_an_error() -> None:
    with pytest.raises(MisconfigurationException, match=r"DDPStrategy\(uneven='wait'\).*'stop', 'join', 'pad'"):
        DDPStrategy(uneven="wait")
