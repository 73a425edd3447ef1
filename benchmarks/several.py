# SPDX-License-Identifier: Apache-2.0
"""Two processes that train together over gloo: what ddp costs beyond a hand-written loop around DistributedDataParallel.

    python benchmarks/several.py [--steps 2000] [--rounds 7] [--only leyden]

Both processes run the same contenders by turns, each right after the loop by hand, in one process group.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import harness
import workloads
from frameworks import BARE, RECORDED, bound, by_hand, installed, with_trainer
from harness import Contender, Row, Section
from workloads import BatchesInMemory, Workload

PROCESSES = 2
TITLE = "(h) several processes: a tiny step under ddp"


def _work(steps: int) -> Workload:
    """The tiny step of (a), with other batches in each process."""
    work = workloads.tiny(steps)
    batches = BatchesInMemory(steps, seed=torch.distributed.get_rank())
    return replace(work, loader=lambda: batches)


def _contenders(work: Workload, only: str) -> list[Contender]:
    several: dict[str, Any] = {"devices": PROCESSES, "strategy": "ddp"}
    rows = [
        Contender("leyden, self.log", bound(with_trainer, work, arguments=several), RECORDED),
        Contender("leyden, nothing logged", bound(with_trainer, work, metrics=0, arguments=several), BARE),
    ]
    if "lightning" in installed():
        way = bound(with_trainer, work, name="lightning.pytorch", arguments=several)
        rows.append(Contender("lightning, self.log", way, RECORDED))
    return [row for row in rows if only in row.name]


def child(steps: int, rounds: int, only: str, target: str) -> None:
    """Measure, as one of the processes; rank 0 writes what it has measured."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    work = _work(steps)
    loops = {
        RECORDED: bound(by_hand, work, parallel=True),
        BARE: bound(by_hand, work, record=False, parallel=True),
    }
    with harness.quiet():
        rows = harness.compare(loops, _contenders(work, only), rounds, work.steps)
    if torch.distributed.get_rank() == 0:
        Path(target).write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def measure(steps: int, rounds: int, only: str = "") -> Section:
    """Measure (h) of the benchmarks.

    Raises:
        RuntimeError: with what they printed, if the processes failed.
    """
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        target = str(Path(folder) / "rows.json")
        words = [sys.executable, str(Path(__file__).resolve()), "--child", target, "--only", only]
        words += ["--steps", str(steps), "--rounds", str(rounds)]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(PROCESSES)}
        # as torchrun says it: who starts with these variables joins
        shared |= {"LOCAL_WORLD_SIZE": str(PROCESSES), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "bench"}
        shared |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        started = [
            subprocess.Popen(
                words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(PROCESSES)
        ]  # fmt: skip
        said = [process.communicate()[0] for process in started]
        if any(process.returncode for process in started):
            raise RuntimeError("\n".join(said))
        rows = [Row(**row) for row in json.loads(Path(target).read_text(encoding="utf-8"))]
    text = (
        f"The tiny step of (a) in {PROCESSES} processes with other batches in each, gloo, 1 thread each; {steps} steps. The"
        " loop by hand has DistributedDataParallel around its network."
    )
    return Section(TITLE, text, rows)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="batches in one run")
    parser.add_argument("--rounds", type=int, default=7, help="runs of each contender")
    parser.add_argument("--only", default="", help="only the frameworks whose row contains this")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.steps, options.rounds, options.only, options.child)
        return
    section = measure(options.steps, options.rounds, options.only)
    print(f"{harness.machine()}; load {os.getloadavg()[0]:.1f}; median of {options.rounds} rounds\n")
    print(harness.as_text(section))
    print(harness.as_markdown(section))


if __name__ == "__main__":
    main()
