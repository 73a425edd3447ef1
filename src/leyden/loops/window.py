# SPDX-License-Identifier: Apache-2.0
"""A window of gradient accumulation: the batches of one update, and how much each of them counts."""

from __future__ import annotations

from typing import Any

from leyden.loops import when
from leyden.loops.session import Session


def divisor_of(loop: Any, session: Session, batch_idx: int, last: bool) -> int:
    """By how much the loss of a batch is divided: the number of batches in its window of accumulation.

    Args:
        loop: The loop of the fit.
        session: The parts of the run.
        batch_idx: The index of the batch in its epoch.
        last: Whether the epoch ends with it.
    """
    accumulate = session.trainer.batches_per_update
    if session.config.rule("short_window") == "constant":
        return accumulate
    length = when.window_length(batch_idx, accumulate, loop.num_batches)
    actual = batch_idx % accumulate + 1
    if last and actual < length:
        # only now it is known that the window is short; the gradients are put right before the step
        session.optimization.rescale = length / actual
    return length


__all__ = ["divisor_of"]
