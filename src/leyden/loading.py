# SPDX-License-Identifier: Apache-2.0
"""Build a module or a data module from a checkpoint: its constructor arguments, then its state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from leyden import files
from leyden.errors import CheckpointError, MisconfigurationException
from leyden.hparams import constructor_kwargs, load_hparams_from_tags_csv, load_hparams_from_yaml, unpack
from leyden.runtime.ranks import rank_zero_warn

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
    checkpoint = files.load(checkpoint_path, map_location=map_location or "cpu", weights_only=safe)
    source = str(checkpoint_path) if isinstance(checkpoint_path, (str, Path)) else "the checkpoint"
    saved = saved_hparams(checkpoint, cls.CHECKPOINT_HYPER_PARAMS_KEY, open_pickles=not safe)
    if hparams_file is not None:
        saved.update(_hparams_from_file(hparams_file))
    saved.update(overrides)
    saved, unopened = drop_unopened(saved)
    warn_unused(unopened, source)
    instance = cls(**constructor_kwargs(cls, saved, overrides))
    if not isinstance(instance, nn.Module):
        state = checkpoint.get(type(instance).__qualname__)
        if state:
            instance.load_state_dict(state)
        return instance
    instance.on_load_checkpoint(checkpoint)  # type: ignore[operator]
    strict = instance.strict_loading if strict is None else strict
    apply_state_dict(instance, checkpoint["state_dict"], bool(strict), source)
    if map_location is None:
        device = next((value.device for value in checkpoint["state_dict"].values() if isinstance(value, Tensor)), None)
        if device is not None:
            instance.to(device)
    return instance


def saved_hparams(checkpoint: Mapping[str, Any], key: str, open_pickles: bool) -> dict[str, Any]:
    """Return the hyperparameters in ``checkpoint`` under ``key``, those that are not plain data too if ``open_pickles``."""
    found: Any = {}
    for name in (key, "hparams", "module_arguments"):  # the last two: files of Lightning before 1.0
        if name in checkpoint:
            found = checkpoint[name]
            break
    result = dict(found)
    pickled = (checkpoint.get(PICKLED) or {}).get(key)
    if pickled is not None:
        if open_pickles:
            result.update(unpack(pickled["data"]))
        else:
            result.update({name: _Unopened(name) for name in pickled["names"] if name not in result})
    return result


class _Unopened:
    """Stands for a hyperparameter that is in the file, but pickled."""

    def __init__(self, name: str) -> None:
        self.name = name


def drop_unopened(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Split off the values that were not opened; return the rest and their names."""
    unopened = [name for name, value in values.items() if isinstance(value, _Unopened)]
    return {name: value for name, value in values.items() if name not in unopened}, unopened


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
    try:
        module.load_state_dict(state, strict=strict)
        return
    except RuntimeError as error:
        reason = error
    own = module.state_dict()
    shapes = [
        f"{key}: {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the model"
        for key in own
        if isinstance(own[key], Tensor)
        and isinstance(state.get(key), Tensor)
        and not isinstance(own[key], nn.parameter.UninitializedTensorMixin)
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


def _by_prefix(keys: list[str]) -> str:
    """Group keys by their first part, so that a missing layer is one entry."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(key.split(".")[0], []).append(key)
    shown = [f"{prefix}.* ({len(group)})" if len(group) > 2 else ", ".join(group) for prefix, group in groups.items()]
    return "; ".join(shown[:10]) + (" …" if len(shown) > 10 else "")


def warn_unused(names: list[str], source: str) -> None:
    """Say that pickled hyperparameters were left closed."""
    if names:
        rank_zero_warn(
            f"{source} holds hyperparameters that are not plain data ({', '.join(names)}); they were left closed. Pass"
            " weights_only=False if you trust the file, or give their values as arguments."
        )


