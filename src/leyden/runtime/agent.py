# SPDX-License-Identifier: Apache-2.0
"""The process of torchrun that has started this one, and starts it anew where one of a run fails or machines come and go.

Its variables say how often it has done so for a failure, but not for a change of machines, and an id that the user may give
to every launch alike. The folder in which it collects errors is of this launch alone, and is there as long as it is.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from dataclasses import dataclass
from pathlib import Path

_MARK = "leyden-{fit}"
_FITS = itertools.count()  # a process that is started anew makes the same fits in the same order
_fit: list[int] = [-1]


@dataclass(frozen=True)
class Agent:
    """Which process of torchrun has started this one.

    Attributes:
        name: Of no other launch, and the same in all processes that it starts, however often.
        since: When processes that it started began this fit first, in seconds since 1970; None where this is the first time.
    """

    name: str
    since: float | None = None


def begin_fit() -> Agent | None:
    """Count a fit of this process; return who has started it, or None where that was not torchrun."""
    _fit[0] = next(_FITS)
    folder = _folder()
    if folder is None:
        return None
    mark, since = folder / _MARK.format(fit=_fit[0]), None
    with contextlib.suppress(OSError):
        since = mark.stat().st_mtime
    return Agent(_name(folder), since)


def note() -> None:
    """Leave a mark that the fit has begun, for those that are started in the place of this process."""
    folder = _folder()
    if folder is not None:
        (folder / _MARK.format(fit=_fit[0])).touch()


def name() -> str | None:
    """Return the name of who has started this process; None where that was not torchrun."""
    folder = _folder()
    return None if folder is None else _name(folder)


def fit() -> int:
    """Return the number of the fit that this process has begun last."""
    return _fit[0]


def _folder() -> Path | None:
    path = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    head, attempt, _ = path.rpartition(f"{os.sep}attempt_")
    return Path(head) if attempt and os.environ.get("TORCHELASTIC_RUN_ID") and os.path.isdir(head) else None


def _name(folder: Path) -> str:
    return f"{socket.gethostname()}:{folder}"


__all__ = ["Agent", "begin_fit", "fit", "name", "note"]
