# SPDX-License-Identifier: Apache-2.0
"""Zero grad, backward, clipping and the optimizer step, each with its hooks: for automatic and manual optimization."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import _profiler_enabled  # type: ignore[attr-defined]
from torch.optim import Optimizer

from leyden.errors import MisconfigurationException, PossibleUserWarning
from leyden.hooks import is_written
from leyden.loops import when
from leyden.loops.session import Session
from leyden.module import LightningModule
from leyden.runtime.ranks import rank_zero_warn
from leyden.strategies.verbs import is_own, own_backward
from leyden.tree import detach, parameters_of


class Optimization:
    """The verbs of one fit. Made after ``configure_optimizers``, dropped with the session."""

    def __init__(self, session: Session) -> None:
        self.hooks, self.strategy, self.progress = session.hooks, session.strategy, session.progress
        self.precision = session.strategy.precision
        self.trainer, self.module, self.store = session.trainer, session.module, session.results.train
        self.automatic = session.module.automatic_optimization
        self.optimizers: list[Optimizer] = session.strategy.optimizers
        if len(self.progress.optimizer_steps) != len(self.optimizers):
            self.progress.optimizer_steps = [0] * len(self.optimizers)
        self._sums_optimizers = session.config.rule("global_step") == "optimizer steps"
        self._own_clipping = any(
            is_written(session.module, name, LightningModule)
            for name in ("configure_gradient_clipping", "clip_gradients")
        )
        self.exchange: Callable[[Optimizer], None] | None = getattr(session.strategy, "exchange_gradients", None)
        """Averages, before a step, gradients that several processes have not averaged yet; None for one process."""
        self._join: Any = getattr(session.strategy, "join_backward", None)
        """Prepares a loss for its backward, where a strategy has to know of it."""
        self._averages = self.exchange
        if self.exchange is None and len(self.optimizers) == 1:
            # for once, and without a circle that would keep the module alive
            self.update = partial(_first_update, weakref.proxy(self))  # type: ignore[method-assign]
        self.share = 1.0
        """By how much a loss counts more because some ranks have no batch: all ranks over those that have one."""
        self.expects_none = False
        """Whether the loaders give None where this rank has no batch and others have."""
        self.stepped = 0
        """How many updates of the model were made since the current batch began."""
        self._leads = 0
        """The optimizer that stepped first in the current batch: each of its steps is an update of the model."""
        self.own_backward = session.hooks.backward[0] if session.hooks.backward else None
        self._closure = _nothing if is_own(session.strategy, "optimizer_step") else None
        """What a step of ``update`` is given: a strategy of the user's own may rely on a closure."""
        self._strategy_backward = own_backward(session.strategy)
        if session.strategy.precision.hooks_backward:
            self._strategy_backward = session.strategy.backward
        self.counts = True
        """Whether a step of an optimizer counts by itself; not inside the module's own ``optimizer_step``."""
        self.weighs = session.config.rule("short_window") == "actual"
        """Whether a batch may declare its weight in the window."""
        self.window_weight: Any = None
        """Sum of the weights that the batches of this window declared; None if they declared none."""
        self.window_mixes = False
        """Whether a batch of this window declared no weight."""
        self.window_weights: dict[int, tuple[Any, bool]] = {}
        """The two above for each optimizer, where each has a training step of its own."""
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
        elif (
            getattr(type(optimizer), "zero_grad", None) is Optimizer.zero_grad
            and "zero_grad" not in optimizer.__dict__
            and not _profiler_enabled()
        ):
            # what torch's zero_grad does, less the profiler range around it, which costs a tenth of a tiny step
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        else:
            optimizer.zero_grad()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients, with hooks; the loss is scaled where the precision says so."""
        hooks = self.hooks
        if self._strategy_backward is not None and self.own_backward is None:
            hooks.on_before_backward(loss)
            self._strategy_backward(loss, *args, **kwargs)
        elif hooks.on_before_backward or self.own_backward is not None:
            loss = self.precision.scale(loss)
            hooks.on_before_backward(loss)
            if self._join is not None:
                loss, kwargs = self._join(loss, kwargs)
            if self.own_backward is not None:
                outer, self.store.hook = self.store.hook, "backward"
                self.own_backward(loss, *args, **kwargs)
                self.store.hook = outer
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
            self.strategy.optimizer_step(optimizer, self._closure)
            self.count(index)
        self.window_weight, self.window_mixes, self.rescale = None, False, 1.0

    def end_window(self) -> None:
        """Forget what was known of the window of accumulation that has just ended."""
        self.window_weight, self.window_mixes, self.rescale = None, False, 1.0

    def step_with_closure(self, optimizer: Optimizer, closure: Callable[[], Any] | None, **kwargs: Any) -> Any:
        """What ``LightningOptimizer.step`` does: run the closure, the hooks, and the real step."""

        def whole() -> Any:
            result = closure() if closure is not None else None
            self.before_step(optimizer)
            # an optimizer that goes by the loss, as in a line search, is to do the same on all ranks
            goes_by_it = self.exchange is not None and isinstance(optimizer, torch.optim.LBFGS)
            return self.strategy.reduce(result) if goes_by_it else result

        if closure is None:
            self.before_step(optimizer)
            result = self.strategy.optimizer_step(optimizer, None, **kwargs)
        else:
            result = self.strategy.optimizer_step(optimizer, whole, **kwargs)
        if self.counts:
            self.count(next(i for i, known in enumerate(self.optimizers) if known is optimizer))
        return result

    def before_step(self, optimizer: Optimizer) -> None:
        """Everything between the gradients and the step: unscale, normalise, hooks, clip."""
        if self.exchange is not None:
            self.exchange(optimizer)
        self.precision.unscale(optimizer)
        if self.window_weight is not None or self.rescale != 1.0:
            factor = self.rescale if self.window_weight is None else _inverse(self.weight_of_all())
            self.strategy.scale_gradients(optimizer, factor)
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

    def weight_of_all(self) -> Any:
        """The weight that was declared for this window: with several processes, the mean over all."""
        if self.exchange is None:
            return self.window_weight
        return self.strategy.reduce(torch.as_tensor(self.window_weight, dtype=torch.float32, device=self.module.device))

    def count(self, index: int) -> None:
        """Count a step of optimizer ``index``, unless the precision skipped it for its gradients."""
        if self.precision.skipped_step:
            return
        progress = self.progress
        progress.optimizer_steps[index] += 1
        if not self.stepped:
            self._leads = index
        elif index != self._leads and not self._sums_optimizers:
            return  # the step of another optimizer belongs to the same update of the model
        self.stepped += 1
        progress.global_step += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the gradients of a window of accumulation that is open, and the weight that was declared for them."""
        return {
            "gradients": self.strategy.gradients(),
            "weight": self.window_weight,
            "weights": dict(self.window_weights),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self.strategy.load_gradients(state["gradients"])
        self.window_weight, self.window_weights = state["weight"], dict(state.get("weights", {}))

    def exchange_with_idle(self, optimizer: Optimizer) -> None:
        """Average gradients in a step in which some ranks have no batch, and do not know whether weights are declared."""
        assert self._averages is not None
        self._averages(optimizer)
        if self.strategy.reduce_boolean_decision(self.window_weight is not None, all=False):
            self.window_weight = 0.0 if self.window_weight is None else self.window_weight


def _nothing() -> None:
    """What is left of a batch when its optimizer steps: loss and gradients are there."""


def _first_update(opt: Optimization) -> None:
    """The first update of a fit of one process: say which parameters the loss has not reached; once, and then never."""
    del opt.update  # the method again
    given = {id(p) for one in opt.optimizers for p in parameters_of(one)}
    mine = [(name, p) for name, p in opt.module.named_parameters() if p.requires_grad and id(p) in given]
    unused = [name for name, p in mine if p.grad is None]
    if unused and len(unused) < len(mine):
        shown = ", ".join(unused[:8]) + (f" and {len(unused) - 8} more" if len(unused) > 8 else "")
        rank_zero_warn(
            f"These parameters of {type(opt.module).__name__} took no part in the loss of the first update:"
            f" {shown}. With several devices that is an error (strategy='ddp_find_unused_parameters_true' allows it)."
            " Let them take part, freeze them (requires_grad=False), or remove them.",
            category=PossibleUserWarning,
        )
    opt.update()


def no_batch(session: Session, loop: Any, batch_idx: int) -> Any:
    """Pass over a batch that is None: the others of its window, and those of other ranks, still count. Returns None."""
    opt: Optimization = session.optimization
    if not opt.expects_none:
        rank_zero_warn("The training loader gave None in place of a batch: training_step is not called for it.")
    if not opt.automatic:
        return None
    accumulate = session.trainer.batches_per_update
    first, several = batch_idx % accumulate == 0, session.strategy.world_size > 1
    if accumulate > 1:
        divisor_of(loop, session, batch_idx, loop.last)
    if first and several:
        opt.zero_grad(batch_idx)
    elif first:
        for optimizer in opt.optimizers:
            optimizer.zero_grad()
    if several:
        session.strategy.idle_step()
    if loop.steps and (several or not first):
        opt.update()
    return None


def _inverse(weight: Any) -> Any:
    """One over the weight of a window; 0 for a window without any items, whose gradients are 0 as well."""
    if isinstance(weight, Tensor):
        return torch.where(weight == 0, 0.0, 1.0 / weight)
    return 1.0 / weight if weight else 0.0


def read_loss(output: Any) -> Any:
    """Return the loss (or the list of losses) in what ``training_step`` returned; None to skip the batch.

    Raises:
        MisconfigurationException: for anything but a tensor, a list of tensors, a mapping with ``"loss"``, or None.
    """
    if isinstance(output, (Tensor, list, tuple)) or output is None:
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
            key: detach(value) if key == "loss" or str(key).startswith("loss_") else value
            for key, value in output.items()
        }
    return {"loss": detach(output)} if isinstance(output, (list, tuple)) else {}


def check_loss(loss: Any, custom_backward: bool) -> None:
    """Explain what is wrong with a loss on which backward cannot run; one that is right passes.

    Raises:
        MisconfigurationException: unless it is a scalar with a graph, or a tensor for the module's own backward.
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
    if not loss.requires_grad:
        raise MisconfigurationException(
            "training_step() returned a loss that does not require grad: no parameter that requires gradients took part"
            " in it, or it was detached, or computed under torch.no_grad()."
        )


def learn(opt: Optimization, output: Any, divisor: int, clear: Callable[[], None] | None) -> Any:
    """Compute the gradients of what ``training_step`` returned; return the detached loss, losses, or None.

    Args:
        opt: The verbs.
        output: What ``training_step`` returned.
        divisor: Number of batches in the window of accumulation.
        clear: Clears the gradients where the batch begins a window, else None.
    """
    loss = read_loss(output)
    if isinstance(loss, (list, tuple)):
        return step_losses(opt, output, loss, divisor, clear)
    if loss is not None:
        check_loss(loss, opt.own_backward is not None)
    if clear is not None:
        clear()
    if loss is None:
        return None
    opt.backward(weighted(opt, output, loss, divisor))
    return loss.detach()


def step_losses(
    opt: Optimization, output: Any, losses: Sequence[Any], divisor: int, clear: Callable[[], None] | None
) -> list[Tensor | None]:
    """One loss for each optimizer: each backward reaches only the parameters of its own optimizer. None skips one."""
    if len(losses) != len(opt.optimizers):
        raise MisconfigurationException(
            f"training_step() returned {len(losses)} losses for {len(opt.optimizers)} optimizers; return one loss for"
            " all, or one for each."
        )
    for loss in losses:
        if loss is not None:
            check_loss(loss, opt.own_backward is not None)
    if clear is not None:
        clear()
    weight = declared(opt, output, divisor)
    graphs = []
    for optimizer, loss in zip(opt.optimizers, losses, strict=True):
        own = [p for p in parameters_of(optimizer) if p.requires_grad]
        if loss is not None and own:
            graphs.append((loss * weight if weight is not None else loss / divisor if divisor > 1 else loss, own))
    while graphs:
        loss, own = graphs.pop(0)
        # the losses may share a part of the graph, which must outlive all but the last backward
        opt.backward(loss, inputs=own, retain_graph=bool(graphs))
    return [None if loss is None else loss.detach() for loss in losses]


def declared(opt: Optimization, output: Any, divisor: int) -> Any:
    """Return the weight that a step declared for its batch, and add it to that of the window; None if there is none.

    Raises:
        MisconfigurationException: when some batches of a window declare a weight and others do not.
    """
    if divisor == 1 and opt.window_weight is None and opt.exchange is None:
        return None  # a window of one batch, of one process: its weight would cancel
    weight = output.get("num_items") if opt.weighs and isinstance(output, Mapping) else None
    opt.window_mixes = opt.window_mixes or weight is None
    if opt.window_mixes and (weight is not None or opt.window_weight is not None):
        raise MisconfigurationException(
            "training_step() returned 'num_items' for some batches of a window of gradient accumulation and not for"
            " others, so their weights cannot be compared. Return it for every batch, or for none."
        )
    if weight is not None:
        opt.window_weight = weight if opt.window_weight is None else opt.window_weight + weight
    return weight


def weighted(opt: Optimization, output: Any, loss: Tensor, divisor: int) -> Any:
    """Normalise a loss over its window: by the weight that the step declared, else by the number of batches.

    A step declares a weight by returning ``{"loss": mean, "num_items": n}``: the gradients of the window are then those
    of the mean over all its items, however they are split.
    """
    weight = declared(opt, output, divisor)
    if weight is not None:
        return loss * weight
    if opt.share != 1.0:
        loss = loss * opt.share
    return loss / divisor if divisor > 1 else loss


def divisor_of(loop: Any, session: Session, batch_idx: int, last: bool) -> int:
    """By how much the loss of a batch is divided: the number of batches in its window of accumulation.

    Args:
        loop: The loop of the fit.
        session: The parts of the run.
        batch_idx: The index of the batch in its epoch.
        last: Whether the epoch ends with it.
    """
    accumulate = session.trainer.batches_per_update
    if session.config.rule("short_window") == "constant":
        return accumulate
    length = when.window_length(batch_idx, accumulate, loop.num_batches)
    actual = batch_idx % accumulate + 1
    if last and actual < length:
        # only now it is known that the window is short; the gradients are put right before the step
        session.optimization.rescale = length / actual
    return length
