# SPDX-License-Identifier: Apache-2.0
"""Tests of snapshots: equal to what was there, structure of memory included, and untouched by what comes after."""

from __future__ import annotations

import copy
import io
import warnings
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leyden import files
from leyden.checkpoint_io.staging import Staging
from leyden.errors import CheckpointError


def take(checkpoint: Any) -> Any:
    staging = Staging()
    staging.begin()
    snapshot = staging.take(checkpoint)
    staging.end()
    return snapshot.build()


def records(checkpoint: Any) -> dict[str, bytes]:
    """What torch.save writes for it."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


class Marked(Tensor):
    """A tensor of a class of its own."""


def everything() -> dict[str, Any]:
    base = torch.arange(24.0).reshape(4, 6)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    return {
        "base": base, "view": base[1:3, ::2], "transposed": base.t(), "one": base[2, 3], "expanded": base[0, :1].expand(5),
        "list": [1, 2.5, "three", None, True, b"four", {"five": (6, 7)}],
        "state_dict": model.state_dict(), "optimizer": optimizer.state_dict(),
        "bf16": torch.ones(3, dtype=torch.bfloat16), "bool": torch.tensor([True, False]), "int": torch.arange(3),
        "empty": torch.empty(0, 3), "scalar": torch.tensor(2), "complex": torch.ones(2, dtype=torch.complex64),
        "defaultdict": defaultdict(list, a=[torch.ones(1)]), "ordered": OrderedDict(b=1, a=2),
        "parameter": nn.Parameter(torch.ones(2)), "frozen": nn.Parameter(torch.ones(2), requires_grad=False),
        "leaf": torch.ones(2, requires_grad=True), "rng": torch.get_rng_state(), "size": torch.Size([1, 2]),
    }  # fmt: skip


def test_the_file_is_that_of_a_synchronous_save_byte_for_byte():
    checkpoint = everything()
    assert records(take(checkpoint)) == records(checkpoint)


def test_what_changes_in_place_afterwards_does_not_show():
    checkpoint = everything()
    before = records(checkpoint)
    snapshot = take(checkpoint)
    with torch.no_grad():
        for value in checkpoint["state_dict"].values():
            value.data.fill_(7)
        checkpoint["base"].data.zero_()
        for state in checkpoint["optimizer"]["state"].values():
            state["exp_avg"].mul_(3)
            state["step"].add_(1)
    checkpoint["list"].append(8)
    checkpoint["list"][6]["five"] = 0
    checkpoint["defaultdict"]["new"].append(1)
    del checkpoint["state_dict"]["0.weight"]
    assert records(snapshot) == before


def test_attributes_of_tensors_are_of_the_moment_too():
    weight = nn.Parameter(torch.ones(2))
    weight.tags, weight.scale, weight.self = ["a"], torch.ones(1), weight
    marked = torch.ones(2).as_subclass(Marked)
    marked.tags = ["c"]
    staging = Staging()
    staging.begin()
    snapshot = staging.take([weight, marked])
    staging.end()
    weight.tags.append("b")
    weight.scale.zero_()
    marked.tags.clear()
    built, other = snapshot.build()
    assert (built.tags, built.scale.item(), built.self is built) == (["a"], 1.0, True)
    assert (type(other), other.tags) == (Marked, ["c"])


def test_memory_that_is_shared_stays_shared_and_is_copied_once():
    checkpoint = everything()
    staging = Staging()
    staging.begin()
    built = staging.take(checkpoint).build()
    assert built["state_dict"]["0.weight"].data_ptr() == built["state_dict"]["2.weight"].data_ptr()
    built["base"][1, 0] = -1
    assert built["view"][0, 0] == built["transposed"][0, 1] == -1
    assert built["expanded"].stride() == (0,)
    tensors = [value for value in checkpoint.values() if isinstance(value, Tensor)]
    tensors += [*checkpoint["state_dict"].values(), *checkpoint["defaultdict"]["a"]]
    tensors += [value for state in checkpoint["optimizer"]["state"].values() for value in state.values()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    assert staging.nbytes == sum(storages.values())


def test_tensors_out_of_the_ordinary():
    sparse = torch.eye(3).to_sparse()
    conjugated = torch.tensor([1 + 2j]).conj()
    marked = torch.ones(2).as_subclass(Marked)
    named = torch.ones(2)
    named.note = "mine"  # type: ignore[attr-defined]
    meta = torch.empty(2, device="meta")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is about to drop them
        quantized = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.quint8)
    originals = [sparse, conjugated, marked, named, meta, quantized]
    built = take(originals)
    sparse.mul_(0)
    assert torch.equal(built[0].to_dense(), torch.eye(3))
    assert built[1].item() == 1 - 2j
    assert type(built[2]) is Marked
    assert built[3].note == "mine"
    assert built[4].is_meta
    assert torch.equal(built[5].dequantize(), quantized.dequantize())


def test_memory_is_used_again(monkeypatch):
    staging, model = Staging(), nn.Linear(100, 100)
    addresses = []
    for value in range(3):
        nn.init.constant_(model.weight, value)
        staging.begin()
        built = staging.take(model.state_dict()).build()
        staging.end()
        assert bool((built["weight"] == value).all())
        addresses.append(built["weight"].data_ptr())
    assert len(set(addresses)) == 1
    assert staging.nbytes == 100 * 100 * 4 + 100 * 4
    staging.clear()
    assert staging.nbytes == 0


def test_there_is_never_more_memory_than_the_larger_of_two_snapshots_needs():
    staging = Staging()
    layouts = [[10_000] * 3, [30_000], [5_000] * 4, [10_000] * 3]
    for layout in layouts:
        staging.begin()
        staging.take([torch.zeros(size, dtype=torch.uint8) for size in layout])
        assert staging.nbytes <= 30_000 + 10_000  # in the middle of a change of layout, one tensor more
        staging.end()
        assert staging.nbytes == sum(layout)


def test_files_of_one_moment_share_their_copy_but_not_counters():
    staging, weight, counter = Staging(), torch.zeros(10_000), torch.zeros(1)
    staging.begin()
    first = staging.take([weight, counter])
    counter += 1
    second = staging.take([weight, counter])
    staging.end()
    assert first.build()[0].data_ptr() == second.build()[0].data_ptr()
    assert (first.build()[1].item(), second.build()[1].item()) == (0, 1)
    staging.begin()
    assert staging.take([weight]).build()[0].data_ptr() == first.build()[0].data_ptr()


def test_an_address_that_passes_to_another_tensor_within_a_moment():
    staging = Staging()
    staging.begin()
    snapshots = [staging.take(torch.full((5000,), float(value))) for value in range(20)]  # each is freed at once
    assert [snapshot.build()[0].item() for snapshot in snapshots] == list(range(20))


def test_what_cannot_be_pickled_is_an_error_at_once():
    with pytest.raises(CheckpointError, match=r"cannot be pickled .*on_save_checkpoint"):
        take({"a": lambda: None})


def test_an_object_that_fails_in_its_own_way_is_the_error_of_a_synchronous_save(tmp_path):
    class Stubborn:
        def __reduce__(self):
            raise NotImplementedError("a live connection")

    for save in (take, lambda content: files.save(content, tmp_path / "a.ckpt")):
        with pytest.raises(CheckpointError, match=r"could not be written: NotImplementedError: a live connection"):
            save({"a": Stubborn()})


def test_objects_of_the_user_come_through():
    path = Path("a/b")
    assert take({"path": path, "type": Path, "self": copy.deepcopy}) == {
        "path": path, "type": Path, "self": copy.deepcopy,
    }  # fmt: skip
    both = [[1]]
    built = take([both, both])
    assert built[0] is built[1]
