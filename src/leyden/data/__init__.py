# SPDX-License-Identifier: Apache-2.0
"""Loaders: what a run asks of them, and several combined into one."""

from __future__ import annotations

from leyden.data.combined import CombinedLoader

__all__ = ["CombinedLoader"]
