# SPDX-License-Identifier: Apache-2.0
"""What the metric objects of a module have counted so far in an epoch: their own state_dict leaves that out.

Any object counts that has ``update``, ``compute`` and ``reset``, tells its state (a mapping of names to tensors or lists
of them) as ``metric_state`` and the number of updates as ``update_count``, as those of torchmetrics do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from leyden.tree import move_to
from leyden.types import MetricLike


def metrics_of(module: nn.Module) -> dict[str, Any]:
    """Return the metric objects of ``module`` that tell their state, by the names they have in it."""
    return {
        name: child
        for name, child in module.named_modules()
        if isinstance(child, MetricLike)
        and isinstance(getattr(child, "metric_state", None), Mapping)
        and hasattr(child, "update_count")
    }


def gather_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the states of those metric objects that have counted something."""
    return {
        name: {**_detached(metric.metric_state), **_detached({key: getattr(metric, key, None) for key in _MORE})}
        for name, metric in metrics.items()
        if metric.update_count
    }


def restore_metrics(metrics: Mapping[str, Any], states: Mapping[str, Any], device: Any) -> None:
    """Let the metric objects go on from what ``gather_metrics`` returned; names that are not there are passed over."""
    for name in metrics.keys() & states.keys():
        vars(metrics[name]).update(move_to(dict(states[name]), device))


_MORE = ("_update_count", "_forward_cache")
"""What torchmetrics keeps beside the state: how often it was updated, and the value of the last step."""


def _detached(state: Mapping[str, Any]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) else value

    return {
        name: [plain(item) for item in value] if isinstance(value, list) else plain(value)
        for name, value in state.items()
    }
