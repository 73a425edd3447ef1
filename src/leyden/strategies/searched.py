# SPDX-License-Identifier: Apache-2.0
"""What the search for unused parameters finds in the first updates of a fit, and what it costs: said once, then all is gone.

The choice stays with the user. ``static_graph=True`` would be the cheap one where the same parameters are always left out,
but where that changes later, torch makes an update of gradients that were not averaged before it notices.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from leyden.runtime.ranks import rank_zero_info

UPDATES = 10
"""How many batches whose gradients travel are looked at."""
WORTH = 0.01
"""The part of the time of a batch that the search must take to be worth a word."""


class Search:
    """Notes for some batches which parameters take part, and how long the search for the others takes.

    Args:
        wrapper: The DistributedDataParallel, which searches.
        module: What it wraps.
        hear: Tells the other ranks a text, and returns those of all, by rank.
    """

    def __init__(self, wrapper: Any, module: nn.Module, hear: Callable[[str], Mapping[int, str]]) -> None:
        self.wrapper, self.hear = wrapper, hear
        self.names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        self._inside_until = 0.0
        self._used: set[str] | None = None
        """What has taken part in the backward that runs now; None where its gradients do not travel."""
        self._unused: list[list[str]] = []
        self._searches: list[float] = []
        self._began = time.perf_counter()
        self._batches = 0
        self._handles: list[Any] = [
            module.register_forward_hook(self._ran),
            wrapper.register_forward_hook(self._searched),
        ]
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                tensor: Any = parameter
                self._handles.append(
                    tensor.register_post_accumulate_grad_hook(lambda _, name=name: self._took_part(name))
                )

    def _took_part(self, name: str) -> None:
        if self._used is not None:
            self._used.add(name)

    def _ran(self, *_: Any) -> None:
        self._inside_until = time.perf_counter()

    def _searched(self, *_: Any) -> None:
        """The wrapper has run, and searched what came out of it."""
        now = time.perf_counter()
        if self._used is not None:
            self._unused.append([name for name in self.names if name not in self._used])
        if len(self._unused) == UPDATES:
            self.close()
            self._tell((now - self._began) / self._batches)
            return
        self._used = set() if self.wrapper.require_backward_grad_sync else None
        if self._used is not None:
            self._searches.append(now - self._inside_until)
        if not self._batches:
            self._began = now  # the first one makes what the others only use
        self._batches += 1

    def close(self) -> None:
        """Look no more."""
        while self._handles:
            self._handles.pop().remove()

    def _tell(self, batch: float) -> None:
        took = sorted(self._searches)[len(self._searches) // 2]
        said = [json.loads(text) for text in self.hear(json.dumps(self._unused)).values()]
        text = verdict(said, took, batch)
        if text is not None:
            rank_zero_info(text)


def verdict(unused: list[list[list[str]]], took: float, batch: float) -> str | None:
    """What the user may want to know; None if the search is needed, or costs nothing to speak of.

    Args:
        unused: The names of unused parameters, by rank and batch.
        took: Seconds of a search.
        batch: Seconds of a batch.
    """
    if took < WORTH * batch:
        return None
    first = unused[0][0]
    if any(names != first for rank in unused for names in rank):
        return None  # now one, now another: that is what the search is for
    cost = (
        f"the search for unused parameters takes {1e3 * took:.2g} ms of each batch ({100 * took / batch:.0f} %), and in the"
        f" first {UPDATES} updates"
    )
    if not first:
        return (
            f"find_unused_parameters=True: {cost} all parameters took part on all ranks. strategy='ddp' does without it,"
            " and stops with an error that names them if some take no part."
        )
    names = ", ".join(first[:8]) + (f" and {len(first) - 8} more" if len(first) > 8 else "")
    return (
        f"find_unused_parameters=True: {cost} these took no part on any rank: {names}. If that never changes, freeze them"
        " (requires_grad=False) before the run begins and use strategy='ddp', or use DDPStrategy(static_graph=True)."
    )


__all__ = ["Search", "verdict"]
