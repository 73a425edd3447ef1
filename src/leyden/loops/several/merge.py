# SPDX-License-Identifier: Apache-2.0
"""Makes of what several processes have written about themselves what another number of them goes on with.

What a process has counted so far in the epoch, and the gradients of an update that is open, are put together over all of
them; random generators go on on the rank that they were of, and new ranks get some of their own.
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from leyden.data.generators import digest, seed
from leyden.loops.metric_state import restore_metrics
from leyden.runtime.ranks import rank_zero_warn
from leyden.runtime.seed import isolate_rng, rng_state, set_rng_state

Rank = Mapping[str, Any]


def of_rank(ranks: Sequence[Rank], rank: int, share: int, shares: int, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return what process ``rank`` goes on with.

    Args:
        ranks: What each of the former processes has written about itself.
        rank: The index of this process.
        share: Which share of the data it has.
        shares: How many shares there are.
        weights: The weights of the checkpoint, by their names.
    """
    own = dict(ranks[rank] if rank < len(ranks) else ranks[0])
    if rank >= len(ranks) and "rng" in own:
        own["rng"] = _of_new_rank(ranks, rank)
    counted = one_of_each_share(ranks)
    if "results" in own:
        own["results"] = {
            **own["results"],
            "train": _merged([each["results"]["train"] for each in counted], share == 0),
        }
    windows = [each["window"] for each in counted if each.get("window") is not None]
    own.pop("window", None)
    if windows and all(_is_whole(window, weights) for window in windows):
        own["window"] = _window(windows, shares)
    elif windows and "data" in own:
        own["data"] = {**own["data"], "redo": True}
    return own


def one_of_each_share(ranks: Sequence[Rank]) -> list[Rank]:
    """Return the first rank of each share of the data: those that work on one batch have counted the same."""
    found: dict[Any, Rank] = {}
    for number, each in enumerate(ranks):
        found.setdefault(each.get("share", number), each)
    return list(found.values())


# ---------------------------------------------------------------------------------------------- random generators


def _of_new_rank(ranks: Sequence[Rank], rank: int) -> dict[str, Any]:
    """The random generators of a rank that was not there before.

    Where all had the same, as in a run that is seeded, so has this one: a program may rely on all ranks drawing alike.
    Elsewhere they follow from those of rank 0, and from the number of the rank.
    """
    first: dict[str, Any] = ranks[0]["rng"]
    alike = all(torch.equal(each["rng"]["torch"].cpu(), first["torch"].cpu()) for each in ranks)
    if alike and (len(ranks) > 1 or os.environ.get("PL_GLOBAL_SEED") is not None):
        return copy.deepcopy(first)
    with isolate_rng():
        set_rng_state(first)
        number = digest(rank, first["torch"].cpu().numpy().tobytes())
        torch.manual_seed(number)  # all devices with it
        seed(number, ())
        random.seed(~number)
        return rng_state()


# ---------------------------------------------------------------------------------------------- what was logged


def _merged(stores: Sequence[Mapping[str, Any]], counts: bool) -> dict[str, Any]:
    """What was logged in the epoch, over all: with all of it where ``counts``, else with nothing that weighs anything."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for store in stores:
        for logged in store["logged"]:
            key = logged["hook"], logged["loader"], logged["name"]
            if key in found:
                _add(found[key]["slot"], logged["slot"])
            else:
                found[key] = {**logged, "slot": dict(logged["slot"])}
    for logged in found.values():
        slot = logged["slot"]
        if not counts and slot["reduction"] in ("mean", "sum") and slot["total"] is not None:
            slot["total"], slot["weight"] = slot["total"] * 0.0, slot["weight"] * 0
    return {**stores[0], "logged": list(found.values())}


def _add(slot: dict[str, Any], other: Mapping[str, Any]) -> None:
    total, theirs, reduction = slot["total"], other["total"], slot["reduction"]
    if theirs is None:
        return
    if total is None:
        slot["total"], slot["weight"] = theirs, other["weight"]
    elif reduction in ("mean", "sum"):
        slot["total"], slot["weight"] = total + theirs, slot["weight"] + other["weight"]
    elif reduction in ("min", "max"):
        slot["total"] = (torch.minimum if reduction == "min" else torch.maximum)(total, theirs)


# ---------------------------------------------------------------------------------------------- metric objects


def put_metrics(metrics: Mapping[str, Any], states: Sequence[Mapping[str, Any]], counts: bool, device: Any) -> None:
    """Let the metric objects go on from what those of all former processes had counted.

    Args:
        metrics: Those of this process, by their names in the module.
        states: What ``gather_metrics`` returned on each of the former.
        counts: Whether this process goes on with all of it; the others then begin at nothing.
        device: Where the states go.
    """
    for name, metric in metrics.items():
        parts = [state[name] for state in states if name in state]
        merged = _put_together(metric, parts) if parts else None
        if parts and merged is None:
            rank_zero_warn(
                f"What the metric {name} ({type(metric).__name__}) had counted on several ranks cannot be put together,"
                " since it does not say how its states are reduced: its value of this epoch is without what ranks other"
                " than 0 had counted before."
            )
            merged = dict(parts[0])
        if merged is not None and counts:
            restore_metrics({name: metric}, {name: merged}, device)


def _put_together(metric: Any, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The states of one metric over all; None where it does not say how they are reduced, as those of torchmetrics do."""
    reductions = vars(metric).get("_reductions")
    merged = dict(parts[0])
    if len(parts) == 1:
        return merged
    for name, value in parts[0].items():
        values = [part[name] for part in parts]
        if name == "_update_count":
            merged[name] = sum(values)
        elif name != "_forward_cache":
            if not isinstance(reductions, Mapping) or name not in reductions:
                return None
            how = getattr(reductions[name], "__name__", "")
            if how.endswith("cat"):
                rows = [list(value) if isinstance(value, list) else [value] for value in values]
                merged[name] = (
                    [item for row in rows for item in row]
                    if isinstance(value, list)
                    else torch.cat([r[0] for r in rows])
                )
            elif isinstance(value, Tensor) and how.endswith(("sum", "max", "min")):
                stacked = torch.stack(values)
                merged[name] = stacked.sum(0) if how.endswith("sum") else getattr(stacked, f"a{how[-3:]}")(0)
            else:
                return None
    return merged


# ---------------------------------------------------------------------------------------------- an open update


def _is_whole(window: Mapping[str, Any], weights: Mapping[str, Any]) -> bool:
    """Whether the gradients are those of whole parameters: those of which each process has a part cannot be added up."""
    return all(
        isinstance(known := weights.get(name), Tensor) and known.shape == gradient.shape and not gradient.is_meta
        for name, gradient in window["gradients"].items()
    ) and not window.get("and_spread")


def _window(windows: Sequence[Mapping[str, Any]], shares: int) -> dict[str, Any]:
    """The gradients of an update that is open, over all, as each of ``shares`` processes has them before they are averaged.

    Where batches declare their weight, gradients and weights are sums over the batches, and are divided by each other in
    the end; elsewhere they are means, each batch with one part in so many as an update has.
    """
    weighs = windows[0]["weight"] is not None
    parts = shares if weighs else len(windows)
    gradients: dict[str, Tensor] = {}
    for window in windows:
        for name, gradient in window["gradients"].items():
            known = gradients.get(name)
            gradients[name] = gradient if known is None else known + gradient
    weights: dict[Any, tuple[Any, bool]] = {}
    for window in windows:
        for index, (weight, mixes) in window.get("weights", {}).items():
            known_weight, known_mixes = weights.get(index, (None, False))
            total = weight if known_weight is None else known_weight + (weight or 0)
            weights[index] = total, mixes or known_mixes
    return {
        "gradients": {name: gradient / parts for name, gradient in gradients.items()},
        "weight": sum(window["weight"] for window in windows) / shares if weighs else None,
        "weights": {
            index: (None if weight is None else weight / shares, mixes) for index, (weight, mixes) in weights.items()
        },
    }


__all__ = ["of_rank", "one_of_each_share", "put_metrics"]
