# SPDX-License-Identifier: Apache-2.0
"""Build a module or a data module from a checkpoint: its constructor arguments, then its state."""

from __future__ import annotations

import importlib
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from leyden import files
from leyden.errors import CheckpointError, MisconfigurationException
from leyden.hparams import (
    CLASS_PATH,
    INSTANTIATOR,
    constructor_kwargs,
    load_hparams_from_tags_csv,
    load_hparams_from_yaml,
    unpack,
)
from leyden.runtime.ranks import rank_zero_warn

if TYPE_CHECKING:
    class_only = classmethod
else:

    class class_only(classmethod):
        """A ``classmethod`` that makes a new object: called on an object it is an error, for that object would not change."""

        def __get__(self, instance: Any, owner: Any = None) -> Any:
            bound = super().__get__(instance, owner)
            if instance is None:
                return bound

            def refused(*_: Any, **__: Any) -> Any:
                cls, name = type(instance).__name__, bound.__name__
                raise TypeError(
                    f"{name}() makes a new object and leaves this one as it is: call it on the class and keep what it"
                    f" returns, as in model = {cls}.{name}(path)."
                )

            return refused


FORMAT = 1
"""Version of what is under the key ``leyden`` of a checkpoint; raised when older versions of Leyden could not read it."""
PICKLED = "leyden_pickled_hyper_parameters"
"""The key of hyperparameters that are not plain data: one bytes value, opened only with ``weights_only=False``."""


def load_from_checkpoint(
    cls: Any,
    checkpoint_path: Any,
    map_location: Any,
    hparams_file: str | Path | None,
    strict: bool | None,
    weights_only: bool | None,
    overrides: dict[str, Any],
) -> Any:
    """Build ``cls`` from the file; see ``LightningModule.load_from_checkpoint`` for the arguments and errors."""
    safe = weights_only is not False
    checkpoint = files.load(checkpoint_path, map_location=map_location, weights_only=safe)
    source = str(checkpoint_path) if isinstance(checkpoint_path, (str, Path)) else "the checkpoint"
    require_checkpoint(checkpoint, source)
    checkpoint = modernized(checkpoint)
    saved, unopened = saved_hparams(
        checkpoint, cls.CHECKPOINT_HYPER_PARAMS_KEY, open_pickles=not safe, map_location=map_location
    )
    if hparams_file is not None:
        saved.update(_hparams_from_file(hparams_file))
    unopened = [name for name in unopened if name not in saved and name not in overrides]
    instantiate = _instantiator(saved, source)
    cls = _saved_class(cls, saved, source) if instantiate else cls
    kwargs = constructor_kwargs(
        cls, saved, overrides, name=checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_NAME), source=source, unreadable=unopened
    )
    if unopened:
        rank_zero_warn(
            f"{source} holds hyperparameters that are not plain data ({', '.join(unopened)}); they were left closed."
            " Pass weights_only=False if you trust the file, or give their values as arguments."
        )
    if instantiate is None:
        instance = cls(**kwargs)
    else:
        kept = {name: saved[name] for name in (INSTANTIATOR, CLASS_PATH) if name in saved}
        instance = instantiate(cls, kwargs, safe=safe, source=source, kept=kept)
    if not isinstance(instance, nn.Module):
        state = checkpoint.get(type(instance).__qualname__)
        if state:
            instance.load_state_dict(state)
        return instance
    module: Any = instance
    module.on_load_checkpoint(checkpoint)
    strict = module.strict_loading if strict is None else strict
    apply_state_dict(module, checkpoint["state_dict"], bool(strict), source)
    if map_location is None:
        device = next((value.device for value in checkpoint["state_dict"].values() if isinstance(value, Tensor)), None)
        if device is not None:
            instance.to(device)
    return instance


_INSTANTIATORS = {"instantiate_module": "leyden.cli.instantiate:instantiate_from_checkpoint"}
"""What a checkpoint may name as the maker of its object, by the last part of the name, and what makes it here."""


def _instantiator(saved: Mapping[str, Any], source: str) -> Callable[..., Any] | None:
    """Return what makes an object of its saved hyperparameters, if a command line has made it; nothing else is called.

    Raises:
        MisconfigurationException: if the file names anything else.
    """
    wanted = saved.get(INSTANTIATOR)
    if wanted is None or all(value is None or isinstance(value, (bool, int, float)) for value in _arguments(saved)):
        return None
    home = _INSTANTIATORS.get(str(wanted).rpartition(".")[2])
    if home is None:
        raise MisconfigurationException(
            f"{source} wants its object made by {wanted!r}, which is not in the allowlist of what may be called for a"
            f" checkpoint. Make the object yourself, and load its weights: leyden.load_weights(path, model)."
        )
    module, _, name = home.partition(":")
    return cast("Callable[..., Any]", getattr(importlib.import_module(module), name))


def _arguments(saved: Mapping[str, Any]) -> list[Any]:
    return [value for name, value in saved.items() if name not in (INSTANTIATOR, CLASS_PATH)]


def _saved_class(cls: Any, saved: Mapping[str, Any], source: str) -> Any:
    """Return the class that the file names, if it is imported and derives from ``cls``; ``cls`` where it names none.

    Raises:
        MisconfigurationException: for another class: a file imports nothing.
    """
    path = saved.get(CLASS_PATH)
    if path is None:
        return cls
    home, _, name = str(path).rpartition(".")
    found = getattr(sys.modules.get(home), name, None)
    if isinstance(found, type) and issubclass(found, cls):
        return found
    if isinstance(found, type) and issubclass(cls, found):
        return cls
    raise MisconfigurationException(
        f"{source} holds a {path}, which is not an already imported subclass of {cls.__name__}. Import its module ahead of"
        " load_from_checkpoint, if you trust it, and call that on the class of the file or a base of it."
    )


def require_checkpoint(loaded: Any, source: str) -> None:
    """Check that what was ``loaded`` is a trainer's checkpoint, rather than bare weights, say, and not from the future.

    Raises:
        CheckpointError: if it is not.
    """
    if not isinstance(loaded, Mapping) or not isinstance(loaded.get("state_dict"), Mapping):
        keys = sorted(map(str, loaded))[:8] if isinstance(loaded, Mapping) else type(loaded).__name__
        raise CheckpointError(
            f"{source} is no checkpoint of a trainer: it has no 'state_dict' (found: {keys}). Load plain weights with"
            " leyden.load_weights(path, model), or model.load_state_dict(torch.load(path))."
        )
    ours = loaded.get("leyden")
    found = ours.get("format", 0) if isinstance(ours, Mapping) else 0
    if not isinstance(found, int) or found > FORMAT:
        raise CheckpointError(
            f"{source} has format {found}; this version of Leyden reads up to format {FORMAT}. Update Leyden."
        )


_FROM_2020 = {
    "checkpoint_callback_best": ("ModelCheckpoint", "best_model_score"),
    "checkpoint_callback_best_model_score": ("ModelCheckpoint", "best_model_score"),
    "checkpoint_callback_best_model_path": ("ModelCheckpoint", "best_model_path"),
    "early_stop_callback_wait": ("EarlyStopping", "wait_count"),
    "early_stop_callback_patience": ("EarlyStopping", "patience"),
}
"""Where Lightning kept the state of its callbacks before 1.0, and where it is today."""


def modernized(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint with the state of callbacks where it is today, if Lightning wrote it before 1.0."""
    found = dict(checkpoint)
    states: dict[str, dict[str, Any]] = {}
    for old, (callback, name) in _FROM_2020.items():
        if old in found:
            states.setdefault(callback, {})[name] = found.pop(old)
    if states:
        found["callbacks"] = {**states, **(found.get("callbacks") or {})}
    return found


def saved_hparams(
    checkpoint: Mapping[str, Any], key: str, open_pickles: bool, map_location: Any = None
) -> tuple[dict[str, Any], list[str]]:
    """Return the hyperparameters in ``checkpoint`` under ``key``, and the names of those that stay closed.

    Those that are not plain data are pickled in the file; they are opened only if ``open_pickles``.
    """
    found: Any = {}
    for name in (key, "hparams", "module_arguments"):  # the last two: files of Lightning before 1.0
        if name in checkpoint:
            found = checkpoint[name]
            break
    result = dict(vars(found) if isinstance(found, Namespace) else found)
    pickled = (checkpoint.get(PICKLED) or {}).get(key)
    if pickled is None:
        return result, []
    if open_pickles:
        result.update(unpack(pickled["data"], map_location))
        return result, []
    return result, [name for name in pickled["names"] if name not in result]


def _hparams_from_file(path: str | Path) -> dict[str, Any]:
    suffix = Path(path).suffix.lower()
    if suffix == ".csv":
        return dict(load_hparams_from_tags_csv(path))
    if suffix in (".yml", ".yaml"):
        return dict(load_hparams_from_yaml(path))
    raise MisconfigurationException(
        f"load_from_checkpoint(hparams_file={str(path)!r}): the file must be a .yaml, .yml or .csv file."
    )


def apply_state_dict(module: nn.Module, state: Mapping[str, Tensor], strict: bool, source: str) -> None:
    """Load ``state`` into ``module``; what does not fit is listed by prefix, with the remedy.

    Raises:
        CheckpointError: for keys that are missing, unexpected (both only when ``strict``) or of another shape.
    """
    state = _names_of(module, state)
    try:
        result = module.load_state_dict(state, strict=strict)
        if not strict and state and len(getattr(result, "unexpected_keys", ())) == len(state):
            rank_zero_warn(
                f"None of the {len(state)} weights in {source} is in {type(module).__name__}, so none was loaded: unknown to"
                f" the model: {_by_prefix(list(state))}. strict=False leaves out what does not fit."
            )
        return
    except RuntimeError as error:
        reason = error
    own = module.state_dict()
    shapes = [
        f"{key}: {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the model"
        for key in own
        if isinstance(own[key], Tensor)
        and isinstance(state.get(key), Tensor)
        and not isinstance(own[key], (nn.UninitializedParameter, nn.UninitializedBuffer))
        and state[key].shape != own[key].shape
    ]
    missing = [key for key in own if key not in state] if strict else []
    unexpected = [key for key in state if key not in own] if strict else []
    if not (shapes or missing or unexpected):
        raise reason  # the module's own way of loading has its own reasons
    lines = [f"The weights in {source} do not fit {type(module).__name__}."]
    if shapes:
        lines.append(f"  {len(shapes)} of another shape: " + "; ".join(shapes[:8]) + (" …" if len(shapes) > 8 else ""))
    if missing:
        lines.append(f"  {len(missing)} missing in the file: {_by_prefix(missing)}")
    if unexpected:
        lines.append(f"  {len(unexpected)} unknown to the model: {_by_prefix(unexpected)}")
    if shapes:
        lines.append("  Build the model with the arguments it was trained with (they win over those in the file).")
    else:
        lines.append("  Pass strict=False (or set self.strict_loading = False) to load what fits.")
    raise CheckpointError("\n".join(lines)) from reason


_COMPILED = re.compile(r"(^|\.)_orig_mod\.")
"""What torch.compile puts into the names of a layer's weights."""


def clean_name(name: str) -> str:
    """Return what a weight is called when no layer is compiled."""
    while (cleaned := _COMPILED.sub(r"\1", name)) != name:
        name = cleaned
    return name


def clean_names(state: dict[str, Any]) -> dict[str, Any]:
    """Return ``state`` with its weights, in their order, under the names that they have when no layer is compiled."""
    if not any(_COMPILED.search(name) for name in state):
        return state
    return {clean_name(name): value for name, value in state.items()}


def _names_of(module: nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return ``state`` under the names in ``module``: either may have compiled layers where the other has none."""
    compiled = any(isinstance(getattr(layer, "_orig_mod", None), nn.Module) for layer in module.modules())
    if not compiled and not any(_COMPILED.search(name) for name in state):
        return state
    own = {clean_name(name): name for name in module.state_dict()}
    return {own.get(clean, name): value for name, value in state.items() for clean in [clean_name(name)]}


def _by_prefix(keys: list[str]) -> str:
    """Group keys by their first part, so that a missing layer is one entry."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(key.split(".")[0], []).append(key)
    shown = [f"{prefix}.* ({len(group)})" if len(group) > 2 else ", ".join(group) for prefix, group in groups.items()]
    return "; ".join(shown[:10]) + (" …" if len(shown) > 10 else "")
