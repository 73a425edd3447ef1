# SPDX-License-Identifier: Apache-2.0
"""What devices say of themselves, as Lightning's functions of these names return it."""

from __future__ import annotations

from typing import Any

import torch

from leyden.runtime.devices import CPUAccelerator, CUDAAccelerator, MPSAccelerator


def get_cpu_stats() -> dict[str, float]:
    """Return the load of processor, memory and swap of this machine, in percent."""
    return dict(CPUAccelerator().get_device_stats(torch.device("cpu")))


def get_nvidia_gpu_stats(device: Any) -> dict[str, float]:
    """Return what is known of a CUDA device: memory in bytes and the like."""
    return dict(CUDAAccelerator().get_device_stats(torch.device(device)))


def get_device_stats() -> dict[str, float]:
    """Return what is known of Apple's GPU and of the machine."""
    return dict(MPSAccelerator().get_device_stats(torch.device("mps")))


def clear_cuda_memory() -> None:
    """Give memory of GPUs that nothing uses back."""
    torch.cuda.empty_cache()
