# SPDX-License-Identifier: Apache-2.0
"""A module in the formats of other programs: ONNX, TorchScript, TensorRT."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from leyden.errors import MisconfigurationException
from leyden.runtime.ranks import rank_zero_deprecation
from leyden.types import PathLike


def to_onnx(module: Any, file_path: Any = None, input_sample: Any | None = None, **kwargs: Any) -> Any:
    """Write the module, as it is in evaluation, in the ONNX format.

    Args:
        file_path: Where: a path, or a file that is open for bytes (``dynamo=False``); None only returns it.
        input_sample: Inputs of ``forward``; None takes ``example_input_array``.
        **kwargs: Arguments of ``torch.onnx.export``: ``dynamo``, ``export_params``, ``input_names``, ...

    Returns:
        What ``torch.onnx.export`` returns.

    Raises:
        ModuleNotFoundError: without onnx, or, unless ``dynamo=False``, onnxscript.
        MisconfigurationException: (a ValueError) without a sample.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if "onnx" in missing or (missing and kwargs.get("dynamo", True)):
        raise ModuleNotFoundError(
            f"to_onnx() needs {' and '.join(missing)}, which is not installed: pip install 'leyden[onnx]'."
        )
    sample = _sample(module, input_sample, "Could not export to ONNX since neither `input_sample` nor")
    with _evaluated(module), torch.no_grad():
        if isinstance(sample, dict):
            return torch.onnx.export(module, kwargs=sample, f=_path(file_path), **kwargs)
        args = sample if isinstance(sample, tuple) else (sample,)
        return torch.onnx.export(module, args, _path(file_path), **kwargs)


def to_torchscript(
    module: Any, file_path: PathLike | None = None, method: str | None = "script", example_inputs: Any | None = None,
    **kwargs: Any,
) -> Any:  # fmt: skip
    """Compile the module to TorchScript. torch has retired that: use ``torch.export.export``, or ``to_onnx``.

    Args:
        file_path: Write it there; None only returns it.
        method: ``"script"`` or ``"trace"``.
        example_inputs: Inputs of ``forward`` for ``"trace"``; None takes ``example_input_array``.
        **kwargs: Arguments of ``torch.jit.script`` or ``torch.jit.trace``.

    Returns:
        The compiled module.

    Raises:
        ValueError: for another method, or without inputs to trace.
    """
    rank_zero_deprecation(
        "to_torchscript() is deprecated, since torch has retired TorchScript: use torch.export.export(), or to_onnx()."
    )
    if method not in ("script", "trace"):
        raise ValueError(
            f"to_torchscript(method={method!r}): The 'method' parameter only supports 'script' or 'trace'."
        )
    with _evaluated(module), _unattached(module), torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.*", category=DeprecationWarning)
        jit: Any = torch.jit
        if method == "script":
            compiled = jit.script(module, **kwargs)
        else:
            sample = _sample(
                module, example_inputs, "Choosing method=`trace` needs inputs, and neither `example_inputs` nor"
            )
            compiled = jit.trace(module, example_inputs=sample, **kwargs)
        if file_path is not None:
            if "://" in str(file_path):
                import fsspec  # noqa: PLC0415  # only remote files need it

                with fsspec.open(str(file_path), "wb") as file:
                    jit.save(compiled, file)
            else:
                jit.save(compiled, os.fspath(file_path))
    return compiled


def to_tensorrt(
    module: Any, file_path: PathLike | None = None, input_sample: Any | None = None, ir: str = "default",
    output_format: str = "exported_program", retrace: bool = False, default_device: Any = "cuda", **compile_kwargs: Any,
) -> Any:  # fmt: skip
    """Compile the module for NVIDIA GPUs with torch_tensorrt.

    Args:
        file_path: Write it there; None only returns it.
        input_sample: Inputs of ``forward``; None takes ``example_input_array``.
        ir: ``"default"``, ``"dynamo"`` or ``"ts"``.
        output_format: ``"exported_program"`` or ``"torchscript"``.
        retrace: Trace anew what is written.
        default_device: Where the module is compiled.
        **compile_kwargs: Arguments of ``torch_tensorrt.compile``.

    Raises:
        ModuleNotFoundError: without torch_tensorrt.
        MisconfigurationException: (a ValueError) without a sample.
    """
    if importlib.util.find_spec("torch_tensorrt") is None:
        raise ModuleNotFoundError(
            "to_tensorrt() needs torch_tensorrt, which is not installed: pip install torch-tensorrt, on a machine with"
            " an NVIDIA GPU. to_onnx() writes what TensorRT reads as well."
        )
    tensorrt: Any = importlib.import_module("torch_tensorrt")
    sample = _sample(module, input_sample, "Could not export to TensorRT since neither `input_sample` nor")
    device = torch.device(default_device)
    inputs = [each.to(device) for each in (sample if isinstance(sample, (tuple, list)) else [sample])]
    module.to(device)
    with _evaluated(module):
        compiled = tensorrt.compile(module, ir=ir, inputs=inputs, **compile_kwargs)
        if file_path is not None:
            tensorrt.save(compiled, str(file_path), output_format=output_format, retrace=retrace, inputs=inputs)
    return compiled


def _sample(module: Any, given: Any, why: str) -> Any:
    """The inputs to follow the module with, on its device, as a run would bring them there."""
    sample = getattr(module, "example_input_array", None) if given is None else given
    if sample is None:
        raise MisconfigurationException(f"{why} `model.example_input_array` attribute is set. Give one of the two.")
    batch = module.on_before_batch_transfer(sample, 0)
    batch = module.transfer_batch_to_device(batch, module.device, 0)
    return module.on_after_batch_transfer(batch, 0)


@contextmanager
def _unattached(module: Any) -> Iterator[None]:
    """Let a compiler, which looks at every attribute, meet an AttributeError where there is no Trainer."""
    alone = [vars(child) for child in module.modules() if hasattr(child, "_trainer_ref")]
    alone = [own for own in alone if own.get("_trainer_ref") is None and own.get("_fabric") is None]
    former = [own.get("_fabric") for own in alone]
    for own in alone:
        own["_fabric"] = object()  # it has nothing to tell, and cannot be compiled
    try:
        yield
    finally:
        for own, fabric in zip(alone, former, strict=True):
            own["_fabric"] = fabric


@contextmanager
def _evaluated(module: Any) -> Iterator[None]:
    """Put the module in evaluation for the length of the block, each of its layers."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, training in modes:
            child.training = training


def _path(given: Any) -> Any:
    return os.fspath(given) if isinstance(given, os.PathLike) else given
