# SPDX-License-Identifier: Apache-2.0
"""The ways to train a batch other than the straight one: by hand, inside a closure, one call for each optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from leyden.errors import MisconfigurationException
from leyden.loops import batches
from leyden.loops.optimize import Optimization, check_loss, read_loss, weighted
from leyden.loops.session import Session
from leyden.optim import LightningOptimizer, needs_closure


def choose(session: Session, straight: Callable[..., Any]) -> tuple[Callable[..., Any], int]:
    """Choose, once for a fit, how its batches are trained; return that and how many arguments ``training_step`` takes."""
    step = session.module.training_step
    train = straight
    if not session.module.automatic_optimization:
        train = manual_batch
    elif batches.takes(step, "optimizer_idx"):
        train = indexed_batch
    elif session.hooks.optimizer_step or any(needs_closure(optimizer) for optimizer in session.strategy.optimizers):
        train = closure_batch
    return train, batches.positional(step)


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


def closure_batch(
    session: Session, opt: Optimization, args: tuple[Any, ...], batch_idx: int, first: bool, steps: bool, divisor: int
) -> Any:
    """The training step runs inside ``optimizer.step``: for LBFGS, others' optimizers, an overridden ``optimizer_step``."""
    store, hooks = session.results.train, session.hooks
    outputs: list[Any] = [None]

    def closure() -> Any:
        with torch.enable_grad():
            outer, store.hook = store.hook, "training_step"
            output = outputs[0] = session.strategy.training_step(*args)
            store.hook = outer
            loss = read_loss(output)
            if loss is not None and (not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad):
                check_loss(loss, bool(hooks.backward))
            if first:
                opt.zero_grad(batch_idx)
            if loss is None:
                return None
            normalized = weighted(opt, output, loss, divisor)
            opt.backward(normalized)
            return loss.detach()

    if not steps:
        closure()
        return outputs[0]
    for index, optimizer in enumerate(session.strategy.lightning_optimizers):
        # with several optimizers the first one's closure makes the gradients that all of them step on
        run = closure if index == 0 else _no_closure
        if hooks.optimizer_step:
            hooks.optimizer_step(session.trainer.current_epoch, batch_idx, optimizer, run)
        else:
            optimizer.step(run)
    opt.window_weight, opt.rescale = None, 1.0
    return outputs[0]


def _no_closure() -> None:
    """Stands for the closure where the gradients are there already."""


def indexed_batch(
    session: Session, opt: Optimization, args: tuple[Any, ...], batch_idx: int, first: bool, steps: bool, divisor: int
) -> Any:
    """``training_step(batch, batch_idx, optimizer_idx)``: one call for each optimizer, which alone requires gradients."""
    outputs: Any = None
    for index, optimizer in enumerate(opt.optimizers):
        with LightningOptimizer(optimizer, opt.step_with_closure, opt.optimizers).toggle_model():
            output = session.strategy.training_step(*args[:2], index)
            loss = read_loss(output)
            if loss is None:
                continue
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                check_loss(loss, bool(session.hooks.backward))
            if first:
                opt.zero_grad_of(optimizer, batch_idx)
            opt.backward(loss / divisor if divisor > 1 else loss)
            outputs = output
            if steps:
                opt.before_step(optimizer)
                session.strategy.optimizer_step(optimizer)
                opt.count(index)
    if steps:
        opt.window_weight, opt.rescale = None, 1.0
    return outputs
