# SPDX-License-Identifier: Apache-2.0
"""Ends a run when its loss jumps, and writes down which batches to leave out when it is started again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from leyden.callback import Callback
from leyden.errors import did_you_mean
from leyden.types import PathLike, TrainerView

FILE = "skip_batches.json"


class TrainingSpikeException(RuntimeError):
    """The loss has jumped.

    Args:
        batch_idx: The batch with which it did.
    """

    def __init__(self, batch_idx: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(f"Training spike detected in batch {batch_idx}", *args, **kwargs)
        self.batch_idx = batch_idx

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.batch_idx,)


class RunningMean:
    """The mean of the last ``window`` values.

    Args:
        window: How many.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.count = 0
        self.values: list[Tensor] = [torch.zeros(())] * window
        """Float32 numbers; the newest takes the place of the oldest."""

    def to(self, device: torch.device) -> RunningMean:
        """Bring the values to a device."""
        self.values = [value.to(device) for value in self.values]
        return self

    def update(self, value: Tensor | float) -> None:
        """Take one value up."""
        place = self.count % self.window
        self.values[place] = torch.as_tensor(value, dtype=torch.float32, device=self.values[place].device).mean()
        self.count += 1

    def compute(self) -> Tensor:
        """Return the mean; no number before the first value."""
        total = self.values[0]
        for value in self.values[1:]:
            total = total + value
        return total / min(self.count, self.window) if self.count else torch.full_like(total, torch.nan)

    def state_dict(self) -> dict[str, Any]:
        """Return the values, in the order of their places."""
        return {"values": [value.item() for value in self.values], "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` returned; what another framework has left, which is nothing, begins anew."""
        device = self.values[0].device
        self.count = state.get("count", 0)
        self.values = [torch.tensor(value, device=device) for value in state.get("values", [0.0] * self.window)]
        self.window = len(self.values)


class FabricSpikeDetection:
    """Compares each loss with the mean of those before it; for loops of your own, with Fabric.

    A loss is a spike if it is worse than the one before and differs from the mean by at least ``atol`` and at least
    ``rtol`` times the mean. On a spike on any rank all ranks write the batch and the one before it, which may have spoilt
    the weights, to ``exclude_batches_path``, and raise.

    Args:
        mode: Whether less (``"min"``) or more (``"max"``) is better.
        window: Losses in the mean.
        warmup: Batches before the first that is judged.
        atol: Smallest difference that counts; None is any.
        rtol: Smallest difference that counts, as a share of the mean; None is any.
        exclude_batches_path: A ``.json`` file, or a folder for ``skip_batches.json``; None is the working directory.
        finite_only: A loss that is no number or infinite is a spike; otherwise it is passed over.

    Raises:
        TrainingSpikeException: by ``on_train_batch_end``.
        ValueError: for an unknown ``mode``, when a loss is judged.
    """

    def __init__(
        self,
        mode: Literal["min", "max"] = "min",
        window: int = 10,
        warmup: int = 1,
        atol: float | None = None,
        rtol: float | None = 2.0,
        exclude_batches_path: PathLike | None = None,
        finite_only: bool = True,
    ) -> None:
        self.last_val: Tensor | float = 0.0
        self.running_mean = RunningMean(window)
        self.mode = mode
        self.warmup = warmup
        self.atol = atol
        self.rtol = rtol
        self.bad_batches: list[int] = []
        self.exclude_batches_path = exclude_batches_path
        self.finite_only = finite_only

    @torch.no_grad()
    def on_train_batch_end(self, fabric: Any, loss: Tensor, batch: Any, batch_idx: int) -> None:
        """Judge the loss of a batch."""
        self._judge(fabric.strategy, fabric.global_rank, loss, batch_idx, os.getcwd())

    def _judge(self, strategy: Any, rank: int, loss: Tensor, batch_idx: int, folder: str) -> None:
        if batch_idx == 0:
            self.running_mean.to(strategy.root_device)
        path = str(folder if self.exclude_batches_path is None else self.exclude_batches_path)
        self.exclude_batches_path = path = path if path.endswith(".json") else os.path.join(path, FILE)
        here = batch_idx >= self.warmup and self._is_spike(loss)
        if strategy.reduce_boolean_decision(here, all=False):
            self.bad_batches.extend([batch_idx - 1, batch_idx])
            if rank == 0:
                os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
                with open(path, "w", encoding="utf-8") as file:
                    json.dump(self.bad_batches, file, indent=4)
            raise TrainingSpikeException(batch_idx)
        if self.finite_only or strategy.reduce_boolean_decision(bool(torch.isfinite(loss).all()), all=True):
            self.running_mean.update(loss)
            self.last_val = loss

    def _is_spike(self, loss: Tensor) -> bool:
        if self.finite_only and not torch.isfinite(loss):
            return True
        if self._is_better(loss - self.last_val):
            return False
        mean = self.running_mean.compute()
        difference = abs(loss - mean)
        return bool(self.atol is None or difference >= abs(self.atol)) and bool(
            self.rtol is None or difference >= abs(self.rtol * mean)
        )

    def _is_better(self, change: Tensor) -> bool:
        if self.mode not in ("min", "max"):
            raise ValueError(
                f"SpikeDetection(mode={self.mode!r}) is not valid: it must be 'min' or 'max'."
                f"{did_you_mean(str(self.mode), ('min', 'max'))}"
            )
        return bool((change <= 0 if self.mode == "min" else change >= 0).all())

    def state_dict(self) -> dict[str, Any]:
        """Return the last loss, the arguments, the batches to leave out, and what is in the mean."""
        last = self.last_val
        return {
            "last_val": last.item() if isinstance(last, Tensor) else last,
            "mode": self.mode,
            "warmup": self.warmup,
            "atol": self.atol,
            "rtol": self.rtol,
            "bad_batches": self.bad_batches,
            "bad_batches_path": None if self.exclude_batches_path is None else str(self.exclude_batches_path),
            "running": self.running_mean.state_dict(),
            "mean": {},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""
        self.last_val = state_dict["last_val"]
        self.mode, self.warmup = state_dict["mode"], state_dict["warmup"]
        self.atol, self.rtol = state_dict["atol"], state_dict["rtol"]
        self.bad_batches = state_dict["bad_batches"]
        self.exclude_batches_path = state_dict["bad_batches_path"]
        self.running_mean.load_state_dict(state_dict["running"])


class SpikeDetection(FabricSpikeDetection, Callback):
    """Ends a fit when the loss of a training batch jumps; see ``FabricSpikeDetection`` for how, and for the arguments.

    Without ``exclude_batches_path`` the batches to leave out are written to ``skip_batches.json`` in ``default_root_dir``.
    Judging a loss waits for the device in each batch.
    """

    @torch.no_grad()
    def on_train_batch_end(  # type: ignore[override]  # a Trainer calls it with more than Fabric's users do
        self, trainer: TrainerView, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Judge the loss of a batch.

        Raises:
            TypeError: where the step returned no loss.
        """
        if not isinstance(outputs, (Tensor, Mapping)):
            raise TypeError(
                f"SpikeDetection needs the loss of each batch: training_step() returned {type(outputs).__name__}; it must be a"
                " tensor or a dict with the key 'loss'."
            )
        loss = (outputs if isinstance(outputs, Tensor) else outputs["loss"]).detach()
        self._judge(trainer.strategy, trainer.global_rank, loss, batch_idx, trainer.default_root_dir)


__all__ = ["FabricSpikeDetection", "RunningMean", "SpikeDetection", "TrainingSpikeException"]
