# SPDX-License-Identifier: Apache-2.0
"""Log to ``metrics.csv``: one row for each call, one column for each name, appended to and never re-read."""

from __future__ import annotations

import csv
import io
import os
from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from leyden.errors import MisconfigurationException
from leyden.loggers.base import rank_zero_experiment, write_lock
from leyden.loggers.folder import FolderLogger, append_file, filesystem_of, replace_file
from leyden.types import PathLike

METRICS_FILE = "metrics.csv"


class CSVLogger(FolderLogger):
    """Keep the metrics of a run in ``<save_dir>/<name>/version_N/metrics.csv``, hyperparameters in ``hparams.yaml``.

    Args:
        save_dir, name, version: see :class:`~leyden.loggers.folder.FolderLogger`. The file of a version that exists is
            continued.
        prefix: put before every name, with a dash between.
        flush_logs_every_n_steps: rows are held in memory for at most this many steps; the Trainer brings them to disk
            every few seconds besides, and whenever it saves a checkpoint or ends.
    """

    LOGGER_JOIN_CHAR = "-"

    def __init__(
        self,
        save_dir: PathLike,
        name: str | None = "leyden_logs",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        if flush_logs_every_n_steps < 1:
            raise MisconfigurationException(
                f"CSVLogger(flush_logs_every_n_steps={flush_logs_every_n_steps!r}) must be at least 1, "
                "which brings each row to disk at once."
            )
        super().__init__(save_dir, name, version)
        self._prefix = f"{prefix}{self.LOGGER_JOIN_CHAR}" if prefix else ""
        self._flush_every = flush_logs_every_n_steps
        self._flushed_block = 0
        self._experiment: ExperimentWriter | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer of the file: ``log_metrics``, ``save``, and ``metrics``, the rows not yet on disk."""
        if self._experiment is None:
            with write_lock(self):
                if self._experiment is None:
                    self._experiment = ExperimentWriter(self.log_dir)
        return self._experiment

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add one row. Tensors of one element count as numbers; without ``step`` rows are counted."""
        writer: ExperimentWriter = self._experiment or self.experiment
        if step is None:
            step = writer.num_rows
        if self._prefix:
            metrics = {f"{self._prefix}{name}": value for name, value in metrics.items()}
        writer.log_metrics(metrics, step)
        # by blocks of steps, since with rows at steps 0, 50, 100 … none falls on the last step of a block
        block = (step + 1) // self._flush_every
        if block != self._flushed_block:
            self._flushed_block = block
            writer.save()

    def log_hyperparams(self, params: dict[str, Any] | Namespace | None = None) -> None:
        """Add ``params`` to ``hparams.yaml``."""
        self.add_hyperparams(params)
        self.write_hyperparams()

    def save(self) -> None:
        """Append the rows held in memory to the file."""
        if self._experiment is not None:
            self._experiment.save()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_experiment": None}


class ExperimentWriter:
    """The rows of one ``metrics.csv``.

    Columns are sorted by name. A row with a new name makes the file to be written anew, once, with a wider header; all
    other rows cost the same, however long the file is. A file that is already there is continued.
    """

    def __init__(self, log_dir: str) -> None:
        self.log_dir = log_dir
        self.metrics_file_path = os.path.join(log_dir, METRICS_FILE)
        self.metrics: list[dict[str, Any]] = []
        self.num_rows = 0
        self._filesystem = filesystem_of(log_dir)
        self._filesystem.makedirs(log_dir, exist_ok=True)
        self.metrics_keys = self._continue_file()
        self._names = set(self.metrics_keys)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Keep one row until the next ``save``; without ``step`` rows are counted."""
        row = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        row["step"] = self.num_rows if step is None else step
        if not row.keys() <= self._names:
            self._names.update(row)
        self.metrics.append(row)
        self.num_rows += 1

    def save(self) -> None:
        """Append the rows kept so far to the file. If that fails they are kept, and the next call tries again."""
        rows = self.metrics
        if not rows:
            return
        block = io.StringIO(newline="")
        writer = csv.writer(block)
        columns = self.metrics_keys
        if len(self._names) > len(columns):
            columns = sorted(self._names)
            if self.metrics_keys:
                replace_file(self._filesystem, self.metrics_file_path, self._widened(columns))
                self.metrics_keys = columns
            else:
                writer.writerow(columns)
        writer.writerows(map(row.get, columns) for row in rows)  # None, for a name the row lacks, is an empty cell
        append_file(self._filesystem, self.metrics_file_path, block.getvalue().encode())
        self.metrics_keys = columns
        self.metrics = []

    def _widened(self, columns: list[str]) -> Iterator[bytes]:
        """Yield the lines of the file with empty cells for the columns that are new."""
        with self._filesystem.open(self.metrics_file_path, "r", encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            block = io.StringIO(newline="")
            writer = csv.DictWriter(block, columns, restval="")
            writer.writeheader()
            for row in rows:
                writer.writerow(row)
                yield block.getvalue().encode()
                block.seek(0)
                block.truncate()
            yield block.getvalue().encode()

    def _continue_file(self) -> list[str]:
        """Return the columns of the file, if there is one; a last line that a crash left half written is cut off."""
        if not self._filesystem.isfile(self.metrics_file_path):
            return []
        with self._filesystem.open(self.metrics_file_path, "rb") as file:
            data: bytes = file.read()
        if not data.endswith(b"\n"):
            data = data[: data.rfind(b"\n") + 1]
            replace_file(self._filesystem, self.metrics_file_path, [data])
        return next(csv.reader(io.StringIO(data.decode(), newline="")), [])
