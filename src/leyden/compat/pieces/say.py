# SPDX-License-Identifier: Apache-2.0
"""Messages: said once, with the rank ahead, or not at all."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from leyden.errors import PossibleUserWarning
from leyden.runtime.ranks import (
    rank_from_environment,
    rank_zero_debug,
    rank_zero_deprecation,
    rank_zero_info,
    rank_zero_only,
    rank_zero_warn,
)


class WarningCache(set[str]):
    """Says each message once."""

    def _is_new(self, message: str) -> bool:
        new = message not in self
        self.add(message)
        return new

    def warn(self, message: str, stacklevel: int = 5, **kwargs: Any) -> None:
        """Warn on rank 0, unless this was said before; ``kwargs`` are those of ``rank_zero_warn``."""
        if self._is_new(message):
            rank_zero_warn(message, stacklevel=stacklevel, **kwargs)

    def deprecation(self, message: str, stacklevel: int = 6, **kwargs: Any) -> None:
        """Warn on rank 0 of an old name, unless this was said before."""
        if self._is_new(message):
            rank_zero_deprecation(message, stacklevel=stacklevel, **kwargs)

    def info(self, message: str, stacklevel: int = 5, **kwargs: Any) -> None:
        """Say it on rank 0, unless it was said before."""
        if self._is_new(message):
            rank_zero_info(message, stacklevel=stacklevel, **kwargs)


def rank_prefixed_message(message: str, rank: int | None) -> str:
    """Return ``[rank: N] message``; the message alone for None."""
    return message if rank is None else f"[rank: {rank}] {message}"


def disable_possible_user_warnings(module: str = "") -> None:
    """Say no warning of the kind ``PossibleUserWarning`` that comes from ``module`` (a pattern; empty: from anywhere)."""
    warnings.filterwarnings("ignore", module=module, category=PossibleUserWarning)


MODULE = sys.modules[__name__]
"""This module: some programs reach its functions by way of it."""

__all__ = [
    "MODULE",
    "WarningCache",
    "disable_possible_user_warnings",
    "rank_from_environment",
    "rank_prefixed_message",
    "rank_zero_debug",
    "rank_zero_deprecation",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
]
