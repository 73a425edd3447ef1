# SPDX-License-Identifier: Apache-2.0
"""What steps of training change, as it was before, in memory: taken before something is tried, put back after it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from leyden.data.generators import Streams, find
from leyden.datamodule import LightningDataModule
from leyden.hooks import is_written
from leyden.loops.metric_state import metrics_of
from leyden.loops.session import Session
from leyden.module import LightningModule
from leyden.runtime.seed import rng_state, set_rng_state
from leyden.tree import leaves, tree_map

_OF_METRICS = ("_update_count", "_forward_cache", "_computed", "_update_called")
"""What torchmetrics keeps beside the state of a metric object."""


class Undo:
    """The module, the optimizers, the schedules and the generators of a run as they are now.

    Tensors are copied to host memory, so that what is tried finds on the device what the run itself would; they are put
    back in place, so that whoever holds one holds the right one. What hooks have written into plain attributes of a module
    stays, unless the module carries it through ``on_save_checkpoint`` and ``on_load_checkpoint``.

    Args:
        session: The run.
    """

    @torch.inference_mode(False)
    def __init__(self, session: Session) -> None:
        self.session = session
        module, strategy = session.module, session.strategy
        roots = {"sources": session.sources, "datamodule": session.datamodule, "module": module}
        self.streams = Streams(find(roots))
        self.held, self.rng = self.streams.of_held(), rng_state()
        self.optimizers = [_OptimizerBefore(optimizer) for optimizer in strategy.optimizers]
        self.tensors = [
            (tensor, _own(tensor).detach().to("cpu", copy=True))
            for tensor in (*module.parameters(), *module.buffers(), *_tensors_of(strategy.optimizers))
            if not is_lazy(tensor)
        ]
        self.parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in module.parameters()]
        for parameter, _, _ in self.parameters:
            parameter.grad = None  # what is tried must not add to it
        self.modes = [(child, child.training) for child in module.modules()]
        self.metrics = [(metric, _copied(_state_of(metric))) for metric in metrics_of(module).values()]
        schedules = [each.scheduler for each in strategy.lr_scheduler_configs]
        self.schedules = [(schedule, copy.deepcopy(schedule.state_dict())) for schedule in schedules]
        self.precision = copy.deepcopy(strategy.precision.state_dict())
        self.saved = _saved(session)
        datamodule = session.datamodule
        self.datamodule = (
            copy.deepcopy(datamodule.state_dict()) if _loads(datamodule) and datamodule is not None else None
        )

    @torch.inference_mode(False)
    def restore(self) -> None:
        """Make it so again."""
        session = self.session
        for optimizer in self.optimizers:
            optimizer.restore()
        with torch.no_grad():
            for tensor, value in self.tensors:
                _own(tensor).copy_(value)
        for parameter, requires_grad, gradient in self.parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        for child, training in self.modes:
            child.training = training
        for metric, state in self.metrics:
            vars(metric).update(_copied(state))
        for schedule, state in self.schedules:
            schedule.load_state_dict(copy.deepcopy(state))
        if self.precision:
            session.strategy.precision.load_state_dict(copy.deepcopy(self.precision))
        if self.datamodule is not None and session.datamodule is not None:
            session.datamodule.load_state_dict(copy.deepcopy(self.datamodule))
        if self.saved is not None:
            session.module.on_load_checkpoint(copy.deepcopy(self.saved))
        self.streams.put(self.held)
        set_rng_state(self.rng)


class _OptimizerBefore:
    """An optimizer's groups, and which tensors its state is made of; those themselves are put back in place."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.attributes = optimizer, dict(vars(optimizer))
        self.groups = [(group, dict(group)) for group in optimizer.param_groups]
        self.state = {key: tree_map(_itself, value) for key, value in optimizer.state.items()}

    def restore(self) -> None:
        optimizer, own = self.optimizer, vars(self.optimizer)
        for name in own.keys() - self.attributes.keys():
            del own[name]
        own.update(self.attributes)
        optimizer.param_groups[:] = [group for group, _ in self.groups]
        for group, values in self.groups:
            group.clear()
            group.update(values)
        optimizer.state.clear()
        optimizer.state.update({key: tree_map(_itself, value) for key, value in self.state.items()})


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _tensors_of(optimizers: list[Optimizer]) -> Iterator[Tensor]:
    for optimizer in optimizers:
        settings = [value for group in optimizer.param_groups for name, value in group.items() if name != "params"]
        for leaf in leaves([list(optimizer.state.values()), settings]):
            if isinstance(leaf, Tensor):
                yield leaf


def _own(tensor: Tensor) -> Tensor:
    """What this process has of a tensor that is spread over several."""
    local = getattr(tensor, "to_local", None)
    return local() if callable(local) else tensor


def _state_of(metric: Any) -> dict[str, Any]:
    return {**metric.metric_state, **{name: vars(metric)[name] for name in _OF_METRICS if name in vars(metric)}}


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    copies: dict[str, Any] = tree_map(lambda tensor: tensor.detach().clone(), state)
    return copies


def _saved(session: Session) -> dict[str, Any] | None:
    """What the module adds to a checkpoint and takes back from it; None where it does not do both."""
    module = session.module
    if not all(is_written(module, name, LightningModule) for name in ("on_save_checkpoint", "on_load_checkpoint")):
        return None
    progress = session.progress
    checkpoint: dict[str, Any] = {
        "epoch": progress.epoch, "global_step": progress.global_step, "state_dict": module.state_dict(),
    }  # fmt: skip
    module.on_save_checkpoint(checkpoint)
    return copy.deepcopy(checkpoint)


def _loads(datamodule: Any) -> bool:
    names = ("state_dict", "load_state_dict")
    return datamodule is not None and all(is_written(datamodule, name, LightningDataModule) for name in names)
