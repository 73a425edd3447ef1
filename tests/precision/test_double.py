# SPDX-License-Identifier: Apache-2.0
"""64-true: weights, inputs and new tensors in float64."""

from __future__ import annotations

import torch
from torch import nn

from leyden.precision import DoublePrecision


def test_everything_is_float64():
    precision = DoublePrecision()
    module = precision.convert_module(nn.BatchNorm1d(2))
    assert module.weight.dtype == module.running_mean.dtype == torch.float64
    assert module.num_batches_tracked.dtype == torch.int64
    batch = precision.convert_input({"x": torch.ones(2), "y": (torch.ones(2, dtype=torch.int32), "name")})
    assert batch["x"].dtype == torch.float64
    assert batch["y"][0].dtype == torch.int32
    assert batch["y"][1] == "name"
    with precision.forward_context():
        assert torch.zeros(1).dtype == torch.float64
    with precision.init_context():
        assert nn.Linear(1, 1).weight.dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32
