# SPDX-License-Identifier: Apache-2.0
"""What an import costs beyond ``import torch``: seconds and modules, each the median of several fresh interpreters.

python benchmarks/imports.py [--rounds 7]
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import subprocess
import sys

STATEMENTS = {
    "leyden": [
        "import leyden",
        "from leyden import LightningModule",
        "from leyden import Callback, LightningDataModule, LightningModule, Trainer",
    ],
    "lightning": ["import lightning.pytorch"],
    "accelerate": ["import accelerate"],
}

CODE = """
import sys, time
import torch
before = set(sys.modules)
begin = time.perf_counter()
{statement}
print(time.perf_counter() - begin, len(set(sys.modules) - before))
"""


def cost(statement: str) -> tuple[float, int]:
    """Return seconds and modules that ``statement`` takes in a fresh interpreter that has torch."""
    command = [sys.executable, "-W", "ignore", "-c", CODE.format(statement=statement)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL).stdout.split()
    return float(out[-2]), int(out[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="fresh interpreters for each statement")
    rounds = parser.parse_args().rounds
    statements = [line for package, lines in STATEMENTS.items() if importlib.util.find_spec(package) for line in lines]
    measured: dict[str, list[tuple[float, int]]] = {statement: [] for statement in statements}
    for statement in statements:
        cost(statement)  # the first one writes and reads bytecode
    for _ in range(rounds):
        for statement in statements:
            measured[statement].append(cost(statement))
    print(f"beyond import torch, median of {rounds} interpreters (Python {sys.version.split()[0]})")
    width = max(map(len, statements))
    for statement, costs in measured.items():
        times = [seconds * 1000 for seconds, _ in costs]
        modules = statistics.median(count for _, count in costs)
        spread = f"({min(times):.0f}, {max(times):.0f})"
        print(f"{statement:<{width}}  {statistics.median(times):7.1f} ms  {spread:<14} {modules:6.0f} modules")


if __name__ == "__main__":
    main()
