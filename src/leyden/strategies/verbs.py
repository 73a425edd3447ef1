# SPDX-License-Identifier: Apache-2.0
"""Lightning's further verbs of a strategy: a subclass that overrides one of them is called where Lightning calls it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from leyden.precision import Precision
from leyden.tree import move_to


class Verbs:
    """What a user's own strategy may ask and override beyond the verbs that Leyden itself needs.

    What nobody overrides costs a run nothing: the loops ask ``is_own`` once for each run.
    """

    module: Any
    optimizers: list[Optimizer]
    precision: Precision
    root_device: Any
    _wrapped: Any = None
    brings: Callable[..., Any] | None = None

    handles_gradient_accumulation = False
    """Whether the strategy divides losses by itself; none of ours does."""
    lightning_restore_optimizer = True
    """Whether the states of optimizers are put back from a checkpoint."""

    # -- to ask

    @property
    def precision_plugin(self) -> Precision:
        """The number format."""
        return self.precision

    @precision_plugin.setter
    def precision_plugin(self, precision: Precision) -> None:
        self.precision = precision

    @property
    def accelerator(self) -> Any:
        """The kind of device of this process."""
        from leyden.runtime.devices import make_accelerator  # noqa: PLC0415  # few ask

        return make_accelerator(self.root_device.type)

    @property
    def model(self) -> Any:
        """What wraps the module, while it is wrapped; else the module."""
        return self.module if self._wrapped is None else self._wrapped

    @model.setter
    def model(self, model: nn.Module | None) -> None:
        self._wrapped = None if model is self.module else model

    # -- the life of a module

    def setup_environment(self) -> None:
        """Bring the processes together; runs when a run begins, before anything of the user's."""

    def model_to_device(self) -> None:
        """Bring the module to its device."""
        self.place()

    def place(self) -> None:
        """As ``model_to_device``; what the strategies of Leyden override."""

    def model_sharded_context(self) -> AbstractContextManager[Any]:
        """The context of ``configure_model``."""
        return nullcontext()

    def setup_optimizers(self, trainer: Any) -> None:
        """Runs when ``optimizers`` are made; an override may replace them by as many others."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights that go into a checkpoint."""
        return self.module_state_dict()

    def module_state_dict(self) -> dict[str, Any]:
        """As ``lightning_module_state_dict``; what the strategies of Leyden override."""
        raise NotImplementedError

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights of a checkpoint."""
        self.load_module_state_dict(checkpoint["state_dict"], strict, "the checkpoint")

    def load_module_state_dict(self, state: dict[str, Any], strict: bool, source: str) -> None:
        """As ``load_model_state_dict``; what the strategies of Leyden override."""
        raise NotImplementedError

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the states of all optimizers from a checkpoint."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            self.load_optimizer_state(optimizer, state)

    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """As ``load_optimizer_state_dict``, for one; what the strategies of Leyden override."""
        raise NotImplementedError

    # -- data

    def process_dataloader(self, dataloader: Any) -> Any:
        """Return what is iterated over in the place of a loader that is ready."""
        return dataloader

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Return the batch on ``device``, by the hooks of the module while a run lasts."""
        device = device or self.root_device
        return move_to(batch, device) if self.brings is None else self.brings(batch, device, dataloader_idx)

    # -- what happens in a run

    def on_train_start(self) -> None:
        """Training begins."""

    def on_train_end(self) -> None:
        """Training ends."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """A training step comes."""

    def on_validation_start(self) -> None:
        """A validation begins."""

    def on_validation_end(self) -> None:
        """A validation ends."""

    def on_test_start(self) -> None:
        """A test begins."""

    def on_test_end(self) -> None:
        """A test ends."""

    def on_predict_start(self) -> None:
        """A prediction begins."""

    def on_predict_end(self) -> None:
        """A prediction ends."""

    def on_exception(self, exception: BaseException) -> None:
        """``exception`` ends the run."""

    def post_training_step(self) -> None:
        """Runs after each training step, ahead of its backward."""

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Runs ahead of each backward of a training step."""

    def post_backward(self, closure_loss: Tensor) -> None:
        """Runs after each backward of a training step."""


HOOKS = (
    "on_train_start", "on_train_end", "on_train_batch_start", "on_validation_start", "on_validation_end", "on_test_start",
    "on_test_end", "on_predict_start", "on_predict_end",
)  # fmt: skip
"""The hooks of a strategy that are those of callbacks, too."""


def is_own(strategy: Any, name: str) -> bool:
    """Whether the verb ``name`` of a strategy was written by a user."""
    strategy = vars(strategy).get("_strategy", strategy)  # one that is profiled
    if name in vars(strategy):
        return True
    writer: type = next((cls for cls in type(strategy).__mro__ if name in vars(cls)), object)
    return writer is not object and not writer.__module__.startswith("leyden.")


def calls_of(strategy: Any) -> dict[str, Callable[..., Any]]:
    """Return the user's hooks of a strategy, by the hooks of the loops at which they run."""
    found: dict[str, Callable[..., Any]] = {name: getattr(strategy, name) for name in HOOKS if is_own(strategy, name)}
    if is_own(strategy, "pre_backward") or is_own(strategy, "post_backward"):
        losses: list[Tensor] = []

        def before(loss: Tensor) -> None:
            losses.append(loss)
            strategy.pre_backward(loss)

        def after() -> None:
            strategy.post_backward(losses.pop())

        found["on_before_backward"], found["on_after_backward"] = before, after
    return found


def follow_steps(strategy: Any) -> Callable[[], None] | None:
    """Let a user's ``post_training_step`` follow each step of a run; return what ends that, None if there is none."""
    if not is_own(strategy, "post_training_step"):
        return None
    step, own = strategy.training_step, vars(strategy).get("training_step")

    def followed(*args: Any) -> Any:
        output = step(*args)
        strategy.post_training_step()
        return output

    strategy.training_step = followed

    def leave() -> None:
        vars(strategy).pop("training_step", None)
        if own is not None:
            strategy.training_step = own

    return leave


def own_backward(strategy: Any) -> Callable[..., Any] | None:
    """Return a user's ``backward`` of a strategy, which may want the optimizer after the loss; None if there is none."""
    if not is_own(strategy, "backward"):
        return None
    call: Callable[..., Any] = strategy.backward
    if "optimizer" not in inspect.signature(call).parameters:
        return call
    return lambda loss, *args, **kwargs: call(loss, None, *args, **kwargs)


def replace_optimizers(strategy: Any, trainer: Any) -> None:
    """Let a user's ``setup_optimizers`` have its say, and go on with what it leaves in ``optimizers``."""
    held = strategy.optimizers
    strategy.setup_optimizers(trainer)
    left, strategy.optimizers = strategy.optimizers, held  # the loops hold that list
    strategy.exchange_optimizers([getattr(one, "optimizer", one) for one in left])
