# SPDX-License-Identifier: Apache-2.0
"""The one table of foreign import names: which module of Leyden answers each name of each foreign module.

A row is a foreign module below its root, the module of ours that answers, and the names; ``then=now`` where ours has
another name. A module may have several rows. The rows are in the files beside this one; to answer one more name, add it
there.
"""

from __future__ import annotations

from typing import NamedTuple

from leyden.compat.table import both, fabric, former, pytorch

VERSIONS = {"lightning": "2.6.6", "pytorch_lightning": "2.6.6", "lightning_fabric": "2.6.6", "test_tube": "0.7.5"}
"""The packages whose names are answered, and the version that each says it is: libraries look at it."""

_LIGHTNING = (("", "leyden", "Callback Fabric LightningDataModule LightningModule Trainer seed_everything"),)

_PLACES = (
    # root, rows
    ("lightning", _LIGHTNING),
    ("lightning.pytorch", (*both.ROWS, *pytorch.ROWS)),
    ("lightning.fabric", (*both.ROWS, *fabric.ROWS)),
    ("pytorch_lightning", (*both.ROWS, *pytorch.ROWS, *former.ROWS)),
    ("lightning_fabric", (*both.ROWS, *fabric.ROWS)),
    ("test_tube", former.TEST_TUBE),
)

ROOTS = tuple(root for root, _ in _PLACES)
"""The modules that say their version."""


class Target(NamedTuple):
    """What answers a name: an attribute of a module of ours."""

    module: str
    name: str


def read() -> dict[str, dict[str, Target]]:
    """Return all foreign modules, the packages between them too, each with the names that it answers."""
    modules: dict[str, dict[str, Target]] = {}
    for root, rows in _PLACES:
        for path, home, names in rows:
            parts = [root, *path.split(".")] if path else [root]
            for count in range(1, len(parts) + 1):
                modules.setdefault(".".join(parts[:count]), {})
            for word in names.split():
                then, _, now = word.partition("=")
                modules[".".join(parts)][then] = Target(home, now or then)
    return modules
