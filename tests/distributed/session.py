# SPDX-License-Identifier: Apache-2.0
"""A session such as a kernel's: it runs cells in ``__main__``, which has no file and is no module that others could import.

python session.py FOLDER
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

CELLS = Path(__file__).with_name("cells.py").read_text().split("\n# next\n")
here = sys.modules["__main__"] = types.ModuleType("__main__")
sys.ps1 = ">>> "
for number, cell in enumerate(CELLS):
    exec(compile(cell, f"<cell {number}>", "exec"), vars(here))
