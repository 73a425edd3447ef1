# SPDX-License-Identifier: Apache-2.0
"""What the project says about itself is true: versions agree, dependencies are pinned, names exist, the README runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import leyden

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]  # type: ignore[no-any-return]


def test_versions_agree(project: dict[str, Any]) -> None:
    assert project["version"] == leyden.__version__
    assert f"## [{leyden.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_dependency_is_pinned(project: dict[str, Any]) -> None:
    def normal(name: str) -> str:
        return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=~! ]", name)[0]).lower()

    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {normal(line) for line in constraints if "==" in line}
    wanted = {
        normal(line) for part in (project["dependencies"], *project["optional-dependencies"].values()) for line in part
    }
    assert wanted - pinned == {"leyden"}


def test_every_public_name_exists_and_is_listed() -> None:
    for name in leyden.__all__:
        assert getattr(leyden, name) is not None
    assert set(leyden.__all__) <= set(dir(leyden))
    with pytest.raises(AttributeError, match="trainer_of_lions"):
        leyden.trainer_of_lions


def test_the_example_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    monkeypatch.chdir(tmp_path)
    loader = DataLoader(TensorDataset(torch.randn(32, 64), torch.randint(10, (32,))), batch_size=8)
    exec(code.replace("max_epochs=10", "max_epochs=1, accelerator='cpu'"), {"train_loader": loader})
    assert list(tmp_path.rglob("*.ckpt"))
