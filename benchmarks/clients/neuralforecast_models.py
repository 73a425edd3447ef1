# SPDX-License-Identifier: Apache-2.0
"""neuralforecast: NHITS, an LSTM and a TFT trained together on a panel, cross-validated, saved and loaded."""

import numpy as np
import pandas as pd
import pytorch_lightning as pl
from kept import keep, metrics
from neuralforecast import NeuralForecast
from neuralforecast.losses.pytorch import DistributionLoss
from neuralforecast.models import LSTM, NHITS, TFT

rng = np.random.default_rng(0)
panel = pd.concat(
    pd.DataFrame(
        {
            "unique_id": f"s{index}",
            "ds": pd.date_range("2020-01-01", periods=120, freq="D"),
            "y": np.sin(np.arange(120) / 6 + index) + 0.1 * rng.standard_normal(120),
        }
    )
    for index in range(4)
)


def shared(**more):
    return dict(h=6, input_size=24, max_steps=12, val_check_steps=4, accelerator="cpu", random_seed=3,
                enable_progress_bar=False, callbacks=[metrics(pl.Callback)], **more)  # fmt: skip


models = [
    NHITS(mlp_units=[[16, 16]] * 3, early_stop_patience_steps=2, **shared()),
    LSTM(encoder_hidden_size=8, decoder_hidden_size=8, loss=DistributionLoss("Normal", level=[80]), **shared()),
    TFT(hidden_size=8, n_head=2, **shared()),
]
forecaster = NeuralForecast(models=models, freq="D")
forecaster.fit(panel, val_size=12)
forecast = forecaster.predict()
windows = forecaster.cross_validation(panel, n_windows=2, val_size=12)
forecaster.save("saved", overwrite=True, save_dataset=True)
again = NeuralForecast.load("saved").predict()


def numbers(table):
    return table.select_dtypes("number")


keep(
    models={type(model).__name__: model for model in forecaster.models},
    forecast=numbers(forecast),
    windows=numbers(windows),
    again=numbers(again),
)
