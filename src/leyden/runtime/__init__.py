# SPDX-License-Identifier: Apache-2.0
"""What a run stands on: ranks, seeds and devices."""

from __future__ import annotations
