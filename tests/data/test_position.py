# SPDX-License-Identifier: Apache-2.0
"""The loaders of a stage, drawn from together, go on from a place that went through a safe file."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from leyden.data.combined import CombinedLoader
from leyden.data.position import Supply
from leyden.errors import CheckpointError


def supply(mode: str = "max_size_cycle", single: bool = False) -> Supply:
    torch.manual_seed(2)
    loaders = [DataLoader(list(range(size)), batch_size=2, shuffle=True) for size in (9, 4, 5)]
    made = Supply(CombinedLoader(loaders[0] if single else loaders, mode))
    made.start_epoch("train", 0)
    return made


def draw(iterator: Any, count: int = 100) -> list[Any]:
    found = []
    for _ in range(count):
        batch = next(iterator, None)
        if batch is None:
            break
        batches = batch[0] if isinstance(batch, tuple) else [batch]
        found.append([None if part is None else part.tolist() for part in batches])
    return found


def safe(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
@pytest.mark.parametrize("done", [0, 1, 2, 3, 4, 5])
def test_several_loaders_go_on_at_a_place(mode: str, done: int) -> None:
    whole = supply(mode)
    iterator = whole.iterate()
    draw(iterator, done)
    state, live = safe(whole.state_dict(whole.place(done))), torch.get_rng_state()
    rest = draw(iterator)
    again = supply(mode)
    torch.manual_seed(77)
    place = again.load_state_dict(state, "training")
    assert place is not None
    iterator = again.iterate(place)
    torch.set_rng_state(live)
    assert draw(iterator) == rest


def test_a_single_loader_is_its_own_iterator() -> None:
    made = supply(single=True)
    assert type(made.iterate()) is type(iter(made.feeds[0].loader))
    assert made.place(3).done == [3]


def test_between_two_epochs_there_is_no_place() -> None:
    made = supply(single=True)
    draw(made.iterate())
    state = safe(made.state_dict(None))
    assert supply(single=True).load_state_dict(state, "training") is None


def test_other_loaders_are_an_error() -> None:
    made = supply()
    made.iterate()
    with pytest.raises(CheckpointError, match="stands in 3 training loaders, but there are 1 now"):
        supply(single=True).load_state_dict(made.state_dict(None), "training")
