# SPDX-License-Identifier: Apache-2.0
"""The way for a step through a module's own call, for strategies that have their say before and after its ``forward``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Through:
    """Stands on a module as its ``forward`` while a run lasts.

    Attributes:
        step: What the next call of the module runs; None is the module's own forward.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.former = vars(module).get("forward")
        self.forward = module.forward
        self.step: Callable[..., Any] | None = None
        vars(module)["forward"] = self  # past nn.Module's own bookkeeping

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step, self.step = self.step, None
        return self.forward(*args, **kwargs) if step is None else step(*args, **kwargs)

    def remove(self) -> None:
        """Give the module its forward back."""
        if vars(self.module).get("forward") is self:
            del vars(self.module)["forward"]
            if self.former is not None:
                vars(self.module)["forward"] = self.former
