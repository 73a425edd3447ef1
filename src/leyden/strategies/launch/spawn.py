# SPDX-License-Identifier: Apache-2.0
"""Runs one call in processes that ``multiprocessing`` starts for it, and brings back its result.

For interactive sessions and tests: there is no script to run once more, and the caller goes on afterwards in its own
process. With ``"fork"`` the processes are copies of this one; with ``"spawn"`` and
``"forkserver"`` they are fresh interpreters, to which everything is pickled.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import start_processes

from leyden.errors import MisconfigurationException
from leyden.runtime import collective
from leyden.runtime.seed import rng_state
from leyden.runtime.world import World
from leyden.strategies.launch import carry

GRACE = 5.0
"""Seconds that the processes have to end, when one of them has failed."""


def call(strategy: Any, function: Callable[..., Any], *arguments: Any, method: str) -> Any:
    """Run ``function(*arguments)`` in all processes; return what it returned on rank 0. See ``launch.call``.

    Args:
        strategy: Says how many processes there are.
        function: What they run.
        arguments: What it gets.
        method: ``"spawn"``, ``"fork"`` or ``"forkserver"``.

    Raises:
        torch.multiprocessing.ProcessRaisedException: with the traceback of the process that failed first.
        MisconfigurationException: where processes cannot be started so.
    """
    size, name = strategy.num_processes, type(strategy).__name__
    if method == "fork" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise MisconfigurationException(
            f"{name}(start_method='fork') copies this process, but CUDA is in use in it already, and cannot be copied."
            " Use strategy='ddp_notebook', or strategy='ddp_spawn' in a script."
        )
    one_machine(strategy, method)
    world = World(size=size, local_size=size, port=collective.serve())
    with tempfile.TemporaryDirectory(prefix="leyden-") as folder:
        report, parent = Path(folder) / "report", parent_of(method)
        work = strategy, function, arguments, rng_state(include_cuda=False)
        gate = collective.Gate() if method == "fork" else None
        try:
            context = start_processes(  # type: ignore[no-untyped-call]
                _process, (world, parent, method, work, report, gate), size, join=False, start_method=method
            )
        finally:
            if gate is not None:
                gate.open()
        _join(context, reaches=not parent)
        if not report.exists():
            raise RuntimeError("Rank 0 has ended without a result.")
        # written by our own child, in a folder that nobody else can write to
        return torch.load(report, weights_only=False)


def one_machine(strategy: Any, method: str) -> None:
    """Raise MisconfigurationException for a strategy that asks for several machines."""
    if strategy.num_nodes > 1:
        raise MisconfigurationException(
            f"{type(strategy).__name__}(start_method={method!r}) works on one machine only; for several, write a script"
            " and use strategy='ddp', or 'ddp_ray' on a Ray cluster."
        )


def parent_of(method: str) -> int:
    """The process whose end is to end those that it starts; 0 where the kernel would not see it."""
    if method == "forkserver" or threading.current_thread() is not threading.main_thread():
        return 0
    return os.getpid()


def _join(context: Any, reaches: bool) -> None:
    """Wait for the processes; the first Ctrl-C is theirs to answer, the second one ends them.

    ``reaches`` says that a Ctrl-C of the terminal reaches them by itself.
    """
    interrupted = False
    while True:
        try:
            if context.join(grace_period=GRACE):
                return
        except KeyboardInterrupt:
            for process in context.processes:
                if interrupted:
                    process.kill()
                elif not reaches and process.is_alive():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGINT)
            if interrupted:
                raise
            interrupted = True


def _process(
    local_rank: int, world: World, parent: int, method: str, work: tuple[Any, ...], report: Path, gate: Any
) -> None:
    """What one of the processes does."""
    end_with(parent)
    if gate is not None:
        gate.wait()
    strategy, function, arguments, generators = work
    world = replace(world, rank=local_rank, local_rank=local_rank)
    # a copied process must not use the threads of its parent, which are not there
    carry.become(world, 1 if method == "fork" else max((os.cpu_count() or 1) // world.size, 1), generators)
    for module in carry.modules_in(arguments):
        carry.own_memory(carry.uncompiled(module))
    strategy.assign(strategy.parallel_devices, 1)
    returned = function(*arguments)
    if local_rank == 0:
        temporary = report.with_suffix(".part")
        torch.save(returned, temporary)
        temporary.rename(report)
    strategy.barrier("spawn")
    collective.part()


def end_with(parent: int) -> None:
    """Let the kernel end this process when the one that started it is gone, however it went."""
    if sys.platform == "linux" and parent:
        import ctypes  # noqa: PLC0415  # only in a process that was started so

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:  # it went while this process began
            os._exit(1)
    if parent and hasattr(os, "setsid"):
        with contextlib.suppress(OSError):  # it has one already
            os.setsid()  # a Ctrl-C comes from the one that called, once, wherever it was meant for
    # a run answers it; torch's processes leave it to the one that started them
    signal.signal(signal.SIGINT, signal.default_int_handler)
