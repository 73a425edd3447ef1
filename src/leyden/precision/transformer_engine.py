# SPDX-License-Identifier: Apache-2.0
"""Matrix products of 8-bit floating point, by NVIDIA's Transformer Engine (Micikevicius et al. 2022, FP8 formats)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from leyden.precision.base import DefaultDtype, Precision, Replaced
from leyden.runtime.ranks import rank_zero_info, rank_zero_warn
from leyden.tree import tree_map


class TransformerEnginePrecision(Precision):
    """Train with products of 8 bits on GPUs that have them (Hopper and later).

    Args:
        weights_dtype: What weights and inputs are kept in, bfloat16 or float16.
        recipe: How 8-bit numbers are scaled: a recipe of the library, or the arguments of its ``DelayedScaling``.
        replace_layers: Make linear layers and layer norms the library's. None: unless the module has some of them.
        fallback_compute_dtype: What the rest is computed in; None: ``weights_dtype``.

    Raises:
        ModuleNotFoundError: without the package transformer_engine.
    """

    precision = "transformer-engine"

    def __init__(
        self,
        *,
        weights_dtype: torch.dtype,
        recipe: Mapping[str, Any] | Any = None,
        replace_layers: bool | None = None,
        fallback_compute_dtype: torch.dtype | None = None,
    ) -> None:
        recipes = _library("transformer_engine.common.recipe")
        if recipe is None or isinstance(recipe, Mapping):
            arguments = dict(recipe or {})
            if isinstance(arguments.get("fp8_format"), str):
                arguments["fp8_format"] = getattr(recipes.Format, arguments["fp8_format"])
            recipe = recipes.DelayedScaling(**arguments)
        if weights_dtype is torch.float16:
            self.precision = "transformer-engine-float16"
        self.weights_dtype, self.recipe, self.replace_layers = weights_dtype, recipe, replace_layers
        self.fallback_compute_dtype = fallback_compute_dtype or weights_dtype
        self._default = DefaultDtype(weights_dtype)

    def convert_module(self, module: nn.Module) -> nn.Module:
        if any("transformer_engine.pytorch" in type(each).__module__ for each in module.modules()):
            if self.replace_layers:
                rank_zero_info("The module has layers of Transformer Engine already: none is replaced.")
        elif self.replace_layers is not False:
            replace_layers(module)
        return module.to(dtype=self.weights_dtype)

    def convert_input(self, batch: Any) -> Any:
        return tree_map(self._convert, batch)

    def _convert(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.weights_dtype) if tensor.is_floating_point() else tensor

    def convert_output(self, batch: Any) -> Any:
        return tree_map(lambda each: each.to(torch.get_default_dtype()) if each.is_floating_point() else each, batch)

    def forward_context(self) -> AbstractContextManager[Any]:
        stack = ExitStack()
        stack.enter_context(self._default)
        # around the library's own: for what has no 8 bits
        stack.enter_context(torch.autocast("cuda", dtype=self.fallback_compute_dtype))
        engine = _library("transformer_engine.pytorch")
        stack.enter_context(engine.fp8_autocast(enabled=True, fp8_recipe=self.recipe))
        return stack

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return self._default

    def module_init_context(self) -> AbstractContextManager[Any]:
        stack = ExitStack()
        if self.replace_layers:
            engine = _library("transformer_engine.pytorch")
            stack.enter_context(Replaced({"Linear": engine.Linear, "LayerNorm": engine.LayerNorm}))
        stack.enter_context(self._default)
        return stack


def replace_layers(module: nn.Module) -> None:
    """Make the linear layers and layer norms of ``module`` the library's; those of a size without 8 bits stay."""
    engine = _library("transformer_engine.pytorch")
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            if child.in_features % 8 or child.out_features % 16:
                rank_zero_warn(
                    f"The layer {name!r} ({child.in_features} to {child.out_features}) stays as it is: 8-bit products take"
                    " inputs of a multiple of 8 and outputs of a multiple of 16. Pad it."
                )
                continue
            made = engine.Linear(child.in_features, child.out_features, bias=child.bias is not None)
        elif isinstance(child, nn.LayerNorm):
            made = engine.LayerNorm(child.normalized_shape[0], eps=child.eps)
        else:
            replace_layers(child)
            continue
        made.weight.data = child.weight.data.clone()
        if getattr(child, "bias", None) is not None and made.bias is not None:  # a norm may have none
            made.bias.data = child.bias.data.clone()
        setattr(module, name, made)


def _library(module: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "precision='transformer-engine' needs the package 'transformer_engine': run"
            " `pip install transformer_engine[pytorch]` on a machine with a CUDA device.",
            name="transformer_engine",
        ) from error
