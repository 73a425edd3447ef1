# SPDX-License-Identifier: Apache-2.0
"""EventWriter: torch's SummaryWriter, whose file can wait for the first event."""

from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from leyden.loggers import TensorBoardLogger
from leyden.loggers.events import EventWriter
from test_killed_runs import scalars


def test_the_file_is_there_at_once(tmp_path: Path) -> None:
    writer = EventWriter(str(tmp_path))
    assert isinstance(writer, SummaryWriter)
    assert len(list(tmp_path.iterdir())) == 1
    writer.close()


def test_the_file_waits_for_the_first_event(tmp_path: Path) -> None:
    writer = EventWriter(str(tmp_path), waits=True, max_queue=7, purge_step=3)
    writer.flush()
    writer.close()
    assert not list(tmp_path.iterdir())
    writer.add_scalar("a", 1.0, 3)
    writer.close()
    assert scalars(tmp_path) == {"a": [(3, 1.0)]}
    assert writer.max_queue == 7


def test_a_run_that_goes_on_and_logs_nothing_leaves_no_file(tmp_path: Path) -> None:
    first = TensorBoardLogger(tmp_path)
    first.log_metrics({"a": 1.0}, 0)
    state = first.state_dict()
    assert scalars(Path(first.log_dir)) == {"a": [(0, 1.0)]}  # on disk, with nobody having closed anything
    first.log_metrics({"a": 2.0}, 1)
    first.finalize("failed")
    again = TensorBoardLogger(tmp_path)
    again.load_state_dict(state)
    assert again.experiment.log_dir == first.log_dir
    again.rewind()
    again.finalize("success")
    assert len(list(Path(first.log_dir).glob("*tfevents*"))) == 1
    assert scalars(Path(first.log_dir)) == {"a": [(0, 1.0)]}


def test_the_charts_of_several_curves_are_cut_too(tmp_path: Path) -> None:
    first = TensorBoardLogger(tmp_path)
    first.log_metrics({"both": {"x": 1.0, "y": 2.0}}, 0)
    state = first.state_dict()
    first.log_metrics({"both": {"x": 3.0, "z": 4.0}}, 1)
    first.experiment.add_text("note", "of the user's", 1)
    first.finalize("failed")
    again = TensorBoardLogger(tmp_path)
    again.load_state_dict(state)
    again.rewind()
    folders = {path.parent.name for path in tmp_path.rglob("*tfevents*")}
    assert folders == {"version_0", "both_x", "both_y"}
    assert scalars(Path(first.log_dir) / "both_x") == {"both": [(0, 1.0)]}


def test_a_remote_log_is_not_cut_but_hidden(tmp_path: Path, monkeypatch) -> None:
    state = {"name": "leyden_logs", "version": 0, "log": {"files": {}, "step": 7}}
    logger = TensorBoardLogger(tmp_path, version=0)
    (tmp_path / "leyden_logs" / "version_0").mkdir(parents=True)
    logger.load_state_dict(state)
    monkeypatch.setattr("leyden.loggers.tensorboard.is_local", lambda path: False)
    logger.rewind()
    assert logger.experiment.purge_step == 8
