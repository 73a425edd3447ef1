# SPDX-License-Identifier: Apache-2.0
"""The table of foreign names: every row has something behind it, and no other file of Leyden knows the paths."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from pathlib import Path

import pytest

from leyden.compat import table
from leyden.compat.table import ROOTS, VERSIONS, read

ROOT = Path(__file__).parents[2]
TABLE = read()


@pytest.mark.parametrize("module", TABLE)
def test_every_name_of_a_module_is_answered(module: str) -> None:
    for name, target in TABLE[module].items():
        assert hasattr(importlib.import_module(target.module), target.name), (module, name)


def test_every_root_is_a_module_with_a_version() -> None:
    assert {root.partition(".")[0] for root in ROOTS} == set(VERSIONS)
    assert set(ROOTS) <= set(TABLE)


def test_packages_between_are_modules_too() -> None:
    assert TABLE["pytorch_lightning.root_module"] == {}
    assert "pytorch_lightning.root_module.decorators" in TABLE


def test_a_name_stands_in_one_row() -> None:
    for root, rows in table._PLACES:
        named = [(path, word.partition("=")[0]) for path, _, names in rows for word in names.split()]
        assert [name for name, times in Counter(named).items() if times > 1] == [], root


def test_a_class_of_ours_keeps_its_name_where_it_has_the_same_there() -> None:
    renamed = {then: target.name for names in TABLE.values() for then, target in names.items() if target.name != then}
    assert {then for then in renamed if not then.startswith("_")} == {
        "BaseProfiler", "LRSchedulerPLType", "LRSchedulerTypeUnion", "LightningDeprecationWarning", "LightningLoggerBase",
        "ProgressBarBase", "SpikeDetection", "TTNamespace", "get_human_readable_count", "parse_batch_shape",
        "BType", "RequirementCache", "TBroadcast", "TModel", "TReduce", "T_destination", "main", "rank_zero_module",
        "comet_experiment", "convert_inf", "lightning_getattr", "lightning_hasattr", "lightning_setattr",
    }  # fmt: skip


def paths_in(text: str) -> set[str]:
    """Foreign modules that a text mentions: attributes of ours such as ``lightning_module`` are none."""
    return set(re.findall(r"\b(?:pytorch_lightning|lightning_fabric|lightning\.(?:pytorch|fabric)|test_tube)\b", text))


def test_no_other_file_mentions_the_paths_of_lightning() -> None:
    """But the registries: ``archive.py`` lists whose pickled classes a checkpoint may name."""
    source = ROOT / "src" / "leyden"
    known = {}
    for path in source.rglob("*.py"):
        relative = path.relative_to(source).as_posix()
        found = paths_in(path.read_text(encoding="utf-8"))
        if found and not relative.startswith(("compat/", "archive.py")):
            known[relative] = found
    assert known == {}


def test_a_mention_would_be_found() -> None:
    assert paths_in("from lightning.pytorch import Trainer") == {"lightning.pytorch"}
    assert paths_in("import pytorch_lightning as pl, test_tube") == {"pytorch_lightning", "test_tube"}
    assert paths_in("trainer.lightning_module, 'pytorch-lightning_version', test_tube_data") == set()
