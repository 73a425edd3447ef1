# SPDX-License-Identifier: Apache-2.0
"""Every name on the page of 2019 has a test and a row in a table, and no file of the core knows one of them."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import leyden
from leyden.search import HyperOptNamespace
from leyden.vintage import _LATER_DROPPED, _SIGNS, VintageModule, VintageTrainer, page, tables

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent.parent
SOURCE = ROOT / "src" / "leyden"

HOMES = ("vintage/", "loggers/experiment.py", "loggers/git.py", "search/", "compat/")
ALSO_TODAY = {
    # words that the core uses for things of its own
    "experiment", "checkpoint_callback", "progress_bar", "period",
    "hparams", "trainer", "dtype", "on_gpu", "filepath", "prefix",
    "training_step", "validation_step", "test_step", "configure_optimizers", "val_dataloader", "test_dataloader",
    "on_save_checkpoint", "on_load_checkpoint", "on_before_zero_grad", "on_after_backward", "current_epoch",
    "global_step", "example_input_array", "freeze", "unfreeze", "fit", "summarize", "check_val_every_n_epoch",
    "fast_dev_run", "accumulate_grad_batches", "val_check_interval", "monitor", "min_delta", "patience", "verbose",
    "mode", "save_weights_only", "process_position", "cluster",
    # callbacks had hooks of these names later, and are told what they are called today
    "on_epoch_start", "on_epoch_end", "on_batch_start", "on_batch_end",
}  # fmt: skip


def names_on(page_text: str) -> list[tuple[str, str]]:
    """The names in backquotes at the places where the page puts names, each with its default ('' for none)."""
    found = []
    for line in page_text.splitlines():
        text = re.sub(r"`(\w+)`: .*", r"`\1`", line)  # what follows a name is its explanation
        for match in re.finditer(r"(?:^- |: | · |^  )`([A-Za-z_]\w*)(?:\([^`]*\))?(=[^`]*)?`", text):
            found.append((match[1], (match[2] or "")[1:]))
    return found


PAGE = (TESTS / "page.md").read_text(encoding="utf-8")


def written_tests() -> set[str]:
    others = ("acceptance/test_article_listing.py", "loggers/test_experiment.py", "compat/test_hook.py")
    files = [*TESTS.glob("test_*.py"), *(ROOT / "tests" / other for other in others)]
    files += [path for folder in ("search", "slurm") for path in (ROOT / "tests" / folder).glob("test_*.py")]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    return {
        node.name
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def has_test(name: str, tests: set[str]) -> bool:
    parts = {part for test in tests for part in re.split(r"_and_(?=[a-z])", test.removeprefix("test_"))}
    return any(part == name or part.startswith(f"{name}_") for part in parts | {t.removeprefix("test_") for t in tests})


def test_the_page_is_read_whole() -> None:
    names = [name for name, _ in names_on(PAGE)]
    assert len(names) == len(re.findall(r"`[A-Za-z_]\w*(?:\([^`]*\))?(?:=[^`]*)?`", PAGE)) - 1  # `__init__` is no name
    assert {"training_step", "enable_early_stop", "ModelCheckpoint", "sanity_steps", "load_from_metrics"} <= set(names)


@pytest.mark.parametrize("name", sorted({name for name, _ in names_on(PAGE)}))
def test_each_name_on_the_page_has_a_test_named_after_it(name: str) -> None:
    assert has_test(name, written_tests())


def test_a_name_without_a_test_would_be_found() -> None:
    assert not has_test("sanity", {"test_insanity", "test_of_sanity"})
    assert has_test("sanity", {"test_sanity_steps"})
    assert has_test("sanity", {"test_mode_and_sanity"})


def test_the_arguments_of_the_trainer_are_those_on_the_page() -> None:
    section = PAGE.split("## Trainer arguments")[1].split("## ")[0]
    rows = {row.name: repr(row.default) for row in (*tables.TRAINER_ARGUMENTS, *tables.SAME_ARGUMENTS)}
    assert dict(names_on(section)) == rows


def test_the_members_of_the_module_are_those_on_the_page() -> None:
    section = PAGE.split("## LightningModule")[1].split("## ")[0]
    assert {name for name, _ in names_on(section)} | {"hparams"} == {row.name for row in tables.MODULE_MEMBERS}


@pytest.mark.parametrize("name", tables.CALLBACK_ARGUMENTS)
def test_the_constructors_of_the_callbacks_are_those_on_the_page(name: str) -> None:
    (text,) = re.findall(rf"`{name}\((.*)\)`", PAGE)
    rows = [
        row.name if row.default is tables.REQUIRED else f"{row.name}={row.default!r}"
        for row in tables.CALLBACK_ARGUMENTS[name]
    ]
    assert ", ".join(rows) == text


def test_what_the_tables_call_today_is_there_today() -> None:
    trainer = inspect.signature(leyden.Trainer).parameters
    for row in (*tables.TRAINER_ARGUMENTS, *tables.SAME_ARGUMENTS):
        assert not row.modern or row.modern in trainer, row
    for row in tables.TRAINER_ARGUMENTS:
        assert row.name not in trainer, row
    for member in tables.MODULE_MEMBERS:
        assert hasattr(leyden.LightningModule, member.name) or member.name == "data_loader", member
    for new, _ in tables.HOOKS.values():
        assert hasattr(leyden.LightningModule, new)


def test_every_name_of_the_mixins_is_in_a_table() -> None:
    listed = {row.name for row in (*tables.MODULE_MEMBERS, *tables.TRAINER_MEMBERS)}
    for mixin in (VintageModule, VintageTrainer):
        assert {name for name in vars(mixin) if not name.startswith("_")} <= listed
    assert set(_SIGNS) <= listed
    assert set(tables.HOOKS) <= set(_SIGNS) | set(_LATER_DROPPED)
    assert all(tables.HOOKS[old][0] == new for old, new in _LATER_DROPPED.items())


def test_docs_2019_is_made_from_the_tables() -> None:
    assert (ROOT / "docs" / "2019.md").read_text(encoding="utf-8") == page.page()


def only_then() -> set[str]:
    rows = [*tables.TRAINER_ARGUMENTS, *tables.MODULE_MEMBERS, *tables.TRAINER_MEMBERS]
    rows += [row for arguments in tables.CALLBACK_ARGUMENTS.values() for row in arguments]
    return {row.name for row in rows} | {"tng_loss"}


def of_the_tracker_and_the_search() -> set[str]:
    """The names of two words or more that Experiment, the parser, its namespace and the cluster have."""
    found: set[str] = set()
    for cls in (leyden.Experiment, leyden.HyperOptArgumentParser, HyperOptNamespace, leyden.SlurmCluster):
        inherited = {name for base in cls.__mro__[1:] for name in vars(base)}
        found |= {*vars(cls), *inspect.signature(cls).parameters} - inherited
    found |= set(re.findall(r"self\.(\w+)", inspect.getsource(leyden.SlurmCluster.__init__)))
    return {name for name in found if "_" in name.strip("_") and not name.startswith("_")}


def test_no_other_file_knows_a_name_of_2019() -> None:
    forbidden = (
        (only_then() | of_the_tracker_and_the_search())
        - ALSO_TODAY
        - {"save_dir", "ckpt_path", "state_dict", "load_state_dict"}
    )
    assert len(forbidden) >= 80
    exports = {"data_loader"}  # `leyden.data_loader`
    known = {}
    for path in SOURCE.rglob("*.py"):
        relative = path.relative_to(SOURCE).as_posix()
        if relative.startswith(HOMES):
            continue
        words = set(re.findall(r"\w+", path.read_text(encoding="utf-8")))
        if found := (words & forbidden) - (exports if relative == "__init__.py" else set()):
            known[relative] = sorted(found)
    assert known == {}


def test_words_that_the_core_uses_too_are_words_that_it_uses() -> None:
    core = "\n".join(
        path.read_text(encoding="utf-8")
        for path in SOURCE.rglob("*.py")
        if not path.relative_to(SOURCE).as_posix().startswith(HOMES)
    )
    assert set(re.findall(r"\w+", core)) >= ALSO_TODAY
    assert only_then() | {row.name for row in tables.SAME_ARGUMENTS} >= ALSO_TODAY
