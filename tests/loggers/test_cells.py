# SPDX-License-Identifier: Apache-2.0
"""Cells of CSV files: plain values come back as they were, and tables of other tools can be read."""

from __future__ import annotations

import csv
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leyden.errors import MisconfigurationException
from leyden.hparams import cell_value, load_hparams_from_tags_csv
from leyden.loggers.cells import cell_text, read_pairs, read_rows, write_pairs

VALUES = [
    0, -3, 10**30, 1e-20, math.inf, True, False, None, "", "word", "1", "1e5", "True", "None", "NaN", '"quoted"', "007",
    'a,b\n"c"', "ünï", [1, "2", None], {"a": {"b": 0.5}}, "[1, 2]", "{", "\\d", " 1", "[" * 100_000,
    [True, None], "(1, 2)", "1_000", "{'a': 1}", "'\\d'", "0x10",
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_values_come_back_with_their_type(tmp_path, value):
    write_pairs(str(tmp_path / "t.csv"), {"key": value, "an,other": 1})
    read = read_pairs(tmp_path / "t.csv")
    assert read == {"key": value, "an,other": 1}
    assert type(read["key"]) is type(value)
    assert load_hparams_from_tags_csv(str(tmp_path / "t.csv")) == read, "what a model is built from (load_from_metrics)"


def test_a_table_that_the_tool_of_2019_wrote(tmp_path):
    # it wrote str(value)
    (tmp_path / "t.csv").write_text('key,value\nlr,0.1\nsizes,"(8, 16)"\nopts,"{\'a\': None}"\nname,relu\nflag,True\n')
    expected = {"lr": 0.1, "sizes": (8, 16), "opts": {"a": None}, "name": "relu", "flag": True}
    assert read_pairs(tmp_path / "t.csv") == expected
    assert load_hparams_from_tags_csv(str(tmp_path / "t.csv")) == expected


@given(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text())
def test_any_plain_value_comes_back(value):
    read = cell_value(cell_text(value))
    assert read == value
    assert type(read) is type(value)


def test_cells_are_what_a_human_would_write(tmp_path):
    write_pairs(str(tmp_path / "t.csv"), {"lr": 0.02, "name": "a, b", "flag": True, "none": None, "nan": math.nan})
    with open(tmp_path / "t.csv", newline="") as file:
        assert list(csv.reader(file)) == [
            ["key", "value"], ["lr", "0.02"], ["name", "a, b"], ["flag", "True"], ["none", "None"], ["nan", "NaN"],
        ]  # fmt: skip


def test_a_table_of_another_tool(tmp_path):
    (tmp_path / "t.csv").write_text("number,value,key\n0,0.5,lr\n1,,empty\n2\n")
    assert read_pairs(tmp_path / "t.csv") == {"lr": 0.5, "empty": ""}


@pytest.mark.parametrize(("text", "columns"), [("", r"\[\]"), ("name,number\n", r"\['name', 'number'\]")])
def test_a_table_without_its_columns(tmp_path, text, columns):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(MisconfigurationException, match=rf"t.csv' has the columns {columns}.* has 'key' and 'value'"):
        read_pairs(tmp_path / "t.csv")


def test_rows(tmp_path):
    (tmp_path / "t.csv").write_text('loss,when,"a,b"\n0.5,2026-01-01 10:00,3\n,,nan\n1e-3,x\n1,2,3,4\n')
    first, second, *rest = read_rows(tmp_path / "t.csv")
    assert first == {"loss": 0.5, "when": "2026-01-01 10:00", "a,b": 3}
    assert type(first["a,b"]) is int
    assert list(second) == ["a,b"]
    assert math.isnan(second["a,b"])
    assert rest == [{"loss": 0.001, "when": "x"}, {"loss": 1, "when": 2, "a,b": 3}]
