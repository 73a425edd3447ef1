# SPDX-License-Identifier: Apache-2.0
"""The inside of a checkpoint file: what is read as what, and what its manifest says."""

from __future__ import annotations

import io
import pickle
from argparse import Namespace
from collections import OrderedDict
from datetime import timedelta
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from leyden import archive
from leyden.errors import CheckpointError


def saved(value: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize(
    "value",
    [
        Namespace(a=1, b=Namespace(c=[2])), SimpleNamespace(a=1), Path("a") / "b", timedelta(days=1, seconds=2),
        np.float64(0.1), np.float32(0.5), np.int64(-3), np.uint8(200), np.bool_(True), np.complex64(1 + 2j),
        np.dtype(">f8").type(1.5), [np.float64(1.0), Path("x"), Path("y")],
    ],
)  # fmt: skip
def test_B3_classes_that_hold_nothing_but_data_are_read(value: Any) -> None:
    loaded = archive.read(saved(value), "it")
    assert loaded == value
    assert type(loaded) is type(value)


def test_a_pure_path_becomes_a_path() -> None:
    assert archive.read(saved(PurePosixPath("a/b")), "it") == Path("a/b")


def test_B1_numpy_values_that_are_no_numbers_are_refused() -> None:
    class Fake:
        def __reduce__(self) -> Any:
            return np.float64(1.0).__reduce__()[0], (np.dtype("O"), b"12345678")

    with pytest.raises(CheckpointError, match="not opened"):
        archive.read(saved(Fake()), "it")


class Custom:
    """Somebody's class."""


def test_any_name_can_be_looked_at_but_not_used() -> None:
    content = {"a": Custom(), "b": torch.ones(2), "c": pickle.loads}
    with pytest.raises(CheckpointError, match=r"contains '.*Custom', which is code, not plain data"):
        archive.read(saved(content), "it")
    looked = archive.read(saved(content), "it", any_name=True)
    assert isinstance(looked["a"], archive.Opaque)
    assert repr(looked["a"]).endswith("Custom>")
    assert torch.equal(looked["b"], content["b"])
    assert isinstance(archive.read(saved(content), "it", weights_only=False)["a"], Custom)


def test_no_name_stays_allowed_afterwards() -> None:
    before = set(torch.serialization.get_safe_globals())
    archive.read(saved(Namespace(a=1)), "it")
    assert set(torch.serialization.get_safe_globals()) == before


def test_the_manifest_counts_what_is_under_each_key() -> None:
    tied = torch.ones(3, dtype=torch.float16)
    checkpoint = {
        "state_dict": OrderedDict(a=torch.ones(2), b=tied), "list": [tied, (tied, {"x": {tied}})], "none": 1,
        "lazy": torch.nn.UninitializedParameter(), "leyden": {"format": 1, "rng": torch.ones(9)},
    }  # fmt: skip
    found = archive.with_manifest(checkpoint)
    assert found["leyden"][archive.MANIFEST] == {
        "state_dict": [2, 14], "list": [3, 18], "none": [0, 0], "lazy": [1, 0],
    }  # fmt: skip
    assert archive.MANIFEST not in checkpoint["leyden"]
    assert archive.changes(found) == []
    assert archive.changes(checkpoint) == []
    assert archive.with_manifest([1]) == [1]
    assert archive.with_manifest({"leyden": 3}) == {"leyden": 3}
    del found["none"]
    found["more"], found["list"] = 1, []
    assert archive.changes(found) == [
        "'none' is missing", "'more' was added", "'list' has 0 tensors of 0 bytes, it was written with 3 of 18",
    ]  # fmt: skip
