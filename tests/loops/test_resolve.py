# SPDX-License-Identifier: Apache-2.0
"""Which callbacks a run has: those of the module, and those that installed packages add."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from types import SimpleNamespace

import pytest

from leyden.callback import Callback
from leyden.callbacks import Timer
from leyden.compat.hook import installed
from leyden.config import TrainerConfig
from leyden.loops import resolve


def test_callbacks_of_the_module_replace_those_of_their_type_and_of_its_bases() -> None:
    class Timed(Timer):
        pass

    first, other, mine = Timer(), Callback(), Timed()
    assert resolve.merge_callbacks([first, other], mine) == [other, mine]
    assert resolve.merge_callbacks([mine, other], [first]) == [mine, other, first]
    assert resolve.merge_callbacks([other], Callback())[0] is other


def test_packages_for_lightning_add_callbacks_where_its_names_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    added = Callback()
    entries = {"lightning.pytorch.callbacks_factory": [SimpleNamespace(load=lambda: lambda: [added])]}
    monkeypatch.setattr(resolve, "_entry_points", lambda group: entries.get(group, []))
    make = partial(resolve.callbacks, None, TrainerConfig(), checkpointing=False, bar=False, summary=False, explicit={})
    assert make() == []
    with installed():
        import_module("lightning.pytorch").Trainer  # who takes this means Lightning's
        assert make() == [added]
    assert make() == []
