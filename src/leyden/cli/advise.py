# SPDX-License-Identifier: Apache-2.0
"""``leyden advise script.py``: what would make the fit of a script faster, measured on copies; the script stays as it is."""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import os
import runpy
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from leyden.compat.process import environment
from leyden.errors import LeydenError
from leyden.trainer import Trainer

COULD_NOT_RUN = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Run the script up to its first Trainer.fit, and in its place fit copies for a few seconds each: as it is, compiled,"
        " with fused optimizers, in bf16, in channels_last, with more workers, with TF32, with CUDA graphs, and with all"
        " that gained. The script needs no change, and may import Lightning's names. What follows the fit in it does not"
        " run; nothing is logged or saved. Exit status: 0, or 2 if it could not be measured."
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="for each of them (default: 3)")
    parser.add_argument("--json", metavar="FILE", help="write the rows to this file too")
    parser.add_argument("script", help="a Python script that calls Trainer.fit")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")


def main(options: argparse.Namespace) -> int:
    """Let a python that has Lightning's import names take the place of this process, and advise there.

    Returns:
        The exit status, where a process cannot be replaced (Windows) or there is no such script.
    """
    if not os.path.isfile(options.script):
        print(f"leyden advise: there is no script {options.script!r}.", file=sys.stderr)
        return COULD_NOT_RUN
    code = "import sys; from leyden.cli.advise import child; child(*sys.argv[1:])"
    target = os.path.abspath(options.json) if options.json else ""
    words = [sys.executable, "-c", code, repr(options.seconds), target, options.script, *options.arguments]
    if os.name != "nt":
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, words, environment(os.environ))
    return subprocess.call(words, env=environment(os.environ))


def child(seconds: str, target: str, *command: str) -> None:
    """Run the script with its first ``fit`` answered by the advisor; the inside of the process that ``main`` starts."""
    original = Trainer.fit

    @functools.wraps(original)
    def fit(self: Trainer, *args: Any, **kwargs: Any) -> None:
        Trainer.fit = original  # type: ignore[method-assign]  # the advisor fits too
        given = inspect.signature(original).bind(self, *args, **kwargs).arguments
        wanted = {name: given.get(name) for name in ("model", "train_dataloaders", "datamodule")}
        try:
            advice = self.advise(seconds=float(seconds), **wanted)
            if target:
                found = {name: getattr(advice, name) for name in ("rows", "arguments", "lines", "noise", "interrupted")}
                Path(target).write_text(json.dumps(found, indent=1), encoding="utf-8")
        except LeydenError as error:
            print(f"leyden advise: {error}", file=sys.stderr)
            _leave(COULD_NOT_RUN)
        except Exception:
            traceback.print_exc()
            _leave(COULD_NOT_RUN)
        _leave(0)

    Trainer.fit = fit  # type: ignore[method-assign]
    sys.argv = list(command)
    sys.path[0] = os.path.dirname(os.path.abspath(command[0]))
    runpy.run_path(command[0], run_name="__main__")
    print(f"leyden advise: {command[0]} ended without calling Trainer.fit.", file=sys.stderr)
    _leave(COULD_NOT_RUN)


def _leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # nothing else of the script runs, whatever it catches
