# SPDX-License-Identifier: Apache-2.0
"""The base class of profilers, and the one that measures nothing."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from leyden.types import PathLike


class Profiler(ABC):
    """Measures named actions; subclasses say what ``start`` and ``stop`` record and what ``summary`` reports.

    Args:
        dirpath: The folder of the report; None means the log folder of the run.
        filename: The report is appended to ``{stage}-{filename}-{local rank}.txt`` there; None prints it instead.
    """

    def __init__(self, dirpath: PathLike | None = None, filename: str | None = None) -> None:
        self.dirpath = dirpath
        self.filename = filename
        self._stage: str | None = None
        self._local_rank: int | None = None

    @abstractmethod
    def start(self, action_name: str) -> None:
        """Begin to measure an action."""

    @abstractmethod
    def stop(self, action_name: str) -> None:
        """End the measurement that ``start`` began."""

    @contextmanager
    def _measure(self, action_name: str) -> Iterator[str]:
        self.start(action_name)
        try:
            yield action_name
        finally:
            self.stop(action_name)

    def profile(self, action_name: str) -> AbstractContextManager[str]:
        """Return a context manager that measures what runs inside it under the given name."""
        return self._measure(action_name)

    def summary(self) -> str:
        """Return the report as text; an empty string means that there is nothing to tell."""
        return ""

    def describe(self) -> None:
        """Append the report to its file, or print it on the main process of the node."""
        report = self.summary()
        if not report:
            return
        if self.filename and self.dirpath:
            self._append(report)
        elif self.local_rank == 0:
            print(report)

    def _append(self, report: str) -> None:
        folder, name = self.dirpath, self.prepare_filename()
        if "://" in str(folder):
            import fsspec  # noqa: PLC0415 - only remote folders need it

            with fsspec.open(f"{str(folder).rstrip('/')}/{name}", "a") as file:
                file.write(report + "\n")
            return
        path = Path(str(folder)) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(report + "\n")

    def prepare_filename(self, action_name: str | None = None, extension: str = ".txt") -> str:
        """Return a file name made of the stage, ``filename``, the local rank and the action, where known."""
        rank = None if self._local_rank is None else str(self._local_rank)
        parts = [part for part in (self._stage, self.filename, rank, action_name) if part]
        # what no file system takes in a name
        return (re.sub(r"[\\/:*?\"<>|\n\r\t_]+", "_", "-".join(parts)).strip() or "profile") + extension

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """Called when an entry point of the Trainer begins.

        Args:
            stage: Its name: ``"fit"``, ``"validate"``, ``"test"``, ``"predict"``.
            local_rank: Rank of this process on its node.
            log_dir: Log folder of the run; the report goes there if no ``dirpath`` was given.
        """
        self._stage = str(stage)
        self._local_rank = local_rank
        self.dirpath = self.dirpath or log_dir

    def teardown(self, stage: str | None) -> None:
        """Called when an entry point of the Trainer ends; release here what ``setup`` took."""

    @property
    def local_rank(self) -> int:
        """Rank of this process on its node; 0 before ``setup``."""
        return self._local_rank or 0

    @property
    def title(self) -> str:
        """The first line of a report."""
        return f"{self._stage.upper()} Profiler Report" if self._stage else "Profiler Report"


class PassThroughProfiler(Profiler):
    """Measures nothing; the Trainer's profiler unless another one is asked for."""

    def start(self, action_name: str) -> None:
        """Do nothing."""

    def stop(self, action_name: str) -> None:
        """Do nothing."""

    def profile(self, action_name: str) -> AbstractContextManager[str]:
        """Return a context manager that does nothing."""
        return nullcontext(action_name)
