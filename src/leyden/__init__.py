# SPDX-License-Identifier: Apache-2.0
"""Leyden: a trainer for PyTorch. The public names, loaded when they are first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from leyden.version import __version__

if TYPE_CHECKING:
    from leyden.callback import Callback as Callback
    from leyden.cli.lightning_cli import LightningCLI as LightningCLI
    from leyden.data.combined import CombinedLoader as CombinedLoader
    from leyden.datamodule import LightningDataModule as LightningDataModule
    from leyden.fabric import Fabric as Fabric
    from leyden.loggers.experiment import Experiment as Experiment
    from leyden.module import LightningModule as LightningModule
    from leyden.runtime.ranks import rank_zero_debug as rank_zero_debug
    from leyden.runtime.ranks import rank_zero_deprecation as rank_zero_deprecation
    from leyden.runtime.ranks import rank_zero_info as rank_zero_info
    from leyden.runtime.ranks import rank_zero_only as rank_zero_only
    from leyden.runtime.ranks import rank_zero_warn as rank_zero_warn
    from leyden.runtime.seed import isolate_rng as isolate_rng
    from leyden.runtime.seed import seed_everything as seed_everything
    from leyden.search.parser import HyperOptArgumentParser as HyperOptArgumentParser
    from leyden.search.slurm import SlurmCluster as SlurmCluster
    from leyden.trainer import Trainer as Trainer
    from leyden.vintage import data_loader as data_loader
    from leyden.weights import load_weights as load_weights
    from leyden.weights import save_weights as save_weights

    LightningModel = LightningModule

_NAMES = {
    "Callback": "leyden.callback",
    "Experiment": "leyden.loggers.experiment",
    "Fabric": "leyden.fabric",
    "LightningCLI": "leyden.cli.lightning_cli",
    "LightningDataModule": "leyden.datamodule",
    "LightningModule": "leyden.module",
    "LightningModel": "leyden.module",
    "Trainer": "leyden.trainer",
    "data_loader": "leyden.vintage",
    "seed_everything": "leyden.runtime.seed",
    "isolate_rng": "leyden.runtime.seed",
    "HyperOptArgumentParser": "leyden.search.parser",
    "SlurmCluster": "leyden.search.slurm",
    "CombinedLoader": "leyden.data.combined",
    "load_weights": "leyden.weights",
    "save_weights": "leyden.weights",
    "rank_zero_debug": "leyden.runtime.ranks",
    "rank_zero_deprecation": "leyden.runtime.ranks",
    "rank_zero_info": "leyden.runtime.ranks",
    "rank_zero_only": "leyden.runtime.ranks",
    "rank_zero_warn": "leyden.runtime.ranks",
}
_ALIASES = {"LightningModel": "LightningModule"}
_MODULES = ("callbacks", "checkpoint_io", "loggers", "profilers", "strategies", "precision", "search", "tuning")

__all__ = ["__version__", *_NAMES]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), _ALIASES.get(name, name))
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"leyden.{name}")
    raise AttributeError(f"module 'leyden' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES, *_MODULES])
