# SPDX-License-Identifier: Apache-2.0
"""Writes the golden traces: runs every scenario with Lightning and stores what its hooks were called with.

    python tests/acceptance/record_lightning_traces.py [scenario ...]

Needs ``pip install lightning==2.6.6``. The files are committed, so that the comparison needs no Lightning.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

from golden_trace_script import SCENARIOS, run_scenario

GOLDEN = Path(__file__).parent / "golden"
KINDS = ("full", "light")


def record(name: str, L: Any) -> dict[str, Any]:
    """Return the traces of one scenario, by kind."""
    traces = {}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            traces[kind] = run_scenario(name, L, kind, Path(folder))
    return traces


def main() -> None:
    import lightning
    import lightning.pytorch as L

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenario", nargs="*", help="which ones to record; all without arguments")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for name in parser.parse_args().scenario or SCENARIOS:
        golden = {"lightning": lightning.__version__, **record(name, L)}
        (GOLDEN / f"{name}.json").write_text(json.dumps(golden, indent=0) + "\n", encoding="utf-8")
        print(name, *(f"{kind}: {len(golden[kind])} calls" for kind in KINDS), sep="  ")


if __name__ == "__main__":
    main()
