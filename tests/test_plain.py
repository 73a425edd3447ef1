# SPDX-License-Identifier: Apache-2.0
"""Plain data: what a safe load can read goes in the open, the rest is packed and named (W2)."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import sys
import types
from argparse import Namespace
from collections import OrderedDict
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from leyden.errors import CheckpointError, LeydenWarning
from leyden.plain import AttributeDict, pack, plain_hparams, restore_hparams, unpack

PLAIN = {
    "bool": True,
    "int": 2**80,
    "float": 0.1,
    "complex": 1j,
    "str": "x",
    "none": None,
    "bytes": b"\x00\xff",
    "list": [1, (2, {3})],
    "dict": {1: {"x": [None]}, (1, 2): 3},
    "ordered": OrderedDict(b=1, a=2),
    "size": torch.Size([1, 2]),
    "dtype": torch.bfloat16,
    "device": torch.device("cuda", 1),
    "path": Path("a") / "b",
    "attributes": AttributeDict(x=AttributeDict(y=1)),
    "namespace": Namespace(x=Path("p")),
    "simple": SimpleNamespace(x=1),
    "frozen": frozenset({1, 2}),
    "delta": timedelta(days=1, seconds=5, microseconds=7),
}


def through_a_safe_load(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_values_survive_a_safe_load(name):
    plain, others = plain_hparams({name: PLAIN[name]})
    assert others == {}
    (value,) = restore_hparams(through_a_safe_load(plain)).values()
    assert value == PLAIN[name]
    assert type(value) is type(PLAIN[name])


def test_tensors_and_numpy_scalars():
    values = {"t": torch.ones(2, requires_grad=True), "p": nn.Parameter(torch.ones(1)), "n": np.float32(0.5)}
    plain, others = plain_hparams(values)
    back = restore_hparams(through_a_safe_load(plain))
    assert others == {}
    assert torch.equal(back["t"], torch.ones(2))
    assert not back["t"].requires_grad
    assert back["n"] == 0.5
    assert type(back["n"]) is float


@dataclasses.dataclass
class Custom:
    x: int = 1


def test_W2_other_values_are_split_off_whole():
    loop = []
    loop.append(loop)
    values = {"a": 1, "c": Custom(), "nested": [1, {"x": Custom}], "np": np.ones(2), "loop": loop}
    plain, others = plain_hparams(values)
    assert plain == {"a": 1}
    assert set(others) == {"c", "nested", "np", "loop"}
    assert others["c"] is values["c"]


def test_a_dict_that_looks_like_a_tag_is_not_mistaken_for_one():
    fake = {"x": {"__leyden_type__": "Path", "value": "boo"}}
    plain, others = plain_hparams(fake)
    assert plain == {}
    assert unpack(pack(others)) == fake


def test_an_unknown_tag_is_left_alone():
    assert restore_hparams({"x": {"__leyden_type__": "Later", "value": 1}}) == {
        "x": {"__leyden_type__": "Later", "value": 1}
    }


def test_pack_and_unpack():
    linear = nn.Linear(2, 2)
    back = unpack(through_a_safe_load(pack({"c": Custom(5), "m": linear})), map_location="cpu")
    assert back["c"] == Custom(5)
    assert torch.equal(back["m"].weight, linear.weight)


def test_W2_what_cannot_be_pickled_is_named():
    with pytest.warns(LeydenWarning, match=r"'f' \(function\) cannot be pickled.*ignore=\['f'\]"):
        data = pack({"f": lambda: 1, "c": Custom()})
    assert unpack(data) == {"c": Custom()}


def test_unpack_names_what_needs_absent_code(monkeypatch):
    module = types.ModuleType("gone_later")
    module.Gone = type("Gone", (), {"__module__": "gone_later"})
    monkeypatch.setitem(sys.modules, "gone_later", module)
    data = pack({"c": module.Gone()})
    monkeypatch.delitem(sys.modules, "gone_later")
    with pytest.raises(CheckpointError, match="'c' of the checkpoint needs code that is not here: No module named"):
        unpack(data)


def test_attribute_dict():
    d = AttributeDict(learning_rate=1)
    d.x = 2
    assert (d["x"], d.learning_rate) == (2, 1)
    del d.x
    assert d == {"learning_rate": 1}
    with pytest.raises(AttributeError, match="no attribute 'learning_rat'. Did you mean 'learning_rate'"):
        d.learning_rat
    assert not hasattr(d, "y")
    for other in (copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
        assert other == d
        assert type(other) is AttributeDict


def test_attribute_dict_as_text():
    assert repr(AttributeDict()) == ""
    assert repr(AttributeDict({"my-key": 3.14, "a": 1})) == '"a":      1\n"my-key": 3.14'
