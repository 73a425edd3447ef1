# SPDX-License-Identifier: Apache-2.0
"""16-true and bf16-true: everything in 16 bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from leyden.errors import MisconfigurationException
from leyden.precision import HalfPrecision


@pytest.mark.parametrize(("name", "dtype"), [("16-true", torch.float16), ("bf16-true", torch.bfloat16)])
def test_everything_is_in_16_bits(name, dtype):
    precision = HalfPrecision(name)
    module = precision.convert_module(nn.Linear(2, 2))
    assert module.weight.dtype == dtype
    x = precision.convert_input([torch.ones(1, 2), torch.ones(1, dtype=torch.long)])
    assert [t.dtype for t in x] == [dtype, torch.int64]
    with precision.forward_context():
        loss = module(x[0]).sum() + torch.zeros(1)
    assert loss.dtype == dtype
    assert torch.get_default_dtype() == torch.float32
    assert precision.precision == name


def test_unknown():
    with pytest.raises(MisconfigurationException, match="16-mixed.*use '16-true' or 'bf16-true'"):
        HalfPrecision("16-mixed")
