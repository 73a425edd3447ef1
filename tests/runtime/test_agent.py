# SPDX-License-Identifier: Apache-2.0
"""Which process of torchrun has started this one: known again by its folder, whatever its variables count."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from leyden.runtime import agent


def _as_rank(monkeypatch: pytest.MonkeyPatch, folder: Path, attempt: int) -> None:
    """Be a process that torchrun has just started."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / f"attempt_{attempt}" / "0" / "error.json"))
    monkeypatch.setattr(agent, "_FITS", itertools.count())


def test_a_fit_that_is_started_anew_knows_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _as_rank(monkeypatch, tmp_path, 0)
    first = agent.begin_fit()
    assert first is not None
    assert first.since is None
    assert first.name == agent.name()
    agent.note()
    second = agent.begin_fit()  # another fit of the same process is not started anew
    assert second is not None
    assert second.since is None
    for attempt in (0, 1):  # a change of machines is not counted
        _as_rank(monkeypatch, tmp_path, attempt)
        again = agent.begin_fit()
        assert again is not None
        assert again.since is not None
        assert (again.name, agent.fit()) == (first.name, 0)


def test_another_launch_is_another_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = []
    for launch in ("first", "second"):
        (tmp_path / launch).mkdir()
        _as_rank(monkeypatch, tmp_path / launch, 0)
        found = agent.begin_fit()
        assert found is not None
        assert found.since is None
        agent.note()
        names.append(found.name)
    assert names[0] != names[1]


@pytest.mark.parametrize("file", ["", "/nowhere/attempt_0/0/error.json", "/tmp/error.json"])
def test_without_torchrun_there_is_none(monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert agent.begin_fit() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", file)
    assert agent.begin_fit() is None
    agent.note()
    assert agent.name() is None
