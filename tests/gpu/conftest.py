# SPDX-License-Identifier: Apache-2.0
"""Tests that need a CUDA GPU; without one they are skipped. `make gpu` runs them."""

from __future__ import annotations

import warnings

import pytest
import torch


@pytest.fixture(autouse=True)
def _needs_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA GPU")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch says when this mode is set first in a process
        torch.cuda.set_sync_debug_mode("default")
