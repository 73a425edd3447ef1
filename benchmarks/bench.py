# SPDX-License-Identifier: Apache-2.0
"""All benchmarks in one run: ratios to a hand-written loop, for Leyden and every peer that is installed.

python benchmarks/bench.py [--quick] [--rounds 5] [--only leyden] [--parts abcdefgh] [--data DIR]
                           [--json results.json] [--write benchmarks/RESULTS.md]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import frameworks
import fresh
import harness
import overhead
import scaling
import several
import workloads
from harness import Section
from workloads import Workload


@dataclass(frozen=True)
class Size:
    """How much is run."""

    rounds: int
    tiny: int
    samples: int
    digits: int
    gpt: dict[str, int]
    scaling: int
    lengths: tuple[int, int]
    several: int


FULL = Size(
    rounds=5, tiny=5000, samples=60_000, digits=10, gpt={"steps": 20}, scaling=2000, lengths=(100, 2000), several=2000
)
QUICK = Size(rounds=1, tiny=300, samples=3200, digits=1, gpt={"steps": 2}, scaling=200, lengths=(20, 200), several=200)
SMOKE = Size(
    rounds=1,
    tiny=5,
    samples=96,
    digits=1,
    gpt={"steps": 1, "layers": 1, "width": 32},
    scaling=20,
    lengths=(2, 4),
    several=20,
)


OPTIONS: tuple[dict[str, Any], ...] = ({"fast_data": False}, {"fused_optimizers": True})
"""What our Trainer is given in further rows of (b). Fused optimizers round in another way: weights are close then."""


def train(work: Workload, rounds: int, only: str, options: tuple[dict[str, Any], ...] = ()) -> Section:
    """Compare all frameworks on one workload, and our own with each of the ``options``."""
    with harness.threads(work.threads), harness.quiet():
        found = frameworks.contenders(work, only, options)
        rows = harness.compare(frameworks.loops(work), found, rounds, work.steps)
    return Section(work.name, work.text, rows)


def sections(size: Size, only: str = "", parts: str = "abcdefgh", data: Path | None = None) -> Iterator[Section]:
    """Measure the parts by their letters, one after the other."""
    if "a" in parts:
        yield overhead.measure(size.tiny, size.rounds, only)
    if "b" in parts:
        yield train(workloads.mnist(size.samples, data), size.rounds, only, OPTIONS)
    if "c" in parts:
        yield train(workloads.digits(size.digits), size.rounds, only)
    if "d" in parts:
        yield train(workloads.gpt(**size.gpt), size.rounds, only)
    if "e" in parts:
        yield fresh.imports(size.rounds, only)
    if "e" in parts or "f" in parts:
        yield from fresh.starts(size.rounds, only, size.lengths)
    if "g" in parts:
        yield scaling.measure(size.scaling, size.rounds, only)
    if "h" in parts:
        yield several.measure(size.several, size.rounds, only)


def page(found: list[Section], size: Size, seconds: float) -> str:
    """Return the results as a page."""
    peers = ", ".join(f"{name} {version}" for name, version in sorted(frameworks.installed().items()))
    return "\n".join(
        [
            "# Results of the benchmarks",
            "",
            f"{harness.machine()}.",
            f"{size.rounds} rounds, {seconds / 60:.0f} minutes; load of the machine at its end: {os.getloadavg()[0]:.1f}.",
            f"Peers: {peers or 'none installed'}.",
            "",
            "Written by `make bench`; how to read it stands in [README.md](README.md). A ratio is that to a hand-written"
            " loop in the same round; `calm` is the ratio of the steps alone that nobody disturbed (of all the 5 %"
            " quantile), without set-up. `weights` says whether the trained weights are those of the loop.",
            "",
            *(harness.as_markdown(section) for section in found),
        ]
    )


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, one round: under two minutes")
    parser.add_argument("--rounds", type=int, help="runs of each contender")
    parser.add_argument("--only", default="", help="only the frameworks whose row contains this")
    parser.add_argument("--parts", default="abcdefgh", help="which parts, by their letters")
    parser.add_argument("--data", type=Path, help="a folder with MNIST's four raw files, gzipped or not")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--write", type=Path, help="write the page here")
    options = parser.parse_args()
    size = QUICK if options.quick else FULL
    if options.rounds:
        size = Size(**{**size.__dict__, "rounds": options.rounds})
    print(f"{harness.machine()}\n")
    begin, found = time.monotonic(), []
    for section in sections(size, options.only, options.parts, options.data):
        print(harness.as_text(section), flush=True)
        found.append(section)
        # after each part: a run that is broken off leaves what it has
        if options.write:
            options.write.write_text(page(found, size, time.monotonic() - begin), encoding="utf-8")
        if options.json:
            described = {"machine": harness.machine(), "sections": [each.to_dict() for each in found]}
            options.json.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
