# SPDX-License-Identifier: Apache-2.0
"""``leyden run``: start a script or module as python would, with Lightning's and 2019's import names answered by Leyden.

With options ahead of it, the script runs in several processes, which torchrun starts, watches and starts anew: see
``cli.processes``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from leyden.compat.process import environment
from leyden.errors import MisconfigurationException, did_you_mean

OPTIONS = {
    "--devices": ("devices", "N", "processes of this machine, one a device: a number, 'auto', or devices such as 0,2"),
    "--nproc": ("devices", "N", "the same"),
    "--nodes": ("nodes", "N | MIN:MAX", "machines; with a range the run goes on with those that are there"),
    "--num-nodes": ("nodes", "N | MIN:MAX", "the same"),
    "--node-rank": ("node_rank", "N", "which machine this is, from 0"),
    "--main-address": ("main_address", "HOST", "name or address of the machine with rank 0"),
    "--main-port": ("main_port", "PORT", "a free port of it (one machine: any; several: 29400)"),
    "--max-restarts": ("max_restarts", "N", "how often all processes are started anew when one fails (0)"),
    "--accelerator": ("accelerator", "NAME", "for a Trainer or Fabric that is not told: cpu, gpu, ..."),
    "--strategy": ("strategy", "NAME", "the same: ddp, fsdp, ..."),
    "--precision": ("precision", "NAME", "the same: 32-true, bf16-mixed, ..."),
}
"""Option, the name that it has, what its value is, and one line of help. ``_`` may stand for ``-`` inside a name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what python itself takes: a script, or ``-m`` and a module, and the program's own arguments."""
    parser.usage = (
        "leyden run [options] script.py [arguments]\n       leyden run [options] -m package.module [arguments]"
    )
    lines = [f"  {f'{name} {value}':<27}{text}" for name, (_, value, text) in OPTIONS.items()]
    parser.epilog = "options, ahead of the script; each starts several processes by torchrun:\n" + "\n".join(lines)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.prefix_chars = (
        "\0"  # no word is an option of ours to argparse: those behind the script belong to the program
    )
    parser.add_argument("program", nargs=argparse.REMAINDER, help="what would follow python on the command line")
    parser.set_defaults(print_help=parser.print_help)


def main(options: argparse.Namespace) -> int:
    """Let python take the place of this process: what it runs is the program and nothing of ours.

    Returns:
        The exit status of the program, where several processes run it, or a process cannot be replaced (Windows);
        elsewhere this does not return.

    Raises:
        MisconfigurationException: if nothing is named, an option is wrong, or this python ignores its environment.
    """
    if list(options.program) in (["-h"], ["--help"]):
        options.print_help()
        return 0
    wishes, program = split(list(options.program))
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
    if wishes:
        from leyden.cli.processes import launch  # noqa: PLC0415  # it imports torch

        return launch(wishes, command, environment(os.environ))
    if os.name != "nt":
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, command, environment(os.environ))
    return subprocess.call(command, env=environment(os.environ))


def split(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Return the options ahead of a program, by their names, and the program with its own arguments.

    Raises:
        MisconfigurationException: for an option that is not known, or that has no value.
    """
    found: dict[str, str] = {}
    while words and words[0].startswith("--"):
        word, equals, value = words.pop(0).partition("=")
        option = word.replace("_", "-")
        if option not in OPTIONS:
            raise MisconfigurationException(
                f"There is no option {word!r}.{did_you_mean(option, OPTIONS)} There are {', '.join(OPTIONS)}; what the"
                " script takes goes behind it."
            )
        if not equals and not words:
            raise MisconfigurationException(f"{word}: its value is missing: {OPTIONS[option][1]}.")
        found[OPTIONS[option][0]] = value if equals else words.pop(0)
    return found, words


def _options_of_python() -> list[str]:
    """The options with which this python itself was started, such as ``-W error`` or ``-O``."""
    words = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]
    found = words[:-1]  # the last one is the script or the module that we are
    return found[:-1] if found[-1:] in (["-m"], ["-c"]) else found
