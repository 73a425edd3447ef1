# SPDX-License-Identifier: Apache-2.0
"""Puts together what all processes have predicted, in the order in which one process would have.

The order is that of the stream of indices which ``data.sharding`` deals out; no prediction is looked at to find it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leyden.data.sharding import Deal
from leyden.errors import MisconfigurationException
from leyden.strategies.base import Strategy


class Predicted(NamedTuple):
    """What one process has predicted for one loader."""

    deal: Deal | None
    """How the samples were dealt out; None where they were not."""
    outputs: list[Any]
    """What ``predict_step`` returned, by batch."""
    sizes: list[int]
    """Samples of each batch; 0 where that is not known."""


def gather(strategy: Strategy, mine: list[Predicted]) -> list[list[Any]]:
    """Return, on every process, the predictions of all for each loader, by batch.

    Args:
        strategy: Carries them; those that work on the same share of the data count once.
        mine: Of this process, by loader.

    Raises:
        MisconfigurationException: on every process, where predictions have no entry for each sample.
    """
    found: list[tuple[int, list[Predicted]]] = strategy.gather_objects((strategy.data_rank, mine))
    shares = dict(reversed(found))
    return [in_order([shares[rank][loader] for rank in sorted(shares)]) for loader in range(len(mine))]


def in_order(shares: Sequence[Predicted]) -> list[Any]:
    """Return the predictions of all shares of one loader, in order, by batch."""
    deal = shares[0].deal
    if deal is None:  # each process went through its own data
        return [output for share in shares for output in share.outputs]
    if deal.batch_size is None:
        longest = max(len(share.outputs) for share in shares)
        return [share.outputs[i] for i in range(longest) for share in shares if i < len(share.outputs)]
    places, joined = [], []
    for number, share in enumerate(shares):
        rank = number if share.deal is None else share.deal.rank
        places += [rank + deal.size * index for index in range(sum(share.sizes))]
        joined += list(zip(share.outputs, share.sizes, strict=True))
    if not joined:
        return []
    whole = _join([output for output, _ in joined], [size for _, size in joined])
    order = sorted(range(len(places)), key=places.__getitem__)
    order = [index for index in order if deal.total is None or places[index] < deal.total]
    return [_pick(whole, order[start : start + deal.batch_size]) for start in range(0, len(order), deal.batch_size)]


def _join(outputs: Sequence[Any], sizes: Sequence[int]) -> Any:
    """Put outputs of batches together, sample after sample."""
    first = outputs[0]
    if isinstance(first, Mapping):
        return {key: _join([output[key] for output in outputs], sizes) for key in first}
    if isinstance(first, Tensor):
        if all(output.ndim and output.shape[0] == size for output, size in zip(outputs, sizes, strict=True)):
            return torch.cat(list(outputs))
    elif type(first).__module__ == "numpy" and getattr(first, "shape", None):
        if all(output.shape[0] == size for output, size in zip(outputs, sizes, strict=True)):
            import numpy  # noqa: PLC0415  # where predictions are arrays

            return numpy.concatenate(list(outputs))
    elif isinstance(first, list) and all(len(output) == size for output, size in zip(outputs, sizes, strict=True)):
        return [item for output in outputs for item in output]
    elif isinstance(first, (list, tuple)) and all(len(output) == len(first) for output in outputs):
        rows = [_join(column, sizes) for column in zip(*outputs, strict=True)]
        return type(first)(*rows) if hasattr(first, "_fields") else tuple(rows)
    shape = f" of shape {tuple(first.shape)}" if hasattr(first, "shape") else ""
    raise MisconfigurationException(
        f"Trainer.predict(gather=True) puts predictions in the order of the data, sample by sample, but predict_step()"
        f" returned a {type(first).__name__}{shape} for a batch of {sizes[0]}. Return tensors, arrays or lists with an entry"
        " for each sample (or dicts and tuples of them), or leave gather out: each rank then has its own."
    )


def _pick(whole: Any, indices: Sequence[int]) -> Any:
    """Return these samples of what ``_join`` has put together."""
    if isinstance(whole, Mapping):
        return {key: _pick(value, indices) for key, value in whole.items()}
    if isinstance(whole, tuple):
        rows = [_pick(value, indices) for value in whole]
        return type(whole)(*rows) if hasattr(whole, "_fields") else tuple(rows)
    if isinstance(whole, list):
        return [whole[index] for index in indices]
    return whole[list(indices)]
