# SPDX-License-Identifier: Apache-2.0
"""The environment in which a python, and every python that it starts, has the import names from its first line on."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

STARTUP = str(Path(__file__).parent / "startup")
"""The folder that does it, on PYTHONPATH: it holds one file, which python imports when it starts."""


def environment(of: Mapping[str, str]) -> dict[str, str]:
    """Return ``of`` with the folder ahead on PYTHONPATH, and with Leyden's own where python would not find it there."""
    root = str(Path(__file__).parents[2])
    paths = [STARTUP]
    # sys.path[0] is the folder of a script, or the working directory: the next python has another
    if root not in (os.path.abspath(path) for path in sys.path[1:]):
        paths.append(root)
    paths += [path for path in of.get("PYTHONPATH", "").split(os.pathsep) if path and path != STARTUP]
    return {**of, "PYTHONPATH": os.pathsep.join(paths)}
