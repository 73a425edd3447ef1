# SPDX-License-Identifier: Apache-2.0
"""The samplers of a loader: which there are, which draw again and again, and what those remember that are not torch's."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler


def samplers(loader: Any) -> list[Any]:
    """Return the batch sampler and the samplers of a loader, and those within them."""
    found: list[Any] = []
    waiting = [getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None)]
    while waiting and len(found) < 8:
        part = waiting.pop(0)
        if part is not None and not any(part is other for other in found):
            found.append(part)
            waiting += [getattr(part, "batch_sampler", None), getattr(part, "sampler", None)]
    return found


def _torchs(part: Any) -> bool:
    return isinstance(part, (list, tuple, range, Tensor)) or type(part).__module__.startswith("torch.utils.data.")


def parts(loader: Any, how: str) -> list[Any]:
    """Return what may have a memory of its own: samplers, and a loader, whose classes are not torch's."""
    if how != "indices":
        return []
    subclass = [loader] if type(loader) is not DataLoader else []
    # not those that share samples out: the feed keeps their state apart, since another number of processes has others
    return [
        part for part in [*samplers(loader), *subclass] if not _torchs(part) and not vars(type(part)).get("draws_apart")
    ]


def draws_often(loader: Any) -> bool:
    """Whether the sampler may draw random numbers more than once in a pass, from generators that others use too."""
    for part in samplers(loader):
        if vars(type(part)).get("draws_apart"):
            return False
        if isinstance(part, RandomSampler) and type(part) is RandomSampler:
            if part.generator is not None and (part.replacement or part.num_samples > len(part.data_source)):
                return True
        elif not _torchs(part):
            return True
    return False


def attributes(part: Any) -> dict[str, Any]:
    """Return the attributes that are numbers, words, or short lists of them."""
    found = {}
    for name, value in getattr(part, "__dict__", {}).items():
        several = isinstance(value, (list, tuple)) and len(value) <= 64
        if all(isinstance(item, (bool, int, float, str, type(None))) for item in (value if several else [value])):
            found[name] = list(value) if isinstance(value, list) else value
    found.pop("_IterableDataset_len_called", None)  # torch's own
    return found


def only(state: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Return a state with those of its attributes that ``names`` says."""
    if "attributes" not in state:
        return state
    found = state["attributes"]
    return {
        "attributes": {name: value for name, value in found.items() if name in names},
        "absent": sorted(names - found.keys()),
    }
