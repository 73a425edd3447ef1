# SPDX-License-Identifier: Apache-2.0
"""Write checkpoints while the disk fails, or the process is killed, at each call that changes it; say what was lost.

    LD_PRELOAD=<faulty_disk.so> python faulty_disk_script.py <scene> <mode,mode...> <every>

Each trial is a forked child that does one thing (save, replace, remove) and is hit at its n-th call. The parent then
looks at what is there. Prints one line of JSON: how many trials, which calls were hit, and what was wrong.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from leyden import atomic, files, folders
from leyden.errors import CheckpointError

MODES = {
    "count": 0,
    "kill": 1,
    "kill-after": 2,
    "kill-half": 3,
    **{n: 100 + getattr(errno, n) for n in ("ENOSPC", "EIO")},
}
RAISED = 3
warnings.simplefilter("ignore")
disk = ctypes.CDLL(None)
disk.calls.restype = ctypes.c_char_p


def state(step: int) -> dict[str, Any]:
    return {
        "global_step": step,
        "epoch": 0,
        "state_dict": {"w": torch.full((3000,), float(step)), "b": torch.full((7,), float(step))},
        "leyden": {"format": 1},
    }


def save_file(path: Path, step: int) -> None:
    files.save(state(step), path)


def save_folder(path: Path, step: int) -> None:
    def write(folder: Path) -> None:
        content = state(step)
        dcp.save({"model": content.pop("state_dict")}, checkpoint_id=str(folder), no_dist=True)
        torch.save(content, folder / "meta.pt")
        (folder / "inner").mkdir()
        (folder / "inner" / "note.txt").write_text("a file in a folder in the folder")

    files.save_folder(path, write, {"global_step": step, "epoch": 0})


def without_exchange(save: Callable[[Path, int], None]) -> Callable[[Path, int], None]:
    """Save as on a file system where two folders cannot change their names in one step."""

    def saved(path: Path, step: int) -> None:
        real, folders._exchange = folders._exchange, lambda one, other: False
        try:
            save(path, step)
        finally:
            folders._exchange = real

    return saved


# name: how to save, whether the checkpoint replaces one of the same name, whether it is removed instead
SCENES: dict[str, tuple[Callable[[Path, int], None], bool, bool]] = {
    "file": (save_file, False, False),
    "file-over": (save_file, True, False),
    "file-remove": (save_file, True, True),
    "folder": (save_folder, False, False),
    "folder-over": (save_folder, True, False),
    "folder-over-by-two-renames": (without_exchange(save_folder), True, False),
    "folder-remove": (save_folder, True, True),
}


def trial(place: Path, scene: str, at: int, mode: str, persistent: bool) -> tuple[int, str, list[str]]:
    """Do the scene with a fault at call ``at``; return its exit status, the call that was hit, and what is wrong."""
    save, replaces, removes = SCENES[scene]
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    save(place / "a.ckpt", 1)
    path = place / ("a.ckpt" if replaces else "b.ckpt")
    if removes:
        save(place / "kept.ckpt", 0)
    log = place.parent / "calls"
    child = os.fork()
    if child == 0:
        status = 9
        try:
            disk.arm(at, MODES[mode], int(persistent))
            files.remove(path) if removes else save(path, 2)
            status = 0
        except CheckpointError as error:
            status = RAISED if "could not be" in str(error) or "damaged" in str(error) else 8
        except BaseException:
            traceback.print_exc()
        finally:
            disk.disarm()
            log.write_bytes(disk.calls())
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    status = os.waitstatus_to_exitcode(ended)
    called = log.read_text().split() if status >= 0 else []
    hit = called[at - 1] if 0 < at <= len(called) else ""
    return status, hit, [*look(place, path, status, removes, hit, persistent), *afterwards(place, path, save)]


def look(place: Path, path: Path, status: int, removes: bool, hit: str, persistent: bool) -> list[str]:
    """Return what is wrong with what the child left."""
    wrong: list[str] = []
    if status not in (0, RAISED, -signal.SIGKILL):
        return [f"exit status {status}"]
    wanted = {0: (2,), RAISED: (1, 2), -signal.SIGKILL: (1, 2)}[status] if not removes else (0, 1)
    found = files.newest(place)
    if found is None:
        return [*wrong, "nothing to resume from"]
    step = files.recorded_step(found)
    loaded = files.load(found)
    if step not in wanted or loaded["global_step"] != step:
        wrong.append(f"the newest is of step {step}, wanted one of {wanted}")
    if any((tensor != step).any() for tensor in loaded["state_dict"].values()):
        wrong.append("the weights are of another step")
    if path.name == "a.ckpt" and not removes and files.load(path)["global_step"] != step:
        wrong.append("the newest is not the one of that name")
    if removes and status == 0 and os.path.lexists(path):
        wrong.append("it was not removed")
    left = [entry.name for entry in place.iterdir() if not entry.name.endswith(".ckpt")]
    if not all(atomic.is_temporary(name) for name in left):
        wrong.append(f"left behind under a name that is not ours: {left}")
    if persistent and hit == "rename":  # no rename works, so that the former one cannot get its name back
        left = [name for name in left if not name.endswith(".old")]
    if left and status >= 0 and hit not in ("unlink", "unlinkat", "rmdir"):
        wrong.append(f"left behind without need: {left}")
    return wrong


def afterwards(place: Path, path: Path, save: Callable[[Path, int], None]) -> list[str]:
    """Return what is wrong with the next save: it must work, and clear away what is left."""
    (place / ".theirs.ckpt.tmp").write_text("not ours")
    save(path, 3)
    if files.newest(place) != path or files.load(path)["global_step"] != 3:
        return ["the next save does not count"]
    left = [entry.name for entry in place.iterdir() if entry.name.startswith(".") and entry.name != ".theirs.ckpt.tmp"]
    return [f"the next save left {left}"] * bool(left) + ["it removed what is not ours"] * (
        not (place / ".theirs.ckpt.tmp").exists()
    )


def main(scene: str, modes: list[str], every: int) -> dict[str, Any]:
    place = Path(tempfile.mkdtemp()) / "checkpoints"
    status, _, wrong = trial(place, scene, 0, "count", False)
    assert status == 0, status
    assert not wrong, wrong
    calls = (place.parent / "calls").read_text().split()
    trials, raised, failures = 0, 0, []
    for mode in modes:
        mode, _, stays = mode.partition("+")
        for at in range(1, len(calls) + 1, every):
            status, hit, wrong = trial(place, scene, at, mode, bool(stays))
            trials += 1
            raised += status == RAISED
            if mode.startswith("kill") and status != -signal.SIGKILL:
                wrong.append(f"was not killed, but ended with {status}")
            failures += [f"{mode}{stays} at call {at} ({calls[at - 1]}): {each}" for each in wrong]
    shutil.rmtree(place.parent)
    return {"trials": trials, "raised": raised, "calls": calls, "failures": failures}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2].split(","), int(sys.argv[3]))))
