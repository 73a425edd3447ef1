# SPDX-License-Identifier: Apache-2.0
"""The command ``leyden``: its table of subcommands, its exit status, what it says about mistakes."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

from leyden import cli
from leyden.errors import MisconfigurationException
from leyden.version import __version__


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("leyden_test_command")
    module.add_arguments = lambda parser: parser.add_argument("number", type=int)

    def run(options: object) -> int:
        if options.number < 0:
            raise MisconfigurationException(f"number={options.number}: must be 0 or more.")
        return options.number

    module.main = run
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(cli, "COMMANDS", {"count": (module.__name__, "return a number")})


def test_a_subcommand_gets_its_options_and_gives_the_status(command: None) -> None:
    assert cli.main(["count", "7"]) == 7


def test_an_error_of_ours_is_one_message_and_status_1(command: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["count", "--", "-3"]) == 1
    assert capsys.readouterr().err == "leyden count: number=-3: must be 0 or more.\n"


def test_an_unknown_command_is_met_with_the_closest(command: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["cuont"])
    assert "no command 'cuont'. Did you mean 'count'?" in capsys.readouterr().err


def test_the_version_is_printed_by_the_module_too() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "leyden", "--version"], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == f"leyden {__version__}"
