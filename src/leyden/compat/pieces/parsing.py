# SPDX-License-Identifier: Apache-2.0
"""Looks into constructors, signatures and hyperparameters, as Lightning's helpers of these names do."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, MutableMapping, Sequence
from functools import partial
from types import FrameType
from typing import Any
from unittest.mock import Mock

from torch import nn

from leyden.callback import Callback
from leyden.datamodule import LightningDataModule
from leyden.hparams import HyperparametersMixin
from leyden.module import LightningModule
from leyden.runtime.ranks import rank_zero_warn

CHECKPOINT_PAST_HPARAMS_KEYS = ("hparams", "module_arguments")
"""Where checkpoints of long ago have the hyperparameters."""


def is_picklable(obj: object) -> bool:
    """Whether ``pickle`` takes it."""
    try:
        pickle.dumps(obj)
    except (pickle.PickleError, AttributeError, RuntimeError, TypeError):
        return False
    return True


def clean_namespace(hparams: MutableMapping[str, Any]) -> None:
    """Take out of ``hparams``, in place, what cannot be pickled; a warning names each."""
    for name in [name for name, value in hparams.items() if not is_picklable(value)]:
        rank_zero_warn(
            f"The hyperparameter {name!r} is left out: it cannot be pickled. save_hyperparameters(ignore=[{name!r}])"
            " leaves it out without this warning."
        )
        del hparams[name]


def parse_class_init_keys(cls: type) -> tuple[str, str | None, str | None]:
    """Return what a constructor calls ``self``, ``*args`` and ``**kwargs``; None for one that it lacks."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())  # type: ignore[misc]
    rest = {parameter.kind: parameter.name for parameter in reversed(parameters)}
    return (
        parameters[0].name,
        rest.get(inspect.Parameter.VAR_POSITIONAL),
        rest.get(inspect.Parameter.VAR_KEYWORD),
    )


def _of_frame(frame: FrameType) -> tuple[Any, dict[str, Any]]:
    """Return the object that a frame constructs, and the arguments of its constructor; (None, {}) for another frame."""
    held = inspect.getargvalues(frame).locals
    cls = held.get("__class__")
    if cls is None or frame.f_code.co_name != "__init__":
        return None, {}
    itself, positional, keywords = parse_class_init_keys(cls)
    found = {name: held[name] for name in inspect.signature(cls.__init__).parameters if name in held}
    found.update(found.get(keywords or "", {}))
    left_out = {itself, positional, keywords, "__class__", "frame", "frame_args"}
    return held.get(itself), {name: value for name, value in found.items() if name not in left_out}


def get_init_args(frame: FrameType) -> dict[str, Any]:
    """Return the arguments of the constructor that runs in ``frame``; empty if none does."""
    return _of_frame(frame)[1]


def collect_init_args(
    frame: FrameType, path_args: list[dict[str, Any]], inside: bool = False, classes: tuple[type, ...] = ()
) -> list[dict[str, Any]]:
    """Return ``path_args`` and behind it the arguments of the constructors that run from ``frame`` outwards.

    Args:
        frame: Where to begin; frames that construct nothing are passed over until the first that does.
        path_args: What is collected already.
        inside: Whether the first one is passed: then the first frame that constructs nothing is the end.
        classes: Only objects of these count; empty: any.
    """
    at: FrameType | None = frame
    while at is not None and at.f_back is not None:
        itself, found = _of_frame(at)
        if "__class__" in at.f_locals and (not classes or isinstance(itself, classes)):
            path_args.append(found)
            inside = True
        elif inside:
            break
        at = at.f_back
    return path_args


def save_hyperparameters(
    obj: Any,
    *args: Any,
    ignore: Sequence[str] | str | None = None,
    frame: FrameType | None = None,
    given_hparams: dict[str, Any] | None = None,
) -> None:
    """Save the hyperparameters of ``obj``, as its method of that name does.

    Args:
        obj: Anything with ``_set_hparams``, of a class of ours or with ``HyperparametersMixin``.
        args: Names, or one mapping or namespace; none: all arguments of the constructor.
        ignore: Names to leave out.
        frame: The constructor's frame; None: the caller's. Arguments are read off it where ``obj`` records none.
        given_hparams: The arguments, where they are known.
    """
    if given_hparams is None:
        if isinstance(obj, HyperparametersMixin):
            obj.save_hyperparameters(*args, ignore=ignore)
            return
        here = inspect.currentframe()
        at = frame or (here.f_back if here is not None else None)
        given_hparams = {}
        for found in collect_init_args(at, []) if at is not None else []:
            given_hparams.update(found)
    names = [ignore] if isinstance(ignore, str) else list(ignore or ())
    known = {name: value for name, value in given_hparams.items() if name not in names}
    whole = [arg for arg in args if not isinstance(arg, str)]
    chosen = whole[0] if len(whole) == 1 else {name: known[name] for name in args} if args else known
    obj._hparams_name = "kwargs" if not whole else next((k for k, v in known.items() if v is chosen), None)  # noqa: SLF001
    obj._set_hparams(chosen)  # noqa: SLF001  # this is how objects of Lightning's take them
    for name, value in obj._hparams.items():  # noqa: SLF001
        if isinstance(value, nn.Module):
            rank_zero_warn(
                f"The hyperparameter {name!r} is a module, whose weights are in every checkpoint already."
                f" save_hyperparameters(ignore=[{name!r}]) leaves it out."
            )
    obj._hparams_initial = copy.deepcopy(obj._hparams)  # noqa: SLF001


def update_hparams(hparams: dict[str, Any], updates: dict[str, Any]) -> None:
    """Put ``updates`` into ``hparams``, dicts within dicts merged."""
    for name, value in updates.items():
        if isinstance(value, dict) and name in hparams:
            update_hparams(hparams[name], value)
        else:
            hparams[name] = value


def convert(val: str) -> int | float | bool | str:
    """Read a cell of a csv file: a number or a truth value where it is one, else the text."""
    from leyden.hparams import cell_value  # noqa: PLC0415  # the only use

    if val.lower() in ("true", "false"):
        return val.lower() == "true"
    value = cell_value(val)
    return value if isinstance(value, (int, float)) else val


def is_overridden(method_name: str, instance: object | None = None, parent: type | None = None) -> bool:
    """Whether ``instance`` has its own ``method_name``, set on it or written in a class below ``parent``.

    Args:
        method_name: The method.
        instance: None answers False.
        parent: None: LightningModule, LightningDataModule or Callback, whichever ``instance`` is.

    Raises:
        ValueError: if it is none of these, or the parent has no such method.
    """
    if instance is None:
        return False
    if parent is None:
        known = (LightningModule, LightningDataModule, Callback)
        parent = next((cls for cls in known if isinstance(instance, cls)), None)
        if parent is None:
            raise ValueError(f"is_overridden({method_name!r}): say parent= for an object of {type(instance).__name__}.")
    own = _function(getattr(instance, method_name, None))
    if own is None:
        return False
    inherited = _function(getattr(parent, method_name, None))
    if inherited is None:
        raise ValueError(f"{parent.__name__} has no method {method_name!r}, so it cannot be overridden.")
    return own.__code__ is not inherited.__code__


def _function(method: Any) -> Any:
    """The function under decorators, mocks that wrap, and partial calls."""
    method = getattr(method, "__wrapped__", method) if not isinstance(method, Mock) else method
    if isinstance(method, Mock):
        return method._mock_wraps  # noqa: SLF001  # mock has no public name for it
    return method.func if isinstance(method, partial) else method


def is_param_in_hook_signature(
    hook_fx: Callable[..., Any], param: str, explicit: bool = False, min_args: int | None = None
) -> bool:
    """Whether a hook takes an argument.

    Args:
        hook_fx: The hook.
        param: The argument's name.
        explicit: True: ``*args`` does not count.
        min_args: So many arguments (without self) count, whatever their names.
    """
    spec = inspect.getfullargspec(getattr(hook_fx, "__wrapped__", hook_fx))
    names = spec.args[1:]
    taken = param in names or (not explicit and spec.varargs is not None)
    return taken or (min_args is not None and len(names) >= min_args)


def get_torchvision_model(model_name: str, **kwargs: Any) -> nn.Module:
    """Return a model of torchvision by its name, made with ``kwargs``.

    Raises:
        ModuleNotFoundError: if torchvision is not installed.
    """
    try:
        from torchvision import models  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415  # optional
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("get_torchvision_model() needs torchvision: pip install torchvision.") from error
    model: nn.Module = models.get_model(model_name, **kwargs)
    return model
