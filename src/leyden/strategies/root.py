# SPDX-License-Identifier: Apache-2.0
"""What stands around a module whose steps run with its weights brought together, and calls it inside."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

ROOT = "_leyden_root"
"""The attribute of a module that is what stands around it."""


class Root(nn.Module):
    """Stands around a module, so that the module itself may be called any number of times in one step."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.handles: list[Any] = []
        """The hooks of the strategy that has it."""

    def let_be(self) -> None:
        """Take away the hooks of the strategy that had it."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def forward(self, step: Callable[[], Any]) -> Any:
        """Run a step."""
        return step()


class Entered(nn.Module):
    """Calls a module inside the call of what stands around it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        module: Any = self.module
        return vars(module)[ROOT](partial(module, *args, **kwargs))

    def set_requires_gradient_sync(self, exchanging: bool) -> None:
        """Say whether the next backward exchanges gradients."""
        vars(self.module)[ROOT].set_requires_gradient_sync(exchanging)


class Gap:
    """Brings the weights that belong to no sharded layer together when one of theirs is called outside a step.

    Attributes:
        open: Whether they may be apart. A plain attribute, so that a step can be compiled through this.
        used: Whether anything was brought together that no backward lets go of.
    """

    def __init__(self, bring_together: Callable[[], Any]) -> None:
        self.bring_together = bring_together
        self.open, self.used = True, False

    def before_call(self, _layer: Any, _args: Any) -> None:
        """Runs before each call of a layer."""
        if self.open:
            self.used = True
            self.bring_together()


def uncalled(error: object) -> RuntimeError:
    """Return the error of a step that uses a layer's weights where they are not whole."""
    return RuntimeError(
        f"{error}\nUnder strategy='fsdp' a layer that is sharded by itself must be called, as in self.layer(x): only then are"
        " its weights whole, not for a penalty on self.parameters(), say. Call it (and use the optimizer's weight_decay), leave"
        " it out with FSDPStrategy(auto_wrap_policy=...), or keep it whole with FSDPStrategy(ignored_modules=[...])."
    )
