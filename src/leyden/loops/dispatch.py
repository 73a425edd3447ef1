# SPDX-License-Identifier: Apache-2.0
"""Binds, once for each run, every hook to the calls that somebody really wrote; a hook nobody wrote costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from leyden.callback import Callback
from leyden.datamodule import LightningDataModule
from leyden.hooks import HOOKS, is_written
from leyden.loops.profiled import measured
from leyden.module import LightningModule
from leyden.results import Results


class Calls(tuple[Callable[..., Any], ...]):
    """The bound calls of one hook, in their order. Calling it runs them all, under the hook's logging rules."""

    name: str
    results: Results

    def __call__(self, *args: Any) -> Any:
        """Run all calls with ``args``; return what the last one returned."""
        if not self:
            return None
        store = self.results.active
        if store is None:
            return [call(*args) for call in self][-1]
        # hooks nest (an optimizer step inside training_step): self.log must follow the outer one afterwards
        outer, store.hook = store.hook, self.name
        try:
            response = None
            for call in self:
                response = call(*args)
            return response
        finally:
            store.hook = outer

    def wrapped(self, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Calls:
        """Return the same calls, each as ``wrap`` returns it."""
        calls = Calls(wrap(call) for call in self)
        calls.name, calls.results = self.name, self.results
        return calls


class Hooks:
    """One attribute for each hook of the loops: a ``Calls``, empty if nobody wrote it."""

    on_fit_start: Calls
    on_fit_end: Calls
    on_sanity_check_start: Calls
    on_sanity_check_end: Calls
    on_train_start: Calls
    on_train_end: Calls
    on_train_epoch_start: Calls
    on_train_epoch_end: Calls
    on_train_batch_start: Calls
    on_train_batch_end: Calls
    on_validation_start: Calls
    on_validation_end: Calls
    on_validation_epoch_start: Calls
    on_validation_epoch_end: Calls
    on_validation_batch_start: Calls
    on_validation_batch_end: Calls
    on_test_start: Calls
    on_test_end: Calls
    on_test_epoch_start: Calls
    on_test_epoch_end: Calls
    on_test_batch_start: Calls
    on_test_batch_end: Calls
    on_predict_start: Calls
    on_predict_end: Calls
    on_predict_epoch_start: Calls
    on_predict_epoch_end: Calls
    on_predict_batch_start: Calls
    on_predict_batch_end: Calls
    on_before_zero_grad: Calls
    on_before_backward: Calls
    on_after_backward: Calls
    on_before_optimizer_step: Calls
    # hooks of the module alone: empty unless it overrides them
    optimizer_step: Calls
    optimizer_zero_grad: Calls
    backward: Calls
    configure_gradient_clipping: Calls
    lr_scheduler_step: Calls
    on_validation_model_zero_grad: Calls
    on_validation_model_eval: Calls
    on_validation_model_train: Calls
    on_test_model_eval: Calls
    on_test_model_train: Calls
    on_predict_model_eval: Calls
    on_predict_model_train: Calls
    # hooks of the data: of the data module if it writes them, else of the module
    on_before_batch_transfer: Calls
    transfer_batch_to_device: Calls
    on_after_batch_transfer: Calls


_DATA = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def bind(
    trainer: Any,
    module: LightningModule,
    datamodule: Any,
    callbacks: Iterable[Callback],
    results: Results,
    profiler: Any,
    meet: Callable[[], None] | None = None,
    strategy: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
) -> Hooks:
    """Make the ``Hooks`` of one run.

    Args:
        trainer: Passed to the callbacks' hooks.
        module: The user's module.
        datamodule: The data module, or None.
        callbacks: In the order in which they run.
        results: Where ``self.log`` stores.
        profiler: Measures each call if it is not None.
        meet: Runs at the end of a training epoch, before callbacks read its metrics; None where there is nobody to meet.
        strategy: The hooks that a strategy of the user's own has written, see ``strategies.verbs``.
    """
    hooks = Hooks()
    callbacks = list(callbacks)
    for hook in HOOKS:
        if hook.name not in Hooks.__annotations__:
            continue
        name = hook.name
        mine: list[Callable[..., Any]] = []
        if name in _DATA:
            for owner, base in ((datamodule, LightningDataModule), (module, LightningModule)):
                if owner is not None and is_written(owner, name, base):
                    mine = [measured(getattr(owner, name), profiler, f"[{base.__name__}]{type(owner).__name__}.{name}")]
                    break
            theirs: list[tuple[bool, Callable[..., Any]]] = []
        else:
            if "M" in hook.owners and is_written(module, name, LightningModule):
                mine = [measured(getattr(module, name), profiler, f"[LightningModule]{type(module).__name__}.{name}")]
            theirs = [
                (
                    bool(getattr(callback, "monitors", False)),
                    measured(
                        partial(getattr(callback, name), trainer, module),
                        profiler,
                        f"[Callback]{getattr(callback, 'state_key', type(callback).__name__)}.{name}",
                    ),
                )
                for callback in callbacks
                if "C" in hook.owners and is_written(callback, name, Callback) and not _unused(callback, name, trainer)
            ]
        if name == "on_train_epoch_end":
            # callbacks that read metrics come after the module, so that they see what it logs at the end of the epoch
            first = [call for late, call in theirs if not late] + mine + ([meet] if meet is not None else [])
            ordered = first + [call for late, call in theirs if late]
        else:
            ordered = [call for _, call in theirs] + mine
            if name in strategy:
                # what the last one of a batch's beginning returns counts
                ordered.insert(_place(name, len(ordered)), strategy[name])
        calls = Calls(ordered)
        calls.name, calls.results = name, results
        setattr(hooks, name, calls)
    return hooks


def _place(name: str, count: int) -> int:
    return 0 if name in ("on_before_backward", "on_train_batch_start") else count


def _unused(callback: Callback, name: str, trainer: Any) -> bool:
    """Whether the callback says that it does not need this hook in this run."""
    unused = getattr(callback, "unused_hooks", None)
    return unused is not None and name in unused(trainer)
