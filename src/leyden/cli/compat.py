# SPDX-License-Identifier: Apache-2.0
"""``leyden compat``: what a code base uses of Lightning and Leyden lacks; where the start-up folder of the names is."""

from __future__ import annotations

import argparse
import sys

from leyden.compat.check import check
from leyden.compat.process import STARTUP


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare ``check`` with its paths, and ``path``."""
    actions = parser.add_subparsers(dest="action", metavar="action", required=True)
    text = "list the imports and attributes that would not resolve, with file and line; status 1 if there are any"
    reads = actions.add_parser("check", help=text, description=text)
    reads.add_argument("paths", nargs="+", metavar="PATH", help="a python file, or a folder of them")
    text = "print the folder that, on PYTHONPATH, installs the import names in every python that starts"
    actions.add_parser("path", help=text, description=text)


def main(options: argparse.Namespace) -> int:
    """Print what was asked for.

    Raises:
        MisconfigurationException: if a path does not exist.
    """
    if options.action == "path":
        print(STARTUP)
        return 0
    report = check(options.paths)
    for finding in report.missing:
        print(finding)
    fatal = sum(not finding.guarded for finding in report.missing)
    caught = len(report.missing) - fatal
    print(
        f"{report.files} files read, {report.uses} uses of foreign names: {fatal} missing,"
        f" {caught} missing that the program goes on without.",
        file=sys.stderr,
    )
    return 1 if fatal else 0
