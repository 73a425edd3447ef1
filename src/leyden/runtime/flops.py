# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations: how many a model needs, counted by torch; how many a device can do, by its data sheet."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from leyden.runtime.ranks import rank_zero_warn
from leyden.runtime.seed import isolate_rng

_TERA = 10**12

# Tera-operations a second from NVIDIA's data sheets: dense (no figure counts on sparsity), at boost clock, on tensor cores
# that add up in 32 bits, which is what torch asks for (float64 as well, where there are such). A key is the words that must
# be in the device's name; the first match counts, unless the name has a word of _VARIANTS that the key has not.
# Per chip: float64, float32, tfloat32, 16 bits, int8; 0 is "cannot". Before Ampere 16 bits is float16 only.
# Compared with published tables: B200, GB200, H100, A100, L40S, L40, A40, RTX 4090, TPU v5e, v5p and v6e. From memory of
# data sheets, so to be checked by who relies on them: all others, the A10G and the float64 of the A30 and NVL cards first.
_CUDA: list[tuple[str, tuple[float, float, float, float, float]]] = [
    ("gb200", (40, 80, 1250, 2500, 5000)),
    ("b200", (37, 75, 1125, 2250, 4500)),
    ("h200 nvl", (60, 60, 417.5, 835.5, 1670.5)),
    ("h200", (66.9, 66.9, 494.7, 989.4, 1978.9)),
    ("gh200", (66.9, 66.9, 494.7, 989.4, 1978.9)),
    ("h100 nvl", (60, 60, 417.5, 835.5, 1670.5)),
    ("h100 pcie", (51.2, 51.2, 378, 756, 1513)),
    ("h100", (66.9, 66.9, 494.7, 989.4, 1978.9)),
    ("a100", (19.5, 19.5, 156, 312, 624)),
    ("a800", (19.5, 19.5, 156, 312, 624)),
    ("a30", (10.3, 10.3, 82, 165, 330)),
    ("l40s", (0, 91.6, 183, 362, 733)),
    ("l40", (0, 90.5, 90.5, 181, 362)),
    ("l4", (0, 30.3, 60, 121, 242)),
    ("6000 ada", (0, 91.1, 182.1, 364.2, 728.5)),
    ("a6000", (0, 38.7, 77.4, 154.8, 309.7)),
    ("a40", (0, 37.4, 74.8, 149.7, 299.3)),
    ("a10g", (0, 31.5, 35, 70, 140)),
    ("a10", (0, 31.2, 62.5, 125, 250)),
    ("rtx 4090", (0, 82.6, 82.6, 165.2, 660.6)),
    ("rtx 4080 super", (0, 52.2, 52.2, 104.4, 417.6)),
    ("rtx 4080", (0, 48.7, 48.7, 97.5, 389.9)),
    ("rtx 4070 ti", (0, 40.1, 40.1, 80.2, 320.7)),
    ("rtx 4070", (0, 29.1, 29.1, 58.3, 233.2)),
    ("rtx 3090 ti", (0, 40, 40, 80, 320)),
    ("rtx 3090", (0, 35.6, 35.6, 71, 284)),
    ("rtx 3080 ti", (0, 34.1, 34.1, 68.2, 272.8)),
    ("rtx 3080", (0, 29.8, 29.8, 59.5, 238)),
    ("rtx 3070", (0, 20.3, 20.3, 40.6, 162.6)),
    ("t4", (0, 8.1, 0, 65, 130)),
    ("quadro rtx 5000", (0, 11.2, 0, 89.2, 178.4)),
    ("rtx 2080 super", (0, 11.2, 0, 44.6, 178.4)),
    ("rtx 2080 ti", (0, 14.2, 0, 56.9, 227.7)),
    ("rtx 2080", (0, 10.6, 0, 42.4, 169.6)),
    ("rtx 2070 super", (0, 9.1, 0, 36.3, 145)),
    ("titan rtx", (0, 16.3, 0, 130.5, 261)),
    ("v100s", (8.2, 16.4, 0, 130, 0)),
    ("v100 pcie", (7, 14, 0, 112, 0)),
    ("v100", (7.8, 15.7, 0, 125, 0)),
]
_VARIANTS = frozenset(("ti", "super", "d", "laptop", "mobile", "max", "grid", "mig"))
"""Words that make of a name another chip, a slower one in a laptop, or a part of one."""
_TPU = {"v2": 45, "v3": 123, "v4": 275, "v5litepod": 197, "v5p": 459, "v6e": 918}


def measure_flops(
    model: nn.Module, forward_fn: Callable[[], Any], loss_fn: Callable[[Any], Tensor] | None = None
) -> int:
    """Count the floating-point operations of one forward pass, or of a forward and a backward pass.

    A model on the meta device costs no memory and no time::

        with torch.device("meta"):
            model, batch = MyModel(), torch.randn(32, 784)
        flops = measure_flops(model, lambda: model(batch), lambda output: output.sum())

    The real model does as well: its gradients, its buffers (running statistics) and the random generators are afterwards
    what they were. Counted is what torch's ``FlopCounterMode`` counts: products of matrices, convolutions, attention.

    Args:
        model: Whose gradients and buffers are left as they are.
        forward_fn: Runs ``model`` on a batch and returns its output.
        loss_fn: From that output to a scalar; if given, the loss and its backward pass are counted too.
    """
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    counter = FlopCounterMode(display=False)
    with isolate_rng():
        try:
            if loss_fn is None:
                with counter:
                    forward_fn()
            else:
                for parameter, _ in gradients:
                    parameter.grad = None
                with torch.enable_grad(), counter:
                    loss_fn(forward_fn()).backward()  # type: ignore[no-untyped-call]
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
    return int(counter.get_total_flops())


def get_available_flops(device: torch.device, dtype: torch.dtype | str) -> int | None:
    """Return how many operations a second ``device`` can do at most, None where that is not known.

    The figure is that of the data sheet without sparsity: only thick products of matrices come near it. For float32 it is
    that of TF32 where ``torch.set_float32_matmul_precision``, or ``torch.backends``, allows it.

    Args:
        device: A CUDA or XLA device; for any other the answer is None.
        dtype: In which the products are computed.
    """
    if device.type == "xla":
        tpu = importlib.import_module("torch_xla.experimental").tpu  # there where XLA devices are
        chip = str(tpu.get_tpu_env()["TYPE"]).lower().partition("-")[0]
        if chip not in _TPU:
            rank_zero_warn(f"The operations per second of a TPU {chip!r} are not known: no MFU is logged.")
            return None
        return _TPU[chip] * _TERA
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    figures = next(
        (
            figures
            for key, figures in _CUDA
            if words.issuperset(key.split()) and not (words - set(key.split())) & _VARIANTS
        ),
        None,
    )
    if figures is None:
        rank_zero_warn(
            f"The operations per second of the device {name!r} are not known: no MFU is logged. Give them as"
            " ThroughputMonitor(available_flops=...)."
        )
        return None
    double, single, tf32, half, int8 = figures
    if dtype == torch.float32 and tf32 and _allows_tf32():
        single = tf32
    known = {torch.float64: double, torch.float32: single, torch.float16: half, torch.int8: int8}
    known[torch.bfloat16] = half if tf32 else 0
    known_flops = known.get(dtype, 0) if isinstance(dtype, torch.dtype) else 0
    if not known_flops:
        rank_zero_warn(f"The device {name!r} has no figure for {dtype}: no MFU is logged.")
        return None
    return round(known_flops * _TERA)


def _allows_tf32() -> bool:
    """Whether products of float32 may be computed in TF32, by whichever of torch's settings the user has said so."""
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if setting is not None:  # torch 2.9 and later; where that was set, the older question is an error
        return bool(setting == "tf32")
    return torch.get_float32_matmul_precision() != "highest"
