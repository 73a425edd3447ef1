# SPDX-License-Identifier: Apache-2.0
"""What several processes do about a checkpoint: one writes or all do, and all learn of a failure (C2)."""

from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from leyden import files
from leyden.errors import CheckpointError
from leyden.strategies.base import Strategy


class TwoProcesses(Strategy):
    """The verbs of several processes, over gloo."""

    global_rank = property(lambda self: dist.get_rank())
    world_size = property(lambda self: dist.get_world_size())

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        box = [obj]
        dist.broadcast_object_list(box, src)
        return box[0]

    def gather_objects(self, item: Any) -> list[Any]:
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, item)
        return found


def _process(rank: int, port: int, folder: Path, answers: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    strategy = TwoProcesses()
    found: list[Any] = []

    def attempt(work: Any) -> None:
        try:
            work()
            found.append("done")
        except CheckpointError as error:
            found.append(str(error))

    def write(into: Path, fails: int = -1) -> None:
        (into / f"part-{rank}").write_bytes(bytes([rank]) * 1000)
        if rank == fails:
            raise OSError(28, "No space left on device")

    attempt(lambda: strategy.save_checkpoint({"global_step": 1}, folder / "a.ckpt"))
    attempt(lambda: strategy.save_checkpoint({"global_step": 2}, folder / "file" / "b.ckpt"))
    attempt(lambda: strategy.save_checkpoint({"f": lambda: 1}, folder / "a.ckpt"))
    attempt(lambda: strategy.save_folder(folder / "c.ckpt", write, {"global_step": 3}))
    attempt(lambda: strategy.save_folder(folder / "c.ckpt", lambda into: write(into, fails=1), {"global_step": 4}))
    attempt(lambda: strategy.save_folder(folder / "d.ckpt", lambda into: write(into, fails=0), {"global_step": 4}))
    attempt(lambda: strategy.save_folder(folder / "file" / "e.ckpt", write, {"global_step": 4}))
    attempt(lambda: strategy.save_folder(folder / "c.ckpt", write, {"global_step": 5}))
    answers.put((rank, found))
    dist.barrier()
    dist.destroy_process_group()


def test_C2_a_failed_write_raises_on_every_process(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    processes = [spawn.Process(target=_process, args=(rank, port, tmp_path, answers)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=90) for _ in processes)
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    for rank, there in ((0, ""), (1, "On rank 0: ")):
        done, no_folder, no_pickle, folder, other, mine, nowhere, again = found[rank]
        assert (done, folder, again) == ("done", "done", "done")
        assert no_folder.startswith(
            f"{there}The checkpoint '{tmp_path}/file/b.ckpt' could not be written: there is a file"
        )
        assert "cannot be pickled" in no_pickle
        assert there in no_pickle
        assert "there is a file where a folder is needed" in nowhere
        for failure, failed in ((other, 1), (mine, 0)):
            assert failure.startswith("The checkpoint" if rank == failed else f"On rank {failed}: The checkpoint")
            assert "the disk or the quota is full" in failure
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt", "c.ckpt", "file"]
    assert files.load(tmp_path / "a.ckpt")["global_step"] == 1
    assert files.recorded_step(tmp_path / "c.ckpt") == 5
    assert files.verify(tmp_path / "c.ckpt")
    assert {path.name for path in (tmp_path / "c.ckpt").iterdir()} == {"part-0", "part-1", "leyden-manifest.json"}


def test_one_process_needs_nobody(tmp_path: Path) -> None:
    strategy = Strategy()
    strategy.save_folder(
        tmp_path / "a.ckpt", lambda folder: (folder / "x").write_text("x") and None, {"global_step": 1}
    )
    assert files.newest(tmp_path) == tmp_path / "a.ckpt"
    with pytest.raises(CheckpointError, match="there is a file of that name"):
        strategy.save_folder(tmp_path / "a.ckpt" / "x", lambda folder: None)
