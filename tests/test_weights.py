# SPDX-License-Identifier: Apache-2.0
"""Weights as safetensors: saved and loaded with one call each, tied or compiled or not, damaged or not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import leyden
from leyden import files
from leyden.errors import CheckpointDamagedError, CheckpointError, CheckpointNotFoundError, MisconfigurationException

safetensors = pytest.importorskip("safetensors.torch")


class Tied(nn.Module):
    """The weights of the embedding are those of the head, and the bias is a part of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embedding.weight
        self.register_buffer("first", self.embedding.weight.detach()[0])
        self.register_buffer("counts", torch.tensor([True, False]))
        self.narrow = nn.Parameter(torch.randn(2, 3).bfloat16().t())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.safetensors"


def equal(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_tied_weights_are_written_once_and_come_back(path: Path) -> None:
    model, again = Tied(), Tied()
    leyden.save_weights(model, path, {"author": "me"})
    assert not equal(model, again)
    loaded = leyden.load_weights(path, again)
    assert equal(model, again)
    assert loaded.keys() == model.state_dict().keys()
    assert again.head.weight is again.embedding.weight
    with safetensors.safe_open(str(path), framework="pt") as file:
        assert sorted(file.keys()) == ["counts", "embedding.weight", "first", "head.bias", "narrow"]
        assert file.metadata()["author"] == "me"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_other_readers_and_writers_of_tied_weights(path: Path) -> None:
    model, again = Tied(), Tied()
    del model.first, again.first
    leyden.save_weights(model, path)
    safetensors.load_model(again, str(path))
    assert equal(model, again)
    safetensors.save_model(model, str(path))
    again = Tied()
    del again.first
    leyden.load_weights(path, again)
    assert equal(model, again)


def test_B2_compiled_and_eager_models_share_their_files(path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    compiled = nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager"), nn.Linear(2, 2))
    leyden.save_weights(torch.compile(model, backend="eager"), path)
    leyden.load_weights(path, compiled)
    leyden.save_weights(compiled, path)
    assert set(leyden.load_weights(path)) == set(model.state_dict())
    assert torch.equal(compiled[0]._orig_mod.weight, model[0].weight)


def test_weights_of_a_checkpoint(tmp_path: Path) -> None:
    model, again = Tied(), Tied()
    files.save({"state_dict": model.state_dict(), "epoch": 1}, tmp_path / "a.ckpt")
    leyden.load_weights(tmp_path / "a.ckpt", again)
    assert equal(model, again)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    assert leyden.load_weights(tmp_path / "bare.pt").keys() == model.state_dict().keys()
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds no weights"):
        leyden.load_weights(tmp_path / "list.pt")


def test_the_kind_of_a_file_is_seen_in_its_content(tmp_path: Path) -> None:
    leyden.save_weights(nn.Linear(2, 2), tmp_path / "model.bin")
    assert set(leyden.load_weights(tmp_path / "model.bin")) == {"weight", "bias"}


def test_C6_damaged_weights_are_noticed(path: Path) -> None:
    leyden.save_weights(nn.Linear(2, 2), path)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointDamagedError, match="their checksum is wrong"):
        leyden.load_weights(path)
    path.write_bytes(content[:-3])
    with pytest.raises(CheckpointDamagedError, match="cannot be read"):
        leyden.load_weights(path)
    with pytest.raises(CheckpointNotFoundError, match=r"Did you mean 'weights\.safetensors'"):
        leyden.load_weights(path.parent / "weight.safetensors")


def test_B4_what_does_not_fit_is_listed(path: Path) -> None:
    leyden.save_weights(nn.Linear(2, 2), path)
    with pytest.raises(CheckpointError, match=r"weight: \(2, 2\) in the file, \(4, 2\) in the model"):
        leyden.load_weights(path, nn.Linear(2, 4))
    with pytest.raises(CheckpointError, match=r"1 missing in the file: extra\.weight"):
        model = nn.Linear(2, 2)
        model.extra = nn.Linear(1, 1, bias=False)
        leyden.load_weights(path, model)
    leyden.load_weights(path, model, strict=False)


def test_what_safetensors_cannot_hold(path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"a": 1}

    with pytest.raises(CheckpointError, match=r"tensors only, and these are none: _extra_state \(dict\)"):
        leyden.save_weights(Extra(1, 1), path)
    with pytest.raises(CheckpointError, match=r"these are none: s \(sparse_coo\)"):
        leyden.save_weights({"s": torch.eye(2).to_sparse()}, path)
    assert list(path.parent.iterdir()) == []


def test_without_the_package(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(MisconfigurationException, match=r"pip install 'leyden\[export\]'"):
        leyden.save_weights(nn.Linear(1, 1), path)
