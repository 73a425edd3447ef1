# SPDX-License-Identifier: Apache-2.0
"""Starts the other processes of this machine by running the same script once more in each, once for the whole script.

The process of the user is rank 0; the others are fresh interpreters with the same command and the environment of their
rank. They come to the same ``fit`` by themselves, and go on from it to the same ``test``: each line of the script runs once
for each rank.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import subprocess
import sys
import threading
import time

from leyden.errors import MisconfigurationException
from leyden.runtime import collective
from leyden.runtime import world as worlds
from leyden.runtime.world import World

GRACE = 5.0
"""Seconds that rank 0 has to leave a run by itself, when another process has failed."""

# Runs in front of the script: on Linux the kernel ends the process when the one that started it is gone, however it went.
# It is set here, not between fork and exec, where a process with threads can do little. Its arguments: the process that
# must be there, 0 for any, and the command.
FIRST = (
    "import ctypes, os, signal, sys\n"
    "if sys.argv[1] != '0' and sys.platform == 'linux':\n"
    "    ctypes.CDLL(None).prctl(1, signal.SIGKILL)\n"
    "    if os.getppid() != int(sys.argv[1]): os._exit(1)\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)


class Others:
    """The processes that this one has started, and the thread that looks after them."""

    def __init__(self, processes: list[subprocess.Popen[bytes]]) -> None:
        self.processes = processes
        self.running = 0
        """How many runs of this process need the others: one, and a program that goes on with them to its end."""
        self.lost: str | None = None
        """Which process has failed, in words."""
        self._over = threading.Event()
        threading.Thread(target=self._look, name="leyden-launcher", daemon=True).start()
        atexit.register(self.close)

    def _look(self) -> None:
        while not self._over.wait(0.1):
            for rank, process in enumerate(self.processes, 1):
                # one that ends well before the others, in the middle of a run, is lost as well: they wait for it
                missed = (code := process.poll()) or (code == 0 and self.running)
                if missed and self._one_is_lost(rank, process):
                    return

    def _one_is_lost(self, rank: int, process: subprocess.Popen[bytes]) -> bool:
        """Wait for this process to leave the run, and end it if it does not; return False where nobody is missed."""
        code = process.returncode
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        lost = f"local rank {rank} (process {process.pid}) has ended with {how}"
        self.lost = lost if code else None
        until = time.monotonic() + GRACE
        while time.monotonic() < until and not self._over.is_set():
            if not self.running:
                return bool(code)
            time.sleep(0.1)
        if self._over.is_set():
            return True
        self.lost = lost
        with contextlib.suppress(Exception):
            print(f"\nleyden: {self.lost}; all ranks end.", file=sys.stderr, flush=True)
            sys.stdout.flush()
        self.kill()
        os._exit(1)

    def kill(self) -> None:
        """End all of them at once."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()

    def close(self) -> None:
        """The script of this process is over: wait for the others, or end them, if it has failed."""
        failed = getattr(sys, "last_value", None) is not None
        if failed:
            self._over.set()
            until = time.monotonic() + 1.0  # one that failed first is about to say so
            while time.monotonic() < until and any(process.poll() is None for process in self.processes):
                time.sleep(0.05)
            self.kill()
        codes = [process.wait() for process in self.processes]
        self._over.set()
        bad = next((code for code in codes if code), 0)
        if bad and not failed:
            # too late to raise anything: the exit code is all that is left to say it
            with contextlib.suppress(Exception):
                rank = codes.index(bad) + 1
                print(f"leyden: the process of local rank {rank} ended with exit code {bad}.", file=sys.stderr)
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(bad if 0 < bad < 256 else 1)


_OTHERS: list[Others] = []


def start_others(world: World) -> None:
    """Start the other processes of this machine, once for the whole script.

    Raises:
        MisconfigurationException: where there is no script that could be run once more.
    """
    port = world.port or collective.serve()
    command = again()
    parent = str(os.getpid()) if threading.current_thread() is threading.main_thread() else "0"
    processes = []
    complete = World(world.rank, world.size, 0, world.local_size, world.node, world.address, port)
    for local_rank in range(1, world.local_size):
        environment = {**os.environ, **complete.environment(local_rank)}
        environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // world.local_size, 1)))
        processes.append(
            subprocess.Popen([sys.executable, "-c", FIRST, parent, *command], env=environment, cwd=_folder())
        )
    _OTHERS.append(Others(processes))
    worlds.started(complete)


def again() -> list[str]:
    """Return the command that runs this script once more.

    Raises:
        MisconfigurationException: for a session that is no script.
    """
    main = sys.modules.get("__main__")
    path = getattr(main, "__file__", None)
    words = list(sys.orig_argv[1:])
    runs_code = getattr(main, "__spec__", None) is not None or (path is None and "-c" in words[:-1])
    if not runs_code and (path is None or not os.path.exists(path)):
        raise MisconfigurationException(
            "strategy='ddp' starts the other processes by running this script once more, but there is no script: this is"
            " an interactive session or a notebook, or the program came from a pipe. Use strategy='ddp_notebook' (or"
            " 'ddp_fork', 'ddp_spawn'), or put the program into a file."
        )
    if not runs_code and path is not None:
        # sys.argv may have been changed by now, and so may the working directory
        mine = next((i for i, word in enumerate(words) if os.path.basename(word) == os.path.basename(path)), None)
        if mine is not None and os.path.exists(path):
            words[mine] = os.path.abspath(path)
    return [sys.executable, *words]


def _folder() -> str | None:
    """The folder in which this script began: it may have gone to another one, as the others are going to do themselves."""
    return worlds.BEGAN_IN if worlds.BEGAN_IN and os.path.isdir(worlds.BEGAN_IN) else None


def enter() -> None:
    """A run with the others begins.

    Raises:
        RuntimeError: if one of them is gone.
    """
    for others in _OTHERS:
        if others.lost is not None:
            raise RuntimeError(
                f"The processes of this script cannot run together any more: {others.lost}. Start the script anew."
            )
        others.running += 1


def leave() -> None:
    """The run is over."""
    for others in _OTHERS:
        others.running = max(others.running - 1, 0)
