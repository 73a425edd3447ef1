# SPDX-License-Identifier: Apache-2.0
"""The plug-in through which a strategy writes, reads and removes checkpoints; the ordinary one keeps files."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from leyden import files
from leyden.types import PathLike


class CheckpointIO(ABC):
    """Where checkpoints go. Extend it to keep them elsewhere, and pass it as ``Trainer(plugins=[MyIO()])``.

    Three methods have to be written. Where a save returns before the checkpoint is complete, the last six say how to
    wait for it; here, a save that has returned is complete.
    """

    @abstractmethod
    def save_checkpoint(self, checkpoint: dict[str, Any], path: PathLike, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``.

        Args:
            checkpoint: Plain data and tensors. It is not changed, and not kept beyond this call.
            path: Where.
            storage_options: What ``Trainer.save_checkpoint`` was given, for the file system.
        """

    @abstractmethod
    def load_checkpoint(
        self, path: PathLike, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return the checkpoint at ``path``.

        Args:
            path: Where.
            map_location: As in ``torch.load``.
            weights_only: None or True: run no code of the file; False: the user trusts it.
        """

    @abstractmethod
    def remove_checkpoint(self, path: PathLike) -> None:
        """Remove the checkpoint at ``path``."""

    def teardown(self) -> None:
        """Finish what is under way and let go of what only the run needed; a later save starts anew."""

    # -- for those that write while training goes on

    def together(self) -> AbstractContextManager[None]:
        """For saves of one moment: nothing that they hold changes between them, so that they can share a snapshot."""
        return nullcontext()

    def hand_over(self, content: Any, write: Callable[[Any], None]) -> None:
        """Call ``write(content)``; those that write behind take a snapshot of ``content``, and call it with that later."""
        write(content)

    def then(self, action: Callable[[], None]) -> None:
        """Call ``action`` when all that was saved so far is complete."""
        action()

    def otherwise(self, undo: Callable[[], None]) -> None:
        """Call ``undo`` if the last save, or an action after it, fails; those of later saves are called before."""

    def settle(self) -> None:
        """Return when all saves are complete; raise what one of them failed with, once."""

    def listen(self, fail: Callable[[BaseException], None] | None) -> None:
        """Tell ``fail`` at once, on whatever thread, when a save fails that had already returned; None: nobody."""


class TorchCheckpointIO(CheckpointIO):
    """One file for each checkpoint, in ``torch.save``'s format, written whole or not at all (see ``leyden.files``)."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: PathLike, storage_options: Any = None) -> None:
        """Write the file: under a temporary name, flushed, verified, and then renamed.

        Raises:
            CheckpointError: with the cause and the remedy; what was there before is still there.
        """
        files.save(checkpoint, path, storage_options=storage_options)

    def load_checkpoint(
        self, path: PathLike, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the file.

        Raises:
            CheckpointError: naming what is wrong with it.
        """
        loaded: dict[str, Any] = files.load(path, map_location=map_location, weights_only=weights_only is not False)
        return loaded

    def remove_checkpoint(self, path: PathLike) -> None:
        """Remove the file, if it is there."""
        files.remove(path)


def load_by(
    plugin: CheckpointIO, path: PathLike, map_location: Any = None, weights_only: bool | None = None
) -> dict[str, Any]:
    """Let ``plugin`` read a checkpoint; it may be an older one that knows nothing of ``weights_only``."""
    parameters = inspect.signature(plugin.load_checkpoint).parameters
    knows = "weights_only" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    more = {"weights_only": weights_only} if knows else {}
    return plugin.load_checkpoint(path, map_location=map_location, **more)
