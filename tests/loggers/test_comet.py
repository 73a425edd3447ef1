# SPDX-License-Identifier: Apache-2.0
"""CometLogger: what it says to Comet; and the loggers that there are no more."""

from __future__ import annotations

import pickle
import sys
from argparse import Namespace
from typing import Any

import pytest
import torch
from tests.loggers.stand_ins import stand_in_comet

from leyden.loggers import CometLogger, LitLogger, NeptuneLogger
from leyden.runtime.ranks import rank_zero_only

_TOLD = {"api_key": None, "workspace": None, "project": None, "experiment_key": None, "mode": None, "online": None}


@pytest.fixture
def comet(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("COMET_DISABLE_AUTO_LOGGING", "0")
    return stand_in_comet(monkeypatch)


def test_the_experiment_begins_with_the_logger(comet: Any) -> None:
    logger = CometLogger(api_key="k", workspace="w", project="p", mode="create", tags=["t"])
    comet.ExperimentConfig.assert_called_once_with(tags=["t"])
    comet.start.assert_called_once_with(
        **{**_TOLD, "api_key": "k", "workspace": "w", "project": "p", "mode": "create"},
        experiment_config=comet.ExperimentConfig.return_value,
    )
    assert (logger.name, logger.version, logger.save_dir) == ("p", "a-key", "there")
    logger.experiment.log_other.assert_called_once_with("Created from", "pytorch-lightning")


def test_offline_writes_an_archive(comet: Any) -> None:
    CometLogger(online=False, offline_directory="d")
    comet.ExperimentConfig.assert_called_once_with(offline_directory="d")
    assert comet.start.mock_calls[0].kwargs["online"] is False


@pytest.mark.parametrize(
    ("former", "where", "now"),
    [
        ("experiment_name", "config", "name"),
        ("save_dir", "config", "offline_directory"),
        ("project_name", "start", "project"),
    ],
)
def test_former_arguments_still_mean_what_they_did(
    comet: Any, caplog: pytest.LogCaptureFixture, former: str, where: str, now: str
) -> None:
    CometLogger(**{former: "x"})
    told = (comet.ExperimentConfig if where == "config" else comet.start).mock_calls[0].kwargs
    assert told[now] == "x"
    assert f"{former}=...) is called {now} today" in caplog.text
    CometLogger(**{former: "x", now: "y"})
    told = (comet.ExperimentConfig if where == "config" else comet.start).mock_calls[-1].kwargs
    assert told[now] == "y"


def test_rows_have_an_epoch_apart(comet: Any) -> None:
    logger, row = CometLogger(prefix="p"), {"a": torch.tensor(1.0, requires_grad=True), "epoch": 2}
    logger.log_metrics(row, step=3)
    logger.experiment.__internal_api__log_metrics__.assert_called_once_with(
        {"a": torch.tensor(1.0)}, step=3, epoch=2, prefix="p", framework="pytorch-lightning"
    )
    assert "epoch" in row


def test_hyperparameters_and_graph(comet: Any) -> None:
    logger, module = CometLogger(), torch.nn.Linear(1, 1)
    logger.log_hyperparams(Namespace(a={"b": 1}))
    logger.experiment.__internal_api__log_parameters__.assert_called_once_with(
        parameters={"a": {"b": 1}}, framework="pytorch-lightning", flatten_nested=True, source="manual"
    )
    logger.log_graph(module)
    logger.experiment.__internal_api__set_model_graph__.assert_called_once_with(
        graph=module, framework="pytorch-lightning"
    )
    logger.finalize("success")
    logger.experiment.flush.assert_called_once_with()
    logger.experiment.end.assert_not_called()


def test_h4_a_resumed_run_is_the_same_experiment(comet: Any) -> None:
    logger = CometLogger(project="p")
    empty = logger.experiment
    logger.load_state_dict({"name": "p", "version": "old"})
    empty.end.assert_called_once_with()
    _ = logger.experiment
    assert logger.version == "old"
    assert comet.start.mock_calls[-1].kwargs["experiment_key"] == "old"
    assert comet.start.mock_calls[-1].kwargs["mode"] == "get"
    for given in ({"experiment_key": "own"}, {"mode": "create"}, {"project": "q"}):
        other = CometLogger(**{"project": "p", **given})
        other.load_state_dict({"name": "p", "version": "old"})
        other.experiment.end.assert_not_called()


def test_a_copy_goes_on_with_the_experiment(comet: Any) -> None:
    logger = CometLogger(project="p")
    logger._comet_config = None  # a Mock cannot be pickled
    copy = pickle.loads(pickle.dumps(logger))
    assert copy.experiment.get_key() == "a-key"
    assert comet.start.mock_calls[-1].kwargs["experiment_key"] == "a-key"


def test_other_ranks_begin_nothing(comet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    logger = CometLogger()
    logger.log_metrics({"a": 1.0})
    comet.start.assert_not_called()


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "comet_ml", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'leyden\[comet\]'"):
        CometLogger()


@pytest.mark.parametrize("gone", [NeptuneLogger, LitLogger])
def test_loggers_that_are_not_here_say_what_to_use(gone: Any) -> None:
    with pytest.raises(RuntimeError, match=rf"{gone.__name__} is .*WandbLogger"):
        gone(name="x")
