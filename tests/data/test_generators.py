# SPDX-License-Identifier: Apache-2.0
"""Random generators are found where parts of a loader hold them, read, set and seeded, all alike."""

from __future__ import annotations

import functools
import io
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from leyden.data import generators
from leyden.data.generators import Streams, differs, digest, find, plain, raw

KINDS = {
    "torch": lambda: torch.Generator().manual_seed(3),
    "python": lambda: random.Random(3),
    "pcg": lambda: np.random.default_rng(3),
    "legacy": lambda: np.random.RandomState(3),
    "bits": lambda: np.random.SFC64(3),
    "philox": lambda: np.random.Generator(np.random.Philox(3)),
    "mersenne": lambda: np.random.Generator(np.random.MT19937(3)),
}


def draw(generator: Any) -> Any:
    """Draw once from a generator of any kind."""
    if isinstance(generator, torch.Generator):
        return torch.rand(2, generator=generator).tolist()
    if isinstance(generator, np.random.BitGenerator):
        return int(generator.random_raw())
    return float(generator.normal(0, 1)) if hasattr(generator, "normal") else generator.gauss(0, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_is_read_and_set_and_survives_a_safe_file(kind: str) -> None:
    generator = KINDS[kind]()
    draw(generator)
    streams = Streams({"its": generator})
    state = streams.now()
    file = io.BytesIO()
    torch.save(plain(state), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    first = [draw(generator) for _ in range(3)]
    assert differs(state["its"], streams.now()["its"])
    for again in (state, loaded, raw(loaded), plain(raw(loaded))):
        streams.put(again)
        assert not differs(state["its"], streams.now()["its"])
        assert [draw(generator) for _ in range(3)] == first
    for name, value in raw(loaded).items():
        assert not differs(state[name], value)


def test_the_global_generators_are_always_among_them() -> None:
    streams = Streams()
    state = streams.now()
    first = torch.rand(2).tolist(), random.random(), float(np.random.rand())
    streams.put(state)
    assert (torch.rand(2).tolist(), random.random(), float(np.random.rand())) == first
    assert set(state) == {"torch", "python", "numpy"}
    assert streams.of_held() == {}


@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_sets_all(kind: str) -> None:
    generator = KINDS[kind]()
    seen = []
    for _ in range(2):
        generators.seed(digest("a", 5), [generator])
        seen.append((draw(generator), torch.rand(1).item(), random.random(), float(np.random.rand())))
    assert seen[0] == seen[1]
    # the generators do not say the same thing: python's and numpy's have the same algorithm
    assert len({round(float(value), 6) for value in seen[0][1:]}) == 3
    generators.seed(digest("a", 6), [generator])
    assert draw(generator) != seen[0][0]


def test_generators_are_found_some_levels_down_each_once() -> None:
    shared = torch.Generator()

    class Transform:
        def __init__(self) -> None:
            self.rng = np.random.default_rng(0)

        def apply(self, x: Any) -> Any:
            return x

    transform = Transform()
    dataset = SimpleNamespace(
        dataset=SimpleNamespace(transform=SimpleNamespace(transforms=[None, transform])),
        generator=shared,
        also=shared,
        part=functools.partial(max, random.Random(1)),
        bound=Transform().apply,
        table={"x": np.random.RandomState(1)},
        unsafe=random.SystemRandom(),
        everybodys=torch.default_generator,
        rows=[torch.Generator()] * 1000,
        text="text",
    )
    found = find({"dataset": dataset, "sampler": SimpleNamespace(generator=shared)})
    assert set(found) == {
        "dataset.generator",
        "dataset.part.1",
        "dataset.bound.self.rng",
        "dataset.table.x",
        "dataset.dataset.transform.transforms.1.rng",
    }
    assert sum(generator is shared for generator in found.values()) == 1


def test_what_is_apart_is_not_looked_into() -> None:
    inner = SimpleNamespace(rng=random.Random(1))
    assert find({"sampler": SimpleNamespace(data_source=inner)}, apart=inner) == {}
    assert len(find({"sampler": SimpleNamespace(data_source=inner)})) == 1


def test_circles_and_large_things_do_no_harm() -> None:
    one = SimpleNamespace()
    one.other = SimpleNamespace(one=one, tensor=torch.zeros(1000), array=np.zeros(1000))
    one.many = {i: i for i in range(5000)}
    assert find({"x": one}) == {}


def test_a_digest_depends_on_everything_and_nothing_else() -> None:
    assert digest(1, "a", b"x") == digest(1, "a", b"x")
    assert len({digest(1, 2), digest(12), digest(2, 1), digest("1", 2), digest(1, 2, 0)}) == 5
    assert 0 <= digest(3) < 2**63
