# SPDX-License-Identifier: Apache-2.0
"""Batches read as a whole are those of the DataLoader, to the last bit; what cannot be read so is left to torch."""

from __future__ import annotations

import copy
import gc
import logging
import random
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    RandomSampler,
    StackDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)
from torch.utils.data._utils import collate as torchs_collate

from leyden.data import whole
from leyden.data.feed import Feed
from leyden.data.whole import Source, Whole, same, to_index_of

N = 23
"""Samples in each data set; odd, so that the last batch is ragged."""


def alike(one: Any, other: Any) -> bool:
    """Whether two batches are equal in all that can be seen of them."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(alike(a, b) for a, b in zip(one, other, strict=True))
    if not isinstance(one, Tensor):
        return bool(one == other)
    if one.is_quantized:
        return other.is_quantized and alike(one.int_repr(), other.int_repr())
    if one.layout is not torch.strided:
        return one.layout == other.layout and alike(one.to_dense(), other.to_dense())
    names = ("dtype", "shape", "device", "requires_grad", "is_leaf", "layout")
    values = [(getattr(one, name), getattr(other, name)) for name in names]
    values += [(one.stride(), other.stride()), (one.is_inference(), other.is_inference())]
    values += [(one.storage_offset(), other.storage_offset()), (one.is_contiguous(), other.is_contiguous())]
    exact = np.array_equal(one.detach().flatten().view(torch.uint8), other.detach().flatten().view(torch.uint8))
    return exact and all(a == b for a, b in values)


def seed_all() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)


def feed(loader: Any, seeding: str = "batch") -> Feed:
    made = Feed(loader, seeding)
    made.key = ("train", 0, 0, 0)
    made.whole = Whole(loader)
    return made


def run(loader: Any, passes: int = 2) -> tuple[list[Any], list[Any]]:
    """Return all batches of some passes, and what the generators say after them."""
    found: list[Any] = []
    for _ in range(passes):
        for batch in loader:
            found.append(batch)
            torch.rand(1)  # what a step draws
    return found, [torch.rand(1).item(), random.random(), float(np.random.rand())]


def compare(make: Callable[[], Any], passes: int = 2, seeding: str = "batch") -> int:
    """Check that a loader gives, by way of a feed, what it gives in a loop by hand; return the number of batches."""
    seed_all()
    wanted, end = run(make(), passes)
    seed_all()
    got, end_got = run(feed(make(), seeding), passes)
    assert len(got) == len(wanted)
    assert all(alike(a, b) for a, b in zip(got, wanted, strict=True))
    assert end == end_got
    return len(wanted)


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(N * int(np.prod(shape)), dtype=torch.float32).reshape(N, *shape).to(dtype)


def with_nan() -> Tensor:
    data = rows(3)
    data[::2, 1] = float("nan")
    return data


DATA: dict[str, Callable[[], Any]] = {
    "a tensor": lambda: rows(4),
    "one number each": lambda: rows(dtype=torch.int64),
    "nothing each": lambda: rows(0),
    "bool": lambda: rows(2) > 9,
    "half": lambda: rows(2, dtype=torch.bfloat16),
    "float8": lambda: rows(2, dtype=torch.float8_e4m3fn),
    "complex": lambda: rows(2, dtype=torch.complex64),
    "not a number": with_nan,
    "images": lambda: TensorDataset(rows(3, 4, 5), rows(dtype=torch.int64)),
    "channels last": lambda: TensorDataset(rows(3, 4, 5).contiguous(memory_format=torch.channels_last)),
    "permuted": lambda: TensorDataset(rows(4, 5, 3).permute(0, 3, 1, 2), rows(2)),
    "columns": lambda: TensorDataset(rows(7)[:, 2:5], rows(4).t().contiguous().t()),
    "every other": lambda: torch.arange(2 * N).reshape(2 * N, 1)[::2],
    "expanded": lambda: TensorDataset(torch.ones(1, 3).expand(N, 3)),
    "videos": lambda: TensorDataset(rows(2, 3, 4, 5)),
    "one tensor": lambda: TensorDataset(rows(3)),
    "three tensors": lambda: TensorDataset(rows(3), rows(1, dtype=torch.float64), rows(dtype=torch.int32)),
    "an array": lambda: rows(3).numpy(),
    "an array of numbers": lambda: rows().numpy(),
    "float16 numbers": lambda: rows().numpy().astype("f2"),
    "int32 numbers": lambda: rows().numpy().astype("i4"),
    "bools": lambda: rows().numpy() > 5,
    "stacked": lambda: StackDataset(rows(3), rows(2).numpy()),
    "stacked with names": lambda: StackDataset(image=rows(3), label=TensorDataset(rows(), rows(2))),
    "stacked twice": lambda: StackDataset(StackDataset(a=rows(2), b=rows()), Subset(rows(3), range(N))),
    "a subset": lambda: Subset(TensorDataset(rows(3), rows()), [5, 1, 1, 8, 22, 0, 3]),
    "a range": lambda: Subset(TensorDataset(rows(3), rows()), range(3, 14)),
    "a subset by a tensor": lambda: Subset(TensorDataset(rows(3)), torch.tensor([4, 2, 9, 1, 0])),
    "a subset by an array": lambda: Subset(TensorDataset(rows(3)), np.array([4, 2, 9, 1, 0, 6])),
    "a subset of a subset": lambda: Subset(Subset(rows(3), range(20, 0, -1)), [3, 0, 7, 7, 19]),
    "a split": lambda: random_split(TensorDataset(rows(3), rows()), [13, 10], torch.Generator().manual_seed(0))[0],
    "a concatenation": lambda: ConcatDataset([rows(3), -rows(3), Subset(rows(3), [4])]),
    "a concatenation of pairs": lambda: ConcatDataset([TensorDataset(rows(3), rows())] * 2),
    "a concatenation of names": lambda: ConcatDataset(
        [StackDataset(a=rows(2), b=rows()), StackDataset(a=-rows(2), b=rows())]
    ),
    "a subset of a concatenation": lambda: Subset(ConcatDataset([rows(), rows() + N]), [30, 2, 45, 22, 23, 0, 44]),
    "a subset of a stack": lambda: Subset(StackDataset(x=rows(3)), list(range(1, 20, 3))),
}
"""What is read as a whole."""


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("kind", DATA)
def test_data_in_memory_is_read_as_a_whole(kind: str, shuffle: bool, fetched: list[Any]) -> None:
    seed_all()
    count = len(list(feed(DataLoader(DATA[kind](), batch_size=4, shuffle=shuffle))))
    assert len(fetched) == 1 < count  # the first, to compare with
    compare(lambda: DataLoader(DATA[kind](), batch_size=4, shuffle=shuffle))


class Own:
    """A batch sampler that draws each time."""

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(6):
            yield torch.randint(N, (3,)).tolist()

    def __len__(self) -> int:
        return 6


LOADERS: dict[str, Callable[[Any], Any]] = {
    "in order": lambda data: DataLoader(data, 4),
    "drop last": lambda data: DataLoader(data, 4, shuffle=True, drop_last=True),
    "one at a time": lambda data: DataLoader(data),
    "all at once": lambda data: DataLoader(data, 100, shuffle=True),
    "generator": lambda data: DataLoader(data, 4, shuffle=True, generator=torch.Generator().manual_seed(4)),
    "weighted": lambda data: DataLoader(data, 4, sampler=WeightedRandomSampler(torch.rand(N).tolist(), 30)),
    "replacement": lambda data: DataLoader(data, 4, sampler=RandomSampler(data, True, 70)),
    "some": lambda data: DataLoader(data, 4, sampler=SubsetRandomSampler([1, 5, 6, 9, 20, 3])),
    "numpy's numbers": lambda data: DataLoader(data, 4, sampler=np.random.permutation(N)),
    "a list": lambda data: DataLoader(data, 4, sampler=[3, 2, 1, 0, 5]),
    "batch sampler": lambda data: DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 5, True)),
    "tensors": lambda data: DataLoader(data, 4, sampler=list(torch.randperm(N))),
    "a mask now and then": lambda data: DataLoader(
        data,
        batch_sampler=[
            [0],
            [torch.tensor(1)],
            [torch.tensor(True)],
            [torch.tensor([3])],
            [2],
            [torch.tensor(4).byte()],
        ],
    ),
    "batches that are drawn": lambda data: DataLoader(data, batch_sampler=Own()),
}


@pytest.mark.parametrize("seeding", ["batch", "torch", "sample"])
@pytest.mark.parametrize("kind", LOADERS)
def test_the_order_is_that_of_any_sampler(kind: str, seeding: str) -> None:
    compare(lambda: LOADERS[kind](TensorDataset(rows(3), rows(dtype=torch.int64))), seeding=seeding)


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("done", [0, 1, 3])
def test_a_pass_goes_on_in_its_middle(kind: str, done: int) -> None:
    def make() -> Feed:
        seed_all()
        return feed(LOADERS[kind](TensorDataset(rows(3), rows())))

    first = make()
    iterator = iter(first)
    before = [next(iterator, None) for _ in range(done)]
    if None in before:
        return  # fewer batches than that
    assert first.run is not None
    state = copy.deepcopy(first.run)
    live = torch.get_rng_state()
    rest = list(iterator)
    second = make()
    torch.rand(5)
    second.resume = (state, done)
    resumed = iter(second)
    torch.set_rng_state(live)
    got = list(resumed)
    assert len(got) == len(rest)
    assert all(alike(a, b) for a, b in zip(got, rest, strict=True))


# ---------------------------------------------------------------------------------------------- left to torch


class Doubled(TensorDataset):
    def __getitem__(self, index: Any) -> Any:
        return tuple(2 * part for part in super().__getitem__(index))


class Marked(Tensor):
    pass


class Disagrees(Dataset):
    """Its ``__getitems__`` gives other samples than its ``__getitem__``; torch takes the former."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(float(index))

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        return [torch.tensor(-float(index)) for index in indices]


class Iterates(DataLoader):
    def __iter__(self) -> Any:
        return iter([next(super().__iter__())])


class Sequence:
    """Indices of a class of somebody's own."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> int:
        return 2 * range(7)[index]


class Odd:
    """A sampler of batches that are no lists."""

    def __init__(self, make: Callable[[list[int]], Any]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[Any]:
        yield from (self.make([1, 2, 3]), self.make([7, 6]))


def patched() -> TensorDataset:
    data = TensorDataset(rows(2))
    data.__getitems__ = lambda indices: [(-data.tensors[0][i],) for i in indices]
    return data


def with_grad() -> Tensor:
    return rows(3).requires_grad_()


LEFT: dict[str, Callable[[], Any]] = {
    "a list": lambda: DataLoader(list(range(N)), 4),
    "a subclass": lambda: DataLoader(Doubled(rows(2)), 4, shuffle=True),
    "a subset of a subclass": lambda: DataLoader(Subset(Doubled(rows(2)), range(9)), 4),
    "a patched object": lambda: DataLoader(patched(), 4),
    "a tensor of a subclass": lambda: DataLoader(TensorDataset(rows(2).as_subclass(Marked)), 4),
    "a parameter": lambda: DataLoader(TensorDataset(nn.Parameter(rows(2))), 4),
    "with gradients": lambda: DataLoader(TensorDataset(with_grad()), 4),
    "conjugate": lambda: DataLoader(TensorDataset(torch.conj(rows(2, dtype=torch.complex64))), 4),
    "channels_last_3d": lambda: DataLoader(rows(4, 5, 6, 3).permute(0, 4, 1, 2, 3), 4),
    "quantized": lambda: DataLoader(torch.quantize_per_tensor(rows(2), 1.0, 0, torch.quint8), 4),
    "a memmap": lambda: DataLoader(np.asarray(rows(2).numpy()).view(np.memmap), 4),
    "another class of arrays": lambda: DataLoader(rows(2).numpy().view(np.recarray), 4),
    "collate": lambda: DataLoader(TensorDataset(rows(2), rows()), 4, collate_fn=lambda samples: samples),
    "no batches": lambda: DataLoader(TensorDataset(rows(2)), batch_size=None),
    "a concatenation of types": lambda: DataLoader(ConcatDataset([rows(2), rows(2).double()]), 46),
    "a concatenation with a list": lambda: DataLoader(ConcatDataset([rows(2), list(rows(2))]), 4),
    "getitems": lambda: DataLoader(Disagrees(), 4, shuffle=True),
    "a subset of that": lambda: DataLoader(Subset(Disagrees(), [4, 2, 1, 7, 9]), 2),
    "a loader of its own": lambda: Iterates(TensorDataset(rows(2)), 4, shuffle=True),
    "indices of a class of its own": lambda: DataLoader(Subset(TensorDataset(rows(2)), Sequence()), 3),
    "indices that are a mask": lambda: DataLoader(Subset(rows(2), torch.ones(5, dtype=torch.uint8)), 3),
    "tuples": lambda: DataLoader(rows(2), batch_sampler=Odd(tuple)),
    "tensors": lambda: DataLoader(rows(2), batch_sampler=Odd(torch.tensor)),
    "bools": lambda: DataLoader(rows(2), batch_sampler=Odd(lambda indices: [True] * len(indices))),
    "slices": lambda: DataLoader(rows(2), batch_sampler=Odd(lambda indices: [slice(i, i + 2) for i in indices])),
    "negative": lambda: DataLoader(rows(2), batch_sampler=Odd(lambda indices: [-i for i in indices])),
    "names as indices": lambda: DataLoader({"a": rows(2), "b": rows(2)}, batch_sampler=[["a"], ["b", "a"]]),
}


@pytest.mark.parametrize("kind", LEFT)
@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8", "ignore:torch.quantize_per_tensor")
def test_what_cannot_be_read_so_is_left_to_torch(kind: str, fetched: list[Any]) -> None:
    seed_all()
    loader = LEFT[kind]()
    count = len(list(feed(loader)))
    assert len(fetched) == count > 0
    compare(LEFT[kind])


def test_a_collate_fn_that_is_in_the_way_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []

    def collate(samples: list[Any]) -> Any:
        calls.append(len(samples))  # what it does besides is done as often as ever
        return torch.utils.data.default_collate(samples)

    loader = feed(DataLoader(TensorDataset(rows(2)), 10, collate_fn=collate))
    with caplog.at_level("INFO"):
        for _ in range(2):
            list(loader)
    assert calls == [10, 10, 3] * 2
    assert sum("for its collate_fn" in message for message in caplog.messages) == 1


def test_arrays_that_torch_warns_of_are_left_to_it(fetched: list[Any]) -> None:
    data = rows(3).numpy()
    data.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # once in a process, so that it cannot be waited for here
        assert len(list(feed(DataLoader(data, 4)))) == 6
    assert len(fetched) == 6


@pytest.mark.parametrize(
    "data",
    [
        np.array([object()] * 4),
        np.array(["a", "b", "c", "d"], dtype=object),
        rows(2).numpy().astype(">f4"),
        torch.eye(4).to_sparse(),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        TensorDataset(torch.eye(4).to_sparse()),
    ],
)
def test_errors_are_torchs(data: Any) -> None:
    errors = []
    for loader in (DataLoader(data, 2), feed(DataLoader(data, 2))):
        try:
            list(loader)
            errors.append(None)
        except Exception as error:
            errors.append((type(error), str(error)))
    assert errors[0] == errors[1]
    assert Source(data).read is None


@pytest.mark.parametrize("indices", [[[0, 1], [2, 23], [3]], [[0, 1], [2, -24]], [[0], ["a"]], [[0], [1.5]], [[0], []]])
@pytest.mark.parametrize("kind", ["a tensor", "images", "stacked with names", "a range"])
def test_an_index_that_is_none_is_the_same_error(kind: str, indices: list[list[int]]) -> None:
    errors = []
    for wrap in (lambda loader: loader, feed):
        iterator = iter(wrap(DataLoader(DATA[kind](), batch_sampler=indices)))
        next(iterator)
        with pytest.raises((IndexError, TypeError)) as caught:
            next(iterator)
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


def test_a_collate_map_of_ones_own_is_left_to_torch(monkeypatch: pytest.MonkeyPatch, fetched: list[Any]) -> None:
    def stack(batch: list[Tensor], *, collate_fn_map: Any = None) -> Tensor:
        return -torch.stack(batch)

    monkeypatch.setitem(torchs_collate.default_collate_fn_map, Tensor, stack)
    assert compare(lambda: DataLoader(TensorDataset(rows(3)), 4)) * 2 == len(fetched)


def test_a_class_of_torch_that_was_patched_is_left_to_it(monkeypatch: pytest.MonkeyPatch, fetched: list[Any]) -> None:
    monkeypatch.setattr(TensorDataset, "__getitem__", lambda self, index: (self.tensors[0][index] + 1,))
    assert compare(lambda: DataLoader(TensorDataset(rows(3)), 4)) * 2 == len(fetched)


def test_workers_are_left_to_torch(fetched: list[Any]) -> None:
    loader = DataLoader(TensorDataset(rows(3)), 4, num_workers=2)
    assert Whole(loader).plan() is None


def test_a_subclass_of_the_loader_that_iterates_as_torch_does_is_read_as_a_whole(fetched: list[Any]) -> None:
    class Named(DataLoader):
        name = "mine"

    assert len(list(feed(Named(TensorDataset(rows(3)), 4)))) == 6
    assert len(fetched) == 1


def test_batches_from_all_over_many_parts_are_read_sample_by_sample(fetched: list[Any]) -> None:
    """One file after the other is read at once; where each sample lies in another one, torch's way is the quicker."""

    def parts() -> Any:
        return ConcatDataset([rows(3) + part for part in range(9)])

    for make in (lambda: DataLoader(parts(), 8), lambda: DataLoader(parts(), 8, sampler=range(0, 9 * N, N - 1))):
        compare(make)
    fetched.clear()
    seed_all()
    assert len(list(feed(DataLoader(parts(), 8)))) == 26
    assert len(fetched) == 1
    fetched.clear()
    assert len(list(feed(DataLoader(parts(), 8, shuffle=True)))) == 26
    assert len(fetched) > 20


# ---------------------------------------------------------------------------------------------- changes


def test_changes_of_the_data_are_seen_at_once() -> None:
    def by(wrap: Callable[[Any], Any]) -> list[Any]:
        seed_all()
        x, labels = rows(3), rows().numpy()
        data = StackDataset(x=TensorDataset(x), y=labels)
        some = Subset(data, list(range(20)))
        found = []
        for epoch, loader in enumerate([wrap(DataLoader(some, 4, shuffle=True))] * 7):
            for number, batch in enumerate(loader):
                found.append(batch)
                x.add_(1)
                labels += 1
                if number == 1:
                    some.indices[0] = 21
                    if epoch == 1:
                        data.datasets["x"].tensors = (x[:, :2],)
                    if epoch == 2:
                        data.datasets["x"] = x
                    if epoch == 3:
                        data.datasets["z"] = data.datasets.pop("x")
                    if epoch == 4:
                        data.datasets = (x, labels)
                    if epoch == 5:
                        some.dataset = x
        return found

    assert all(alike(a, b) for a, b in zip(by(lambda loader: loader), by(feed), strict=True))


def test_data_that_becomes_something_else_is_left_to_torch() -> None:
    def by(wrap: Callable[[Any], Any]) -> list[Any]:
        data = TensorDataset(rows(3))
        loader = wrap(DataLoader(data, 4))
        found = list(loader)
        data.tensors = (with_grad(),)
        found += list(loader)
        data.tensors = (rows(4, 5, 6, 3).permute(0, 4, 1, 2, 3),)
        found += list(loader)
        data.tensors = (rows(5, dtype=torch.int16),)
        return [*found, *loader]

    assert all(alike(a, b) for a, b in zip(by(lambda loader: loader), by(feed), strict=True))


def test_a_first_batch_that_is_another_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fetched: list[Any]
) -> None:
    monkeypatch.setattr("leyden.data.whole.to_index", lambda indices: torch.tensor(indices).flip(0))
    with caplog.at_level(logging.INFO, logger="leyden"):
        count = compare(lambda: DataLoader(TensorDataset(rows(3)), 4, shuffle=True))
    assert len(fetched) == 2 * count
    (record,) = [record for record in caplog.records if "sample by sample" in record.message]
    assert "TensorDataset" in record.message
    assert "\n" not in record.message


def test_of_a_large_batch_only_the_first_samples_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    monkeypatch.setattr(whole, "to_index", lambda indices: (read.append(len(indices)), torch.tensor(indices))[1])
    data = TensorDataset(torch.rand(900, 3), torch.rand(900))
    compare(lambda: DataLoader(data, 300, shuffle=True), passes=1)
    assert read == [whole.COMPARED, 300, 300]


def test_batches_are_compared_once_only(fetched: list[Any]) -> None:
    made = feed(DataLoader(TensorDataset(rows(3)), 4))
    for _ in range(3):
        list(made)
    assert len(fetched) == 1


def test_nothing_is_kept_of_a_pass() -> None:
    gc.disable()
    try:
        data = TensorDataset(rows(3))
        made = feed(DataLoader(data, 4))
        gone = weakref.ref(data.tensors[0])
        for _ in made:
            pass
        made.release()
        data.tensors = (rows(1),)
        assert gone() is None
        iterator = iter(made)
        next(iterator)
        next(iterator)
        gone = weakref.ref(data.tensors[0])
        data.tensors = (rows(2),)
        del iterator
        assert gone() is None
    finally:
        gc.enable()


def test_inference_tensors_are_made_where_torch_makes_them() -> None:
    loader = DataLoader(TensorDataset(rows(3)), 4)
    with torch.inference_mode():
        inside = list(feed(loader))
    assert all(batch[0].is_inference() for batch in inside)
    assert not any(batch[0].is_inference() for batch in feed(loader))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([torch.ones(2)], (torch.ones(2),)),
        (torch.ones(2), torch.ones(2).double()),
        (torch.ones(2), torch.ones(3)),
        (torch.ones(2, 3), torch.ones(3, 2).t()),
        (torch.zeros(2), -torch.zeros(2)),
        (torch.ones(2), torch.ones(2, requires_grad=True)),
        ({"a": torch.ones(1), "b": torch.ones(1)}, {"b": torch.ones(1), "a": torch.ones(1)}),
        ([torch.ones(1)], [torch.ones(1), torch.ones(1)]),
        ("a", "a"),
    ],
)
def test_batches_that_differ_are_told_apart(one: Any, other: Any) -> None:
    assert not same(one, other)


def test_indices_for_a_device_are_checked_before_they_go_there() -> None:
    cpu = torch.device("cpu")
    assert to_index_of(cpu, [2, 0], 3).tolist() == [2, 0]
    for indices in ([0, 3], [-1], [5]):
        with pytest.raises(IndexError):
            to_index_of(cpu, indices, 3)


@pytest.mark.parametrize("number", range(60))
def test_random_shapes_and_strides(number: int) -> None:
    draw = random.Random(number)
    shape = [draw.choice([1, 2, 5]), *(draw.choice([0, 1, 1, 2, 3]) for _ in range(draw.randrange(5)))]
    order = list(range(1, len(shape)))
    draw.shuffle(order)
    data = torch.rand([size + draw.randrange(2) for size in shape]).permute(0, *order)
    data = data[tuple(slice(draw.randrange(2), None, draw.choice([1, 1, 2])) for _ in shape)]
    size = draw.choice([1, 2])
    if len(data):
        compare(lambda: DataLoader(data, size, sampler=[0, len(data) - 1, 0]))
