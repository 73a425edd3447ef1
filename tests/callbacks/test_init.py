# SPDX-License-Identifier: Apache-2.0
"""Tests of the lazy names of leyden.callbacks."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

import leyden.callbacks
from leyden.callback import Callback


def test_every_name_leads_to_a_callback():
    for name in leyden.callbacks.__all__:
        home = leyden.callbacks._HOME[name]
        if importlib.util.find_spec(home) is not None:
            assert issubclass(getattr(leyden.callbacks, name), Callback)
    assert sorted(leyden.callbacks._HOME) == sorted(leyden.callbacks.__all__)
    assert set(leyden.callbacks.__all__) <= set(dir(leyden.callbacks))


def test_unknown_name():
    with pytest.raises(AttributeError, match="ModelCheckpont"):
        leyden.callbacks.ModelCheckpont


def test_importing_the_package_imports_no_callback():
    code = (
        "import sys, leyden.callbacks as c; before = [m for m in sys.modules if m.startswith('leyden.callbacks.')];"
        "c.Timer; print(before, [m for m in sys.modules if m.startswith('leyden.callbacks.')],"
        " [m for m in ('yaml', 'fsspec', 'rich') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[] ['leyden.callbacks.timer'] []"
