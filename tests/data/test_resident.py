# SPDX-License-Identifier: Apache-2.0
"""Small data on the device of a run: moved once, seen to be changed, given back. A device without memory stands in."""

from __future__ import annotations

import gc
import logging
import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, StackDataset, Subset, TensorDataset

from leyden.data import resident
from leyden.data.feed import Feed
from leyden.data.resident import Changed, Shelf, free_memory, has_room
from leyden.data.whole import Whole

N = 40
META, CPU, CUDA = torch.device("meta"), torch.device("cpu"), torch.device("cuda", 0)


def shelf(free: int | None = 10**9, device: torch.device = META) -> Shelf:
    return Shelf(device, lambda: free)


def rows(*shape: int) -> Tensor:
    return torch.arange(N * int(np.prod(shape)), dtype=torch.float32).reshape(N, *shape)


def feed(loader: Any, on: Shelf | None) -> Feed:
    made = Feed(loader)
    made.whole = Whole(loader, on)
    return made


def places(batches: Any) -> list[str]:
    """Where each batch is."""
    found = []
    for batch in batches:
        tensors = list(batch.values()) if isinstance(batch, dict) else batch if isinstance(batch, list) else [batch]
        (place,) = {tensor.device.type for tensor in tensors}
        found.append(place)
    return found


@pytest.mark.parametrize(
    "data",
    [
        lambda: rows(3),
        lambda: TensorDataset(rows(3), rows()),
        lambda: Subset(TensorDataset(rows(3), rows()), list(range(0, N, 2))),
        lambda: StackDataset(x=rows(3), y=Subset(TensorDataset(rows()).tensors[0], range(N))),
    ],
)
def test_batches_begin_on_the_device_from_the_second_on(data: Any) -> None:
    made = feed(DataLoader(data(), 5, shuffle=True), shelf())
    first, *rest = places(made)
    assert first == "cpu"
    assert set(rest) == {"meta"}
    assert set(places(made)) == {"meta"}


def test_batches_from_the_device_are_those_of_the_loader() -> None:
    loader = DataLoader(TensorDataset(rows(3), rows().long()), 7, shuffle=True)
    torch.manual_seed(1)
    wanted = [*loader, *loader]
    torch.manual_seed(1)
    made = feed(loader, shelf(device=CPU))
    got = [*made, *made]
    assert all(
        torch.equal(a, b) for one, other in zip(got, wanted, strict=True) for a, b in zip(one, other, strict=True)
    )
    assert all(
        a.stride() == b.stride()
        for one, other in zip(got, wanted, strict=True)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(
    "data",
    [
        lambda: rows(3).numpy(),  # nobody could say that it was changed
        lambda: TensorDataset(rows(3).t().contiguous().t()),
        lambda: TensorDataset(rows(1).expand(N, 3)),
        lambda: list(rows(3)),
    ],
)
def test_other_data_stays_on_the_host(data: Any) -> None:
    assert set(places(feed(DataLoader(data(), 5), shelf()))) == {"cpu"}


def test_the_same_tensor_is_moved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []

    class Counted(resident.Copy):
        def __init__(self, source: Tensor, device: torch.device) -> None:
            moved.append(source)
            super().__init__(source, device)

    monkeypatch.setattr(resident, "Copy", Counted)
    data, on = TensorDataset(rows(3), rows()), shelf()
    train, val = Subset(data, range(30)), Subset(data, range(30, N))
    for some in (train, val, train, StackDataset(data.tensors[0], data.tensors[0])):
        list(feed(DataLoader(some, 5), on))
    assert len(moved) == 2


@pytest.mark.parametrize("way", ["torch", "data", "numpy", "tensor"])
def test_changes_between_epochs_are_seen(way: str) -> None:
    array = np.ones((N, 3), dtype=np.float32)
    data = TensorDataset(torch.from_numpy(array))
    on = shelf(device=CPU)
    made = feed(DataLoader(data, 8), on)
    list(made)
    assert on.take(data.tensors) is not None
    if way == "torch":
        data.tensors[0].mul_(5)
    elif way == "data":
        data.tensors[0].data.mul_(5)
    elif way == "numpy":
        array *= 5
    else:
        data.tensors = (torch.full((N, 3), 5.0),)
    assert all(bool((batch == 5).all()) for (batch,) in made)


def test_a_change_in_the_middle_of_an_epoch_is_seen() -> None:
    data = TensorDataset(rows(3))
    made = feed(DataLoader(data, 8), shelf(device=CPU))
    for number, (batch,) in enumerate(made):
        if number >= 3:
            assert bool((batch == -1).all())
        if number == 2:
            data.tensors[0].fill_(-1)


def test_a_change_that_one_loader_finds_holds_for_others_in_the_middle() -> None:
    data, on = TensorDataset(rows(3)), shelf(device=CPU)
    train = iter(feed(DataLoader(data, 8), on))
    next(train), next(train)
    data.tensors[0].data.fill_(-1)  # torch counts no change
    validation = [batch for (batch,) in feed(DataLoader(data, 20), on)]
    assert all(bool((batch == -1).all()) for batch in validation)
    assert all(bool((batch == -1).all()) for (batch,) in train)


def test_too_large_is_said_once_and_read_on_the_host(caplog: pytest.LogCaptureFixture) -> None:
    on = shelf(free=N * 3 * 4 * 10 - 1)
    with caplog.at_level(logging.INFO, logger="leyden"):
        for _ in range(2):
            assert set(places(feed(DataLoader(TensorDataset(rows(3)), 5), on))) == {"cpu"}
    (record,) = caplog.records
    assert "more than 10% of the memory that is free on meta" in record.message
    assert places(feed(DataLoader(TensorDataset(rows(2)), 5), on))[-1] == "meta"


def test_no_memory_after_all_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(source: Tensor, device: torch.device) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(resident, "Copy", fail)
    on = shelf()
    with caplog.at_level(logging.INFO, logger="leyden"):
        for _ in range(2):
            assert set(places(feed(DataLoader(TensorDataset(rows(3)), 5), on))) == {"cpu"}
    (record,) = caplog.records
    assert "found no memory on meta" in record.message


def test_what_lies_there_counts() -> None:
    assert has_room(100, 0, 1000)
    assert not has_room(101, 0, 1000)
    assert has_room(50, 50, 950)
    assert not has_room(51, 50, 950)


def test_a_device_of_which_nothing_is_known_takes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert free_memory(torch.device("mps")) is None
    assert set(places(feed(DataLoader(TensorDataset(rows(3)), 5), shelf(free=None)))) == {"cpu"}
    assert not caplog.records


def test_free_memory_counts_what_torch_keeps_in_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    assert free_memory(CUDA) == 1200


def test_data_that_is_replaced_in_each_epoch_stays_nowhere() -> None:
    data = TensorDataset(rows(3))
    on = shelf()
    made = feed(DataLoader(data, 10), on)
    for _ in range(4):
        former = weakref.ref(data.tensors[0])
        data.tensors = (rows(3) + 1,)
        gc.collect()
        assert former() is None
        assert "meta" in places(made)
        assert len(on._copies) == 1


def test_memory_is_given_back_at_once() -> None:
    gc.disable()
    try:
        data, on = TensorDataset(rows(3)), shelf(device=CPU)
        iterator = iter(feed(DataLoader(data, 5), on))
        next(iterator), next(iterator)
        (copy,) = on.take(data.tensors) or ()
        assert copy.there is not None
        gone = weakref.ref(copy.there)
        on.release()
        assert gone() is None
        assert len(list(iterator)) == 6  # in the standard way
        with pytest.raises(Changed):
            copy.rows(torch.tensor([0]))
    finally:
        gc.enable()


def test_copies_are_no_inference_tensors() -> None:
    data, on = TensorDataset(rows(3)), shelf(device=CPU)
    with torch.inference_mode():
        list(feed(DataLoader(data, 5), on))
        (copy,) = on.take(data.tensors) or ()
    assert copy.there is not None
    assert not copy.there.is_inference()


@pytest.mark.parametrize("shape", [(), (1,), (784,), (3, 8, 8), (0,)])
def test_a_change_of_everything_is_noticed_whatever_the_shape(shape: tuple[int, ...]) -> None:
    data = torch.zeros(3 * resident.PROBES // max(math.prod(shape), 1), *shape)
    copy = resident.Copy(data, CPU)
    assert not copy.stale()
    data.data[:, ...] = 1
    assert copy.stale() is bool(data.numel())


def test_probes_do_not_all_lie_in_one_corner() -> None:
    data = torch.zeros(resident.PROBES // 8, 28, 28)
    copy = resident.Copy(data, CPU)
    data.data[:, 10:18, 10:18] = 1  # pictures with an empty rim
    assert copy.stale()
