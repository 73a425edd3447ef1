# SPDX-License-Identifier: Apache-2.0
"""``leyden fit --config run.yaml`` (and validate, test, predict): a run of class paths alone, without a script."""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Leave all words to ``LightningCLI``, ``--help`` too."""
    parser.prefix_chars = "\0"
    parser.add_argument("words", nargs=argparse.REMAINDER, help="what LightningCLI takes: leyden fit --help says it")


def main(options: argparse.Namespace) -> int:
    """Run the subcommand on the classes that the words or a config name; they are imported from here, too."""
    from leyden.cli.lightning_cli import LightningCLI  # noqa: PLC0415  # it imports torch

    if "" not in sys.path:
        sys.path.insert(0, "")
    argv, sys.argv = sys.argv, ["leyden"]
    try:
        LightningCLI(args=[options.command, *options.words], parser_kwargs={"prog": "leyden"})
    finally:
        sys.argv = argv
    return 0
