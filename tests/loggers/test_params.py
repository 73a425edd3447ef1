# SPDX-License-Identifier: Apache-2.0
"""Hyperparameters of any kind, brought into plain nested data or one flat row."""

from __future__ import annotations

import collections
import dataclasses
import enum
import sys
import types
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from leyden.loggers.params import flatten_params, params_to_dict, plain_params, sanitize_params


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Optim:
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)


def test_params_to_dict_copies():
    given = {"a": 1}
    result = params_to_dict(given)
    result["b"] = 2
    assert given == {"a": 1}
    namespace = Namespace(a=1)
    params_to_dict(namespace)["b"] = 2
    assert vars(namespace) == {"a": 1}
    assert params_to_dict(None) == {}


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (None, None),
        (True, True),
        (3, 3),
        ("x", "x"),
        (Path("a") / "b", "a/b"),
        (Colour.RED, "RED"),
        (np.float64(0.5), 0.5),
        (np.int64(5), 5),
        (np.bool_(True), True),
        (torch.tensor(2.0), 2.0),
        (torch.float16, "torch.float16"),
        (torch.nn.ReLU, "torch.nn.modules.activation.ReLU"),
        (len, "builtins.len"),
        ((1, [2.5, {3}]), [1, [2.5, [3]]]),
        (Namespace(a=Namespace(b=1)), {"a": {"b": 1}}),
        (Optim(), {"lr": 0.1, "betas": [0.9, 0.99]}),
        (collections.OrderedDict(a={"b": None}), {"a": {"b": None}}),
        ({(1, 2): "tuple", 3: "int"}, {"(1, 2)": "tuple", 3: "int"}),
        (torch.nn.Identity(), "Identity()"),
    ],
)
def test_plain(value, plain):
    result = plain_params(value)
    assert result == plain
    assert type(result) is type(plain)


def test_plain_reads_omegaconf_only_if_it_is_loaded(monkeypatch):
    config = object()
    fake = types.SimpleNamespace(
        OmegaConf=types.SimpleNamespace(
            is_config=lambda value: value is config, to_container=lambda value, resolve: {"resolved": resolve}
        )
    )
    monkeypatch.setitem(sys.modules, "omegaconf", fake)
    assert plain_params({"cfg": config, "x": 1}) == {"cfg": {"resolved": True}, "x": 1}
    assert flatten_params({"cfg": config, "x": 1}) == {"cfg/resolved": True, "x": 1}


def test_flatten():
    params = {"a": {"b": 1, "c": {"d": 2}}, "o": Optim(), "n": Namespace(x=1), 5: {"e": 6}}
    assert flatten_params(params) == {"a/b": 1, "a/c/d": 2, "o/lr": 0.1, "o/betas": (0.9, 0.99), "n/x": 1, "5/e": 6}


def test_flatten_enters_lists_of_mappings_only():
    params = {"dl": [{"a": 1}, {"a": 2}], "layers": [1, 2], "empty": []}
    assert flatten_params(params) == {"dl/0/a": 1, "dl/1/a": 2, "layers": [1, 2], "empty": []}


def test_sanitize_leaves_four_types():
    params = {
        "bool": True,
        "int": 1,
        "float": 0.5,
        "str": "s",
        "none": None,
        "list": [1, 2],
        "numpy": np.float32(0.5),
        "scalar": torch.tensor(3),
        "matrix": torch.zeros(2, 2),
        "class": torch.nn.ReLU,
        "enum": Colour.RED,
    }
    result = sanitize_params(params)
    assert all(type(value) in (bool, int, float, str) for value in result.values())
    assert (result["bool"], result["none"], result["list"], result["numpy"]) == (True, "None", "[1, 2]", 0.5)
    assert (result["scalar"], result["enum"]) == (3, "RED")
    assert params["none"] is None, "the input is not changed"
