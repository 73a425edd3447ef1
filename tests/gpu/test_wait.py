# SPDX-License-Identifier: Apache-2.0
"""On a GPU a wait for data is time in which the device had nothing to do, not time in which the host waited."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from leyden.data import wait
from leyden.data.wait import DeviceClock, Waits


def _shares(monkeypatch: pytest.MonkeyPatch, sleep: float, work: int) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(wait, "rank_zero_info", lines.append)
    matrix = torch.randn(4096, 4096, device="cuda")

    def source() -> Iterator[Any]:
        for number in range(80):
            time.sleep(sleep)
            yield number

    torch.cuda.synchronize()
    for _ in Waits(DeviceClock(torch.device("cuda", 0)), lambda: "").around(source()):
        for _ in range(work):
            matrix = torch.tanh(matrix @ matrix)
    return lines


def test_a_device_that_runs_dry_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = _shares(monkeypatch, 0.02, 1)
    assert len(lines) == 1
    assert "% of 50 steps was waiting for data" in lines[0]


def test_a_device_that_has_work_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    # the host sleeps most of the time, and the device is busy all the time
    assert _shares(monkeypatch, 0.005, 100) == []
