# SPDX-License-Identifier: Apache-2.0
"""``leyden plan script.py``: what each strategy would need for the fit of a script, on paper; nothing is trained."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from leyden.cli import first_fit
from leyden.loops.studies.footprint import first_batch
from leyden.trainer import Trainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Run the script up to its first Trainer.fit, and in its place print a table: for each strategy the bytes on each"
        " device (weights, gradients, optimizer, activations), what travels for an update, and what fits. The model gets"
        " no memory for it, no device is used and no process started. The script needs no change, and may import"
        " Lightning's names. What follows the fit in it does not run. Exit status: 0, or 2 if there is no plan."
    )
    parser.add_argument("--devices", type=int, help="on each node (default: as many as the script's Trainer)")
    parser.add_argument("--nodes", type=int, help="how many (default: as many as the script's Trainer)")
    parser.add_argument("--memory", help="of a device, such as 80GB (default: that of this machine's GPU)")
    parser.add_argument("--json", metavar="FILE", help="write the rows to this file too")
    parser.add_argument("script", help="a Python script that calls Trainer.fit")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")


def main(options: argparse.Namespace) -> int:
    """Let a python that has Lightning's import names take the place of this process, and plan there.

    Returns:
        The exit status, where a process cannot be replaced (Windows) or there is no such script.
    """
    wanted = {name: getattr(options, name) for name in ("devices", "nodes", "memory")}
    target = os.path.abspath(options.json) if options.json else ""
    return first_fit.main("plan", [json.dumps(wanted), target], options.script, options.arguments)


def child(wanted: str, target: str, *command: str) -> None:
    """Run the script with its first ``fit`` answered by the plan; the inside of the process that ``main`` starts."""

    def answer(trainer: Trainer, given: dict[str, Any]) -> None:
        found = trainer.plan(given["model"], batch=_first_batch(given), **json.loads(wanted))
        if target:
            names = ("rows", "recommended", "sentence", "write", "unknown", "memory")
            Path(target).write_text(json.dumps({name: getattr(found, name) for name in names}, indent=1), "utf-8")

    first_fit.child("plan", answer, command, _leave)


def _first_batch(given: dict[str, Any]) -> Any:
    """Return the first training batch of a fit with these arguments; nothing else will use its data."""
    source, datamodule = given.get("train_dataloaders"), given.get("datamodule")
    if source is None and datamodule is None:
        source = given["model"].train_dataloader()
    return first_batch(datamodule if source is None else source, set_up=True)


def _leave(status: int) -> None:
    first_fit.leave(status)
