# SPDX-License-Identifier: Apache-2.0
"""The formulas of a plan: for each strategy what a device keeps of a module, and what it sends for an update."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from leyden.errors import MisconfigurationException
from leyden.loops.studies.footprint import Calls, Footprint, Piece
from leyden.strategies import units

_FIRST_BUCKET, _BUCKET = 1 << 20, 25 << 20
KEPT = ("weights", "gradients", "optimizer")
"""What a device has of a module between two updates."""


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
        row["total"] = sum(sizes[key] for key in KEPT) + max((held or 0) + row["transit"], update)
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
        if found.by_hand:
            count = len(found.optimizers)
            traffic.add("all_gather", 0, count, self.world)  # whether anybody has a gradient of a parameter
            traffic.add("all_reduce", sizes["gradients"], count, self.world)
        else:
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
            more["host"] = sum(sizes[key] for key in KEPT) - self.found.buffers
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
            self._bring_together(words, traffic, size)
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

    def _bring_together(self, words: dict[str, Any], traffic: Traffic, size: int) -> None:
        """Add the weights of layers that are brought together where these run."""
        for piece in self.pieces:
            owner = _brought_together(piece, words, size)
            if owner is not None:
                calls = self.found.layers.get(owner, Calls()).count * self.windows
                traffic.add("all_gather", piece.size * calls, calls, size)

    def _impossible(self, name: str, reason: str) -> dict[str, Any]:
        row = self._row(name, "", dict.fromkeys((*KEPT, "update"), 0), Traffic())
        return {**row, "write": "", "reason": reason, "total": 0}


def _word(style: Any) -> str:
    """How a layer is split, in a word; torch's own styles have the class for it."""
    return style if isinstance(style, str) else type(style).__name__.removesuffix("Parallel").lower()


def _brought_together(piece: Piece, words: dict[str, Any], size: int) -> str | None:
    """The layer that brings this parameter together from all devices where it runs; None if none does."""
    if not piece.shape or piece.shape[0] % size:
        return None
    gathers = (name for name, style in words.items() if _word(style) == "gather")
    return next((name for name in gathers if piece.name.startswith(f"{name}.")), None)


def _split(piece: Piece, words: dict[str, Any], module: nn.Module, size: int) -> Piece:
    if _brought_together(piece, words, size) is not None:
        return piece.split(0, size)
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
