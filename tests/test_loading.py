# SPDX-License-Identifier: Apache-2.0
"""Weights find their places: compiled or not, and what does not fit is listed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import leyden as L
from leyden.errors import CheckpointError
from leyden.loading import apply_state_dict, clean_names


class Net(L.LightningModule):
    def __init__(self, compiled: bool = False, width: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.first = nn.Linear(3, width)
        self.second = nn.Sequential(nn.Linear(width, 2))
        if compiled:
            self.second = torch.compile(self.second, backend="eager")


def saved(net: L.LightningModule, folder: Path) -> Path:
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(net)
    trainer.save_checkpoint(folder / "net.ckpt")
    return folder / "net.ckpt"


@pytest.mark.parametrize("writer", [False, True])
@pytest.mark.parametrize("reader", [False, True])
def test_B2_names_are_clean_and_fit_compiled_and_eager_models(writer: bool, reader: bool, tmp_path: Path) -> None:
    net = Net(compiled=writer)
    path = saved(net, tmp_path)
    names = torch.load(path, weights_only=True)["state_dict"]
    assert sorted(names) == ["first.bias", "first.weight", "second.0.bias", "second.0.weight"]
    again = Net.load_from_checkpoint(path, compiled=reader)
    for ours, theirs in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_file_with_names_of_compiled_layers_fits_an_eager_model() -> None:
    net, other = Net(compiled=True), Net()
    state = net.state_dict()
    assert any("_orig_mod" in name for name in state)
    apply_state_dict(other, state, strict=True, source="file.ckpt")
    assert torch.equal(other.second[0].weight, next(net.second.parameters()))


def test_B2_only_whole_parts_of_names_are_cleaned() -> None:
    state = {"my_orig_mod.weight": 1, "_orig_mod.a._orig_mod._orig_mod.b": 2, "c": 3}
    assert list(clean_names(state).items()) == [("my_orig_mod.weight", 1), ("a.b", 2), ("c", 3)]
    plain = {"a": 1}
    assert clean_names(plain) is plain


def test_B2_a_file_of_a_whole_compiled_module_fits_a_layer_that_is_compiled() -> None:
    net = Net()
    state = torch.compile(net, backend="eager").state_dict()
    assert all(name.startswith("_orig_mod.") for name in state)
    other = Net(compiled=True)
    apply_state_dict(other, state, strict=True, source="file.ckpt")
    assert torch.equal(other.first.weight, net.first.weight)


def test_B4_what_does_not_fit_is_listed_with_the_remedy() -> None:
    with pytest.raises(CheckpointError, match=r"first.weight: \(4, 3\) in the file, \(5, 3\) in the model"):
        apply_state_dict(Net(width=5), Net().state_dict(), strict=True, source="file.ckpt")
    state = Net().state_dict()
    state["third.weight"] = state.pop("first.weight")
    with pytest.raises(CheckpointError) as caught:
        apply_state_dict(Net(), state, strict=True, source="file.ckpt")
    text = str(caught.value)
    assert "file.ckpt" in text
    assert "1 missing in the file: first.weight" in text
    assert "1 unknown to the model: third.weight" in text
    assert "strict=False" in text
    apply_state_dict(Net(), state, strict=False, source="file.ckpt")


def test_an_error_of_the_modules_own_loading_comes_out_unchanged() -> None:
    class Own(Net):
        def load_state_dict(self, *args: object, **kwargs: object) -> None:
            raise RuntimeError("no loading on Mondays")

    with pytest.raises(RuntimeError, match="no loading on Mondays"):
        apply_state_dict(Own(), Own().state_dict(), strict=True, source="file.ckpt")
