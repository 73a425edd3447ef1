# SPDX-License-Identifier: Apache-2.0
"""Words of annotations and protocols that Lightning has public names for, and its enum of strings."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar, Union, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, ReduceOp
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from leyden.types import Stateful

UntypedStorage: TypeAlias = torch.UntypedStorage
PathOrText: TypeAlias = Union[str, Path]
Device: TypeAlias = Union[torch.device, str, int]
MapLocation: TypeAlias = Union[
    None, Device, Callable[[torch.UntypedStorage, str], Union[torch.UntypedStorage, None]], dict[Device, Device]
]
Parameters: TypeAlias = Iterator[nn.Parameter]
Batch: TypeAlias = Union[Tensor, str, Mapping[Any, Any], Iterable[Any]]
RedOpType: TypeAlias = ReduceOp.RedOpType
ModuleT = TypeVar("ModuleT", bound=nn.Module)
T = TypeVar("T")
BroadcastT = TypeVar("BroadcastT")
ReduceT = TypeVar("ReduceT")
DestinationT = TypeVar("DestinationT", bound=dict[str, Any])

Word: TypeAlias = str
PrecisionWord: TypeAlias = Union[int, str]
Plugin: TypeAlias = Any
Number: TypeAlias = Union[Tensor, float, int]
min_seed_value = 0
max_seed_value = 2**32 - 1

MODULE_OPTIMIZERS: TypeAlias = Any
"""What ``self.optimizers()`` returns: an optimizer of torch's, ours or Fabric's, or a list of them."""


@runtime_checkable
class CollectibleGroup(Protocol):
    """A group of processes, as far as gathering needs to know it."""

    def size(self) -> int:
        """How many processes are in it."""

    def rank(self) -> int:
        """Which of them this one is."""


@runtime_checkable
class Steppable(Protocol):
    """Anything with the ``step`` of an optimizer."""

    def step(self, closure: Callable[[], float] | None = ...) -> float | None:
        """Update once; ``closure`` computes the loss anew."""


@runtime_checkable
class Optimizable(Steppable, Protocol):
    """Anything that steps and has the groups, defaults and state of an optimizer."""

    param_groups: list[dict[Any, Any]]
    defaults: dict[Any, Any]
    state: Any

    def state_dict(self) -> dict[str, dict[Any, Any]]:
        """What resumes."""

    def load_state_dict(self, state_dict: dict[str, dict[Any, Any]]) -> None:
        """Take it back."""


class LightningEnum(str, Enum):
    """Words that compare with strings whatever their case."""

    @classmethod
    def from_str(cls, value: str, source: str = "key") -> LightningEnum:
        """Return the member whose name (``"key"``), value (``"value"``) or either (``"any"``) is ``value``.

        Raises:
            ValueError: if there is none.
        """
        if source in ("key", "any"):
            for name, member in cls.__members__.items():
                if name.lower() == value.lower():
                    return member
        if source in ("value", "any"):
            for member in cls:
                if member == value:
                    return member
        raise ValueError(f"{value!r} is not valid: expected one of {cls._allowed(source)}.")

    @classmethod
    def try_from_str(cls, value: str, source: str = "key") -> LightningEnum | None:
        """As ``from_str``, but warn and return None if there is none."""
        try:
            return cls.from_str(value, source)
        except ValueError as error:
            warnings.warn(UserWarning(str(error)), stacklevel=2)
        return None

    @classmethod
    def _allowed(cls, source: str) -> list[str]:
        keys = list(cls.__members__) if source in ("key", "any") else []
        return keys + ([member.value for member in cls] if source in ("value", "any") else [])

    def __eq__(self, other: object) -> bool:
        return bool(self.value.lower() == str(other.value if isinstance(other, Enum) else other).lower())

    def __hash__(self) -> int:
        return hash(self.value.lower())


__all__ = [
    "DistributedDataParallel",
    "LRScheduler",
    "Optimizer",
    "ProcessGroup",
    "ReduceLROnPlateau",
    "ReduceOp",
    "Stateful",
]
