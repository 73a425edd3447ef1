# SPDX-License-Identifier: Apache-2.0
"""How processes are started where nobody else has: by running the script once more, or for one call."""

from __future__ import annotations
