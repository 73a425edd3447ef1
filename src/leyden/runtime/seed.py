# SPDX-License-Identifier: Apache-2.0
"""Seed, save and restore every random number generator that a run may draw from: python, numpy, torch, each device."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from leyden.errors import MisconfigurationException
from leyden.runtime.ranks import rank_zero_info, rank_zero_only

MAX_SEED = 2**32 - 1
"""The largest seed that all generators take; numpy's is the limit."""

_SEED = "PL_GLOBAL_SEED"
_WORKERS = "PL_SEED_WORKERS"
_MASK = 2**64 - 1


def seed_everything(seed: int | None = None, workers: bool = False, verbose: bool = True) -> int:
    """Seed python's, numpy's and torch's global generators, on every device, and return the seed.

    ``seed`` None takes ``PL_GLOBAL_SEED`` from the environment, or else is 0. ``workers=True`` asks the Trainer
    to seed the workers of its data loaders by :func:`pl_worker_init_function`. Both are left in the environment
    (``PL_GLOBAL_SEED``, ``PL_SEED_WORKERS``), so that processes which this one starts follow.

    Raises MisconfigurationException (a ValueError) if the seed is not an integer in [0, 2**32 - 1].
    """
    if seed is None:
        given = os.environ.get(_SEED)
        seed, source = (0, "default") if given is None else (_as_seed(given, _SEED), "environment")
    else:
        seed, source = _as_seed(seed, "seed"), "argument"
    if verbose:
        rank_zero_info("Seed set to %d%s", seed, " (none was given)" if source == "default" else "")
    os.environ[_SEED] = str(seed)
    os.environ[_WORKERS] = str(int(workers))
    random.seed(seed)
    if (numpy := _numpy()) is not None:
        numpy.random.seed(seed)
    torch.manual_seed(seed)  # all devices with it
    return seed


def reset_seed() -> None:
    """Seed everything again with what :func:`seed_everything` was last given; nothing if it never was."""
    seed = os.environ.get(_SEED)
    if seed is not None:
        seed_everything(_as_seed(seed, _SEED), workers=seeds_workers(), verbose=False)


def seeds_workers() -> bool:
    """Return whether ``seed_everything(..., workers=True)`` was called, here or in a parent process."""
    return os.environ.get(_WORKERS, "0").strip() not in ("", "0")


def _as_seed(value: object, name: str) -> int:
    try:
        seed = int(value)  # type: ignore[call-overload]  # the except says what is wrong with other types
    except (TypeError, ValueError):
        raise MisconfigurationException(f"{name}={value!r} is not an integer. Give one in [0, {MAX_SEED}].") from None
    if not 0 <= seed <= MAX_SEED:
        raise MisconfigurationException(f"{name}={seed} is out of bounds. Give an integer in [0, {MAX_SEED}].")
    return int(seed)


def _numpy() -> ModuleType | None:
    """Import numpy, where it is installed."""
    try:
        import numpy  # noqa: PLC0415  # not needed until something is seeded
    except ImportError:
        return None
    return numpy


def pl_worker_init_function(worker_id: int, rank: int | None = None) -> None:
    """Give a data loader's worker its own streams of random numbers; use as ``worker_init_fn``.

    ``rank`` is the global rank, None for this process's. Every (base seed, worker, rank) leads to other streams, and
    to the same as in Lightning 2.6.
    """
    rank = rank_zero_only.rank if rank is None else rank
    # torch has seeded the worker with the epoch's base seed plus its index
    base_seed = torch.initial_seed() - worker_id
    first, second, third = worker_seeds(base_seed, worker_id, rank, count=3)
    torch.manual_seed(first)
    random.seed(second << 32 | third)
    if (numpy := _numpy()) is not None:
        numpy.random.seed(numpy.random.SeedSequence([base_seed, worker_id, rank]).generate_state(4))


def worker_seeds(base_seed: int, worker_id: int, rank: int, count: int) -> list[int]:
    """Return ``count`` seeds of 64 bits for a worker: MurmurHash3's finalizer, then Knuth's MMIX generator."""
    state = base_seed << 32 | worker_id << 16 | rank
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        state ^= state >> 33
        state = state * factor & _MASK
    state ^= state >> 33
    seeds = []
    for _ in range(count):
        state = (state * 6364136223846793005 + 1) & _MASK
        seeds.append(state)
    return seeds


def rng_state(include_cuda: bool = True) -> dict[str, Any]:
    """Return the state of all global generators, as plain data and CPU tensors (loads with ``weights_only=True``).

    Keys: ``python``, ``torch``, and where they are in use ``numpy``, ``cuda`` (a list, one tensor a device), ``mps``.
    A CUDA that nothing has touched yet is left alone: asking it for its state would open it.
    """
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {"python": [version, list(internal), gauss], "torch": torch.get_rng_state()}
    # a numpy that nobody has imported has no state yet
    if (numpy := sys.modules.get("numpy")) is not None:
        state["numpy"] = _tensors(numpy.random.get_state(legacy=False))
    if include_cuda and torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put all global generators into a state that :func:`rng_state` returned; what it lacks is left as it is."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    # `.cpu()`: a checkpoint may have been loaded onto another device
    torch.set_rng_state(state["torch"].cpu())
    if "numpy" in state and (numpy := _numpy()) is not None:
        numpy.random.set_state(_arrays(state["numpy"]))
    if "cuda" in state and torch.cuda.is_available():
        for index, device_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(device_state.cpu(), index)
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"].cpu())


@contextmanager
def isolate_rng(include_cuda: bool = True) -> Iterator[None]:
    """Restore all global generators at the end of the block, also after an exception.

    ``include_cuda=False`` leaves CUDA's alone, as a forked process must.
    """
    state = rng_state(include_cuda)
    try:
        yield
    finally:
        set_rng_state(state)


def _tensors(tree: Any) -> Any:
    """Turn the arrays in numpy's state into tensors (of int64: torch has few unsigned types)."""
    if isinstance(tree, Mapping):
        return {key: _tensors(value) for key, value in tree.items()}
    return torch.tensor(tree.tolist(), dtype=torch.int64) if hasattr(tree, "tolist") else tree


def _arrays(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _arrays(value) for key, value in tree.items()}
    return tree.cpu().numpy().astype("uint32") if isinstance(tree, Tensor) else tree
