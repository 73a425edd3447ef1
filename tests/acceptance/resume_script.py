# SPDX-License-Identifier: Apache-2.0
"""Kills a run after each of several steps, lets a fresh process go on from ``"last"``, and compares with the whole run.

    python resume_script.py FOLDER VARIANT K [K ...]

VARIANT is one of ``VARIANTS``. K is a step, ``all`` for each in turn, or ``3+5`` to be killed after 3 and, gone on from
there, after 5. Each run is a process of its own, forked from one that has only imported what is needed. Prints a line for
each K that is not exact, and ``exact E/T`` at the end.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import leyden as L
import resume_parts as parts
from leyden.callbacks import ModelCheckpoint
from leyden.data import CombinedLoader

EPOCHS, SIZE = 2, 22
VARIANTS = ("plain", "workers", "kept", "samples", "buckets", "unsized", "manual", "combined")


class Model(parts.Recording):
    """The acceptance run of R1: dropout, a schedule that reads the total, metrics of the epoch, all on disk at once."""

    def __init__(self, folder: Path, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.log_file = (folder / "events").open("a")
        self.before: list[Any] = []
        self.rows: list[Any] = []

    def note(self) -> None:
        """Bring on disk what has happened, before anybody can kill the process."""
        for event in self.events[len(self.before) :]:
            self.log_file.write(json.dumps(event) + "\n")
        self.before = list(self.events)
        self.log_file.flush()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.note()
        checkpoint["seen"] = json.dumps([self.events, [*self.rows, *map(dict, self.trainer.history)]])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.events, self.rows = json.loads(checkpoint["seen"])
        self.before = list(self.events)

    def configure_optimizers(self) -> Any:
        if self.optimizers_wanted == 2:
            return super().configure_optimizers()
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        total = min(self.trainer.estimated_stepping_batches, 100)  # infinity for a loader without length
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=total + 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Kill(L.Callback):
    """Sends SIGKILL to its own process when the batch after step ``k`` begins."""

    def __init__(self, k: int) -> None:
        self.k = k

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.progress.batches == self.k:
            os.kill(os.getpid(), signal.SIGKILL)


def variant(name: str, folder: Path) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Return module, training loaders, validation loaders and options of the Trainer."""
    options: dict[str, Any] = {"accumulate_grad_batches": 3, "val_check_interval": 4}
    model, kind, workers = Model(folder), "shuffle", 0
    validation = parts.loader("shuffle", size=6)
    if name == "workers":
        workers = 2
    elif name == "kept":
        workers, validation = 2, parts.loader("shuffle", size=6, num_workers=1, persistent_workers=True)
    elif name == "samples":
        workers = 1
    elif name == "buckets":
        kind, workers = "buckets", 2
    elif name == "unsized":
        kind = "unsized"
    elif name == "manual":
        model, options = Model(folder, manual=True, optimizers=2), {"val_check_interval": 0.5}
    elif name == "combined":
        loaders = {"a": parts.loader("shuffle", SIZE), "b": parts.loader("lazy", 5), "c": parts.loader("eager", 9)}
        return model, CombinedLoader(loaders, "max_size_cycle"), validation, options
    more = {"num_workers": workers, "persistent_workers": name == "kept"} if workers else {}
    return model, parts.loader(kind, SIZE, **more), validation, options


def run(folder: Path, name: str, kill: int | None) -> None:
    """Fit, going on from the last checkpoint if there is one; leave the result in ``folder``."""
    L.seed_everything(7, workers=name == "samples", verbose=False)
    model, train, validation, options = variant(name, folder)
    saves = ModelCheckpoint(folder / "ckpt", save_last=True, save_top_k=0, every_n_train_steps=1)
    trainer = L.Trainer(
        max_epochs=EPOCHS, callbacks=[saves, *([Kill(kill)] if kill is not None else [])], logger=False,
        log_every_n_steps=1, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(model, train, validation, ckpt_path="last" if (folder / "ckpt").exists() else None)
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.numpy().tobytes())
    generators = [torch.get_rng_state().numpy().tobytes().hex(), repr(random.getstate()), repr(np.random.get_state())]
    result = {
        "events": model.events,
        "rows": [*model.rows, *map(dict, trainer.history)],
        "weights": digest.hexdigest(),
        "generators": hashlib.sha256("".join(generators).encode()).hexdigest(),
    }
    (folder / "result").write_text(json.dumps(result))


def process(folder: Path, name: str, kill: int | None) -> int:
    """Run in a process of its own; return the number of the signal that ended it, 0 for none."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run(folder, name, kill)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"a run of {name} in {folder} failed")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def main(folder: Path, name: str, wanted: list[str]) -> int:
    logging.getLogger("leyden").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.optim.SGD([nn.Parameter(torch.zeros(1))])  # imports what each run would otherwise import by itself
    (folder / "whole").mkdir(parents=True)
    process(folder / "whole", name, None)
    whole = json.loads((folder / "whole" / "result").read_text())
    steps = sum(event[0] == "train" for event in whole["events"])
    kills = [str(k) for k in range(1, steps)] if wanted == ["all"] else wanted
    exact = 0
    for text in kills:
        place = folder / f"k{text}"
        place.mkdir()
        for k in text.split("+"):
            if process(place, name, int(k)) != signal.SIGKILL:
                raise SystemExit(f"the run of {name} was not killed after step {k}")
        process(place, name, None)
        result = json.loads((place / "result").read_text())
        wrong = [part for part in whole if whole[part] != result[part]]
        exact += not wrong
        if wrong:
            pairs = zip(whole["events"], result["events"], strict=False)
            first = next((pair for pair in pairs if pair[0] != pair[1]), "")
            print(f"{name}, killed after {text}: other {', '.join(wrong)}; {first}")
    print(f"exact {exact}/{len(kills)}")
    return 0 if exact == len(kills) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
