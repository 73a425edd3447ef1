# SPDX-License-Identifier: Apache-2.0
"""Prunes the weights of a model epoch by epoch, with ``torch.nn.utils.prune``; masks and all resume exactly."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, TypeAlias, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from leyden.callback import Callback
from leyden.errors import MisconfigurationException, did_you_mean
from leyden.module import LightningModule
from leyden.runtime.ranks import rank_zero_only
from leyden.types import TrainerView

log = logging.getLogger(__name__)

_FUNCTIONS: dict[str, Any] = {
    "ln_structured": prune.ln_structured,
    "l1_unstructured": prune.l1_unstructured,
    "random_structured": prune.random_structured,
    "random_unstructured": prune.random_unstructured,
}
_METHODS: dict[str, Any] = {
    "ln_structured": prune.LnStructured,
    "l1_unstructured": prune.L1Unstructured,
    "random_structured": prune.RandomStructured,
    "random_unstructured": prune.RandomUnstructured,
}
_CONTAINERS = (LightningModule, nn.Sequential, nn.ModuleList, nn.ModuleDict)
_KEY = "pruned"
"""Where a checkpoint has, under the key ``leyden``, the weights before pruning, their masks, and the first weights of all."""

Parameters: TypeAlias = Sequence[tuple[nn.Module, str]]


class _Layer(TypedDict):
    """A layer as it was before the fit, and which of the parameters to prune are in it: their number and name."""

    data: nn.Module
    names: list[tuple[int, str]]


class ModelPruning(Callback):
    """Prunes parameters at the end of each training epoch, or of each validation.

    Args:
        pruning_fn: ``"l1_unstructured"``, ``"random_unstructured"``, ``"ln_structured"``, ``"random_structured"``, or a class
            derived from ``torch.nn.utils.prune.BasePruningMethod``.
        parameters_to_prune: Pairs of a layer and the name of its parameter; empty is all, see
            ``filter_parameters_to_prune``.
        parameter_names: The names that "all" means; of ``"weight"`` and ``"bias"``, which is the default.
        use_global_unstructured: Compare all parameters with each other, rather than each layer by itself.
        amount: How much: a share (float), a number of elements (int), or a function of the epoch that returns one.
        apply_pruning: Whether to, or a function of the epoch.
        make_pruning_permanent: Save weights without masks, and leave no mask on the model when the training ends.
        use_lottery_ticket_hypothesis: Whether to put what is left back to its first values after pruning, or a function of
            the epoch (Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019).
        resample_parameters: Draw new first values instead, by ``reset_parameters`` of a layer.
        pruning_dim: Along which dimension, for ``_structured``.
        pruning_norm: Which norm, for ``"ln_structured"``.
        verbose: 1 logs how many elements are pruned, 2 those of each layer too.
        prune_on_train_epoch_end: False prunes at the end of a validation instead.

    Raises:
        MisconfigurationException: for an argument that cannot be.
    """

    PARAMETER_NAMES = ("weight", "bias")

    def __init__(
        self,
        pruning_fn: Callable[..., Any] | str,
        parameters_to_prune: Parameters = (),
        parameter_names: list[str] | None = None,
        use_global_unstructured: bool = True,
        amount: int | float | Callable[[int], int | float] = 0.5,
        apply_pruning: bool | Callable[[int], bool] = True,
        make_pruning_permanent: bool = True,
        use_lottery_ticket_hypothesis: bool | Callable[[int], bool] = True,
        resample_parameters: bool = False,
        pruning_dim: int | None = None,
        pruning_norm: int | None = None,
        verbose: int = 0,
        prune_on_train_epoch_end: bool = True,
    ) -> None:
        self._use_global_unstructured = use_global_unstructured
        self._parameters_to_prune = parameters_to_prune
        self._use_lottery_ticket_hypothesis = use_lottery_ticket_hypothesis
        self._resample_parameters = resample_parameters
        self._prune_on_train_epoch_end = prune_on_train_epoch_end
        self._parameter_names = parameter_names or self.PARAMETER_NAMES
        self._global_kwargs: dict[str, Any] = {}
        self._original_layers: dict[int, _Layer] | None = None
        self._pruning_method_name: str | None = None
        self._saved: dict[str, dict[str, Tensor]] = {}
        """Of a run that goes on: ``orig`` and ``mask`` of each parameter, by its name, until they are put back."""
        self._listening: list[Any] = []
        self._shares = False
        """Whether a parameter that is put back gets the memory of its first values, as Lightning does it on a CPU."""
        unknown = [name for name in self._parameter_names if name not in self.PARAMETER_NAMES]
        if unknown:
            raise _bad("parameter_names", parameter_names, f"a list of {list(self.PARAMETER_NAMES)}")
        self.pruning_fn: Any = self._resolve(pruning_fn, pruning_dim, pruning_norm)
        if use_global_unstructured and self.pruning_fn.PRUNING_TYPE != "unstructured":
            raise MisconfigurationException(
                f"ModelPruning(use_global_unstructured=True) takes methods of the type 'unstructured'; {pruning_fn!r} is of the"
                f" type {self.pruning_fn.PRUNING_TYPE!r}. Set it to False."
            )
        if not (isinstance(amount, (int, float)) or callable(amount)):
            raise _bad("amount", amount, "an int, a float or a function of the epoch")
        if verbose not in (0, 1, 2):
            raise _bad("verbose", verbose, "0, 1 or 2")
        self._apply_pruning, self._make_pruning_permanent = apply_pruning, make_pruning_permanent
        self.amount, self._verbose = amount, verbose

    def _resolve(self, given: Any, dim: int | None, norm: int | None) -> Any:
        if not isinstance(given, str):
            if not self._is_pruning_method(given):
                raise _bad("pruning_fn", given, f"one of {list(_FUNCTIONS)}, or a class derived from BasePruningMethod")
            if not self._use_global_unstructured:
                raise MisconfigurationException(
                    f"ModelPruning(pruning_fn={given.__name__}): a class of your own takes use_global_unstructured=True."
                )
            return given
        name = given.lower()
        if name not in _FUNCTIONS:
            raise _bad("pruning_fn", given, f"one of {list(_FUNCTIONS)}, or a class", did_you_mean(name, _FUNCTIONS))
        more: dict[str, Any] = {}
        if name.endswith("_structured"):
            if dim is None:
                raise MisconfigurationException(f"ModelPruning(pruning_fn={given!r}) needs pruning_dim.")
            if name == "ln_structured":
                if norm is None:
                    raise MisconfigurationException(f"ModelPruning(pruning_fn={given!r}) needs pruning_norm.")
                more["n"] = norm
            more["dim"] = dim
        return self._create_pruning_fn(name, **more)

    def _create_pruning_fn(self, pruning_fn: str, **kwargs: Any) -> Any:
        """Return torch's class for a name where all parameters are compared, its function otherwise."""
        found = (_METHODS if self._use_global_unstructured else _FUNCTIONS)[pruning_fn]
        self._pruning_method_name = found.__name__
        if self._use_global_unstructured:
            self._global_kwargs = kwargs
            return found
        return self._wrap_pruning_fn(found, **kwargs)

    @staticmethod
    def _wrap_pruning_fn(pruning_fn: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
        return partial(pruning_fn, **kwargs)

    @staticmethod
    def _is_pruning_method(method: Any) -> bool:
        return inspect.isclass(method) and issubclass(method, prune.BasePruningMethod)

    # ------------------------------------------------------------------ what may be overridden, or called

    def filter_parameters_to_prune(self, parameters_to_prune: Parameters = ()) -> Parameters:
        """Return those of the parameters that are to be pruned; override it to choose."""
        return parameters_to_prune

    def apply_pruning(self, amount: int | float) -> None:
        """Prune by ``amount`` now."""
        before = self._stats() if self._verbose else []
        if self._use_global_unstructured:
            self._apply_global_pruning(float(amount) if isinstance(amount, bool) else amount)
        else:
            self._apply_local_pruning(amount)
        if self._verbose:
            self._log_sparsity_stats(before, self._stats(), amount=amount)

    def make_pruning_permanent(self, module: nn.Module) -> None:
        """Take all masks off ``module``: what they hide is 0 from then on."""
        for layer in module.modules():
            for name in _pruned_in(layer):
                prune.remove(layer, name)  # type: ignore[no-untyped-call]

    def apply_lottery_ticket_hypothesis(self) -> None:
        """Put all parameters to prune back to the values that they had before the fit, or to new ones."""
        assert self._original_layers is not None
        for layer in self._original_layers.values():
            copy = layer["data"]
            if self._resample_parameters and callable(getattr(copy, "reset_parameters", None)):
                copy = deepcopy(copy)
                copy.reset_parameters()  # type: ignore[operator]  # it was asked whether it can be called
            for index, name in layer["names"]:
                self._copy_param(self._parameters_to_prune[index][0], copy, name)

    @staticmethod
    def sanitize_parameters_to_prune(
        pl_module: nn.Module, parameters_to_prune: Parameters = (), parameter_names: Sequence[str] = ()
    ) -> Parameters:
        """Return the parameters that are meant: those given, checked, or all of the names given.

        Raises:
            MisconfigurationException: for something that is no pair of a layer and a name, or not in the model.
        """
        names = parameter_names or ModelPruning.PARAMETER_NAMES
        layers = [layer for layer in pl_module.modules() if not isinstance(layer, _CONTAINERS)]
        if not parameters_to_prune:
            return [(m, name) for name in names for m in layers if isinstance(getattr(m, name, None), nn.Parameter)]
        if not (
            isinstance(parameters_to_prune, (list, tuple))
            and all(
                isinstance(pair, (list, tuple))
                and len(pair) == 2
                and isinstance(pair[0], nn.Module)
                and isinstance(pair[1], str)
                for pair in parameters_to_prune
            )
        ):
            raise _bad("parameters_to_prune", parameters_to_prune, "a list of pairs (nn.Module, name of a parameter)")
        known = set(layers)
        strange = [layer for layer, _ in parameters_to_prune if layer not in known]
        missing = [name for layer, name in parameters_to_prune if layer in known and not hasattr(layer, name)]
        if strange or missing:
            raise MisconfigurationException(
                f"ModelPruning(parameters_to_prune=...): {type(pl_module).__name__} does not have the layers {strange}, and its"
                f" layers do not have the parameters {missing}."
            )
        return parameters_to_prune

    # ------------------------------------------------------------------ hooks

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Choose the parameters, and keep their first values."""
        found = self.sanitize_parameters_to_prune(pl_module, self._parameters_to_prune, self._parameter_names)
        self._parameters_to_prune = self.filter_parameters_to_prune(found)
        if self._use_lottery_ticket_hypothesis:
            self._original_layers = {}
            for index, (layer, name) in enumerate(self._parameters_to_prune):
                entry = self._original_layers.setdefault(id(layer), {"data": deepcopy(layer), "names": []})
                entry["names"].append((index, name))
        self._saved = {}
        self._shares = trainer.config.rule("lottery_ticket") == "shared memory"
        self._stop_listening()
        # a file that was saved with masks has other names than the model, which has none yet
        self._listening = [
            layer.register_load_state_dict_pre_hook(self._unmask)  # type: ignore[no-untyped-call]
            for layer in {each for each, _ in self._parameters_to_prune}
        ]

    def on_fit_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Put back the masks of a run that goes on: after the optimizer was made, as they came in that run."""
        self._stop_listening()
        names = _names(pl_module)
        for layer, name in self._parameters_to_prune:
            saved = self._saved.get(f"{names.get(id(layer), '')}{name}")
            if saved is not None and not hasattr(layer, f"{name}_mask"):
                parameter = getattr(layer, name)
                parameter.data.copy_(saved["orig"])
                mask = saved["mask"].to(parameter.device)
                prune.custom_from_mask(layer, name, mask)  # type: ignore[no-untyped-call]
        if self._shares and self._saved and not self._resample_parameters:
            self._share_again()
        self._saved = {}

    def on_train_epoch_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """Prune."""
        if self._prune_on_train_epoch_end:
            self._run_pruning(pl_module.current_epoch)

    def on_validation_epoch_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """Prune, if that is to be after validations."""
        if not trainer.sanity_checking and not self._prune_on_train_epoch_end:
            self._run_pruning(pl_module.current_epoch)

    def on_train_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """Take the masks off."""
        if self._make_pruning_permanent:
            self.make_pruning_permanent(pl_module)

    def on_fit_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """Do so as well for a run that went on from its end, and had nothing to train."""
        if self._make_pruning_permanent:
            self.make_pruning_permanent(pl_module)

    def teardown(self, trainer: TrainerView, pl_module: Any, stage: str) -> None:
        """Listen no longer to what is loaded into the model."""
        self._stop_listening()

    def on_exception(self, trainer: TrainerView, pl_module: Any, exception: BaseException) -> None:
        """Listen no longer to what is loaded into the model."""
        self._stop_listening()

    def on_save_checkpoint(self, trainer: TrainerView, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Save weights without masks, if they are to be permanent, and beside them what a run needs to go on."""
        names = _names(pl_module)
        masked: dict[str, dict[str, Tensor]] = {}
        initial: dict[str, Tensor] = {}
        for layer, name in self._parameters_to_prune:
            if hasattr(layer, f"{name}_mask"):
                orig, mask = getattr(layer, f"{name}_orig"), getattr(layer, f"{name}_mask")
                masked[f"{names[id(layer)]}{name}"] = {"orig": orig.detach(), "mask": mask}
        for entry in (self._original_layers or {}).values():
            for index, name in entry["names"]:
                layer = self._parameters_to_prune[index][0]
                initial[f"{names[id(layer)]}{name}"] = getattr(entry["data"], name).detach()
        checkpoint.setdefault("leyden", {})[_KEY] = {"masked": masked, "initial": initial}
        if self._make_pruning_permanent:
            state = checkpoint.get("state_dict")
            checkpoint["state_dict"] = self._make_pruning_permanent_on_state_dict(pl_module, state)

    def on_load_checkpoint(self, trainer: TrainerView, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Take what ``on_save_checkpoint`` has put there."""
        ours = (checkpoint.get("leyden") or {}).get(_KEY)
        if not ours:
            return
        self._saved.update(ours["masked"])
        names = _names(pl_module)
        with torch.no_grad():
            for entry in (self._original_layers or {}).values():
                for index, name in entry["names"]:
                    layer = self._parameters_to_prune[index][0]
                    value = ours["initial"].get(f"{names.get(id(layer), '')}{name}")
                    if value is not None:
                        getattr(entry["data"], name).copy_(value)

    # ------------------------------------------------------------------ inside

    def _run_pruning(self, current_epoch: int) -> None:
        applies = self._apply_pruning(current_epoch) if callable(self._apply_pruning) else self._apply_pruning
        amount = self.amount(current_epoch) if callable(self.amount) else self.amount
        if not applies or not amount:
            return
        self.apply_pruning(amount)
        lottery = self._use_lottery_ticket_hypothesis
        if lottery(current_epoch) if callable(lottery) else lottery:
            self.apply_lottery_ticket_hypothesis()

    def _apply_local_pruning(self, amount: float) -> None:
        for layer, name in self._parameters_to_prune:
            self.pruning_fn(layer, name=name, amount=amount)

    def _resolve_global_kwargs(self, amount: float) -> dict[str, Any]:
        self._global_kwargs["amount"] = amount
        known = set(inspect.signature(self.pruning_fn).parameters)
        return {name: value for name, value in self._global_kwargs.items() if name in known - {"self"}}

    def _apply_global_pruning(self, amount: float) -> None:
        prune.global_unstructured(
            self._parameters_to_prune, pruning_method=self.pruning_fn, **self._resolve_global_kwargs(amount)
        )

    def _copy_param(self, new: nn.Module, old: nn.Module, name: str) -> None:
        """Give a parameter, masked or not, the values that it has in ``old``."""
        source = getattr(old, name)
        target = getattr(new, f"{name}_orig", None)
        target = getattr(new, name) if target is None else target
        if not isinstance(source, Tensor) or not isinstance(target, Tensor):
            return
        if self._shares:
            target.data = source.data.to(target.device)
        else:
            target.data.copy_(source.data)  # in place: others know the memory of a parameter

    @staticmethod
    def _get_pruned_stats(module: nn.Module, name: str) -> tuple[int, int]:
        """How many elements of a parameter are pruned, and how many it has."""
        mask = getattr(module, f"{name}_mask", None)
        return (0, 1) if mask is None else (int((mask == 0).sum().item()), mask.numel())

    def _stats(self) -> list[tuple[int, int]]:
        return [self._get_pruned_stats(layer, name) for layer, name in self._parameters_to_prune]

    @rank_zero_only
    def _log_sparsity_stats(
        self, prev: list[tuple[int, int]], curr: list[tuple[int, int]], amount: int | float = 0
    ) -> None:
        size = sum(count for _, count in curr)
        old, new = sum(zeros for zeros, _ in prev), sum(zeros for zeros, _ in curr)
        method = self._pruning_method_name
        log.info(f"Applied `{method}`. Pruned: {old}/{size} ({old / size:.2%}) -> {new}/{size} ({new / size:.2%})")
        if self._verbose < 2:
            return
        for (layer, name), (old, before), (new, after) in zip(self._parameters_to_prune, prev, curr, strict=True):
            log.info(
                f"Applied `{method}` to `{layer!r}.{name}` with amount={amount}."
                f" Pruned: {old} ({old / before:.2%}) -> {new} ({new / after:.2%})"
            )

    def _make_pruning_permanent_on_state_dict(
        self, pl_module: nn.Module, state: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the weights as they are under their masks, on the CPU."""
        found = dict(pl_module.state_dict() if state is None else state)
        for name in [name.removesuffix("_mask") for name in found if name.endswith("_mask")]:
            if f"{name}_orig" in found:
                orig, mask = found.pop(f"{name}_orig"), found.pop(f"{name}_mask")
                found[name] = mask.to(dtype=orig.dtype) * orig
        return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in found.items()}

    def _unmask(self, layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Let weights that were saved with masks go into a model that has none."""
        for each, name in self._parameters_to_prune:
            key = f"{prefix}{name}"
            if each is layer and f"{key}_orig" in state and not hasattr(layer, f"{name}_mask"):
                orig, mask = state.pop(f"{key}_orig"), state.pop(f"{key}_mask")
                self._saved[key] = {"orig": orig, "mask": mask}
                state[key] = mask.to(dtype=orig.dtype) * orig

    def _share_again(self) -> None:
        """Let masked parameters that have their first values have the memory of these, too."""
        for entry in (self._original_layers or {}).values():
            for index, name in entry["names"]:
                layer = self._parameters_to_prune[index][0]
                if name in _pruned_in(layer) and torch.equal(
                    getattr(entry["data"], name), getattr(layer, f"{name}_orig")
                ):
                    self._copy_param(layer, entry["data"], name)

    def _stop_listening(self) -> None:
        while self._listening:
            self._listening.pop().remove()


def _names(module: nn.Module) -> dict[int, str]:
    """What stands ahead of the name of a parameter of each layer, by the id of the layer; no layer counts as compiled."""
    found = {}
    for name, layer in module.named_modules():
        clean = name.replace("_orig_mod.", "").removesuffix("_orig_mod")
        found[id(layer)] = f"{clean}." if clean and not clean.endswith(".") else clean
    return found


def _pruned_in(layer: nn.Module) -> list[str]:
    """The parameters of a layer that have masks."""
    own = vars(layer)
    masked = [name.removesuffix("_mask") for name in own["_buffers"] if name.endswith("_mask")]
    return [name for name in masked if f"{name}_orig" in own["_parameters"]]


def _bad(name: str, value: Any, allowed: str, hint: str = "") -> MisconfigurationException:
    return MisconfigurationException(f"ModelPruning({name}={value!r}) is not valid: it must be {allowed}.{hint}")


__all__ = ["ModelPruning"]
