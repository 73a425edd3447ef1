# SPDX-License-Identifier: Apache-2.0
"""Workers draw random numbers by batch or by sample, not by worker, and outlive the signals that are for the run."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from leyden.data.feed import Feed

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*worker processes in total:UserWarning"),
]


class Draws(Dataset):
    """Each sample is what all generators say, one of its own among them."""

    def __init__(self, size: int = 8) -> None:
        self.size, self.rng = size, np.random.default_rng(0)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        drawn = [torch.rand(1).item(), random.random(), np.random.rand(), self.rng.random()]
        return torch.tensor([index, *drawn], dtype=torch.float64)


class Many(Draws):
    """Loads a whole batch at once."""

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        noise = torch.rand(1)
        return [torch.cat([torch.tensor([float(index)]), noise]) for index in indices]


def collate(samples: list[Tensor]) -> Tensor:
    batch: Tensor = default_collate(samples)
    return torch.cat([batch, torch.rand(len(batch), 1, dtype=batch.dtype)], 1)


def batches(workers: int, seeding: str, epoch: int = 0, data: Any = None, **kwargs: Any) -> list[Tensor]:
    torch.manual_seed(5)
    more = {"num_workers": workers, "multiprocessing_context": "fork"} if workers else {}
    loader = DataLoader(Draws() if data is None else data, batch_size=2, **{"shuffle": True, **kwargs}, **more)
    feed = Feed(loader, seeding, 11)
    feed.key = ("train", 0, epoch, 0)
    return list(feed)


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def test_a_batch_is_the_same_from_any_worker() -> None:
    one, three = batches(1, "batch"), batches(3, "batch")
    assert same(one, three)
    assert len({row[1].item() for batch in one for row in batch}) == 8
    assert not same(batches(2, "torch"), batches(3, "torch"))


@pytest.mark.parametrize(
    ("data", "more"), [(Draws, {}), (Draws, {"collate_fn": collate}), (Many, {}), (Many, {"collate_fn": collate})]
)
def test_samples_have_streams_of_their_own_whatever_the_number_of_workers(data: Any, more: Any) -> None:
    none = batches(0, "sample", data=data(), **more)
    for workers in (2, 4):
        assert same(none, batches(workers, "sample", data=data(), **more))
    assert not same(none, batches(0, "sample", epoch=1, data=data(), **more))


def test_a_sample_is_a_function_of_seed_epoch_and_index() -> None:
    by_index = {}
    for shuffle in (True, False):
        rows = [row for batch in batches(0, "sample", shuffle=shuffle) for row in batch]
        by_index[shuffle] = {int(row[0]): row.tolist() for row in rows}
    assert by_index[True] == by_index[False]
    assert len({row[1] for row in by_index[True].values()}) == 8


def test_streams_of_samples_leave_the_main_process_where_it_was() -> None:
    ends = []
    for workers in (0, 2):
        random.seed(3)
        np.random.seed(3)
        batches(workers, "sample")
        ends.append((torch.rand(1).item(), random.random(), float(np.random.rand())))
    assert ends[0] == ends[1]


def test_an_exception_in_a_sample_is_the_users_and_no_worker_outlives_it() -> None:
    def workers() -> set[int]:
        return {child.pid for child in psutil.Process().children() if child.name() == "pt_data_worker"}

    before = workers()

    class Fails(Draws):
        def __getitem__(self, index: int) -> Tensor:
            raise ValueError("broken sample")

    with pytest.raises(ValueError, match="broken sample"):
        batches(0, "sample", data=Fails())
    with pytest.raises(ValueError, match="broken sample"):
        batches(1, "sample", data=Fails())
    gc.collect()  # the exception and the iterator hold each other; torch can then end the worker by SIGTERM only
    assert workers() <= before


def test_the_data_set_and_the_init_function_are_the_users_own() -> None:
    class Looks(Dataset):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> tuple[int, bool, bool]:
            info = get_worker_info()
            return index, isinstance(info.dataset, Looks) and type(index) is int, bool(info.dataset.marked)

    def mark(worker_id: int) -> None:
        get_worker_info().dataset.marked = True

    for seeding in ("batch", "sample", "worker", "torch"):
        found = batches(1, seeding, data=Looks(), worker_init_fn=mark)
        assert all(bool(kind.all()) and bool(marked.all()) for _, kind, marked in found)


# --- the shield -----------------------------------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys, time
import torch
from torch.utils.data import DataLoader, Dataset
from leyden.data.feed import Feed

class Pids(Dataset):
    def __len__(self): return 12
    def __getitem__(self, index):
        if HANG and index == 11: time.sleep(0.1)
        return os.getpid()

HANG = False
if __name__ == "__main__":
    context, what = sys.argv[1:3]
    loader = DataLoader(Pids(), batch_size=1, num_workers=2, multiprocessing_context=context, persistent_workers=True)
    feed = Feed(loader, "batch")
    iterator = iter(feed)
    pids = sorted({int(next(iterator)) for _ in range(4)})
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2", "SIGTERM"):
        for pid in pids:
            os.kill(pid, getattr(signal, name))
            time.sleep(0.05)
    time.sleep(0.3)
    assert sorted({int(next(iterator)) for _ in range(6)}) == pids
    print(*pids, flush=True)
    if what == "second":
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.kill(pids[0], signal.SIGTERM)
        print(os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1]))
        os._exit(0)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
@pytest.mark.parametrize(
    ("context", "what"), [("fork", "exit"), ("fork", "second"), ("fork", "kill"), ("spawn", "exit")]
)
def test_P4_workers_outlive_the_first_signals_and_end_with_the_run(tmp_path: Path, context: str, what: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(
        [sys.executable, str(script), context, what], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment, stdin=subprocess.DEVNULL,
    ) as run:  # fmt: skip
        out, err = run.communicate(timeout=100)
    assert run.returncode == (-signal.SIGKILL if what == "kill" else 0), err
    lines = out.splitlines()
    if what == "second":
        assert lines[1] == "143"
    deadline = time.monotonic() + 60
    while any(alive(int(pid)) for pid in lines[0].split()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(int(pid)) for pid in lines[0].split())


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_P4_workers_of_a_run_that_is_killed_while_they_start_end_too(tmp_path: Path, context: str) -> None:
    script = tmp_path / "script.py"
    script.write_text("""
import os, signal, sys, time
from torch.utils.data import DataLoader
from leyden.data.feed import Feed

def init(worker_id):
    parent = os.getppid()
    open(f"{sys.argv[2]}/{os.getpid()}", "w").close()
    os.kill(parent, signal.SIGKILL)
    while os.getppid() == parent:
        time.sleep(0.01)

if __name__ == "__main__":
    next(iter(Feed(DataLoader(range(4), num_workers=1, multiprocessing_context=sys.argv[1], worker_init_fn=init), "batch")))
""")
    pids = tmp_path / "pids"
    pids.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    run = subprocess.Popen([sys.executable, str(script), context, str(pids)], env=environment, stdin=subprocess.DEVNULL)
    assert run.wait(timeout=100) == -signal.SIGKILL
    deadline = time.monotonic() + 30
    worker = int(next(pids.iterdir()).name)
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    if alive(worker):
        os.kill(worker, signal.SIGKILL)
        raise AssertionError("the worker waits for a process that is no more")


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_P4_a_worker_that_hangs_does_not_keep_the_process_from_ending(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    # holds the interpreter, so that no handler of Python's can run
    hang = "time.sleep(0.5); import ctypes; ctypes.PyDLL(None).sleep(300)"
    script.write_text(
        SCRIPT.replace("HANG = False", "HANG = True")
        .replace("time.sleep(0.1)", hang)
        .replace("print(*pids", "next(iterator); time.sleep(0.5); print(*pids")
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    run = subprocess.run(
        [sys.executable, str(script), "fork", "exit"], capture_output=True, text=True, env=environment, timeout=100,
        stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert not any(alive(int(pid)) for pid in run.stdout.split())
