# SPDX-License-Identifier: Apache-2.0
"""Every public name of Lightning 2.6.6 has the same kind, arguments and defaults here, but for what docs/parity.md says."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import leyden.compat
from introspect import (
    Entry,
    Row,
    describe,
    describe_member,
    difference,
    find,
    parse_signature,
    read_table,
    signature_text,
)

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ROWS = read_table(HERE / "lightning_2_6_6.txt")
MODULES = sorted({row.module for row in ROWS})


@pytest.fixture(autouse=True, scope="module")
def names() -> Iterator[None]:
    with leyden.compat.installed():
        yield


def deliberate() -> list[tuple[str, str]]:
    """The table of docs/parity.md: patterns of names, and what differs."""
    lines = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return [(pattern.strip("`"), row[1]) for row in cells for pattern in row[0].split("<br>")]


DELIBERATE = deliberate()


def differs(row: Row) -> str:
    """How what we have under a name differs; nothing if it does not, ``missing`` if there is none."""
    owner, _, member = row.name.partition(".")
    try:
        ours = find(row.module, owner)
    except (ImportError, AttributeError):
        return "missing"
    if row.entry is None:
        return ""
    if row.entry.kind == "base":
        module, _, name = member.rpartition(".")
        try:
            base = find(module, name)
        except (ImportError, AttributeError):
            return "its base is missing"
        return "" if isinstance(ours, type) and issubclass(ours, base) else f"does not extend {name}"
    if not member:
        return difference(row.entry, describe(ours))
    if not isinstance(ours, type):
        return ""
    entry = describe_member(ours, member)
    return "missing" if entry is None else difference(row.entry, entry)


def matches(row: Row, pattern: str) -> bool:
    """Whether a pattern names a row."""
    return fnmatchcase(row.path, pattern)


@pytest.mark.parametrize("module", MODULES)
def test_the_public_names_of_a_module_are_as_in_lightning(module: str) -> None:
    found = []
    for row in ROWS:
        if row.module == module and not any(matches(row, pattern) for pattern, _ in DELIBERATE):
            said = differs(row)
            if said:
                found.append(f"{row.name}: {said}")
    assert found == []


@pytest.mark.parametrize("pattern", [pattern for pattern, _ in DELIBERATE])
def test_what_the_page_says_of_a_difference_is_so(pattern: str) -> None:
    named = [row for row in ROWS if fnmatchcase(row.path, pattern)]
    assert named, f"{pattern} names nothing of the table"
    assert any(differs(row) for row in named), f"{pattern} does not differ any more: take it out of docs/parity.md"


def test_every_difference_has_a_reason() -> None:
    assert len(DELIBERATE) > 10
    assert all(len(reason) > 10 for _, reason in DELIBERATE)


def test_the_table_is_that_of_lightning() -> None:
    """Where the real one is installed: elsewhere, ``record_with_lightning.py`` is run by hand."""
    real = [found for found in importlib.metadata.distributions() if found.metadata["Name"] == "lightning"]
    if not real or real[0].version != "2.6.6":
        pytest.skip("lightning 2.6.6 is not installed beside leyden: it is compared by hand")
    done = subprocess.run(
        [sys.executable, str(HERE / "record_with_lightning.py")], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout[-3000:]


# --------------------------------------------------------------------------------------------- the comparison itself


def entry(text: str, kind: str = "method") -> Entry:
    return Entry(kind, parse_signature(text))


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        ("(a, b=1, *, c='x,y', **kw)", "(a, b=1, *, c='x,y', **other)", ""),
        ("(a, b=1)", "(a, b=1, c=None)", ""),
        ("(a, b=1)", "(a, b=2)", "b=2, there 1"),
        ("(a, b)", "(b, a)", "another order"),
        ("(a)", "(b)", "lacks the argument a"),
        ("(a)", "(*, a)", "by keyword only"),
        ("(*, a)", "(a)", ""),
        ("(a)", "(a, b)", "needs b"),
        ("(a, *args)", "(a)", "takes no *args"),
        ("(**kw)", "()", "takes no **kw"),
        ("(a=(1, 2), b={'k': [1]})", "(a=(1, 2), b={'k': [1]})", ""),
    ],
)
def test_signatures_are_compared_argument_by_argument(theirs: str, ours: str, said: str) -> None:
    assert signature_text(parse_signature(theirs)) == theirs
    found = difference(entry(theirs), entry(ours))
    assert (said in found) if said else not found


def test_kinds_are_compared() -> None:
    assert difference(Entry("property", None), Entry("settable", None)) == ""
    assert "is a property" in difference(Entry("settable", None), Entry("property", None))
    assert "is a property" in difference(entry("()"), Entry("property", None))
