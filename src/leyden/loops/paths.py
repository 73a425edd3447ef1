# SPDX-License-Identifier: Apache-2.0
"""The ways to train a batch other than the straight one: by hand, inside a closure, one call for each optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from leyden.errors import MisconfigurationException
from leyden.loops import batches
from leyden.loops.optimize import Optimization, learn
from leyden.loops.profiled import measured
from leyden.loops.session import Session
from leyden.optim import needs_closure
from leyden.tree import parameters_of


def choose(session: Session, straight: Callable[..., Any]) -> tuple[Callable[..., Any], int]:
    """Choose, once for a fit, how its batches are trained; return that and how many arguments ``training_step`` takes."""
    step, hooks = session.module.training_step, session.hooks
    train = straight
    if not session.module.automatic_optimization:
        train = manual_batch
    elif batches.takes(step, "optimizer_idx"):
        train = indexed_batch
    elif hooks.optimizer_step or any(needs_closure(optimizer) for optimizer in session.strategy.optimizers):
        train = closure_batch
    draws = batches.takes(step, "dataloader_iter")
    if session.config.cuda_graphs:
        from leyden.loops.speed.graphs import graphed  # noqa: PLC0415  # only runs that ask for graphs need it

        why = None if train is straight else _WHY_NOT[train]
        train = graphed(session, train, "training_step takes dataloader_iter" if draws else why)
    if any(getattr(callback, "adds_epoch", False) for callback in session.trainer.callbacks):
        train = partial(forward_or, train)
    train = measured(train, session.profiler, "run_training_batch")
    if not draws:
        return train, batches.positional(step)
    for name in ("on_train_batch_start", "on_train_batch_end"):
        setattr(hooks, name, getattr(hooks, name).wrapped(_with_drawn_batch))
    return partial(drawn_batch, train), 1


def _with_drawn_batch(call: Callable[..., Any]) -> Callable[..., Any]:
    """Let a hook see the batch that the step drew last, in place of the iterator that the loop goes by."""

    def with_batch(*args: Any) -> Any:
        return call(*args[:-2], args[-2].batch, args[-1])

    return with_batch


def drawn_batch(
    train: Callable[..., Any], session: Session, opt: Optimization, args: tuple[Any, ...], *rest: Any
) -> Any:
    """A step that takes ``dataloader_iter`` and draws its batches itself; it may draw once too often at the end."""
    try:
        return train(session, opt, args, *rest)
    except StopIteration:
        if not args[0].done:
            raise
        return None


def forward_or(train: Callable[..., Any], session: Session, opt: Optimization, *rest: Any) -> Any:
    """Train a batch, unless batches only go forward now: then run ``training_step`` and learn nothing from it.

    The last batch of such an epoch counts as an update, so that what goes by updates, as saving does, sees that the model has
    changed.
    """
    loop, (args, batch_idx, first, *_) = session.trainer.fit_loop, rest
    if not loop.skip_backward or not opt.automatic:
        return train(session, opt, *rest)
    loop.steps = False
    output = session.strategy.training_step(*args)
    if first:
        opt.zero_grad(batch_idx)
    loop.steps = loop.last
    for index, optimizer in enumerate(opt.optimizers if loop.last else ()):
        opt.hooks.on_before_optimizer_step(optimizer)
        opt.count(index)
    return output


def manual_batch(
    session: Session, opt: Optimization, args: tuple[Any, ...], batch_idx: int, first: bool, steps: bool, divisor: int
) -> Any:
    """Manual optimization: ``training_step`` does it all."""
    output = session.strategy.training_step(*args)
    if output is not None and not isinstance(output, (Tensor, Mapping)):
        raise MisconfigurationException(
            f"training_step() returned {type(output).__name__}; under manual optimization it must return a tensor, a dict"
            " or None."
        )
    return output


class Evaluation:
    """The training step of one batch and its gradients, as closures that an optimizer may call again and again."""

    def __init__(
        self,
        session: Session,
        opt: Optimization,
        args: tuple[Any, ...],
        divisor: int,
        clear: Callable[[], None] | None,
    ) -> None:
        self.session, self.opt, self.args, self.divisor, self.clear = session, opt, args, divisor, clear
        self.output: Any = None
        self.loss: Any = None
        self.runs = 0

    def run(self) -> None:
        """Forward, clear the gradients at the beginning of a window, backward."""
        opt, store = self.opt, self.session.results.train
        if self.runs and self.clear is None:
            raise MisconfigurationException(
                "The optimizer called its closure more than once for a step, but the gradients hold those of earlier"
                " batches too, which it cannot compute again. Use Trainer(accumulate_grad_batches=1) with this optimizer"
                " (and keep_global_batch=False, where fewer processes go on with a run)."
            )
        self.runs += 1
        if self.clear is not None:
            opt.window_weight, opt.window_mixes = None, False
        with torch.enable_grad():
            outer, store.hook = store.hook, "training_step"
            self.output = self.session.strategy.training_step(*self.args)
            store.hook = outer
            self.loss = learn(opt, self.output, self.divisor, self.clear)

    def closure(self, index: int) -> Callable[[], Any]:
        """The closure for optimizer ``index``. Gradients that are there already are not computed once more."""
        there = self.runs > 0 or index > 0
        searches = isinstance(self.opt.optimizers[index], torch.optim.LBFGS)

        def evaluate() -> Any:
            nonlocal there
            if not (there and self.runs):
                self.run()
            there = False
            loss = self.loss[index] if isinstance(self.loss, list) else self.loss
            if loss is None and searches:
                raise MisconfigurationException(
                    "LBFGS needs a loss each time that it evaluates the batch, but training_step() returned None, which"
                    " skips it. Return a loss, or use another optimizer."
                )
            return loss

        return evaluate


def closure_batch(
    session: Session, opt: Optimization, args: tuple[Any, ...], batch_idx: int, first: bool, steps: bool, divisor: int
) -> Any:
    """The training step runs inside ``optimizer.step``: for LBFGS, others' optimizers, an overridden ``optimizer_step``.

    With several optimizers the first one's closure makes the gradients that all of them step on.
    """
    evaluation = Evaluation(session, opt, args, divisor, partial(opt.zero_grad, batch_idx) if first else None)
    if not steps:
        evaluation.run()
        return evaluation.output
    for index in range(len(opt.optimizers)):
        _step(session, opt, index, batch_idx, evaluation)
    opt.end_window()
    return evaluation.output


def indexed_batch(
    session: Session, opt: Optimization, args: tuple[Any, ...], batch_idx: int, first: bool, steps: bool, divisor: int
) -> Any:
    """``training_step(batch, batch_idx, optimizer_idx)``: one call for each optimizer, which alone requires gradients."""
    outputs: Any = None
    weights = opt.window_weights
    for index, optimizer in enumerate(session.strategy.lightning_optimizers):
        clear = partial(opt.zero_grad_of, opt.optimizers[index], batch_idx) if first else None
        evaluation = Evaluation(session, opt, (*args[:2], index), divisor, clear)
        opt.window_weight, opt.window_mixes = weights.pop(index, (None, False))
        with optimizer.toggle_model():
            evaluation.run()
            if evaluation.loss is not None:
                outputs = evaluation.output
            if steps and any(p.grad is not None for p in parameters_of(optimizer)):
                _step(session, opt, index, batch_idx, evaluation)
        if not steps:
            weights[index] = opt.window_weight, opt.window_mixes
    if steps:
        opt.end_window()
    return outputs


def _step(session: Session, opt: Optimization, index: int, batch_idx: int, evaluation: Evaluation) -> None:
    """Let optimizer ``index`` step, in the module's own way where it has one."""
    optimizer, closure = session.strategy.lightning_optimizers[index], evaluation.closure(index)
    if not session.hooks.optimizer_step:
        optimizer.step(closure)
        return
    # counted afterwards, whatever the override does: it sees the count from before, as a warm-up expects
    opt.counts = False
    session.hooks.optimizer_step(session.trainer.current_epoch, batch_idx, optimizer, closure)
    opt.counts = True
    if not evaluation.runs:
        raise MisconfigurationException(
            f"{type(session.module).__name__}.optimizer_step() did not run its optimizer_closure, so there was no training"
            " step. Call optimizer.step(closure=optimizer_closure), or optimizer_closure() where there is no step."
        )
    opt.count(index)


_WHY_NOT: dict[Callable[..., Any], str] = {
    manual_batch: "optimization is manual",
    indexed_batch: "training_step takes optimizer_idx",
    closure_batch: "an optimizer runs training_step inside its own step, or the module overrides optimizer_step",
}
"""Why a way to train cannot be captured as a CUDA graph."""
