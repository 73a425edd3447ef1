# SPDX-License-Identifier: Apache-2.0
"""Tests of the counts of floating-point operations."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from leyden.runtime.flops import get_available_flops, measure_flops


def test_forward_and_backward_of_a_layer_are_counted():
    layer, batch = nn.Linear(3, 4), torch.randn(2, 3)
    assert measure_flops(layer, lambda: layer(batch)) == 2 * 2 * 3 * 4
    # the batch needs no gradient: backward is one more product, that of the weights
    assert measure_flops(layer, lambda: layer(batch), lambda output: output.sum()) == 2 * 2 * 2 * 3 * 4


def test_on_the_meta_device_the_count_is_the_same():
    def flops(device):
        with torch.device(device):
            net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))
            batch = torch.empty(2, 1, 8, 8)
        return measure_flops(net, lambda: net(batch), lambda output: output.sum())

    assert flops("meta") == flops("cpu") > 0


def test_the_real_model_is_afterwards_what_it_was():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    batch = torch.randn(8, 3)
    net(batch).sum().backward()
    gradients = [parameter.grad.clone() for parameter in net.parameters()]
    objects = [parameter.grad for parameter in net.parameters()]
    buffers = [buffer.clone() for buffer in net.buffers()]
    generator = torch.get_rng_state()
    with torch.no_grad():  # as in a hook of an evaluation
        assert measure_flops(net, lambda: net(batch), lambda output: output.sum()) > 0
    assert all(parameter.grad is there for parameter, there in zip(net.parameters(), objects, strict=True))
    assert all(map(torch.equal, (parameter.grad for parameter in net.parameters()), gradients))
    assert all(map(torch.equal, net.buffers(), buffers))
    assert torch.equal(torch.get_rng_state(), generator)


def test_gradients_come_back_when_the_count_fails():
    layer = nn.Linear(3, 4)
    layer(torch.randn(2, 3)).sum().backward()
    before = layer.weight.grad
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        measure_flops(layer, lambda: layer(torch.randn(2, 5)), lambda output: output.sum())
    assert layer.weight.grad is before


def device_name(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    return torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500), ("NVIDIA H200", 989.4), ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A40", 149.7), ("NVIDIA RTX A6000", 154.8), ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121), ("NVIDIA L40S", 362), ("NVIDIA L40", 181), ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA GeForce RTX 4080 SUPER", 104.4), ("NVIDIA GeForce RTX 4080", 97.5),
        ("NVIDIA GeForce RTX 3090 Ti", 80), ("NVIDIA GeForce RTX 3090", 71), ("Tesla T4", 65), ("TITAN RTX", 130.5),
        ("Quadro RTX 5000", 89.2), ("NVIDIA GeForce RTX 3080 Ti", 68.2), ("NVIDIA GeForce RTX 2080 Ti", 56.9),
        ("Tesla V100-SXM2-32GB", 125), ("Tesla V100-PCIE-16GB", 112), ("Tesla V100S-PCIE-32GB", 130),
    ],
)  # fmt: skip
def test_chips_are_known_by_their_names(name, tera, monkeypatch):
    assert get_available_flops(device_name(monkeypatch, name), torch.float16) == round(tera * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4070 SUPER",
        "NVIDIA GeForce RTX 4070 Ti SUPER", "NVIDIA GeForce RTX 3070 Ti", "Quadro RTX 5000 with Max-Q Design",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "GRID A100-10C",
    ],
)  # fmt: skip
def test_a_variant_is_not_taken_for_the_chip(name, monkeypatch):
    with pytest.warns(UserWarning, match="are not known: no MFU is logged"):
        assert get_available_flops(device_name(monkeypatch, name), torch.float16) is None


@pytest.mark.parametrize(
    ("name", "tera"), [("NVIDIA A100-SXM4-80GB", 19.5), ("NVIDIA H100 80GB HBM3", 66.9), ("Tesla V100-SXM2-32GB", 7.8)]
)
def test_double_precision_counts_on_tensor_cores_where_there_are(name, tera, monkeypatch):
    assert get_available_flops(device_name(monkeypatch, name), torch.float64) == round(tera * 1e12)


@pytest.mark.parametrize(
    ("said", "tera"),
    [
        ("set_float32_matmul_precision('highest')", 19.5), ("set_float32_matmul_precision('high')", 156),
        ("set_float32_matmul_precision('medium')", 156), ("backends.cuda.matmul.allow_tf32 = True", 156),
        ("backends.cuda.matmul.fp32_precision = 'tf32'", 156), ("backends.cuda.matmul.fp32_precision = 'ieee'", 19.5),
    ],
)  # fmt: skip
def test_single_precision_counts_on_tf32_where_it_is_allowed(said, tera):
    if "fp32_precision" in said and not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("torch 2.9 and later")
    code = (
        "import torch; from leyden.runtime.flops import get_available_flops as flops\n"
        f"torch.{said}\n"
        "for name in ('NVIDIA A100-SXM4-40GB', 'Tesla T4'):\n"
        "    torch.cuda.get_device_name = lambda device=None: name\n"
        "    print(flops(torch.device('cuda', 0), torch.float32))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == [str(round(tera * 1e12)), str(round(8.1e12))], done.stderr  # a T4 has no TF32


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("Tesla V100-SXM2-32GB", torch.bfloat16), ("NVIDIA L4", torch.float64), ("NVIDIA L4", "int4"), ("Voodoo 2", None)],
)
def test_what_is_not_known_is_said(name, dtype, monkeypatch):
    with pytest.warns(UserWarning, match=f"{name}.*no MFU is logged"):
        assert get_available_flops(device_name(monkeypatch, name), dtype or torch.float32) is None


def test_a_cpu_has_no_figure_and_nothing_is_said():
    assert get_available_flops(torch.device("cpu"), torch.float32) is None


@pytest.mark.parametrize(
    ("kind", "tera"), [("V4-8", 275), ("V5LITEPOD-4", 197), ("v5p-8", 459), ("v6e-8", 918), ("V9", None)]
)
def test_tpus(kind, tera, monkeypatch):
    package, experimental = ModuleType("torch_xla"), ModuleType("torch_xla.experimental")
    experimental.tpu = SimpleNamespace(get_tpu_env=lambda: {"TYPE": kind})
    monkeypatch.setitem(sys.modules, "torch_xla", package)
    monkeypatch.setitem(sys.modules, "torch_xla.experimental", experimental)
    device = SimpleNamespace(type="xla")
    if tera is None:
        with pytest.warns(UserWarning, match="'v9' are not known"):
            assert get_available_flops(device, torch.bfloat16) is None
    else:
        assert get_available_flops(device, torch.bfloat16) == tera * 1e12
