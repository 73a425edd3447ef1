# SPDX-License-Identifier: Apache-2.0
"""The batches of an evaluation, where all processes take part in each step of any: one after the other, by loaders."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from leyden.strategies.base import IDLE, Strategy


def in_turn(
    strategy: Strategy,
    batches: Iterator[tuple[Any, int, int]],
    knows: Callable[[], bool],
    together: Callable[[], AbstractContextManager[Any]],
) -> Iterator[tuple[Any, int, int]]:
    """Yield ``batches``, each with its number and that of its loader, and ``IDLE`` where only other processes have one.

    Args:
        strategy: Brings the processes together ahead of each step.
        batches: Those of this process.
        knows: Whether this process knows the exchanges of a step, and so can take part in one without a batch.
        together: Returns a context in which a step has no exchange; it is entered, on all processes, where one of them is
            without a batch and does not know the step.
    """
    while True:
        item = next(batches, None)
        mine = math.inf if item is None else float(item[2])
        first = -1.0
        while first != mine:
            turns = strategy.gather_numbers(torch.tensor([mine, float(knows())], dtype=torch.float64))
            first = float(turns[:, 0].min())
            if first == math.inf:
                return
            blind = bool(((turns[:, 0] > first) & (turns[:, 1] == 0)).any())
            with together() if blind else nullcontext():
                yield item if first == mine and item is not None else (IDLE, 0, int(first))


__all__ = ["in_turn"]
