# SPDX-License-Identifier: Apache-2.0
"""Every error and warning that Leyden raises on purpose, and the helper that suggests the name a user meant.

LeydenError
├── MisconfigurationException (also a ValueError)   what was asked for cannot be; nothing has run yet
│   ├── NoModuleError (also a TypeError)            there is no module to run
│   └── RemovedHookError (also a NotImplementedError)  a hook is written that nothing calls any more
└── CheckpointError (also a RuntimeError)           a checkpoint cannot be written, read or applied
    ├── WeightsOnlyError (also a KeyError)          it holds no more than weights, and a fit should go on from it
    ├── CheckpointNotFoundError (also a FileNotFoundError)
    └── CheckpointDamagedError                      it was written or copied badly, or has changed since
SIGTERMException (a SystemExit, code 143)           the process was asked to end
EndOfRun (a BaseException)                          a run has done what it was begun for

LeydenWarning (a UserWarning)
└── PossibleUserWarning                             likely, but not certainly, a mistake
LeydenDeprecationWarning (a DeprecationWarning)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LeydenError(Exception):
    """Base of the errors that Leyden raises on purpose. User exceptions are never wrapped in it."""


class MisconfigurationException(LeydenError, ValueError):
    """The user asked for something that cannot work: the message names the argument, its value and the remedy."""


class NoModuleError(MisconfigurationException, TypeError):
    """An entry point was called without a module, and none was known from before."""


class RemovedHookError(MisconfigurationException, NotImplementedError):
    """A hook was written that is not called any more, and whose results would be missed."""


class CheckpointError(LeydenError, RuntimeError):
    """A checkpoint could not be written, read or applied."""


class WeightsOnlyError(CheckpointError, KeyError):
    """A fit was to go on from a checkpoint that holds no state of a training."""

    __str__ = Exception.__str__  # KeyError would show the message as a quoted key


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """The checkpoint that was asked for does not exist."""


class CheckpointDamagedError(CheckpointError):
    """The checkpoint is cut off, empty, or not what was written: another one must be used."""


class SIGTERMException(SystemExit):
    """Raised between two steps after the process received SIGTERM."""

    def __init__(self) -> None:
        super().__init__(143)


class EndOfRun(BaseException):
    """Raised in a hook of a run that has done what it was begun for: it is torn down, and its entry point returns.

    No Exception, so that no code of the user's takes it for a failure.
    """


class LeydenWarning(UserWarning):
    """Base of the warnings that Leyden gives."""


class PossibleUserWarning(LeydenWarning):
    """Something is legal, but probably not what the user meant."""


class LeydenDeprecationWarning(DeprecationWarning):
    """An old name or argument was used; the message says the new one."""


def did_you_mean(name: str, allowed: Iterable[str], cutoff: float = 0.6) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest of ``allowed``, or an empty string if none is close.

    ``cutoff`` says how close, from 0 (anything) to 1 (the same). The result starts with a space, so that it can be
    appended to a sentence.
    """
    close = difflib.get_close_matches(name, sorted(set(allowed)), n=1, cutoff=cutoff)
    return f" Did you mean {close[0]!r}?" if close else ""
