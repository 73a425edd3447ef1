# SPDX-License-Identifier: Apache-2.0
"""Saves one checkpoint when an exception ends a run: the state of training at that moment."""

from __future__ import annotations

import os
from typing import Any

from leyden.callbacks.checkpoint import Checkpoint
from leyden.callbacks.checkpoint_files import Ledger, is_inside, replaceable
from leyden.errors import MisconfigurationException
from leyden.runtime.ranks import rank_zero_info
from leyden.types import PathLike, TrainerFn, TrainerView


class OnExceptionCheckpoint(Checkpoint):
    """Saves the state of training as ``<dirpath>/<filename>.ckpt`` when an exception, or Ctrl-C, ends a fit.

    Args:
        dirpath: Folder, or the URL of one.
        filename: Name without extension.

    The run that goes on from it, or a later fit with the same object, overwrites it if an exception comes again; when it
    comes to its end, the file has served its purpose and is deleted, unless it was named as ``ckpt_path``. A file of that
    name that is of another run is neither overwritten nor deleted: the new one is then called ``on_exception-v1.ckpt``.

    Raises:
        MisconfigurationException: for an empty ``filename``.
    """

    FILE_EXTENSION = ".ckpt"

    def __init__(self, dirpath: PathLike, filename: str = "on_exception") -> None:
        if not filename:
            raise MisconfigurationException(
                f"OnExceptionCheckpoint(filename={filename!r}): it must have a letter at least. The default is"
                " 'on_exception'."
            )
        self.dirpath, self.filename = dirpath, filename
        self._ledger = Ledger()
        self._path = ""

    @property
    def ckpt_path(self) -> str:
        """Where the checkpoint is, or would be if the name is free."""
        return self._path or self._named(self.filename)

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint."""
        return self.make_state_key(filename=self.filename)

    @property
    def files(self) -> tuple[str, ...]:
        """The paths of the checkpoints that this run wrote and has not deleted."""
        return tuple(self._ledger.files)

    @property
    def mark(self) -> str:
        """A word that is in each file of this run."""
        return self._ledger.mark

    def _named(self, name: str) -> str:
        return os.path.join(self.dirpath, name + self.FILE_EXTENSION)

    def on_exception(self, trainer: TrainerView, pl_module: Any, exception: BaseException) -> None:
        """Save; the Trainer reports a failure to do so, and the exception goes on."""
        if trainer.fast_dev_run or trainer.state.fn != TrainerFn.FITTING:
            return
        path, version = self._path or self._named(self.filename), 1
        ours = trainer.strategy.broadcast(replaceable(trainer, self._path))
        while path != ours and self._ledger.is_taken(trainer, path):
            path, version = self._named(f"{self.filename}-v{version}"), version + 1
        before, self._path = self._path, path
        self._ledger.add(path)
        try:
            trainer.save_checkpoint(path)
        except BaseException:
            self._path, self._ledger.files = before, [before] * bool(before)
            raise
        rank_zero_info(f"{type(exception).__name__}: {exception}. Saved the state of training to {path}")

    def teardown(self, trainer: TrainerView, pl_module: Any, stage: str) -> None:
        """Delete the file, since what it was kept for is done."""
        if stage != "fit" or not self._path:
            return
        path, self._path, self._ledger.files = self._path, "", []
        if trainer.named_ckpt_path is None or os.path.abspath(trainer.named_ckpt_path) != os.path.abspath(path):
            trainer.strategy.remove_checkpoint(path)

    def state_dict(self) -> dict[str, Any]:
        """Return by what a run that resumes knows the file to be its own."""
        return {"path": self._path, "run": self._ledger.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what ``state_dict`` returned; in another folder nothing."""
        self._ledger.load_state_dict(state_dict["run"], str(self.dirpath))
        self._path = state_dict["path"] if is_inside(state_dict["path"], str(self.dirpath)) else ""
