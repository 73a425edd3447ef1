# SPDX-License-Identifier: Apache-2.0
"""What every test finds: the global settings of the process as they were before any other test."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data._utils.fetch import _MapDatasetFetcher


@pytest.fixture(autouse=True)
def _global_settings() -> Iterator[None]:
    """Scripts that the tests run in this process set these; the next test must not notice."""
    said, threads, dtype = logging.getLogger("leyden"), torch.get_num_threads(), torch.get_default_dtype()
    level = said.level
    yield
    said.setLevel(level)
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The indices of the batches that torch read itself, in this process."""
    seen: list[Any] = []
    fetch = _MapDatasetFetcher.fetch

    def noted(self: Any, indices: Any) -> Any:
        seen.append(indices)
        return fetch(self, indices)

    monkeypatch.setattr(_MapDatasetFetcher, "fetch", noted)
    return seen
