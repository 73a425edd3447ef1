# SPDX-License-Identifier: Apache-2.0
"""What each strategy would need for a module, on paper: bytes on each device, and what travels for each update."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from leyden.errors import MisconfigurationException
from leyden.loops.footprint import Calls, Footprint, Piece, first_batch, measure
from leyden.loops.start import uncompiled
from leyden.runtime.ranks import say
from leyden.strategies import units
from leyden.summary import human_count
from leyden.tree import batch_sizes, tree_map

ROOM = 0.9
"""The share of a device's memory that a plan may fill: the rest is for the device's own context, and for gaps."""
_FIRST_BUCKET, _BUCKET = 1 << 20, 25 << 20
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_MOST_DEVICES = 1 << 16
_KEPT = ("weights", "gradients", "optimizer")
"""What a device has of a module between two updates."""


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


# ------------------------------------------------------------------------------------------ the formulas


@dataclass
class Traffic:
    """What each device sends for an update, in bytes, and the number of exchanges by kind."""

    sent: float = 0.0
    kinds: dict[str, int] = field(default_factory=dict)
    unknown: bool = False

    def add(self, kind: str, size: float, count: int, among: int) -> None:
        """Add ``count`` exchanges of ``size`` bytes in all among so many processes."""
        if among == 1 or not count:
            return
        turns = 2 if kind == "all_reduce" else 1
        self.sent += turns * (among - 1) / among * size
        self.kinds[kind] = self.kinds.get(kind, 0) + count


def buckets(pieces: Iterable[Piece]) -> int:
    """Return in how many buckets DistributedDataParallel exchanges gradients from its second batch on."""
    open_sizes: dict[int, int] = {}
    limits: dict[int, int] = {}
    count = 0
    for piece in reversed([piece for piece in pieces if piece.trainable]):
        kind = piece.itemsize
        open_sizes[kind] = open_sizes.get(kind, 0) + piece.size
        if open_sizes[kind] >= limits.get(kind, _FIRST_BUCKET):
            count += 1
            open_sizes[kind], limits[kind] = 0, _BUCKET
    return count + sum(1 for size in open_sizes.values() if size)


class Sheet:
    """The rows of a plan: one method for each kind of strategy.

    Args:
        found: What was measured on one device.
        module: Its copy without memory.
        trainer: Whose precision, accumulation and strategy count.
        devices: On each node.
        nodes: How many.
    """

    def __init__(self, found: Footprint, module: nn.Module, trainer: Any, devices: int, nodes: int) -> None:
        self.found, self.module, self.trainer = found, module, trainer
        self.devices, self.nodes, self.world = devices, nodes, devices * nodes
        self.windows = int(trainer.config.accumulate_grad_batches)
        names = {id(part): name for name, part in module.named_modules()}
        policy = getattr(trainer.strategy, "auto_wrap_policy", None)
        self.layers = sorted((names[id(part)] for part in units.find(module, policy)), key=len, reverse=True)
        """The names of the layers that are gathered one at a time, inner ones first."""
        parameters = dict(module.named_parameters())
        plain = {id(parameter) for parameter in units.plain(module)}
        self.pieces = [replace(p, whole=id(parameters[p.name]) in plain) for p in found.pieces]

    def rows(self) -> list[dict[str, Any]]:
        """Return all rows."""
        world, alone = self.world, self.world == 1
        found = [self.single()]
        if not alone:
            found += [self.ddp(), self.sharded("fsdp", "'fsdp'", world)]
            found.append(self.sharded("fsdp (SHARD_GRAD_OP)", _fsdp("SHARD_GRAD_OP"), world, reshard=False))
        if self.nodes > 1 and self.devices > 1:
            hybrid = _fsdp("HYBRID_SHARD")
            found.append(self.sharded("fsdp (HYBRID_SHARD)", hybrid, self.devices, copies=self.nodes))
        found.append(self.sharded("fsdp (CPU offload)", "'fsdp_cpu_offload'", world, offload=True))
        if self.devices > 1 and self.nodes == 1:
            found.append(self.tensor("tensor_parallel", "'tensor_parallel'", self.devices))
            if self.devices % 2 == 0 and self.devices > 2:
                found.append(self.tensor("fsdp x tensor_parallel", "TensorParallelStrategy(tensor_parallel_size=2)", 2))
        elif self.devices > 1:
            found.append(self.tensor("fsdp x tensor_parallel", "'tensor_parallel'", self.devices))
        return found

    def _row(self, name: str, strategy: str, sizes: dict[str, int], traffic: Traffic, **more: int) -> dict[str, Any]:
        """Return a row; ``more`` are ``transit``, ``largest``, ``host`` and ``shares``, where they are not the usual."""
        found = self.found
        devices = 1 if name == "single" else self.devices
        nodes = f", num_nodes={self.nodes}" if self.nodes > 1 and name != "single" else ""
        sent = None if traffic.unknown else round(traffic.sent)
        held = None if found.activations is None else found.activations + found.batch
        row: dict[str, Any] = {
            "strategy": name, "write": f"Trainer(strategy={strategy}, devices={devices}{nodes})", "reason": "", **sizes,
            "activations": held, "transit": 0, "largest": 0, "host": 0,
            "shares": devices * (self.nodes if name != "single" else 1), **more, "traffic": sent,
            "collectives": traffic.kinds,
        }  # fmt: skip
        update = row.pop("update")
        row["total"] = sum(sizes[key] for key in _KEPT) + max((held or 0) + row["transit"], update)
        return row

    def _sizes(self, pieces: list[Piece], among: int = 1) -> dict[str, int]:
        """Bytes of weights, gradients and optimizer state on a device, where each parameter is cut into so many chunks."""
        whole = sum(piece.size for piece in self.found.pieces if piece.trainable)
        gradients = sum(piece.part(piece.size, among) for piece in pieces if piece.trainable)
        return {
            "weights": self.found.buffers + sum(piece.part(piece.size, among) for piece in pieces),
            "gradients": gradients,
            "optimizer": sum(piece.part(piece.like, among) + piece.other for piece in pieces),
            "update": self.found.update * gradients // whole if whole else self.found.update,
        }

    def single(self) -> dict[str, Any]:
        """One device."""
        return self._row("single", "'auto'", self._sizes(self.pieces), Traffic())

    def ddp(self) -> dict[str, Any]:
        """Each device has all; gradients are averaged by all-reduce, in buckets, once for a window of accumulation."""
        found, own = self.found, getattr(self.trainer.strategy, "ddp_kwargs", {})
        sizes, traffic = self._sizes(self.pieces), Traffic()
        traffic.add("all_reduce", sizes["gradients"], buckets(found.pieces), self.world)
        if found.buffer_count and own.get("broadcast_buffers", True):
            traffic.add("broadcast", found.buffers * self.windows, self.windows, self.world)
        apart = 0 if own.get("gradient_as_bucket_view") else sizes["gradients"]
        return self._row("ddp", "'ddp'", sizes, traffic, transit=apart)

    def sharded(
        self, name: str, strategy: str, among: int, copies: int = 1, reshard: bool = True, offload: bool = False
    ) -> dict[str, Any]:
        """Each device has a share of each parameter; layers are gathered one at a time, gradients are scattered.

        Args:
            name: Of the row.
            strategy: What to write for it.
            among: Over how many devices each parameter is cut.
            copies: How many such groups there are: they average gradients by all-reduce.
            reshard: Whether gathered layers are given back after the forward pass.
            offload: Whether shares wait in the memory of the host, where the optimizer steps too.
        """
        sizes, traffic = self._sizes(self.pieces, among), Traffic()
        more = self._gather(self.pieces, traffic, among, copies, reshard, offload)
        if offload:
            more["host"] = sum(sizes[key] for key in _KEPT) - self.found.buffers
            sizes = {"weights": self.found.buffers, "gradients": 0, "optimizer": 0, "update": 0}
        return self._row(name, strategy, sizes, traffic, **more)

    def _gather(
        self,
        pieces: list[Piece],
        traffic: Traffic,
        among: int,
        copies: int = 1,
        reshard: bool = True,
        offload: bool = False,
    ) -> dict[str, int]:
        """Add what is gathered and scattered to ``traffic``; return the bytes that it takes on a device meanwhile."""
        policy = getattr(self.trainer.strategy, "mixed_precision", None)
        travels, sums = getattr(policy, "param_dtype", None), getattr(policy, "reduce_dtype", None)
        halves = getattr(self.trainer.strategy.precision, "dtype", torch.float32).itemsize < 4
        if policy is None and halves:
            sums = torch.float32  # gradients of weights in 16 bits are summed up in 32
        gathered = dict.fromkeys([*self.layers, ""], 0)
        scattered = dict(gathered)
        alone = 0
        for piece in pieces:
            if piece.whole:
                alone += piece.size if piece.trainable else 0
                continue
            owner = next((layer for layer in self.layers if piece.name.startswith(f"{layer}.")), "")
            count = piece.part(piece.size, among) * among // piece.itemsize
            gathered[owner] += count * (travels.itemsize if travels else piece.itemsize)
            if piece.trainable:
                scattered[owner] += count * (sums.itemsize if sums else travels.itemsize if travels else piece.itemsize)
        for layer, size in gathered.items():
            gathers = (2 if reshard and layer else 1) * self.windows if size else 0
            traffic.add("all_gather", size * gathers, gathers, among)
            scatters = 1 if scattered[layer] else 0  # inside a window of accumulation none is sent
            traffic.add("reduce_scatter", scattered[layer], scatters, among)
            traffic.add("all_reduce", scattered[layer] // among, scatters, copies)
        if alone:
            traffic.add("all_gather", 0, 1, among * copies)  # whether anybody has a gradient of it
            traffic.add("all_reduce", alone, 1, among * copies)
        if among == 1 and not offload:
            return {}
        largest = max((size for layer, size in gathered.items() if layer), default=0)
        # gathered: the module's own parameters, which stay; the layer that computes, and the next; its gradients,
        # or, inside a window of accumulation, those of all layers, which are not sent yet
        kept = gathered[""] + 2 * largest if reshard else sum(gathered.values())
        kept += sum(scattered.values()) if self.windows > 1 else max(scattered.values())
        return {"transit": kept, "largest": max(gathered.values())}

    def tensor(self, name: str, strategy: str, size: int) -> dict[str, Any]:
        """Layers are split over groups of ``size`` devices, which work on one batch; parameters are sharded over groups."""
        from leyden.strategies.tensor import automatic, plan  # noqa: PLC0415  # where several devices are planned for

        given = getattr(self.trainer.strategy, "plan", None)
        try:
            found = automatic.find(self.module, size)
            words = plan.resolved(given, self.module, size) if given else dict(found.single)
        except MisconfigurationException as error:
            return self._impossible(name, str(error))
        places = [] if given else found.places
        for place in places:
            # whether activations may stay split is tried out in a run; between layers of training_step it cannot be
            split = bool(place.block)
            words |= dict.fromkeys(place.columns, "colwise" if split else "colwise_gather")
            words[place.row] = "rowwise" if split else "rowwise_split"
        if not words:
            return self._impossible(name, "no layer can be split")
        pieces = [_split(piece, words, self.module, size) for piece in self.pieces]
        among = self.world // size
        sizes, traffic = self._sizes(pieces, among), Traffic()
        more = self._gather(pieces, traffic, among)
        if self.found.activations is None:
            traffic.unknown = True  # it is activations that travel
        else:
            self._exchange(words, [place.columns for place in places], traffic, size)
        return self._row(name, strategy, sizes, traffic, shares=among, **more)

    def _exchange(self, words: dict[str, Any], together: list[list[str]], traffic: Traffic, size: int) -> None:
        """Add what layers that are split say to each other about activations and their gradients."""
        later = {name for columns in together for name in columns[1:]}
        for name, style in words.items():
            calls = self.found.layers.get(name, Calls())
            embeds, word = isinstance(self.module.get_submodule(name), nn.Embedding), _word(style)
            given, taken = calls.given * self.windows, calls.taken * self.windows
            forward, backward = calls.count * self.windows, calls.learnt * self.windows
            if word.startswith("rowwise"):
                traffic.add("all_reduce", given, forward, size)
            elif embeds or word == "colwise_gather":
                traffic.add("all_gather", given, forward, size)
            if word == "rowwise_split":
                traffic.add("all_gather", taken, backward, size)
            if word.startswith("colwise") and not embeds and name not in later:
                traffic.add("all_reduce", taken, backward, size)  # of the gradients of what it has taken

    def _impossible(self, name: str, reason: str) -> dict[str, Any]:
        row = self._row(name, "", dict.fromkeys((*_KEPT, "update"), 0), Traffic())
        return {**row, "write": "", "reason": reason, "total": 0}


def _word(style: Any) -> str:
    """How a layer is split, in a word; torch's own styles have the class for it."""
    return style if isinstance(style, str) else type(style).__name__.removesuffix("Parallel").lower()


def _split(piece: Piece, words: dict[str, Any], module: nn.Module, size: int) -> Piece:
    owner, _, last = piece.name.rpartition(".")
    word = _word(words.get(owner, ""))
    embeds = bool(owner) and isinstance(module.get_submodule(owner), nn.Embedding)
    if word.startswith("colwise"):
        return piece.split(1 if embeds else 0, size)
    if word.startswith("rowwise") and last == "weight":
        return piece.split(0 if embeds else 1, size)
    return piece


def _fsdp(strategy: str) -> str:
    return f"FSDPStrategy(sharding_strategy={strategy!r})"


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
