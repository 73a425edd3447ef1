# SPDX-License-Identifier: Apache-2.0
"""Questions about one loader: iterable, length, number of batches, epoch, shuffling."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from leyden.data.loaders import (
    check_iterable,
    has_shuffle,
    length,
    num_batches,
    set_epoch,
    stop_workers,
    without_shuffle,
)
from leyden.errors import LeydenWarning, MisconfigurationException
from leyden.types import RunningStage

TRAIN, VAL, SANITY = RunningStage.TRAINING, RunningStage.VALIDATING, RunningStage.SANITY_CHECKING


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(4))


class SizedStream(Stream):
    def __len__(self):
        return 4


# ------------------------------------------------------------------ iterable


@pytest.mark.parametrize("loader", [DataLoader(range(3)), [1], range(3), (i for i in ()), torch.ones(2), {"a": 1}])
def test_iterables_pass(loader):
    check_iterable(loader, "train_dataloaders", "fit")


def test_old_protocol_passes():
    class Old:
        def __getitem__(self, i):
            raise IndexError

    check_iterable(Old(), "train_dataloaders", "fit")


def test_iterable_is_not_opened():
    class Explodes:
        def __iter__(self):
            raise AssertionError

    check_iterable(Explodes(), "dataloaders", "test")


@pytest.mark.parametrize(
    ("loader", "source", "fn", "text"),
    [
        (
            5,
            "train_dataloaders",
            "fit",
            r"Trainer.fit\(train_dataloaders=...\)`. Found 5 \(int\).*write train_dataloader\(\)",
        ),
        (
            None,
            "dataloaders",
            "test",
            r"Trainer.test\(dataloaders=...\)`. Found None \(NoneType\).*write test_dataloader\(\)",
        ),
        (5, "dataloaders", "validate", r"write val_dataloader\(\)"),
        (5, "val_dataloaders", "fit", r"Trainer.fit\(val_dataloaders=...\).*write val_dataloader\(\)"),
        (5, "val_dataloaders", "validate", r"Trainer.validate\(dataloaders=...\).*write val_dataloader\(\)"),
        (5, "MyModule.val_dataloader()", "fit", r"^MyModule.val_dataloader\(\) returned 5"),
        (5, "MyModule.val_dataloader", "fit", r"MyModule.val_dataloader\(\) returned 5 \(int\)"),
        (DataLoader, "dataloaders", "predict", r"Found the class DataLoader, which cannot"),
    ],
)
def test_other_things_are_named(loader, source, fn, text):
    with pytest.raises(TypeError, match=text):
        check_iterable(loader, source, fn)


# ------------------------------------------------------------------ length


def test_length():
    assert length(DataLoader(range(5), batch_size=2)) == 3
    assert length([]) == 0
    assert length(DataLoader(SizedStream(), batch_size=2)) == 2
    assert length(DataLoader(Stream())) == math.inf
    assert length(i for i in ()) == math.inf

    class Unwilling:
        def __len__(self):
            raise NotImplementedError

    assert length(Unwilling()) == math.inf


# What Lightning 2.6.6 gives for _parse_num_batches(stage, length, limit)
@pytest.mark.parametrize(
    ("size", "limit", "expected"),
    [
        (10, 1.0, 10),
        (10, 0.5, 5),
        (10, 0.19, 1),
        (10, 0.0, 0),
        (10, 0, 0),
        (10, 1, 1),
        (10, 3, 3),
        (10, 30, 10),
        (0, 0.5, 0),
        (0, 5, 0),
        (math.inf, 1.0, math.inf),
        (math.inf, 5, 5),
        (math.inf, 0, 0),
    ],
)
def test_num_batches(size, limit, expected):
    assert num_batches(TRAIN, size, limit, "limit_train_batches") == expected


def test_num_batches_takes_a_prefix():
    with pytest.raises(MisconfigurationException, match="of the test loader"):
        num_batches("test", math.inf, 0.5, "limit_test_batches")


@pytest.mark.parametrize("limit", [0.5, 0.0])
def test_fraction_of_unknown_length(limit):
    with pytest.raises(MisconfigurationException, match=f"limit_val_batches={limit}.*val loader.*not known.*int"):
        num_batches(SANITY, math.inf, limit, "limit_val_batches")


@pytest.mark.parametrize("size", [3, 7, 10, 49, 9973])
def test_fraction_of_less_than_one_batch(size):
    with pytest.raises(MisconfigurationException, match="limit_val_batches=1e-05 of the") as error:
        num_batches(VAL, size, 1e-5, "limit_val_batches")
    suggested = float(str(error.value).split()[-1].rstrip("."))
    assert num_batches(VAL, size, suggested, "limit_val_batches") == 1


# ------------------------------------------------------------------ epoch


class Knows:
    def __init__(self, data=range(3)):
        self.data, self.epochs = data, []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __iter__(self):
        return iter(self.data)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return self.data[i]


class KnowingBatchSampler(Knows, BatchSampler):
    def __init__(self, sampler):
        Knows.__init__(self)
        BatchSampler.__init__(self, sampler, 2, False)


def test_set_epoch_tells_each_once():
    data, sampler = Knows(), Knows()
    set_epoch(DataLoader(data, sampler=sampler), 3)
    assert data.epochs == sampler.epochs == [3]
    inner = Knows()
    batches = KnowingBatchSampler(inner)
    set_epoch(DataLoader(range(3), batch_sampler=batches), 4)
    assert batches.epochs == inner.epochs == [4]


def test_set_epoch_of_anything():
    set_epoch(range(3), 1)
    set_epoch(DataLoader(range(3), batch_size=None), 1)
    set_epoch(DataLoader(Stream()), 1)


# ------------------------------------------------------------------ shuffling


class OwnBatches:
    """A batch sampler that has no sampler inside."""

    def __iter__(self):
        return iter([[0, 1], [2]])

    def __len__(self):
        return 2


DATA = torch.arange(6)


@pytest.mark.parametrize(
    ("loader", "expected"),
    [
        (DataLoader(DATA, shuffle=True), True),
        (DataLoader(DATA, shuffle=True, batch_size=None), True),
        (DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 2, False)), True),
        (DataLoader(DATA), False),
        (DataLoader(DATA, sampler=SubsetRandomSampler([1, 2])), False),
        (DataLoader(DATA, batch_sampler=OwnBatches()), False),
        (DataLoader(Stream()), False),
        (range(3), False),
    ],
)
def test_has_shuffle(loader, expected):
    assert has_shuffle(loader) is expected


@pytest.mark.parametrize(
    "loader", [DataLoader(DATA), DataLoader(Stream()), range(3), DataLoader(DATA, sampler=SequentialSampler(DATA))]
)
def test_without_shuffle_leaves_alone_what_is_in_order(loader):
    assert without_shuffle(loader) is loader


class NamedLoader(DataLoader):
    """A subclass with a constructor of its own, which could not be called again with DataLoader's arguments."""

    def __init__(self, name):
        self.name = name
        super().__init__(DATA, batch_size=4, shuffle=True, drop_last=True, collate_fn=self.collate)

    def collate(self, items):
        return self.name, [int(i) for i in items]


def test_without_shuffle_keeps_everything_else():
    loader = NamedLoader("n")
    with pytest.warns(LeydenWarning, match="overfit_batches.*RandomSampler"):
        ordered = without_shuffle(loader)
    assert type(ordered) is NamedLoader
    assert list(ordered) == list(ordered) == [("n", [0, 1, 2, 3])]
    assert (ordered.batch_size, ordered.drop_last, ordered.dataset) == (4, True, loader.dataset)
    assert isinstance(loader.sampler, RandomSampler)  # the user's own is as it was
    assert isinstance(loader.batch_sampler.sampler, RandomSampler)


class DoubleBatches(BatchSampler):
    def __iter__(self):
        for batch in super().__iter__():
            yield batch + batch


@pytest.mark.parametrize(
    ("loader", "expected"),
    [
        (DataLoader(DATA, shuffle=True, batch_size=None), [0, 1, 2, 3, 4, 5]),
        (
            DataLoader(DATA, batch_sampler=DoubleBatches(RandomSampler(DATA), 3, False)),
            [[0, 1, 2, 0, 1, 2], [3, 4, 5, 3, 4, 5]],
        ),
        (DataLoader(DATA, sampler=SubsetRandomSampler([4, 1, 5]), batch_size=2), [[4, 1], [5]]),
        (DataLoader(DATA, sampler=WeightedRandomSampler([1.0] * 6, 6), batch_size=6), [[0, 1, 2, 3, 4, 5]]),
    ],
)
def test_without_shuffle_of_other_samplers(loader, expected):
    with pytest.warns(LeydenWarning, match="in order"):
        ordered = without_shuffle(loader)
    assert [batch.tolist() for batch in ordered] == expected


def test_without_shuffle_with_workers():
    loader = DataLoader(
        DATA, shuffle=True, batch_size=6, num_workers=1, persistent_workers=True, multiprocessing_context="fork"
    )
    list(loader)
    with pytest.warns(LeydenWarning):
        ordered = without_shuffle(loader)
    assert next(iter(ordered)).tolist() == [0, 1, 2, 3, 4, 5]
    assert sorted(next(iter(loader)).tolist()) == [0, 1, 2, 3, 4, 5]
    stop_workers(ordered)
    stop_workers(loader)
    stop_workers(loader)
    stop_workers(range(3))


def test_own_batch_sampler_cannot_be_ordered():
    loader = DataLoader(DATA, batch_sampler=OwnBatches())
    with pytest.warns(LeydenWarning, match="the order of OwnBatches cannot be changed"):
        assert without_shuffle(loader) is loader
