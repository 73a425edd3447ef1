# SPDX-License-Identifier: Apache-2.0
"""Run by hand with a python that has lightning 2.6.6: compares the table with it, or, with ``--write``, writes the table.

python tests/parity/record_with_lightning.py
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from introspect import Row, lines_of, rows_of_module  # noqa: E402

TABLE = HERE / "lightning_2_6_6.txt"
HEAD = """\
# The public names of lightning 2.6.6, with their arguments and defaults: facts, written by record_with_lightning.py.
# A line is a kind, a name and its arguments; members stand below their class, and with it the public classes it extends.
"""
LEFT_OUT = (
    "lightning.pytorch._graveyard",  # modules that are private there
    "lightning.fabric._graveyard",
    "lightning.pytorch.loggers.litlogger",  # a paid platform's own
    "lightning.pytorch.utilities.model_registry",
    "lightning.pytorch.cli",  # needs jsonargparse to be looked at
)


def recorded() -> list[Row]:
    """Look at every module of the installed lightning; one whose own imports fail is said."""
    rows: list[Row] = []
    for root in ("lightning.pytorch", "lightning.fabric"):
        package = importlib.import_module(root)
        found = pkgutil.walk_packages(
            package.__path__, f"{root}.", onerror=lambda name: print(f"not looked at: {name}")
        )
        for name in (root, *sorted(module.name for module in found)):
            if name.endswith("__main__") or name.startswith(LEFT_OUT):
                continue
            try:
                rows += rows_of_module(name)
            except ModuleNotFoundError as error:
                print(f"not looked at: {name}: {error}")
    return [row for row in rows if row.name != "LitLogger"]


def main() -> int:
    warnings.simplefilter("ignore")
    import lightning

    if lightning.__version__ != "2.6.6" or not getattr(lightning, "__file__", None):
        print("This needs lightning 2.6.6 itself.")
        return 2
    text = HEAD + "\n".join(lines_of(recorded())) + "\n"
    if "--write" in sys.argv:
        TABLE.write_text(text, encoding="utf-8")
    if text == TABLE.read_text(encoding="utf-8"):
        print(f"the table agrees: {len(text.splitlines())} lines")
        return 0
    import difflib

    print(
        "\n".join(difflib.unified_diff(TABLE.read_text(encoding="utf-8").splitlines(), text.splitlines(), lineterm=""))
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
