# SPDX-License-Identifier: Apache-2.0
"""Run by hand with a python that has lightning 2.6.6: runs the scripts on it and records what they print.

python tests/compat/record_with_lightning.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAMES = ("autoencoder", "classifier", "datamodule", "gan", "predictions", "semantics")


def main() -> None:
    """Write the last line of each script's output into one file."""
    recorded = {}
    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder:
            said = subprocess.run(
                [sys.executable, str(HERE / "scripts" / f"{name}.py")], cwd=folder, stdout=subprocess.PIPE, check=True
            ).stdout
        recorded[name] = json.loads(said.splitlines()[-1])
    text = json.dumps(recorded, indent=1)
    (HERE / "recorded_with_lightning_2_6_6.json").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
