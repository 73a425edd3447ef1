# SPDX-License-Identifier: Apache-2.0
"""Names of precisions, and the object that each becomes."""

from __future__ import annotations

import warnings

import pytest
import torch

from leyden.errors import LeydenWarning, MisconfigurationException
from leyden.precision import (
    PRECISIONS,
    DoublePrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
    canonical,
    make_precision,
)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, "32-true"),
        (64, "64-true"),
        (32, "32-true"),
        (16, "16-mixed"),
        ("64", "64-true"),
        ("32", "32-true"),
        ("16", "16-mixed"),
        ("bf16", "bf16-mixed"),
        *((name, name) for name in PRECISIONS),
    ],
)
def test_canonical(given, expected):
    assert canonical(given) == expected


@pytest.mark.parametrize("given", [8, "fp8", True, "32.0", 16.0])
def test_unknown(given):
    with pytest.raises(
        MisconfigurationException, match=r"Precision .* is invalid. Allowed precision values: '32-true'"
    ):
        canonical(given)


def test_misspelt():
    with pytest.raises(MisconfigurationException, match="Did you mean 'bf16-mixed'"):
        canonical("bf16_mixed")


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("32-true", Precision),
        ("64-true", DoublePrecision),
        ("16-true", HalfPrecision),
        ("bf16-true", HalfPrecision),
        ("bf16-mixed", MixedPrecision),
    ],
)
def test_make(name, cls):
    made = make_precision(name, torch.device("cpu"))
    assert type(made) is cls
    assert made.precision == name


def test_make_passes_an_instance_through():
    mine = HalfPrecision("bf16-true")
    assert make_precision(mine, "cpu") is mine


def test_16_mixed_on_cpu_becomes_bf16():
    with pytest.warns(LeydenWarning, match="16-mixed.*CPU.*bf16-mixed"):
        made = make_precision(16, "cpu")
    assert made.precision == "bf16-mixed"
    assert made.device == "cpu"


def test_16_mixed_on_cuda():
    with warnings.catch_warnings():
        # torch says that there is no GPU here
        warnings.simplefilter("ignore")
        made = make_precision("16-mixed", torch.device("cuda", 1))
    assert (made.precision, made.device) == ("16-mixed", "cuda")
    assert made.scaler is not None
