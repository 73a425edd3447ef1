# SPDX-License-Identifier: Apache-2.0
"""What files that a command line writes say in Lightning's words, so that either side reads the other's."""

from __future__ import annotations

from leyden.compat.table import VERSIONS
from leyden.config import default_semantics
from leyden.version import __version__

INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"
"""Under this name a checkpoint says that ``instantiate_module`` makes its object; Lightning calls no other."""


def header() -> str:
    """The first line of a config: who wrote it. A program that imports Lightning's names looks for Lightning's."""
    ours = f"leyden=={__version__}"
    return ours if default_semantics() == "leyden" else f"lightning.pytorch=={VERSIONS['lightning']} ({ours})"
