# SPDX-License-Identifier: Apache-2.0
"""Search for hyperparameters: a parser that knows what to vary, trials in processes of this machine or as SLURM jobs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leyden.search.parser import HyperOptArgumentParser as HyperOptArgumentParser
    from leyden.search.parser import HyperOptNamespace as HyperOptNamespace
    from leyden.search.slurm import SlurmCluster as SlurmCluster
    from leyden.search.walltime import WalltimeCheckpoint as WalltimeCheckpoint
    from leyden.search.workers import TrialResult as TrialResult

_HOMES = {
    "HyperOptArgumentParser": "parser",
    "HyperOptNamespace": "parser",
    "SlurmCluster": "slurm",
    "TrialResult": "workers",
    "WalltimeCheckpoint": "walltime",
}

__all__ = [
    "HyperOptArgumentParser",
    "HyperOptNamespace",
    "SlurmCluster",
    "TrialResult",
    "WalltimeCheckpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
