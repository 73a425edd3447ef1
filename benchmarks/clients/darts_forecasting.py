# SPDX-License-Identifier: Apache-2.0
"""darts: N-BEATS with early stopping, saved, loaded and asked for a forecast; a TCN with a likelihood."""

import numpy as np
import pytorch_lightning as pl
from darts import TimeSeries
from darts.models import NBEATSModel, TCNModel
from darts.utils.likelihood_models.torch import GaussianLikelihood
from kept import keep, metrics
from pytorch_lightning.callbacks import EarlyStopping

rng = np.random.default_rng(0)
series = TimeSeries.from_values(np.sin(np.arange(300) / 8) + 0.1 * rng.standard_normal(300)).astype(np.float32)
train, validation = series[:240], series[220:]


def shared(**more):
    callbacks = [metrics(pl.Callback), EarlyStopping("val_loss", patience=2)]
    settings = {"accelerator": "cpu", "callbacks": callbacks, "enable_progress_bar": False}
    return dict(
        input_chunk_length=24,
        output_chunk_length=6,
        n_epochs=3,
        batch_size=16,
        random_state=7,
        pl_trainer_kwargs=settings,
        save_checkpoints=True,
        force_reset=True,
        work_dir="darts",
        **more,
    )


nbeats = NBEATSModel(num_stacks=2, num_layers=2, layer_widths=16, model_name="nbeats", **shared())
nbeats.fit(train, val_series=validation)
forecast = nbeats.predict(12).values()
best = NBEATSModel.load_from_checkpoint("nbeats", work_dir="darts", best=True, trusted=True)
of_the_best = best.predict(12, series=train).values()
nbeats.save("nbeats.darts")
again = NBEATSModel.load("nbeats.darts", trusted=True).predict(12).values()

tcn = TCNModel(num_filters=4, likelihood=GaussianLikelihood(), model_name="tcn", **shared(log_tensorboard=True))
tcn.fit(train, val_series=validation)
samples = tcn.predict(6, num_samples=20).all_values()
history = tcn.historical_forecasts(series, start=270, forecast_horizon=3, retrain=False, verbose=False).values()
keep(
    nbeats=nbeats.model,
    forecast=forecast,
    of_the_best=of_the_best,
    again=again,
    tcn=tcn.model,
    samples=samples,
    history=history,
)
