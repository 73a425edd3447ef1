# SPDX-License-Identifier: Apache-2.0
"""What a client's script keeps of its run, for ``run.py`` to compare: every metric at every moment, weights, predictions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FILE = Path("kept.pt")
"""Written into the folder in which the script runs."""

_rows: list[tuple[str, dict[str, Any]]] = []


def metrics(callback: type) -> Any:
    """Return a callback, made of the class ``Callback`` that the library uses, that notes all metrics whenever a batch ends."""

    def note(moment: str) -> Any:
        def hook(self: Any, trainer: Any, *args: Any) -> None:
            named = {**{f"logged {name}": value for name, value in trainer.logged_metrics.items()}}
            named |= {f"callback {name}": value for name, value in trainer.callback_metrics.items()}
            rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
            named |= {f"lr {index}": rate for index, rate in enumerate(rates)}
            _rows.append((f"{moment} {trainer.current_epoch} {trainer.global_step}", plain(named)))

        return hook

    hooks = (
        "train_batch",
        "train_epoch",
        "validation_batch",
        "validation_epoch",
        "validation",
        "train",
        "test",
        "predict",
    )
    made = type("KeepMetrics", (callback,), {f"on_{name}_end": note(name) for name in hooks})
    globals()["KeepMetrics"] = made  # some libraries pickle their callbacks, which looks the class up here
    return made()


def keep(**values: Any) -> None:
    """Write the noted metrics, and ``values``: modules (their state), tensors, arrays, numbers, strings, nested."""
    torch.save({"metrics": dict(enumerate(_rows)), **plain(values)}, FILE)


def plain(value: Any) -> Any:
    """Return ``value`` as dicts and lists of tensors, numbers and strings."""
    if isinstance(value, nn.Module):
        return plain(value.state_dict())
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "to_numpy"):  # a table of pandas or polars
        value = value.to_numpy()
    if hasattr(value, "tolist"):  # an array
        return plain(value.tolist())
    raise TypeError(f"keep() got a {type(value).__name__}: give it tensors, arrays, numbers, strings, or a module.")
