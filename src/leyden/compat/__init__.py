# SPDX-License-Identifier: Apache-2.0
"""The import names of others, answered with what Leyden has."""

from __future__ import annotations
