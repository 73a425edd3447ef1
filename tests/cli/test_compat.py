# SPDX-License-Identifier: Apache-2.0
"""``leyden compat``: its exit status, what goes where, and the start-up folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from leyden.cli import main
from leyden.compat.process import STARTUP


def test_check_lists_what_is_missing_and_says_so_by_its_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "train.py"
    path.write_text("import lightning as L\nfrom lightning.pytorch.callbacks import EarlyStoping\nL.Trainer()\n")
    assert main(["compat", "check", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == (f"{path}:2: Leyden has no lightning.pytorch.callbacks.EarlyStoping. Did you mean 'EarlyStopping'?\n")
    assert err == "1 files read, 3 uses of foreign names: 1 missing, 0 missing that the program goes on without.\n"


def test_check_of_what_resolves_is_status_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "train.py"
    path.write_text("try:\n    import lightning.app\nexcept ImportError:\n    pass\n")
    assert main(["compat", "check", str(path)]) == 0
    assert "(the program catches this)" in capsys.readouterr().out


def test_check_of_a_path_that_does_not_exist_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compat", "check", "nowhere.py"]) == 1
    assert "nowhere.py does not exist" in capsys.readouterr().err


def test_path_prints_the_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compat", "path"]) == 0
    assert capsys.readouterr().out == f"{STARTUP}\n"
    assert [path.name for path in Path(STARTUP).glob("*.py")] == ["sitecustomize.py"]
