# SPDX-License-Identifier: Apache-2.0
"""The import names of others, answered with what Leyden has.

    import leyden.compat

    leyden.compat.install()
    import pytorch_lightning as pl      # from here on these names are Leyden's

The rows are in ``table``, the import hook in ``hook``; neither loads anything else of Leyden before it is used.
"""

from __future__ import annotations

from leyden.compat.hook import install, installed, uninstall

__all__ = ["install", "installed", "uninstall"]
