# SPDX-License-Identifier: Apache-2.0
"""gluonts: DeepAR and a temporal fusion transformer by its estimators, with validation data, and sampled forecasts."""

import lightning.pytorch as pl
import numpy as np
import pandas as pd
from gluonts.dataset.common import ListDataset
from gluonts.torch.model.deepar import DeepAREstimator
from gluonts.torch.model.tft import TemporalFusionTransformerEstimator
from kept import keep, metrics

rng = np.random.default_rng(0)
rows = [
    {"start": pd.Period("2021-01-01", freq="D"), "target": np.sin(np.arange(100) / 7 + index) + rng.normal(0, 0.1, 100)}
    for index in range(5)
]
data = ListDataset(rows, freq="D")


def fitted(make, **more):
    pl.seed_everything(5)
    np.random.seed(5)
    settings = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "callbacks": [metrics(pl.Callback)],
        "enable_progress_bar": False,
    }
    estimator = make(
        freq="D", prediction_length=5, batch_size=8, num_batches_per_epoch=6, trainer_kwargs=settings, **more
    )
    predictor = estimator.train(data, validation_data=data)
    forecasts = list(predictor.predict(data))
    return predictor.prediction_net, [forecast.mean for forecast in forecasts]


deepar, samples = fitted(DeepAREstimator, hidden_size=8, num_layers=1)
tft, quantiles = fitted(TemporalFusionTransformerEstimator, hidden_dim=8, num_heads=2)
keep(deepar=deepar, samples=samples, tft=tft, quantiles=quantiles)
