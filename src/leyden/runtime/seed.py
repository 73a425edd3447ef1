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

    ``seed`` None takes ``PL_GLOBAL_SEED`` from the environment, or else is 0. ``workers=True`` gives each sample that a
    Trainer loads a random stream of its own, a function of the seed, the epoch and its index: random augmentation is then
    the same with any number of workers (``semantics="lightning"`` seeds workers by :func:`pl_worker_init_function`
    instead). Both are left in the environment (``PL_GLOBAL_SEED``, ``PL_SEED_WORKERS``), so that processes which this one
    starts follow.

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
    if os.environ.get(_SEED) is not None:
        seed_everything(given_seed(), workers=seeds_workers(), verbose=False)


def given_seed() -> int:
    """Return the seed that :func:`seed_everything` was last given, here or in a parent process; 0 if it never was."""
    return _as_seed(os.environ.get(_SEED, 0), _SEED)


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
        state["numpy"] = plain_numpy(numpy.random.get_state(legacy=False))
    if include_cuda and torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put all global generators into a state that :func:`rng_state` returned; what it lacks is left as it is."""
    put_python(random, state["python"])
    # `.cpu()`: a checkpoint may have been loaded onto another device
    torch.set_rng_state(state["torch"].cpu())
    if "numpy" in state:
        put_numpy(None, state["numpy"])
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


def put_python(generator: Any, state: Any) -> None:
    """Set ``generator``, python's module or a ``random.Random``, to a state as it gave it, or as plain data."""
    version, internal, gauss = state
    generator.setstate((version, tuple(internal), gauss))


def put_numpy(generator: Any, state: Mapping[str, Any]) -> None:
    """Set a generator of numpy, None for the global one, to a state as it gave it, or as :func:`plain_numpy` made it."""
    if (numpy := _numpy()) is None:
        return
    if generator is None:
        numpy.random.set_state(as_numpy(state))
    elif hasattr(generator, "set_state"):
        generator.set_state(as_numpy(state))
    else:
        getattr(generator, "bit_generator", generator).state = as_numpy(state)


def plain_numpy(tree: Any) -> Any:
    """Turn the state of a generator of numpy into plain data and tensors."""
    if isinstance(tree, Mapping):
        return {key: plain_numpy(value) for key, value in tree.items()}
    if isinstance(tree, Tensor) or not hasattr(tree, "tolist"):
        return tree
    if getattr(tree, "ndim", 0) == 0:
        return tree.item()
    # as tensors of int64, since torch has few unsigned types; those of 64 bits as a list under their name
    values = tree.tolist()
    return {tree.dtype.name: values} if tree.dtype.itemsize > 4 else torch.tensor(values, dtype=torch.int64)


def as_numpy(tree: Any) -> Any:
    """Turn what :func:`plain_numpy` made back into the state of a generator of numpy."""
    if isinstance(tree, Mapping):
        for name in ("uint64", "int64"):
            if list(tree) == [name]:
                numpy = _numpy()
                assert numpy is not None
                return numpy.array(tree[name], dtype=name)
        return {key: as_numpy(value) for key, value in tree.items()}
    return tree.cpu().numpy().astype("uint32") if isinstance(tree, Tensor) else tree
