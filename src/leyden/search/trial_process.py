# SPDX-License-Identifier: Apache-2.0
"""The inside of a trial's process: run the function, send back what it returned or how it failed."""

from __future__ import annotations

import inspect
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def call(fn: Callable[..., Any], *args: Any) -> Any:
    """Call ``fn`` with as many of ``args`` as it takes, at least one."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # a builtin
        return fn(*args)
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return fn(*args)
    count = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
    return fn(*args[: max(count, 1)])


def run(payload: bytes, messages: Connection, output: Connection) -> None:
    """Run one trial, in a process of its own.

    Args:
        payload: The function and its arguments, pickled.
        messages: Where the outcome goes: first ``("started", None)``, then ``("result", value)`` or ``("error", text)``.
        output: Takes the place of stdout and stderr.
    """
    if hasattr(os, "setsid"):
        # a group of its own: what the trial starts can be ended with it, and Ctrl-C reaches only the parent, which
        # knows what to do
        os.setsid()
        threading.Thread(target=_end_with_parent, daemon=True).start()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    output.close()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    messages.send_bytes(pickle.dumps(("started", None)))
    try:
        fn, args = pickle.loads(payload)
        message = pickle.dumps(("result", _on_cpu(call(fn, *args))))
    except BaseException as error:  # a KeyboardInterrupt or SystemExit ends a trial, too
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next  # the frames of this file say nothing to the user
        message = pickle.dumps(("error", "".join(traceback.format_exception(type(error), error, trace))))
    messages.send_bytes(message)
    messages.close()


def _end_with_parent() -> None:
    """Wait until the parent is gone, however it went, and end this process and all that it started."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.killpg(os.getpid(), signal.SIGKILL)


def _on_cpu(value: Any) -> Any:
    """Return ``value`` with its tensors on the CPU and without their graphs, so that it can leave the process."""
    if "torch" not in sys.modules:
        return value
    from leyden.tree import tree_map  # noqa: PLC0415  # a trial without torch shall not wait for it

    return tree_map(lambda tensor: tensor.detach().cpu(), value)
