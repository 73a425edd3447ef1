# SPDX-License-Identifier: Apache-2.0
"""What every progress bar knows: its trainer, the totals, the labels and the metrics."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from types import SimpleNamespace

import pytest

from leyden.callbacks.progress import ProgressBar, RichProgressBar, TQDMProgressBar
from leyden.callbacks.progress.base import get_standard_metrics
from leyden.errors import LeydenWarning

INF = float("inf")


class Bar(ProgressBar):
    enabled = True

    def disable(self):
        self.enabled = False

    def enable(self):
        self.enabled = True


@pytest.fixture
def bar():
    return Bar()


def test_there_is_no_trainer_before_setup(bar):
    with pytest.raises(TypeError, match="Bar.trainer is known only during a run"):
        bar.trainer


def test_the_trainer_is_held_weakly(bar, fake_trainer):
    gc.disable()
    try:
        trainer = fake_trainer()
        bar.setup(trainer, None, "fit")
        assert bar.trainer is trainer
        alive = weakref.ref(trainer)
        del trainer
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("make", [Bar, RichProgressBar, TQDMProgressBar])
def test_bars_can_be_pickled_and_copied_during_a_run(make, fake_trainer, capsys):
    bar, trainer = make(), fake_trainer()
    bar.setup(trainer, None, "fit")
    bar.on_train_epoch_start(trainer, None)
    for clone in (pickle.loads(pickle.dumps(bar)), copy.deepcopy(bar)):
        with pytest.raises(TypeError):
            clone.trainer
        trainer.fit(clone)


def test_other_ranks_are_silent(bar, fake_trainer):
    trainer = fake_trainer()
    trainer.is_global_zero = False
    bar.setup(trainer, None, "fit")
    assert not bar.enabled


def test_the_base_says_what_to_override():
    with pytest.raises(NotImplementedError, match="must override disable"):
        ProgressBar().disable()
    with pytest.raises(NotImplementedError, match="must override enable"):
        ProgressBar().enable()


def test_labels(bar, fake_trainer):
    trainer = fake_trainer(max_epochs=3)
    trainer.current_epoch = 1
    bar.setup(trainer, None, "fit")
    assert bar.train_description == "Epoch 2/3"
    for unlimited in (None, -1):
        trainer.max_epochs = unlimited
        assert bar.train_description == "Epoch 2"
    assert [
        bar.sanity_check_description,
        bar.validation_description,
        bar.test_description,
        bar.predict_description,
    ] == ["Sanity Checking", "Validation", "Testing", "Predicting"]


def test_total_of_training(bar, fake_trainer):
    trainer = fake_trainer(batches=10)
    bar.setup(trainer, None, "fit")
    assert bar.total_train_batches == 10
    trainer.max_epochs, trainer.max_steps, trainer.global_step = -1, 7, 4
    assert bar.total_train_batches == 3
    trainer.accumulate_grad_batches = trainer.batches_per_update = 2
    assert bar.total_train_batches == 6
    trainer.num_training_batches = INF
    assert bar.total_train_batches == 6


def test_totals_of_loaders(bar, fake_trainer):
    trainer = fake_trainer(val=[5, INF])
    bar.setup(trainer, None, "fit")
    assert bar.has_dataloader_changed(0)
    assert not bar.has_dataloader_changed(0)
    assert bar.total_val_batches_current_dataloader == bar.total_test_batches_current_dataloader == 5
    assert bar.has_dataloader_changed(1)
    assert bar.total_predict_batches_current_dataloader == INF
    trainer.sanity_checking = True
    assert bar.total_val_batches_current_dataloader == 2
    bar.reset_dataloader_idx_tracker()
    assert bar.has_dataloader_changed(1)


def test_total_of_validation(bar, fake_trainer):
    trainer = fake_trainer(val=[5, 6])
    bar.setup(trainer, None, "fit")
    assert bar.total_val_batches == 11
    trainer.check_val_every_n_epoch = 2
    assert bar.total_val_batches == 0
    trainer.check_val_every_n_epoch = None
    assert bar.total_val_batches == 11
    trainer.enable_validation = False
    assert bar.total_val_batches == 0


@pytest.mark.parametrize(
    ("versions", "shown"),
    [
        ([], {}),
        ([None, ""], {}),
        ([3], {"v_num": 3}),
        (["version_12"], {"v_num": "n_12"}),
        ([3, 3, 4], {"v_num": "3_4"}),
    ],
)
def test_version_number(versions, shown, fake_trainer):
    trainer = fake_trainer()
    trainer.loggers = [SimpleNamespace(version=version) for version in versions]
    assert get_standard_metrics(trainer) == shown


def test_logged_values_win_and_a_clash_is_said_once(bar, fake_trainer, recwarn):
    trainer = fake_trainer()
    trainer.loggers = [SimpleNamespace(version=1)]
    trainer.metrics = {"loss": 0.5}
    assert bar.get_metrics(trainer, None) == {"v_num": 1, "loss": 0.5}
    trainer.metrics["v_num"] = 9
    with pytest.warns(LeydenWarning, match="self.log\\('v_num'"):
        assert bar.get_metrics(trainer, None)["v_num"] == 9
    bar.get_metrics(trainer, None)


def test_print(bar, capsys):
    bar.print("a", "b", sep="-")
    assert capsys.readouterr().out == "a-b\n"
