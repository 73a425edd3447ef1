# SPDX-License-Identifier: Apache-2.0
"""Why a test cannot run here: the marker ``RunIf`` of test suites that were written for Lightning asks it."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from leyden.compat.pieces.available import Requirement, package_available


def runif_reasons(
    *,
    min_cuda_gpus: int = 0,
    min_torch: str | None = None,
    max_torch: str | None = None,
    min_python: str | None = None,
    bf16_cuda: bool = False,
    tpu: bool = False,
    mps: bool | None = None,
    skip_windows: bool = False,
    standalone: bool = False,
    deepspeed: bool = False,
    dynamo: bool = False,
    rich: bool = False,
    sklearn: bool = False,
    onnx: bool = False,
    **more: Any,
) -> tuple[list[str], dict[str, bool]]:
    """Return what is missing for a test, in words, and the marks that the test gets.

    Args:
        min_cuda_gpus: GPUs.
        min_torch: The lowest version of torch.
        max_torch: It must be below this one.
        min_python: The lowest version of python.
        bf16_cuda: A GPU that computes in bfloat16.
        tpu: A TPU.
        mps: True: Apple's GPU; False: none.
        skip_windows: Any other system.
        standalone: The variable ``PL_RUN_STANDALONE_TESTS=1``.
        deepspeed, rich, sklearn, onnx: The package.
        dynamo: A python that ``torch.compile`` works with.
        more: Further ones are packages by their name; False asks for nothing.
    """
    has_mps = torch.backends.mps.is_available()
    missing = [
        (torch.cuda.device_count() < min_cuda_gpus, f"{min_cuda_gpus} GPUs"),
        (min_torch is not None and not Requirement(f"torch>={min_torch}"), f"torch>={min_torch}"),
        (max_torch is not None and not Requirement(f"torch<{max_torch}"), f"torch<{max_torch}"),
        (_python_below(min_python), f"python>={min_python}"),
        (bf16_cuda and not (torch.cuda.is_available() and torch.cuda.is_bf16_supported()), "a GPU with bfloat16"),
        (tpu and not package_available("torch_xla"), "a TPU"),
        (mps is True and not has_mps, "MPS"),
        (mps is False and has_mps, "no MPS"),
        (skip_windows and sys.platform == "win32", "another system than Windows"),
        (standalone and os.environ.get("PL_RUN_STANDALONE_TESTS", "0") != "1", "PL_RUN_STANDALONE_TESTS=1"),
        (dynamo and sys.platform == "win32", "torch.compile"),
    ]
    for package, wanted in {"deepspeed": deepspeed, "rich": rich, "sklearn": sklearn, "onnx": onnx, **more}.items():
        missing.append((wanted is True and not package_available(package), package))
    marks = {"min_cuda_gpus": True} if min_cuda_gpus else {}
    marks |= {"standalone": True} if standalone else {}
    marks |= {"tpu": True} if tpu else {}
    return [text for absent, text in missing if absent], marks


def _python_below(version: str | None) -> bool:
    return version is not None and sys.version_info[:3] < tuple(int(part) for part in version.split("."))
