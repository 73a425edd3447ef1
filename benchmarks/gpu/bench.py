# SPDX-License-Identifier: Apache-2.0
"""All benchmarks that need a CUDA GPU, one after the other; `make gpu` runs them and writes RESULTS.md beside this file.

PYTHONPATH=src python3 benchmarks/gpu/bench.py [--quick] [--parts overhead graphs gpt] [--write FILE]
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent)]

import gpt  # noqa: E402  # they lie beside this file
import graphs  # noqa: E402
import overhead  # noqa: E402
from contest import machine  # noqa: E402

PARTS = {"overhead": (overhead.measure, 2000), "graphs": (graphs.measure, 2000), "gpt": (gpt.measure, 200)}


def main() -> int:
    """Run what was asked for; return 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps, one round")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="which of them")
    parser.add_argument("--write", type=Path, help="the page to write the tables to")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch sees no CUDA GPU, so nothing was measured.")
        return 0
    warnings.simplefilter("ignore")
    lines = ["# Results on a GPU", "", f"{machine()}. Medians; contenders took turns. `make gpu` writes this page.", ""]
    print(lines[2])
    for part in options.parts:
        measure, steps = PARTS[part]
        table = measure(steps // 10, 1) if options.quick else measure(steps, 5)
        print("\n".join(table.lines()), flush=True)
        lines += table.lines()
    if options.write is not None:
        options.write.write_text("\n".join(lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
