# SPDX-License-Identifier: Apache-2.0
"""Searches ahead of a run: the learning rate to begin with, the batch size that fits in memory."""

from leyden.callbacks.rate_search import LRFinder
from leyden.tuning.tuner import Tuner

__all__ = ["LRFinder", "Tuner"]
