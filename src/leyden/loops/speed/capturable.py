# SPDX-License-Identifier: Apache-2.0
"""Optimizers as a CUDA graph needs them, for the length of a run, and unchanged for all who look at them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from leyden.loops.session import Session


class Captured:
    """The optimizers of a fit, in the form that a graph needs, and back.

    Those of torch that can be captured step inside of the graph: ``capturable`` is set for the length of the run, and a
    learning rate that a schedule changes lies in a tensor on the device during the step. For everybody else, schedules
    and files included, it stays the number that it is. All others step after each replay.

    Args:
        session: The run.
        device: Where it computes.
        capturable: Whether torch's optimizers must be told that they are to be captured; None: on CUDA.

    Attributes:
        outside: The optimizers that step after a replay.
        free: The groups whose learning rate may change between two replays.
    """

    def __init__(self, session: Session, device: torch.device, capturable: bool | None = None) -> None:
        capturable = device.type == "cuda" if capturable is None else capturable
        scheduled = bool(session.strategy.lr_scheduler_configs)
        self.outside: list[Any] = []
        self.free: list[dict[str, Any]] = []
        self._rates: list[tuple[dict[str, Any], Tensor]] = []
        self._written: list[Any] = []
        self._flags: list[tuple[dict[str, Any], bool]] = []
        self._hooks: list[Any] = []
        for optimizer in session.strategy.optimizers:
            groups = optimizer.param_groups
            if scheduled:
                self.free += groups
            if not _steps_inside(optimizer, scheduled):
                self.outside.append(optimizer)
                continue
            if "capturable" in optimizer.defaults and capturable:
                self._make_capturable(optimizer, device)
            for group in groups if scheduled else ():
                if not isinstance(group["lr"], Tensor):  # a tensor of the user's own is read from where it lies
                    double = any(parameter.dtype == torch.float64 for parameter in group["params"])
                    rate = torch.zeros((), dtype=torch.float64 if double else torch.float32, device=device)
                    self._rates.append((group, rate))
                    self._written.append(None)

    def _make_capturable(self, optimizer: Any, device: torch.device) -> None:
        flags = [bool(group["capturable"]) for group in optimizer.param_groups]
        self._flags += zip(optimizer.param_groups, flags, strict=True)
        for group in optimizer.param_groups:
            group["capturable"] = True
        for state in optimizer.state.values():
            if isinstance(step := state.get("step"), Tensor) and step.device.type == "cpu":
                state["step"] = step.to(device)
        # torch would warn that steps run uncaptured, as the first ones must
        vars(optimizer)["_warned_capturable_if_run_uncaptured"] = True

        def as_before(_: Any, state: dict[str, Any]) -> None:
            # a file opens in a run without graphs as well
            for group, flag in zip(state["param_groups"], flags, strict=False):
                group["capturable"] = flag

        self._hooks.append(optimizer.register_state_dict_post_hook(as_before))

    def write(self) -> None:
        """Bring learning rates that have changed to the device; the host does not wait."""
        for index, (group, rate) in enumerate(self._rates):
            if group["lr"] != self._written[index]:
                self._written[index] = group["lr"]
                rate.fill_(group["lr"])

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """For the length of the block, learning rates are the tensors that ``write`` writes to."""
        numbers = [group["lr"] for group, _ in self._rates]
        for group, rate in self._rates:
            group["lr"] = rate
        try:
            yield
        finally:
            for (group, rate), number in zip(self._rates, numbers, strict=True):
                if group["lr"] is rate:  # else the step has set another one
                    group["lr"] = number

    def undo(self) -> None:
        """Give the optimizers back as they were."""
        for group, flag in self._flags:
            group["capturable"] = flag
        for hook in self._hooks:
            hook.remove()
        self._flags, self._hooks = [], []


def _steps_inside(optimizer: Any, scheduled: bool) -> bool:
    """Whether the step of an optimizer can be captured."""
    if not type(optimizer).__module__.startswith("torch.optim"):
        return False
    if "capturable" in optimizer.defaults:
        return True
    # only the fused kernel of SGD reads its learning rate from the device; without a schedule it is a constant
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return type(optimizer) is torch.optim.SGD and (fused or not scheduled)
