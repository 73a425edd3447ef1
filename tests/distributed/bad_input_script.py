# SPDX-License-Identifier: Apache-2.0
"""A process of a run that cannot be, as the tests start it with its rank in the environment: bad_input_script.py CASE."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import Any

import torch
from torch.utils.data import DataLoader

from leyden.strategies import DDPStrategy
from ranks import Net, data, make_trainer

CASE, RANK = sys.argv[1], int(os.environ["RANK"])


def main() -> None:
    module, seconds, arguments = Net(), 3, dict[str, Any]()
    if CASE == "layers" and RANK == 1:
        module.layer[2] = torch.nn.Linear(5, 2)
    if CASE == "settings" and RANK == 1:
        arguments["accumulate_grad_batches"] = 2
    if CASE in ("layers", "settings"):
        seconds = 60
    trainer = make_trainer(1, num_nodes=2, strategy=DDPStrategy(timeout=timedelta(seconds=seconds)), **arguments)
    trainer.fit(module, DataLoader(data(24), 2))


if __name__ == "__main__":
    main()
