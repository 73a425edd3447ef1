# SPDX-License-Identifier: Apache-2.0
"""``leyden advise script.py``: what would make the fit of a script faster, measured on copies; the script stays as it is."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from leyden.cli import first_fit
from leyden.trainer import Trainer


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
    target = os.path.abspath(options.json) if options.json else ""
    return first_fit.main("advise", [repr(options.seconds), target], options.script, options.arguments)


def child(seconds: str, target: str, *command: str) -> None:
    """Run the script with its first ``fit`` answered by the advisor; the inside of the process that ``main`` starts."""

    def answer(trainer: Trainer, given: dict[str, Any]) -> None:
        wanted = {name: given.get(name) for name in ("model", "train_dataloaders", "datamodule")}
        advice = trainer.advise(seconds=float(seconds), **wanted)
        if target:
            found = {name: getattr(advice, name) for name in ("rows", "arguments", "lines", "noise", "interrupted")}
            Path(target).write_text(json.dumps(found, indent=1), encoding="utf-8")

    first_fit.child("advise", answer, command, _leave)


def _leave(status: int) -> None:
    first_fit.leave(status)
