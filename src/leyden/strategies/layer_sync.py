# SPDX-License-Identifier: Apache-2.0
"""The plug-in that makes layers of a model work together over all processes, and the one for batch norms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class LayerSync(ABC):
    """Changes layers so that they share what they know with those of the other processes.

    Extend it, and pass it as ``Trainer(plugins=[MySync()])``. It is used with several processes only.
    """

    @abstractmethod
    def apply(self, model: nn.Module) -> nn.Module:
        """Return ``model`` with its layers changed; called before it is wrapped for the processes."""

    @abstractmethod
    def revert(self, model: nn.Module) -> nn.Module:
        """Return ``model`` as it was before ``apply``; called when the run ends."""


class TorchSyncBatchNorm(LayerSync):
    """Batch norms that share their statistics, as ``Trainer(sync_batchnorm=True)`` makes them.

    On the CPU the Trainer shares them by another way, since torch's ``SyncBatchNorm`` needs a GPU.
    """

    def apply(self, model: nn.Module) -> nn.Module:
        """Replace each batch norm by torch's ``SyncBatchNorm``, with its parameters and statistics."""
        changed: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return changed

    def revert(self, model: nn.Module) -> nn.Module:
        """Replace each ``SyncBatchNorm`` by a batch norm that takes inputs of any number of dimensions."""
        if isinstance(model, nn.SyncBatchNorm):
            return _alone(model)
        for name, child in model.named_children():
            if (alone := self.revert(child)) is not child:
                model.add_module(name, alone)
        return model


class _AnyBatchNorm(_BatchNorm):
    """A batch norm that does not ask how many dimensions its input has: nobody knows which class it once was."""

    def _check_input_dim(self, input: Any) -> None:
        pass


def _alone(norm: nn.SyncBatchNorm) -> nn.Module:
    made = _AnyBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    made.train(norm.training)
    with torch.no_grad():
        for name, parameter in norm.named_parameters(recurse=False):
            made.register_parameter(name, parameter)
        for name, buffer in norm.named_buffers(recurse=False):
            made.register_buffer(name, buffer)
    return made
