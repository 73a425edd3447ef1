# SPDX-License-Identifier: Apache-2.0
"""4 and 8 bits: which layers are replaced by what, with stand-ins of the libraries, which need GPUs."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from leyden.errors import MisconfigurationException
from leyden.precision import (
    BitsandbytesPrecision,
    FSDPPrecision,
    MixedPrecision,
    TransformerEnginePrecision,
    XLAPrecision,
    make_precision,
)

TornLinear = nn.Linear


class Layer(TornLinear):
    def __init__(self, inputs: int, outputs: int, bias: bool = True, **told: Any) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.told = told


class Linear4bit(Layer):
    pass


class Linear8bitLt(Layer):
    pass


@pytest.fixture
def bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("bitsandbytes")
    vars(module)["nn"] = SimpleNamespace(Linear4bit=Linear4bit, Linear8bitLt=Linear8bitLt)
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)


def model() -> nn.Sequential:
    inner = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU())
    return nn.Sequential(nn.Linear(8, 16), inner, nn.LayerNorm(8), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("mode", "kind", "told"),
    [
        ("nf4", Linear4bit, {"quant_type": "nf4", "compress_statistics": False, "compute_dtype": torch.bfloat16}),
        ("nf4-dq", Linear4bit, {"quant_type": "nf4", "compress_statistics": True, "compute_dtype": torch.bfloat16}),
        ("fp4", Linear4bit, {"quant_type": "fp4", "compress_statistics": False, "compute_dtype": torch.bfloat16}),
        ("fp4-dq", Linear4bit, {"quant_type": "fp4", "compress_statistics": True, "compute_dtype": torch.bfloat16}),
        ("int8", Linear8bitLt, {"has_fp16_weights": False, "threshold": 6.0}),
        ("int8-training", Linear8bitLt, {"has_fp16_weights": True, "threshold": 6.0}),
    ],
)
def test_each_mode_makes_its_layers(bitsandbytes: None, mode: str, kind: type, told: dict[str, Any]) -> None:
    dtype = torch.float16 if mode.startswith("int8") else torch.bfloat16
    precision, module = BitsandbytesPrecision(mode, dtype=dtype, ignore_modules={"3"}), model()
    weights = module[0].weight.detach().clone()
    precision.convert_module(module)
    assert [type(module[0]), type(module[1][0]), type(module[3])] == [kind, kind, nn.Linear]
    assert module[0].told == told
    assert torch.equal(module[0].weight, weights)
    assert (module[0].bias is None, module[1][0].bias is None) == (False, True)
    first = module[0]
    precision.convert_module(module)
    assert module[0] is first, "a second time changes nothing"


def test_numbers_and_new_layers_are_of_the_dtype(bitsandbytes: None) -> None:
    precision = BitsandbytesPrecision("nf4", dtype=torch.bfloat16)
    assert (
        precision.convert_input({"x": torch.ones(1), "y": torch.ones(1, dtype=torch.int)})["x"].dtype == torch.bfloat16
    )
    assert precision.convert_output(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.float32
    with precision.init_context():
        assert isinstance(nn.Linear(2, 2), Linear4bit)
        assert torch.ones(1).dtype == torch.bfloat16
    assert nn.Linear is TornLinear
    with pytest.raises(RuntimeError, match="ignore_modules"):
        BitsandbytesPrecision("nf4", ignore_modules={"a"}).init_context()


def test_wrong_uses_are_named(bitsandbytes: None) -> None:
    with pytest.raises(ValueError, match=r"'int8' only works with `dtype=torch\.float16`"):
        BitsandbytesPrecision("int8", dtype=torch.bfloat16)
    with pytest.raises(MisconfigurationException, match="Did you mean 'nf4'"):
        BitsandbytesPrecision("nf44")
    with pytest.raises(TypeError, match="has no Linear layers"):
        BitsandbytesPrecision("nf4").convert_module(nn.ReLU())


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    class Linear(Layer):
        __module__ = "transformer_engine.pytorch.module"

    class LayerNorm(nn.LayerNorm):
        __module__ = "transformer_engine.pytorch.module"

    recipes = SimpleNamespace(DelayedScaling=SimpleNamespace, Format=SimpleNamespace(HYBRID="hybrid"))
    layers = SimpleNamespace(Linear=Linear, LayerNorm=LayerNorm, fp8_autocast=lambda **told: nullcontext(told))
    monkeypatch.setitem(sys.modules, "transformer_engine.common.recipe", recipes)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", layers)
    return layers


def test_engine_replaces_what_has_8_bits(engine: Any) -> None:
    precision, module = make_precision("transformer-engine", "cuda"), model()
    assert isinstance(precision, TransformerEnginePrecision)
    with pytest.warns(UserWarning, match=r"stays as it is") as caught:
        precision.convert_module(module)
    assert len(caught) == 2
    assert [type(module[0]), type(module[1][0]), type(module[2])] == [engine.Linear, nn.Linear, engine.LayerNorm]
    assert module[0].weight.dtype == torch.bfloat16


def test_engine_names_and_recipes(engine: Any) -> None:
    assert make_precision("transformer-engine-float16", "cuda").precision == "transformer-engine-float16"
    precision = TransformerEnginePrecision(
        weights_dtype=torch.float16, recipe={"fp8_format": "HYBRID"}, replace_layers=True
    )
    assert precision.recipe.fp8_format == "hybrid"
    with precision.init_context():
        assert isinstance(nn.Linear(8, 16), engine.Linear)
    assert precision.convert_input(torch.ones(1)).dtype == torch.float16


@pytest.mark.parametrize(
    "make", [lambda: make_precision("transformer-engine", "cpu"), lambda: BitsandbytesPrecision("nf4")]
)
def test_without_the_package_the_error_says_what_to_install(make: Any) -> None:
    with pytest.raises(ModuleNotFoundError, match="run `pip install "):
        make()


def test_fsdps_is_the_one_of_that_name_and_tpus_have_none() -> None:
    assert isinstance(FSDPPrecision("bf16-mixed"), MixedPrecision)
    with pytest.raises(MisconfigurationException, match="TPUs are out of scope"):
        XLAPrecision("32-true")
