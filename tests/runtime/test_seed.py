# SPDX-License-Identifier: Apache-2.0
"""Seeds: the same numbers again, the same workers' streams as Lightning's, and states that survive a safe load."""

from __future__ import annotations

import io
import os
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from leyden.errors import MisconfigurationException
from leyden.runtime.ranks import rank_zero_only
from leyden.runtime.seed import (
    isolate_rng,
    pl_worker_init_function,
    reset_seed,
    rng_state,
    seed_everything,
    seeds_workers,
    set_rng_state,
    worker_seeds,
)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    # set first, so that what the tests leave there is undone
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)


def draw():
    return (random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item())


def test_same_seed_same_numbers():
    assert seed_everything(7) == 7
    first = draw()
    seed_everything(7)
    assert draw() == first
    seed_everything(8)
    assert draw() != first


def test_seed_is_left_in_the_environment():
    seed_everything(7, workers=True)
    assert os.environ["PL_GLOBAL_SEED"] == "7"
    assert os.environ["PL_SEED_WORKERS"] == "1"
    assert seeds_workers()
    seed_everything(7)
    assert os.environ["PL_SEED_WORKERS"] == "0"
    assert not seeds_workers()


def test_none_takes_the_environment(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "123")
    assert seed_everything() == 123


def test_none_is_zero():
    random.seed(0)
    first = seed_everything(verbose=False)
    del os.environ["PL_GLOBAL_SEED"]
    random.seed(0)
    second = seed_everything(verbose=False)
    assert first == second == 0
    assert all(0 <= seed < 2**32 for seed in (first, second))


@pytest.mark.parametrize("seed", [-1, 2**32, "five", 1e30])
def test_bad_seed(seed):
    with pytest.raises(MisconfigurationException, match=r"seed=.*\[0, 4294967295\]"):
        seed_everything(seed)


def test_bad_seed_in_the_environment(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "abc")
    with pytest.raises(MisconfigurationException, match="PL_GLOBAL_SEED='abc' is not an integer"):
        seed_everything()


def test_message(caplog):
    seed_everything(7)
    assert caplog.messages == ["Seed set to 7"]
    caplog.clear()
    seed_everything(7, verbose=False)
    assert caplog.messages == []


def test_reset_seed():
    reset_seed()  # nothing was seeded: nothing happens
    assert "PL_GLOBAL_SEED" not in os.environ
    seed_everything(3, workers=True)
    first = draw()
    reset_seed()
    assert draw() == first
    assert seeds_workers()


def test_state_survives_a_safe_load():
    seed_everything(1)
    random.gauss(0, 1)  # leaves half of a pair behind, in python and numpy
    np.random.randn()
    file = io.BytesIO()
    torch.save(rng_state(), file)
    first = draw()
    file.seek(0)
    set_rng_state(torch.load(file, weights_only=True))
    assert draw() == first


def test_isolate_rng_restores_also_after_an_exception():
    seed_everything(1)
    first = draw()
    seed_everything(1)
    with isolate_rng():
        draw()
    with pytest.raises(ZeroDivisionError), isolate_rng(include_cuda=False):
        draw()
        1 / 0
    assert draw() == first


# recorded with lightning 2.6.6: (base seed, worker, rank) -> torch.initial_seed(), random.random(), np.random.rand()
RECORDED: list[tuple[int, int, int, int, float, float]] = [
    (1, 0, 0, 14153222326736121702, 0.5071899558753042, 0.20425398256428862),
    (42, 3, 0, 5003664254262592271, 0.23724513515350143, 0.634199477618386),
    (123456789, 1, 7, 1783184061550757684, 0.07219196809048123, 0.30814580871021946),
    (4611686018427387921, 5, 1023, 18039859024763694479, 0.6236227125179716, 0.28728728424783767),
]


@pytest.mark.parametrize(("base", "worker", "rank", "torch_seed", "python", "numpy"), RECORDED)
def test_worker_seeds_equal_lightnings(base, worker, rank, torch_seed, python, numpy):
    with isolate_rng():
        torch.manual_seed(base + worker)
        pl_worker_init_function(worker, rank)
        assert torch.initial_seed() == torch_seed
        assert random.random() == python
        assert np.random.rand() == numpy


def test_worker_seeds_default_to_this_rank(monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 3)
    with isolate_rng():
        torch.manual_seed(5)
        pl_worker_init_function(0)
        mine = torch.initial_seed()
    assert mine == worker_seeds(5, 0, 3, count=1)[0]


class Draws(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.tensor([random.random(), np.random.rand(), torch.rand(1).item()], dtype=torch.float64)


def test_workers_draw_differently_from_each_other():
    seed_everything(1, workers=True)
    loader = DataLoader(Draws(), num_workers=2, worker_init_fn=pl_worker_init_function, multiprocessing_context="fork")
    rows = torch.cat(list(loader))
    assert len(torch.unique(rows)) == rows.numel()
