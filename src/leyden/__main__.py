# SPDX-License-Identifier: Apache-2.0
"""``python -m leyden`` is the command ``leyden``."""

from __future__ import annotations

import sys

from leyden.cli import main

if __name__ == "__main__":
    sys.exit(main())
