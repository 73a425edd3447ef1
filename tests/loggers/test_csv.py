# SPDX-License-Identifier: Apache-2.0
"""CSVLogger: the rows and columns of the file, when they reach the disk, what a crash leaves."""

from __future__ import annotations

import copy
import csv
import pickle
from pathlib import Path

import pytest
import torch

from leyden.errors import MisconfigurationException
from leyden.loggers import CSVLogger
from leyden.loggers import csv as csv_module


def read(logger):
    with open(logger.experiment.metrics_file_path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_rows(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"loss": 0.1, "acc": torch.tensor(0.5, dtype=torch.float64)}, 3)
    logger.log_metrics({"loss": 0.30000000000000004, "acc": 1}, 4)
    logger.finalize("success")
    assert read(logger) == [["acc", "loss", "step"], ["0.5", "0.1", "3"], ["1", "0.30000000000000004", "4"]]


def test_names_and_values_that_need_quotes(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.log_metrics({'a,"b"': float("nan"), "ünï": float("inf"), "line\nbreak": 1.0}, 0)
    logger.save()
    logger.log_metrics({"new": 2.0}, 1)
    logger.save()
    assert read(logger) == [
        ['a,"b"', "line\nbreak", "new", "step", "ünï"],
        ["nan", "1.0", "", "0", "inf"],
        ["", "", "2.0", "1", ""],
    ]


def test_new_columns_within_what_is_held(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 1}, 0)
    logger.log_metrics({"b": 2}, 1)
    logger.save()
    assert read(logger) == [["a", "b", "step"], ["1", "", "0"], ["", "2", "1"]]


def test_new_columns_later_widen_the_file(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"m": 1}, 0)
    logger.save()
    logger.log_metrics({"z": 2, "a": 3}, 1)
    logger.save()
    logger.log_metrics({"m": 4}, 2)
    logger.save()
    assert read(logger) == [["a", "m", "step", "z"], ["", "1", "0", ""], ["3", "", "1", "2"], ["", "4", "2", ""]]
    assert [entry.name for entry in (tmp_path / "leyden_logs" / "version_0").iterdir()] == ["metrics.csv"]


def test_O4_rows_are_appended_and_the_file_is_written_anew_only_for_a_new_column(tmp_path, monkeypatch):
    rewrites = []
    real = csv_module.replace_file
    monkeypatch.setattr(
        csv_module, "replace_file", lambda fs, path, blocks: (rewrites.append(path), real(fs, path, blocks))
    )
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    for step in range(50):
        logger.log_metrics({"loss": step}, step)
        logger.log_metrics({"val": step}, step)
    logger.save()
    assert len(rewrites) == 1
    assert len(read(logger)) == 101
    assert logger.experiment.metrics == []


def test_held_rows_reach_the_disk_by_blocks_of_steps(tmp_path):
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=10)
    sizes = []
    for step in range(0, 30, 4):  # no step is the last of a block of ten
        logger.log_metrics({"a": 1.0}, step)
        sizes.append(len(logger.experiment.metrics))
    assert sizes == [1, 2, 3, 0, 1, 0, 1, 2]
    assert len(read(logger)) == 7


def test_without_step_rows_are_counted(tmp_path):
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=2)
    for _ in range(3):
        logger.log_metrics({"a": 1.0})
    logger.save()
    assert [row[1] for row in read(logger)] == ["step", "0", "1", "2"]


def test_prefix(tmp_path):
    logger = CSVLogger(tmp_path, prefix="exp")
    logger.log_metrics({"a": 1.0}, 0)
    logger.save()
    assert read(logger)[0] == ["exp-a", "step"]


def test_the_callers_dict_may_be_reused(tmp_path):
    logger = CSVLogger(tmp_path)
    metrics = {"a": 1.0}
    logger.log_metrics(metrics, 0)
    metrics["a"] = 2.0
    logger.log_metrics(metrics, 1)
    logger.save()
    assert read(logger)[1:] == [["1.0", "0"], ["2.0", "1"]]
    assert metrics == {"a": 2.0}


def test_an_existing_version_is_continued(tmp_path):
    first = CSVLogger(tmp_path, version=0)
    first.log_metrics({"b": 1.0}, 0)
    first.finalize("failed")
    second = CSVLogger(tmp_path, version=0)
    second.log_metrics({"b": 2.0}, 1)
    second.save()
    assert read(second) == [["b", "step"], ["1.0", "0"], ["2.0", "1"]]
    third = CSVLogger(tmp_path, version=0)
    third.log_metrics({"a": 3.0}, 2)
    third.save()
    assert read(third) == [["a", "b", "step"], ["", "1.0", "0"], ["", "2.0", "1"], ["3.0", "", "2"]]


@pytest.mark.parametrize("torn", [b"a,step\r\n1.0,0\r\n2.", b"a,st"])
def test_a_line_that_a_crash_left_half_written_is_cut_off(tmp_path, torn):
    file = tmp_path / "leyden_logs" / "version_0" / "metrics.csv"
    file.parent.mkdir(parents=True)
    file.write_bytes(torn)
    logger = CSVLogger(tmp_path, version=0)
    logger.log_metrics({"a": 3.0}, 1)
    logger.save()
    complete = [["1.0", "0"]] if b"1.0" in torn else []
    assert read(logger) == [["a", "step"], *complete, ["3.0", "1"]]


def test_rows_are_kept_when_the_disk_refuses_them(tmp_path, monkeypatch):
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, 0)

    def refuse(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(csv_module, "append_file", refuse)
        with pytest.raises(OSError, match="disk full"):
            logger.save()
    logger.log_metrics({"a": 2.0}, 1)
    logger.save()
    assert read(logger) == [["a", "step"], ["1.0", "0"], ["2.0", "1"]]


def test_no_row_no_file(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.save()
    logger.finalize("success")
    assert list(tmp_path.iterdir()) == []


def test_logging_goes_on_after_finalize(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, 0)
    logger.finalize("success")
    logger.log_metrics({"test": 2.0}, 0)
    logger.finalize("success")
    assert read(logger) == [["a", "step", "test"], ["1.0", "0", ""], ["", "0", "2.0"]]


def test_copies_do_not_write_what_the_original_holds(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, 0)
    for twin in (pickle.loads(pickle.dumps(logger)), copy.deepcopy(logger)):
        assert twin.version == logger.version
        twin.finalize("success")
    logger.finalize("success")
    assert len(read(logger)) == 2


def test_flush_every_zero_steps_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"flush_logs_every_n_steps=0\) must be at least 1"):
        CSVLogger(tmp_path, flush_logs_every_n_steps=0)


def test_the_file_is_that_of_lightning(tmp_path):
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    rows = [({"loss": 0.1 * step, "epoch": 0}, step) for step in range(5)]
    rows += [({"val": torch.tensor(0.3), "epoch": 0}, 4), ({"loss": 1e-9, "epoch": 1}, 5)]
    texts = []
    for logger in (CSVLogger(tmp_path, name="ours"), loggers.CSVLogger(str(tmp_path), name="theirs")):
        for metrics, step in rows:
            logger.log_metrics(dict(metrics), step)
            logger.save()
        texts.append(Path(logger.log_dir, "metrics.csv").read_bytes())
    assert texts[0] == texts[1]
