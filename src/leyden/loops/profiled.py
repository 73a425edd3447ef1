# SPDX-License-Identifier: Apache-2.0
"""What a run with a profiler measures beside its hooks: the strategy's verbs, and the wait for the next batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

_VERBS = ("training_step", "validation_step", "test_step", "predict_step", "backward", "optimizer_step")


class ProfiledStrategy:
    """Stands for a strategy during a run that is profiled: the same in everything, but its verbs are measured."""

    def __init__(self, strategy: Any, profiler: Any) -> None:
        vars(self)["_strategy"] = strategy
        for name in _VERBS:
            action = f"[Strategy]{type(strategy).__name__}.{name}"
            vars(self)[name] = measured(getattr(strategy, name), profiler, action)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_strategy"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._strategy, name, value)


def measured(call: Callable[..., Any], profiler: Any, action: str) -> Callable[..., Any]:
    """Wrap a call so that the profiler measures it; without a profiler, the call itself."""
    if profiler is None:
        return call

    def with_profiler(*args: Any, **kwargs: Any) -> Any:
        with profiler.profile(action):
            return call(*args, **kwargs)

    return with_profiler


def measured_iterator(iterator: Iterator[Any], profiler: Any, action: str) -> Iterator[Any]:
    """Iterate as ``iterator`` does, while the profiler measures how long each item takes to come."""
    following = measured(next, profiler, action)
    end = object()
    while (item := following(iterator, end)) is not end:
        yield item
