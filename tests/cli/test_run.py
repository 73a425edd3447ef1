# SPDX-License-Identifier: Apache-2.0
"""``leyden run``: the program finds what it would find under python, and Lightning's names; its end is its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from leyden.cli import main
from leyden.compat.process import STARTUP

SHOW = """
import json, os, sys
import {imports}
print(json.dumps({{
    "argv": sys.argv, "path": sys.path, "file": __file__, "name": __name__, "package": __package__,
    "main": sys.modules["__main__"].__file__, "flags": [sys.flags.optimize, sys.warnoptions],
}}))
sys.exit({status})
"""


def run(*words: str, cwd: Path, prefix: tuple[str, ...] = ("-m", "leyden", "run"), **more: Any) -> Any:
    return subprocess.run(
        [sys.executable, *prefix, *words], cwd=cwd, capture_output=True, text=True, check=False, timeout=100, **more
    )


@pytest.mark.parametrize("words", [(), ("--lr", "3"), ("--help", "-m", "x", "--", "--version", "run")])
@pytest.mark.parametrize("target", [("folder/show.py",), ("-m", "folder.show")])
def test_a_program_finds_what_python_shows_it(target: tuple[str, ...], words: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "show.py").write_text(SHOW.format(imports="json", status=3))
    ours = run(*target, *words, cwd=tmp_path)
    theirs = run(*target, *words, cwd=tmp_path, prefix=())
    assert (ours.returncode, ours.stderr) == (theirs.returncode, theirs.stderr) == (3, "")
    assert json.loads(ours.stdout) == json.loads(theirs.stdout)
    assert json.loads(ours.stdout)["argv"][1:] == list(words)


def test_options_of_python_are_handed_on(tmp_path: Path) -> None:
    (tmp_path / "show.py").write_text(SHOW.format(imports="json", status=0))
    for prefix in (
        ("-O", "-W", "error", "-m", "leyden", "run"),
        ("-O", "-W", "error", "-c", "import leyden.cli; leyden.cli.main()", "run"),
    ):
        assert json.loads(run("show.py", cwd=tmp_path, prefix=prefix).stdout)["flags"] == [1, ["error"]]


def test_the_installed_command_runs_a_program_too(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("leyden")
    if not command.is_file():
        pytest.skip("The package is not installed: there is no command.")
    (tmp_path / "show.py").write_text(SHOW.format(imports="json", status=0))
    found = run("run", "show.py", "a", cwd=tmp_path, prefix=(str(command),))
    assert json.loads(found.stdout)["argv"] == ["show.py", "a"]


def test_the_names_of_lightning_and_of_2019_are_there(tmp_path: Path) -> None:
    (tmp_path / "names.py").write_text(
        "import lightning, pytorch_lightning, test_tube, leyden\n"
        "assert pytorch_lightning.Trainer is lightning.Trainer is leyden.Trainer\n"
        "print(test_tube.Experiment.__module__)\n"
    )
    done = run("names.py", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "leyden.loggers.experiment\n", "")


def test_a_traceback_begins_at_the_program(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text("import lightning\n\n\ndef fail():\n    1 / 0\n\n\nfail()\n")
    ours, theirs = run("fails.py", cwd=tmp_path), run("fails.py", cwd=tmp_path, prefix=())
    assert ours.returncode == theirs.returncode == 1
    first, second = ours.stderr.splitlines()[:2]
    assert first == "Traceback (most recent call last):"
    assert second.endswith('fails.py", line 8, in <module>')
    assert "leyden" not in ours.stderr.replace(str(tmp_path), "")
    assert "No module named 'lightning'" in theirs.stderr or "ZeroDivisionError" in theirs.stderr


CHILDREN = """
import multiprocessing, pickle, subprocess, sys
import torch
from torch.utils.data import DataLoader, Dataset
import pytorch_lightning as pl

class Samples(Dataset):
    def __len__(self): return 4
    def __getitem__(self, index): return index, pl.__spec__.origin

class Module(pl.LightningModule):
    pass

def child(module, queue):
    queue.put((__name__, type(module).__module__, isinstance(module, pl.LightningModule), pl.__spec__.origin))

if __name__ == "__main__":
    for method in ("spawn", "forkserver"):
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        process = context.Process(target=child, args=(Module(), queue))
        process.start()
        print(*queue.get())
        process.join()
    for numbers, origins in DataLoader(Samples(), 2, num_workers=1, multiprocessing_context="spawn"):
        print(numbers.tolist(), set(origins))
    assert type(pickle.loads(pickle.dumps(Module()))) is Module
    print(subprocess.check_output([sys.executable, "-c", "import lightning; print(lightning)"], text=True).strip())
"""


def test_child_processes_have_the_names_too(tmp_path: Path) -> None:
    (tmp_path / "children.py").write_text(CHILDREN)
    done = run("children.py", cwd=tmp_path)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        *["__mp_main__ __mp_main__ True leyden.compat"] * 2,
        "[0, 1] {'leyden.compat'}",
        "[2, 3] {'leyden.compat'}",
        "<module 'lightning' (leyden.compat)>",
    ]


@pytest.mark.skipif(os.name == "nt", reason="A process cannot be replaced there.")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_program_itself(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    processes = [
        subprocess.Popen(
            [sys.executable, *prefix, "waits.py"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for prefix in (("-m", "leyden", "run"), ())
    ]
    ends = []
    for process in processes:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        ends.append((process.returncode, said.splitlines()[:1], said.splitlines()[-1:]))
    assert ends[0] == ends[1]


def test_a_missing_script_is_told_by_python(tmp_path: Path) -> None:
    done = run("nothing.py", cwd=tmp_path)
    assert done.returncode == 2
    assert "can't open file" in done.stderr


def test_nothing_to_run_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run"]) == 1
    assert "Name a script, or -m and a module" in capsys.readouterr().err
    assert main(["run", "-m"]) == main(["run", "-O", "script.py"]) == 1


def test_help_is_ours_only_where_no_program_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help"]) == main(["run", "-h"]) == 0
    assert capsys.readouterr().out.count("leyden run [options] -m package.module [arguments]") == 2


@pytest.mark.parametrize("flag", ["ignore_environment", "no_site"])
def test_a_python_that_ignores_its_environment_is_an_error(
    flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Flags:
        ignore_environment = flag == "ignore_environment"
        no_site = flag == "no_site"

    monkeypatch.setattr(sys, "flags", Flags)
    assert main(["run", "script.py"]) == 1
    assert "with -E, -I or -S" in capsys.readouterr().err


def test_the_environment_variable_does_it_without_the_command(tmp_path: Path) -> None:
    (tmp_path / "names.py").write_text("import sys, lightning\nprint(lightning.__version__)\nsys.exit(4)\n")
    folder = run("compat", "path", cwd=tmp_path, prefix=("-m", "leyden")).stdout.strip()
    assert folder == STARTUP
    path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = run("names.py", cwd=tmp_path, prefix=(), env={**os.environ, "PYTHONPATH": path})
    assert (done.returncode, done.stdout, done.stderr) == (4, "2.6.6\n", "")


def test_the_sitecustomize_behind_ours_runs(tmp_path: Path) -> None:
    (tmp_path / "behind").mkdir()
    (tmp_path / "behind" / "sitecustomize.py").write_text("import lightning\nFOUND = lightning.__version__\n")
    (tmp_path / "shows.py").write_text("import sitecustomize\nprint(sitecustomize.FOUND, sitecustomize.__file__)\n")
    path = os.pathsep.join([str(tmp_path / "behind"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = run("shows.py", cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})
    assert done.stdout == f"2.6.6 {tmp_path / 'behind' / 'sitecustomize.py'}\n"


def test_leyden_in_the_working_directory_is_found_by_the_program(tmp_path: Path) -> None:
    source = Path(STARTUP).parents[2]
    (tmp_path / "names.py").write_text("import lightning, leyden\nprint(leyden.__file__)\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = run(str(tmp_path / "names.py"), cwd=source, env=environment)
    assert done.stdout.strip() == str(source / "leyden" / "__init__.py")
