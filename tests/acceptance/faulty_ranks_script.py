# SPDX-License-Identifier: Apache-2.0
"""Two ranks write a checkpoint folder while one is killed, or its disk fails, at each call that changes the disk.

    LD_PRELOAD=<faulty_disk.so> python faulty_ranks_script.py <rank> <mode,mode...> <every> <sync|behind> <new|over>

Each trial forks two processes that meet and save together; the calls of ``rank`` are counted, and the n-th is hit. The
parent then looks at what is there, as ``faulty_disk_script`` does. Prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from faulty_disk_script import MODES, RAISED, afterwards, disk, look, save_folder
from leyden.checkpoint_io import AsyncCheckpointIO
from leyden.errors import CheckpointError
from leyden.runtime import collective
from leyden.runtime.world import OURS, World
from leyden.strategies.spread import ShardedCheckpoints

OTHER = 8
"""The exit status of a rank that ends because the other one is gone."""


def checkpoint(step: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))
    return {
        "global_step": step,
        "epoch": 0,
        "state_dict": {
            "w": distribute_tensor(torch.full((3001,), float(step)), mesh, [Shard(0)]),
            "b": distribute_tensor(torch.full((7,), float(step)), mesh, [Replicate()]),
            "c": torch.full((5,), float(step)),
        },
        "leyden": {"format": 1},
    }


def rank(world: World, path: Path, at: int, mode: str, persistent: bool, hit: int, behind: bool, log: Path) -> int:
    """Save together with the other rank; return the exit status."""
    os.environ.update({**world.environment(world.local_rank), OURS: "spawn"})
    collective.meet(world, "gloo", timedelta(seconds=30))
    strategy = ShardedCheckpoints([torch.device("cpu")] * 2, checkpoint_io=AsyncCheckpointIO() if behind else None)
    strategy.saves_shards = True
    strategy.assign([torch.device("cpu")] * 2, 1)
    content = checkpoint(2)
    status = 9
    try:
        if world.rank == hit:
            disk.arm(at, MODES[mode], int(persistent))
        strategy.save_checkpoint(content, path)
        strategy.checkpoint_io.settle()
        status = 0
    except CheckpointError as error:
        status = RAISED if "could not be" in str(error) or "damaged" in str(error) else OTHER
    except Exception as error:
        status = OTHER if "peer" in str(error) or "onnection" in str(error) else 9
        if status == 9:
            traceback.print_exc()
    finally:
        disk.disarm()
        if world.rank == hit:
            log.write_bytes(disk.calls())
    return status


def trial(place: Path, hit: int, at: int, mode: str, persistent: bool, behind: bool, over: bool) -> Any:
    """Return the exit status of the rank that is hit, the call, and what is wrong."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    save_folder(place / "a.ckpt", 1)
    path, log = place / ("a.ckpt" if over else "b.ckpt"), place.parent / "calls"
    world = World(size=2, local_size=2, port=collective.serve())
    children, gate = [], collective.Gate()
    for each in range(2):
        pid = os.fork()
        if pid == 0:
            gate.wait()
            status = 9
            try:
                own = replace(world, rank=each, local_rank=each)
                status = rank(own, path, at, mode, persistent, hit, behind, log)
            finally:
                os._exit(status)
        children.append(pid)
    gate.open()
    ended: dict[int, int] = {}
    until = time.monotonic() + 60
    while len(ended) < 2 and time.monotonic() < until:
        for each, pid in enumerate(children):
            if each not in ended and (result := os.waitpid(pid, os.WNOHANG))[0]:
                ended[each] = os.waitstatus_to_exitcode(result[1])
        time.sleep(0.005)
    wrong = []
    for each, pid in enumerate(children):
        if each not in ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            wrong.append(f"rank {each} hangs")
    if wrong:
        return None, "", wrong
    status, other = ended[hit], ended[1 - hit]
    called = log.read_text().split() if status >= 0 else []
    call = called[at - 1] if 0 < at <= len(called) else ""
    allowed = {0: (0,), RAISED: (RAISED, OTHER), -signal.SIGKILL: (0, RAISED, OTHER)}.get(status, ())
    if other not in allowed:
        wrong.append(f"the rank that was hit ended with {status}, the other one with {other}")
    wrong += look(place, path, status, False, call, persistent)
    return status, call, [*wrong, *afterwards(place, path, save_folder)]


def main(hit: int, modes: list[str], every: int, behind: bool, over: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    place = Path(tempfile.mkdtemp()) / "checkpoints"
    status, _, wrong = trial(place, hit, 0, "count", False, behind, over)
    assert status == 0, status
    assert not wrong, wrong
    calls = (place.parent / "calls").read_text().split()
    trials, raised, failures = 0, 0, []
    for mode in modes:
        mode, _, stays = mode.partition("+")
        for at in range(1, len(calls) + 1, every):
            status, _, wrong = trial(place, hit, at, mode, bool(stays), behind, over)
            trials += 1
            raised += status == RAISED
            if mode.startswith("kill") and status != -signal.SIGKILL:
                wrong.append(f"was not killed, but ended with {status}")
            failures += [f"{mode}{stays} at call {at} ({calls[at - 1]}): {each}" for each in wrong]
    shutil.rmtree(place.parent)
    return {"trials": trials, "raised": raised, "calls": calls, "failures": failures}


if __name__ == "__main__":
    given = sys.argv[1:]
    print(json.dumps(main(int(given[0]), given[1].split(","), int(given[2]), given[3] == "behind", given[4] == "over")))
