# SPDX-License-Identifier: Apache-2.0
"""What a process pays: seconds and modules of an import, time to the first step, memory. Each in fresh interpreters.

    python benchmarks/fresh.py [--rounds 7] [--only leyden]

Import: beyond ``import torch``. First step: from ``Trainer(...)`` to the first line of ``training_step``, against the
same lines by hand (model, optimizer, the first batch of a DataLoader). Memory: the most that the process ever held, over
that of the process that trains by hand, after 100 steps and after 2000, with a ``self.log`` each step.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from harness import Row, Section, spread_row

IMPORTS = {
    "leyden": [
        "import leyden",
        "from leyden import LightningModule",
        "from leyden import Callback, LightningDataModule, LightningModule, Trainer",
    ],
    "lightning": ["import lightning.pytorch"],
    "accelerate": ["import accelerate"],
}

_IMPORT = """
import sys, time
import torch
before = set(sys.modules)
begin = time.perf_counter()
{statement}
print(time.perf_counter() - begin, len(set(sys.modules) - before))
"""

_START = """
import resource, sys, time
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
torch.set_num_threads(1)
steps = {steps}
data = TensorDataset(torch.randn(4 * steps, 32), torch.zeros(4 * steps, 2))
"""
_BY_HAND = """
begin = time.perf_counter()
first, losses = None, []
net = nn.Linear(32, 2)
optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
for inputs, targets in DataLoader(data, 4):
    first = first or time.perf_counter()
    loss = nn.functional.mse_loss(net(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
"""
_TRAINER = """
import {package} as L
from {package} import LightningModule, Trainer
first = None
class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(32, 2)
    def training_step(self, batch, batch_idx):
        global first
        first = first or time.perf_counter()
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)
begin = time.perf_counter()
trainer = Trainer(accelerator="cpu", max_epochs=1, {arguments})
trainer.fit(Module(), DataLoader(data, 4))
"""
_END = """
try:  # of this program alone: what getrusage says begins with the size of the process that started it
    lines = open("/proc/self/status").read().splitlines()
    most = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
except OSError:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
print("", first - begin, most / 1024)
"""
_BARE = "logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False"


def _run(code: str) -> list[float]:
    """Run ``code`` in a fresh interpreter, in a folder of its own; return the numbers of its last line."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", "-c", code]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, cwd=folder
        )
    if done.returncode:
        raise RuntimeError(f"a fresh interpreter failed:\n{code}\n{done.stderr}")
    return [float(word) for word in done.stdout.strip().rpartition("\n")[2].split()]


def import_cost(statement: str) -> tuple[float, int]:
    """Return milliseconds and modules that ``statement`` takes in a fresh interpreter that has torch."""
    seconds, modules = _run(_IMPORT.format(statement=statement))
    return seconds * 1000, int(modules)


def processes(only: str = "") -> dict[str, str]:
    """Return by name the programs that train: by hand, with Leyden and with Lightning, as it is and with all off."""
    found = {"by hand": _BY_HAND}
    for name, package in (("leyden", "leyden"), ("lightning", "lightning.pytorch")):
        if only in name and importlib.util.find_spec(package.partition(".")[0]):
            found[f"{name}, nothing attached"] = _TRAINER.format(package=package, arguments=_BARE)
            found[f"{name}, as it is"] = _TRAINER.format(package=package, arguments="")
    return found


def one(program: str, steps: int) -> tuple[float, float]:
    """Run a program of ``processes``; return milliseconds to its first step, and the most MB that it held."""
    seconds, megabytes = _run(_START.format(steps=steps) + program + _END)
    return seconds * 1000, megabytes


def imports(rounds: int, only: str = "") -> Section:
    """Measure what imports cost."""
    statements = [line for name, lines in IMPORTS.items() if importlib.util.find_spec(name) for line in lines]
    statements = [line for line in statements if only in line]
    for statement in statements if rounds > 1 else ():
        import_cost(statement)  # the first one writes and reads bytecode
    taken: dict[str, list[tuple[float, int]]] = {statement: [] for statement in statements}
    for _ in range(rounds):
        for statement in statements:
            taken[statement].append(import_cost(statement))
    rows = []
    for statement, costs in taken.items():
        modules = f"import torch; {statistics.median(number for _, number in costs):.0f} modules"
        rows.append(spread_row(f"`{statement}`", [ms for ms, _ in costs], "ms", modules))
    return Section("(e) import", f"Beyond import torch; median of {rounds} fresh interpreters.", rows)


def starts(rounds: int, only: str = "", lengths: Sequence[int] = (100, 2000)) -> list[Section]:
    """Measure the time to the first step, and memory; ``lengths`` are numbers of steps."""
    programs = processes(only)
    if rounds > 1:
        for program in programs.values():
            one(program, lengths[0])  # the first one writes and reads bytecode
    taken = {(name, steps): [] for name in programs for steps in lengths}  # type: ignore[var-annotated]
    for _ in range(rounds):
        for name, program in programs.items():
            for steps in lengths:
                taken[name, steps].append(one(program, steps))
    first: list[Row] = []
    memory: list[Row] = []
    for name in programs:
        for steps in lengths:
            pairs = list(zip(taken["by hand", steps], taken[name, steps], strict=True))
            if name == "by hand":
                if steps == lengths[0]:
                    first.append(spread_row(name, [mine[0] for _, mine in pairs], "ms"))
                memory.append(spread_row(f"{name}, {steps} steps", [mine[1] for _, mine in pairs], "MB"))
                continue
            if steps == lengths[0]:
                first.append(spread_row(name, [mine[0] - loop[0] for loop, mine in pairs], "ms", "the loop by hand"))
            more = [mine[1] - loop[1] for loop, mine in pairs]
            memory.append(spread_row(f"{name}, {steps} steps", more, "MB", "the loop by hand"))
    text = f"Median of {rounds} fresh interpreters, in turn."
    return [
        Section("(e) to the first step", f"From Trainer(...) to the first line of training_step. {text}", first),
        Section("(f) memory", f"The most that the process ever held, a self.log each step. {text}", memory),
    ]


def measure(rounds: int = 7, only: str = "", lengths: Sequence[int] = (100, 2000)) -> list[Section]:
    """Measure (e) and (f) of the benchmarks."""
    return [imports(rounds, only), *starts(rounds, only, lengths)]


def main() -> None:
    """Print the tables."""
    from harness import as_text

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="fresh interpreters for each figure")
    parser.add_argument("--only", default="", help="only the frameworks whose name contains this")
    options = parser.parse_args()
    for section in measure(options.rounds, options.only):
        print(as_text(section))


if __name__ == "__main__":
    main()
