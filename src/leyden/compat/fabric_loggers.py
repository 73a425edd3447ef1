# SPDX-License-Identifier: Apache-2.0
"""The loggers of ``lightning.fabric``, whose arguments have other names and another order than those of its Trainer."""

from __future__ import annotations

from typing import Any

from leyden.loggers import csv, tensorboard
from leyden.loggers.folder import LOG_FOLDER
from leyden.types import PathLike


class CSVLogger(csv.CSVLogger):
    """See :class:`leyden.loggers.CSVLogger`; ``root_dir`` is its ``save_dir``."""

    def __init__(
        self,
        root_dir: PathLike,
        name: str | None = LOG_FOLDER,
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        super().__init__(root_dir, name, version, prefix, flush_logs_every_n_steps)


class TensorBoardLogger(tensorboard.TensorBoardLogger):
    """See :class:`leyden.loggers.TensorBoardLogger`; ``root_dir`` is its ``save_dir``."""

    def __init__(
        self,
        root_dir: PathLike,
        name: str | None = LOG_FOLDER,
        version: int | str | None = None,
        default_hp_metric: bool = True,
        prefix: str = "",
        sub_dir: PathLike | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(root_dir, name, version, False, default_hp_metric, prefix, sub_dir, **kwargs)
