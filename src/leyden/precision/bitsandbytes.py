# SPDX-License-Identifier: Apache-2.0
"""Linear layers with weights of 4 or 8 bits, by the package bitsandbytes (QLoRA: Dettmers et al. 2023; LLM.int8(): 2022)."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from leyden.errors import MisconfigurationException, did_you_mean
from leyden.precision.base import DefaultDtype, Precision, Replaced
from leyden.tree import tree_map

MODES = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int8-training")


class BitsandbytesPrecision(Precision):
    """Keep the weights of linear layers in 4 or 8 bits; compute in ``dtype``. Needs a CUDA device.

    The optimizer stays what it is. Layers are quantised when they come to the device.

    Args:
        mode: ``"nf4"``, ``"fp4"``: 4 bits; with ``"-dq"`` the scales are quantised too. ``"int8"``: 8 bits, for inference.
            ``"int8-training"``: 16 bits that are multiplied as 8.
        dtype: What is computed in; None: float16 for 8 bits, else bfloat16 where the GPU has it.
        ignore_modules: Names of submodules whose layers stay, with all below them.

    Raises:
        ModuleNotFoundError: without the package bitsandbytes.
        MisconfigurationException: for an unknown mode, or 8 bits with another dtype than float16.
    """

    precision = "bitsandbytes"

    def __init__(self, mode: str, dtype: torch.dtype | None = None, ignore_modules: set[str] | None = None) -> None:
        if mode not in MODES:
            raise MisconfigurationException(
                f"BitsandbytesPrecision(mode={mode!r}) is unknown. Use one of {list(MODES)}.{did_you_mean(str(mode), MODES)}"
            )
        self._library()
        if dtype is None:
            wide = not mode.startswith("int8") and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
            dtype = torch.bfloat16 if wide else torch.float16
        if mode.startswith("int8") and dtype is not torch.float16:
            raise MisconfigurationException(
                f"BitsandbytesPrecision({mode!r}, dtype={dtype}): {mode!r} only works with `dtype=torch.float16`."
            )
        self.mode, self.dtype, self.ignore_modules = mode, dtype, set(ignore_modules or ())
        self._default = DefaultDtype(dtype)

    @staticmethod
    def _library() -> Any:
        try:
            return import_module("bitsandbytes")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "BitsandbytesPrecision needs the package 'bitsandbytes': run `pip install bitsandbytes` on a machine with a"
                " CUDA device.",
                name="bitsandbytes",
            ) from error

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Replace the linear layers.

        Raises:
            TypeError: for a module without any.
        """
        layers = self._library().nn
        if not any(isinstance(each, nn.Linear) for each in module.modules()):
            raise TypeError(
                f"BitsandbytesPrecision: {type(module).__name__} has no Linear layers, so nothing is quantised."
            )
        if not any(isinstance(each, (layers.Linear8bitLt, layers.Linear4bit)) for each in module.modules()):
            self._replace(module, "")
        for each in module.modules():
            if isinstance(each, layers.Linear4bit):
                each.compute_dtype, each.compute_type_is_set = self.dtype, False
        return module

    def _replace(self, module: nn.Module, path: str) -> None:
        for name, child in list(module.named_children()):
            full = f"{path}.{name}" if path else name
            if any(full == kept or full.startswith(f"{kept}.") for kept in self.ignore_modules):
                continue
            if type(child) is nn.Linear:
                made = self.make_linear(child.in_features, child.out_features, bias=child.bias is not None)
                made.weight.data = child.weight.data
                if child.bias is not None:
                    made.bias.data = child.bias.data
                setattr(module, name, made)
            else:
                self._replace(child, full)

    def make_linear(self, in_features: int, out_features: int, bias: bool = True, **more: Any) -> Any:
        """Return a linear layer of the mode; its weights are quantised when it is moved to the device."""
        layers = self._library().nn
        if self.mode.startswith("int8"):
            training = self.mode == "int8-training"
            return layers.Linear8bitLt(
                in_features, out_features, bias=bias, has_fp16_weights=training, threshold=6.0, **more
            )
        kind, _, double = self.mode.partition("-")
        return layers.Linear4bit(
            in_features, out_features, bias=bias, compute_dtype=self.dtype, quant_type=kind,
            compress_statistics=bool(double), **more,
        )  # fmt: skip

    def convert_input(self, batch: Any) -> Any:
        return tree_map(self._convert, batch)

    def _convert(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def convert_output(self, batch: Any) -> Any:
        return tree_map(lambda each: each.to(torch.get_default_dtype()) if each.is_floating_point() else each, batch)

    def forward_context(self) -> AbstractContextManager[Any]:
        return self._default

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return self._default

    def module_init_context(self) -> AbstractContextManager[Any]:
        """New linear layers are of the mode from the start.

        Raises:
            RuntimeError: with ``ignore_modules``: which layer a new one becomes is not known yet.
        """
        if self.ignore_modules:
            raise RuntimeError(
                f"BitsandbytesPrecision(ignore_modules={self.ignore_modules}) does not go with layers that are quantised"
                " when they are made. Drop ignore_modules, or make the layers in __init__."
            )
        stack = ExitStack()
        stack.enter_context(self._default)
        stack.enter_context(Replaced({"Linear": self.make_linear}))
        return stack
