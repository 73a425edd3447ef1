# SPDX-License-Identifier: Apache-2.0
"""A module in other formats: what they compute is what it computes, and it is afterwards as it was."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import leyden as L
from leyden.errors import LeydenDeprecationWarning, MisconfigurationException

deprecated = pytest.mark.filterwarnings(
    "ignore::leyden.errors.LeydenDeprecationWarning", "ignore:.*torch.jit.*:DeprecationWarning"
)


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Dropout(0.9))
        self.frozen = torch.nn.Linear(3, 1).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(self.layers(x))


@pytest.fixture
def net() -> Net:
    return Net()


def modes(net: Any) -> list[bool]:
    return [child.training for child in net.modules()]


def check(net: Any, before: list[bool], compute: Any) -> None:
    """The same numbers as in evaluation, and every layer in the mode in which it was."""
    assert modes(net) == before == [True, True, True, True, False]
    x = torch.randn(2, 4)
    torch.testing.assert_close(compute(x), Net.forward(net.eval(), x))


@deprecated
@pytest.mark.parametrize("method", ["script", "trace"])
def test_torchscript(net: Net, tmp_path: Path, method: str) -> None:
    before, path = modes(net), tmp_path / "net.pt"
    net.example_input_array = torch.randn(2, 4)
    compiled = net.to_torchscript(path, method=method)
    check(net, before, compiled)
    loaded = torch.jit.load(str(path))
    x = torch.randn(3, 4)
    torch.testing.assert_close(loaded(x), net(x))


def test_torchscript_says_that_it_is_deprecated(net: Net) -> None:
    with (
        pytest.warns(LeydenDeprecationWarning, match="torch.export.export"),
        pytest.raises(ValueError, match="'script' or"),
    ):
        net.to_torchscript(method="other")


@deprecated
def test_nothing_to_trace_with(net: Net) -> None:
    with pytest.raises(ValueError, match="Choosing method=`trace` needs inputs"):
        net.to_torchscript(method="trace")


@pytest.mark.skipif(importlib.util.find_spec("onnx") is None, reason="onnx is not installed")
@pytest.mark.filterwarnings("ignore")
def test_onnx_in_the_old_way(net: Net, tmp_path: Path) -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    before, path = modes(net), tmp_path / "net.onnx"
    net.to_onnx(path, torch.randn(2, 4), dynamo=False, input_names=["x"])
    model = onnx.load(str(path))
    onnx.checker.check_model(model)
    check(net, before, lambda x: torch.tensor(ReferenceEvaluator(model).run(None, {"x": x.numpy()})[0]))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="onnxscript is not installed")
@pytest.mark.filterwarnings("ignore")
def test_onnx_by_dynamo(net: Net, tmp_path: Path) -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    before, path = modes(net), tmp_path / "net.onnx"
    net.example_input_array = torch.randn(2, 4)
    program = net.to_onnx(path, dynamo=True, input_names=["x"])
    assert program is not None
    model = onnx.load(str(path))
    check(net, before, lambda x: torch.tensor(ReferenceEvaluator(model).run(None, {"x": x.numpy()})[0]))


@pytest.mark.skipif(importlib.util.find_spec("onnx") is None, reason="onnx is not installed")
def test_nothing_to_export_with(net: Net, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="Could not export to ONNX since neither `input_sample`"):
        net.to_onnx(tmp_path / "net.onnx")


def test_a_missing_library_is_named(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'leyden\[onnx\]'"):
        net.to_onnx("net.onnx")
    with pytest.raises(ModuleNotFoundError, match="torch_tensorrt, which is not installed"):
        net.to_tensorrt("net.ts")
