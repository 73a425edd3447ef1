# SPDX-License-Identifier: Apache-2.0
"""Private names of Lightning's that published libraries import, answered because they do."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

from leyden.datamodule import LightningDataModule
from leyden.loops import hardware
from leyden.loops.lightning_names import Connector
from leyden.module import LightningModule
from leyden.runtime.devices import CUDAAccelerator, MPSAccelerator, make_accelerator


class _AcceleratorConnector(Connector):
    """Resolves what ``Trainer(accelerator=..., devices=...)`` means without a Trainer; its errors are the Trainer's."""

    def __init__(
        self,
        devices: list[int] | str | int = "auto",
        num_nodes: int = 1,
        accelerator: Any = "auto",
        strategy: Any = "auto",
        plugins: Any = None,
        precision: Any = None,
        sync_batchnorm: bool = False,
        benchmark: bool | None = None,
        use_distributed_sampler: bool = True,
        deterministic: bool | str | None = None,
    ) -> None:
        super().__init__(
            *hardware.strategy(strategy, accelerator, devices, num_nodes, precision, plugins, sync_batchnorm)
        )

    @staticmethod
    def _choose_auto_accelerator() -> str:
        return make_accelerator("auto").name()

    @staticmethod
    def _choose_gpu_accelerator_backend() -> str:
        kinds = (MPSAccelerator, CUDAAccelerator)
        return next((kind.name() for kind in kinds if kind.is_available()), make_accelerator("gpu").name())


def _load_from_checkpoint(
    cls: Any,
    checkpoint_path: str | Path | IO[bytes],
    map_location: Any = None,
    hparams_file: str | Path | None = None,
    strict: bool | None = None,
    weights_only: bool | None = None,
    **kwargs: Any,
) -> Any:
    """As ``cls.load_from_checkpoint``, of the class that Leyden has, also where ``cls`` has written another."""
    base: Any = LightningModule if issubclass(cls, LightningModule) else LightningDataModule
    options = {} if base is LightningDataModule else {"strict": strict}
    return base.load_from_checkpoint.__func__(
        cls, checkpoint_path, map_location, hparams_file, weights_only=weights_only, **options, **kwargs
    )
