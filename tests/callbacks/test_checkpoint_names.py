# SPDX-License-Identifier: Apache-2.0
"""Tests of the templates of checkpoint names."""

from __future__ import annotations

from leyden.callbacks.checkpoint_names import fill_fields


def test_fill_fields():
    assert fill_fields("{a:02d}_{b/c}_{d!r:>4}", {"a": 1, "b/c": 2, "d": "x"}, None) == "01_2_ 'x'"
    assert fill_fields("{a}{a}", {}, "=") == "a=0a=0"
