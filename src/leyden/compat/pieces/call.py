# SPDX-License-Identifier: Apache-2.0
"""Calls hooks by name, for loops of others that do so; the loops of Leyden bind theirs ahead (``loops/dispatch.py``)."""

from __future__ import annotations

from typing import Any


def call_callback_hooks(
    trainer: Any, hook_name: str, *args: Any, monitoring_callbacks: bool | None = None, **kwargs: Any
) -> None:
    """Call a hook of all callbacks as ``hook(trainer, module, *args, **kwargs)``.

    Args:
        trainer: The Trainer.
        hook_name: The hook.
        args, kwargs: Its arguments.
        monitoring_callbacks: True: only of those that watch metrics (``monitors``); False: only of the others.
    """
    for callback in trainer.callbacks:
        if monitoring_callbacks is None or bool(getattr(callback, "monitors", False)) is monitoring_callbacks:
            hook = getattr(callback, hook_name, None)
            if callable(hook):
                hook(trainer, trainer.lightning_module, *args, **kwargs)


def call_lightning_module_hook(trainer: Any, hook_name: str, *args: Any, pl_module: Any = None, **kwargs: Any) -> Any:
    """Call a hook of the module; return what it returned, None if it has no such hook.

    Raises:
        TypeError: before there is a module.
    """
    module = trainer.lightning_module if pl_module is None else pl_module
    if module is None:
        raise TypeError(f"The hook {hook_name!r} of the module cannot be called: the Trainer has none yet.")
    hook = getattr(module, hook_name, None)
    return hook(*args, **kwargs) if callable(hook) else None


def call_lightning_datamodule_hook(trainer: Any, hook_name: str, *args: Any, **kwargs: Any) -> Any:
    """Call a hook of the data module; return what it returned, None if it has no such hook.

    Raises:
        TypeError: if there is no data module.
    """
    if trainer.datamodule is None:
        raise TypeError(f"The hook {hook_name!r} of the data module cannot be called: the Trainer has none.")
    hook = getattr(trainer.datamodule, hook_name, None)
    return hook(*args, **kwargs) if callable(hook) else None


def call_strategy_hook(trainer: Any, hook_name: str, *args: Any, **kwargs: Any) -> Any:
    """Call a verb of the strategy; return what it returned, None if it has no such verb."""
    verb = getattr(trainer.strategy, hook_name, None)
    return verb(*args, **kwargs) if callable(verb) else None
