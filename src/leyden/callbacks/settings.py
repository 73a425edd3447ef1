# SPDX-License-Identifier: Apache-2.0
"""A setting, such as the learning rate, wherever a user keeps it: in the module, the data module, or their hyperparameters."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any


def holders_of(module: Any, name: str) -> list[Any]:
    """Return what has the setting ``name``, in this order: the module, its hyperparameters, the data module, those of it."""
    trainer = getattr(module, "trainer", None) if getattr(module, "attached", False) else None
    found = []
    for owner in (module, getattr(trainer, "datamodule", None)):
        if owner is None:
            continue
        if hasattr(owner, name):
            found.append(owner)
        if name in (getattr(owner, "hparams", None) or ()):
            found.append(owner.hparams)
    return found


def has_setting(model: Any, attribute: str) -> bool:
    """Whether anything has the setting ``attribute``."""
    return bool(holders_of(model, attribute))


def get_setting(model: Any, attribute: str) -> Any:
    """Return the setting ``attribute``: of several that have it the last, as ``holders_of`` returns them.

    Raises:
        AttributeError: where nothing has it.
    """
    holder = _required(model, attribute)[-1]
    return holder[attribute] if isinstance(holder, MutableMapping) else getattr(holder, attribute)


def set_setting(model: Any, attribute: str, value: Any) -> None:
    """Set ``attribute`` wherever it is.

    Raises:
        AttributeError: where nothing has it.
    """
    for holder in _required(model, attribute):
        if isinstance(holder, MutableMapping):
            holder[attribute] = value
        else:
            setattr(holder, attribute, value)


def _required(module: Any, name: str) -> list[Any]:
    if not (found := holders_of(module, name)):
        raise AttributeError(
            f"{name} is neither an attribute of {type(module).__name__}, nor of the data module, nor among the hparams of"
            f" one of them. Write self.{name} = ... in __init__."
        )
    return found
