# SPDX-License-Identifier: Apache-2.0
"""The script that the tests submit: python slurm_script.py <what> <folder>. It imports torch only where it trains."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from leyden import HyperOptArgumentParser, SlurmCluster


def search(hparams: Any, cluster: Any, results: Any) -> None:
    """A trial of a search: no training, and the third one fails."""
    print(f"lr={hparams.lr}")
    print("on stderr", file=sys.stderr)
    if hparams.lr == 0.3:
        raise RuntimeError("this learning rate explodes")
    results["loss"] = (hparams.lr - 0.2) ** 2


def train(hparams: Any, cluster: Any, results: Any) -> None:
    """A training with the Trainer."""
    import torch
    from slurm_model import fit

    from leyden.search import WalltimeCheckpoint

    print(f"lr={hparams.lr}")
    if hparams.what == "train_2019":
        model, trainer = fit(hparams, [], None, cluster)
    else:
        model, trainer = fit(hparams, [WalltimeCheckpoint(cluster)], cluster.ckpt_path)
    torch.save(model.state_dict(), Path(hparams.folder) / "weights.pt")
    results["loss"] = (model.net[3].weight ** 2).sum().detach()
    results["global_step"] = trainer.global_step


def count(hparams: Any, cluster: Any, results: Any) -> None:
    """No Trainer: counts to 100, waits at 60 in its first job, and keeps its place with functions of its own."""
    place = {"at": 0}
    path = Path(hparams.folder) / "place"
    cluster.set_checkpoint_save_function(lambda to: to.write_text(str(place["at"])), {"to": path})
    cluster.set_checkpoint_load_function(lambda: place.update(at=int(path.read_text())))
    results.setdefault("began_at", []).append(place["at"])
    while place["at"] < 100:
        place["at"] += 1
        while place["at"] == 60 and not cluster.continues:
            (Path(hparams.folder) / "begun").touch()
            time.sleep(0.05)
    results["at"] = place["at"]


if __name__ == "__main__":
    parser = HyperOptArgumentParser(strategy="grid_search")
    parser.add_argument("what", choices=["search", "train", "train_2019", "count", "walltime"])
    parser.add_argument("folder")
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--data-workers", type=int, default=0)
    parser.opt_list("--lr", type=float, default=0.01, options=[0.1, 0.2, 0.3, 0.4], tunable=True)
    hparams = parser.parse_args()
    cluster = SlurmCluster(hparams, log_path=Path(hparams.folder) / "logs", python_cmd=sys.executable)
    cluster.memory_mb_per_node = 500
    if hparams.what == "walltime":
        # SLURM counts in minutes and looks at the clock every half minute
        cluster.job_time, cluster.minutes_to_checkpoint_before_walltime = "2:00", 1
    functions = {"search": search, "count": count}
    jobs = cluster.optimize_parallel_cluster_cpu(
        functions.get(hparams.what, train), 4 if hparams.what == "search" else 1, "tests", job_display_name="leyden"
    )
    print(jobs)
