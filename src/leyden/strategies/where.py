# SPDX-License-Identifier: Apache-2.0
"""What a process of a run does just now, read by a thread beside the loop: from counters that exist, and from its stack.

The loop notes nothing for it, so that an ordinary batch pays nothing.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

OURS = "leyden-"
"""How the names of our own threads begin."""
_STAGES = {
    "train": "training", "validate": "validation", "sanity_check": "the sanity check", "test": "the test",
    "predict": "prediction",
}  # fmt: skip


class Where:
    """Where a run stands in this process.

    Args:
        progress: The counters of the fit.
        module: Returns the module of the run, whose Trainer is asked; None as long as there is none.
    """

    def __init__(self, progress: Any = None, module: Callable[[], Any] = lambda: None) -> None:
        self.progress, self.module = progress, module
        self.main = threading.main_thread().ident or 0

    @property
    def _trainer(self) -> Any:
        found = getattr(self.module(), "_trainer_ref", None)
        return None if found is None else found()

    def marker(self) -> tuple[Any, ...]:
        """What changes as long as the run goes on: stage, counters, hook, exchanges that were begun."""
        trainer, progress = self._trainer, self.progress
        found: list[Any] = [exchanges(), getattr(progress, "batches", 0), getattr(progress, "tail", "")]
        with contextlib.suppress(AttributeError):  # whatever is half built
            results = trainer.results
            found += [trainer.state.fn, trainer.state.stage, progress.epoch, getattr(results.active, "hook", None)]
            found += [loop.batch_idx for loop in _evaluations(trainer)]
            found.append(str(getattr(trainer.predict_loop, "current_batch_indices", None)))
        return tuple(found)

    def position(self) -> list[int]:
        """Epoch and number of batches: the ranks of a run can be compared by it."""
        return [int(getattr(self.progress, "epoch", 0)), int(getattr(self.progress, "batches", 0))]

    def told(self) -> tuple[str, str]:
        """Return the last event in words, and the exchange that the main thread waits in, ``""`` if it waits in none."""
        doing, exchange = activity(sys._current_frames().get(self.main))  # noqa: SLF001  # no other way
        return self.stage() + doing, exchange

    def stage(self) -> str:
        """In which stage and batch the run is, in words, with a colon; ``""`` where that is not known."""
        with contextlib.suppress(AttributeError):
            trainer, progress = self._trainer, self.progress
            now = str(trainer.state.stage)
            if now in _STAGES:
                at = f"epoch {progress.epoch}, batch {progress.batch_idx}"
                evaluation = next((loop for loop in _evaluations(trainer) if loop.batch_idx), None)
                if now in ("validate", "test") and evaluation is not None:
                    at = f"batch {evaluation.batch_idx}" + (f" after {at}" if str(trainer.state.fn) == "fit" else "")
                return f"in {_STAGES[now]}, {at}: "
            return f"in Trainer.{trainer.state.fn}: "
        return ""


def _evaluations(trainer: Any) -> list[Any]:
    return [trainer.fit_loop.validation, trainer.validate_loop, trainer.test_loop]


def exchanges() -> int:
    """How many collectives this process has begun: those of the ranks of one program keep step with each other."""
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_initialized():
        return 0
    count = 0
    for group in list(dist.distributed_c10d._world.pg_map):  # noqa: SLF001  # torch has no public list of its groups
        backends = {}
        with contextlib.suppress(Exception):
            backends = {id(one): one for one in (group._get_backend(device) for device in group._device_types)}  # noqa: SLF001  # as above
        for backend in backends.values():
            with contextlib.suppress(RuntimeError):  # a backend that does not count, or has not begun
                count += backend._get_sequence_number_for_group()  # noqa: SLF001  # as above
    return count


def activity(frame: FrameType | None) -> tuple[str, str]:
    """Say what a thread does that stands in ``frame``; and in which exchange it waits, ``""`` if in none."""
    frames = []
    while frame is not None:
        frames.append((str(frame.f_globals.get("__name__", "")), frame.f_code.co_name, frame))
        frame = frame.f_back
    inner: list[tuple[str, str]] = []
    for home, name, _ in frames:  # what torch does just now, for whoever called it
        if not home.startswith(
            ("torch.", "pickle", "threading", "queue", "multiprocessing", "selectors", "contextlib")
        ):
            break
        inner.append((home, name))
    user = _user_frames(frames)
    hook = f" in {_named(user[-1])}" if user else _ours(frames)
    calls = [name for home, name in inner if home == "torch.distributed.distributed_c10d" and not name.startswith("_")]
    if calls:
        return f"waits in the exchange {calls[-1]!r}{hook}", calls[-1]
    if any(name == "backward" for home, name in inner if home.startswith(("torch.autograd", "torch._tensor"))):
        return "in backward, which computes gradients and waits for those of other ranks", ""
    if any(home.startswith(("torch.utils.data", "multiprocessing", "queue")) for home, _ in inner):
        return f"waits for data from the workers of a DataLoader{hook}", ""
    if any(home.startswith(("torch._dynamo", "torch._inductor")) for home, _ in inner):
        return f"compiles{hook}", ""
    if any(name == "save_checkpoint" and home == "leyden.trainer" for home, name, _ in frames):
        return "saves a checkpoint", ""
    if user:
        inside = user[0]
        at = f"{os.path.basename(inside.f_code.co_filename)}:{inside.f_lineno}"
        return f"{hook.strip()} ({at})", ""
    if any(home.startswith("torch.utils.data") for home, _, _ in frames):
        return "loads data", ""
    return hook.strip() or "outside of Python's main thread", ""


def _user_frames(frames: list[tuple[str, str, FrameType]]) -> list[FrameType]:
    """The frames of the user's code that a run has called, the innermost first."""
    inside = next((i for i, (home, _, _) in enumerate(frames) if home.startswith("leyden.trainer")), len(frames))
    return [
        frame for home, _, frame in frames[:inside]
        if not home.startswith(("leyden.", "torch.", "contextlib", "threading"))
    ]  # fmt: skip


def _ours(frames: list[tuple[str, str, FrameType]]) -> str:
    """The function of ours that stands for what is done: the innermost above what only carries it out."""
    for home, name, _ in frames:
        if home.startswith("leyden.") and not home.startswith(("leyden.runtime", "leyden.strategies")):
            return f" in {name}"
    return ""


def _named(frame: FrameType) -> str:
    name = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)  # newer Pythons know the class as well
    return f"{name.rpartition('<locals>.')[2]}()"


def stacks() -> str:
    """Return the stacks of all threads of this process, the main thread first; ours are left out."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    found = sys._current_frames()  # noqa: SLF001  # no other way
    text = []
    for ident in sorted(found, key=lambda ident: ident != main):
        name = names.get(ident, "not Python's")
        if not name.startswith(OURS):
            text += [f"Thread {name!r}:\n", *traceback.format_stack(found[ident])]
    return "".join(text)


def home() -> str:
    """Name this process and its machine, for ``is_there``; ``""`` where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        spaces = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "net")]
        return " ".join([boot, *spaces, str(os.getpid()), _began(os.getpid()) or ""])
    except OSError:
        return ""


def is_there(named: str | None) -> bool:
    """Whether the process that ``home`` has named is one of this machine, and has not ended."""
    mine = home()
    if not named or not mine or named.split()[:3] != mine.split()[:3]:
        return False
    pid, began = named.split()[3:]
    return _began(int(pid)) == began


def _began(pid: int) -> str | None:
    """When a process was started, in ticks; None for one that is gone, or that has ended and is not yet waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def workers() -> str:
    """Say how the child processes of this one stand, one a line; those that load data print their stacks themselves."""
    lines = []
    for child in multiprocessing.active_children():
        if child.pid is None:
            continue
        state = ""
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{child.pid}/status").read_text(encoding="utf-8", errors="replace")
            state = next((line.split(None, 1)[1] for line in status.splitlines() if line.startswith("State:")), "")
        lines.append(f"Process {child.name!r} ({child.pid}), which this rank has started: {state or 'unknown'}\n")
        data = sys.modules.get("leyden.data.workers")
        if data is not None and child.pid in data.shown_by_signal():
            with contextlib.suppress(OSError):
                os.kill(child.pid, data.SHOW)
    return "".join(lines)


__all__ = ["Where", "activity", "exchanges", "home", "is_there", "stacks", "workers"]
