# SPDX-License-Identifier: Apache-2.0
"""The command ``leyden``: one table of subcommands, each in a file of its own that is imported when it is called.

A subcommand's file has two functions: ``add_arguments(parser)``, which declares its options, and ``main(options)``, which
does the work and returns the exit status.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from leyden.errors import LeydenError, did_you_mean
from leyden.version import __version__

COMMANDS: dict[str, tuple[str, str]] = {
    "compat": ("leyden.cli.compat", "what of Lightning a code base uses, and what of it Leyden lacks"),
    "run": ("leyden.cli.run", "run a script written for Lightning, or for 2019, on Leyden, unchanged"),
    "fabric": ("leyden.cli.fabric", "run a script written for Fabric in several processes: fabric run"),
    "ckpt": ("leyden.cli.ckpt", "look into checkpoints, check them, compare two"),
    **{
        name: (
            "leyden.cli.scriptless",
            f"{name} with the module, data and Trainer that a config names: {name} --config FILE",
        )
        for name in ("fit", "validate", "test", "predict")
    },
    "advise": ("leyden.cli.advise", "measure what would make the fit of a script faster"),
    "plan": ("leyden.cli.plan", "say what each strategy would need for the fit of a script, and what fits"),
    "verify-resume": ("leyden.cli.verify_resume", "prove that the fit of a script can be killed and resumed"),
}
"""Name of each subcommand, the module that has it, and one line of help."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the subcommand that ``arguments`` (default: those of the process) name; return the exit status.

    What a user can mend is said in one message, without a traceback: status 1. Wrong options are status 2.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="leyden", description="A trainer for PyTorch.")
    parser.add_argument("--version", action="version", version=f"leyden {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    named = next((word for word in words if not word.startswith("-")), "")
    if named and named not in COMMANDS:
        parser.error(f"there is no command {named!r}.{did_you_mean(named, COMMANDS)} There are: {', '.join(COMMANDS)}.")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name == named:
            importlib.import_module(module).add_arguments(command)
    options = parser.parse_args(words)
    try:
        return int(importlib.import_module(COMMANDS[options.command][0]).main(options))
    except LeydenError as error:
        print(f"leyden {options.command}: {error}", file=sys.stderr)
        return 1
