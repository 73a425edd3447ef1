# SPDX-License-Identifier: Apache-2.0
"""``leyden fabric run``: Lightning's ``fabric run`` under our name, which is ``leyden run`` with one process or more."""

from __future__ import annotations

import argparse

from leyden.cli import run
from leyden.errors import MisconfigurationException


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what ``leyden run`` takes, behind the word ``run``."""
    run.add_arguments(parser)
    parser.usage = "leyden fabric run [options] script.py [arguments]"


def main(options: argparse.Namespace) -> int:
    """Start the program in as many processes as ``--devices`` says, one if it says nothing; return its exit status.

    Raises:
        MisconfigurationException: for another word than ``run``, and as ``leyden run`` does.
    """
    words = list(options.program)
    if words[:1] in (["-h"], ["--help"]):
        options.print_help()
        return 0
    if words[:1] != ["run"]:
        raise MisconfigurationException(
            f"There is 'leyden fabric run', not 'leyden fabric {' '.join(words[:1])}'. What puts sharded checkpoints"
            " together is in 'leyden ckpt'."
        )
    behind = words[1:]
    wishes, _ = run.split(list(behind))
    options.program = behind if wishes or behind in (["-h"], ["--help"]) else ["--devices=1", *behind]
    return run.main(options)
