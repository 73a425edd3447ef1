# SPDX-License-Identifier: Apache-2.0
"""How checkpoints reach the disk: the plug-in that writes, reads and removes them, and the one that writes behind."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from leyden.checkpoint_io.base import CheckpointIO, TorchCheckpointIO

if TYPE_CHECKING:
    from leyden.checkpoint_io.behind import AsyncCheckpointIO

__all__ = ["AsyncCheckpointIO", "CheckpointIO", "TorchCheckpointIO"]


def __getattr__(name: str) -> Any:
    if name != "AsyncCheckpointIO":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("leyden.checkpoint_io.behind").AsyncCheckpointIO


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
