# SPDX-License-Identifier: Apache-2.0
"""The environment of processes that are to have the import names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from leyden.compat.process import STARTUP, environment


def test_the_folder_comes_first_and_once() -> None:
    path = os.pathsep.join(["/a", "/b"])
    once = environment({"PYTHONPATH": path, "OTHER": "1"})
    assert once["PYTHONPATH"].split(os.pathsep)[0] == STARTUP
    assert once["PYTHONPATH"].split(os.pathsep)[-2:] == ["/a", "/b"]
    assert once["OTHER"] == "1"
    assert environment(once)["PYTHONPATH"].split(os.pathsep).count(STARTUP) == 1
    assert "" not in environment({})["PYTHONPATH"].split(os.pathsep)  # that would be the working directory


def test_a_python_without_leyden_starts_as_ever(tmp_path: Path) -> None:
    """The program may start another python: the folder alone does nothing there, and says nothing."""
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {STARTUP!r}); import sitecustomize; print(sys.path)"],
        cwd=tmp_path, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stderr == ""
    assert STARTUP not in done.stdout
