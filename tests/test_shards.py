# SPDX-License-Identifier: Apache-2.0
"""What of a checkpoint is written in shards: which tensors, under which names, and that they come back to their places."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from leyden import files, shards
from leyden.errors import CheckpointError

Pair = namedtuple("Pair", "one other")  # as users write them


def optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    made = torch.optim.Adam([{"params": model[1].parameters()}, {"params": model[0].parameters(), "lr": 0.5}])
    model(torch.ones(1, 2)).sum().backward()
    made.step()
    return model, made


def save(path: Path, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Write a checkpoint as the only process; return what is not in shards."""
    rest, mine = shards.take_out(checkpoint, True)

    def write(folder: Path) -> None:
        mine.write(folder, alone=True)
        files.write(rest, folder / shards.META)

    files.save_folder(path, write)
    return rest


def test_what_is_taken_out_comes_back_to_its_place(tmp_path: Path) -> None:
    shared = torch.arange(6.0).view(2, 3)
    checkpoint = {
        "state_dict": OrderedDict(
            [("a.b", shared), ("tied", shared), ("part", shared[:1]), ("half", torch.ones(2, dtype=torch.bfloat16))]
        ),
        "optimizer_states": [{"state": {}, "param_groups": [{"params": [], "betas": (0.9, 0.99)}]}],
        "callbacks": {"c": {"kept": torch.ones(2), "pair": (1, [2, {"x": (3,)}])}},
        "nothing": torch.empty(0),
        "leyden": {"format": 1},
    }
    rest = save(tmp_path / "a.ckpt", checkpoint)
    assert {str(value.device) for value in rest["state_dict"].values()} == {"meta"}
    assert type(rest["state_dict"]) is OrderedDict
    assert rest["callbacks"] is checkpoint["callbacks"]
    assert checkpoint["state_dict"]["a.b"] is shared
    found = files.load(tmp_path / "a.ckpt")
    for name, value in checkpoint["state_dict"].items():
        assert torch.equal(found["state_dict"][name], value)
        assert found["state_dict"][name].dtype is value.dtype
    assert found["state_dict"]["a.b"] is found["state_dict"]["tied"]
    assert found["optimizer_states"] == checkpoint["optimizer_states"]
    assert found["callbacks"]["c"]["pair"] == (1, [2, {"x": (3,)}])
    assert files.load(tmp_path / "a.ckpt", "meta")["state_dict"]["a.b"].is_meta
    moved = files.load(tmp_path / "a.ckpt", lambda storage, place: storage)
    assert torch.equal(moved["state_dict"]["tied"], shared)


def test_names_that_come_out_the_same_are_told_apart(tmp_path: Path) -> None:
    checkpoint = {
        "state_dict": {"x": {"y.z": torch.ones(1)}, "x.y": {"z": torch.zeros(2)}, "x.y.z": torch.full((3,), 2.0)},
        "leyden": {"format": 1},
    }
    save(tmp_path / "a.ckpt", checkpoint)
    found = files.load(tmp_path / "a.ckpt")["state_dict"]
    assert (found["x"]["y.z"].tolist(), found["x.y"]["z"].tolist(), found["x.y.z"].tolist()) == ([1], [0, 0], [2, 2, 2])


def test_what_torch_cannot_write_in_shards_stays_in_the_rest(tmp_path: Path) -> None:
    sparse = torch.eye(3).to_sparse()
    save(tmp_path / "a.ckpt", {"state_dict": {"s": sparse, "w": torch.ones(2)}, "leyden": {"format": 1}})
    assert torch.equal(files.load(tmp_path / "a.ckpt")["state_dict"]["s"].to_dense(), torch.eye(3))


def test_a_place_without_its_values_is_an_error(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        shards.take_out({"state_dict": {"w": torch.ones(2)}}, True)[1].write(folder, alone=True)
        rest, _ = shards.take_out({"state_dict": {"w": torch.ones(2), "lost": torch.ones(3)}, "leyden": {}}, True)
        files.write(rest, folder / shards.META)

    files.save_folder(tmp_path / "a.ckpt", write)
    with pytest.raises(CheckpointError, match=r"has no values of 'state_dict\.lost'"):
        files.load(tmp_path / "a.ckpt")


def test_a_container_of_a_class_of_its_own_keeps_it() -> None:
    value = {"pair": Pair(torch.ones(1), [torch.ones(2)]), "plain": {"n": 1}}
    found = shards.changed(value, lambda path, tensor: (path, len(tensor)))
    assert found["pair"] == Pair((("pair", 0), 1), [(("pair", 1, 0), 2)])
    assert type(found["pair"]) is Pair
    assert found["plain"] is value["plain"]


def test_parameters_go_by_names_and_come_back_to_numbers() -> None:
    model, made = optimizer()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state = made.state_dict()
    by_name = shards.named(state, made, names)
    assert [group["params"] for group in by_name["param_groups"]] == [["1.weight", "1.bias"], ["0.weight", "0.bias"]]
    assert by_name["state"]["0.weight"]["exp_avg"] is state["state"][2]["exp_avg"]
    again = shards.numbered(by_name)
    assert again == state
    assert shards.numbered(state) is state
    unknown = shards.named(state, made, {})
    assert list(unknown["state"]) == ["#0", "#1", "#2", "#3"]
    assert shards.numbered(unknown) == state
