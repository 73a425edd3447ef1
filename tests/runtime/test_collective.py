# SPDX-License-Identifier: Apache-2.0
"""Copies of a process begin when all of them are made; threads that ask the store are over before the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from leyden.runtime.collective import Gate


def test_copies_wait_until_all_are_made_or_nobody_makes_them_any_more() -> None:
    gate, children = Gate(), []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            gate.wait()
            os._exit(7)
        children.append(pid)
    time.sleep(0.2)
    assert [os.waitpid(pid, os.WNOHANG) for pid in children] == [(0, 0)] * 3
    gate.open()
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [7] * 3


# A rank whose thread asks a store that does not answer until the interpreter ends: then the one who keeps it is gone.
_AT_THE_END = """
import os, subprocess, sys, threading, time
from torch.distributed import TCPStore
from leyden.runtime import collective

if sys.argv[1] == "keep":
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    print(store.port, flush=True)
    time.sleep(60)
keeper = subprocess.Popen([sys.executable, __file__, "keep"], stdout=subprocess.PIPE)
store = TCPStore("127.0.0.1", int(keeper.stdout.readline()), is_master=False, wait_for_workers=False)
asks = threading.Event()

def look():
    asks.set()
    store.get("never")

class Late:
    def __init__(self):
        self.kill, self.pid, self.sleep = os.kill, keeper.pid, time.sleep

    def __del__(self):
        self.kill(self.pid, 9)
        self.sleep(1.0)

thread = threading.Thread(target=look, daemon=True)
thread.start()
asks.wait()
time.sleep(0.2)
if sys.argv[1] == "guarded":
    collective.PATIENCE = 0.2
    collective.guard(thread)
    import atexit
    atexit.register(keeper.kill) if sys.argv[2] == "answers" else None
    for_the_end = os._exit
    os._exit = lambda code: (keeper.kill(), for_the_end(code))
sys.late = Late()
print("over")
"""


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="from 3.14 on, threads of an interpreter that ends stand still")
@pytest.mark.parametrize(("how", "code"), [("silent", 1), pytest.param("answers", 0, marks=pytest.mark.slow)])
def test_d1_a_thread_that_asks_the_store_does_not_abort_the_process_at_its_end(
    tmp_path: Path, how: str, code: int
) -> None:
    script = tmp_path / "script.py"
    script.write_text(_AT_THE_END)
    done = subprocess.run(
        [sys.executable, str(script), "guarded", how], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code, done.stderr
    assert done.stdout == "over\n"
    assert "terminate called" not in done.stderr
    assert ("the store of rank 0 does not answer" in done.stderr) == (how == "silent")
