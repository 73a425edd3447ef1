# SPDX-License-Identifier: Apache-2.0
"""Messages and decorated functions: on rank 0 only, blamed on the caller, visible without any configuration."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import warnings

import pytest

import leyden as L
from leyden.errors import LeydenDeprecationWarning, LeydenError, LeydenWarning
from leyden.runtime import ranks
from leyden.runtime.ranks import rank_zero_deprecation, rank_zero_info, rank_zero_only, rank_zero_warn


@pytest.fixture
def on_rank_one(monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)


def run(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": "src", **env}, check=True
    )
    return done.stderr


def test_decorated_function_runs_on_rank_zero():
    @rank_zero_only
    def f(a, b=1):
        """doc"""
        return a + b

    assert f(1, b=2) == 3
    assert f.__doc__ == "doc"


def test_decorated_function_is_skipped_elsewhere(on_rank_one):
    calls = []
    f = rank_zero_only(calls.append)
    assert f(1) is None
    assert rank_zero_only(lambda: 5, default=7)() == 7
    assert calls == []


def test_decorator_works_on_methods():
    class A:
        @rank_zero_only
        def f(self):
            return self

    a = A()
    assert a.f() is a


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        ({"RANK": "3", "LOCAL_RANK": "1"}, 3),
        ({"LOCAL_RANK": "1", "SLURM_PROCID": "5"}, 1),
        ({"SLURM_PROCID": "5"}, 5),
        ({"RANK": "nonsense", "LOCAL_RANK": "2"}, 2),
    ],
)
def test_rank_from_environment(monkeypatch, env, expected):
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert ranks.rank_from_environment() == expected


def test_info_is_visible_by_default_and_does_not_touch_the_root_logger():
    code = """
import logging
from leyden.runtime.ranks import rank_zero_debug, rank_zero_info
assert not logging.getLogger("leyden").handlers  # importing configures nothing
rank_zero_info("one %d", 1); rank_zero_info("two"); rank_zero_debug("never")
assert not logging.getLogger().handlers
logging.basicConfig(format="ROOT %(message)s")
rank_zero_info("three")
"""
    assert run(code).splitlines() == ["one 1", "two", "ROOT three"]


def test_info_is_silent_elsewhere():
    assert run("from leyden.runtime.ranks import rank_zero_info; rank_zero_info('x')", RANK="1") == ""


def test_info_obeys_the_level_the_user_set():
    code = """
import logging
logging.getLogger("leyden").setLevel(logging.ERROR)
from leyden.runtime.ranks import rank_zero_info
rank_zero_info("hidden")
"""
    assert run(code) == ""


def test_info_names_its_caller(caplog):
    rank_zero_info("hello")
    assert [(r.name, r.levelname, r.message, r.funcName) for r in caplog.records] == [
        ("leyden", "INFO", "hello", "test_info_names_its_caller")
    ]


def test_warnings_blame_their_caller():
    with pytest.warns(LeydenWarning, match="careful") as record:
        rank_zero_warn("careful")
    assert record[0].filename == __file__
    with pytest.warns(LeydenDeprecationWarning, match="old") as record:
        rank_zero_deprecation("old")
    assert record[0].filename == __file__
    with pytest.warns(RuntimeWarning, match="other"):
        rank_zero_warn("other", category=RuntimeWarning)


def test_stacklevel_five_blames_the_caller_of_the_caller():
    def helper():
        rank_zero_warn("deep", stacklevel=5)

    with pytest.warns(LeydenWarning) as record:
        helper()
    assert record[0].filename == __file__
    assert record[0].lineno == sys._getframe().f_lineno - 2


def test_a_warning_of_ours_blames_the_line_outside_that_led_there():
    module = type("Typo", (L.LightningModule,), {"train_step": lambda self: None})()
    with pytest.warns(LeydenWarning, match="train_step") as record, contextlib.suppress(LeydenError):
        L.Trainer(max_epochs=1, logger=False, enable_checkpointing=False).fit(module, [1])
    assert record[0].filename == __file__
    assert record[0].lineno == sys._getframe().f_lineno - 2


def test_no_warning_elsewhere(on_rank_one):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rank_zero_warn("x")
        rank_zero_deprecation("x")
