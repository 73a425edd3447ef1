# SPDX-License-Identifier: Apache-2.0
"""A run whose process is killed again and again, and started again, ends as one that never was."""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

import killed_run_script

SCRIPT = Path(__file__).with_name("killed_run_script.py")


class Started:
    """A fresh process that runs the script."""

    def __init__(self, root: Path, options: list[str]) -> None:
        command = [sys.executable, str(SCRIPT), str(root), *options]
        with open(root / "output", "ab") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)

    def ended(self) -> int | None:
        """The exit status; None as long as it runs."""
        return self.process.poll()

    def kill(self) -> None:
        """SIGKILL: nothing of it runs any more."""
        self.process.kill()
        self.process.wait()


class Forked:
    """The same, forked from this process: for the short form, which has no time for imports."""

    def __init__(self, root: Path, options: list[str]) -> None:
        self.status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                with open(root / "output", "ab", buffering=0) as output:
                    os.dup2(output.fileno(), 1)
                    os.dup2(output.fileno(), 2)
                killed_run_script.main([str(root), *options])
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)

    def ended(self) -> int | None:
        """The exit status; None as long as it runs."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status

    def kill(self) -> None:
        """SIGKILL: nothing of it runs any more."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def count(root: Path) -> int:
    """How many batches all processes of this run have trained on."""
    return (root / "steps").stat().st_size if (root / "steps").exists() else 0


def live(root: Path, options: list[str], draw: random.Random, most: int, start: Any, longest_start: float) -> bool:
    """Start the script and kill it at a random moment: while it starts, or some steps later. Return whether it ended."""
    process, begun = start(root, options), count(root)
    wanted = draw.choice([0, draw.randint(1, most), draw.randint(1, most)])
    until = math.inf if wanted else time.monotonic() + draw.uniform(0.0, longest_start)
    # on a fast machine it has long started when the time to start is over
    while process.ended() is None and count(root) < begun + (wanted or most) and time.monotonic() < until:
        time.sleep(0.002)
    if wanted:
        time.sleep(draw.uniform(0.0, 0.03))
    ended = process.ended()
    if ended is None:
        process.kill()
    assert ended in (None, 0), (root / "output").read_text()[-3000:]
    return ended == 0


def finish(root: Path, options: list[str], start: Any) -> None:
    """Run the script to its end."""
    process = start(root, options)
    while (ended := process.ended()) is None:
        time.sleep(0.02)
    assert ended == 0, (root / "output").read_text()[-3000:]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All scalars in the event files as they are, superseded ones too if there were any."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util import tensor_util

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("*tfevents*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":
                    number = tensor_util.make_ndarray(value.tensor).item()
                    found.setdefault(value.tag, []).append((event.step, number))
    return found


def shown(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All scalars as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    page = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    page.Reload()
    return {tag: [(event.step, event.value) for event in page.Scalars(tag)] for tag in page.Tags()["scalars"]}


def logs(root: Path) -> tuple[list[Path], list[Path]]:
    """The folders of versions that hold a metrics.csv, and those that hold checkpoints or events of a run."""
    return sorted(path.parent for path in root.rglob("metrics.csv")), sorted(
        {path.parent for path in root.rglob("*tfevents*")}
    )


def compare(whole: Path, killed: Path) -> None:
    first, second = (torch.load(root / "weights.pt", weights_only=True) for root in (whole, killed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    ours, theirs = logs(whole), logs(killed)
    # of a process that was killed before its first checkpoint nothing goes on: its version stays as it is
    for here, there in zip(ours, theirs, strict=True):
        assert len(here) <= 1
        for folder in here:
            same = there[-1]
            if (folder / "metrics.csv").exists():
                assert (same / "metrics.csv").read_text() == (folder / "metrics.csv").read_text()
            if list(folder.glob("*tfevents*")):
                assert len(scalars(folder)["loss_step"]) > 10
                assert scalars(same) == scalars(folder)
                assert shown(same) == shown(folder)


def soak(folder: Path, seed: int, kills: int, options: list[str], most: int, start: Any, longest_start: float) -> None:
    """Run the script once undisturbed, once with ``kills`` kills, and compare."""
    whole, killed = folder / "whole", folder / "killed"
    whole.mkdir()
    killed.mkdir()
    finish(whole, options, start)
    draw = random.Random(seed)
    for done in range(kills):
        assert not live(killed, options, draw, most, start, longest_start), f"the run was over after {done} kills"
    finish(killed, options, start)
    compare(whole, killed)


def small_soak(folder: str) -> None:
    """What the short test runs in a process of its own, from which it forks."""
    import leyden.loggers.events

    assert leyden.loggers.events
    options = ["--steps", "40", "--every", "5", "--pause", "0.002"]
    soak(Path(folder), 1, 3, options, most=11, start=Forked, longest_start=0.3)


def test_H4_a_run_killed_three_times_ends_as_one_never_killed(tmp_path: Path) -> None:
    code = f"import test_killed_runs; test_killed_runs.small_soak({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, check=True, timeout=100)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("seed", "logger"),
    [*((seed, "both") for seed in range(5)), (5, "default"), (6, "named"), (7, "none"), (8, "default"), (9, "named")],
)
def test_H4_a_run_killed_20_times_ends_as_one_never_killed(
    tmp_path: Path, seed: int, logger: str, workers: int
) -> None:
    options = ["--steps", "300", "--logger", logger, "--workers", str(workers)]
    soak(tmp_path, seed, 20, options, most=24, start=Started, longest_start=6.0)
