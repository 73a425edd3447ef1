# SPDX-License-Identifier: Apache-2.0
"""Loss scaling for gradients that are spread over processes: a number that is not finite on one of them counts on all."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from leyden.strategies.mesh import by_kind, local
from leyden.tree import parameters_of


class ShardedScaler(GradScaler):
    """torch's GradScaler for DTensors on any mesh, and plain tensors beside them."""

    @classmethod
    def instead_of(cls, scaler: GradScaler) -> ShardedScaler:
        """Return one that goes on where ``scaler`` stands."""
        made = cls(scaler._device, enabled=scaler.is_enabled())  # noqa: SLF001  # torch does not tell otherwise
        made.load_state_dict(scaler.state_dict())
        return made

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        """Divide all gradients by the scale; return whether any of them, on any process, was not finite."""
        grads: list[Any] = [p.grad for p in parameters_of(optimizer) if p.grad is not None]
        if not allow_fp16 and any(grad.dtype == torch.float16 for grad in grads):
            raise ValueError("Attempting to unscale FP16 gradients.")
        device = inv_scale.device
        for together in by_kind(local(grad) for grad in grads):
            found = found_inf.to(together[0].device)
            torch._amp_foreach_non_finite_check_and_unscale_(together, found, inv_scale.to(together[0].device))
            found_inf = torch.maximum(found_inf, found.to(device))
        dist.all_reduce(found_inf, op=dist.ReduceOp.MAX)
        return {device: found_inf}
