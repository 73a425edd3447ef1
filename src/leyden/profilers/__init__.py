# SPDX-License-Identifier: Apache-2.0
"""Profilers measure what the parts of a run cost."""

from leyden.profilers.base import PassThroughProfiler, Profiler
from leyden.profilers.simple import SimpleProfiler

__all__ = ["PassThroughProfiler", "Profiler", "SimpleProfiler"]
