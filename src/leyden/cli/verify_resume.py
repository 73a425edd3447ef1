# SPDX-License-Identifier: Apache-2.0
"""``leyden verify-resume script.py``: whether the fit of a script, killed and resumed, is the one that was never killed."""

from __future__ import annotations

import argparse
import functools
import os
import runpy
import sys
from typing import Any

from leyden.compat.process import environment
from leyden.errors import LeydenError
from leyden.loops.studies.probe import Task, watch
from leyden.loops.studies.verify import verify
from leyden.trainer import Trainer

EXACT, DIFFERENT, COULD_NOT_RUN = 0, 1, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Run the script in a fresh process up to its first Trainer.fit, for a few batches, with a checkpoint in the middle;"
        " run it again in another process that goes on from there; compare. The script is not changed and may import"
        " Lightning's names, nothing is logged, no file stays behind. Exit status: 0 exact, 1 different, 2 could not run."
    )
    parser.add_argument(
        "--steps", type=int, default=10, help="training batches (default: 10); the checkpoint is halfway"
    )
    parser.add_argument("script", help="a Python script that calls Trainer.fit")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")


def main(options: Any) -> int:
    """Verify a script; print what was found; return the exit status."""
    code = "import sys; from leyden.cli.verify_resume import child; child(sys.argv[1], sys.argv[2:])"
    if not os.path.isfile(options.script):
        print(f"leyden verify-resume: there is no script {options.script!r}.", file=sys.stderr)
        return COULD_NOT_RUN

    def launch(task: Task) -> list[str]:
        return [sys.executable, "-c", code, str(task.write()), options.script, *options.arguments]

    try:
        # as with ``leyden run``: the script may import Lightning's names
        report = verify(launch, options.steps, environment(os.environ))
    except LeydenError as error:
        print(f"leyden verify-resume: {error}", file=sys.stderr)
        return COULD_NOT_RUN
    print(report)
    return EXACT if report.exact else DIFFERENT


def child(task: str, command: list[str]) -> None:
    """Run the script with its first ``fit`` steered by ``task``; the inside of a process that ``main`` starts."""
    original, job = Trainer.fit, Task.read(task)

    @functools.wraps(original)
    def fit(self: Trainer, *args: Any, **kwargs: Any) -> None:
        names = ("model", "train_dataloaders", "val_dataloaders", "datamodule", "ckpt_path", "weights_only")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        watch(self, functools.partial(original, self), job, **given)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # nothing else of the script runs, whatever it catches

    Trainer.fit = fit  # type: ignore[method-assign]
    sys.argv = command
    sys.path[0] = os.path.dirname(os.path.abspath(command[0]))
    runpy.run_path(command[0], run_name="__main__")
