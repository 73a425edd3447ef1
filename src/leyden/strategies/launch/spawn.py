# SPDX-License-Identifier: Apache-2.0
"""Runs one call in processes that are started for it, and brings back its result; of a Trainer, what it changed too.

For notebooks, interactive sessions and tests: there is no script to run once more, and the caller goes on afterwards with
the trained module in its own process. With ``"fork"`` the processes are copies of this one; with ``"spawn"`` and
``"forkserver"`` they are fresh interpreters, to which everything is pickled.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.spawn import start_processes

from leyden.errors import MisconfigurationException
from leyden.runtime import collective
from leyden.runtime.world import OURS, World
from leyden.tree import leaves, move_to

GRACE = 5.0
"""Seconds that the processes have to end, when one of them has failed."""


def run(trainer: Any, entry: str, arguments: Mapping[str, Any]) -> Any:
    """Run ``trainer.<entry>(**arguments)`` in all processes; return what it returned on rank 0.

    The module has the weights of rank 0 afterwards, and the Trainer its metrics, counters and the state of its callbacks.

    Args:
        trainer: The Trainer, whose strategy says how many processes there are, and how they are started.
        entry: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        arguments: Of the call, among others; ``"model"`` is the module, None the last one.

    Raises:
        torch.multiprocessing.ProcessRaisedException: with the traceback of the process that failed first.
        MisconfigurationException: where processes cannot be started so.
    """
    names = inspect.signature(getattr(type(trainer), entry)).parameters
    arguments = {name: value for name, value in arguments.items() if name in names and name != "self"}
    arguments["model"] = trainer.lightning_module if arguments["model"] is None else arguments["model"]
    if arguments["model"] is None:
        raise MisconfigurationException(
            f"Trainer.{entry}(model=None): this Trainer has not run any module yet. Pass one."
        )
    found = call(trainer.strategy, _entry, trainer, entry, arguments)
    return _take(trainer, _uncompiled(arguments["model"]), found)


def call(strategy: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run ``function(*arguments)`` in as many processes as ``strategy`` has; return what it returned on rank 0.

    Args:
        strategy: Says how many processes there are, and how they are started.
        function: With what it is given, and returns, something that can be pickled; ``strategy`` may be a part of it.
        arguments: Of the call.

    Raises:
        torch.multiprocessing.ProcessRaisedException: with the traceback of the process that failed first.
        MisconfigurationException: where processes cannot be started so.
    """
    method, size = strategy.start_method, strategy.num_processes
    if method == "fork" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise MisconfigurationException(
            "DDPStrategy(start_method='fork') copies this process, but CUDA is in use in it already, and cannot be copied."
            " Restart the session and use nothing on the GPU before fit, or use strategy='ddp_spawn' in a script."
        )
    if strategy.num_nodes > 1:
        raise MisconfigurationException(
            f"DDPStrategy(start_method={method!r}) works on one machine only; for several, write a script and use"
            " strategy='ddp'."
        )
    world = World(size=size, local_size=size, port=collective.serve())
    with tempfile.TemporaryDirectory(prefix="leyden-") as folder:
        report = Path(folder) / "report"
        context = start_processes(  # type: ignore[no-untyped-call]
            _process, (world, _parent(method), strategy, function, arguments, report), size, join=False,
            start_method=method,
        )  # fmt: skip
        _join(context)
        if not report.exists():
            raise RuntimeError("Rank 0 has ended without a result.")
        # written by our own child, in a folder that nobody else can write to
        return torch.load(report, weights_only=False)


def _uncompiled(model: Any) -> Any:
    return getattr(model, "_orig_mod", model)  # what torch.compile returns wraps it


def _parent(method: str) -> int:
    """The process whose end is to end those that it starts; 0 where the kernel would not see it."""
    if method == "forkserver" or threading.current_thread() is not threading.main_thread():
        return 0
    return os.getpid()


def _join(context: Any) -> None:
    """Wait for the processes; the first Ctrl-C is theirs to answer, the second one ends them."""
    interrupted = False
    while True:
        try:
            if context.join(grace_period=GRACE):
                return
        except KeyboardInterrupt:
            if interrupted:
                for process in context.processes:
                    process.kill()
                raise
            interrupted = True


def _process(
    local_rank: int,
    world: World,
    parent: int,
    strategy: Any,
    function: Callable[..., Any],
    arguments: Any,
    report: Path,
) -> None:
    """What one of the processes does."""
    _end_with(parent)
    world = replace(world, rank=local_rank, local_rank=local_rank)
    os.environ.update({**world.environment(local_rank), OURS: "spawn"})
    # a copied process must not use the threads of its parent, which are not there
    torch.set_num_threads(1 if strategy.start_method == "fork" else max((os.cpu_count() or 1) // world.size, 1))
    strategy.assign(strategy.parallel_devices, 1)
    for item in leaves(arguments):
        if isinstance(item, nn.Module):
            _own_memory(item)
    returned = function(*arguments)
    if local_rank == 0:
        temporary = report.with_suffix(".part")
        torch.save(returned, temporary)
        temporary.rename(report)
    strategy.barrier("spawn")
    collective.part()


def _entry(trainer: Any, entry: str, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """What one of the processes does for a Trainer."""
    returned = getattr(trainer, entry)(**arguments)
    return _report(trainer, _uncompiled(arguments["model"]), returned) if trainer.is_global_zero else None


def _end_with(parent: int) -> None:
    """Let the kernel end this process when the one that started it is gone, however it went."""
    if sys.platform == "linux" and parent:
        import ctypes  # noqa: PLC0415  # only in a process that was started so

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:  # it went while this process began
            os._exit(1)
    # a run answers it; torch's processes leave it to the one that started them
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _own_memory(module: nn.Module) -> None:
    """Give this process weights of its own: pickled tensors lie in memory that the processes share."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()


_KEPT = ("callback", "logged", "bar")


def _report(trainer: Any, module: nn.Module, returned: Any) -> dict[str, Any]:
    """What the process that called wants to know."""
    return {
        "weights": move_to(dict(module.state_dict()), torch.device("cpu")),
        "metrics": {name: move_to(dict(getattr(trainer.results, name)), torch.device("cpu")) for name in _KEPT},
        "progress": trainer.progress.state_dict(),
        "state": (trainer.state.status, trainer.state.fn),
        "history": trainer.history,
        "callbacks": [_picklable(vars(callback)) for callback in trainer.callbacks],
        "should_stop": trainer.should_stop,
        "returned": move_to(returned, torch.device("cpu")),
    }


def _picklable(attributes: Mapping[str, Any]) -> dict[str, Any]:
    import pickle  # noqa: PLC0415  # only here

    found = {}
    for name, value in attributes.items():
        with contextlib.suppress(Exception):
            pickle.dumps(value)
            found[name] = value
    return found


def _take(trainer: Any, module: Any, found: Mapping[str, Any]) -> Any:
    """Bring the results of rank 0 into this process; return what the call returned there."""
    module.load_state_dict(found["weights"])
    module.trainer = trainer
    trainer.strategy.connect(module)
    for name in _KEPT:
        setattr(trainer.results, name, found["metrics"][name])
    trainer.progress.load_state_dict(found["progress"])
    trainer.state.status, trainer.state.fn = found["state"]
    trainer.history, trainer.should_stop = found["history"], found["should_stop"]
    for callback, attributes in zip(trainer.callbacks, found["callbacks"], strict=False):
        vars(callback).update(attributes)
    return found["returned"]
