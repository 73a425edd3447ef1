# SPDX-License-Identifier: Apache-2.0
"""Run trials on this machine: each in a process of its own, so many at a time, none left behind."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import multiprocessing
import os
import pickle
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any

from leyden.errors import MisconfigurationException
from leyden.runtime.ranks import rank_zero_info
from leyden.search import trial_process
from leyden.search.board import Board, make_board
from leyden.search.trials import at_least_one

_GRACE = 3.0
"""Seconds that a trial has, after Ctrl-C, to end by itself."""

_utf8 = codecs.getincrementaldecoder("utf-8")
_GPU = re.compile(r"\d+|(GPU|MIG)-[0-9A-Za-z/-]+")


class TrialResult(tuple[Any, Any]):
    """The pair ``(hparams, value)`` of one trial, with more as attributes.

    Attributes:
        hparams: The trial's namespace.
        value: What the function returned (tensors on the CPU); None if it failed.
        error: None, or how it failed: the traceback, or by which signal the process was killed.
        seconds: How long it took.
    """

    error: str | None
    seconds: float

    def __new__(cls, hparams: Any, value: Any, error: str | None = None, seconds: float = 0.0) -> TrialResult:
        """Make the pair."""
        self = super().__new__(cls, (hparams, value))
        self.error, self.seconds = error, seconds
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:  # of a plain tuple: the items alone
        return (*self, self.error, self.seconds)

    @property
    def hparams(self) -> Any:
        """The trial's namespace."""
        return self[0]

    @property
    def value(self) -> Any:
        """What the function returned; None if it failed."""
        return self[1]


@dataclass
class Place:
    """One of the places where trials run, one at a time: what the function gets beside the trial, and what it sees."""

    args: tuple[Any, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    name: str = ""


def places(count: int, argument: str, numbered: bool) -> list[Place]:
    """Return ``count`` places on the CPU, which share its cores; ``numbered`` ones pass their number to the function."""
    at_least_one(count, argument)
    environment = {}
    if "OMP_NUM_THREADS" not in os.environ:
        # else each trial would start a thread for every core, and they would wait for each other
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
    return [Place((number,) if numbered else (), environment) for number in range(count)]


def gpu_places(gpu_ids: object, nb_workers: int | None = None) -> list[Place]:
    """Return one place for each set of GPUs in ``gpu_ids``, such as ``["1", "0, 2"]``; for the first ``nb_workers`` only."""
    if nb_workers is not None:
        at_least_one(nb_workers, "nb_workers")
    example = 'such as ["0", "1"] for two trials at a time, or ["0,1"] for one trial on two GPUs'
    if isinstance(gpu_ids, (str, bytes)) or not isinstance(gpu_ids, Sequence) or not gpu_ids:
        raise MisconfigurationException(f"gpu_ids={gpu_ids!r}: must be a list with one entry a worker, {example}.")
    sets = []
    for entry in gpu_ids:
        ids = [part.strip() for part in str(entry).split(",")]
        if type(entry) is bool or not all(_GPU.fullmatch(one) for one in ids) or len(set(ids)) < len(ids):
            raise MisconfigurationException(
                f"gpu_ids={gpu_ids!r}: {entry!r} is not a list of different GPU numbers. Give one entry a worker, {example}."
            )
        sets.append(",".join(ids))
    _check_present(sets)
    return [Place((ids,), {"CUDA_VISIBLE_DEVICES": ids}, f"GPU {ids}") for ids in sets[:nb_workers]]


def _check_present(sets: Sequence[str]) -> None:
    """Raise where a number names no GPU that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        allowed = {one.strip() for one in visible.split(",")} - {""}
        source = f"CUDA_VISIBLE_DEVICES={visible!r} is set"
    else:
        import torch  # noqa: PLC0415  # counting needs it, and no other kind of search does

        allowed = {str(index) for index in range(torch.cuda.device_count())}  # opens no device
        source = f"this machine has {len(allowed)} GPUs"
        if not allowed:
            rank_zero_info("No GPU was found on this machine; the trials get their CUDA_VISIBLE_DEVICES all the same.")
            return
    missing = sorted({one for ids in sets for one in ids.split(",")} - allowed)
    if any(one.isdigit() for one in missing) and all(one.isdigit() for one in allowed):
        raise MisconfigurationException(
            f"gpu_ids={list(sets)!r}: there is no GPU {', '.join(missing)}; {source}. Allowed:"
            f" {', '.join(sorted(allowed)) or 'none'}."
        )


@dataclass
class _Trial:
    """A trial that runs."""

    index: int
    place: Place
    process: BaseProcess
    messages: Connection
    output: Connection
    outcome: tuple[str, Any] | None = None
    unfinished_line: str = ""
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: _utf8(errors="replace"))
    open: set[Connection] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.open = {self.messages, self.output}


def run_trials(
    fn: Callable[..., Any],
    trials: Sequence[argparse.Namespace],
    free: Sequence[Place],
    monitor: str | None = None,
    mode: str = "min",
) -> list[TrialResult]:
    """Run ``fn`` on each of ``trials``, one at a time in each place.

    Args:
        fn: A function at the top level of a module. It is called with the trial and what the place gives.
        trials: Namespaces; must survive pickling.
        free: The places.
        monitor: See :func:`leyden.search.board.objective`.
        mode: ``"min"`` or ``"max"``.

    Returns:
        The results in the order of ``trials``. A trial that raised or whose process died has ``error`` set; the others go
        on. Whatever ends this function, Ctrl-C too, ends all processes of its trials first.

    Raises:
        MisconfigurationException: if ``fn`` or a trial cannot be sent to another process, or ``mode`` is unknown.
    """
    trial_process.stop_import()
    if mode not in ("min", "max"):
        raise MisconfigurationException(f"mode={mode!r}: must be 'min' or 'max'.")
    check_function(fn)
    payloads = [_payload(fn, trial, index) for index, trial in enumerate(trials)]
    waiting = deque(range(len(trials)))
    available = deque(free)
    running: list[_Trial] = []
    results: dict[int, TrialResult] = {}
    board = make_board(_differences(trials), monitor, mode)
    try:
        while waiting or running:
            while waiting and available:
                index, place = waiting.popleft(), available.popleft()
                running.append(_start(index, place, payloads[index]))
                board.started(index, place.name)
            for trial in _progress(running, board):
                running.remove(trial)
                value, error = _outcome(trial)
                seconds = board.finished(trial.index, value, error)
                results[trial.index] = TrialResult(trials[trial.index], value, error, seconds)
                available.append(trial.place)
    finally:
        try:
            _stop(running)
        finally:
            board.close()
    return [results[index] for index in range(len(trials))]


def check_function(fn: Any) -> None:
    """Raise where another process could not import ``fn``."""
    remedy = "Define it with `def` at the top level of a .py file, so that the process of a trial can import it."
    if not callable(fn):
        raise MisconfigurationException(f"fn={fn!r} is not a function.")
    if getattr(fn, "__module__", None) == "__main__" and trial_process.script() is None:
        raise MisconfigurationException(
            f"fn={fn!r} was defined in an interactive session or a __main__.py, which no other process imports. {remedy}"
        )
    try:
        pickle.dumps(fn)
    except Exception as error:
        name = getattr(fn, "__qualname__", repr(fn))
        kind = "a lambda" if "<lambda>" in name else "defined inside a function" if "<locals>" in name else None
        reason = f"is {kind} and cannot" if kind else f"cannot ({error})"
        raise MisconfigurationException(f"fn={name} {reason} be sent to another process. {remedy}") from error


def _payload(fn: Callable[..., Any], trial: argparse.Namespace, index: int) -> Any:
    try:
        pickle.dumps(trial)
    except Exception as error:
        raise MisconfigurationException(
            f"Trial {index} cannot be sent to another process: {error}. Options must hold plain values; look for one that"
            " holds a lambda, an open file or the like."
        ) from error
    return fn, trial


def _differences(trials: Sequence[argparse.Namespace]) -> list[Mapping[str, Any]]:
    """Return, for each trial, the values that are not the same in all."""
    names = list(vars(trials[0])) if trials else []
    varied = [name for name in names if len({repr(vars(trial).get(name)) for trial in trials}) > 1]
    return [{name: vars(trial)[name] for name in varied if name in vars(trial)} for trial in trials]


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables for as long as it takes to start a process, which inherits them before it imports anything."""
    former = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Keep multiprocessing from importing the script in the process that it starts: ``trial_process`` does so itself."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _start(index: int, place: Place, payload: tuple[Callable[..., Any], argparse.Namespace]) -> _Trial:
    context = multiprocessing.get_context("spawn")
    messages, send = context.Pipe(duplex=False)
    output, print_to = context.Pipe(duplex=False)
    fn, hparams = payload
    data = pickle.dumps((fn, (hparams, *place.args)))
    # not a daemon: trials may start processes, such as the workers of a DataLoader
    arguments = (trial_process.script(), data, send, print_to)
    process = context.Process(target=trial_process.run, args=arguments, name=f"trial-{index}", daemon=False)
    with _environment(place.environment), _without_main():
        process.start()
    send.close()
    print_to.close()
    return _Trial(index, place, process, messages, output)


def _progress(running: Sequence[_Trial], board: Board) -> list[_Trial]:
    """Wait until something happens, at most a second; pass output on; return the trials whose process has ended."""
    sources: list[Any] = [trial.process.sentinel for trial in running]
    sources += [connection for trial in running for connection in trial.open]
    ready = set(wait(sources, timeout=1.0))
    ended = []
    for trial in running:
        # the pipe behind the sentinel stays open as long as a process lives that the trial forked and left behind
        over = trial.process.sentinel in ready or trial.process.exitcode is not None
        _read(trial, ready, board)
        if over:
            while _read(trial, set(wait(list(trial.open), timeout=0)), board):
                pass  # what it had still sent before it ended
            if trial.unfinished_line:
                board.output(trial.index, trial.unfinished_line)
            ended.append(trial)
            _reap(trial)
    board.refresh()
    return ended


def _read(trial: _Trial, ready: set[Any], board: Board) -> bool:
    """Take in what has come from a trial; return whether there was anything."""
    found = trial.open & ready
    if trial.messages in found:
        try:
            kind, value = pickle.loads(trial.messages.recv_bytes())
        except (EOFError, OSError):  # the end, or a message cut short by a kill
            trial.open.discard(trial.messages)
        except Exception as error:
            trial.outcome = ("error", f"What the trial returned cannot be read back: {type(error).__name__}: {error}")
        else:
            trial.outcome = (kind, value)
    if trial.output in found:
        data = os.read(trial.output.fileno(), 65536)
        if not data:
            trial.open.discard(trial.output)
        *lines, trial.unfinished_line = (trial.unfinished_line + trial.decoder.decode(data)).split("\n")
        for line in lines:
            board.output(trial.index, line.rstrip("\r").rsplit("\r", 1)[-1])
    return bool(found)


def _outcome(trial: _Trial) -> tuple[Any, str | None]:
    """Return what the trial returned and None, or None and what went wrong."""
    if trial.outcome is not None:
        kind, value = trial.outcome
        return (value, None) if kind == "result" else (None, value)
    code = trial.process.exitcode or 0
    if code < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
            hint = " That is what the kernel does when memory runs out." if name == "SIGKILL" else ""
            return None, f"The process was killed by {name}.{hint}"
        return None, f"The process was killed by signal {-code}."
    return None, f"The process ended with exit code {code} and returned nothing."


def _end_group(trial: _Trial) -> None:
    """Kill the process of a trial and whatever it started. While it is not joined, its number is not given away."""
    pid = trial.process.pid
    if pid is not None and hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
    trial.process.kill()


def _reap(trial: _Trial) -> None:
    _end_group(trial)
    trial.process.join()
    trial.messages.close()
    trial.output.close()


def _stop(running: Sequence[_Trial]) -> None:
    """End the trials that still run: first as Ctrl-C does, then, or at the next Ctrl-C, by force."""
    try:
        for trial in running:
            if trial.process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(trial.process.pid, signal.SIGINT)
        deadline = time.monotonic() + _GRACE
        left = {trial.process.sentinel for trial in running}
        while left and (seconds := deadline - time.monotonic()) > 0:
            left -= set(wait(list(left), timeout=seconds))
    finally:
        for trial in running:
            _reap(trial)
