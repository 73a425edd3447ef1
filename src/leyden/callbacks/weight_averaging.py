# SPDX-License-Identifier: Apache-2.0
"""Keeps an average of the weights while a fit runs: validation sees it, checkpoints hold it, and the fit ends with it."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from leyden.callback import Callback
from leyden.errors import MisconfigurationException
from leyden.hooks import is_written
from leyden.loading import apply_state_dict, clean_names
from leyden.module import LightningModule
from leyden.runtime.ranks import rank_zero_info, rank_zero_warn
from leyden.types import STEP_OUTPUT, TrainerFn, TrainerView

_PREFIX = "module."
"""What torch's ``AveragedModel`` puts ahead of the names of the weights that it averages."""
_OF_RANKS = "average_buffers"
"""Where a checkpoint of several processes has the averaged buffers of each of them, under the key ``leyden``."""


class WeightAveraging(Callback):
    """Averages the weights with torch's ``AveragedModel``, by default after each update of the model.

    A validation inside the fit runs with the average, and the training goes on afterwards with the weights that it had. When
    the training ends, the model gets the average. In a checkpoint the average is under ``state_dict``, where everybody looks
    for weights, the weights of the training under ``current_model_state``, and how many were averaged under
    ``averaging_state``; a fit that goes on from it has all three, to the last bit.

    Override ``should_update`` to choose when the average is updated. The average of weights in half precision is kept in
    single precision: small steps would be lost otherwise.

    Args:
        device: Where the average is kept; None is where the model is.
        use_buffers: Average the buffers too; False copies the newest ones.
        **kwargs: Arguments of ``AveragedModel``: ``avg_fn`` or ``multi_avg_fn``. Without them all updates count the same.

    Raises:
        MisconfigurationException: for a model whose weights are spread over several devices.
    """

    def __init__(self, device: torch.device | str | int | None = None, use_buffers: bool = True, **kwargs: Any) -> None:
        self._device = torch.device(device) if isinstance(device, str) else device
        self._use_buffers = use_buffers
        self._kwargs = kwargs
        self._average_model: AveragedModel | None = None
        self._latest_update_step = 0
        self._latest_update_epoch = -1
        self._swapped = False
        """Whether the model has the average at this moment, and ``_average_model`` the weights of the training."""
        self._over = False
        """Whether the model has got the average for good."""
        self._whole: list[tuple[Tensor, Tensor]] = []
        """While they are swapped: averages that the model cannot hold in its own number format, and a copy of each."""

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Say whether to update the average now: after each update of the model, and after each epoch.

        Args:
            step_idx: Index of the update that was just made, from 0; None at the end of an epoch.
            epoch_idx: Index of the epoch that ends; None after an update.
        """
        return step_idx is not None

    def setup(self, trainer: TrainerView, pl_module: Any, stage: str) -> None:
        """Copy the model when a fit begins."""
        if stage != "fit":
            return
        if is_written(pl_module, "configure_model", LightningModule):
            rank_zero_warn(
                f"{type(self).__name__} builds the whole of {type(pl_module).__name__} by configure_model() ahead of the"
                " set-up, on one device: weights that are averaged cannot be spread over several."
            )
            pl_module.configure_model()
        self._average_model = AveragedModel(
            pl_module,
            device=self._device or pl_module.device,
            use_buffers=self._use_buffers,
            **self._kwargs,
        )
        self._swapped, self._whole, self._over = False, [], False

    def on_fit_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Follow the model to its device and number format."""
        average = self._average_model
        assert average is not None
        spread = [
            name for name, p in pl_module.named_parameters() if type(p.data).__module__.startswith("torch.distributed")
        ]
        if spread:
            raise MisconfigurationException(
                f"{type(self).__name__} cannot average weights that are spread over several devices, as {spread[0]} of"
                f" {type(pl_module).__name__} is by the strategy {trainer.strategy.strategy_name!r}. Use strategy='ddp',"
                " or remove the callback."
            )
        if self._device is None:
            average.to(pl_module.device)
        for mine, theirs in self._pairs(pl_module):
            _widen(mine, theirs.dtype)

    def on_train_batch_end(
        self, trainer: TrainerView, pl_module: Any, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Update the average, if the batch has updated the model and ``should_update`` says so."""
        step = trainer.global_step
        if step > self._latest_update_step and self.should_update(step_idx=step - 1):
            self._update(pl_module)
            self._latest_update_step = step

    def on_train_epoch_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """Update the average, if ``should_update`` says so of epochs."""
        epoch = trainer.current_epoch
        if epoch > self._latest_update_epoch and self.should_update(epoch_idx=epoch):
            self._update(pl_module)
            self._latest_update_epoch = epoch

    def on_train_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """Give the model the average."""
        self._copy_average_to_current(pl_module)
        self._over = True

    def on_fit_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """Do so as well for a run that went on from its end, and had nothing to train."""
        if not self._over:
            self.on_train_end(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Lend the model the average for a validation of a fit."""
        if self._average_model is not None and trainer.state.fn is TrainerFn.FITTING:
            self._swap_models(pl_module)

    def on_validation_epoch_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """Give the model its own weights back."""
        if self._swapped:
            self._swap_models(pl_module)

    def on_exception(self, trainer: TrainerView, pl_module: Any, exception: BaseException) -> None:
        """Give the model its own weights back, if the exception came in a validation."""
        if self._swapped:
            self._swap_models(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return at which update the average was last updated."""
        return {"latest_update_step": self._latest_update_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""
        self._latest_update_step = state_dict["latest_update_step"]

    def on_save_checkpoint(self, trainer: TrainerView, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Put the average under ``state_dict``, and the weights of the training under ``current_model_state``."""
        average = self._average_model
        if average is None:
            rank_zero_info(
                f"{type(self).__name__} has averaged nothing in this Trainer: the checkpoint holds the weights of the model"
                " as they are."
            )
            return
        state, own = average.state_dict(), checkpoint["state_dict"]
        inside = self._averages(own)
        # in a validation the model and its average have each other's weights
        checkpoint["current_model_state"] = self._inside() if self._swapped else own
        checkpoint["state_dict"] = inside
        checkpoint["averaging_state"] = {name: value for name, value in state.items() if not name.startswith(_PREFIX)}
        if trainer.world_size > 1 and self._use_buffers:
            names = [name for name, _ in pl_module.named_buffers()]
            here = {name: inside[name].cpu() for name in clean_names(dict.fromkeys(names)) if name in inside}
            if here:  # the statistics of a batch norm are others on each rank
                checkpoint.setdefault("leyden", {})[_OF_RANKS] = trainer.strategy.gather_objects(here)

    def on_load_checkpoint(self, trainer: TrainerView, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Take the average from ``state_dict``, and give the model the weights with which the training goes on."""
        average = self._average_model
        if average is None:
            rank_zero_warn(
                f"{type(self).__name__} takes part in fits only: its average is not restored from this checkpoint. The"
                " model has the averaged weights, as it should have for testing and predicting."
            )
            return
        source = f"the checkpoint, for {type(self).__name__}"
        if "current_model_state" not in checkpoint or "averaging_state" not in checkpoint:
            rank_zero_warn(
                f"The checkpoint was written without {type(self).__name__}: the average begins anew, with the weights that are"
                " in it."
            )
            apply_state_dict(average.module, deepcopy(dict(checkpoint["state_dict"])), False, source)
            return
        rank_zero_info(f"{type(self).__name__} goes on with the average of the checkpoint (averaging_state).")
        saved = dict(checkpoint["state_dict"])
        buffers = (checkpoint.get("leyden") or {}).get(_OF_RANKS, ())
        if len(buffers) == trainer.world_size:
            saved.update(buffers[trainer.global_rank])
        own = clean_names(dict(chain(average.module.named_parameters(), average.module.named_buffers())))
        for name, value in saved.items():
            if isinstance(own.get(name), Tensor) and isinstance(value, Tensor):
                _widen(own[name], value.dtype)
        apply_state_dict(average.module, saved, True, source)
        rest = {name: value for name, value in checkpoint["averaging_state"].items() if name != "n_averaged"}
        average.load_state_dict(rest, strict=False)
        average.n_averaged.copy_(checkpoint["averaging_state"]["n_averaged"])
        # what was under state_dict is in the model already, and was the average
        trainer.strategy.load_module_state_dict(dict(checkpoint["current_model_state"]), True, source)

    def _update(self, pl_module: Any) -> None:
        average = self._average_model
        assert average is not None
        if all(mine.dtype is theirs.dtype for mine, theirs in self._pairs(pl_module)):
            average.update_parameters(pl_module)
            return

        # torch averages only what is of one number format
        def like(mine: Iterator[Any], theirs: Iterator[Any]) -> list[Tensor]:
            return [other.detach().to(own.dtype) for own, other in zip(mine, theirs, strict=True)]

        parameters = like(average.module.parameters(), pl_module.parameters())
        buffers = like(average.module.buffers(), pl_module.buffers())
        source: Any = SimpleNamespace(parameters=lambda: parameters, buffers=lambda: buffers)
        average.update_parameters(source)

    def _pairs(self, pl_module: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        assert self._average_model is not None
        mine = chain(self._average_model.module.parameters(), self._average_model.module.buffers())
        return zip(mine, chain(pl_module.parameters(), pl_module.buffers()), strict=False)

    def _swap_models(self, pl_module: Any) -> None:
        """Exchange the weights of the model and its average, in place."""
        back, self._whole = {id(mine): copy for mine, copy in self._whole}, []
        for mine, theirs in self._pairs(pl_module):
            held = mine.data.clone()
            mine.data.copy_(theirs.data)
            theirs.data.copy_(held)
            if id(mine) in back:
                mine.data.copy_(back[id(mine)])
            elif not self._swapped and mine.dtype is not theirs.dtype:
                self._whole.append((mine, held))
        self._swapped = not self._swapped

    def weights_to_save(self, weights: dict[str, Any]) -> dict[str, Any]:
        """Return what a checkpoint of weights alone is to hold: the average; ``weights`` where there is none."""
        return weights if self._average_model is None else self._averages(weights)

    def _inside(self) -> dict[str, Any]:
        """The weights in ``_average_model``, under the names that they have in the model."""
        assert self._average_model is not None
        state = self._average_model.state_dict()
        return clean_names({name[len(_PREFIX) :]: value for name, value in state.items() if name.startswith(_PREFIX)})

    def _averages(self, own: dict[str, Any]) -> dict[str, Any]:
        """The average, wherever it is now; ``own`` are the weights in the model."""
        if not self._swapped:
            return self._inside()
        assert self._average_model is not None
        inside = self._average_model.module
        names = {id(tensor): name for name, tensor in chain(inside.named_parameters(), inside.named_buffers())}
        return {**own, **clean_names({names[id(mine)]: copy for mine, copy in self._whole})}

    def _copy_average_to_current(self, pl_module: Any) -> None:
        """Give the model the average."""
        for mine, theirs in self._pairs(pl_module):
            theirs.data.copy_(mine.data)


class EMAWeightAveraging(WeightAveraging):
    """Keeps an exponential moving average: ``average = decay * average + (1 - decay) * weights``.

    Args:
        device: As for ``WeightAveraging``.
        use_buffers: As for ``WeightAveraging``.
        decay: How much of the average stays at each update, from 0 to 1.
        update_every_n_steps: Update after the first, the n+1st, ... update of the model; 0 never does.
        update_starting_at_step: Not before this update of the model, counted from 0.
        update_starting_at_epoch: Update at the end of each epoch as well, from this one on, counted from 0.
        **kwargs: Arguments of ``AveragedModel``, but for ``avg_fn``.
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        decay: float = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
        **kwargs: Any,
    ) -> None:
        average = get_ema_avg_fn(decay=decay)  # type: ignore[no-untyped-call]
        super().__init__(device=device, use_buffers=use_buffers, **kwargs, avg_fn=average)
        self.update_every_n_steps = update_every_n_steps
        self.update_starting_at_step = update_starting_at_step
        self.update_starting_at_epoch = update_starting_at_epoch

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Say whether to update the average now, by the arguments of the constructor."""
        if step_idx is not None and self.update_every_n_steps > 0 and step_idx % self.update_every_n_steps == 0:
            first = self.update_starting_at_step
            if first is None or step_idx >= first:
                return True
        first = self.update_starting_at_epoch
        return epoch_idx is not None and first is not None and epoch_idx >= first


def _widen(tensor: Tensor, dtype: torch.dtype) -> None:
    """Let a tensor hold numbers of ``dtype`` too; one that can already stays as it is."""
    if tensor.is_floating_point() and dtype.is_floating_point:
        tensor.data = tensor.data.to(torch.promote_types(tensor.dtype, dtype))


__all__ = ["EMAWeightAveraging", "WeightAveraging"]
