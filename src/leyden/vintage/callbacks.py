# SPDX-License-Identifier: Apache-2.0
"""What the Trainer of 2019 did by arguments of its own and callbacks do today: norms of gradients, and which are NaN."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from leyden.callback import Callback
from leyden.types import TrainerView


def _gradients(module: Any) -> dict[str, Tensor]:
    """The gradients that are there, by the name of their parameter; of sparse ones the values."""
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {name: grad.coalesce().values() if grad.is_sparse else grad for name, grad in found.items()}


def gradient_norms(module: Any, p: float) -> dict[str, float]:
    """Return the ``p``-norm of each gradient, ``grad_<p>_norm_<parameter>``, and of all, ``grad_<p>_norm_total``."""
    gradients = _gradients(module)
    if not gradients:
        return {}
    norms = torch.stack([torch.linalg.vector_norm(grad.detach().float(), p) for grad in gradients.values()])
    # the norm of the norms is the norm of all; one tensor, so that the device is waited for once
    *each, total = torch.cat([norms, torch.linalg.vector_norm(norms, p).reshape(1)]).tolist()
    named = {f"grad_{p:g}_norm_{name}": value for name, value in zip(gradients, each, strict=True)}
    return {**named, f"grad_{p:g}_norm_total": total}


class GradientNorms(Callback):
    """Logs the norm of each layer's gradient and the total at each row, as they are before clipping.

    Args:
        p: Which norm; infinity is the largest value.
    """

    def __init__(self, p: float) -> None:
        self.p = p

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint."""
        return self.make_state_key(p=self.p)

    def on_before_optimizer_step(self, trainer: TrainerView, pl_module: Any, optimizer: Optimizer) -> None:
        """Log the norms, if this update ends with a row; once, where several optimizers step."""
        every = trainer.log_every_n_steps
        due = trainer.fast_dev_run or (every > 0 and (trainer.batches_that_stepped + 1) % every == 0)
        if due and optimizer is trainer.optimizers[0]:
            pl_module.log_dict(gradient_norms(pl_module, self.p))


class NaNGradients(Callback):
    """Prints the names of the parameters whose gradients are NaN, after each backward that brings some."""

    def on_after_backward(self, trainer: TrainerView, pl_module: Any) -> None:
        """Look at all gradients."""
        gradients = _gradients(pl_module)
        if not gradients:
            return
        counts = torch.stack([torch.isnan(grad).sum() for grad in gradients.values()]).tolist()
        for (name, grad), count in zip(gradients.items(), counts, strict=True):
            if count:
                trainer.print(
                    f"NaN gradient in epoch {trainer.current_epoch}, step {trainer.global_step}: {name}"
                    f" ({count} of {grad.numel()} values)"
                )
