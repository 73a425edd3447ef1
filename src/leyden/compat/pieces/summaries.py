# SPDX-License-Identifier: Apache-2.0
"""Parts of the model summary that Lightning has names for, and the summary of a module whose weights are shared out."""

from __future__ import annotations

from torch import nn

from leyden.summary import NOT_APPLICABLE, UNKNOWN_SIZE, LayerSummary, ModelSummary
from leyden.summary import OTHER_PARAMETERS as LEFTOVER_PARAMS_NAME

PARAMETER_NUM_UNITS = [" ", "K", "M", "B", "T"]


def get_formatted_model_size(total_model_size: float) -> str:
    """Return a size in megabytes as text."""
    return f"{total_model_size:,.3f}"


def deepspeed_param_size(p: nn.Parameter) -> int:
    """Return the number of elements of a parameter, all processes together: DeepSpeed keeps it beside its own part."""
    return int(getattr(p, "ds_numel", p.numel()))


def _own_size(p: nn.Parameter) -> int:
    """What of it is in the memory of this process."""
    return int(getattr(p, "partition_numel", p.numel)())


class DeepSpeedLayerSummary(LayerSummary):
    """A layer whose weights DeepSpeed has shared out."""

    @property
    def num_parameters(self) -> int:
        """The elements of all parameters, on all processes together."""
        return sum(deepspeed_param_size(p) for p in self.module.parameters())

    @property
    def average_shard_parameters(self) -> int:
        """The elements that this process holds."""
        return sum(_own_size(p) for p in self.module.parameters())


class DeepSpeedSummary(ModelSummary):
    """A summary that counts the weights on all processes, and in one column those of this one."""

    @property
    def total_parameters(self) -> int:
        """The elements of all parameters, on all processes together."""
        return sum(deepspeed_param_size(p) for p in self._model.parameters())

    @property
    def trainable_parameters(self) -> int:
        """Those of them that are trained."""
        return sum(deepspeed_param_size(p) for p in self._model.parameters() if p.requires_grad)

    @property
    def parameters_per_layer(self) -> list[int]:
        """The elements of each layer, on this process."""
        return [sum(_own_size(p) for p in layer.module.parameters()) for layer in self.summarize().values()]


__all__ = ["LEFTOVER_PARAMS_NAME", "NOT_APPLICABLE", "UNKNOWN_SIZE"]
