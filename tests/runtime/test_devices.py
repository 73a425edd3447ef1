# SPDX-License-Identifier: Apache-2.0
"""``accelerator`` and ``devices``: which devices each form means, on machines with and without GPUs."""

from __future__ import annotations

import sys

import pytest
import torch

from leyden.errors import MisconfigurationException
from leyden.runtime.devices import (
    Accelerator,
    CPUAccelerator,
    CUDAAccelerator,
    MPSAccelerator,
    choose,
    find_usable_cuda_devices,
    make_accelerator,
)

CPU = torch.device("cpu")


def cuda(*indices):
    return [torch.device("cuda", index) for index in indices]


@pytest.fixture
def machine(monkeypatch):
    """Pretend a machine with so many GPUs, or with Apple's."""

    def pretend(gpus=0, mps=False):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    pretend()
    return pretend


@pytest.mark.parametrize(
    ("gpus", "mps", "accelerator", "expected"),
    [
        (0, False, "auto", CPUAccelerator),
        (2, False, "auto", CUDAAccelerator),
        (0, True, "auto", MPSAccelerator),
        (2, False, "gpu", CUDAAccelerator),
        (0, True, "gpu", MPSAccelerator),
        (2, False, "cpu", CPUAccelerator),
        (2, False, "CUDA", CUDAAccelerator),
        (0, True, "mps", MPSAccelerator),
    ],
)
def test_accelerators(machine, gpus, mps, accelerator, expected):
    machine(gpus, mps)
    assert type(make_accelerator(accelerator)) is expected


@pytest.mark.parametrize(
    ("accelerator", "text"),
    [
        ("gpu", "accelerator='gpu': torch finds no GPU here"),
        ("cuda", "accelerator='cuda' is not available here. Available: 'cpu'."),
        (MPSAccelerator(), "accelerator='mps' is not available here"),
        ("cdua", "accelerator='cdua'`. Use one of 'auto', 'gpu', 'mps', 'cuda', 'cpu'.*Did you mean 'cuda'"),
        ("tpu", "accelerator='tpu'`.*does not support that kind.$"),
        (None, "invalid accelerator name: `accelerator=None`"),
        (CPUAccelerator, "invalid accelerator name.*or an instance"),
    ],
)
def test_wrong_accelerators(machine, accelerator, text):
    with pytest.raises(MisconfigurationException, match=text):
        choose(accelerator, 1)


@pytest.mark.parametrize(
    ("devices", "count"), [("auto", 1), (1, 1), (2, 2), ("1", 1), (" 2 ", 2), (-1, 1), ("-1", 1), ("AUTO", 1)]
)
def test_cpu_devices(machine, devices, count):
    assert choose("cpu", devices) == [CPU] * count


@pytest.mark.parametrize("devices", [[0], "0,", "x", 1.5, None, -2, (0,)])
def test_wrong_cpu_devices(machine, devices):
    with pytest.raises(MisconfigurationException, match="with the CPU accelerator: give a number of processes"):
        choose("cpu", devices)


@pytest.mark.parametrize("accelerator", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("devices", [0, "0", [], (), False, True])
def test_no_devices(machine, accelerator, devices):
    machine(2, True)
    with pytest.raises(MisconfigurationException, match=f"not a valid input using {accelerator} accelerator"):
        choose(accelerator, devices)


@pytest.mark.parametrize(
    ("devices", "indices"),
    [
        ("auto", [0, 1, 2]),
        (-1, [0, 1, 2]),
        ("-1", [0, 1, 2]),
        (1, [0]),
        (2, [0, 1]),
        ("2", [0, 1]),
        ([2, 0], [2, 0]),
        ((1,), [1]),
        ("1,", [1]),
        ("0, 2", [0, 2]),
    ],
)
def test_cuda_devices(machine, devices, indices):
    machine(3)
    assert choose("gpu", devices) == cuda(*indices)


@pytest.mark.parametrize(
    ("devices", "text"),
    [
        (4, r"devices=4 asks for cuda devices \[3\] that are not here. Here are: \[0, 1, 2\]"),
        ([0, 7], r"asks for cuda devices \[7\]"),
        ("3,", r"asks for cuda devices \[3\]"),
        ([1, 1], "names a device twice"),
        (-2, "devices=-2 is not understood. Give a number"),
        ("a,b", "devices='a,b' is not understood"),
        ("", "devices='' is not understood"),
        (None, "devices=None is not understood"),
        (1.0, "devices=1.0 is not understood"),
        ([True], r"devices=\[True\] is not understood"),
        (["0"], r"devices=\['0'\] is not understood"),
    ],
)
def test_wrong_cuda_devices(machine, devices, text):
    machine(3)
    with pytest.raises(MisconfigurationException, match=text):
        choose("cuda", devices)


@pytest.mark.parametrize("devices", ["auto", 1, -1, [0]])
def test_mps_devices(machine, devices):
    machine(0, True)
    assert choose("auto", devices) == [torch.device("mps", 0)]


def test_auto_takes_one_gpu_in_a_notebook(machine, monkeypatch, caplog):
    machine(3)
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    assert choose("auto", "auto") == cuda(0)
    assert caplog.messages == ["Using 1 of 3 GPUs, as this is an interactive session. Ask for more with devices=..."]
    assert choose("auto", -1) == cuda(0, 1, 2)


def test_accelerator_of_ones_own(machine):
    class Mine(Accelerator):
        name = staticmethod(lambda: "meta")
        is_available = staticmethod(lambda: True)
        auto_device_count = staticmethod(lambda: 2)
        parse_devices = staticmethod(int)
        get_parallel_devices = staticmethod(lambda n: [torch.device("meta")] * n)

    assert choose(Mine()) == [torch.device("meta")] * 2
    Mine().setup_device(torch.device("meta"))
    assert Mine().get_device_stats("meta") == {}
    Mine().teardown()


@pytest.mark.parametrize("name", ["name", "is_available", "auto_device_count"])
def test_accelerator_without_its_methods(name):
    with pytest.raises(NotImplementedError, match=f"needs (a )?{name}"):
        getattr(Accelerator(), name)()


def test_setup_device(monkeypatch):
    CPUAccelerator().setup_device(CPU)
    with pytest.raises(MisconfigurationException, match="CPUAccelerator cannot use the device 'cuda:0'"):
        CPUAccelerator().setup_device(torch.device("cuda", 0))
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    CUDAAccelerator().setup_device(torch.device("cuda", 1))
    assert current == cuda(1)


def test_stats(monkeypatch):
    pytest.importorskip("psutil")
    assert set(CPUAccelerator().get_device_stats(CPU)) == {"cpu_vm_percent", "cpu_percent", "cpu_swap_percent"}
    assert "M1_percent" in MPSAccelerator().get_device_stats("mps")
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(ModuleNotFoundError, match="pip install psutil"):
        CPUAccelerator().get_device_stats(CPU)


def test_find_usable_cuda_devices(machine, monkeypatch):
    machine(3)
    real = torch.tensor

    def tensor(value, device):
        if device.index == 1:
            raise RuntimeError("CUDA error: device busy")
        return real(value)

    monkeypatch.setattr(torch, "tensor", tensor)
    assert find_usable_cuda_devices() == [0, 2]
    assert find_usable_cuda_devices(1) == [0]
    assert find_usable_cuda_devices(2) == [0, 2]
    assert find_usable_cuda_devices(0) == []
    with pytest.raises(RuntimeError, match=r"only 2 CUDA devices are free; taken are \[1\]"):
        find_usable_cuda_devices(3)
    with pytest.raises(ValueError, match="num_devices=4: this machine has 3"):
        find_usable_cuda_devices(4)
    machine(0)
    with pytest.raises(ValueError, match="has 0 visible"):
        find_usable_cuda_devices()
