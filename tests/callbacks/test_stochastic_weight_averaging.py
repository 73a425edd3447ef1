# SPDX-License-Identifier: Apache-2.0
"""Stochastic weight averaging: arguments that cannot be, and what a fit leaves behind on the Trainer and the model."""

from __future__ import annotations

from typing import Any

import numbers_script as script
import pytest
from torch import nn

import leyden as L
from leyden.callbacks import StochasticWeightAveraging
from leyden.errors import MisconfigurationException


@pytest.mark.parametrize(
    "arguments",
    [
        {"swa_epoch_start": 0},
        {"swa_epoch_start": 1.5},
        {"swa_lrs": 1},
        {"swa_lrs": [0.1, -0.1]},
        {"avg_fn": 3},
        {"device": 1},
    ],
)
def test_a_wrong_argument_is_named(arguments: Any) -> None:
    with pytest.raises(MisconfigurationException, match=rf"StochasticWeightAveraging\({next(iter(arguments))}="):
        StochasticWeightAveraging(**{"swa_lrs": 0.1, **arguments})


def fit(model: Any, callback: Any, **arguments: Any) -> L.Trainer:
    trainer = L.Trainer(
        **{"max_epochs": 3, **arguments}, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=callback,
    )  # fmt: skip
    trainer.fit(model, script.data(), script.data(8))
    return trainer


def test_a_share_of_no_bound_is_an_error() -> None:
    with pytest.raises(MisconfigurationException, match="share of max_epochs"):
        fit(script.build(L), StochasticWeightAveraging(0.1), max_epochs=-1, max_steps=5)


def test_two_optimizers_are_an_error() -> None:
    model = script.build(L)
    one = model.configure_optimizers
    model.configure_optimizers = lambda: [one(), one()]
    with pytest.raises(MisconfigurationException, match="returned 2"):
        fit(model, StochasticWeightAveraging(0.1))


def test_the_epoch_of_the_batch_norms_goes_forward_only_and_leaves_all_as_it_was() -> None:
    model, backwards = script.build(L), []
    model.on_after_backward = lambda: backwards.append(1)
    trainer = fit(model, StochasticWeightAveraging(0.1, 2), accumulate_grad_batches=2)
    assert len(model.seen["losses"]) == 24
    assert len(backwards) == 18
    assert (trainer.max_epochs, trainer.accumulate_grad_batches, trainer.fit_loop.skip_backward) == (3, 2, False)
    assert [layer.momentum for layer in model.modules() if isinstance(layer, nn.BatchNorm1d)] == [0.1]


def test_an_exception_in_that_epoch_leaves_all_as_it_was() -> None:
    model = script.build(L)
    step = model.training_step

    def failing(batch: Any, batch_idx: int) -> Any:
        if model.trainer.current_epoch == 3 and batch_idx == 2:
            raise ValueError("no")
        return step(batch, batch_idx)

    model.training_step = failing
    callback = StochasticWeightAveraging(0.1, 2)
    with pytest.raises(ValueError, match="no"):
        fit(model, callback)
    assert model.backbone[1].momentum == 0.1
    assert not callback.momenta


def test_a_second_fit_averages_anew() -> None:
    model, callback = script.build(L), StochasticWeightAveraging(0.1, 2)
    trainer = fit(model, callback)
    assert callback.n_averaged == 2
    trainer.fit_loop.max_epochs = 7
    with pytest.warns(UserWarning, match="later than at its start"):
        trainer.fit(model, script.data(), script.data(8))
    assert callback.n_averaged == 3  # epochs 4, 5 and 6; the fourth one went to the batch norms
