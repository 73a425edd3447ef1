# SPDX-License-Identifier: Apache-2.0
"""What ``importlib.metadata`` finds for the packages that Leyden stands for: their names and versions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

from leyden.compat.table import VERSIONS


class StandIn(Distribution):
    """A package of which there is nothing but a name and a version."""

    def __init__(self, name: str, version: str) -> None:
        self._text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"

    def read_text(self, filename: Any) -> str | None:
        """Return the metadata; None for every other file."""
        return self._text if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Path:
        """Return ``path``: there are no files."""
        return Path(path)


def distributions(name: str | None) -> Iterator[StandIn]:
    """Yield the package of that name if Leyden stands for it. Who asks for all packages gets those that are installed."""
    for package, version in VERSIONS.items():
        if name is not None and re.sub(r"[-_.]+", "_", name).lower() == package:
            yield StandIn(package.replace("_", "-"), version)
