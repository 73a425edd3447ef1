# SPDX-License-Identifier: Apache-2.0
"""What each strategy would need for a module, on paper: bytes on each device, and what travels for each update."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from leyden.errors import MisconfigurationException
from leyden.loops.start import uncompiled
from leyden.loops.studies.footprint import Footprint, first_batch, measure
from leyden.loops.studies.sheet import Sheet
from leyden.runtime.ranks import say
from leyden.summary import human_count
from leyden.tree import batch_sizes, tree_map

ROOM = 0.9
"""The share of a device's memory that a plan may fill: the rest is for the device's own context, and for gaps."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_MOST_DEVICES = 1 << 16


class Plan:
    """What the strategies would need. ``str()`` of it is the table.

    Attributes:
        rows: One dict of plain data for each strategy. ``strategy`` and ``write`` (what to write for it) are text, ``reason``
            too: why it is not possible, else empty. In bytes on each device: ``weights`` (with buffers), ``gradients``,
            ``optimizer``, ``activations`` (None if unknown), ``transit`` (buckets of gradients, or layers that are gathered
            from all), ``largest`` (the largest layer that is gathered at a time), ``total`` (the most of all at a time;
            without activations, where these are unknown) and ``host`` (in the memory of the host, for each device).
            ``traffic`` is what each device sends for an update, in bytes, and ``collectives`` how many exchanges of each
            kind that takes. ``shares`` is how many batches an update sees: fewer than devices where several
            work on one. ``fits`` is True, False, or None where the device's memory or the activations are not known.
        recommended: The name of the strategy that is best, None if none fits.
        sentence: What is recommended, and why; or what would fit.
        write: What to write for it; None if none fits.
        unknown: By name (``"activations"``, ``"optimizer"``), why something is not known.
        memory: Bytes of the device's memory; None if not known.
        footprint: What was measured.

    Args:
        about: The first line of the table.
        found: What was measured.
        rows: As above, without ``fits``.
        memory: As above.
        fewer: Says with how large a batch the activations fill no more than so many bytes; empty where none would do.
    """

    def __init__(
        self,
        about: str,
        found: Footprint,
        rows: list[dict[str, Any]],
        memory: int | None,
        fewer: Callable[[float], str],
    ) -> None:
        self.about, self.footprint, self.rows, self.memory = about, found, rows, memory
        self.unknown = dict(found.unknown)
        for row in rows:
            row["fits"] = None if memory is None or row["reason"] else row["total"] <= ROOM * memory
            if row["fits"] and row["activations"] is None:
                row["fits"] = None
        best = _best(rows)
        self.recommended: str | None = None if best is None else best["strategy"]
        self.write: str | None = None if best is None else best["write"]
        self.sentence = _why(best, found, rows, memory) if best is not None else _what_would_fit(rows, memory, fewer)

    def __str__(self) -> str:
        return _page(self)

    __repr__ = __str__


def plan(
    trainer: Any, model: Any, devices: Any = None, nodes: Any = None, batch: Any = None, memory: Any = None
) -> Plan:
    """Return the plan for ``trainer.fit(model)``; see ``Trainer.plan``.

    The formulas: a ring sends 2(n-1)/n of the bytes of an all-reduce, and (n-1)/n of those of an all-gather or a
    reduce-scatter (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations").
    Weights, gradients and optimizer state by shards: Rajbhandari et al. 2020, "ZeRO: Memory optimizations toward training
    trillion parameter models", section 5; in the form that torch's fully_shard gives it (each parameter cut along its first
    dimension). Tensor parallelism: Shoeybi et al. 2019, "Megatron-LM", section 3. Buckets of gradients: Li et al. 2020,
    "PyTorch Distributed: Experiences on accelerating data parallel training", section 3.

    Raises:
        MisconfigurationException: for an argument that is not valid, or a module that cannot be copied or built.
    """
    devices = _whole("devices", trainer.num_devices if devices is None else devices)
    nodes = _whole("nodes", trainer.num_nodes if nodes is None else nodes)
    known = _memory(memory, trainer.strategy.root_device)
    module = uncompiled(model)
    if not isinstance(module, nn.Module):
        raise MisconfigurationException(
            f"plan(model={module!r}): the model must be a module, usually a LightningModule."
        )
    given = first_batch(batch)
    found, skeleton = measure(trainer, module, given)
    size = next(batch_sizes(given), 0) if given is not None else 0
    rows = Sheet(found, skeleton, trainer, devices, nodes).rows()

    def fewer(room: float) -> str:
        return _fewer(trainer, module, given, size, found, room)

    result = Plan(_about(module, found, trainer, size), found, rows, known, fewer)
    say(str(result))
    return result


def _whole(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise MisconfigurationException(f"plan({name}={value!r}) is not valid: it must be an int of at least 1.")
    return value


def _memory(given: Any, device: torch.device) -> int | None:
    """Return bytes: those given, else those of the device, None if it is not known."""
    if given is None:
        return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    if isinstance(given, (int, float)) and not isinstance(given, bool) and given > 0:
        return int(given)
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?)(i?)B?\s*", given, re.IGNORECASE) if isinstance(given, str) else None
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:
        number = 0.0
    if match is None or number <= 0:
        raise MisconfigurationException(
            f"plan(memory={given!r}) is not valid: it must be bytes as a number, or text such as '80GB' or '79.6GiB'."
        )
    unit = match[2].upper()
    return int(number * (1024 ** "_KMGT".index(unit) if match[3] and unit else _UNITS[unit]))


def _about(module: nn.Module, found: Footprint, trainer: Any, size: int) -> str:
    whole = sum(piece.numel for piece in found.pieces)
    trained = sum(piece.numel for piece in found.pieces if piece.trainable)
    parts = [f"{type(module).__name__}: {human_count(whole)} parameters"]
    if trained != whole:
        parts[0] += f", {human_count(trained)} of them trainable"
    parts += [" and ".join(dict.fromkeys(found.optimizers)) or "no optimizer", trainer.precision]
    if size:
        parts.append(f"a batch of {size} on each device")
    return "; ".join(parts) + "."


# ------------------------------------------------------------------------------------------ what to take


def _best(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return what to take of the rows that fit and use all devices.

    The first of those that send the least for as many samples, within a twentieth. What waits for an exchange in each layer
    comes after what does not, and what waits for the host last.
    """
    able = [row for row in rows if not row["reason"] and row["fits"] is not False]
    if len(rows) > 2:
        able = [row for row in able if row["strategy"] != "single"]
    for waits in (False, True):
        group = [row for row in able if not row["host"] and ("tensor_parallel" in row["strategy"]) is waits]
        if group:
            able = group
            break
    least = min((_sends(row) for row in able), default=0.0)
    return next((row for row in able if _sends(row) <= 1.05 * least), None)


def _sends(row: dict[str, Any]) -> float:
    """What a device sends for a batch of each share of the data: the fewer share them, the more updates that takes."""
    return math.inf if row["traffic"] is None else row["traffic"] / row["shares"]


def _why(best: dict[str, Any], found: Footprint, rows: list[dict[str, Any]], memory: int | None) -> str:
    name, need = best["strategy"], human_bytes(best["total"])
    without = " without activations" if best["activations"] is None else ""
    sends = (
        f" and sends the least for as many samples, {human_bytes(best['traffic'])} for an update"
        if best["traffic"]
        else ""
    )
    if memory is None:
        return f"{name}: it needs {need} on each device{without}{sends}; memory='80GB', say, tells what fits."
    bigger = [row["strategy"] for row in rows if row["fits"] is False and row["strategy"] not in ("single", name)]
    too = f", while {_listed(bigger)} {'does' if len(bigger) == 1 else 'do'} not fit" if bigger else ""
    room = f"it needs {need} of {human_bytes(memory)} on each device{without}"
    if best["host"]:
        needed = _devices_needed(found, rows, ROOM * memory)
        more = f" fsdp fits without it on {needed} devices." if needed else ""
        return f"{name}: {room}, and {human_bytes(best['host'])} on the host{too}; each step waits for the host.{more}"
    return f"{name}: {room}{sends}{too}."


def _what_would_fit(rows: list[dict[str, Any]], memory: int | None, fewer: Callable[[float], str]) -> str:
    assert memory is not None  # else all fit
    least = min((row for row in rows if not row["reason"]), key=lambda row: row["total"])
    text = f"Nothing fits: {least['strategy']} needs the least, {human_bytes(least['total'])} of {human_bytes(memory)}"
    text += f" on each device, of which {100 * ROOM:.0f} % can be filled."
    room, held = ROOM * memory, least["activations"] or 0
    smaller = fewer(room - (least["total"] - held)) if held else ""
    hints = [f"{least['strategy']} with {smaller}"] if smaller else []
    if held > room / 3 and least["total"] - held < room:
        hints.append("activation checkpointing")
    if hints:
        return f"{text} What would fit, or help: {_listed(hints, 'or')}."
    return (
        f"{text} Layers that are gathered take {human_bytes(least['transit'])} of it: smaller layers would help, a smaller"
        " batch, or weights in 16 bits."
    )


def _fewer(trainer: Any, module: nn.Module, batch: Any, size: int, found: Footprint, room: float) -> str:
    """Return the batch whose activations fill no more than ``room`` bytes, in words; empty if there is none."""
    if size < 2 or found.activations is None or room <= 0:
        return ""
    one, _ = measure(trainer, module, tree_map(lambda t: t[:1] if t.dim() and len(t) == size else t, batch))
    if one.activations is None or one.activations + one.batch > room:
        return ""
    least = one.activations + one.batch
    each = (found.activations + found.batch - least) / (size - 1)
    return f"a batch of {int(1 + (room - least) / each)} in place of {size}" if each > 0 else ""


def _devices_needed(found: Footprint, rows: list[dict[str, Any]], room: float) -> int | None:
    full = next((row for row in rows if row["strategy"] == "fsdp"), None)
    fixed = (full["activations"] or 0) + full["transit"] + found.buffers if full else None
    if fixed is None:
        return None
    count = 2
    while count <= _MOST_DEVICES:
        spread = sum(
            piece.part(piece.size * (2 if piece.trainable else 1) + piece.like, count) + piece.other
            for piece in found.pieces
        )
        if spread + fixed <= room:
            return count
        count *= 2
    return None


def _listed(names: list[str], word: str = "and") -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}"


# ------------------------------------------------------------------------------------------ the table


def human_bytes(number: float) -> str:
    """Return bytes with three digits and a unit, powers of 1000: 0 B, 12.3 MB, 1.50 GB."""
    size = float(number)
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if size < 999.5 or unit == "PB":
            break
        size /= 1000
    return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}" if size < 99.95 else f"{size:.0f} {unit}"


_SHORT = {"all_reduce": "all-reduce", "all_gather": "all-gather", "reduce_scatter": "reduce-scatter"}


def _page(plan: Plan) -> str:
    sizes = ("weights", "gradients", "optimizer", "activations", "transit", "total")
    known = plan.memory is not None
    head = ["strategy", *sizes[:-1], "on a device", *(["fits"] if known else []), "sends", "exchanges"]
    body = []
    for row in plan.rows:
        if row["reason"]:
            body.append([row["strategy"], row["reason"]])
            continue
        *cells, sends = ["?" if row[key] is None else human_bytes(row[key]) for key in (*sizes, "traffic")]
        fits = [{True: "yes", False: "no", None: "?"}[row["fits"]]] if known else []
        exchanges = ", ".join(f"{count} {_SHORT.get(kind, kind)}" for kind, count in row["collectives"].items())
        body.append([row["strategy"], *cells, *fits, sends, exchanges or "none"])
    full = [head, *(line for line in body if len(line) == len(head))]
    widths = [max(len(line[column]) for line in full) for column in range(len(head))]
    widths[0] = max(len(line[0]) for line in [head, *body])

    def line(cells: list[str]) -> str:
        first, *rest = cells
        if len(cells) < len(head):
            return f"{first.ljust(widths[0])}  {rest[0]}"
        middle = [cell.rjust(width) for cell, width in zip(rest[:-1], widths[1:-1], strict=True)]
        return "  ".join([first.ljust(widths[0]), *middle, rest[-1]]).rstrip()

    lines = [plan.about, line(head), "  ".join("─" * width for width in widths), *map(line, body)]
    for row in plan.rows:
        if row["host"] and not row["reason"]:
            lines.append(
                f"{row['strategy']}: {human_bytes(row['host'])} more in the memory of the host, for each device."
            )
    lines += [f"{name.capitalize()} are not known: {why}." for name, why in plan.unknown.items() if name != "optimizer"]
    if "optimizer" in plan.unknown:
        lines.append(f"The optimizer is not known: {plan.unknown['optimizer']}.")
    if plan.footprint.guessed and "activations" not in plan.unknown:
        lines.append(
            "training_step reads numbers from tensors; others stood in for them, so it may have gone another way."
        )
    lines.append(f"Take {plan.sentence}" if plan.write else plan.sentence)
    return "\n".join([*lines, f"    {plan.write}"] if plan.write else lines)
