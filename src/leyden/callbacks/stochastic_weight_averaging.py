# SPDX-License-Identifier: Apache-2.0
"""Stochastic weight averaging: the mean of the weights at the start of the last epochs, at a learning rate that stays high.

Izmailov, Podoprikhin, Garipov, Vetrov and Wilson, "Averaging Weights Leads to Wider Optima and Better Generalization",
UAI 2018.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import SWALR

from leyden.callback import Callback
from leyden.errors import MisconfigurationException
from leyden.optim import LRSchedulerConfig
from leyden.runtime.ranks import rank_zero_info, rank_zero_warn
from leyden.types import TrainerView

Average: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
_SHARDED = ("fsdp", "deepspeed", "model_parallel", "tensor_parallel")


class StochasticWeightAveraging(Callback):
    """Averages the weights at the start of each epoch from ``swa_epoch_start`` on, and gives the model the mean at the end.

    From that epoch on torch's ``SWALR`` takes the place of the learning-rate schedule. A model with batch norm gets one epoch
    more, in which it only goes forward, so that the statistics are those of the averaged weights; hooks, metrics and
    validation are as in any epoch. An average counts only if the fit comes to its last epoch; one that stops before it keeps
    its weights.

    Args:
        swa_lrs: Learning rate of all parameter groups, or one for each.
        swa_epoch_start: Epoch that is the first to be averaged, counted from 1; a float is a share of ``max_epochs``.
        annealing_epochs: In how many epochs the learning rate goes to ``swa_lrs``.
        annealing_strategy: ``"cos"`` or ``"linear"``.
        avg_fn: Given the average, the weights, and how many were averaged; returns the new average. None: all count the same.
        device: Where the average is kept; None is where the model is.

    Raises:
        MisconfigurationException: for an argument that cannot be, more than one optimizer or schedule, a share of
            ``max_epochs=-1``, or a model whose weights are spread over several devices.
    """

    adds_epoch = True
    """There may be an epoch in which the model only goes forward."""

    def __init__(
        self,
        swa_lrs: float | list[float],
        swa_epoch_start: int | float = 0.8,
        annealing_epochs: int = 10,
        annealing_strategy: Literal["cos", "linear"] = "cos",
        avg_fn: Average | None = None,
        device: torch.device | str | None = torch.device("cpu"),  # noqa: B008  # a constant, and Lightning's default
    ) -> None:
        if isinstance(swa_epoch_start, int) and swa_epoch_start < 1:
            raise _bad("swa_epoch_start", swa_epoch_start, "an int of at least 1, or a float from 0 to 1")
        if isinstance(swa_epoch_start, float) and not 0 <= swa_epoch_start <= 1:
            raise _bad("swa_epoch_start", swa_epoch_start, "an int of at least 1, or a float from 0 to 1")
        rates: list[Any] = swa_lrs if isinstance(swa_lrs, list) else [swa_lrs]
        if not all(isinstance(rate, float) and rate > 0 for rate in rates):
            raise _bad("swa_lrs", swa_lrs, "a float of more than 0, or a list of them")
        if avg_fn is not None and not callable(avg_fn):
            raise _bad("avg_fn", avg_fn, "a function")
        if device is not None and not isinstance(device, (torch.device, str)):
            raise _bad("device", device, "a torch.device, a str or None")
        self.n_averaged: Tensor | None = None
        self.momenta: dict[_BatchNorm, float | None] = {}
        """The momenta of batch norms, while these compute means over a whole epoch."""
        self._swa_epoch_start: int | float = swa_epoch_start
        self._swa_lrs: float | list[float] = swa_lrs
        self._annealing_epochs = annealing_epochs
        self._annealing_strategy = annealing_strategy
        self._avg_fn = avg_fn or self.avg_fn
        self._device = device
        self._model_contains_batch_norm: bool | None = None
        self._average_model: Any = None
        self._initialized = False
        self._swa_scheduler: SWALR | None = None
        self._scheduler_state: dict[str, Any] | None = None
        self._init_n_averaged = 0
        self._latest_update_epoch = -1
        self._max_epochs: int = -1
        self._accumulate_grad_batches: int | None = None
        self._over = False
        self._one_more = False
        """Whether ``fit_loop.max_epochs`` counts the epoch of the batch norms."""

    @property
    def swa_start(self) -> int:
        """The first epoch that is averaged, counted from 0; known when a fit has begun."""
        return max(int(self._swa_epoch_start) - 1, 0)

    @property
    def swa_end(self) -> int:
        """The last epoch that is averaged, counted from 0; infinity where nothing bounds the epochs."""
        return float("inf") if self._max_epochs == -1 else self._max_epochs - 1  # type: ignore[return-value]

    @staticmethod
    def pl_module_contains_batch_norm(pl_module: nn.Module) -> bool:
        """Whether there is a batch norm in a model."""
        return any(isinstance(layer, _BatchNorm) for layer in pl_module.modules())

    def setup(self, trainer: TrainerView, pl_module: Any, stage: str) -> None:
        """Copy the model."""
        if trainer.strategy.strategy_name in _SHARDED:
            raise MisconfigurationException(
                "StochasticWeightAveraging does not support sharded models: it cannot average weights that are spread over"
                f" several devices, as by the strategy {trainer.strategy.strategy_name!r}. Use strategy='ddp'."
            )
        if stage == "fit" and self._initialized:  # by an earlier fit, whose average is in the model
            self._initialized, self.n_averaged, self._swa_scheduler = False, None, None
            self._scheduler_state, self._init_n_averaged, self._latest_update_epoch = None, 0, -1
        self._average_model = deepcopy(pl_module)
        self._over = False

    def on_fit_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Check what is known only now, and plan the epoch of the batch norms."""
        if len(trainer.optimizers) != 1:
            raise MisconfigurationException(
                f"StochasticWeightAveraging works with 1 optimizer; configure_optimizers() returned {len(trainer.optimizers)}."
            )
        if len(trainer.lr_scheduler_configs) > 1:
            raise MisconfigurationException(
                "StochasticWeightAveraging takes the place of 1 lr scheduler; configure_optimizers() returned"
                f" {len(trainer.lr_scheduler_configs)}."
            )
        assert trainer.max_epochs is not None
        if isinstance(self._swa_epoch_start, float):
            if trainer.max_epochs == -1:
                raise MisconfigurationException(
                    f"StochasticWeightAveraging(swa_epoch_start={self._swa_epoch_start}) is a share of max_epochs, which is"
                    " -1: give the epoch as an int."
                )
            self._swa_epoch_start = int(trainer.max_epochs * self._swa_epoch_start)
        self._model_contains_batch_norm = self.pl_module_contains_batch_norm(pl_module)
        self._max_epochs = trainer.max_epochs
        if self._model_contains_batch_norm and trainer.max_epochs != -1:
            trainer.fit_loop.max_epochs += 1
            self._one_more = True
        if self._scheduler_state is not None:
            # a run that goes on: its checkpoint has the state of this schedule, which is loaded after this
            self._take_over(trainer, pl_module)

    def on_train_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Go on with the epoch of the batch norms, if the run was saved inside it."""
        if self._in_last_epoch(trainer):
            self._only_forward(trainer, pl_module)

    def on_train_epoch_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Average the weights with which the epoch begins; ahead of the epoch of the batch norms, give the model the mean."""
        epoch = trainer.current_epoch
        averages = self.swa_start <= epoch <= self.swa_end
        if averages and not self._initialized:
            if epoch != self.swa_start:
                rank_zero_warn(
                    f"StochasticWeightAveraging begins at epoch {epoch}, later than at its start, {self.swa_start}: the"
                    " checkpoint says nothing of an average."
                )
            self._take_over(trainer, pl_module)
        if averages and epoch > self._latest_update_epoch:
            assert self.n_averaged is not None
            self.update_parameters(self._average_model, pl_module, self.n_averaged, self._avg_fn)
            self._latest_update_epoch = epoch
        if self._in_last_epoch(trainer):
            self.transfer_weights(self._average_model, pl_module)
            self.reset_batch_norm_and_save_state(pl_module)
            self._only_forward(trainer, pl_module)

    def on_train_epoch_end(self, trainer: TrainerView, *args: Any) -> None:
        """Learn again."""
        trainer.fit_loop.skip_backward = False

    def on_train_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """Give the model the mean, unless the epoch of the batch norms has done so."""
        last, self._over = trainer.current_epoch - 1, True
        bounded = self._max_epochs != -1
        if self._model_contains_batch_norm and bounded and last == self.swa_end + 1:
            self.reset_momenta()
        elif (last == self.swa_end or not bounded) and self._average_model is not None:
            self.transfer_weights(self._average_model, pl_module)
        elif self.n_averaged is not None and last < self.swa_end:
            rank_zero_info(
                f"StochasticWeightAveraging: the training ended after epoch {last}, before its last, {self.swa_end}; the model"
                " keeps its weights, not the average."
            )
        self._leave(trainer)

    def on_fit_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """Do so as well for a run that went on from its end, and had nothing to train."""
        if not self._over:
            self.on_train_end(trainer, pl_module)

    def on_exception(self, trainer: TrainerView, pl_module: Any, exception: BaseException) -> None:
        """Leave the Trainer as it was."""
        self._leave(trainer)

    def teardown(self, trainer: TrainerView, pl_module: Any, stage: str) -> None:
        """Leave the Trainer as it was."""
        self._leave(trainer)

    @staticmethod
    def transfer_weights(src_pl_module: nn.Module, dst_pl_module: nn.Module) -> None:
        """Copy all parameters, buffers not, from one model to another."""
        with torch.no_grad():
            for source, target in zip(src_pl_module.parameters(), dst_pl_module.parameters(), strict=False):
                target.copy_(source)

    def reset_batch_norm_and_save_state(self, pl_module: nn.Module) -> None:
        """Let each batch norm compute plain means from now on, from nothing; keep its momentum."""
        for layer in pl_module.modules():
            if isinstance(layer, _BatchNorm):
                layer.reset_running_stats()
        self._plain_means(pl_module)

    def reset_momenta(self) -> None:
        """Give each batch norm its momentum back."""
        for layer, momentum in self.momenta.items():
            layer.momentum = momentum
        self.momenta = {}

    @staticmethod
    def update_parameters(average_model: nn.Module, model: nn.Module, n_averaged: Tensor, avg_fn: Average) -> None:
        """Take the weights of ``model`` into the average; ``n_averaged`` counts on, in place."""
        first = not n_averaged
        with torch.no_grad():
            for mine, theirs in zip(average_model.parameters(), model.parameters(), strict=False):
                new = theirs.detach().to(mine.device)
                mine.copy_(new if first else avg_fn(mine.detach(), new, n_averaged.to(mine.device)))
        n_averaged += 1

    @staticmethod
    def avg_fn(averaged_model_parameter: Tensor, model_parameter: Tensor, num_averaged: Tensor) -> Tensor:
        """The mean of ``num_averaged`` weights and one more."""
        change = (model_parameter - averaged_model_parameter) / (num_averaged + 1)
        return averaged_model_parameter + change

    def state_dict(self) -> dict[str, Any]:
        """Return the average, how many weights are in it, and the state of the schedule."""
        schedule, average = self._swa_scheduler, self._average_model
        return {
            "n_averaged": 0 if self.n_averaged is None else self.n_averaged.item(),
            "latest_update_epoch": self._latest_update_epoch,
            "scheduler_state": None if schedule is None else schedule.state_dict(),
            "average_model_state": None if average is None else average.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""
        self._init_n_averaged = state_dict["n_averaged"]
        self._latest_update_epoch = state_dict["latest_update_epoch"]
        self._scheduler_state = state_dict["scheduler_state"]
        if self._average_model is not None and state_dict["average_model_state"] is not None:
            self._average_model.load_state_dict(state_dict["average_model_state"])

    def _take_over(self, trainer: TrainerView, pl_module: Any) -> None:
        """Put our schedule in the place of the user's."""
        self._initialized = True
        self._average_model = self._average_model.to(self._device or pl_module.device)
        optimizer = trainer.optimizers[0]
        if isinstance(self._swa_lrs, float):
            self._swa_lrs = [self._swa_lrs] * len(optimizer.param_groups)
        for rate, group in zip(self._swa_lrs, optimizer.param_groups, strict=False):
            group["initial_lr"] = rate
        assert trainer.max_epochs is not None
        rates: Any = self._swa_lrs  # torch's annotation lacks the list
        self._swa_scheduler = SWALR(
            optimizer,
            swa_lr=rates,
            anneal_epochs=self._annealing_epochs,
            anneal_strategy=self._annealing_strategy,
            last_epoch=trainer.max_epochs if self._annealing_strategy == "cos" else -1,
        )
        if self._scheduler_state is not None:
            self._swa_scheduler.load_state_dict(self._scheduler_state)
        schedule = LRSchedulerConfig(self._swa_scheduler)
        schedules = trainer.lr_scheduler_configs
        if schedules:
            former = schedules[0]
            if former.interval != "epoch" or former.frequency != 1:
                rank_zero_warn(
                    f"StochasticWeightAveraging steps the learning rate once an epoch; the schedule whose place it takes has"
                    f" interval={former.interval!r} and frequency={former.frequency}."
                )
            rank_zero_info(
                f"StochasticWeightAveraging: {type(self._swa_scheduler).__name__} takes the place of"
                f" {type(former.scheduler).__name__}."
            )
            schedules[0] = schedule
        else:
            schedules.append(schedule)
        if self.n_averaged is None:
            self.n_averaged = torch.tensor(self._init_n_averaged, dtype=torch.long, device=pl_module.device)

    def _in_last_epoch(self, trainer: TrainerView) -> bool:
        return self._one_more and trainer.current_epoch == self.swa_end + 1

    def _only_forward(self, trainer: TrainerView, pl_module: nn.Module) -> None:
        """From now on the model learns nothing: there is neither a backward nor an update."""
        self._plain_means(pl_module)
        trainer.fit_loop.skip_backward = True
        if self._accumulate_grad_batches is None:
            self._accumulate_grad_batches = trainer.accumulate_grad_batches
        batches = trainer.num_training_batches
        if not isinstance(batches, int):
            raise MisconfigurationException(
                "StochasticWeightAveraging of a model with batch norm needs training data whose length is known: one epoch"
                " more computes the statistics. Say Trainer(limit_train_batches=n)."
            )
        trainer.accumulate_grad_batches = batches + 1

    def _plain_means(self, pl_module: nn.Module) -> None:
        for layer in pl_module.modules():
            if isinstance(layer, _BatchNorm) and layer not in self.momenta:
                self.momenta[layer] = layer.momentum
                layer.momentum = None

    def _leave(self, trainer: TrainerView) -> None:
        trainer.fit_loop.skip_backward = False
        if self._accumulate_grad_batches is not None:
            trainer.accumulate_grad_batches, self._accumulate_grad_batches = self._accumulate_grad_batches, None
        if self._one_more:
            trainer.fit_loop.max_epochs -= 1
            self._one_more = False
        self.reset_momenta()


def _bad(name: str, value: Any, allowed: str) -> MisconfigurationException:
    return MisconfigurationException(f"StochasticWeightAveraging({name}={value!r}) is not valid: it must be {allowed}.")


__all__ = ["StochasticWeightAveraging"]
