# SPDX-License-Identifier: Apache-2.0
"""``leyden run``: start a script or module as python would, with Lightning's and 2019's import names answered by Leyden."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from leyden.compat.process import environment
from leyden.errors import MisconfigurationException


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what python itself takes: a script, or ``-m`` and a module, and the program's own arguments."""
    parser.usage = "leyden run script.py [arguments]\n       leyden run -m package.module [arguments]"
    parser.prefix_chars = "\0"  # no word is an option of ours: all belong to python and to the program
    parser.add_argument("program", nargs=argparse.REMAINDER, help="what would follow python on the command line")
    parser.set_defaults(print_help=parser.print_help)


def main(options: argparse.Namespace) -> int:
    """Let python take the place of this process: what it runs is the program and nothing of ours.

    Returns:
        The exit status of the program, where a process cannot be replaced (Windows); elsewhere this does not return.

    Raises:
        MisconfigurationException: if nothing is named, or this python ignores its environment.
    """
    program = list(options.program)
    if program in (["-h"], ["--help"]):
        options.print_help()
        return 0
    if not program or program == ["-m"] or (program[0].startswith("-") and program[0][:2] not in ("-m", "-c")):
        raise MisconfigurationException(
            "What is to run? Name a script, or -m and a module; its arguments follow. Options of python itself go to python:"
            " python -O -m leyden run script.py."
        )
    if sys.flags.ignore_environment or sys.flags.no_site:
        raise MisconfigurationException(
            "This python was started with -E, -I or -S, and would ignore what tells it of the import names (PYTHONPATH)."
            " Start it without, or call leyden.compat.install() at the head of the program."
        )
    command = [sys.executable, *_options_of_python(), *program]
    if os.name != "nt":
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, command, environment(os.environ))
    return subprocess.call(command, env=environment(os.environ))


def _options_of_python() -> list[str]:
    """The options with which this python itself was started, such as ``-W error`` or ``-O``."""
    words = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]
    found = words[:-1]  # the last one is the script or the module that we are
    return found[:-1] if found[-1:] in (["-m"], ["-c"]) else found
