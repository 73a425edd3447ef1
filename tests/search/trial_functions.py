# SPDX-License-Identifier: Apache-2.0
"""Functions that the tests run as trials: a process imports them from here."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def square(hparams: Any) -> float:
    return float(hparams.x**2)


def slow_first(hparams: Any) -> int:
    """The earlier the trial, the later it ends."""
    time.sleep(0.3 if hparams.x == 0 else 0)
    return int(hparams.x)


def process_of_its_own(hparams: Any) -> tuple[int, int]:
    return os.getpid(), os.getppid()


def environment(hparams: Any, *args: Any) -> dict[str, Any]:
    return {
        "args": args,
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "at_import": VISIBLE_AT_IMPORT,
    }


def raises(hparams: Any) -> int:
    if hparams.x == 1:
        raise KeyError("deep inside")
    return int(hparams.x)


def is_killed(hparams: Any) -> int:
    if hparams.x == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if hparams.x == 2:
        os._exit(7)
    if hparams.x == 3:
        sys.exit("enough")
    return int(hparams.x)


def prints(hparams: Any) -> None:
    print(f"hello from {hparams.x}")
    print("no end of line", end="", file=sys.stderr)


def returns_what_cannot_be_sent(hparams: Any) -> Any:
    return lambda: hparams


def exits_with_0(hparams: Any) -> None:
    sys.exit(0)


def leaves_a_fork_of_itself(hparams: Any) -> int:
    if os.fork() == 0:
        time.sleep(FORK_SLEEPS)
        os._exit(0)
    return int(hparams.x)


def trained_tensor(hparams: Any) -> Any:
    import torch

    return {"loss": torch.ones(2, requires_grad=True) * hparams.x}


def uses_a_data_loader(hparams: Any) -> float:
    import torch

    loader = torch.utils.data.DataLoader(torch.arange(8.0), batch_size=2, num_workers=1)
    return float(sum(batch.sum() for batch in loader))


def leaves_a_process_and_waits(hparams: Any) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    path = Path(hparams.folder) / f"{hparams.x}.pids"
    path.with_suffix(".part").write_text(f"{os.getpid()} {child.pid}")
    path.with_suffix(".part").rename(path)
    if hparams.wait == "deaf":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hparams.wait:
        time.sleep(60)


FORK_SLEEPS = 30.0
VISIBLE_AT_IMPORT = os.environ.get("CUDA_VISIBLE_DEVICES")
IN_A_TRIAL = multiprocessing.parent_process() is not None
