# SPDX-License-Identifier: Apache-2.0
"""Lets a module of 2019 run in the loops of today: adapters on the instance, for the length of a run."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from leyden.errors import MisconfigurationException
from leyden.hooks import is_written
from leyden.module_hooks import DataHooks, ModelHooks
from leyden.results import to_floats
from leyden.types import TrainerFn
from leyden.vintage.tables import HOOKS

_NOTHING = object()
_MEGABYTE = 2**20


class Adapters:
    """Functions that stand in for methods of one module, until ``remove``.

    Args:
        module: The module.
        base: The class that has the names of 2019 as no-ops.
    """

    def __init__(self, module: Any, base: type) -> None:
        self.module, self.base = module, base
        self.before: dict[str, Any] = {}

    def written(self, name: str) -> bool:
        """Whether the module writes this name of 2019."""
        return is_written(self.module, name, self.base)

    def put(self, name: str, call: Callable[..., Any]) -> None:
        """Let ``call`` stand in for the method ``name``."""
        own = vars(self.module)
        self.before.setdefault(name, own.get(name, _NOTHING))
        own[name] = call
        own["_adapted"] = tuple(self.before)

    def at(self, name: str, call: Callable[..., Any]) -> None:
        """Let ``call`` run at the hook ``name``, ahead of what the module itself writes there."""
        theirs = getattr(self.module, name) if is_written(self.module, name, ModelHooks) else None

        def hook(*args: Any) -> Any:
            response = call(*args)
            if theirs is None:
                return response
            second = theirs(*args)
            return second if response is None else response

        self.put(name, hook)

    def remove(self) -> None:
        """Give the module back as it was."""
        own = vars(self.module)
        for name, value in self.before.items():
            if value is _NOTHING:
                own.pop(name, None)
            else:
                own[name] = value
        own.pop("_adapted", None)
        self.before = {}


class Around:
    """A step of the module, and what is done with what it returns.

    Args:
        step: The module's own.
        after: Gets what the step returned, and the arguments of the call; returns what the loop is to get.
    """

    def __init__(self, step: Callable[..., Any], after: Callable[[Any, tuple[Any, ...]], Any]) -> None:
        functools.update_wrapper(self, step)
        self.step, self.after = step, after

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.after(self.step(*args, **kwargs), args)


def adapt(session: Any, wishes: Any, base: type) -> Callable[[], None]:
    """Put the adapters on the module of ``session``, and on its rows; return what takes them away.

    Args:
        session: The parts of the run.
        wishes: What the arguments of the Trainer ask for; None if they are those of today.
        base: The class that has the names of 2019 as no-ops.
    """
    module, trainer = session.module, session.trainer
    adapters = Adapters(module, base)
    _hooks(adapters)
    if trainer.state.fn is TrainerFn.FITTING:
        _training(adapters, trainer)
        session.rows.amend = functools.partial(_amend, trainer, adapters)
        if wishes is not None and wishes.flush_every:
            adapters.at(
                "on_train_batch_start",
                functools.partial(_flush, session.progress, session.recorder, wishes.flush_every),
            )
    for kind in ("validation", "test"):
        _collect(adapters, kind)
    return adapters.remove


def _hooks(adapters: Adapters) -> None:
    for old, (new, count) in HOOKS.items():
        if adapters.written(old):
            call = _first(getattr(adapters.module, old), count)
            adapters.at(new, _but_for_sanity(adapters.module, call) if new.startswith("on_validation") else call)


def _first(call: Callable[..., Any], count: int) -> Callable[..., Any]:
    """Return ``call`` with only the first ``count`` arguments passed on."""
    return lambda *args: call(*args[:count])


def _but_for_sanity(module: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``call`` without the sanity check, which was no performance check in 2019."""
    return lambda *args: None if module.trainer.sanity_checking else call(*args)


# --------------------------------------------------------------------------------------------- training


def _training(adapters: Adapters, trainer: Any) -> None:
    module = adapters.module
    if adapters.written("tng_dataloader") and not is_written(module, "train_dataloader", DataHooks):
        adapters.put("train_dataloader", lambda: module.tng_dataloader())
    configure = module.configure_optimizers
    adapters.put("configure_optimizers", lambda: _once_an_epoch(configure()))
    step = module.training_step
    if trainer.barebones or not module.automatic_optimization:
        return

    def show(output: Any, _: tuple[Any, ...]) -> Any:
        loss = output
        if isinstance(output, Mapping):
            loss, shown = output.get("loss"), output.get("prog", {})
            if not isinstance(shown, Mapping):
                raise MisconfigurationException(
                    f"training_step() returned 'prog' as {type(shown).__name__}: it must be a dict of names and numbers."
                )
            module.log_dict(shown, prog_bar=True)
        if isinstance(loss, torch.Tensor) and loss.numel() == 1:
            module.log("tng_loss", loss, prog_bar=True)
        return output

    adapters.put("training_step", Around(step, show))


def _once_an_epoch(returned: Any) -> Any:
    """Say of each scheduler in (optimizers, schedulers) that it steps once an epoch, whatever it is."""
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], (list, tuple))):
        return returned
    optimizers, schedulers = returned
    plain = (Mapping, ReduceLROnPlateau)
    return optimizers, [s if isinstance(s, plain) else {"scheduler": s, "interval": "epoch"} for s in schedulers]


def _amend(trainer: Any, adapters: Adapters, row: dict[str, float]) -> Mapping[str, Any]:
    """Add the memory of the GPU to a row of training, and let the module change it."""
    if not trainer.training:
        return row
    module = adapters.module
    device = trainer.strategy.root_device
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        row[f"gpu_{device.index or 0}"] = (total - free) / _MEGABYTE
    logs: Any = row
    if adapters.written("update_tng_log_metrics"):
        logs = module.update_tng_log_metrics(row)
        if not isinstance(logs, Mapping):
            raise MisconfigurationException(
                f"{type(module).__name__}.update_tng_log_metrics() returned {type(logs).__name__}; it must return the"
                " row that is to be logged, as a dict."
            )
    if adapters.written("on_tng_metrics"):
        logs = dict(logs)
        module.on_tng_metrics(logs)
    return to_floats(logs)


def _flush(progress: Any, recorder: Any, every: int, *_: Any) -> None:
    # not the session: its hooks hold this function, and the two would keep each other alive
    if progress.batches and progress.batches % every == 0:
        recorder.flush()


# --------------------------------------------------------------------------------------------- validation, test


def _collect(adapters: Adapters, kind: str) -> None:
    """Give what the steps return to ``validation_end`` or ``test_end``, and log what that returns."""
    module = adapters.module
    step_is_written = is_written(module, f"{kind}_step", sys.modules["leyden.module"].LightningModule)  # a floor above
    if not adapters.written(f"{kind}_end") or not step_is_written:
        return
    step, end = getattr(module, f"{kind}_step"), getattr(module, f"{kind}_end")
    outputs: list[list[Any]] = []

    def collect(output: Any, args: tuple[Any, ...]) -> Any:
        index = args[2] if len(args) > 2 else 0
        while len(outputs) <= index:
            outputs.append([])
        outputs[index].append(output)
        return output

    def close() -> None:
        collected = list(outputs)
        outputs.clear()
        if not collected:
            return
        result = end(collected[0] if len(collected) == 1 else collected)
        if result is None:
            return
        if not isinstance(result, Mapping):
            raise MisconfigurationException(
                f"{type(module).__name__}.{kind}_end() returned {type(result).__name__}; it must return a dict of names and"
                " numbers, or None."
            )
        module.log_dict(result, prog_bar=True)

    adapters.put(f"{kind}_step", Around(step, collect))
    adapters.at(f"on_{kind}_epoch_start", outputs.clear)
    adapters.at(f"on_{kind}_epoch_end", close)
