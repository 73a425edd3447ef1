# SPDX-License-Identifier: Apache-2.0
"""A callback made of functions, for a hook or two that deserve no class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from leyden.callback import Callback
from leyden.errors import did_you_mean


class LambdaCallback(Callback):
    """Calls the given functions as hooks: ``LambdaCallback(on_train_end=lambda trainer, module: print("done"))``.

    Args are the hooks of :class:`~leyden.callback.Callback`; each function takes what its hook takes.

    Raises:
        TypeError: if there is no such hook.
    """

    def __init__(
        self,
        setup: Callable[..., Any] | None = None,
        teardown: Callable[..., Any] | None = None,
        on_fit_start: Callable[..., Any] | None = None,
        on_fit_end: Callable[..., Any] | None = None,
        on_sanity_check_start: Callable[..., Any] | None = None,
        on_sanity_check_end: Callable[..., Any] | None = None,
        on_train_batch_start: Callable[..., Any] | None = None,
        on_train_batch_end: Callable[..., Any] | None = None,
        on_train_epoch_start: Callable[..., Any] | None = None,
        on_train_epoch_end: Callable[..., Any] | None = None,
        on_validation_epoch_start: Callable[..., Any] | None = None,
        on_validation_epoch_end: Callable[..., Any] | None = None,
        on_test_epoch_start: Callable[..., Any] | None = None,
        on_test_epoch_end: Callable[..., Any] | None = None,
        on_validation_batch_start: Callable[..., Any] | None = None,
        on_validation_batch_end: Callable[..., Any] | None = None,
        on_test_batch_start: Callable[..., Any] | None = None,
        on_test_batch_end: Callable[..., Any] | None = None,
        on_train_start: Callable[..., Any] | None = None,
        on_train_end: Callable[..., Any] | None = None,
        on_validation_start: Callable[..., Any] | None = None,
        on_validation_end: Callable[..., Any] | None = None,
        on_test_start: Callable[..., Any] | None = None,
        on_test_end: Callable[..., Any] | None = None,
        on_exception: Callable[..., Any] | None = None,
        on_save_checkpoint: Callable[..., Any] | None = None,
        on_load_checkpoint: Callable[..., Any] | None = None,
        on_before_backward: Callable[..., Any] | None = None,
        on_after_backward: Callable[..., Any] | None = None,
        on_before_optimizer_step: Callable[..., Any] | None = None,
        on_before_zero_grad: Callable[..., Any] | None = None,
        on_predict_start: Callable[..., Any] | None = None,
        on_predict_end: Callable[..., Any] | None = None,
        on_predict_batch_start: Callable[..., Any] | None = None,
        on_predict_batch_end: Callable[..., Any] | None = None,
        on_predict_epoch_start: Callable[..., Any] | None = None,
        on_predict_epoch_end: Callable[..., Any] | None = None,
        **misspelt: Any,
    ) -> None:
        functions = {name: function for name, function in locals().items() if name.startswith("on_")}
        functions |= {"setup": setup, "teardown": teardown}
        for name in misspelt:
            raise TypeError(f"LambdaCallback() has no hook {name!r}.{did_you_mean(name, functions)}")
        for name, function in functions.items():
            if function is not None:
                setattr(self, name, function)


__all__ = ["LambdaCallback"]
