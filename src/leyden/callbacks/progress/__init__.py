# SPDX-License-Identifier: Apache-2.0
"""Progress bars: the base to extend, the default one, and one that looks like tqdm."""

from __future__ import annotations

from leyden.callbacks.progress.base import ProgressBar
from leyden.callbacks.progress.rich_bar import RichProgressBar, RichProgressBarTheme
from leyden.callbacks.progress.tqdm_bar import TQDMProgressBar


def default_bar() -> ProgressBar:
    """Return the bar of a Trainer that was not given one; it decides at the start of a run how to show progress."""
    return RichProgressBar()


__all__ = ["ProgressBar", "RichProgressBar", "RichProgressBarTheme", "TQDMProgressBar", "default_bar"]
