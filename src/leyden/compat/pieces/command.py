# SPDX-License-Identifier: Apache-2.0
"""``fabric run`` as a function."""

from __future__ import annotations

import importlib
import sys
from typing import Any


def main() -> Any:
    """Run ``fabric …`` with the arguments of the process; leave it with the status of the program."""
    command: Any = importlib.import_module("leyden.cli")
    sys.exit(command.main(["fabric", *sys.argv[1:]]))
