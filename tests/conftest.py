# SPDX-License-Identifier: Apache-2.0
"""What every test finds: the global settings of the process as they were before any other test."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _global_settings() -> Iterator[None]:
    """Scripts that the tests run in this process set these; the next test must not notice."""
    said, threads, dtype = logging.getLogger("leyden"), torch.get_num_threads(), torch.get_default_dtype()
    level = said.level
    yield
    said.setLevel(level)
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
