# SPDX-License-Identifier: Apache-2.0
"""The base of plug-ins that add something to another one, which does the work."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from leyden.checkpoint_io.base import CheckpointIO, TorchCheckpointIO


class WrappingCheckpointIO(CheckpointIO):
    """Hands every call to the plug-in that it wraps. Extend it, override what is to be added to, and call ``super()``.

    Args:
        checkpoint_io: What does the work; None: a TorchCheckpointIO.
    """

    def __init__(self, checkpoint_io: CheckpointIO | None = None) -> None:
        self._checkpoint_io = checkpoint_io

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """What does the work; the innermost one can be set once, where none was given."""
        if self._checkpoint_io is None:
            self._checkpoint_io = TorchCheckpointIO()
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, checkpoint_io: CheckpointIO) -> None:
        if self._checkpoint_io is None:
            self._checkpoint_io = checkpoint_io
        elif isinstance(self._checkpoint_io, WrappingCheckpointIO):
            self._checkpoint_io.checkpoint_io = checkpoint_io

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Let the wrapped plug-in save."""
        self.checkpoint_io.save_checkpoint(*args, **kwargs)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Let the wrapped plug-in load."""
        return self.checkpoint_io.load_checkpoint(*args, **kwargs)

    def remove_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Let the wrapped plug-in remove."""
        self.checkpoint_io.remove_checkpoint(*args, **kwargs)

    def teardown(self) -> None:
        """Let the wrapped plug-in finish."""
        self.checkpoint_io.teardown()

    def together(self) -> AbstractContextManager[None]:
        """See CheckpointIO."""
        return self.checkpoint_io.together()

    def hand_over(self, content: Any, write: Callable[[Any], None]) -> None:
        """See CheckpointIO."""
        self.checkpoint_io.hand_over(content, write)

    def then(self, action: Callable[[], None]) -> None:
        """See CheckpointIO."""
        self.checkpoint_io.then(action)

    def otherwise(self, undo: Callable[[], None]) -> None:
        """See CheckpointIO."""
        self.checkpoint_io.otherwise(undo)

    def settle(self) -> None:
        """See CheckpointIO."""
        self.checkpoint_io.settle()

    def listen(self, fail: Callable[[BaseException], None] | None) -> None:
        """See CheckpointIO."""
        self.checkpoint_io.listen(fail)
