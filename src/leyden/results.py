# SPDX-License-Identifier: Apache-2.0
"""What ``self.log`` stores: one slot for each name and hook, reduced over steps, read back only when somebody asks.

A call stores a detached copy and returns: it waits for no device and runs no collective. Each of the two loops has its
own ``Store``; ``Results`` answers for the whole run (``callback_metrics``, ``logged_metrics``, ``progress_bar_metrics``).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from leyden.errors import MisconfigurationException, PossibleUserWarning, did_you_mean
from leyden.hooks import BY_NAME
from leyden.runtime.ranks import rank_zero_warn
from leyden.tree import batch_sizes
from leyden.types import MetricLike

REDUCTIONS: dict[Any, str] = {
    "mean": "mean", "avg": "mean", torch.mean: "mean",
    "sum": "sum", torch.sum: "sum", sum: "sum",
    "min": "min", torch.min: "min", min: "min",
    "max": "max", torch.max: "max", max: "max",
}  # fmt: skip
LOADER_SUFFIX = "/dataloader_idx_"
_RESUMED = "resumed"
"""Marks a slot that came with a checkpoint, until the first call of ``self.log`` that it belongs to."""


def _accumulator_dtype() -> torch.dtype:
    """The dtype in which values are kept: the default one, but never below 32 bits."""
    dtype = torch.get_default_dtype()
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


class Slot:
    """All that was logged under one name in one hook (and for one evaluation loader)."""

    __slots__ = (
        "batch_size", "epoch_name", "fresh", "last", "loader", "logger", "metric", "name", "on_epoch", "on_step",
        "prog_bar", "rank_zero_only", "reduction", "step_name", "synced", "total", "weight",
    )  # fmt: skip

    def __init__(
        self, name: str, prog_bar: bool, logger: bool, on_step: bool, on_epoch: bool, reduction: str, loader: int | None,
        suffix: bool, batch_size: int | None,
    ) -> None:  # fmt: skip
        tail = f"{LOADER_SUFFIX}{loader}" if suffix and loader is not None else ""
        both = on_step and on_epoch
        self.name = name + tail
        self.step_name = f"{name}_step{tail}" if both else self.name
        self.epoch_name = f"{name}_epoch{tail}" if both else self.name
        self.prog_bar, self.logger, self.on_step, self.on_epoch = prog_bar, logger, on_step, on_epoch
        self.reduction, self.loader, self.batch_size = reduction, loader, batch_size
        self.metric: Any = None
        self.synced = self.rank_zero_only = False
        self.reset()

    def reset(self) -> None:
        """Forget everything that was logged."""
        self.fresh = False
        self.last: Any = None
        self.total: Tensor | None = None
        self.weight: Any = 0
        if self.metric is not None:
            self.metric.reset()

    def add(self, value: Tensor, weight: int) -> None:
        """Take ``value`` (0-d, detached) into the value of the epoch; ``weight`` samples stand behind it."""
        if not value.is_floating_point() or value.dtype not in (torch.float32, torch.float64):
            value = value.to(_accumulator_dtype())
        if self.reduction == "mean":
            value = value * weight
            self.weight = self.weight + weight
        total = self.total
        if total is None:
            # start from a zero of the accumulator's dtype, so that the sum is promoted like any later one
            self.total = value.to(torch.promote_types(value.dtype, _accumulator_dtype()), copy=True)
        elif self.reduction in ("mean", "sum"):
            self.total = total + value
        else:
            self.total = (torch.minimum if self.reduction == "min" else torch.maximum)(total, value)

    def step_value(self) -> Tensor | None:
        """The value of the last step, as a tensor; None if there is none."""
        if self.metric is not None:
            # torchmetrics keeps the value of the last call there; another metric only knows its value so far
            cached = getattr(self.metric, "_forward_cache", self)
            return _as_tensor(self.metric.compute() if cached is self else cached)
        last = self.last
        if isinstance(last, Tensor):
            if last.dtype not in (torch.float32, torch.float64):
                last = last.to(_accumulator_dtype())
            return last
        # single: what is kept as a number was one, or was rounded to one, whatever is the default by now
        return None if last is None else torch.tensor(last, dtype=torch.float32, device="cpu")

    def epoch_value(self) -> Tensor | None:
        """The value of the epoch so far, as a tensor; None if nothing was logged."""
        if self.metric is not None:
            return _as_tensor(self.metric.compute())
        if self.total is None:
            return None
        if self.reduction != "mean":
            return self.total
        # an int tensor, not a number: dividing by a number multiplies by its reciprocal on some devices
        return self.total / torch.tensor(self.weight, device=self.total.device)

    def state_dict(self) -> dict[str, Any]:
        """Return what was logged in this epoch, and the arguments that it was logged with, as plain data."""
        # the graph of a value that was logged with one belongs to the run
        return {
            name: value.detach() if isinstance(value := getattr(self, name), Tensor) else value
            for name in self.__slots__
            if name != "metric"
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        for name in self.__slots__:
            if name in state:
                setattr(self, name, state[name])


def _as_tensor(value: Any) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return value if value is None else value.detach()
    if isinstance(value, Number):
        return torch.tensor(value, device="cpu")
    raise ValueError(
        f"The metric object that was logged gives {type(value).__name__} {value!r}: self.log can only show a single"
        " number. Log its parts by name (self.log_dict) instead."
    )


class Store:
    """The slots of one loop, and where the loop stands: which hook runs, which batch, which loader."""

    def __init__(self, training: bool) -> None:
        self.training = training
        self.slots: dict[tuple[Any, ...], Slot] = {}
        self.hook: str | None = None
        self.batch: Any = None
        self.passed_over = False
        """Whether this process has none of the batch that runs: of what it logs, none is of this step."""
        self.loader: int | None = None
        self.on_step = False
        """True from the first batch of an epoch (or loader) to its last: metrics are then those of the step."""
        self.collected: tuple[bool, int | None] | None = None
        """For which moment ``row`` holds what was logged; None when something was logged since."""
        self.row: dict[str, Tensor] = {}
        self._names: dict[tuple[str, int | None, str], tuple[Any, ...]] = {}
        self._batch_size: int | None = None

    def start_batch(self, batch: Any, loader: int | None = None) -> None:
        """A new batch begins; ``loader`` is its index where there are several evaluation loaders."""
        self.batch, self.loader, self.on_step, self._batch_size = batch, loader, True, None
        self.passed_over = batch is None

    def end_batch(self) -> None:
        """Let go of the batch."""
        self.batch = None

    def log(
        self, name: str, value: Any, prog_bar: bool, logger: bool | None, on_step: bool | None, on_epoch: bool | None,
        reduce_fx: Any, add_dataloader_idx: bool, batch_size: int | None, where: tuple[Any, ...],
    ) -> None:  # fmt: skip
        """Store one value; the hot path is one look-up, and a copy of the value.

        ``where`` holds the arguments that matter only to several devices, after ``enable_graph``.
        """
        # the arguments are the key: a call that was checked once is not checked again
        key = (self.hook, self.loader, name, prog_bar, logger, on_step, on_epoch, reduce_fx, add_dataloader_idx, where)
        slot = self.slots.get(key)
        if slot is None:
            slot = self._new_slot(key, value)
        if isinstance(value, Tensor):
            if value.ndim:
                value = _single(name, value)
            if not (slot.on_epoch or where[0]) and (number := _on_host(value)) is not None:
                value = number
            elif value.requires_grad and not where[0]:
                value = value.detach()
        elif slot.metric is not None:
            slot.metric, slot.fresh, self.collected = value, True, None
            return
        elif type(value) is float:
            # as a tensor of the dtype that is the default now, not when somebody reads it
            double = torch.get_default_dtype() is torch.float64
            value = torch.tensor(value, device="cpu") if double else ctypes.c_float(value).value
        else:
            value = torch.tensor(_plain(name, value), dtype=_accumulator_dtype(), device="cpu")
        slot.fresh = True
        self.collected = None
        if slot.on_epoch:
            tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float32, device="cpu")
            slot.add(tensor, self._size(slot, batch_size) if slot.reduction == "mean" else 1)
        if slot.on_step:
            # a copy: what the caller does to its tensor afterwards must not change what was logged
            slot.last = value.clone() if isinstance(value, Tensor) else value

    def _size(self, slot: Slot, batch_size: int | None) -> int:
        """How many samples stand behind a value: as given, else read off the batch, once for each batch."""
        if batch_size is not None:
            return int(batch_size)
        if self._batch_size is not None:
            return self._batch_size
        size = 1
        if self.batch is not None and self.on_step:
            sizes = iter(batch_sizes(self.batch))
            first = next(sizes, None)
            if first is None:
                raise MisconfigurationException(
                    f"self.log({slot.name!r}, ...): the epoch mean is weighted by the number of samples, which cannot be"
                    f" read off a batch of type {type(self.batch).__name__}. Say self.log({slot.name!r}, ...,"
                    " batch_size=n)."
                )
            other = next((s for s in sizes if s != first), None)
            if other is not None and not slot.batch_size:
                slot.batch_size = first  # said once for each metric
                rank_zero_warn(
                    f"self.log({slot.name!r}, ...): the batch holds tensors of different first dimensions ({first},"
                    f" {other}, …), so its number of samples is a guess: {first}. Say self.log({slot.name!r}, ...,"
                    " batch_size=n).",
                    category=PossibleUserWarning,
                )
            size = self._batch_size = first
        return size

    def _new_slot(self, key: tuple[Any, ...], value: Any) -> Slot:
        """Check a call of ``self.log`` that was not seen before, and make its slot."""
        hook, loader, name, prog_bar, logger, on_step, on_epoch, reduce_fx, add_idx, where = key
        if not isinstance(name, str):
            raise TypeError(f"self.log({name!r}, ...): the name must be a str, not {type(name).__name__}.")
        row = BY_NAME.get(hook or "")
        if row is None or row.logging is None:
            place = f"the hook {hook!r}" if hook else "this place, outside all hooks of the loops"
            raise MisconfigurationException(
                f"self.log({name!r}, ...) is not possible in {place}: its value would belong to no step or epoch."
                " Log in a step, a batch hook or an epoch hook, or call self.logger.log_metrics({...}) directly."
            )
        if LOADER_SUFFIX.strip("/") in name:
            raise MisconfigurationException(
                f"self.log({name!r}, ...): the name should not contain information about `dataloader_idx`:"
                f" it is added by itself."
            )
        rules = row.logging
        step = rules.on_step if on_step is None else bool(on_step)
        epoch = rules.on_epoch if on_epoch is None else bool(on_epoch)
        if not step and not epoch:
            raise MisconfigurationException(
                f"self.log({name!r}, on_step=False, on_epoch=False) would log nothing: set one of them to True, or leave"
                " them out."
            )
        if step and not rules.step_allowed:
            raise MisconfigurationException(
                f"self.log({name!r}, on_step=True) is not possible in {hook!r}, which belongs to no step: use"
                " on_epoch=True."
            )
        reduction = reduce_fx.lower() if isinstance(reduce_fx, str) else reduce_fx
        known = REDUCTIONS.get(reduction) if isinstance(reduction, (str, Callable)) else None  # type: ignore[arg-type]
        if known is None and not isinstance(value, MetricLike):
            raise MisconfigurationException(
                "Only `self.log(..., reduce_fx={min,max,mean,sum})` are supported: "
                f"self.log({name!r}, reduce_fx={reduce_fx!r}) is not valid: allowed are 'mean', 'sum', 'min', 'max' and"
                " their torch functions. Use a metric object for anything else."
                f"{did_you_mean(str(reduce_fx), ('mean', 'sum', 'min', 'max'))}"
            )
        place_key = (str(hook), loader if add_idx else None, name)
        known_key = self._names.get(place_key, key)
        if known_key[1] != loader:
            raise MisconfigurationException(
                f"self.log({name!r}, add_dataloader_idx=False) was called for the loaders {known_key[1]} and {loader}: the"
                " one would take the place of the other. Log under a name for each loader, or leave the argument out."
            )
        if known_key != key:
            raise MisconfigurationException(
                f"self.log({name!r}, ...) was called twice in `{hook}` with different arguments. Log under two names, or"
                " with the same arguments."
            )
        self._names[place_key] = key
        slot = Slot(name, prog_bar, logger is not False, step, epoch, known or "metric", loader, add_idx, None)
        slot.synced, slot.rank_zero_only = bool(where[1]), bool(where[4])
        if isinstance(value, MetricLike) and not isinstance(value, Tensor):
            slot.metric = value
        resumed = self.slots.pop((_RESUMED, str(hook), loader, name), None)
        if resumed is not None and resumed.reduction == slot.reduction and slot.metric is None:
            slot.load_state_dict({name: getattr(resumed, name) for name in ("fresh", "last", "total", "weight")})
        self.slots[key] = slot
        return slot

    def state_dict(self, metrics: Mapping[int, str]) -> dict[str, Any]:
        """Return what was logged since the last reset, as plain data; ``metrics`` names metric objects by their id."""
        logged = []
        for key, slot in self.slots.items():
            if slot.fresh and (slot.metric is None or id(slot.metric) in metrics):
                hook, loader, name = key[1:] if key[0] == _RESUMED else key[:3]
                metric = metrics.get(id(slot.metric))
                state = slot.state_dict()
                logged.append({"hook": hook, "loader": loader, "name": name, "slot": state, "metric": metric})
        return {"on_step": self.on_step, "logged": logged}

    def load_state_dict(self, state: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned: the next calls of ``self.log`` add to it."""
        self.on_step = bool(state["on_step"])
        for logged in state["logged"]:
            slot = Slot(logged["name"], False, True, True, True, "mean", None, False, None)
            slot.load_state_dict(logged["slot"])
            slot.metric = metrics.get(logged["metric"])
            self.slots[_RESUMED, logged["hook"], logged["loader"], logged["name"]] = slot
        self.collected = None

    def reset(self) -> None:
        """Forget all values; the slots and their checks stay."""
        for slot in self.slots.values():
            slot.reset()
        self.on_step, self.hook, self.batch, self.loader = False, None, None, None
        self.collected = None

    def clear(self) -> None:
        """Forget all values, and what ``self.log`` was called with: the next run may be another module's."""
        self.reset()
        self.slots, self._names = {}, {}


def _on_host(value: Tensor) -> float | None:
    """Return the number in a float32 tensor in host memory, None for any other tensor.

    Nothing is waited for, nothing is dispatched, and a number costs a tenth of what a copy of the tensor does.
    """
    if type(value) is not Tensor or not value.is_cpu or value.dtype is not torch.float32:
        return None
    if torch.compiler.is_dynamo_compiling() or value.is_neg():
        return None  # code of the user's that he compiles by himself has no memory, but a copy is part of its graph
    try:
        address = value.data_ptr()
    except RuntimeError:  # a tensor without memory, as inside torch.func
        return None
    return ctypes.c_float.from_address(address).value if address else None


def _single(name: str, value: Tensor) -> Tensor:
    if value.numel() != 1:
        raise ValueError(
            f"self.log({name!r}, ...) got a tensor of shape {tuple(value.shape)}; the tensor must have a single element."
            f" Did you mean self.log({name!r}, value.mean())?"
        )
    return value.reshape(())


def _plain(name: str, value: Any) -> float:
    """Turn any other number into a float; what is no number is an error."""
    if isinstance(value, Mapping):
        raise ValueError(
            f"self.log({name!r}, ...) got a dict, but `dict` values cannot be logged: log its entries with self.log_dict."
        )
    if isinstance(value, Number) or hasattr(value, "__float__"):
        return float(value)
    raise ValueError(
        f"`self.log({name}, {value})` was called, but `{type(value).__name__}` values cannot be logged: the value"
        f" is a {type(value).__name__}; it must be a number, a tensor with one"
        " element or a metric object."
    )


class Results:
    """The metrics of a run: ``callback`` (for monitors), ``logged`` (for loggers), ``bar`` (for the progress bar)."""

    def __init__(self) -> None:
        self.train = Store(training=True)
        self.eval = Store(training=False)
        self.active: Store | None = None
        self.callback: dict[str, Tensor] = {}
        self.logged: dict[str, Tensor] = {}
        self.bar: dict[str, Tensor] = {}
        self.across: Callable[[Slot], Tensor | None] | None = None
        """With several processes, what gives the value of an epoch on which all agree; None for one."""
        self.ignore = False
        """True while the sanity check runs: nothing that it logs is kept."""

    @contextmanager
    def inside(self, hook: str) -> Iterator[None]:
        """For the length of the block ``hook`` runs, and ``self.log`` follows its rules."""
        store = self.active
        if store is None:
            yield
            return
        outer, store.hook = store.hook, hook
        try:
            yield
        finally:
            store.hook = outer

    def collect(self) -> dict[str, Tensor]:
        """Bring the three views up to date from the active loop; return what belongs in a logger's row now."""
        store = self.active
        row: dict[str, Tensor] = {}
        if store is None:
            return row
        on_step, loader = store.on_step, store.loader
        if store.collected == (on_step, loader):
            return store.row  # nothing was logged since
        across = self.across
        monitored = self.callback if store.training or not on_step else None
        for slot in store.slots.values():
            if not slot.fresh or slot.loader != loader or not (slot.on_step if on_step else slot.on_epoch):
                continue
            value = slot.step_value() if on_step else across(slot) if across is not None else slot.epoch_value()
            if value is None:
                continue
            name = slot.step_name if on_step else slot.epoch_name
            if monitored is not None:
                monitored[slot.name] = monitored[name] = value
            if slot.logger:
                row[name] = value
            if slot.prog_bar:
                self.bar[name] = value
        self.logged.update(row)
        store.collected, store.row = (on_step, loader), row
        return row

    def clear(self) -> None:
        """Forget all metrics of earlier runs."""
        self.callback, self.logged, self.bar = {}, {}, {}
        self.train.clear()
        self.eval.clear()

    def state_dict(self, metrics: Mapping[int, str] | None = None) -> dict[str, Any]:
        """Return the three views and what was logged in this epoch of training, as plain data.

        ``metrics`` names the metric objects of the module by their id; what others have counted is left out.
        """
        self.collect()
        views = {name: dict(getattr(self, name)) for name in ("callback", "logged", "bar")}
        return {**views, "train": self.train.state_dict(metrics or {})}

    def load_state_dict(self, state: Mapping[str, Any], metrics: Mapping[str, Any] | None = None) -> None:
        """Go on from what ``state_dict`` returned; ``metrics`` are the metric objects of the module by their names."""
        for name in ("callback", "logged", "bar"):
            getattr(self, name).update(state[name])
        self.train.load_state_dict(state["train"], metrics or {})

    @contextmanager
    def aside(self) -> Iterator[None]:
        """For the length of the block, keep what is logged apart: the three views are afterwards what they were."""
        views = dict(self.callback), dict(self.logged), dict(self.bar)
        yield
        self.eval.clear()
        self.callback, self.logged, self.bar = views
        self.train.collected = None

    def to_cpu(self) -> None:
        """Bring the three views to host memory, so that they outlive the device."""
        for view in (self.callback, self.logged, self.bar):
            for name, value in view.items():
                view[name] = value.cpu()


def to_floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Read metrics back as python floats; this waits for the device."""
    return {name: value.item() if isinstance(value, Tensor) else float(value) for name, value in metrics.items()}
