# SPDX-License-Identifier: Apache-2.0
"""From a module that ``torch.compile`` wrapped to one that is a LightningModule and runs compiled, and back."""

from __future__ import annotations

from typing import Any

from leyden.module import LightningModule

_METHODS = ("forward", "training_step", "validation_step", "test_step", "predict_step")
_KEPT = "_compiler_ctx"


def from_compiled(model: Any) -> LightningModule:
    """Return the module within what ``torch.compile`` returned, its forward and steps compiled.

    Raises:
        ValueError: for anything else.
    """
    original = getattr(model, "_orig_mod", None)
    context = getattr(model, "dynamo_ctx", None)
    if original is None or context is None:
        raise ValueError(f"from_compiled() takes what torch.compile(module) returned, not a {type(model).__name__}.")
    if not isinstance(original, LightningModule):
        raise ValueError(f"from_compiled(): the compiled module is a {type(original).__name__}, no LightningModule.")
    before = {f"original_{name}": getattr(original, name) for name in _METHODS}
    original.__dict__[_KEPT] = {"compiler": "dynamo", "dynamo_ctx": context, **before}
    for name in _METHODS:
        setattr(original, name, context(getattr(original, name)))
    return original


def to_uncompiled(model: Any) -> LightningModule:
    """Return the module as it was before it was compiled, in place.

    Args:
        model: What ``torch.compile`` or ``from_compiled`` returned.

    Raises:
        TypeError: for a compiled module that is no LightningModule.
        ValueError: for anything else.
    """
    original: Any = getattr(model, "_orig_mod", model)
    wrapped = original is not model
    if not isinstance(original, LightningModule):
        if wrapped:
            raise TypeError(f"to_uncompiled(): the compiled module is a {type(original).__name__}, no LightningModule.")
        raise ValueError(f"to_uncompiled() takes a compiled LightningModule, not a {type(model).__name__}.")
    kept = original.__dict__.pop(_KEPT, None)
    if kept is None and not wrapped:
        raise ValueError(f"to_uncompiled(): {type(model).__name__} is not compiled.")
    for name in _METHODS if kept is not None else ():
        if getattr(kept[f"original_{name}"], "__self__", None) is original:
            original.__dict__.pop(name, None)  # the method of the class again
        else:
            setattr(original, name, kept[f"original_{name}"])
    plain: LightningModule = original
    return plain
