# SPDX-License-Identifier: Apache-2.0
"""Runs that are told to end: one process imports torch and forks each, so that it takes no longer than its training.

python preemption_script.py <folder> <trials> <seed>    at random moments; prints a line of JSON for each
python preemption_script.py                             runs the scripts that it is given, one in each line of JSON
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import random
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden import files
from leyden.errors import SIGTERMException

PAUSE = 0.003


class Net(L.LightningModule):
    """Small, but with dropout, a schedule and a metric of the epoch; tells ``begun`` when its fit has begun."""

    def __init__(self, begun: int) -> None:
        super().__init__()
        self.begun = begun
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 1))

    def prepare_data(self) -> None:
        os.write(self.begun, b"b")

    def setup(self, stage: str) -> None:
        time.sleep(PAUSE)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        time.sleep(PAUSE)
        loss = (self.net(batch[0]) ** 2).mean()
        self.log("loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        time.sleep(PAUSE)
        # draws random numbers: a validation that is cut must leave no trace
        self.log("val_loss", (self.net(batch[0] + torch.rand(1)) ** 2).mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95), "interval": "step"}]


class Stopped(L.Callback):
    """Notes the step at which a signal has ended the fit."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        assert type(exception) is SIGTERMException
        assert trainer.received_sigterm
        self.path.write_text(str(trainer.global_step))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        # a signal that comes later than this ends the process, but the fit is over
        self.path.write_text(str(trainer.global_step))


def train(folder: Path, begun: int, workers: int) -> None:
    """Train from the newest checkpoint in ``folder`` to the end; leave the weights in ``weights.pt``."""
    L.seed_everything(1, verbose=False)
    data = TensorDataset(torch.randn(64, 4))
    loader = DataLoader(data, batch_size=4, shuffle=True, num_workers=workers)
    trainer = L.Trainer(
        max_epochs=3, val_check_interval=0.5, limit_val_batches=4, accumulate_grad_batches=2, logger=False,
        callbacks=[L.callbacks.ModelCheckpoint(folder, every_n_train_steps=5), Stopped(folder.with_suffix(".stopped"))],
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, accelerator="cpu",
    )  # fmt: skip
    model = Net(begun)
    trainer.fit(model, loader, DataLoader(data, batch_size=4), ckpt_path="last")
    torch.save(model.state_dict(), folder / "weights.pt")


def start(run: Callable[[int], None]) -> tuple[int, int]:
    """Fork ``run`` into a process group of its own; return its id and what it tells its beginning through."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child:
        os.close(theirs)
        with contextlib.suppress(PermissionError):
            os.setpgid(child, child)
        return child, ours
    os.close(ours)
    code = 1
    try:
        os.setpgid(0, 0)
        sys.stdout = sys.stderr
        run(theirs)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except KeyboardInterrupt:  # as the interpreter does
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(child: int, seconds: float) -> int | None:
    """Wait for a process; return its exit code, negative for a signal, None if it still runs."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def group_is_gone(group: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


def complete(folder: Path) -> dict[str, Any]:
    """What the folder holds: the highest step, how many files have it, and whether they and all others can be read."""
    found = [path for path in folder.iterdir() if path.suffix == files.SUFFIX]
    for path in found:
        files.load(path, verify=True)
    steps = [files.recorded_step(path) or 0 for path in found]
    others = sorted(path.name for path in folder.iterdir() if path.suffix not in (files.SUFFIX, ".pt"))
    return {"step": max(steps, default=-1), "newest": steps.count(max(steps, default=-1)), "others": others}


def equal(one: Path, other: Path) -> bool:
    first, second = torch.load(one), torch.load(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def trials(root: Path, count: int, seed: int) -> Iterator[dict[str, Any]]:
    chance = random.Random(seed)
    lengths = {}
    for workers in (0, 2):
        whole = root / f"whole-{workers}"
        child, begun = start(lambda pipe: train(whole, pipe, workers))  # noqa: B023  # it runs at once
        os.read(begun, 1)
        before = time.monotonic()
        assert ended(child, 60) == 0
        lengths[workers] = time.monotonic() - before
        os.close(begun)
    done = 0
    while done < count:
        workers = chance.choice((0, 0, 2))
        number = chance.choice((signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2))
        to_group, delay = bool(workers) or chance.random() < 0.5, chance.random() * lengths[workers]
        folder = root / f"trial-{done}"
        child, begun = start(lambda pipe: train(folder, pipe, workers))  # noqa: B023
        os.read(begun, 1)
        select.select([], [], [], delay)
        if os.waitpid(child, os.WNOHANG)[0]:
            os.close(begun)
            continue  # it had ended: this machine was faster than before
        (os.killpg if to_group else os.kill)(child, number)
        code = ended(child, 60)
        os.close(begun)
        if code == 0 or (code == -number and folder.with_suffix(".stopped").exists()):
            continue  # the fit was over: on_exception would have ended it with 143
        outcome = {"trial": done, "code": code, "signal": number.name, "workers": workers, "group": to_group}
        outcome |= {"delay": round(delay, 4), "gone": group_is_gone(child, 10), **complete(folder)}
        outcome["stopped"] = int(folder.with_suffix(".stopped").read_text())
        child, begun = start(lambda pipe: train(folder, pipe, workers))  # noqa: B023
        outcome["resumed"] = ended(child, 60)
        os.close(begun)
        weights = folder / "weights.pt"
        outcome["exact"] = weights.exists() and equal(weights, root / f"whole-{workers}" / "weights.pt")
        yield outcome
        done += 1


def import_all() -> None:
    """Import here what each run would otherwise import anew."""
    import torch._dynamo  # noqa: F401  # an optimizer does

    for module in pkgutil.walk_packages(L.__path__, "leyden."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def run_scripts() -> None:
    """Read ``[script, argument]`` from each line, run it in a process of its own, print its exit code and output."""
    for line in sys.stdin:
        text, argument = json.loads(line)

        def run(pipe: int, text: str = text, argument: str = argument) -> None:
            os.dup2(pipe, 1)
            sys.stdout, sys.argv = os.fdopen(1, "w", buffering=1), ["script", argument]
            exec(compile(text, "script", "exec"), {"__name__": "__main__"})

        child, output = start(run)
        with os.fdopen(output) as stream:
            printed = stream.read()
        print(json.dumps([ended(child, 60), printed.strip()]), flush=True)


if __name__ == "__main__":
    import_all()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    if len(sys.argv) == 1:
        run_scripts()
    else:
        for each in trials(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])):
            print(json.dumps(each), flush=True)
