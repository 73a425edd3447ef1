# SPDX-License-Identifier: Apache-2.0
"""Logger: subclasses as users write them, the rank-zero rule, one writer at a time, the stand-ins that do nothing."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
import time

import pytest

import leyden.loggers
from leyden.loggers import DummyLogger, Logger, rank_zero_experiment
from leyden.loggers.base import DummyExperiment, run_states
from leyden.runtime.ranks import rank_zero_only


class Minimal(Logger):
    """As small as a subclass can be: no __init__ of the base is called, nothing is decorated."""

    def __init__(self):
        self.calls = []

    @property
    def name(self):
        return "minimal"

    @property
    def version(self):
        return 3

    def log_metrics(self, metrics, step=None):
        self.calls.append(("log_metrics", dict(metrics), step))

    def log_hyperparams(self, params, *args, **kwargs):
        self.calls.append(("log_hyperparams", params))

    def save(self):
        self.calls.append(("save",))


class Decorated(Minimal):
    """As written for Lightning."""

    @property
    @rank_zero_experiment
    def experiment(self):
        return "the real one"

    @rank_zero_only
    def log_metrics(self, metrics, step=None):
        super().log_metrics(metrics, step)

    @rank_zero_only
    def log_hyperparams(self, params, *args, **kwargs):
        super().log_hyperparams(params)

    @rank_zero_only
    def finalize(self, status):
        self.calls.append(("finalize", status))
        super().finalize(status)


class OnEveryRank(Minimal):
    every_rank = True

    def log_metrics(self, metrics, step=None):
        self.calls.append(("log_metrics", step))

    def save(self):
        self.calls.append(("save",))


@pytest.fixture
def rank_one(monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)


def test_what_a_subclass_need_not_define():
    logger = Minimal()
    assert (logger.save_dir, logger.root_dir, logger.log_dir, logger.experiment) == (None, None, None, None)
    assert logger.group_separator == "/"
    logger.log_graph(model=None)
    logger.after_save_checkpoint(None)
    assert logger.calls == []
    logger.finalize("success")
    assert logger.calls == [("save",)], "finalize saves unless told otherwise"


@pytest.mark.parametrize("missing", ["name", "version", "log_metrics", "log_hyperparams"])
def test_what_a_subclass_must_define(missing):
    body = {
        name: getattr(Minimal, name)
        for name in ("name", "version", "log_metrics", "log_hyperparams")
        if name != missing
    }
    with pytest.raises(TypeError, match=missing):
        type("Incomplete", (Logger,), body)()


@pytest.mark.parametrize("kind", [Minimal, Decorated])
def test_verbs_on_rank_zero(kind):
    logger = kind()
    logger.log_metrics({"a": 1.0}, 2)
    logger.log_metrics(metrics={"a": 1.5}, step=3)
    logger.log_hyperparams({"lr": 0.1})
    assert logger.calls == [
        ("log_metrics", {"a": 1.0}, 2),
        ("log_metrics", {"a": 1.5}, 3),
        ("log_hyperparams", {"lr": 0.1}),
    ]


@pytest.mark.parametrize("kind", [Minimal, Decorated])
def test_verbs_do_nothing_on_other_ranks(kind, rank_one):
    logger = kind()
    logger.log_metrics({"a": 1.0}, 2)
    logger.log_hyperparams({"lr": 0.1})
    logger.save()
    logger.finalize("success")
    assert logger.calls == []


def test_a_logger_may_ask_for_every_rank(rank_one):
    logger = OnEveryRank()
    logger.log_metrics({"a": 1.0}, 2)
    logger.save()
    assert logger.calls == [("log_metrics", 2), ("save",)]


def test_experiment_is_the_real_one_on_rank_zero():
    assert Decorated().experiment == "the real one"


def test_experiment_swallows_everything_on_other_ranks(rank_one):
    experiment = Decorated().experiment
    assert isinstance(experiment, DummyExperiment)
    experiment.add_scalar("a", 1.0)
    experiment[0].add_image("b", None)
    experiment["key"] = 4


def test_verbs_of_one_logger_never_run_at_the_same_time():
    class Watching(Minimal):
        inside = 0
        most = 0

        def _enter(self):
            self.inside += 1
            self.most = max(self.most, self.inside)
            time.sleep(0.002)
            self.inside -= 1

        def log_metrics(self, metrics, step=None):
            self._enter()

        def log_hyperparams(self, params, *args, **kwargs):
            self._enter()

        def save(self):
            self._enter()

    logger = Watching()
    verbs = [lambda: logger.log_metrics({}, 0), lambda: logger.log_hyperparams({}), logger.save]
    threads = [threading.Thread(target=verb) for verb in verbs for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert logger.most == 1


def test_a_logger_that_was_used_can_be_pickled_and_copied():
    logger = Minimal()
    logger.log_metrics({"a": 1.0}, 0)
    for twin in (pickle.loads(pickle.dumps(logger)), copy.deepcopy(logger)):
        twin.log_metrics({"a": 2.0}, 1)
        assert len(twin.calls) == 2
    assert len(logger.calls) == 1


def test_wrapped_verbs_keep_their_names():
    assert Minimal.log_metrics.__name__ == "log_metrics"
    assert OnEveryRank.save.__qualname__ == "OnEveryRank.save"


def test_dummy_logger_accepts_everything():
    logger = DummyLogger()
    assert (logger.name, logger.version, logger.log_dir) == ("", "", None)
    logger.log_metrics({"a": 1}, step=2)
    logger.log_hyperparams({"a": 1}, 5, key=6)
    logger.log_image(key="x", images=[])
    logger.experiment.add_histogram("a", None)
    logger.experiment[0].whatever()
    logger[0].experiment.add_image("a", None)
    logger.finalize("success")


@pytest.mark.parametrize("stand_in", [DummyLogger(), DummyExperiment()])
def test_stand_ins_can_be_pickled_and_copied(stand_in):
    assert type(copy.deepcopy(stand_in)) is type(stand_in)
    assert type(pickle.loads(pickle.dumps(stand_in))) is type(stand_in)


def test_public_names():
    assert sorted(leyden.loggers._HOMES) == sorted(leyden.loggers.__all__)
    for name in leyden.loggers.__all__:
        assert getattr(leyden.loggers, name).__name__ == name
        assert name in dir(leyden.loggers)
    with pytest.raises(AttributeError, match="WandbLoger"):
        leyden.loggers.WandbLoger


def test_importing_the_family_loads_no_heavy_library():
    script = (
        "import sys, leyden.loggers as l\n"
        "l.CSVLogger, l.TensorBoardLogger, l.Recorder, l.History\n"
        "print([m for m in ('tensorboard', 'torch.utils.tensorboard', 'yaml', 'fsspec', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_H2_a_checkpoint_does_not_wait_for_a_logger_that_cannot_take_back_rows(tmp_path):
    import torch

    import leyden as L

    written, seen = [], []

    class Slow(Logger):
        name, version = "slow", 0

        def log_metrics(self, metrics, step=None):
            time.sleep(0.05)
            written.append(step)

        def log_hyperparams(self, params, *args, **kwargs):
            pass

    class Net(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            loss = self.net(batch).sum()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.save_checkpoint(tmp_path / "x.ckpt")
            seen.append(len(written))

    trainer = L.Trainer(
        max_epochs=1, logger=Slow(), callbacks=[Save()], log_every_n_steps=1, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(Net(), torch.ones(20, 1))
    assert written == list(range(20))
    assert seen[-1] < 19  # all at the end, none of them for a checkpoint


def test_a_state_that_is_not_plain_is_left_out_with_a_warning():
    class Odd(Logger):
        name, version = "odd", 0

        def log_metrics(self, metrics, step=None):
            pass

        def log_hyperparams(self, params, *args, **kwargs):
            pass

        def state_dict(self):
            return {"run": object()}

    with pytest.warns(match="Odd.state_dict.. failed.*run: only plain data can be in a checkpoint"):
        assert run_states([Odd()]) == [{"class": Odd.__qualname__}]
