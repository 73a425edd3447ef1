# SPDX-License-Identifier: Apache-2.0
"""Memory that runs out: how its errors are known, and how what is not needed is given back."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor

from leyden.tree import tree_map

_DEVICES = ("CUDA", "HIP", "MPS", "XPU")
"""How the messages of devices begin, where torch has no class for the error."""


def recursive_detach(in_dict: Any, to_cpu: bool = False) -> Any:
    """Return a tree of dicts, lists and tuples with every tensor detached from its graph.

    Args:
        in_dict: The tree; it stays as it is.
        to_cpu: Bring the tensors to host memory, too.
    """
    return tree_map(lambda tensor: tensor.detach().cpu() if to_cpu else tensor.detach(), in_dict, Tensor)


def is_oom_error(exception: BaseException) -> bool:
    """Whether ``exception`` says that memory has run out: of a device, or of the host."""
    return (
        isinstance(exception, (torch.OutOfMemoryError, MemoryError))
        or is_cuda_out_of_memory(exception)
        or is_cudnn_snafu(exception)
        or is_out_of_cpu_memory(exception)
    )


def is_cuda_out_of_memory(exception: BaseException) -> bool:
    """Whether a device has no memory left: also where cuBLAS or cuDNN are the first to notice."""
    text = _text(exception)
    lacks = "out of memory" in text and any(name in text for name in _DEVICES)
    return lacks or "CUBLAS_STATUS_ALLOC_FAILED" in text or "CUDNN_STATUS_ALLOC_FAILED" in text


def is_cudnn_snafu(exception: BaseException) -> bool:
    """Whether cuDNN says that it cannot do something, which is what it says of a batch that is too large."""
    return "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED." in _text(exception)


def is_out_of_cpu_memory(exception: BaseException) -> bool:
    """Whether torch could not get host memory."""
    return "DefaultCPUAllocator: can't allocate memory" in _text(exception)


def _text(exception: BaseException) -> str:
    """What a RuntimeError says; nothing for any other exception."""
    return str(exception) if isinstance(exception, RuntimeError) else ""


def garbage_collection_cuda() -> None:
    """Collect garbage, and give the memory that torch's allocator keeps back to the device.

    Raises:
        RuntimeError: any but that memory has run out, which giving it back may say as well.
    """
    gc.collect()
    try:
        torch.cuda.empty_cache()
    except RuntimeError as exception:
        if not is_oom_error(exception):
            raise
