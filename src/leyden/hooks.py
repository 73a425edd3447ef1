# SPDX-License-Identifier: Apache-2.0
"""The one table of hooks: who may write each one, when it runs, and what ``self.log`` means inside it.

The order of the rows is the order in which the hooks of a fit first run. Everything that has to know a hook by its
name (binding, the rules of ``self.log``, the check for misspelt hooks) reads this table.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

from leyden.errors import did_you_mean


@dataclass(frozen=True, slots=True)
class Logging:
    """What ``self.log`` does by default in a hook, and whether a per-step value makes sense there."""

    on_step: bool
    on_epoch: bool
    step_allowed: bool = True


_STEP = Logging(on_step=True, on_epoch=False)
_EVAL = Logging(on_step=False, on_epoch=True)
_EPOCH = Logging(on_step=False, on_epoch=True, step_allowed=False)


@dataclass(frozen=True, slots=True)
class Hook:
    """One row: ``owners`` is a string of C (callback), M (module), D (data module); ``logging`` None forbids ``self.log``."""

    name: str
    owners: str
    moment: str
    logging: Logging | None = None


HOOKS: tuple[Hook, ...] = (
    # set-up
    Hook("configure_callbacks", "M", "setup"),
    Hook("prepare_data", "DM", "setup"),
    Hook("setup", "DCM", "setup"),
    Hook("configure_sharded_model", "M", "setup"),
    Hook("configure_model", "M", "setup"),
    Hook("on_load_checkpoint", "CM", "checkpoint"),
    Hook("load_state_dict", "CMD", "checkpoint"),
    Hook("configure_optimizers", "M", "setup"),
    Hook("on_fit_start", "CM", "fit"),
    # data
    Hook("train_dataloader", "DM", "data"),
    Hook("val_dataloader", "DM", "data"),
    Hook("test_dataloader", "DM", "data"),
    Hook("predict_dataloader", "DM", "data"),
    Hook("on_before_batch_transfer", "DM", "data"),
    Hook("transfer_batch_to_device", "DM", "data"),
    Hook("on_after_batch_transfer", "DM", "data"),
    # evaluation
    Hook("on_sanity_check_start", "C", "sanity"),
    Hook("on_validation_model_zero_grad", "M", "validation"),
    Hook("on_validation_model_eval", "M", "validation"),
    Hook("on_validation_start", "CM", "validation", _EPOCH),
    Hook("on_validation_epoch_start", "CM", "validation", _EPOCH),
    Hook("on_validation_batch_start", "CM", "validation", _EVAL),
    Hook("validation_step", "M", "validation", _EVAL),
    Hook("on_validation_batch_end", "CM", "validation", _EVAL),
    Hook("on_validation_epoch_end", "CM", "validation", _EPOCH),
    Hook("on_validation_end", "CM", "validation"),
    Hook("on_validation_model_train", "M", "validation"),
    Hook("on_sanity_check_end", "C", "sanity"),
    # training
    Hook("on_train_start", "CM", "train", _EPOCH),
    Hook("on_train_epoch_start", "CM", "train", _EPOCH),
    Hook("on_train_batch_start", "CM", "train", _STEP),
    Hook("optimizer_step", "M", "train", _STEP),
    Hook("training_step", "M", "train", _STEP),
    Hook("on_before_zero_grad", "CM", "train", _STEP),
    Hook("optimizer_zero_grad", "M", "train", _STEP),
    Hook("on_before_backward", "CM", "train", _STEP),
    Hook("backward", "M", "train", _STEP),
    Hook("on_after_backward", "CM", "train", _STEP),
    Hook("on_before_optimizer_step", "CM", "train", _STEP),
    Hook("configure_gradient_clipping", "M", "train", _STEP),
    Hook("clip_gradients", "M", "train", _STEP),
    Hook("lr_scheduler_step", "M", "train"),
    Hook("on_train_batch_end", "CM", "train", _STEP),
    Hook("on_train_epoch_end", "CM", "train", _EPOCH),
    Hook("on_train_end", "CM", "train"),
    Hook("on_fit_end", "CM", "fit"),
    # test
    Hook("on_test_model_eval", "M", "test"),
    Hook("on_test_start", "CM", "test", _EPOCH),
    Hook("on_test_epoch_start", "CM", "test", _EPOCH),
    Hook("on_test_batch_start", "CM", "test", _EVAL),
    Hook("test_step", "M", "test", _EVAL),
    Hook("on_test_batch_end", "CM", "test", _EVAL),
    Hook("on_test_epoch_end", "CM", "test", _EPOCH),
    Hook("on_test_end", "CM", "test"),
    Hook("on_test_model_train", "M", "test"),
    # predict
    Hook("on_predict_model_eval", "M", "predict"),
    Hook("on_predict_start", "CM", "predict"),
    Hook("on_predict_epoch_start", "CM", "predict"),
    Hook("on_predict_batch_start", "CM", "predict"),
    Hook("predict_step", "M", "predict"),
    Hook("on_predict_batch_end", "CM", "predict"),
    Hook("on_predict_epoch_end", "CM", "predict"),
    Hook("on_predict_end", "CM", "predict"),
    Hook("on_predict_model_train", "M", "predict"),
    # checkpoints, failures, the end
    Hook("state_dict", "CMD", "checkpoint"),
    Hook("on_save_checkpoint", "CM", "checkpoint"),
    Hook("on_exception", "CD", "end"),
    Hook("teardown", "DCM", "end"),
)

BY_NAME: dict[str, Hook] = {hook.name: hook for hook in HOOKS}


def is_written(owner: Any, name: str, base: type) -> bool:
    """Whether somebody wrote the hook ``name`` on ``owner``: in its class (below ``base``) or on the instance."""
    if name in getattr(owner, "__dict__", {}):
        return True
    ours = getattr(base, name, None)
    theirs = getattr(type(owner), name, None)
    return theirs is not None and theirs is not ours


def misspelt(owner: Any, kind: str, base: type) -> Iterable[tuple[str, str]]:
    """Yield ``(name, suggestion)`` for each method of ``owner`` that looks like a hook, is none, and is never called.

    Args:
        owner: A module, callback or data module.
        kind: Its letter in the table: ``"C"``, ``"M"`` or ``"D"``.
        base: The class of ours that it extends; names known there are not hooks somebody mistyped.
    """
    names = {hook.name for hook in HOOKS if kind in hook.owners}
    theirs = [cls for cls in type(owner).__mro__ if cls not in base.__mro__]
    used = {name for cls in theirs for method in vars(cls).values() for name in names_in(method)}
    for name in sorted({attribute for cls in theirs for attribute in vars(cls)}):
        # a method that the others call (shared_step, make_dataloader) is a helper, whatever its name
        if name in names or name in used or hasattr(base, name) or name.startswith("_"):
            continue
        if not inspect.isroutine(getattr(type(owner), name, None)):
            continue
        if name in _FORMER:
            yield name, f" Did you mean {_FORMER[name]!r}?"
            continue
        looks_like_hook = name.startswith("on_") or name.endswith(("_step", "_dataloader", "_epoch_end"))
        # people have methods of their own: other names must be a letter or two away
        cutoff = 0.6 if name.startswith("on_") else 0.7 if looks_like_hook else 0.9
        suggestion = did_you_mean(name, names, cutoff=cutoff)
        if suggestion:
            yield name, suggestion


_FORMER = {
    # names that Lightning once had, or that others use, for which the closest name would be the wrong one
    "on_epoch_start": "on_train_epoch_start",
    "on_epoch_end": "on_train_epoch_end",
    "val_step": "validation_step",
    "on_train_begin": "on_train_start",
    "on_epoch_begin": "on_train_epoch_start",
    "on_batch_start": "on_train_batch_start",
    "on_batch_end": "on_train_batch_end",
    "on_pretrain_routine_start": "on_fit_start",
    "on_pretrain_routine_end": "on_fit_start",
    "on_keyboard_interrupt": "on_exception",
    "training_step_end": "on_train_batch_end",
    "validation_step_end": "on_validation_batch_end",
    "test_step_end": "on_test_batch_end",
}


def names_in(method: Any) -> Iterable[str]:
    """All names of attributes and functions that the code of a method mentions, functions within it included."""
    return (name for code in _codes_in(method) for name in code.co_names)


def keywords_in(method: Any) -> Iterable[str]:
    """All names by which the code of a method passes arguments, functions within it included."""
    constants = (constant for code in _codes_in(method) for constant in code.co_consts if isinstance(constant, tuple))
    return (name for constant in constants for name in constant if isinstance(name, str))


def _codes_in(method: Any) -> Iterator[CodeType]:
    function = inspect.unwrap(getattr(method, "__func__", getattr(method, "fget", None) or method))
    codes = [function.__code__] if inspect.isfunction(function) else []
    while codes:
        code = codes.pop()
        yield code
        codes += [constant for constant in code.co_consts if inspect.iscode(constant)]
