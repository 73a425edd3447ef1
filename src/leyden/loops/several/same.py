# SPDX-License-Identifier: Apache-2.0
"""What must be the same on all ranks of a run, or else they wait for each other: their modules, settings and kinds of run.

All compare a digest of it once for a run, in an exchange that is made anyway; only where it differs they look further.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from leyden.errors import MisconfigurationException

_SETTINGS = (
    "max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "limit_train_batches", "limit_val_batches",
    "limit_test_batches", "limit_predict_batches", "overfit_batches", "val_check_interval", "check_val_every_n_epoch",
    "num_sanity_val_steps", "log_every_n_steps", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm",
    "reload_dataloaders_every_n_epochs", "fast_dev_run", "semantics", "use_distributed_sampler",
)  # fmt: skip
"""The arguments of the Trainer by which ranks decide what comes next."""


def facts(session: Any) -> list[tuple[str, str]]:
    """Return names and values of a Session, in the same order on all ranks that run the same program."""
    module, config, strategy = session.module, session.config, session.trainer.strategy
    name = type(module).__name__
    found = [
        ("the run", f"Trainer.{session.trainer.state.fn} of a {name}"),
        ("whether a validation runs", str(session.validates)),
        ("automatic_optimization", str(module.automatic_optimization)),
        ("the strategy", type(strategy).__name__),
        ("the precision", str(getattr(strategy.precision, "precision", ""))),
        ("torch", str(torch.__version__)),
    ]
    found += [(f"Trainer({setting}=...)", repr(getattr(config, setting))) for setting in _SETTINGS]
    found += [(f"parameter {path!r} of {name}", _shape(tensor)) for path, tensor in module.named_parameters()]
    return found


def _shape(tensor: Any) -> str:
    if torch.nn.parameter.is_lazy(tensor):
        return "not made yet"
    return f"{tuple(tensor.shape)}, {tensor.dtype}, {'trained' if tensor.requires_grad else 'not trained'}"


def digest(found: list[tuple[str, str]]) -> float:
    """A number that a float64 holds exactly, other for other facts."""
    text = "\n".join(f"{name}: {value}" for name, value in found)
    return float(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big"))


def complain(rows: list[list[tuple[str, str]]]) -> None:
    """Compare the facts of all ranks.

    Raises:
        MisconfigurationException: naming the first that differs, its values, and the ranks that have them.
    """
    for place in range(max(len(row) for row in rows)):
        ranks: dict[str, list[int]] = {}
        for rank, row in enumerate(rows):
            said = f"{row[place][0]}: {row[place][1]}" if place < len(row) else "nothing more"
            ranks.setdefault(said, []).append(rank)
        if len(ranks) > 1:
            shown = "; ".join(
                f"{'ranks' if len(those) > 1 else 'rank'} {', '.join(map(str, those))} "
                f"{'have' if len(those) > 1 else 'has'} {said}"
                for said, those in ranks.items()
            )
            raise MisconfigurationException(
                f"The processes of this run do not run the same program. The first difference: {shown}. Start the same"
                " code with the same arguments on all machines; what only one rank should do goes behind"
                " `if trainer.is_global_zero:`, after the Trainer and the module are made."
            )


__all__ = ["complain", "digest", "facts"]
