# SPDX-License-Identifier: Apache-2.0
"""The pytest plug-in: ``pytest -p leyden.compat.pytest`` runs a test suite with the import names installed."""

from __future__ import annotations

import os

import leyden.compat
from leyden.compat.process import environment

_before: list[str | None] = []


def pytest_addoption() -> None:
    """Install the names: this is the first hook, called before any conftest or later plug-in is imported."""
    leyden.compat.install()
    if not _before:
        _before.append(os.environ.get("PYTHONPATH"))
        os.environ.update(environment(os.environ))  # for the processes that tests start


def pytest_report_header() -> str:
    """Say in the first lines of the report that these tests run on Leyden."""
    return f"leyden {leyden.__version__} answers lightning, pytorch_lightning, lightning_fabric and test_tube"


def pytest_unconfigure() -> None:
    """Give the process back as it was."""
    while _before:
        path = _before.pop()
        if path is None:
            os.environ.pop("PYTHONPATH", None)
        else:
            os.environ["PYTHONPATH"] = path
    leyden.compat.uninstall()
