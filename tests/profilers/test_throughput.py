# SPDX-License-Identifier: Apache-2.0
"""Tests of Throughput; the figures are those that Lightning 2.6.6 gave for the same updates."""

from __future__ import annotations

import pytest

from leyden.errors import MisconfigurationException
from leyden.profilers.throughput import Throughput


def test_totals_at_once_and_rates_when_the_window_is_full():
    throughput = Throughput(window_size=3, available_flops=100)
    assert throughput.compute() == {}
    for index in (1, 2):
        throughput.update(time=index * 1.0, batches=index, samples=index * 2, lengths=index * 20, flops=10)
        assert throughput.compute() == {
            "time": index, "batches": index, "samples": index * 2, "lengths": index * 20
        }  # fmt: skip
    for index in (3, 4):
        throughput.update(time=index * 1.0, batches=index, samples=index * 2, lengths=index * 20, flops=10)
        assert throughput.compute() == {
            "time": index, "batches": index, "samples": index * 2, "lengths": index * 20,
            "device/batches_per_sec": 1.0, "device/samples_per_sec": 2.0, "device/items_per_sec": 20.0,
            "device/flops_per_sec": 10.0, "device/mfu": 0.1,
        }  # fmt: skip


def test_several_devices_and_another_separator():
    throughput = Throughput(world_size=2, window_size=2, separator="|")
    throughput.update(time=1.0, batches=1, samples=2, lengths=20, flops=10)
    throughput.update(time=2.0, batches=2, samples=4, lengths=40, flops=10)
    assert throughput.compute() == {
        "time": 2.0, "batches": 2, "samples": 4, "lengths": 40,
        "device|batches_per_sec": 1.0, "device|samples_per_sec": 2.0, "device|items_per_sec": 20.0,
        "device|flops_per_sec": 10.0,
        "batches_per_sec": 2.0, "samples_per_sec": 4.0, "items_per_sec": 40.0, "flops_per_sec": 20.0,
    }  # fmt: skip


def test_the_window_rolls_and_batches_may_differ_in_size():
    throughput = Throughput(window_size=3)
    samples = 0
    for index, size in enumerate((100, 1, 2, 3), start=1):
        samples += size
        throughput.update(time=index * 2.0, batches=index, samples=samples)
    assert throughput.compute()["device/samples_per_sec"] == (2 + 3) / 4
    assert "device/flops_per_sec" not in throughput.compute()
    throughput.reset()
    assert throughput.compute() == {}
    throughput.update(time=0.5, batches=1, samples=1)  # after a reset a smaller total is no error
    assert throughput.compute() == {"time": 0.5, "batches": 1, "samples": 1}


def test_no_rate_where_no_time_has_passed():
    throughput = Throughput(window_size=2)
    for index in (1, 2):
        throughput.update(time=1.0, batches=index, samples=index)
    assert throughput.compute() == {"time": 1.0, "batches": 2, "samples": 2}


@pytest.mark.parametrize(
    ("update", "match"),
    [
        (
            {"time": 0.5, "batches": 4, "samples": 8},
            r"Expected the value to increase, last: 1.0, current: 0.5 \(time\)",
        ),
        ({"time": 2.0, "batches": 2, "samples": 8}, r"increase, last: 3, current: 2 \(batches\)"),
        ({"time": 2.0, "batches": 4, "samples": 5}, r"increase, last: 6, current: 5 \(samples\)"),
        ({"time": 2.0, "batches": 4, "samples": 8, "lengths": 11}, r"last: 12, current: 11 \(lengths\)"),
        ({"time": 2.0, "batches": 4, "samples": 3}, r"samples \(3\) to be greater or equal than batches \(4\)"),
        ({"time": 2.0, "batches": 4, "samples": 8, "lengths": 7}, r"lengths \(7\) to be greater or equal than samples"),
    ],
)
def test_totals_never_decrease(update, match):
    throughput = Throughput()
    throughput.update(time=1.0, batches=3, samples=6, lengths=12)
    with pytest.raises(ValueError, match=match):
        throughput.update(**update)


@pytest.mark.parametrize("arguments", [{"world_size": 0}, {"window_size": 1}])
def test_bad_arguments(arguments):
    with pytest.raises(MisconfigurationException, match=f"Throughput\\({next(iter(arguments))}="):
        Throughput(**arguments)
