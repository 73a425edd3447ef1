# SPDX-License-Identifier: Apache-2.0
"""Say and do things on the first process only: messages, warnings, and the decorator ``rank_zero_only``."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any, ParamSpec, TypeVar

from leyden.errors import LeydenDeprecationWarning, LeydenWarning, PossibleUserWarning

P = ParamSpec("P")
T = TypeVar("T")

# LOCAL_RANK comes before SLURM_PROCID: SLURM sets the latter even where something else starts the processes
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")

_logger = logging.getLogger("leyden")


def rank_from_environment() -> int | None:
    """Return the rank that the launcher of this process has put into the environment, or None if there was none."""
    for name in _RANK_VARIABLES:
        value = os.environ.get(name, "").strip()
        if value.isdigit():
            return int(value)
    return None


class RankZeroOnly:
    """The decorator ``rank_zero_only``: a decorated function runs on rank 0 and returns ``default`` elsewhere.

    ``rank`` is this process's global rank. It starts as what the environment says, or 0; the strategy sets it when
    it knows better.
    """

    def __init__(self) -> None:
        self.rank: int = rank_from_environment() or 0

    def __call__(self, fn: Callable[P, T], default: T | None = None) -> Callable[P, T | None]:
        @functools.wraps(fn)
        def on_rank_zero(*args: P.args, **kwargs: P.kwargs) -> T | None:
            return fn(*args, **kwargs) if self.rank == 0 else default

        return on_rank_zero


rank_zero_only = RankZeroOnly()


class _Stderr(logging.Handler):
    """Writes to whatever ``sys.stderr`` is at that moment, and keeps quiet once the user configures logging."""

    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger().handlers:
            return
        try:
            print(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


def _speak(level: int, message: object, args: tuple[Any, ...], stacklevel: int, more: dict[str, Any]) -> None:
    # lazily, so that importing leyden configures nothing, and the root logger is never touched
    if not _logger.hasHandlers():
        _logger.addHandler(_Stderr())
    if _logger.level == logging.NOTSET:
        _logger.setLevel(logging.INFO)
    _logger.log(level, message, *args, stacklevel=stacklevel, **more)


def rank_zero_info(message: object = "", *args: Any, stacklevel: int = 4, **kwargs: Any) -> None:
    """Tell the user something, on rank 0: a line on stderr, or wherever the user has sent the logger ``leyden``.

    ``args`` are merged into ``message`` with ``%``, as in :mod:`logging`. ``stacklevel`` 4 names the caller of this
    function, 5 its caller; ``kwargs`` (``extra=`` …) go to :mod:`logging`.
    """
    if rank_zero_only.rank == 0:
        _speak(logging.INFO, message, args, stacklevel - 1, kwargs)


def rank_zero_debug(message: object = "", *args: Any, stacklevel: int = 4, **kwargs: Any) -> None:
    """Log at debug level, on rank 0; shown when the logger ``leyden`` is set to ``DEBUG``."""
    if rank_zero_only.rank == 0:
        _speak(logging.DEBUG, message, args, stacklevel - 1, kwargs)


def say(text: str) -> None:
    """Print what a run can do without: a reader that is gone (``| head``, a closed terminal) does not end it."""
    try:
        print(text)
    except (OSError, ValueError) as error:
        if not output_is_gone(error):
            raise


def output_is_gone(error: BaseException) -> bool:
    """Whether ``error`` says that nothing can be printed any more: the pipe, the terminal or the file is no more."""
    return isinstance(error, OSError) or (isinstance(error, ValueError) and "closed file" in str(error))


def rank_zero_warn(
    message: str | Warning, stacklevel: int = 4, category: type[Warning] = LeydenWarning, **kwargs: Any
) -> None:
    """Warn on rank 0. ``stacklevel`` 4 blames the caller of this function, 5 its caller, and so on.

    ``POSSIBLE_USER_WARNINGS=off`` in the environment silences those of the kind ``PossibleUserWarning``.
    Where the blamed line would be one of Leyden's, the line outside that led there is blamed: the user can change only that.
    """
    if rank_zero_only.rank == 0 and not (issubclass(category, PossibleUserWarning) and _are_unwanted()):
        warnings.warn(message, category, stacklevel=_outside(max(stacklevel - 2, 1)), **kwargs)


def _are_unwanted() -> bool:
    """Whether the environment asks for no warnings of what is only possibly wrong."""
    return os.environ.get("POSSIBLE_USER_WARNINGS", "").strip().lower() in ("0", "off")


def rank_zero_deprecation(
    message: str | Warning, stacklevel: int = 5, category: type[Warning] = LeydenDeprecationWarning, **kwargs: Any
) -> None:
    """Warn on rank 0 that an old name was used. ``stacklevel`` 5 blames the caller of this function."""
    if rank_zero_only.rank == 0:
        warnings.warn(message, category, stacklevel=_outside(max(stacklevel - 3, 1)), **kwargs)


def _outside(level: int) -> int:
    """Return the first level from ``level`` up whose frame is not ours; ``level`` itself if all are."""
    frame, frames = inspect.currentframe(), list[FrameType]()
    frame = frame and frame.f_back
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    for above in range(level, len(frames) + 1):
        module = str(frames[above - 1].f_globals.get("__name__", "")).partition(".")[0]
        if module not in ("leyden", "contextlib"):
            return above
    return level
