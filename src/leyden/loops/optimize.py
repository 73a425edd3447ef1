# SPDX-License-Identifier: Apache-2.0
"""Zero grad, backward, clipping and the optimizer step, each with its hooks: for automatic and manual optimization."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from leyden.errors import MisconfigurationException
from leyden.hooks import is_written
from leyden.loops.session import Session
from leyden.module import LightningModule


class Optimization:
    """The verbs of one fit. Made after ``configure_optimizers``, dropped with the session."""

    def __init__(self, session: Session) -> None:
        self.hooks, self.strategy, self.progress = session.hooks, session.strategy, session.progress
        self.precision = session.strategy.precision
        self.trainer, self.module = session.trainer, session.module
        self.automatic = session.module.automatic_optimization
        self.optimizers: list[Optimizer] = session.strategy.optimizers
        if len(self.progress.optimizer_steps) != len(self.optimizers):
            self.progress.optimizer_steps = [0] * len(self.optimizers)
        self._sums_optimizers = session.config.rule("global_step") == "optimizer steps"
        self._own_clipping = any(
            is_written(session.module, name, LightningModule)
            for name in ("configure_gradient_clipping", "clip_gradients")
        )
        self.stepped = False
        """Whether the model was updated since the current batch began."""
        self.window_weight: Any = None
        """Sum of the weights that the batches of this window declared; None if they declared none."""
        self.rescale: float = 1.0
        """Factor for the gradients of a window that turned out shorter than its divisor."""

    def zero_grad(self, batch_idx: int) -> None:
        """Clear the gradients of all optimizers, with hooks."""
        for optimizer in self.optimizers:
            self.zero_grad_of(optimizer, batch_idx)

    def zero_grad_of(self, optimizer: Optimizer, batch_idx: int) -> None:
        """Clear the gradients of one optimizer, with hooks."""
        hooks = self.hooks
        if hooks.on_before_zero_grad:
            hooks.on_before_zero_grad(optimizer)
        if hooks.optimizer_zero_grad:
            hooks.optimizer_zero_grad(self.trainer.current_epoch, batch_idx, optimizer)
        elif type(optimizer).zero_grad is Optimizer.zero_grad and "zero_grad" not in optimizer.__dict__:
            # what torch's zero_grad does, less the profiler range around it, which costs a tenth of a tiny step
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        else:
            optimizer.zero_grad()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients, with hooks; the loss is scaled where the precision says so."""
        hooks = self.hooks
        if hooks.on_before_backward or hooks.backward:
            loss = self.precision.scale(loss)
            hooks.on_before_backward(loss)
            if hooks.backward:
                hooks.backward(loss, *args, **kwargs)
            else:
                loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]
        else:
            self.strategy.backward(loss, *args, **kwargs)
        if hooks.on_after_backward:
            hooks.on_after_backward()

    def update(self) -> None:
        """Step all optimizers on the gradients that are there, with hooks and clipping."""
        for index, optimizer in enumerate(self.optimizers):
            self.before_step(optimizer)
            self.strategy.optimizer_step(optimizer)
            self.count(index)
        self.window_weight, self.rescale = None, 1.0

    def step_with_closure(self, optimizer: Optimizer, closure: Callable[[], Any] | None, **kwargs: Any) -> Any:
        """What ``LightningOptimizer.step`` does: run the closure, the hooks, and the real step."""

        def whole() -> Any:
            result = closure() if closure is not None else None
            self.before_step(optimizer)
            return result

        if closure is None:
            self.before_step(optimizer)
            result = self.strategy.optimizer_step(optimizer, None, **kwargs)
        else:
            result = self.strategy.optimizer_step(optimizer, whole, **kwargs)
        self.count(next(i for i, known in enumerate(self.optimizers) if known is optimizer))
        return result

    def before_step(self, optimizer: Optimizer) -> None:
        """Everything between the gradients and the step: unscale, normalise, hooks, clip."""
        self.precision.unscale(optimizer)
        if self.window_weight is not None or self.rescale != 1.0:
            factor = self.rescale if self.window_weight is None else 1.0 / self.window_weight
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            if grads:
                torch._foreach_mul_(grads, factor)
        if self.hooks.on_before_optimizer_step:
            self.hooks.on_before_optimizer_step(optimizer)
        if self.automatic:
            config = self.trainer.config
            value, algorithm = config.gradient_clip_val, config.gradient_clip_algorithm
            if self.hooks.configure_gradient_clipping:
                self.hooks.configure_gradient_clipping(optimizer, value, algorithm)
            elif self._own_clipping:
                self.module.configure_gradient_clipping(optimizer, value, algorithm)
            elif value:
                self.strategy.clip_gradients(optimizer, value, algorithm or "norm")

    def count(self, index: int) -> None:
        """Count a step of optimizer ``index``, unless the precision skipped it for its gradients."""
        if self.precision.skipped_step:
            return
        progress = self.progress
        progress.optimizer_steps[index] += 1
        if self._sums_optimizers or not self.stepped:
            progress.global_step += 1
        self.stepped = True

    def state_dict(self) -> dict[str, Any]:
        """Return the gradients of a window of accumulation that is open, and the weight that was declared for them."""
        gradients = {name: p.grad for name, p in self.module.named_parameters() if p.grad is not None}
        return {"gradients": gradients, "weight": self.window_weight}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        for name, parameter in self.module.named_parameters():
            gradient = state["gradients"].get(name)
            if gradient is not None and gradient.shape == parameter.shape:
                parameter.grad = gradient.to(parameter.device, parameter.dtype)
        self.window_weight = state["weight"]


def read_loss(output: Any) -> Any:
    """Return the loss (or the list of losses) in what ``training_step`` returned; None to skip the batch.

    Raises:
        MisconfigurationException: for anything but a tensor, a mapping with ``"loss"``, or None.
    """
    if isinstance(output, Tensor) or output is None:
        return output
    if isinstance(output, Mapping):
        if "loss" in output:
            return output["loss"]
        several = [key for key in output if isinstance(key, str) and key.startswith("loss_")]
        if several:
            return [output[key] for key in several]
        raise MisconfigurationException(
            f"training_step() returned a dict without the key 'loss'; its keys are {list(output)}. Return the loss under"
            " 'loss', or set self.automatic_optimization = False."
        )
    raise MisconfigurationException(
        f"training_step() returned {type(output).__name__} {str(output)[:80]!r}; it must return the loss as a tensor, a"
        " dict with the key 'loss', or None to skip the batch."
    )


def detached(output: Any) -> Any:
    """What ``on_train_batch_end`` gets: a dict with the detached loss; empty for a batch that was skipped."""
    if isinstance(output, Tensor):
        return {"loss": output.detach()}
    if isinstance(output, Mapping):
        return {
            key: value.detach() if key == "loss" and isinstance(value, Tensor) else value
            for key, value in output.items()
        }
    return {}


def check_loss(loss: Any, custom_backward: bool) -> None:
    """Explain why backward cannot run on ``loss``; called once it is known to be wrong.

    Raises:
        MisconfigurationException: always, unless the module has its own backward and the loss is a tensor.
    """
    if not isinstance(loss, Tensor):
        raise MisconfigurationException(
            f"training_step() returned a loss of type {type(loss).__name__} ({loss!r}); it must be a tensor. A loss read"
            " with .item() has no gradients."
        )
    if custom_backward:
        return
    if loss.numel() != 1:
        raise MisconfigurationException(
            f"training_step() returned a loss of shape {tuple(loss.shape)}; it must be a scalar. Did you mean"
            " loss.mean()?"
        )
    raise MisconfigurationException(
        "training_step() returned a loss that does not require grad: no parameter that requires gradients took part in"
        " it, or it was detached, or computed under torch.no_grad()."
    )


def step_losses(opt: Optimization, losses: Sequence[Tensor], batch_idx: int, divisor: int, first: bool) -> None:
    """One loss for each optimizer: each backward reaches only the parameters of its own optimizer."""
    if len(losses) != len(opt.optimizers):
        raise MisconfigurationException(
            f"training_step() returned {len(losses)} losses for {len(opt.optimizers)} optimizers; return one loss for"
            " all, or one for each."
        )
    if first:
        opt.zero_grad(batch_idx)
    for index, (optimizer, loss) in enumerate(zip(opt.optimizers, losses, strict=True)):
        own = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        # the losses may share a part of the graph, which must outlive all but the last backward
        opt.backward(loss / divisor if divisor > 1 else loss, inputs=own, retain_graph=index < len(losses) - 1)


def weighted(opt: Optimization, output: Any, loss: Tensor, divisor: int) -> Any:
    """Normalise a loss over its window: by the weight that the step declared, else by the number of batches.

    A step declares a weight by returning ``{"loss": mean, "num_items": n}``: the gradients of the window are then those
    of the mean over all its items, however they are split.
    """
    if divisor == 1 and opt.window_weight is None:
        return loss
    weight = output.get("num_items") if isinstance(output, Mapping) else None
    if weight is not None:
        opt.window_weight = weight if opt.window_weight is None else opt.window_weight + weight
        return loss * weight
    return loss / divisor
