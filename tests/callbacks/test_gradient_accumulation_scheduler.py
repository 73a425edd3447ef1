# SPDX-License-Identifier: Apache-2.0
"""Tests of GradientAccumulationScheduler."""

from __future__ import annotations

import pytest

from leyden.callbacks import Callback, GradientAccumulationScheduler
from leyden.errors import LeydenWarning, MisconfigurationException
from leyden.module import LightningModule


def test_factor_of_each_epoch(make_trainer):
    seen = []

    class Sees(Callback):
        def on_train_batch_start(self, trainer, *args):
            seen.append(trainer.accumulate_grad_batches)

    given = {2: 3, 4: 1}
    scheduler = GradientAccumulationScheduler(given)
    trainer = make_trainer([scheduler, Sees()], epochs=6, batches=1)
    trainer.fit()
    assert seen == [1, 1, 3, 3, 1, 1]
    assert given == {2: 3, 4: 1}
    assert scheduler.scheduling == {0: 1, 2: 3, 4: 1}
    assert scheduler.going_to_accumulate_grad_batches()
    assert not GradientAccumulationScheduler({0: 1}).going_to_accumulate_grad_batches()


def test_a_run_that_resumes_within_an_epoch(make_trainer):
    trainer = make_trainer([scheduler := GradientAccumulationScheduler({1: 4})])
    trainer.current_epoch = 3
    scheduler.on_train_start(trainer, trainer.module)
    assert trainer.accumulate_grad_batches == 4


def test_a_second_fit(make_trainer):
    trainer = make_trainer([GradientAccumulationScheduler({0: 2})])
    trainer.fit()
    trainer.max_epochs = 3
    trainer.fit()
    assert trainer.accumulate_grad_batches == 2


@pytest.mark.parametrize("bad", [{-1: 2}, {"0": 2}, {0: 0}, {0: 1.5}])
def test_bad_schedule(bad):
    with pytest.raises(MisconfigurationException, match="`scheduling` must be an int"):
        GradientAccumulationScheduler(bad)


def test_empty_schedule():
    with pytest.raises(TypeError, match="empty"):
        GradientAccumulationScheduler({})


def test_what_it_cannot_work_with(make_trainer):
    scheduler = GradientAccumulationScheduler({0: 2})
    trainer = make_trainer(accumulate=3)
    with pytest.raises(ValueError, match="accumulate_grad_batches=3"):
        scheduler.on_train_start(trainer, trainer.module)
    trainer = make_trainer()
    trainer.module.automatic_optimization = False
    with pytest.raises(RuntimeError, match="manual optimization"):
        scheduler.on_train_start(trainer, trainer.module)


def test_overridden_optimizer_step(make_trainer):
    class Mine(LightningModule):
        def optimizer_step(self, *args, **kwargs): ...

    with pytest.warns(LeydenWarning, match="`Mine` overrides `optimizer_step`"):
        GradientAccumulationScheduler({0: 2}).on_train_start(make_trainer(), Mine())
    GradientAccumulationScheduler({0: 1}).on_train_start(make_trainer(), Mine())
    GradientAccumulationScheduler({0: 2}).on_train_start(make_trainer(), LightningModule())
