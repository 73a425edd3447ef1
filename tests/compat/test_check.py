# SPDX-License-Identifier: Apache-2.0
"""``leyden compat check``: what it finds, with the line, and what it leaves alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from leyden.compat.check import check
from leyden.errors import MisconfigurationException


def findings(tmp_path: Path, text: str) -> list[str]:
    """``line: what is missing`` for each finding in a file with this text."""
    path = tmp_path / "program.py"
    path.write_text(text, encoding="utf-8")
    return [str(finding).removeprefix(f"{path}:") for finding in check([path]).missing]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import lightning.app", "1: Leyden has no lightning.app."),
        ("\nfrom lightning.app import LightningApp", "2: Leyden has no lightning.app."),
        ("from lightning.pytorch import Trainr", "1: Leyden has no lightning.pytorch.Trainr. Did you mean 'Trainer'?"),
        ("from lightning.pytorch.callbacks import (\n  Timer,\n  Tiner as T)", "Did you mean 'Timer'?"),
        ("import pytorch_lightning as pl\npl.callbacks.EarlyStoping()", "2: Leyden has no pytorch_lightning.callbacks.EarlySt"),
        ("import lightning as L\nclass A(L.LightningModul): ...", "2: Leyden has no lightning.LightningModul."),
        ("import lightning\nlightning.pytorch.nothing.deeper.still", "2: Leyden has no lightning.pytorch.nothing."),
        ("import pytorch_lightning as p\np.Trainer.from_argparse_args(1)", "no pytorch_lightning.Trainer.from_argparse_args"),
        ("from lightning.pytorch import *\nTrainer.fitt", "no lightning.pytorch.Trainer.fitt. Did you mean 'fit'?"),
        ("import lightning.pytorch.callbacks as c\nc.Timerr", "2: Leyden has no lightning.pytorch.callbacks.Timerr."),
        ("from test_tube import Experimnt", "1: Leyden has no test_tube.Experimnt. Did you mean 'Experiment'?"),
        ("import importlib\nimportlib.import_module('lightning.app')", "2: Leyden has no lightning.app."),
        ("from lightning.pytorch.loops import _Loop", "1: Leyden has no lightning.pytorch.loops."),
        ("from lightning.pytorch.trainer import _x", "It is private there"),
        ("try:\n  from lightning.app import X\nexcept ImportError:\n  pass", "no lightning.app. (the program catches this)"),
        ("try:\n  import lightning.app\nexcept ValueError:\n  pass", "2: Leyden has no lightning.app."),
        ("try:\n  import lightning.app\nexcept AttributeError:\n  pass", "2: Leyden has no lightning.app."),
        ("try:\n  import lightning.app\nexcept:\n  pass", "(the program catches this)"),
        ("try:\n  import lightning.app\nexcept builtins.ImportError:\n  pass", "(the program catches this)"),
        ("from contextlib import *\nwith suppress(ImportError):\n  import lightning.app", "(the program catches this)"),
        ("import contextlib as c\nwith c.suppress(OSError):\n  import lightning.app", "3: Leyden has no lightning.app."),
        ("import lightning as L\ntry:\n  L.x\nexcept AttributeError:\n  pass", "x. (the program catches this)"),
        ("import lightning as L\ntry:\n  L.x\nexcept ImportError:\n  pass", "3: Leyden has no lightning.x."),
        ("import lightning as L\ntry:\n  pass\nexcept AttributeError:\n  L.x", "5: Leyden has no lightning.x."),
        ("try:\n  pass\nexcept ImportError:\n  import lightning.app", "4: Leyden has no lightning.app."),
        ("def broken(:", "1: this is not python that can be read"),
    ],
)  # fmt: skip
def test_what_is_missing_is_found(text: str, said: str, tmp_path: Path) -> None:
    (found,) = findings(tmp_path, text)
    assert said in found
    assert found.endswith("(the program catches this)") == ("(the program" in said)


@pytest.mark.parametrize(
    "text",
    [
        "import lightning as L, lightning.pytorch.callbacks\nL.Trainer.fit\nlightning.pytorch.callbacks.Timer",
        "from lightning.pytorch import callbacks, Trainer as T\ncallbacks.EarlyStopping.state_key\nT.fit.__doc__",
        "import lightning\nlightning.__version__, lightning.pytorch.__name__",
        "from . import lightning\nlightning.nothing\nfrom .lightning import app",
        "import lightning_utilities.core.nothing",
        "import polars as pl\nimport pytorch_lightning as pl\npl.DataFrame",  # the name means two things: left alone
        "import pytorch_lightning as pl\ndef f(pl):\n  return pl.nothing",
        "try:\n  import lightning.pytorch as pl\nexcept ImportError:\n  import pytorch_lightning as pl\npl.Trainer",
        "import lightning as L\nL.anything = 3",
        "import lightning as L\ntry:\n  pass\nexcept ValueError as L:\n  L.nothing",
        "import lightning as L\nmatch 3:\n  case L:\n    L.nothing",
        "from pytorch_lightning.callbacks.pt_callbacks import ModelCheckpoint\nfrom test_tube.hpc import SlurmCluster",
    ],
)
def test_what_resolves_is_not_reported(text: str, tmp_path: Path) -> None:
    assert findings(tmp_path, text) == []


def test_each_finding_is_listed_once_in_the_order_of_lines(tmp_path: Path) -> None:
    text = "import lightning as L\nL.two\nL.one\nL.one\nimport lightning.app\n"
    assert [found.split(":")[0] for found in findings(tmp_path, text)] == ["2", "3", "4", "5"]


def test_a_folder_is_read_whole_but_for_what_is_not_its_own(tmp_path: Path) -> None:
    for name in ("a.py", "deep/b.py", ".venv/c.py", "deep/__pycache__/d.py", "lib/site-packages/e.py", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("import lightning.app")
    report = check([tmp_path])
    assert [finding.path.name for finding in report.missing] == ["a.py", "b.py"]
    assert (report.files, report.uses) == (2, 2)


def test_a_path_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="does not exist"):
        check([tmp_path / "nothing"])


def test_a_check_imports_nothing_of_the_program_and_no_torch(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text("import pytorch_lightning as pl\nprint('run')\nclass A(pl.LightningModule): ...\n")
    script = (
        f"import sys\nfrom leyden.compat.check import check\nprint(check([{str(path)!r}]).uses, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "2 False\n"
