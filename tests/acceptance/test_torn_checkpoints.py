# SPDX-License-Identifier: Apache-2.0
"""C1 and C2, by real faults: a process that writes a checkpoint is killed, or its disk fails, at each call that changes it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
KILLS = "kill,kill-after,kill-half"
ERRORS = "ENOSPC,EIO,ENOSPC+stays"
ONE_FILE = ["file", "file-over", "file-remove"]
FOLDERS = ["folder", "folder-over", "folder-over-by-two-renames", "folder-remove"]

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None,
    reason="needs Linux and a C compiler to put faults into the disk",
)


@pytest.fixture(scope="module")
def faulty_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("faulty") / "faulty_disk.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(HERE / "faulty_disk.c"), "-ldl"]
    subprocess.run(command, check=True, timeout=60)
    return library


def run(library: Path, scene: str, modes: str, every: int, *more: str, script: str = "disk") -> dict[str, Any]:
    """Do all trials of a scene; show how many there were, and return what the script found."""
    done = subprocess.run(
        [sys.executable, str(HERE / f"faulty_{script}_script.py"), scene, modes, str(every), *more],
        env={**os.environ, "LD_PRELOAD": str(library)}, capture_output=True, text=True, timeout=1500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    print(f"{scene}, {modes}: {found['trials'] - len(found['failures'])} of {found['trials']} loadable")
    return found


def test_the_faulty_disk_sees_the_calls_that_matter(faulty_disk: Path) -> None:
    """The order: written, flushed, renamed, the folder flushed; the manifest last."""
    calls = run(faulty_disk, "file", "count", 1000)["calls"]
    assert [call for call in calls if call != "write"] == ["creat", "fsync", "rename", "fsync"]
    assert calls.index("write") > 0
    calls = run(faulty_disk, "folder-over", "count", 1000)["calls"]
    committed = calls.index("renameat2")
    assert calls[committed - 3 : committed + 2] == ["rename", "fsync", "fsync", "renameat2", "fsync"]
    assert set(calls[committed + 2 :]) <= {"unlink", "unlinkat", "rmdir"}  # the old one goes after that


@pytest.mark.parametrize("scene", ONE_FILE)
def test_C1_a_file_is_whole_after_a_kill_at_every_call(faulty_disk: Path, scene: str) -> None:
    found = run(faulty_disk, scene, "kill-half" if scene == "file-over" else "kill", 1)
    assert found["failures"] == []
    assert found["trials"] == len(found["calls"]) >= 2


@pytest.mark.parametrize("scene", ["folder", "folder-over-by-two-renames"])
def test_C1_a_folder_is_whole_after_a_kill_at_every_fifth_call(faulty_disk: Path, scene: str) -> None:
    found = run(faulty_disk, scene, "kill", 5)
    assert found["failures"] == []
    assert found["trials"] >= 6


@pytest.mark.parametrize(("scene", "every"), [("file-over", 1), ("folder-over", 9)])
def test_C2_a_failing_disk_raises_and_leaves_what_was_there(faulty_disk: Path, scene: str, every: int) -> None:
    found = run(faulty_disk, scene, "ENOSPC+stays,EIO", every)
    assert found["failures"] == []
    assert found["raised"] >= found["trials"] / 3


@pytest.mark.parametrize(("rank", "mode", "every", "how"), [(0, "kill", 9, "sync"), (1, "ENOSPC+stays", 6, "behind")])
def test_C1_C2_a_folder_of_two_ranks_is_whole_whatever_happens_to_one(
    faulty_disk: Path, rank: int, mode: str, every: int, how: str
) -> None:
    found = run(faulty_disk, str(rank), mode, every, how, "over", script="ranks")
    assert found["failures"] == []
    assert found["trials"] >= 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("how", ["sync", "behind"])
@pytest.mark.parametrize("name", ["over", "new"])
@pytest.mark.parametrize("rank", [0, 1])
def test_C1_C2_every_call_of_every_rank(faulty_disk: Path, rank: int, name: str, how: str) -> None:
    found = run(faulty_disk, str(rank), f"{KILLS},{ERRORS}", 1, how, name, script="ranks")
    assert found["failures"] == []
    assert found["trials"] == 6 * len(found["calls"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("scene", ONE_FILE + FOLDERS)
def test_C1_C2_every_call_of_every_scene(faulty_disk: Path, scene: str) -> None:
    found = run(faulty_disk, scene, f"{KILLS},{ERRORS}", 1)
    assert found["failures"] == []
    assert found["trials"] == 6 * len(found["calls"])
