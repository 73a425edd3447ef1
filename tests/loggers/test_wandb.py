# SPDX-License-Identifier: Apache-2.0
"""WandbLogger: what it says to W&B, and a real run offline."""

from __future__ import annotations

import os
import pickle
import sys
from argparse import Namespace
from types import SimpleNamespace
from typing import Any
from unittest.mock import call

import pytest
import torch
from tests.loggers.stand_ins import stand_in_wandb

from leyden.errors import MisconfigurationException
from leyden.loggers import WandbLogger
from leyden.runtime.ranks import rank_zero_only


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return stand_in_wandb(monkeypatch)


def saved(tmp_path: Any, **more: Any) -> Any:
    """What the logger asks a ModelCheckpoint: two files, the older one the best."""
    paths = [tmp_path / name for name in ("best.ckpt", "last.ckpt")]
    for age, path in enumerate(reversed(paths)):
        path.touch()
        os.utime(path, (1000 - age, 1000 - age))
    return SimpleNamespace(
        best_model_path=str(paths[0]), best_model_score=torch.tensor(0.5), last_model_path=str(paths[1]),
        current_score=0.7, best_k_models={str(paths[0]): torch.tensor(0.5)}, monitor="loss", mode="min",
        save_last=True, save_top_k=1, save_weights_only=False, _every_n_train_steps=0, **more,
    )  # fmt: skip


def test_init_gets_what_was_given(wandb: Any) -> None:
    logger = WandbLogger("me", "here", "an-id", project="mine", group="g")
    wandb.init.assert_not_called()
    assert (logger.name, logger.version, logger.save_dir, logger.root_dir) == ("mine", "an-id", "here", None)
    _ = logger.experiment, logger.experiment
    wandb.init.assert_called_once_with(
        name="me", project="mine", dir="here", id="an-id", resume="allow", anonymous=None, group="g"
    )
    assert logger.version == "run_id"


def test_defaults_and_the_axis_of_charts(wandb: Any) -> None:
    run = WandbLogger(anonymous=True, dir="unused").experiment
    wandb.init.assert_called_once_with(
        name=None, project="leyden_logs", dir=".", id=None, resume="allow", anonymous="allow"
    )
    assert run.define_metric.mock_calls == [
        call("trainer/global_step"),
        call("*", step_metric="trainer/global_step", step_sync=True),
    ]


def test_tensorboard_syncs_by_its_own_step(wandb: Any) -> None:
    logger = WandbLogger(sync_tensorboard=True)
    logger.log_metrics({"a": 1.0}, step=3)
    logger.experiment.define_metric.assert_called_once_with("*", step_metric="global_step")
    logger.experiment.log.assert_called_once_with({"a": 1.0})


def test_metrics_have_the_prefix_and_the_step(wandb: Any) -> None:
    logger = WandbLogger(prefix="p")
    logger.log_metrics({"a": 1.0}, step=3)
    logger.log_metrics({"a": 2.0})
    assert logger.experiment.log.mock_calls == [call({"p-a": 1.0, "trainer/global_step": 3}), call({"p-a": 2.0})]


@pytest.mark.parametrize("kind", [dict, lambda **kwargs: Namespace(**kwargs)])
def test_hyperparameters_are_what_json_can_hold(wandb: Any, kind: Any) -> None:
    logger = WandbLogger()
    logger.log_hyperparams(
        kind(n=1, nested={"a": [1]}, cls=torch.nn.Linear, made=lambda: 3, odd={1, 2}.union, device=torch.device("cpu"))
    )
    logger.experiment.config.update.assert_called_once_with(
        {"n": 1, "nested": {"a": [1]}, "cls": "Linear", "made": 3, "odd": "{1, 2}", "device": "cpu"},
        allow_val_change=True,
    )


def test_an_open_run_is_used_with_a_warning(wandb: Any) -> None:
    wandb.run = wandb.init.return_value
    with pytest.warns(UserWarning, match=r"wandb\.finish\(\)"):
        assert WandbLogger().experiment is wandb.run
    wandb.init.assert_not_called()


def test_media_go_one_by_one(wandb: Any) -> None:
    logger = WandbLogger()
    logger.log_image("k", ["a", "b"], step=5, caption=["x", "y"])
    assert wandb.Image.mock_calls == [call("a", caption="x"), call("b", caption="y")]
    logger.experiment.log.assert_called_once_with({"k": [wandb.Image.return_value] * 2, "trainer/global_step": 5})
    logger.log_audio("k", ["s"], sample_rate=[8])
    wandb.Audio.assert_called_once_with("s", sample_rate=8)
    logger.log_video("k", ["v"], fps=[4])
    wandb.Video.assert_called_once_with("v", fps=4)
    logger.log_text("k", ["c"], [["t"]])
    wandb.Table.assert_called_once_with(columns=["c"], data=[["t"]], dataframe=None)
    with pytest.raises(TypeError, match='Expected a list as "images"'):
        logger.log_image("k", "a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Expected 1 items but only found 2 for caption"):
        logger.log_image("k", ["a"], caption=["x", "y"])


def test_watch_and_artifacts_pass_through(wandb: Any) -> None:
    logger, module = WandbLogger(), torch.nn.Linear(1, 1)
    logger.watch(module, "all", 7)
    logger.experiment.watch.assert_called_once_with(module, log="all", log_freq=7, log_graph=True)
    logger.use_artifact("a:v0", "model")
    logger.experiment.use_artifact.assert_called_once_with("a:v0", type="model")
    WandbLogger.download_artifact("a:v0", "there", "model")
    wandb.Api().artifact.assert_called_once_with("a:v0", type="model")
    wandb.Api().artifact.return_value.download.assert_called_once_with(root="there")
    wandb.run = logger.experiment
    WandbLogger.download_artifact("b:v0")
    wandb.run.use_artifact.assert_called_with("b:v0")


@pytest.mark.parametrize(("log_model", "top_k", "at_once"), [("all", 1, 2), (True, -1, 2), (True, 1, 0), (False, 1, 0)])
def test_checkpoints_go_up_when_log_model_says(
    wandb: Any, tmp_path: Any, log_model: Any, top_k: int, at_once: int
) -> None:
    logger, callback = WandbLogger(log_model=log_model), saved(tmp_path)
    callback.save_top_k = top_k
    run = logger.experiment
    logger.after_save_checkpoint(callback)
    assert run.log_artifact.call_count == at_once
    logger.finalize("failed")
    assert run.log_artifact.call_count == at_once
    logger.finalize("success")
    logger.finalize("success")
    assert run.log_artifact.call_count == (2 if log_model else 0), "each file once"
    if log_model:
        assert [each.kwargs["aliases"] for each in run.log_artifact.mock_calls] == [["latest", "best"], ["latest"]]
        first = wandb.Artifact.mock_calls[0].kwargs
        assert (first["name"], first["type"]) == ("model-run_id", "model")
        assert first["metadata"]["score"] == 0.5
        assert first["metadata"]["SimpleNamespace"]["monitor"] == "loss"
        wandb.Artifact.return_value.add_file.assert_any_call(
            callback.best_model_path, name="model.ckpt", policy="mutable"
        )
        os.utime(callback.last_model_path, (2000, 2000))
        logger.after_save_checkpoint(callback)
        logger.finalize("success")
        assert run.log_artifact.call_count == 3, "a file that was written anew goes up again"


def test_offline_uploads_nothing(wandb: Any) -> None:
    with pytest.raises(MisconfigurationException, match="log_model='all', offline=True"):
        WandbLogger(offline=True, log_model="all")


def test_a_copy_enters_the_run(wandb: Any) -> None:
    logger = WandbLogger(id="given")
    copy = pickle.loads(pickle.dumps(logger))
    assert copy.version == "run_id"
    _ = copy.experiment
    wandb._attach.assert_called_once_with("attached")


def test_other_ranks_open_nothing(wandb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    logger = WandbLogger()
    logger.log_metrics({"a": 1.0})
    logger.experiment.whatever()
    wandb.init.assert_not_called()
    logger.follow("the-run")
    assert logger.version == "the-run"


@pytest.mark.parametrize(
    ("given", "expected"), [({}, "old"), ({"id": "own"}, "own"), ({"resume": "never"}, None), ({"project": "q"}, None)]
)
def test_h4_a_resumed_run_is_the_same_run(wandb: Any, given: dict[str, Any], expected: str | None) -> None:
    logger = WandbLogger(**{"project": "p", **given})
    logger.load_state_dict({"name": "p", "version": "old", "save_dir": "."})
    _ = logger.experiment
    assert wandb.init.mock_calls[0].kwargs["id"] == expected


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'leyden\[wandb\]'"):
        WandbLogger()
