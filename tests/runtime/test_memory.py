# SPDX-License-Identifier: Apache-2.0
"""Errors of memory are known from others."""

from __future__ import annotations

import pytest
import torch

from leyden.runtime import memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        RuntimeError(
            "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous"
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        MemoryError(),
    ],
)
def test_memory_has_run_out(error: BaseException) -> None:
    assert memory.is_oom_error(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("shape '[2]' is invalid"), RuntimeError(), ValueError("CUDA out of memory"), KeyError("x")]
)
def test_something_else(error: BaseException) -> None:
    assert not memory.is_oom_error(error)


def test_a_real_one() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert memory.is_oom_error(error.value)
    assert memory.is_out_of_cpu_memory(error.value)


def test_recursive_detach() -> None:
    leaf = torch.ones(1, requires_grad=True)
    given = {"a": leaf * 2, "b": {"c": [leaf * 3, 4]}, "d": "text"}
    found = memory.recursive_detach(given, to_cpu=True)
    assert not found["a"].requires_grad
    assert not found["b"]["c"][0].requires_grad
    assert (found["b"]["c"][1], found["d"]) == (4, "text")
    assert given["a"].requires_grad


def test_giving_back_meets_an_error_of_memory_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(text: str) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: fail("CUDA error: out of memory"))
    memory.garbage_collection_cuda()
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: fail("device-side assert"))
    with pytest.raises(RuntimeError, match="device-side assert"):
        memory.garbage_collection_cuda()
