# SPDX-License-Identifier: Apache-2.0
"""The names that TPUs have in Lightning: they can be imported and asked about; making one says that TPUs are not built."""

from __future__ import annotations

from typing import Any

from leyden.checkpoint_io import TorchCheckpointIO
from leyden.errors import MisconfigurationException
from leyden.runtime.cluster import ClusterEnvironment
from leyden.runtime.devices import Accelerator
from leyden.strategies import Strategy


def _refuse(self: Any, *_args: Any, **_kwargs: Any) -> None:
    raise MisconfigurationException(
        f"{type(self).__name__} is not there: TPUs are out of scope. Use accelerator='gpu' or 'cpu', and strategy='ddp' or"
        " 'fsdp' on several."
    )


class XLAAccelerator(Accelerator):
    """TPUs: there are none."""

    __init__ = _refuse

    @staticmethod
    def name() -> str:
        return "tpu"

    @staticmethod
    def is_available() -> bool:
        """Say no."""
        return False

    @staticmethod
    def auto_device_count() -> int:
        """Say 0."""
        return 0


class XLAStrategy(Strategy):
    """Several TPUs: making one is an error."""

    __init__ = _refuse


class SingleDeviceXLAStrategy(Strategy):
    """One TPU: making one is an error."""

    __init__ = _refuse


class XLAEnvironment(ClusterEnvironment):
    """Hosts of TPUs: making one is an error."""

    __init__ = _refuse

    @staticmethod
    def detect() -> bool:
        """Say no."""
        return False


class XLACheckpointIO(TorchCheckpointIO):
    """Checkpoints of TPUs: making one is an error."""

    __init__ = _refuse
