# SPDX-License-Identifier: Apache-2.0
"""J5: several processes from a notebook, whose cells define what travels; results and Ctrl-C reach where they should."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from torch.utils.data import DataLoader

from leyden.errors import MisconfigurationException
from leyden.strategies import DDPStrategy
from leyden.strategies.launch import fresh
from ranks import Broken, Net, data, make_trainer

SESSION = Path(__file__).with_name("session.py")


@pytest.mark.parametrize("busy", ["1", pytest.param("", marks=pytest.mark.slow)], ids=["fresh", "fork"])
def test_j5_cells_train_in_processes_and_go_on_with_what_comes_back(tmp_path: Path, busy: str) -> None:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    process = subprocess.Popen(
        [sys.executable, str(SESSION), str(tmp_path)], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "BUSY": busy}, text=True,
    )  # fmt: skip
    try:
        until = time.monotonic() + 90
        while not all((tmp_path / f"waits{rank}").exists() for rank in (0, 1)) and time.monotonic() < until:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGINT)  # the kernel alone gets it
        output = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert len(children) >= 2
    assert not any(child.is_running() for child in children)
    found = json.loads((tmp_path / "cells.json").read_text())
    first, stopped = found["first"], found["interrupted"]
    assert first == {**first, "moved": True, "steps": 4, "batches": 4, "elsewhere": True, "same class": True}
    assert stopped["interrupted"] is True
    assert 4 < stopped["steps"] < 4000
    assert found["steps"] > stopped["steps"]
    assert found["batches"] == found["steps"]
    assert found["loss"] < first["loss"]
    assert found["folders"] == ["version_0"]


@pytest.fixture
def busy_thread() -> Iterator[None]:
    done = threading.Event()
    thread = threading.Thread(target=done.wait, name="busy")
    thread.start()
    yield
    done.set()
    thread.join()


def test_j5_a_kernel_whose_threads_or_cuda_cannot_be_copied_gets_fresh_processes(
    busy_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fresh.way_of_notebooks() == "fresh"
    monkeypatch.setattr(fresh.importlib.util, "find_spec", lambda name: None)
    assert fresh.way_of_notebooks() == "fork"  # with a word on what may go wrong
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert fresh.way_of_notebooks() == "fresh"


def test_j5_a_kernel_of_its_own_threads_only_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    class Heartbeat(threading.Thread):
        __module__ = "ipykernel.heartbeat"

    monkeypatch.setattr(threading, "enumerate", lambda: [threading.main_thread(), Heartbeat()])
    assert fresh.way_of_notebooks() == "fork"


@pytest.mark.slow
def test_d1_in_fresh_processes_the_traceback_of_the_first_comes_with_the_error() -> None:
    with pytest.raises(Exception, match="(?s)Rank 1 ended with.*broken on rank 1") as caught:
        make_trainer(strategy=DDPStrategy(start_method="fresh"), max_epochs=1).fit(Broken(), DataLoader(data(24), 3))
    assert isinstance(caught.value.__cause__, ValueError)


def test_what_cannot_be_sent_is_an_error_before_anything_starts() -> None:
    module = Net()
    module.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(MisconfigurationException, match=r"Trainer.fit\(\): the call cannot be sent .*lock"):
        make_trainer(strategy=DDPStrategy(start_method="fresh")).fit(module, DataLoader(data(24), 3))
