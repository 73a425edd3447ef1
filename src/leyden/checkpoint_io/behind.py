# SPDX-License-Identifier: Apache-2.0
"""Write checkpoints behind the training: a snapshot is taken at once, and a thread writes it while training goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import Thread, current_thread
from typing import Any, NamedTuple

from leyden.checkpoint_io.base import CheckpointIO, TorchCheckpointIO, load_by
from leyden.checkpoint_io.staging import Staging
from leyden.types import PathLike


class _Task(NamedTuple):
    """One thing that the thread does, or (``is_undo``) that it does if one before it fails."""

    do: Callable[[], None]
    is_undo: bool = False


class AsyncCheckpointIO(CheckpointIO):
    """Saves return as soon as a snapshot is taken; a thread then hands it to ``checkpoint_io``.

    The snapshot is of exactly the moment of the call, whatever changes in place afterwards; tensors that share memory
    share it in the file, too. It takes one copy of the checkpoint's tensors in host memory, which the next save reuses;
    so a save that comes while one is being written waits for it. Tensors of a GPU come through pinned memory, and in the
    file they are tensors of the host.

    There is a thread only while something is being written, and an interpreter that ends waits for it. Loading, removing,
    ``teardown`` and the end of a fit wait, too. If a save fails, the Trainer raises its error at the end of the batch
    that runs; elsewhere the next call does.

    Args:
        checkpoint_io: What writes; it is called on the thread. None: a TorchCheckpointIO.
    """

    def __init__(self, checkpoint_io: CheckpointIO | None = None) -> None:
        self.checkpoint_io = checkpoint_io or TorchCheckpointIO()
        self._staging = Staging()
        self._tasks: list[_Task] | None = None  # of the moment that is being put together
        self._thread: Thread | None = None
        self._error: BaseException | None = None
        self._fail: Callable[[BaseException], None] | None = None

    @property
    def is_writing(self) -> bool:
        """Whether something that was saved is not complete yet."""
        return self._tasks is not None or (self._thread is not None and self._thread.is_alive())

    def save_checkpoint(self, checkpoint: dict[str, Any], path: PathLike, storage_options: Any = None) -> None:
        """Take a snapshot and return; the rest happens on the thread.

        Raises:
            CheckpointError: if something in ``checkpoint`` cannot be pickled.
            Exception: what an earlier save failed with.
        """
        save = partial(self.checkpoint_io.save_checkpoint, path=path, storage_options=storage_options)
        self.hand_over(checkpoint, save)

    def hand_over(self, content: Any, write: Callable[[Any], None]) -> None:
        """Take a snapshot of ``content`` and return; ``write`` is called with it on the thread. Errors are those of a save."""
        if self._is_thread():  # somebody who was told of a file saves another one
            write(content)
            return
        with self.together():
            snapshot = self._staging.take(content)
            self._add(_Task(lambda: write(snapshot.build())))

    def load_checkpoint(
        self, path: PathLike, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Wait until all is written, and read the checkpoint at ``path``."""
        self.settle()
        return load_by(self.checkpoint_io, path, map_location, weights_only)

    def remove_checkpoint(self, path: PathLike) -> None:
        """Wait until all is written, and remove the checkpoint at ``path``."""
        self.settle()
        self.checkpoint_io.remove_checkpoint(path)

    def teardown(self) -> None:
        """Wait until all is written, and give the memory back."""
        try:
            self.settle()
        finally:
            self._staging.clear()
            self.checkpoint_io.teardown()

    @contextmanager
    def together(self) -> Iterator[None]:
        """For saves of one moment: they share a snapshot, and are written one after the other."""
        if self._tasks is not None or self._is_thread():
            yield
            return
        self.settle()
        self._tasks = []
        self._staging.begin()
        try:
            yield
        finally:
            tasks, self._tasks = self._tasks, None
            self._staging.end()
            if tasks:
                # not a daemon: an interpreter that ends must not cut a file short
                self._thread = Thread(target=self._run, args=(tasks,), name="leyden-checkpoint", daemon=False)
                self._thread.start()

    def then(self, action: Callable[[], None]) -> None:
        """Call ``action``, on the thread, when all that was saved so far is complete."""
        if self._tasks is not None:
            self._add(_Task(action))
        else:
            self.settle()
            action()

    def otherwise(self, undo: Callable[[], None]) -> None:
        """Call ``undo``, on the thread, if the last save, or an action after it, fails."""
        if self._tasks is not None:
            self._add(_Task(undo, is_undo=True))

    def settle(self) -> None:
        """Return when all is written; raise what a save failed with, once."""
        if self._is_thread():
            return
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # or the exception and this frame would keep each other alive

    def listen(self, fail: Callable[[BaseException], None] | None) -> None:
        """Tell ``fail``, on the thread, when a save fails."""
        self._fail = fail

    def _is_thread(self) -> bool:
        return current_thread() is self._thread

    def _add(self, task: _Task) -> None:
        assert self._tasks is not None
        self._tasks.append(task)

    def _run(self, tasks: list[_Task]) -> None:
        """Do the tasks in order; if one fails, none after it is done, and those that undo are, the last one first."""
        for index, task in enumerate(tasks):
            try:
                if not task.is_undo:
                    task.do()
            except BaseException as error:
                self._error = error
                try:
                    for later in reversed(tasks[index:]):
                        if later.is_undo:
                            later.do()
                finally:
                    if self._fail is not None:
                        self._fail(error)
                return


def write_behind(strategy: Any) -> AsyncCheckpointIO | None:
    """Let ``strategy`` save asynchronously; return what was put before its plug-in, None if it did already."""
    former: CheckpointIO = strategy.checkpoint_io
    if isinstance(former, AsyncCheckpointIO):
        return None
    strategy.checkpoint_io = behind = AsyncCheckpointIO(former)
    return behind
