# SPDX-License-Identifier: Apache-2.0
"""What the Trainer of 2019 did by arguments of its own and callbacks do today: norms of gradients, and which are NaN."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from leyden.callback import Callback
from leyden.tree import parameters_of
from leyden.types import TrainerView


def _gradients(module: Any) -> dict[str, Tensor]:
    """The gradients that are there, by the name of their parameter; of sparse ones the values."""
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {name: grad.coalesce().values() if grad.is_sparse else grad for name, grad in found.items()}


def _norm_of_each(gradients: Mapping[str, Tensor], p: float) -> dict[str, float]:
    """Return the ``p``-norm of each gradient; the device is waited for once."""
    norms = [torch.linalg.vector_norm(grad.detach().float(), p) for grad in gradients.values()]
    values = torch.stack([norm.to(norms[0].device) for norm in norms]).tolist() if norms else []
    return dict(zip(gradients, values, strict=True))


def _named(norms: Mapping[str, float], p: float) -> dict[str, float]:
    """Return norms under the names of 2019, with the total: the norm of the norms is the norm of all."""
    if not norms:
        return {}
    total = torch.linalg.vector_norm(torch.tensor(list(norms.values())), p).item()
    return {**{f"grad_{p:g}_norm_{name}": norm for name, norm in norms.items()}, f"grad_{p:g}_norm_total": total}


def gradient_norms(module: Any, p: float) -> dict[str, float]:
    """Return the ``p``-norm of each gradient, ``grad_<p>_norm_<parameter>``, and of all, ``grad_<p>_norm_total``."""
    return _named(_norm_of_each(_gradients(module), p), p)


class GradientNorms(Callback):
    """Logs the norm of each layer's gradient and the total at each row, as they are before clipping.

    Each is measured when the optimizer of its parameter is about to step: not before are the gradients of mixed
    precision free of their scale.

    Args:
        p: Which norm; infinity is the largest value.
    """

    def __init__(self, p: float) -> None:
        self.p = p
        self._norms: dict[str, float] = {}
        self._row = -1

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint."""
        return self.make_state_key(p=self.p)

    def on_before_optimizer_step(self, trainer: TrainerView, pl_module: Any, optimizer: Optimizer) -> None:
        """Log the norms, if this update ends with a row; the total is over all optimizers that step in this batch."""
        every, row = trainer.log_every_n_steps, trainer.batches_that_stepped
        if not trainer.fast_dev_run and (every <= 0 or (row + 1) % every):
            return
        if self._row != row:
            self._norms, self._row = {}, row
        own = set(map(id, parameters_of(optimizer)))
        names = {name for name, parameter in pl_module.named_parameters() if id(parameter) in own}
        self._norms.update(
            _norm_of_each({name: grad for name, grad in _gradients(pl_module).items() if name in names}, self.p)
        )
        pl_module.log_dict(_named(self._norms, self.p))


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
