# SPDX-License-Identifier: Apache-2.0
"""Log to ``metrics.csv``: one row for each call, one column for each name, appended to and never re-read."""

from __future__ import annotations

import csv
import io
import itertools
import os
import zlib
from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from leyden.errors import MisconfigurationException
from leyden.hparams import save_hparams_to_yaml
from leyden.loggers.base import on_rank_zero, rank_zero_experiment, write_lock
from leyden.loggers.folder import (
    LOG_FOLDER,
    FolderLogger,
    append_file,
    filesystem_of,
    move_file,
    replace_file,
    sync_file,
)
from leyden.runtime.ranks import rank_zero_info
from leyden.types import PathLike

METRICS_FILE = "metrics.csv"
SUPERSEDED_FILE = "metrics.superseded.csv"


class CSVLogger(FolderLogger):
    """Keep the metrics of a run in ``<save_dir>/<name>/version_N/metrics.csv``, hyperparameters in ``hparams.yaml``.

    Args:
        save_dir, name, version, resume: see :class:`~leyden.loggers.folder.FolderLogger`. The file of a version that
            exists is continued.
        prefix: put before every name, with a dash between.
        flush_logs_every_n_steps: rows are held in memory for at most this many steps; the Trainer brings them to disk
            every few seconds besides, and whenever it saves a checkpoint or ends.
    """

    LOGGER_JOIN_CHAR = "-"

    def __init__(
        self,
        save_dir: PathLike,
        name: str | None = LOG_FOLDER,
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
        resume: bool = True,
    ) -> None:
        if flush_logs_every_n_steps < 1:
            raise MisconfigurationException(
                f"CSVLogger(flush_logs_every_n_steps={flush_logs_every_n_steps!r}) must be at least 1, "
                "which brings each row to disk at once."
            )
        super().__init__(save_dir, name, version, resume)
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
        if self.knows_hyperparams(params):
            return
        self.add_hyperparams(params)
        self.write_hyperparams()

    def save(self) -> None:
        """Append the rows held in memory to the file."""
        if self._experiment is not None:
            self._experiment.save()

    # ------------------------------------------------------------------ a run that goes on in another process

    def state_dict(self) -> dict[str, Any]:
        """Bring all rows to disk; return the version, and how many rows its file holds."""
        with write_lock(self):
            return {**super().state_dict(), "log": self.experiment.position()} if on_rank_zero() else {}

    def holds(self, state: Mapping[str, Any], folder: str) -> bool:
        """Whether ``metrics.csv`` in ``folder`` begins with the rows that ``state`` tells of."""
        if "log" not in state:
            return True
        found = _rows_until(os.path.join(folder, METRICS_FILE), state["log"])
        return found is not None and (state["log"]["rows"] > 0 or not found[1] or self.is_at_home(state))

    def close(self) -> None:
        """Bring all rows to disk; the next one opens the file again."""
        self.save()
        self._experiment = None

    def rewind(self) -> None:
        """Cut ``metrics.csv`` back to the rows that the checkpoint knows of, in one move."""
        state, self._state = self._state, None
        if state is None or "log" not in state:
            return
        self.close()
        path = os.path.join(self.log_dir, METRICS_FILE)
        kept, beyond, superseded = _rows_until(path, state["log"]) or (b"", False, 0)
        if beyond:
            replace_file(filesystem_of(path), path, [kept])
            rank_zero_info(f"{path}: {superseded} rows after the checkpoint are taken out; the run logs them again.")

    def set_aside(self) -> None:
        """Rename ``metrics.csv`` to ``metrics.superseded.csv``, or where there is one, ``metrics.superseded-1.csv`` …"""
        if not self.begins_anew:
            return
        path = os.path.join(self.log_dir, METRICS_FILE)
        filesystem = filesystem_of(path)
        self.close()
        if filesystem.isfile(path):
            name, (stem, suffix) = SUPERSEDED_FILE, os.path.splitext(SUPERSEDED_FILE)
            for number in itertools.count(1):
                if not filesystem.exists(os.path.join(self.log_dir, name)):
                    break
                name = f"{stem}-{number}{suffix}"
            move_file(filesystem, path, os.path.join(self.log_dir, name))
            rank_zero_info(f"{path} is of a run that left no checkpoint: it is put aside as {name}.")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_experiment": None}


class ExperimentWriter:
    """The rows of one ``metrics.csv``.

    Columns are sorted by name. A row with a new name makes the file to be written anew, once, with a wider header; all
    other rows cost the same, however long the file is. A file that is already there is continued.
    """

    NAME_METRICS_FILE = METRICS_FILE
    NAME_HPARAMS_FILE = "hparams.yaml"

    def __init__(self, log_dir: str) -> None:
        self.log_dir = log_dir
        self.hparams: dict[str, Any] = {}
        self.metrics_file_path = os.path.join(log_dir, METRICS_FILE)
        self.metrics: list[dict[str, Any]] = []
        self.num_rows = 0
        self._saved = {"rows": 0, "bytes": 0, "crc": 0}
        self._filesystem = filesystem_of(log_dir)
        self._filesystem.makedirs(log_dir, exist_ok=True)
        self.metrics_keys = self._continue_file()
        self._names = set(self.metrics_keys)

    def log_hparams(self, params: Mapping[str, Any]) -> None:
        """Write hyperparameters, those that were logged before with them, to ``hparams.yaml`` beside the rows."""
        self.hparams.update(params)
        save_hparams_to_yaml(os.path.join(self.log_dir, self.NAME_HPARAMS_FILE), self.hparams)

    def log_metrics(self, metrics_dict: Mapping[str, Any], step: int | None = None) -> None:
        """Keep one row until the next ``save``; without ``step`` rows are counted."""
        row = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics_dict.items()}
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
                before, self._saved = self._saved, {"rows": self._saved["rows"], "bytes": 0, "crc": 0}
                try:
                    replace_file(self._filesystem, self.metrics_file_path, map(self._count, self._widened(columns)))
                except BaseException:
                    self._saved = before
                    raise
                self.metrics_keys = columns
            else:
                writer.writerow(columns)
        writer.writerows(map(row.get, columns) for row in rows)  # None, for a name the row lacks, is an empty cell
        data = block.getvalue().encode()
        append_file(self._filesystem, self.metrics_file_path, data)
        self._count(data)
        self._saved["rows"] += len(rows)
        self.metrics_keys = columns
        self.metrics = []

    def position(self) -> dict[str, Any]:
        """Bring all rows to the disk; return how far the file reaches, and by what it can be known again."""
        self.save()
        if self.metrics_keys:
            sync_file(self.metrics_file_path)
        return {**self._saved, "columns": list(self.metrics_keys)}

    def _count(self, data: bytes) -> bytes:
        """Note that ``data`` is written to the end of the file; return it."""
        self._saved["bytes"] += len(data)
        self._saved["crc"] = zlib.crc32(data, self._saved["crc"])
        return data

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
        rows = csv.reader(io.StringIO(data.decode(), newline=""))
        columns = next(rows, [])
        self._count(data)
        self.num_rows = self._saved["rows"] = sum(1 for _ in rows)
        return columns


def _rows_until(path: str, position: Mapping[str, Any]) -> tuple[bytes, bool, int] | None:
    """Return the content of the file as it was at ``position``; None if it is not the file that was there then.

    Also whether it holds more by now, and how many rows. Columns that were added later are left out again.
    """
    filesystem = filesystem_of(path)
    data: bytes = b""
    if filesystem.isfile(path):
        with filesystem.open(path, "rb") as file:
            data = file.read()
    kept = data[: position["bytes"]]
    rest = csv.reader(io.StringIO(data[position["bytes"] :].decode(errors="replace"), newline=""))
    if len(kept) == position["bytes"] and zlib.crc32(kept) == position["crc"]:
        header = not kept and bool(data)  # is no row
        return kept, len(data) > len(kept), sum(1 for _ in rest) - header
    rows = csv.DictReader(io.StringIO(data.decode(errors="replace"), newline=""))
    block = io.StringIO(newline="")
    writer = csv.DictWriter(block, position["columns"], restval="", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(itertools.islice(rows, position["rows"]))
    kept = block.getvalue().encode()
    return (kept, True, sum(1 for _ in rows)) if zlib.crc32(kept) == position["crc"] else None
