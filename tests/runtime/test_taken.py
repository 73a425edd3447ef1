# SPDX-License-Identifier: Apache-2.0
"""T3: which devices are chosen is said, and a GPU that another process computes on is not among them."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from leyden.errors import LeydenWarning, MisconfigurationException
from leyden.runtime import devices
from leyden.runtime.devices import CUDAAccelerator, parse_devices
from leyden.runtime.taken import taken, visible_identities

NVIDIA_SMI = """#!/bin/sh
case "$1" in
  --query-gpu*) printf '0, GPU-aa\\n1, GPU-bb\\n2, GPU-cc\\n' ;;
  *) cat "$BUSY" ;;
esac
"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with three GPUs, and a file that says which processes are on them."""
    tool, busy = tmp_path / "nvidia-smi", tmp_path / "busy"
    tool.write_text(NVIDIA_SMI)
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    busy.write_text("")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("BUSY", str(busy))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    return busy


def _auto() -> list[int]:
    return [device.index for device in parse_devices(CUDAAccelerator(), "auto")]


def test_t3_auto_leaves_out_a_gpu_that_another_process_uses(driver: Path, caplog: Any) -> None:
    assert _auto() == [0, 1, 2]
    driver.write_text(
        f"GPU-bb, 4711, /usr/bin/python\nGPU-aa, {os.getpid()}, python\nGPU-cc, 9, nvidia-cuda-mps-server\n"
    )
    with caplog.at_level(logging.INFO):
        assert _auto() == [0, 2]
    assert caplog.messages == ["Leaving out what is in use: cuda:1 by process 4711 (python)."]
    assert [device.index for device in parse_devices(CUDAAccelerator(), [1])] == [1]  # who names it gets it


def test_t3_where_all_are_in_use_it_is_an_error_that_says_by_whom(
    driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.write_text("GPU-aa, 1, a\nGPU-bb, 2, b\nGPU-cc, 3, c, with a comma\n")
    with pytest.raises(MisconfigurationException, match=r"all 3 GPUs are in use: cuda:0 by process 1 \(a\); cuda:1"):
        _auto()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.warns(LeydenWarning, match=r"The GPU is in use: cuda:0 by process 3 .* as there is no other"):
        assert _auto() == [0]


def test_a_process_that_is_not_listed_itself_cannot_tell(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.write_text("GPU-aa, 1, a\n")
    assert set(taken()) == {0}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert taken() == {}


def test_without_the_tool_nobody_can_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert taken() == {}
    broken = tmp_path / "nvidia-smi"
    broken.write_text("#!/bin/sh\nexit 9\n")
    broken.chmod(0o755)
    assert taken() == {}


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (None, ["a1", "a2", "b3"]),
        ("2,0", ["b3", "a1"]),
        ("b,a1", ["b3", "a1"]),
        ("1,7,0", ["a2"]),
        ("MIG-x", ["MIG-x"]),
    ],
)
def test_the_order_of_torch_is_that_of_the_variable(variable: str | None, expected: list[str]) -> None:
    environment = {} if variable is None else {"CUDA_VISIBLE_DEVICES": variable}
    assert visible_identities(["a1", "a2", "b3"], environment) == expected


def test_t3_the_devices_of_a_trainer_are_said(caplog: Any) -> None:
    import leyden as L

    with caplog.at_level(logging.INFO):
        L.Trainer(accelerator="cpu", devices=2, strategy="dp", logger=False)
        L.Trainer(accelerator="cpu", devices=1, logger=False)
    assert caplog.messages == ["Devices: 2 times the CPU, by DataParallelStrategy."]
    assert devices.ACCELERATORS["cuda"] is CUDAAccelerator
