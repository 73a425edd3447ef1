# SPDX-License-Identifier: Apache-2.0
"""What the trainer costs: a tiny step under leyden and under installed peers, as a ratio to a hand-written loop.

    python benchmarks/overhead.py [--steps 5000] [--rounds 5] [--only leyden] [--json results.json]

The step is so small that hardly anything but the framework is measured; on a real model the same microseconds vanish.
Beyond what ``make bench`` shows of the peers, this table has a row for each thing that can be attached to Leyden.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import harness
import workloads
from frameworks import BARE, RECORDED, bound, contenders, installed, loops, with_fabric, with_trainer
from harness import Contender, Section
from workloads import Workload


def rows(work: Workload, only: str = "") -> list[Contender]:
    """Return Leyden, bare and with things attached, and every installed peer."""
    attached = {
        "leyden, self.log, a row each step": {"every": 1},
        "leyden, self.log, 3 callbacks, csv": {"attach": True},
        "leyden, the same, a row each step": {"attach": True, "every": 1},
    }
    found = contenders(work)
    ours = [Contender(name, bound(with_trainer, work, **options), RECORDED) for name, options in attached.items()]
    found[2:2] = ours
    found.append(Contender("leyden Fabric", bound(with_fabric, work), BARE))
    if "lightning" in installed():
        found.append(Contender("lightning Fabric", bound(with_fabric, work, name="lightning"), BARE))
        way = bound(with_trainer, work, name="lightning.pytorch", attach=True)
        found.append(Contender("lightning, self.log, 3 callbacks, csv", way, RECORDED))
    return [row for row in found if only in row.name]


def measure(steps: int, rounds: int, only: str = "") -> Section:
    """Measure (a) of the benchmarks."""
    work = workloads.tiny(steps)
    with harness.threads(work.threads), harness.quiet():
        found = harness.compare(loops(work), rows(work, only), rounds, work.steps)
    return Section(work.name, work.text, found)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5000, help="batches in one run")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each contender")
    parser.add_argument("--only", default="", help="only the frameworks whose row contains this")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    options = parser.parse_args()
    section = measure(options.steps, options.rounds, options.only)
    print(f"{harness.machine()}; median of {options.rounds} rounds\n\n{harness.as_text(section)}")
    if options.json:
        described = {"machine": harness.machine(), "rounds": options.rounds, **section.to_dict()}
        options.json.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
