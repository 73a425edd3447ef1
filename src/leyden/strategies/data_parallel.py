# SPDX-License-Identifier: Apache-2.0
"""One process and several devices: each batch is split, and each device computes a part of it with a copy of the module.

The way of 2019, for scripts of then. ``ddp`` is faster: it copies the module once, not for each batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from leyden.errors import MisconfigurationException
from leyden.precision import Precision
from leyden.results import REDUCTIONS
from leyden.runtime.world import joined
from leyden.strategies.base import Strategy
from leyden.tree import batch_sizes, move_to
from leyden.types import MetricLike

_ENDS = ("training_step_end", "validation_step_end", "test_step_end", "predict_step_end")


class DataParallelStrategy(Strategy):
    """Splits each batch over several devices of one machine, in one process; the numbers are those of one device.

    ::

        Trainer(accelerator="gpu", devices=2, strategy="dp")

    What the parts of a step return is put together: single numbers are averaged, weighted by the samples of each part;
    tensors with a dimension for the samples are joined. Where the module has ``training_step_end`` (``validation_step_end``,
    ``test_step_end``), it gets single numbers as a tensor with one entry for each part, and returns what the step returns.
    Values logged in a step are those of the whole batch. On GPUs the parts run at the same time in copies of the module,
    and what they set on themselves is lost, but for the buffers of the first; on the CPU they run one after the other.

    Args:
        parallel_devices: The devices; None takes the Trainer's.
        precision_plugin: The number format; None is the Trainer's.
        checkpoint_io: As in the base class.
    """

    strategy_name = "dp"
    calls = _ENDS

    def __init__(
        self,
        parallel_devices: list[torch.device] | None = None,
        precision_plugin: Precision | None = None,
        checkpoint_io: Any = None,
    ) -> None:
        super().__init__("cpu", precision_plugin, checkpoint_io)
        self.parallel_devices: Any = parallel_devices

    def assign(self, devices: list[torch.device], num_nodes: int) -> None:
        """Take the devices of this machine; the module lives on the first one.

        Raises:
            MisconfigurationException: for several machines, or several processes.
        """
        world = joined()
        if num_nodes > 1 or (world is not None and world.size > 1):
            what = (
                f"num_nodes={num_nodes}" if num_nodes > 1 or world is None else f"{world.size} processes were started"
            )
            raise MisconfigurationException(
                f"Trainer(strategy='dp'): it is one process on one machine, but {what}. Use strategy='ddp'."
            )
        self.parallel_devices = list(self.parallel_devices or devices)
        self._root_device = self.parallel_devices[0]

    @property
    def num_processes(self) -> int:
        """How many devices work on a batch; there is one process."""
        return len(self.parallel_devices)

    # ------------------------------------------------------------------ steps

    def training_step(self, *args: Any) -> Any:
        return self._in_parts("training_step", args)

    def validation_step(self, *args: Any) -> Any:
        return self._in_parts("validation_step", args)

    def test_step(self, *args: Any) -> Any:
        return self._in_parts("test_step", args)

    def predict_step(self, *args: Any) -> Any:
        return self._in_parts("predict_step", args)

    def _in_parts(self, name: str, args: tuple[Any, ...]) -> Any:
        module, (batch, *rest) = self.module, args
        if hasattr(batch, "turns"):
            raise MisconfigurationException(
                f"{type(module).__name__}.{name}() takes dataloader_iter, but strategy='dp' splits the batches. Let it take"
                " a batch, or use strategy='ddp'."
            )
        parts = split(batch, self.parallel_devices)
        step = getattr(module, name)
        # adapters of 2019 do something with what a step returns: they get it once for the whole batch
        inner, after = getattr(step, "step", step), getattr(step, "after", None)
        notes = [_Notes(part.size) for part in parts]
        results = module.results_of_run
        with self.precision.step_context(name):
            compute = self._on_gpus if self.root_device.type == "cuda" and len(parts) > 1 else self._on_host
            try:
                outputs = compute(inner, [(part.batch, *rest) for part in parts], notes)
            finally:
                module.log_into(results)
            if results is not None and results.active is not None:
                _log_together(notes, results.active, self.root_device)
            weights = [float(part.size) for part in parts]
            ending = getattr(module, f"{name}_end", None)
            if callable(ending):
                output = ending(together(outputs, weights, self.root_device, stack=True))
            else:
                output = together(outputs, weights, self.root_device)
        return output if after is None else after(output, args)

    def _on_host(self, step: Callable[..., Any], calls: list[tuple[Any, ...]], notes: list[_Notes]) -> list[Any]:
        """Run the parts one after the other; what the first one does to the buffers stays."""
        outputs = []
        for index, (call, note) in enumerate(zip(calls, notes, strict=True)):
            self.module.log_into(note)
            with _BuffersAside(self.module) if index else _Nothing():
                outputs.append(step(*call))
        return outputs

    def _on_gpus(self, step: Callable[..., Any], calls: list[tuple[Any, ...]], notes: list[_Notes]) -> list[Any]:
        """Run the parts at the same time, each in a copy of the module on its device."""
        from torch.nn import parallel  # noqa: PLC0415  # where there are several GPUs

        devices = self.parallel_devices[: len(calls)]
        copies = parallel.replicate(self.module, devices, detach=not torch.is_grad_enabled())
        for copied, note in zip(copies, notes, strict=True):
            copied.log_into(note)
        own = inspect.unwrap(step)
        function = getattr(own, "__func__", None)
        if function is None or getattr(own, "__self__", None) is not self.module:
            raise MisconfigurationException(
                f"strategy='dp' runs the steps in copies of the module, but {getattr(own, '__name__', own)!r} is no method of"
                f" {type(self.module).__name__}. Write it in the class, or use strategy='ddp'."
            )
        steps = [function.__get__(copied) for copied in copies]
        outputs: list[Any] = parallel.parallel_apply(steps, calls, devices=devices)
        return outputs


class _Part(NamedTuple):
    batch: Any
    size: int


def split(batch: Any, devices: Sequence[torch.device]) -> list[_Part]:
    """Return the parts of a batch, each on its device: as many samples in each, but for the last; fewer parts than devices
    where there are fewer samples.

    Split are tensors whose first dimension is that of the samples, and lists of as many plain items; all else goes to
    every device as it is.
    """
    count = next(iter(batch_sizes(batch)), 0)
    pieces = _chunks(batch, count, len(devices)) if count > 1 else None
    if pieces is None:
        return [_Part(move_to(batch, devices[0]), max(count, 1))]
    size = -(-count // len(devices))
    sizes = [min(size, count - start) for start in range(0, count, size)]
    return [
        _Part(move_to(piece, device), n) for piece, device, n in zip(pieces[: len(sizes)], devices, sizes, strict=False)
    ]


def _chunks(tree: Any, count: int, parts: int) -> list[Any] | None:
    """Return ``tree`` in parts, None if nothing in it can be split."""
    size = -(-count // parts)
    bounds = [(start, min(start + size, count)) for start in range(0, count, size)]
    if isinstance(tree, Tensor):
        return [tree[begin:end] for begin, end in bounds] if tree.ndim and tree.shape[0] == count else None
    if isinstance(tree, Mapping):
        whole = {key: _chunks(value, count, parts) for key, value in tree.items()}
        if all(value is None for value in whole.values()):
            return None
        kind: Any = type(tree) if type(tree) is dict else dict
        return [
            kind({key: tree[key] if value is None else value[index] for key, value in whole.items()})
            for index in range(len(bounds))
        ]
    if not isinstance(tree, (list, tuple)):
        return None
    if len(tree) == count and all(isinstance(item, (str, bytes, int, float, bool)) for item in tree):
        return [tree[begin:end] for begin, end in bounds]
    each = [_chunks(item, count, parts) for item in tree]
    if all(value is None for value in each):
        return None
    rows = [
        [item if value is None else value[index] for item, value in zip(tree, each, strict=True)]
        for index in range(len(bounds))
    ]
    return [type(tree)(*row) if hasattr(tree, "_fields") else type(tree)(row) for row in rows]


def together(outputs: Sequence[Any], weights: Sequence[float], device: torch.device, stack: bool = False) -> Any:
    """Put together what the parts returned.

    Args:
        outputs: Of each part; None is a part that wants to be left out.
        weights: The samples of each part, by which single numbers are averaged; ``num_items`` beside a loss takes their
            place for that loss, and is summed.
        device: Where the result is.
        stack: Give single numbers as a tensor with an entry for each part, instead of their mean.
    """
    there = [(output, weight) for output, weight in zip(outputs, weights, strict=True) if output is not None]
    if not there:
        return None
    values, weights = [output for output, _ in there], [weight for _, weight in there]
    first = values[0]
    if isinstance(first, Mapping):
        items, own = {}, [value.get("num_items") for value in values]
        for key in first:
            column = [value[key] for value in values]
            if key == "num_items":
                items[key] = sum(column[1:], column[0])
            elif key == "loss" and None not in own:
                items[key] = together(column, [float(n) for n in own if n is not None], device, stack)
            else:
                items[key] = together(column, weights, device, stack)
        return items
    if isinstance(first, Tensor):
        here = [value.to(device) for value in values]
        if first.ndim:
            return torch.cat(here)
        rows = torch.stack(here)
        if stack:
            return rows
        if len(here) == 1:
            return here[0]
        rows = rows if rows.is_floating_point() or rows.is_complex() else rows.float()
        share = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        return (rows * share.to(rows)).sum()
    if isinstance(first, float) or (isinstance(first, int) and not isinstance(first, bool)):
        return list(values) if stack else sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
    if isinstance(first, tuple) or (
        isinstance(first, list) and any(isinstance(item, (Tensor, Mapping)) for item in first)
    ):
        rows_ = [together(column, weights, device, stack) for column in zip(*values, strict=True)]
        return type(first)(*rows_) if hasattr(first, "_fields") else type(first)(rows_)
    if isinstance(first, list):
        return [item for value in values for item in value]
    return first if all(value is first or value == first for value in values[1:]) else values


class _Notes:
    """Stands for the results of a run while one part of a batch is computed: keeps what the part logs."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.active = self
        self.calls: dict[str, list[tuple[Any, ...]]] = {}

    def log(self, name: str, *arguments: Any) -> None:
        """Keep one call of ``self.log``."""
        self.calls.setdefault(name, []).append(arguments)


def _log_together(notes: Sequence[_Notes], store: Any, device: torch.device) -> None:
    """Log once, for the whole batch, what its parts have logged."""
    names = dict.fromkeys(name for note in notes for name in note.calls)
    for name in names:
        rounds = max(len(note.calls.get(name, ())) for note in notes)
        for index in range(rounds):
            mine = [(note.calls[name][index], note.size) for note in notes if len(note.calls.get(name, ())) > index]
            value, *rest = mine[0][0]
            reduce_fx, batch_size = rest[4], rest[6]
            if isinstance(value, MetricLike) and not isinstance(value, Tensor):
                if device.type == "cuda" and len(notes) > 1:
                    raise MisconfigurationException(
                        f"self.log({name!r}, <metric object>): with strategy='dp' each GPU has a copy of the metric, which"
                        " is dropped after the batch. Update it in training_step_end or validation_step_end, or use"
                        " strategy='ddp'."
                    )
                store.log(name, *mine[-1][0])
                continue
            values = [torch.as_tensor(call[0]).detach().to(device) for call, _ in mine]
            weights = [float(size if call[7] is None else call[7]) for call, size in mine]
            if batch_size is not None:
                rest[6] = int(sum(call[7] for call, _ in mine))
            store.log(name, _reduced(values, weights, reduce_fx), *rest)


def _reduced(values: list[Tensor], weights: list[float], reduce_fx: Any) -> Tensor:
    """One value for what the parts logged, by the reduction that the user has named; an unknown one is reported later."""
    kind = REDUCTIONS.get(reduce_fx.lower() if isinstance(reduce_fx, str) else reduce_fx, "mean")
    if len(values) == 1 or any(value.numel() != 1 for value in values):
        return values[0]
    rows = torch.stack([value.reshape(()) for value in values])
    if kind in ("sum", "min", "max"):
        found: Tensor = getattr(rows, kind)()
        return found
    share = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    rows = rows if rows.is_floating_point() else rows.float()
    return (rows * share.to(rows)).sum()


class _Nothing:
    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(self, *_: object) -> None:
        """Nothing to do."""


class _BuffersAside:
    """For the length of a block the module computes with copies of its buffers, as the copies on further GPUs do."""

    def __init__(self, module: nn.Module) -> None:
        self.kept = [
            (child, name, buffer) for child in module.modules() for name, buffer in child.named_buffers(recurse=False)
        ]

    def __enter__(self) -> None:
        for child, name, buffer in self.kept:
            setattr(child, name, buffer.clone())

    def __exit__(self, *_: object) -> None:
        for child, name, buffer in self.kept:
            setattr(child, name, buffer)
