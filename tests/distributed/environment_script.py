# SPDX-License-Identifier: Apache-2.0
"""A short fit whose processes are described by a cluster environment that is named; each rank writes who it was.

python environment_script.py FOLDER ENVIRONMENT
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from torch.utils.data import DataLoader

from leyden.runtime import cluster
from ranks import Net, data, make_trainer

FOLDER, NAME = Path(sys.argv[1]), sys.argv[2]


class Own(cluster.ClusterEnvironment):
    """A cluster of the user's own, whose variables nobody else knows."""

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        return int(os.environ["OWN_PORT"])

    def world_size(self) -> int:
        return int(os.environ["OWN_SIZE"])

    def global_rank(self) -> int:
        return int(os.environ["OWN_RANK"])

    def local_rank(self) -> int:
        return self.global_rank()

    def teardown(self) -> None:
        (FOLDER / f"down{self.global_rank()}").touch()


class Starts(cluster.ClusterEnvironment):
    """One that leaves it to us to start the others, and says where they meet."""

    @property
    def main_port(self) -> int:
        return int(os.environ["OWN_PORT"])


environment = {"Own": Own, "Starts": Starts}[NAME]() if NAME in ("Own", "Starts") else getattr(cluster, NAME)()
trainer = make_trainer(2, max_epochs=1, plugins=[environment])
module = Net()
trainer.fit(module, DataLoader(data(24), 3))
named = trainer.strategy.cluster_environment
(FOLDER / f"{trainer.global_rank}.json").write_text(
    json.dumps({
        "size": trainer.world_size, "local": trainer.local_rank, "steps": trainer.global_step,
        "weight": module.layer[0].weight.tolist(), "environment": type(named).__name__,
        "said": [named.global_rank(), named.world_size(), named.local_rank()], "pid": os.getpid(),
    })
)  # fmt: skip
