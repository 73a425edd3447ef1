# SPDX-License-Identifier: Apache-2.0
"""Published libraries that are built on Lightning, each trained on Lightning and on Leyden, unchanged, and compared.

    python benchmarks/clients/run.py [NAME ...] [--rounds 3] [--folder DIR] [--write RESULTS.md]

Each script of this folder runs twice in the environment of this python: once as it is, so on Lightning, and once through
``leyden run``. Both have an empty folder of their own. Then everything is compared that they left there: what the script
kept (all metrics at every moment, weights, predictions), checkpoints, rows of csv files and TensorBoard, and names of files.
"""

from __future__ import annotations

import argparse
import ast
import csv
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "src"
NOT_CLIENTS = {"run.py", "kept.py", "overhead.py", "sitecustomize.py"}
TOLERANCE = 1e-6
"""Relative difference of two numbers that counts as equal."""
SPARED = ("time", "seconds", "pytorch-lightning_version", "leyden", "per_second", "uuid", "run_name")
"""Parts of names whose values differ between two runs of anything, or that say which trainer it was."""


class Difference(NamedTuple):
    """Where two runs differ, and by how much (relative; inf where the values are no numbers that could be near)."""

    where: str
    size: float
    shown: str

    def __str__(self) -> str:
        return f"{self.where}: {self.shown}"


class Outcome(NamedTuple):
    """One run of a script."""

    status: int
    seconds: float
    output: str


def run(script: Path, folder: Path, leyden: bool) -> Outcome:
    """Run a script in an empty folder, on Leyden or on what is installed."""
    folder.mkdir(parents=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(SOURCES), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, *(["-m", "leyden", "run"] if leyden else []), str(script)]
    start = time.perf_counter()
    with (folder.parent / f"{folder.name}.log").open("w+") as log:
        done = subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=600)
        seconds = time.perf_counter() - start
        log.seek(0)
        return Outcome(done.returncode, seconds, log.read())


# ---------------------------------------------------------------------- comparing


def names(folder: Path) -> list[str]:
    """Return the files of a run; what names a process, a host or a moment is left out of a name."""
    found = []
    for file in folder.rglob("*"):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and "__pycache__" not in name:
            found.append(re.sub(r"events\.out\.tfevents\S*", "events", name))
    return sorted(set(found))


def compare(ours: Path, theirs: Path) -> Iterator[Difference]:
    """Compare all that two runs left in their folders."""
    left, right = set(names(theirs)), set(names(ours))
    for name in sorted(left ^ right):
        yield Difference(f"file {name}", math.inf, f"only on {'Lightning' if name in left else 'Leyden'}")
    for name in sorted(left & right):
        if name.endswith((".pt", ".ckpt", ".pth")):
            yield from differences(load(theirs / name), load(ours / name), name)
        elif name.endswith(".csv"):
            yield from differences(rows(theirs / name), rows(ours / name), name)
    yield from differences(events(theirs), events(ours), "TensorBoard")


def load(file: Path) -> Any:
    """Return what a file of torch holds, as far as both sides must agree on it."""
    import torch

    held = torch.load(file, map_location="cpu", weights_only=False)
    if isinstance(held, Mapping) and "state_dict" in held:
        agreed = ("epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers")
        return {key: held[key] for key in agreed if key in held}
    return held


def rows(file: Path) -> list[dict[str, str]]:
    """Return the rows of a csv file."""
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the scalars of all TensorBoard files of a run: folder and name, with step and value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, list[tuple[int, float]]] = {}
    for place in sorted({file.parent for file in folder.rglob("events.out.tfevents*")}):
        read = EventAccumulator(str(place), size_guidance={"scalars": 0})
        read.Reload()
        for tag in read.Tags()["scalars"]:
            found[f"{place.relative_to(folder)} {tag}"] = [(row.step, row.value) for row in read.Scalars(tag)]
    return found


def differences(theirs: Any, ours: Any, where: str) -> Iterator[Difference]:
    """Walk two nested values side by side."""
    import torch

    if any(spared in where.rsplit(" > ", 1)[-1].lower() for spared in SPARED):
        return
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        for key in [*theirs, *(key for key in ours if key not in theirs)]:
            if key in theirs and key in ours:
                yield from differences(theirs[key], ours[key], f"{where} > {key}")
            elif not any(spared in str(key).lower() for spared in SPARED):
                yield Difference(f"{where} > {key}", math.inf, f"only on {'Lightning' if key in theirs else 'Leyden'}")
    elif isinstance(theirs, (list, tuple)) and isinstance(ours, (list, tuple)):
        if len(theirs) != len(ours):
            yield Difference(where, math.inf, f"{len(theirs)} on Lightning, {len(ours)} on Leyden")
        for index, (one, other) in enumerate(zip(theirs, ours, strict=False)):
            yield from differences(one, other, f"{where} > {index}")
    elif isinstance(theirs, torch.Tensor) and isinstance(ours, torch.Tensor):
        if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
            yield Difference(where, math.inf, f"{described(theirs)} on Lightning, {described(ours)} on Leyden")
        elif not torch.equal(theirs, ours):
            one, other = theirs.double(), ours.double()
            size = torch.where(one == other, 0, (one - other).abs() / one.abs().clamp(min=1e-12)).nan_to_num(0)
            yield Difference(where, float(size.max()), f"up to {float(size.max()):.1e} relative")
    elif number(theirs) is not None and number(ours) is not None:
        one, other = number(theirs), number(ours)
        if one != other and not (math.isnan(one) and math.isnan(other)):
            yield Difference(
                where, abs(one - other) / max(abs(one), 1e-12), f"{one!r} on Lightning, {other!r} on Leyden"
            )
    elif type(theirs).__module__.partition(".")[0] not in ("builtins", "torch") and type(theirs) is not type(ours):
        return  # an object of the trainer's own in a checkpoint
    elif isinstance(theirs, (str, bytes, type(None))) and theirs != ours:
        yield Difference(where, math.inf, f"{str(theirs)[:60]!r} on Lightning, {str(ours)[:60]!r} on Leyden")


def described(tensor: Any) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def number(value: Any) -> float | None:
    """Return a number, a text of one or a tensor of one as a float; None for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


# ---------------------------------------------------------------------- the table


class Row(NamedTuple):
    """One line of the table."""

    script: str
    library: str
    what: str
    equal: str
    ratio: str
    files: int
    notes: str


def client(script: Path, folder: Path, rounds: int) -> Row:
    """Run one script on both, by turns, and compare."""
    library, what = title(script)
    ratios: list[float] = []
    found: list[Difference] = []
    for index in range(rounds):
        outcomes = {}
        for name in ("lightning", "leyden"):
            place = folder / script.stem / f"{name}{index or ''}"
            outcomes[name] = run(script, place, name == "leyden")
            print(f"  {script.stem}: {name} {outcomes[name].seconds:.1f} s, status {outcomes[name].status}", flush=True)
            if outcomes[name].status:
                last = outcomes[name].output.strip().splitlines()[-1:] or [""]
                return Row(script.stem, library, what, "no", "", 0, f"fails on {name}: {last[0][:200]}")
        ratios.append(outcomes["leyden"].seconds / outcomes["lightning"].seconds)
        if not index:
            found = list(compare(folder / script.stem / "leyden", folder / script.stem / "lightning"))
    far = [difference for difference in found if difference.size > TOLERANCE]
    for difference in far[:20]:
        print(f"    {difference}")
    if len(far) > 20:
        print(f"    and {len(far) - 20} more")
    equal = "no" if far else f"{TOLERANCE:.0e}" if found else "bit for bit"
    notes = f"{len(far)} differ, first {far[0]}" if far else f"{len(found)} numbers differ by less" if found else ""
    files = len(names(folder / script.stem / "leyden"))
    return Row(script.stem, library, what, equal, f"{statistics.median(ratios):.2f}", files, notes)


def title(script: Path) -> tuple[str, str]:
    """Return the library that a script says it is about, with its version, and what it does with it."""
    text = (ast.get_docstring(ast.parse(script.read_text())) or "").partition("\n")[0]
    library, _, what = text.partition(": ")
    try:
        library = f"{library} {version(library)}"
    except PackageNotFoundError:
        library = f"{library} (not installed)"
    return library, what.rstrip(".")


def as_markdown(found: list[Row]) -> str:
    """Return the table."""
    lines = ["| library | what is run | equal | seconds, as a ratio | notes |", "|---|---|---|---|---|"]
    lines += [
        f"| {row.library} (`{row.script}.py`) | {row.what} | {row.equal} | {row.ratio} | {row.notes.replace('|', '/')} |"
        for row in found
    ]
    return "\n".join(lines)


def main() -> int:
    """Run, compare, print the table; 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="scripts of this folder, without .py; all, if none is named")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each script on each of the two")
    parser.add_argument("--folder", type=Path, help="where the runs leave their files (a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    options = parser.parse_args()
    scripts = sorted(file for file in HERE.glob("*.py") if file.name not in NOT_CLIENTS)
    if options.names:
        scripts = [HERE / f"{name.removesuffix('.py')}.py" for name in options.names]
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)) / time.strftime("%H%M%S")
        for script in scripts:
            found.append(client(script, folder, options.rounds))
    print(f"\n{as_markdown(found)}")
    if options.json:
        options.json.write_text(json.dumps([row._asdict() for row in found], indent=1))
    return int(any(row.equal == "no" for row in found))


if __name__ == "__main__":
    sys.exit(main())
