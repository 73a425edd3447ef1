# SPDX-License-Identifier: Apache-2.0
"""Figures of the device: which names are logged, on a CPU and, with a stand-in, on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from leyden.callbacks import DeviceStatsMonitor
from leyden.errors import MisconfigurationException

CPU = {"cpu_percent", "cpu_vm_percent", "cpu_swap_percent"}


def with_device(trainer: Any, logger: Any, kind: str) -> Any:
    trainer.loggers = [logger]
    trainer.log_every_n_steps = 1
    trainer.strategy.root_device = torch.device(kind)
    stats = {"allocated_bytes.all.peak": 5, "num_ooms": 0} if kind == "cuda" else dict.fromkeys(CPU, 1.0)
    trainer.accelerator = SimpleNamespace(get_device_stats=lambda device: stats)
    return trainer


@pytest.mark.parametrize(
    ("kind", "cpu_stats", "expected"),
    [
        ("cpu", None, CPU),
        ("cpu", False, set()),
        ("cuda", None, {"allocated_bytes.all.peak", "num_ooms"}),
        ("cuda", True, {"allocated_bytes.all.peak", "num_ooms", *CPU}),
    ],
)
def test_which_figures_are_logged(
    kind: str, cpu_stats: Any, expected: set[str], make_trainer: Callable[..., Any], make_logger: Callable[..., Any]
) -> None:
    pytest.importorskip("psutil")
    logger = make_logger(None)
    monitor = DeviceStatsMonitor(cpu_stats)
    trainer = with_device(make_trainer([monitor]), logger, kind)
    monitor.setup(trainer, None, "fit")
    monitor.on_train_batch_start(trainer, None, None, 0)
    names = {name.partition("/")[2] for row, _ in logger.rows for name in row}
    assert names == expected
    assert all(name.startswith("DeviceStatsMonitor.on_train_batch_start/") for row, _ in logger.rows for name in row)


def test_only_the_wanted_names_and_a_word_about_unknown_ones(
    make_trainer: Callable[..., Any], make_logger: Callable[..., Any]
) -> None:
    pytest.importorskip("psutil")
    logger = make_logger(None)
    monitor = DeviceStatsMonitor(filter_keys={"cpu_percent", "cpu_percents"})
    trainer = with_device(make_trainer([monitor]), logger, "cpu")
    monitor.setup(trainer, None, "fit")
    with pytest.warns(UserWarning, match=r"keys not found.*\['cpu_percents'\]"):
        monitor.on_train_batch_end(trainer, None, None, None, 0)
    monitor.on_validation_start(trainer, None)
    monitor.on_validation_batch_start(trainer, None, None, 0)
    assert [list(row) for row, _ in logger.rows] == [
        ["DeviceStatsMonitor.on_train_batch_end/cpu_percent"],
        ["DeviceStatsMonitor.on_validation_batch_start/cpu_percent"],
    ]


def test_without_a_logger_there_is_nowhere_to_log(make_trainer: Callable[..., Any]) -> None:
    with pytest.raises(MisconfigurationException, match="no logger"):
        DeviceStatsMonitor().setup(make_trainer(), None, "fit")


def test_a_single_name_is_no_set() -> None:
    with pytest.raises(MisconfigurationException, match="give a set of names"):
        DeviceStatsMonitor(filter_keys="cpu_percent")
