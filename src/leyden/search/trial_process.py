# SPDX-License-Identifier: Apache-2.0
"""The inside of a trial's process: import the script, run the function, send back what it returned or how it failed."""

from __future__ import annotations

import importlib.util
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
from pathlib import Path
from types import ModuleType
from typing import Any

Script = tuple[str, str]
"""What python was started with: ``("path", file)`` or ``("module", name)``."""

_importing = False
"""Whether this process is on its way to a trial, and imports the script that the search stands in."""


class SearchBegins(BaseException):
    """Ends the import of a script where it would begin, in the process of a trial, the search that it is a trial of."""


def script() -> Script | None:
    """Return the script of this process, which a trial's process has to import; None if there is none to import."""
    main = sys.modules["__main__"]
    spec, path = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    if spec is not None:
        return None if spec.name.rpartition(".")[2] == "__main__" else ("module", spec.name)
    return None if path is None or not os.path.isfile(path) else ("path", os.path.abspath(path))


def import_script(found: Script) -> None:
    """Import a script under the name that multiprocessing gives it, up to the search that it begins, if it does so unguarded.

    multiprocessing would do the same, but for the last part: a script without ``if __name__ == "__main__":`` would fail.
    """
    global _importing  # a state of the process
    module = ModuleType("__mp_main__")
    kind, name = found
    if kind == "module":
        spec = importlib.util.find_spec(name)
        code = getattr(getattr(spec, "loader", None), "get_code", lambda _: None)(name)
        if spec is None or code is None:
            raise ImportError(f"There is no code of the module {name!r}, with which python was started.")
        module.__spec__, module.__file__, module.__package__ = spec, spec.origin, spec.parent
    else:
        module.__file__ = name
        code = compile(Path(name).read_bytes(), name, "exec")
    sys.modules["__main__"] = sys.modules["__mp_main__"] = module
    _importing = True
    try:
        exec(code, vars(module))  # the user's own program
    except SearchBegins:
        pass
    finally:
        _importing = False


def stop_import() -> None:
    """Called where a search begins: not in the process of a trial that only imports its script."""
    if _importing:
        raise SearchBegins


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


def run(found: Script | None, payload: bytes, messages: Connection, output: Connection) -> None:
    """Run one trial, in a process of its own.

    Args:
        found: What :func:`script` returned in the process that searches.
        payload: The function and its arguments, pickled.
        messages: Where the outcome goes: ``("result", value)`` or ``("error", text)``.
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
    messages.send_bytes(_outcome(found, payload))
    messages.close()


def _outcome(found: Script | None, payload: bytes) -> bytes:
    """Run the trial; return the message that says how it went."""
    try:
        if found is not None:
            import_script(found)
        fn, args = pickle.loads(payload)
    except BaseException as error:  # a script may call sys.exit
        return _failure(error, "The process of a trial imports the script anew, and could not. Define the function, and the"
                        " classes of option values, at the top level of the script and ahead of the search; start the"
                        " search under `if __name__ == '__main__':`.")  # fmt: skip
    try:
        value = _on_cpu(call(fn, *args))
    except SystemExit as error:
        if error.code:
            return _failure(error)
        value = None  # the trial ended itself, and well
    except BaseException as error:  # a KeyboardInterrupt ends a trial, too
        return _failure(error)
    try:
        return pickle.dumps(("result", value))
    except Exception as error:
        kind = type(value).__name__
        return _failure(error, f"The function returned a {kind} that cannot be sent back. Return numbers, tensors or plain"
                        " data, and write the rest to a file.")  # fmt: skip


def _failure(error: BaseException, remedy: str = "") -> bytes:
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next  # the frames of this file say nothing to the user
    text = "".join(traceback.format_exception(type(error), error, trace))
    return pickle.dumps(("error", f"{text}{remedy}"))


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
