# SPDX-License-Identifier: Apache-2.0
"""torch's writer of TensorBoard events, with a file that can wait for the first event."""

from __future__ import annotations

from typing import Any

from torch.utils.tensorboard import SummaryWriter


class EventWriter(SummaryWriter):
    """A ``SummaryWriter``, all of it.

    Args:
        log_dir: where its file goes.
        waits: make the file when there is an event to write, not at once.
        **kwargs: those of ``SummaryWriter``.
    """

    file_writer: Any
    all_writers: Any
    purge_step: Any

    def __init__(self, log_dir: str, waits: bool = False, **kwargs: Any) -> None:
        self._waits = waits
        super().__init__(log_dir, **kwargs)
        self._waits = False

    def _get_file_writer(self) -> Any:
        return None if self._waits else super()._get_file_writer()  # type: ignore[no-untyped-call]

    def add(self, summary: Any, step: int | None) -> None:
        """Write one event with all that is in ``summary``; if the writer was closed, to a new file."""
        (self.file_writer or self._get_file_writer()).add_summary(summary, step)
