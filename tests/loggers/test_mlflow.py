# SPDX-License-Identifier: Apache-2.0
"""MLFlowLogger: what it says to MLflow."""

from __future__ import annotations

import pickle
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, call

import pytest
import torch
from tests.loggers.stand_ins import stand_in_mlflow

from leyden.loggers import MLFlowLogger
from leyden.loggers import mlflow as home
from leyden.runtime.ranks import rank_zero_only


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Any:
    return stand_in_mlflow(monkeypatch)


def test_the_experiment_is_made_once_and_the_run(mlflow: Any) -> None:
    logger = MLFlowLogger("e", tracking_uri="http://127.0.0.1:1", artifact_location="there", tags={"a": "b"})
    client = logger.experiment
    assert client is logger.experiment
    mlflow.tracking.MlflowClient.assert_called_once_with("http://127.0.0.1:1")
    mlflow.set_tracking_uri.assert_called_once_with("http://127.0.0.1:1")
    client.get_experiment_by_name.assert_called_once_with("e")
    client.create_experiment.assert_called_once_with(name="e", artifact_location="there")
    client.create_run.assert_called_once_with(experiment_id="exp-id", tags={"a": "b"})
    assert (logger.name, logger.version) == (logger.experiment_id, logger.run_id) == ("exp-id", "run-id")
    assert logger.save_dir is None


def test_asking_for_the_name_makes_no_run(mlflow: Any) -> None:
    logger = MLFlowLogger(save_dir="d", tracking_uri=None)
    assert (logger.name, logger.save_dir) == ("exp-id", "d")
    logger._mlflow_client.create_run.assert_not_called()
    logger._mlflow_client.get_experiment_by_name.assert_called_once_with("leyden_logs")


@pytest.mark.parametrize(("stage", "made"), [("active", False), ("deleted", True)])
def test_an_experiment_that_is_there_is_taken_unless_deleted(mlflow: Any, stage: str, made: bool) -> None:
    logger = MLFlowLogger("e")
    found = SimpleNamespace(experiment_id="there", lifecycle_stage=stage)
    logger._mlflow_client.get_experiment_by_name.return_value = found
    assert logger.experiment_id == ("exp-id" if made else "there")


def test_a_given_run_is_continued(mlflow: Any) -> None:
    logger = MLFlowLogger("e", run_id="mine")
    logger._mlflow_client.get_run.return_value = SimpleNamespace(info=SimpleNamespace(experiment_id="its"))
    assert (logger.run_id, logger.experiment_id) == ("mine", "its")
    logger._mlflow_client.create_run.assert_not_called()


def test_the_name_of_the_run_is_a_tag(mlflow: Any, caplog: pytest.LogCaptureFixture) -> None:
    logger = MLFlowLogger(run_name="me", tags={"mlflow.runName": "you"})
    _ = logger.experiment
    logger._mlflow_client.create_run.assert_called_once_with(experiment_id="exp-id", tags={"mlflow.runName": "me"})
    assert "both name the run" in caplog.text


def test_metrics_are_one_batch(mlflow: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(home, "time", lambda: 1.5)
    logger = MLFlowLogger(prefix="p", synchronous=False)
    with pytest.warns(RuntimeWarning, match="'p-a@b' is logged as 'p-ab'"):
        logger.log_metrics({"a@b": 1.0, "text": "no"}, step=4)
    logger.experiment.log_batch.assert_called_once_with(
        run_id="run-id",
        metrics=[SimpleNamespace(key="p-ab", value=1.0, timestamp=1500, step=4)],
        synchronous=False,
    )
    assert "leaves out p-text='no'" in caplog.text


def test_hyperparameters_are_flat_text_in_batches_of_100(mlflow: Any) -> None:
    logger = MLFlowLogger()
    logger.log_hyperparams(Namespace(n={"a": 1}, long="x" * 300, **{f"k{i}": i for i in range(100)}))
    first, second = logger.experiment.log_batch.mock_calls
    assert first.kwargs["run_id"] == "run-id"
    assert [len(each.kwargs["params"]) for each in (first, second)] == [100, 2]
    assert first.kwargs["params"][:2] == [
        SimpleNamespace(key="n/a", value="1"),
        SimpleNamespace(key="long", value="x" * 250),
    ]


@pytest.mark.parametrize(
    ("status", "told"), [("success", "FINISHED"), ("finished", "FINISHED"), ("failed", "FAILED"), ("KILLED", "KILLED")]
)
def test_the_end_has_mlflows_word(mlflow: Any, status: str, told: str) -> None:
    logger = MLFlowLogger()
    logger.finalize(status)
    logger._mlflow_client.set_terminated.assert_not_called()
    _ = logger.experiment
    logger.finalize(status)
    logger._mlflow_client.set_terminated.assert_called_once_with("run-id", told)


@pytest.mark.parametrize(("log_model", "top_k", "at_once"), [("all", 1, 1), (True, -1, 1), (True, 1, 0), (False, 1, 0)])
def test_checkpoints_go_up_when_log_model_says(
    mlflow: Any, tmp_path: Any, log_model: Any, top_k: int, at_once: int
) -> None:
    logger = MLFlowLogger(log_model=log_model)
    path = tmp_path / "epoch=1.ckpt"
    path.touch()
    beside: dict[str, str] = {}
    logger._mlflow_client.log_artifacts = Mock(
        side_effect=lambda run, folder, target: beside.update(
            {path.name: path.read_text() for path in Path(folder).iterdir()}
        )
    )
    callback = SimpleNamespace(
        best_model_path=str(path), best_model_score=torch.tensor(0.5), save_top_k=top_k, monitor="loss"
    )
    client = logger.experiment
    logger.after_save_checkpoint(callback)
    assert client.log_artifact.call_count == at_once
    logger.finalize("success")
    assert client.log_artifact.mock_calls == ([call("run-id", str(path), "epoch=1")] if log_model else [])
    if log_model:
        assert beside["aliases.txt"] == "['latest', 'best']"
        assert "score: 0.5" in beside["metadata.yaml"]
        assert "monitor: loss" in beside["metadata.yaml"]


def test_h4_a_resumed_run_is_the_same_run(mlflow: Any) -> None:
    state = MLFlowLogger("e")
    _ = state.experiment
    kept = state.state_dict()
    for given, expected in (({}, "old"), ({"run_id": "own"}, "own"), ({"resume": False}, "run-id")):
        logger = MLFlowLogger("e", **given)
        logger._mlflow_client.get_run.return_value = SimpleNamespace(
            info=SimpleNamespace(experiment_id="exp-id", lifecycle_stage="active")
        )
        logger.load_state_dict({**kept, "version": "old"})
        assert logger.run_id == expected
    other = MLFlowLogger("f")
    other.load_state_dict({**kept, "version": "old"})
    assert other.run_id == "run-id"


def test_a_run_that_the_store_has_not_is_begun_anew_with_a_warning(mlflow: Any) -> None:
    logger = MLFlowLogger("e")
    logger._mlflow_client.get_run.side_effect = RuntimeError("no such run")
    with pytest.warns(UserWarning, match="'old' of the checkpoint is not at .*no such run"):
        logger.load_state_dict({"experiment": "e", "version": "old"})
    assert logger.run_id == "run-id"


def test_a_copy_has_the_run_and_a_client_of_its_own(mlflow: Any) -> None:
    logger = MLFlowLogger("e", tracking_uri="http://127.0.0.1:1")
    _ = logger.experiment
    copy = pickle.loads(pickle.dumps(logger))
    assert copy.run_id == "run-id"
    assert mlflow.tracking.MlflowClient.call_count == 2
    assert mlflow.set_tracking_uri.call_count == 2


def test_other_ranks_make_nothing(mlflow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    logger = MLFlowLogger()
    logger.log_metrics({"a": 1.0})
    logger.finalize("success")
    assert (logger.name, logger.version) == (None, None)
    assert logger._mlflow_client.mock_calls == []


def test_an_mlflow_without_stores_of_files_gets_a_data_base(mlflow: Any, tmp_path: Any) -> None:
    client = Mock()
    mlflow.tracking.MlflowClient.side_effect = [RuntimeError("in maintenance mode"), client]
    logger = MLFlowLogger(save_dir=str(tmp_path / "m"), tracking_uri=None)
    mlflow.tracking.MlflowClient.assert_called_with(f"sqlite:///{tmp_path}/m/mlflow.db")
    assert logger.save_dir == str(tmp_path / "m")
    mlflow.tracking.MlflowClient.side_effect = RuntimeError("no server")
    with pytest.raises(RuntimeError, match="no server"):
        MLFlowLogger(tracking_uri="http://127.0.0.1:1")


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'leyden\[mlflow\]'"):
        MLFlowLogger()
