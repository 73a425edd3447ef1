# SPDX-License-Identifier: Apache-2.0
"""Loggers that there are no more, or that are not here: making one says so, and what to use in its place."""

from __future__ import annotations

from typing import Any

_INSTEAD = "Use WandbLogger, MLFlowLogger or CometLogger for a service, TensorBoardLogger or CSVLogger for files."


class NeptuneLogger:
    """The logger of a service that has closed.

    Raises:
        RuntimeError: always.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"NeptuneLogger is no longer there: the service has closed. {_INSTEAD}")


class LitLogger:
    """The logger of another trainer's platform.

    Raises:
        RuntimeError: always.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"LitLogger is not built: it logs to the platform of another trainer only. {_INSTEAD}")
