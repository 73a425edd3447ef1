# SPDX-License-Identifier: Apache-2.0
"""Modules that stand in for the libraries of services and note the calls, as test suites of others make them."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest


def _module(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def stand_in_wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``wandb``, whose ``init`` returns a run ``"run_id"``."""
    run = Mock(id="run_id", _attach_id="attached")
    run.name = "a-name"
    names = ("Api", "Artifact", "Image", "Audio", "Video", "Table", "require", "_attach")
    made = {name: Mock() for name in names}
    return _module(monkeypatch, "wandb", init=Mock(return_value=run), run=None, **made)


def stand_in_mlflow(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``mlflow``, whose client has no experiment and makes the run ``"run-id"`` in one it calls ``"exp-id"``."""
    client = Mock()
    client.get_experiment_by_name.return_value = None
    client.create_experiment.return_value = "exp-id"
    client.create_run.return_value = SimpleNamespace(info=SimpleNamespace(run_id="run-id"))
    tracking = _module(monkeypatch, "mlflow.tracking", MlflowClient=Mock(return_value=client))
    entities = _module(monkeypatch, "mlflow.entities", Metric=SimpleNamespace, Param=SimpleNamespace)
    return _module(monkeypatch, "mlflow", set_tracking_uri=Mock(), tracking=tracking, entities=entities)


def stand_in_comet(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``comet_ml``, whose ``start`` returns an experiment of the key that it was given, or ``"a-key"``."""

    def start(**kwargs: Any) -> Any:
        experiment = Mock(project_name=kwargs["project"])
        experiment.get_key.return_value = kwargs["experiment_key"] or "a-key"
        vars(experiment).update(
            {f"__internal_api__{verb}__": Mock() for verb in ("log_metrics", "log_parameters", "set_model_graph")}
        )
        return experiment

    config = Mock(return_value=Mock(offline_directory="there"))
    return _module(monkeypatch, "comet_ml", start=Mock(side_effect=start), ExperimentConfig=config)
