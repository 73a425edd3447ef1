# SPDX-License-Identifier: Apache-2.0
"""Two processes give the numbers of one: losses, norms, learning rates, epoch means, and each sample once."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Sampler, WeightedRandomSampler

import leyden as L
from leyden.errors import PossibleUserWarning
from leyden.strategies.ddp import DDPStrategy
from ranks import Judged, Net, data, make_trainer, on_ranks


def _train(devices: int, batch_size: int, options: dict[str, Any], count: int = 40, shuffle: bool = True) -> Any:
    L.seed_everything(11, verbose=False)
    module, samples = Judged(), data(count)
    trainer = make_trainer(devices, max_epochs=4, log_every_n_steps=1, **options)
    trainer.fit(module, DataLoader(samples, batch_size, shuffle=shuffle), DataLoader(data(13), 3))
    assert trainer.world_size == devices
    weights = torch.cat([p.detach().reshape(-1) for p in module.parameters()])
    return (
        module,
        [dict(row) for row in trainer.history],
        weights,
        {k: float(v) for k, v in trainer.callback_metrics.items()},
    )


def _on_two(options: dict[str, Any]) -> Any:
    module, rows, weights, metrics = _train(2, 4, options)
    return module.samples, module.losses, module.rates, module.norms, rows, weights, metrics


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"accumulate_grad_batches": 2, "gradient_clip_val": 0.3}, id="accumulated and clipped"),
        pytest.param({"strategy": "ddp_find_unused_parameters_true"}, id="unused parameters looked for"),
    ],
)
def test_f1_f2_sc3_two_processes_give_the_losses_norms_and_rates_of_one(options: dict[str, Any]) -> None:
    alone = {**options}
    alone.pop("strategy", None)
    module, rows, weights, metrics = _train(1, 8, alone)
    ranks = on_ranks(2, _on_two, options)
    for _, losses, rates, norms, their_rows, their_weights, their_metrics in ranks:
        assert len(losses) == 20
        assert rates == module.rates  # SC3
        assert norms == pytest.approx(module.norms, abs=1e-5)  # F2
        assert torch.allclose(their_weights, weights, atol=1e-5)  # F1
        assert len(their_rows) == len(rows)
        for row, theirs in zip(rows, their_rows, strict=True):
            assert theirs == pytest.approx(row, abs=1e-5)  # M1: the values over all ranks, on each
        assert set(their_metrics) == set(metrics)
    together = [sorted(a + b) for a, b in zip(ranks[0][0], ranks[1][0], strict=True)]
    assert together == [sorted(batch) for batch in module.samples]  # the same global batches
    means = [(a + b) / 2 for a, b in zip(ranks[0][1], ranks[1][1], strict=True)]
    assert means == pytest.approx(module.losses, abs=1e-5)  # F1
    assert ranks[0][4] == ranks[1][4]
    assert torch.equal(ranks[0][5], ranks[1][5])


COUNTS = (1, 2, 7, 12)


def _evaluate() -> Any:
    L.seed_everything(1, verbose=False)
    found = []
    for count in COUNTS:
        module, trainer = Judged(), make_trainer()
        loaders = [DataLoader(data(count), 3), DataLoader(data(2), 1)]
        (first, second) = trainer.validate(_Two(), loaders, verbose=False)
        module.evaluated.clear()
        test = trainer.test(module, loaders[0], verbose=False)
        predicted = trainer.predict(module, loaders[0])
        assert predicted is not None
        found.append((first, second, test, list(module.evaluated), [int(i) for batch in predicted for i in batch]))
    return found


class _Two(Judged):
    """Two validation loaders, of which a rank may have no batch at all."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)


def test_m1_m5_an_evaluation_counts_each_sample_once_for_any_number_of_samples() -> None:
    ranks = on_ranks(2, _evaluate)
    for count, zero, one in zip(COUNTS, *ranks, strict=True):
        L.seed_everything(1, verbose=False)
        module = Judged()
        expected = make_trainer(1).validate(_Two(), [DataLoader(data(count), 3), DataLoader(data(2), 1)], verbose=False)
        assert sorted(zero[3] + one[3]) == list(range(count))
        assert sorted(zero[4] + one[4]) == list(range(count))
        for rank in (zero, one):
            assert rank[0] == pytest.approx(expected[0], abs=1e-6)
            assert rank[1] == pytest.approx(expected[1], abs=1e-6)
            assert rank[2][0]["count"] == count
        whole = module.loss(next(iter(DataLoader(data(count), count))))
        assert zero[2][0]["val"] == pytest.approx(whole.item(), abs=1e-6)


class _Odd(Sampler[list[int]]):
    """A batch sampler of the user's own, whose batches differ in size; no torch class knows how it draws."""

    def __init__(self) -> None:
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Any:
        order = torch.randperm(13).tolist()
        yield from ([order[0]], order[1:4], order[4:6], order[6:10], order[10:])

    def __len__(self) -> int:
        return 5


class _Stream(IterableDataset[Any]):
    """Nobody knows how long it is; that of rank 1 is longer."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Any:
        yield from (sample for sample in data(self.count))


def _sampled() -> Any:
    # other random states on each rank: the order is that of rank 0 all the same
    rank = make_trainer().global_rank
    torch.manual_seed(100 + rank)
    odd = _Odd()
    weighted = WeightedRandomSampler([1.0] * 9 + [5.0] * 4, 13)
    own = DistributedSampler(data(13), num_replicas=2, rank=rank, shuffle=True)
    loaders = {
        "custom batches": DataLoader(data(13), batch_sampler=odd),
        "weighted": DataLoader(data(13), 3, sampler=weighted, generator=torch.Generator().manual_seed(5)),
        "no batches": DataLoader(data(7), batch_size=None, shuffle=True),
        "own distributed": DataLoader(data(13), 3, sampler=own),
        "stream": DataLoader(_Stream(6 + 4 * rank), 2),
        "dropped": DataLoader(data(13), 3, shuffle=True, drop_last=True),
    }
    found = {}
    for name, loader in loaders.items():
        module = _OneByOne() if name == "no batches" else Net()
        if name == "no batches":
            module.log = _nowhere  # type: ignore[method-assign]  # a single sample has no size to be read off
        torch.rand(1 + rank)
        trainer = make_trainer(max_epochs=2, num_sanity_val_steps=0)
        trainer.fit(module, loader)
        found[name] = module.samples
        assert trainer.train_dataloader is loader or isinstance(trainer.train_dataloader, DataLoader)
        assert loader.sampler in (weighted, own) or name not in ("weighted", "own distributed")
    return found, odd.epochs


def _nowhere(*args: Any, **kwargs: Any) -> None:
    """Log nothing."""


class _OneByOne(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step([batch[0][None], batch[1][None], batch[2][None]], batch_idx)


def test_i1_i2_any_sampler_is_shared_out_by_its_stream_and_a_distributed_one_is_left_alone() -> None:
    (zero, epochs), (one, _) = on_ranks(2, _sampled)
    epochs_of = {name: (zero[name], one[name]) for name in zero}
    assert epochs == [0, 1]  # I2: told once each

    def halves(name: str) -> Any:
        first, second = epochs_of[name]
        half = len(first) // 2
        assert len(first) == len(second) == 2 * half
        return [(first[:half], second[:half]), (first[half:], second[half:])]

    for a, b in halves("custom batches"):  # whole batches, in turn; the first one once more at the end
        assert len(a) == 3
        assert b[2] == a[0]
        assert sorted(itertools.chain(*a, *b[:2])) == list(range(13))
    for a, b in halves("no batches"):
        assert [len(a), len(b)] == [4, 4]
        assert sorted(itertools.chain(*a, *b[:3])) == list(range(7))
    for a, b in halves("own distributed"):
        assert set(itertools.chain(*a, *b)) == set(range(13))
    for a, b in halves("dropped"):
        assert [len(batch) for batch in a + b] == [3, 3, 3, 3]
        assert len(set(itertools.chain(*a, *b))) == 12
    assert len(set(map(tuple, zero["dropped"][:2] + zero["dropped"][2:]))) == 4  # another order in each epoch
    single = list(WeightedRandomSampler([1.0] * 9 + [5.0] * 4, 13, generator=torch.Generator().manual_seed(0)))
    assert len(single) == 13
    for a, b in halves("weighted"):
        assert [len(batch) for batch in a] == [3, 3, 1]
        assert [len(batch) for batch in b] == [3, 3, 1]
    # U2: with the shorter stream both end
    assert zero["stream"] == one["stream"] == [[0, 1], [2, 3], [4, 5]] * 2


def _uneven() -> Any:
    rank = make_trainer().global_rank
    module = Net()
    loader = DataLoader(data(12 + 6 * rank), 3, sampler=_Ranked(12 + 6 * rank))
    warned = pytest.warns(PossibleUserWarning, match=r"by rank: \[\[4\], \[6\]\]")
    with warned if rank == 0 else contextlib.nullcontext():
        make_trainer(max_epochs=1, num_sanity_val_steps=0).fit(module, loader)
    return len(module.losses)


class _Ranked(Sampler[int]):
    """Knows ranks, and has other numbers of samples on each: nobody shares it out."""

    num_replicas, rank = 2, 0

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Any:
        return iter(range(self.count))

    def __len__(self) -> int:
        return self.count


def test_u2_a_rank_with_more_batches_than_another_stops_with_it() -> None:
    assert on_ranks(2, _uneven) == [4, 4]


def _not_shared() -> Any:
    module = Net()
    make_trainer(max_epochs=1, use_distributed_sampler=False).fit(module, DataLoader(data(6), 2))
    return module.samples


def test_use_distributed_sampler_false_leaves_all_samples_to_each_rank() -> None:
    assert on_ranks(2, _not_shared) == [[[0, 1], [2, 3], [4, 5]]] * 2


class _Counted(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)


class _Noting(L.Callback):
    """Notes how many collectives there were before each batch."""

    def __init__(self, counts: dict[str, int]) -> None:
        self.counts = counts
        self.before: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before.append(sum(self.counts.values()))


def _collectives() -> Any:
    dist, exchanged = torch.distributed, []
    counts = dict.fromkeys(("all_gather", "all_gather_object", "broadcast", "broadcast_object_list", "barrier"), 0)

    def counting(name: str, real: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return real(*args, **kwargs)

        return counted

    for name in counts:
        setattr(dist, name, counting(name, getattr(dist, name)))

    def hook(state: Any, bucket: Any) -> Any:
        exchanged.append(1)
        future = dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    hook.__annotations__ = {}  # torch compares them with its classes, and these are words
    noting = _Noting(counts)
    strategy = DDPStrategy(ddp_comm_hook=hook)
    trainer = make_trainer(strategy=strategy, max_epochs=1, accumulate_grad_batches=2, callbacks=[noting])
    trainer.fit(_Counted(), DataLoader(data(64), 2))
    return [after - before for before, after in itertools.pairwise(noting.before)], len(exchanged)


def test_an_ordinary_step_exchanges_gradients_once_for_each_window_and_nothing_else() -> None:
    for between, exchanges in on_ranks(2, _collectives):
        assert between == [0] * 15
        assert exchanges == 8  # 16 batches, windows of two, one bucket


class _Ragged(Net):
    """Batches of which an unequal part counts; the step says how much."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        counts = batch[2] % 3 > 0
        losses = (self.layer(batch[0]) - batch[1]).square().reshape(-1)[counts]
        return {"loss": losses.mean(), "num_items": int(counts.sum())}


def _weighed(devices: int, accumulate: int) -> Any:
    module = _Ragged()
    trainer = make_trainer(devices, max_epochs=2, accumulate_grad_batches=accumulate)
    trainer.fit(module, DataLoader(data(32), 8 // devices))
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()]).tolist()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_weights_that_a_step_declares_hold_over_all_ranks(accumulate: int) -> None:
    zero, one = on_ranks(2, _weighed, 2, accumulate)
    assert zero == one
    assert zero == pytest.approx(_weighed(1, accumulate), abs=1e-5)


class _Normed(Net):
    def __init__(self) -> None:
        super().__init__()
        norm = torch.nn.BatchNorm1d(5)
        self.layer = torch.nn.Sequential(torch.nn.Linear(4, 5), norm, torch.nn.Tanh(), torch.nn.Linear(5, 1))


def _normed(devices: int) -> Any:
    torch.manual_seed(2)
    module = _Normed()
    make_trainer(devices, max_epochs=3, sync_batchnorm=True).fit(module, DataLoader(data(32), 8 // devices))
    assert "forward" not in vars(module.layer[1])
    assert type(module.layer[1]) is torch.nn.BatchNorm1d
    return torch.cat([value.reshape(-1).double() for value in module.state_dict().values()]).tolist()


def test_f1_synchronised_batch_norms_have_the_statistics_of_one_process() -> None:
    zero, one = on_ranks(2, _normed, 2)
    assert zero == pytest.approx(one, abs=1e-6)
    assert zero == pytest.approx(_normed(1), abs=1e-4)


def _order_of_lightning() -> Any:
    L.seed_everything(6, verbose=False)
    module = Net()
    trainer = make_trainer(max_epochs=2, semantics="lightning")
    trainer.fit(module, DataLoader(data(10), 2))
    judged = Judged()
    trainer.test(judged, DataLoader(data(7), 2), verbose=False)
    predicted = trainer.predict(judged, DataLoader(data(7), 2))
    assert predicted is not None
    return module.samples, judged.evaluated, sum(len(batch) for batch in predicted)


def test_with_lightnings_semantics_samples_are_shared_out_as_there() -> None:
    for rank, (samples, tested, predicted) in enumerate(on_ranks(2, _order_of_lightning)):
        assert tested == ([0, 2, 4, 6] if rank == 0 else [1, 3, 5, 0])
        assert predicted == 4 - rank
        sampler: Any = DistributedSampler(data(10), 2, rank, seed=6)
        expected = []
        for epoch in (0, 1):
            sampler.set_epoch(epoch)
            expected += [batch[2].tolist() for batch in DataLoader(data(10), 2, sampler=sampler)]
        assert samples == expected
