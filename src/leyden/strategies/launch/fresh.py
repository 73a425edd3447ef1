# SPDX-License-Identifier: Apache-2.0
"""Runs one call of a Trainer in fresh interpreters, to which it is pickled by value, and brings back what it changed.

For notebooks and interactive sessions: what is defined in a cell, lambdas and local classes travel too, and it does not
matter whether CUDA or threads are in use in the kernel already.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from leyden.errors import MisconfigurationException
from leyden.runtime import collective
from leyden.runtime.ranks import rank_zero_info
from leyden.runtime.world import OURS, World
from leyden.strategies.launch import carry
from leyden.strategies.launch.spawn import GRACE, end_with, one_machine, parent_of

_BEGIN = (
    "import json, sys\n"
    "with open(sys.argv[1] + '/path') as file: sys.path[:] = json.load(file)\n"
    "from leyden.strategies.launch.fresh import child\n"
    "child(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))\n"
)
_OF_KERNELS = ("ipykernel", "IPython", "zmq", "tornado", "debugpy", "_pydevd_bundle", "_pydev_bundle", "jupyter_client")


def way_of_notebooks() -> str:
    """Return how the processes of a notebook start: copied, which is quick, or fresh, where a copy could not work.

    A copy has none of the threads of the kernel, but every lock that they hold; and it cannot use CUDA if the kernel has.
    """
    if not hasattr(os, "fork") or torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return "fresh"
    others = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    foreign = [thread.name for thread in others if type(thread).__module__.partition(".")[0] not in _OF_KERNELS]
    if not foreign:
        return "fork"
    if importlib.util.find_spec("cloudpickle") is None:
        rank_zero_info(
            f"The processes are copies of this one, in which other threads run ({', '.join(foreign[:3])}): what these hold"
            " stays locked in the copies. With cloudpickle (pip install cloudpickle) they would be fresh ones."
        )
        return "fork"
    return "fresh"


def run(trainer: Any, entry: str, given: Mapping[str, Any]) -> Any:
    """Run ``trainer.<entry>`` in fresh interpreters on this machine; return what it returned on rank 0.

    The module has the weights of rank 0 afterwards, and the Trainer its metrics, counters and the state of its callbacks.
    A module that is on a GPU is brought to the host before it travels.

    Raises:
        torch.multiprocessing.ProcessRaisedException: with the traceback of the process that failed first.
        MisconfigurationException: where processes cannot be started so, or something cannot be pickled.
    """
    pickler = _cloudpickle()
    strategy, size = trainer.strategy, trainer.strategy.num_processes
    one_machine(strategy, "fresh")
    arguments = carry.arguments_of(trainer, entry, given)
    module = carry.uncompiled(arguments["model"])
    arguments["model"] = module.cpu()
    world = World(size=size, local_size=size, port=collective.serve())
    with tempfile.TemporaryDirectory(prefix="leyden-") as name:
        folder = Path(name)
        (folder / "path").write_text(json.dumps(sys.path))
        with (folder / "call").open("wb") as file:
            pickle.dump({"world": world, "argv": list(sys.argv), "installed": _answers_foreign_names()}, file)
            file.write(pack(pickler, trainer, entry, arguments))
        _Processes(folder, world, pickler.loads).wait()
        report = folder / "report"
        if not report.exists():
            raise RuntimeError(f"Trainer.{entry}: rank 0 has ended without a result.")
        found = pickler.loads(report.read_bytes())  # written by our own child, where nobody else can write
    return carry.take(trainer, module, found)


def pack(pickler: Any, trainer: Any, entry: str, arguments: Mapping[str, Any]) -> bytes:
    """Return the call, pickled by value.

    Raises:
        MisconfigurationException: for what cannot be pickled.
    """
    try:
        packed: bytes = pickler.dumps((trainer, entry, dict(arguments)))
    except Exception as error:
        raise MisconfigurationException(
            f"Trainer.{entry}(): the call cannot be sent to other processes: {type(error).__name__}: {error}. Open files,"
            " locks and connections must be made in setup(), not before."
        ) from error
    return packed


def _cloudpickle() -> Any:
    try:
        return importlib.import_module("cloudpickle")
    except ImportError as error:
        raise MisconfigurationException(
            "The processes of a notebook whose kernel uses CUDA, or has threads, need cloudpickle: pip install cloudpickle."
        ) from error


def _answers_foreign_names() -> bool:
    """Whether ``leyden.compat.install()`` was called here."""
    hook = sys.modules.get("leyden.compat.hook")
    return hook is not None and any(type(finder).__module__ == hook.__name__ for finder in sys.meta_path)


class _Processes:
    """The processes of one call, and what they print: it appears in the cell, which is not where a process prints."""

    def __init__(self, folder: Path, world: World, loads: Any) -> None:
        self.folder, self.loads = folder, loads
        self.pumps: list[threading.Thread] = []
        self.processes = [self._start(world, rank) for rank in range(world.size)]

    def _start(self, world: World, rank: int) -> subprocess.Popen[bytes]:
        environment = {**os.environ, **replace(world, rank=rank, local_rank=rank).environment(rank), OURS: "spawn"}
        environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // world.size, 1)))
        command = [sys.executable, "-c", _BEGIN, str(self.folder), str(rank), str(parent_of("fresh"))]
        ways = [None if ours is real else subprocess.PIPE for ours, real in self._streams()]
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=ways[0], stderr=ways[1], start_new_session=True
        )
        for pipe, (ours, _) in zip((process.stdout, process.stderr), self._streams(), strict=True):
            if pipe is not None:
                self.pumps.append(threading.Thread(target=_pump, args=(pipe, ours), daemon=True))
                self.pumps[-1].start()
        return process

    @staticmethod
    def _streams() -> list[tuple[Any, Any]]:
        return [(sys.stdout, sys.__stdout__), (sys.stderr, sys.__stderr__)]

    def wait(self) -> None:
        """Wait for all; the first Ctrl-C is theirs to answer, the second one ends them."""
        interrupted = False
        try:
            while True:
                try:
                    self._watch()
                    return
                except KeyboardInterrupt:
                    if interrupted:
                        raise
                    interrupted = True
                    for process in self.processes:
                        if process.poll() is None:
                            process.send_signal(signal.SIGINT)
                except Exception as error:
                    if interrupted and isinstance(error.__cause__, KeyboardInterrupt):
                        raise error.__cause__ from None  # before it was ready to stop as a run does
                    raise
        finally:
            for process in self.processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
            for pump in self.pumps:
                pump.join(GRACE)

    def _watch(self) -> None:
        """Return when all are done; raise what the first one failed with."""
        until = None
        while any(process.poll() is None for process in self.processes):
            if until is None and any(process.poll() for process in self.processes):
                until = time.monotonic() + GRACE
            if until is not None and time.monotonic() > until:
                break
            time.sleep(0.05)
        codes = [process.poll() for process in self.processes]
        failures = []
        for path in self.folder.glob("failed*"):
            with contextlib.suppress(Exception):
                failures.append(carry.Failure(*pickle.loads(path.read_bytes())))
        if failures:
            first = min(failures)
            raise carry.raised(first, self.loads, self.processes[first.rank].pid)
        if any(codes):
            rank = next(rank for rank, code in enumerate(codes) if code)
            code = codes[rank] or 0
            cause = KeyboardInterrupt() if code == -signal.SIGINT else None
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise RuntimeError(f"The process of rank {rank} ended with {how}; the others were ended too.") from cause


def _pump(pipe: Any, stream: Any) -> None:
    with pipe:
        for line in pipe:
            with contextlib.suppress(Exception):  # the cell may be gone
                stream.write(line.decode(errors="replace"))
                stream.flush()


# ---------------------------------------------------------------------------------------------- in the fresh process


def child(name: str, rank: int, parent: int) -> None:
    """What one of the fresh processes does."""
    end_with(parent)
    pickler, folder = importlib.import_module("cloudpickle"), Path(name)
    try:
        with (folder / "call").open("rb") as file:
            about = pickle.load(file)
            sys.argv[:] = about["argv"]
            if about["installed"]:
                importlib.import_module("leyden.compat").install()
            call = file.read()
        world = replace(about["world"], rank=rank, local_rank=rank)
        found = perform(pickler, call, world)
        if rank == 0:
            temporary = folder / "report.part"
            temporary.write_bytes(found)
            temporary.rename(folder / "report")
    except BaseException as error:
        temporary = folder / f"part{rank}"
        temporary.write_bytes(pickle.dumps(tuple(carry.failure(rank, error, pickler.dumps))))
        temporary.rename(folder / f"failed{rank}")
        sys.stdout.flush()
        os._exit(1)  # the others wait for nothing from this one any more
    collective.part()


def perform(pickler: Any, call: bytes, world: World) -> bytes:
    """Run a call that was packed as one of ``world``; return what rank 0 has to report, nothing elsewhere."""
    carry.become(world, max((os.cpu_count() or 1) // world.local_size, 1))
    trainer, entry, arguments = pickler.loads(call)
    module = carry.uncompiled(arguments["model"])
    trainer.strategy.assign(trainer.strategy.parallel_devices, world.nodes)
    returned = getattr(trainer, entry)(**arguments)
    report: bytes = b""
    if world.rank == 0:
        report = pickler.dumps(carry.report(trainer, module, returned, pickler.dumps))
    trainer.strategy.barrier("call")
    return report
