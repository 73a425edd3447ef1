# SPDX-License-Identifier: Apache-2.0
"""Trains a part of a model first and thaws the rest later: freezing, thawing, and parameter groups that resume."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Mapping
from itertools import chain
from typing import Any, TypeAlias, Union

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from leyden.callback import Callback
from leyden.errors import CheckpointError, MisconfigurationException
from leyden.runtime.ranks import rank_zero_warn
from leyden.types import TrainerView

log = logging.getLogger(__name__)

Modules: TypeAlias = Union[nn.Module, Iterable[Any]]
"""A module, or an iterable of modules, nested as deep as one likes."""
_FROZEN = "frozen"
"""Where a checkpoint has, under the key ``leyden``, what was frozen when it was written."""


def multiplicative(epoch: int) -> float:  # noqa: ARG001  # the form of a lambda_func
    """By what ``BackboneFinetuning`` multiplies the learning rate of the backbone in each epoch, by default."""
    return 2.0


class BaseFinetuning(Callback):
    """Freezes what ``freeze_before_training`` says, and thaws it epoch by epoch as ``finetune_function`` says.

    Override both. ``configure_optimizers`` must give the optimizer only what is trained at the beginning
    (``filter(lambda p: p.requires_grad, self.parameters())``); what is thawed later gets a parameter group of its own, by
    ``unfreeze_and_add_param_group``. A run that goes on from a checkpoint has the same groups, and the same layers frozen.
    """

    def __init__(self) -> None:
        self._internal_optimizer_metadata: dict[int, list[dict[str, Any]]] = {}
        self._restarting = False
        self._frozen: dict[str, list[str]] | None = None
        """What the checkpoint says is frozen: parameters, and the statistics of batch norms; None if it says nothing."""

    # ------------------------------------------------------------------ to be overridden

    def freeze_before_training(self, pl_module: Any) -> None:
        """Freeze layers, ahead of ``configure_optimizers``."""
        raise NotImplementedError(f"{type(self).__name__} must override freeze_before_training(pl_module).")

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
        """Thaw layers at the start of an epoch, or change their learning rates; called for each optimizer."""
        raise NotImplementedError(
            f"{type(self).__name__} must override finetune_function(pl_module, epoch, optimizer)."
        )

    # ------------------------------------------------------------------ hooks

    def setup(self, trainer: TrainerView, pl_module: Any, stage: str) -> None:
        """Freeze what does not train from the beginning."""
        if trainer.strategy.strategy_name == "deepspeed":
            raise NotImplementedError(
                f"{type(self).__name__} does not work with the strategy 'deepspeed', which owns the parameter groups. Use"
                " another strategy, or freeze the layers yourself before the run."
            )
        self.freeze_before_training(pl_module)

    def on_fit_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Make the parameter groups of a run that goes on, and freeze what it had frozen."""
        if not self._restarting:
            return
        self._restarting = False
        named = dict(pl_module.named_parameters())
        for index, optimizer in enumerate(trainer.optimizers):
            if index in self._internal_optimizer_metadata:
                groups = self._apply_mapping_to_param_groups(self._internal_optimizer_metadata[index], named)
                _set_groups(optimizer, groups, thaw=self._frozen is None)
        if self._frozen is not None:
            parameters, statistics = set(self._frozen["parameters"]), set(self._frozen["statistics"])
            for name, parameter in named.items():
                parameter.requires_grad = name not in parameters
            for name, layer in pl_module.named_modules():
                if isinstance(layer, _BatchNorm):
                    layer.track_running_stats = name not in statistics
            self._frozen = None

    def on_train_epoch_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Call ``finetune_function``, and note the groups that it adds."""
        for index, optimizer in enumerate(trainer.optimizers):
            before = len(optimizer.param_groups)
            self.finetune_function(pl_module, trainer.current_epoch, optimizer)
            self._store(pl_module, index, before, optimizer.param_groups, optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Return the parameter groups, with the names of parameters in their place."""
        return {"internal_optimizer_metadata": self._internal_optimizer_metadata}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what ``state_dict`` returned; files of old have the groups alone."""
        self._restarting = True
        self._internal_optimizer_metadata = state_dict.get("internal_optimizer_metadata", state_dict)

    def on_save_checkpoint(self, trainer: TrainerView, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Note what is frozen."""
        checkpoint.setdefault("leyden", {})[_FROZEN] = {
            "parameters": [name for name, p in pl_module.named_parameters() if not p.requires_grad],
            "statistics": [
                name
                for name, layer in pl_module.named_modules()
                if isinstance(layer, _BatchNorm) and not layer.track_running_stats
            ],
        }

    def on_load_checkpoint(self, trainer: TrainerView, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Read what was frozen."""
        self._frozen = (checkpoint.get("leyden") or {}).get(_FROZEN)

    # ------------------------------------------------------------------ helpers

    @staticmethod
    def flatten_modules(modules: Modules) -> list[nn.Module]:
        """Return all modules inside that have no children, or parameters of their own."""
        found: Iterable[nn.Module]
        if isinstance(modules, nn.ModuleDict):
            modules = modules.values()
        if isinstance(modules, Iterable):
            found = chain.from_iterable(BaseFinetuning.flatten_modules(module) for module in modules)
        else:
            found = modules.modules()
        return [module for module in found if not list(module.children()) or vars(module)["_parameters"]]

    @staticmethod
    def filter_params(
        modules: Modules, train_bn: bool = True, requires_grad: bool = True
    ) -> Generator[nn.Parameter, None, None]:
        """Yield the parameters that require gradients, or those that do not.

        Args:
            modules: A module or an iterable of modules.
            train_bn: False leaves out those of batch norms.
            requires_grad: Which of the two kinds.
        """
        for module in BaseFinetuning.flatten_modules(modules):
            if isinstance(module, _BatchNorm) and not train_bn:
                continue
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad == requires_grad:
                    yield parameter

    @staticmethod
    def make_trainable(modules: Modules) -> None:
        """Let all parameters require gradients, and batch norms follow the statistics of their batches."""
        for module in BaseFinetuning.flatten_modules(modules):
            if isinstance(module, _BatchNorm):
                module.track_running_stats = True
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad = True

    @staticmethod
    def freeze_module(module: nn.Module) -> None:
        """Freeze the parameters of one module, its children's not, and the statistics of a batch norm."""
        if isinstance(module, _BatchNorm):
            module.track_running_stats = False
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad = False

    @staticmethod
    def freeze(modules: Modules, train_bn: bool = True) -> None:
        """Freeze all parameters.

        Args:
            modules: A module or an iterable of modules.
            train_bn: Let batch norms go on training.
        """
        for module in BaseFinetuning.flatten_modules(modules):
            if isinstance(module, _BatchNorm) and train_bn:
                BaseFinetuning.make_trainable(module)
            else:
                BaseFinetuning.freeze_module(module)

    @staticmethod
    def filter_on_optimizer(optimizer: Optimizer, params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Return those of ``params`` that the optimizer does not have yet; say so if it has some."""
        has = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        params = list(params)
        new = [parameter for parameter in params if id(parameter) not in has]
        if len(new) < len(params):
            rank_zero_warn(
                f"{len(params) - len(new)} of the parameters to thaw are in a group of the optimizer already and stay there."
                " Give the optimizer only what trains from the beginning:"
                f" {type(optimizer).__name__}(filter(lambda p: p.requires_grad, self.parameters()), ...)."
            )
        return new

    @staticmethod
    def unfreeze_and_add_param_group(
        modules: Modules,
        optimizer: Optimizer,
        lr: float | None = None,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
    ) -> None:
        """Thaw modules, and add their parameters to an optimizer as a group.

        Args:
            modules: A module or an iterable of modules.
            optimizer: Gets the group.
            lr: Learning rate of the group; None is that of the first group over ``initial_denom_lr``.
            initial_denom_lr: See ``lr``.
            train_bn: False adds batch norms to no group.
        """
        BaseFinetuning.make_trainable(modules)
        rate = optimizer.param_groups[0]["lr"] / initial_denom_lr if lr is None else float(lr)
        trained = BaseFinetuning.filter_params(modules, train_bn=train_bn, requires_grad=True)
        new = BaseFinetuning.filter_on_optimizer(optimizer, trained)
        if new:
            optimizer.add_param_group({"params": new, "lr": rate})

    @staticmethod
    def _apply_mapping_to_param_groups(
        param_groups: Iterable[Mapping[str, Any]], mapping: Mapping[Any, Any]
    ) -> list[dict[str, Any]]:
        """Return groups with each parameter, or name, as ``mapping`` has it."""
        try:
            return [{**group, "params": [mapping[each] for each in group["params"]]} for group in param_groups]
        except KeyError as error:
            raise CheckpointError(
                f"The checkpoint has the parameter {error} in a group of an optimizer; this model has none of that name."
            ) from error

    def _store(
        self,
        pl_module: nn.Module,
        opt_idx: int,
        num_param_groups: int,
        current_param_groups: list[dict[str, Any]],
        optimizer: Optimizer | None = None,
    ) -> None:
        """Note the groups of an optimizer when they are seen first, and those that were added since."""
        known = self._internal_optimizer_metadata.get(opt_idx)
        if known is not None and num_param_groups == len(current_param_groups):
            return
        groups = current_param_groups
        if getattr(optimizer, "_leyden_fused", None) is not None:
            # a file says nothing of the form in which this run has an optimizer: see loops/fused.py
            saved = optimizer.state_dict()["param_groups"]  # type: ignore[union-attr]
            groups = [{**own, "fused": each["fused"]} for own, each in zip(groups, saved, strict=True)]
        names = {parameter: name for name, parameter in pl_module.named_parameters()}
        if known is None:
            self._internal_optimizer_metadata[opt_idx] = self._apply_mapping_to_param_groups(groups, names)
        else:
            known.extend(self._apply_mapping_to_param_groups(groups[num_param_groups:], names))


class BackboneFinetuning(BaseFinetuning):
    """Freezes ``pl_module.backbone``, thaws it at an epoch, and raises its learning rate from there on.

    Args:
        unfreeze_backbone_at_epoch: The epoch, counted from 0.
        lambda_func: Given the number of the next epoch; returns by what the learning rate of the backbone is multiplied.
        backbone_initial_ratio_lr: The learning rate of the backbone when it is thawed, over that of the first group.
        backbone_initial_lr: That learning rate itself.
        should_align: Never let it be more than that of the first group.
        initial_denom_lr: As for ``unfreeze_and_add_param_group``.
        train_bn: Train the batch norms of the backbone, from the beginning on.
        verbose: Log both learning rates in each epoch.
        rounding: Digits of these.

    Raises:
        MisconfigurationException: for a module without a ``backbone``.
    """

    def __init__(
        self,
        unfreeze_backbone_at_epoch: int = 10,
        lambda_func: Callable[[int], float] = multiplicative,
        backbone_initial_ratio_lr: float = 10e-2,
        backbone_initial_lr: float | None = None,
        should_align: bool = True,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
        verbose: bool = False,
        rounding: int = 12,
    ) -> None:
        super().__init__()
        self.unfreeze_backbone_at_epoch = unfreeze_backbone_at_epoch
        self.lambda_func = lambda_func
        self.backbone_initial_ratio_lr = backbone_initial_ratio_lr
        self.backbone_initial_lr = backbone_initial_lr
        self.should_align = should_align
        self.initial_denom_lr = initial_denom_lr
        self.train_bn = train_bn
        self.verbose = verbose
        self.rounding = rounding
        self.previous_backbone_lr: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the parameter groups, and the learning rate of the backbone."""
        return {**super().state_dict(), "previous_backbone_lr": self.previous_backbone_lr}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""
        self.previous_backbone_lr = state_dict["previous_backbone_lr"]
        super().load_state_dict(state_dict)

    def on_fit_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Check that there is a backbone."""
        if not isinstance(getattr(pl_module, "backbone", None), nn.Module):
            raise MisconfigurationException(
                f"BackboneFinetuning: {type(pl_module).__name__} has no attribute `backbone` that is an nn.Module."
            )
        super().on_fit_start(trainer, pl_module)

    def freeze_before_training(self, pl_module: Any) -> None:
        """Freeze the backbone."""
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
        """Thaw the backbone at its epoch, and raise its learning rate afterwards."""
        if epoch < self.unfreeze_backbone_at_epoch:
            return
        current = optimizer.param_groups[0]["lr"]
        if epoch == self.unfreeze_backbone_at_epoch:
            given = self.backbone_initial_lr
            rate = current * self.backbone_initial_ratio_lr if given is None else given
            self.unfreeze_and_add_param_group(
                pl_module.backbone, optimizer, rate, train_bn=self.train_bn, initial_denom_lr=self.initial_denom_lr
            )
        else:
            assert self.previous_backbone_lr is not None
            rate = self.lambda_func(epoch + 1) * self.previous_backbone_lr
            if self.should_align and rate > current:
                rate = current
            optimizer.param_groups[-1]["lr"] = rate
        self.previous_backbone_lr = rate
        if self.verbose:
            log.info("Current lr: %s, Backbone lr: %s", round(current, self.rounding), round(rate, self.rounding))


def _set_groups(optimizer: Optimizer, groups: list[dict[str, Any]], thaw: bool) -> None:
    """Give an optimizer the groups that it had: those that it has already in their places, and the others added."""
    own = optimizer.param_groups
    same = len(own) <= len(groups) and all(
        [id(p) for p in mine["params"]] == [id(p) for p in group["params"]]
        for mine, group in zip(own, groups, strict=False)
    )
    if not same:
        optimizer.param_groups = groups
        return
    count = len(own)
    for mine, group in zip(own, groups, strict=False):
        mine.update({name: value for name, value in group.items() if name not in ("params", "fused")})
    for group in groups[count:]:
        if thaw:
            for parameter in group["params"]:
                parameter.requires_grad = True
        optimizer.add_param_group(group)


__all__ = ["BackboneFinetuning", "BaseFinetuning"]
