# SPDX-License-Identifier: Apache-2.0
"""Runs a script up to its first ``Trainer.fit`` and does something else in its place: what ``advise`` and ``plan`` share."""

from __future__ import annotations

import functools
import inspect
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from leyden.compat.process import environment
from leyden.errors import LeydenError
from leyden.trainer import Trainer

COULD_NOT_RUN = 2


def main(command: str, settings: Sequence[str], script: str, arguments: Sequence[str]) -> int:
    """Let a python that has Lightning's import names take the place of this process, and call ``cli.<command>.child`` there.

    Args:
        command: The subcommand, whose module has the name too.
        settings: What ``child`` gets first.
        script: What it gets then.
        arguments: And what is the script's.

    Returns:
        The exit status, where a process cannot be replaced (Windows) or there is no such script.
    """
    if not os.path.isfile(script):
        print(f"leyden {command}: there is no script {script!r}.", file=sys.stderr)
        return COULD_NOT_RUN
    code = f"import sys; from leyden.cli.{command} import child; child(*sys.argv[1:])"
    words = [sys.executable, "-c", code, *settings, script, *arguments]
    if os.name != "nt":
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, words, environment(os.environ))
    return subprocess.call(words, env=environment(os.environ))


def child(
    name: str, answer: Callable[[Trainer, dict[str, Any]], None], command: Sequence[str], left: Callable[[int], None]
) -> None:
    """Run the script with its first ``fit`` answered by ``answer``; the inside of the process that ``main`` starts.

    Args:
        name: The subcommand, for messages.
        answer: Gets the Trainer, and the arguments of ``fit`` by name.
        command: The script and its arguments.
        left: Ends the process with an exit status: 0, or 2 if ``answer`` or the script failed.
    """
    original = Trainer.fit

    @functools.wraps(original)
    def fit(self: Trainer, *args: Any, **kwargs: Any) -> None:
        Trainer.fit = original  # type: ignore[method-assign]  # the answer may fit too
        given = dict(inspect.signature(original).bind(self, *args, **kwargs).arguments)
        try:
            answer(self, given)
        except LeydenError as error:
            print(f"leyden {name}: {error}", file=sys.stderr)
            left(COULD_NOT_RUN)
        except Exception:
            traceback.print_exc()
            left(COULD_NOT_RUN)
        left(0)

    Trainer.fit = fit  # type: ignore[method-assign]
    sys.argv = list(command)
    sys.path[0] = os.path.dirname(os.path.abspath(command[0]))
    runpy.run_path(command[0], run_name="__main__")
    print(f"leyden {name}: {command[0]} ended without calling Trainer.fit.", file=sys.stderr)
    left(COULD_NOT_RUN)


def leave(status: int) -> None:
    """End the process: nothing else of the script runs, whatever it catches."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
