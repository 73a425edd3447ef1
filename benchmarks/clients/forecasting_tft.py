# SPDX-License-Identifier: Apache-2.0
"""pytorch-forecasting: a temporal fusion transformer and N-BEATS on synthetic series; early stopping, learning rate monitor."""

import lightning.pytorch as pl
import numpy as np
import pandas as pd
from kept import keep, metrics
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor
from pytorch_forecasting import DeepAR, NBeats, TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.data import GroupNormalizer, NaNLabelEncoder
from pytorch_forecasting.metrics import NormalDistributionLoss, QuantileLoss

rng = np.random.default_rng(0)
frame = pd.concat(
    pd.DataFrame(
        {
            "time": np.arange(60),
            "value": np.sin(np.arange(60) / 5 + group) + 0.1 * rng.standard_normal(60) + 2,
            "group": str(group),
        }
    )
    for group in range(6)
).reset_index(drop=True)

SHARED = {
    "time_idx": "time",
    "target": "value",
    "group_ids": ["group"],
    "max_encoder_length": 16,
    "max_prediction_length": 4,
    "time_varying_unknown_reals": ["value"],
    "categorical_encoders": {"group": NaNLabelEncoder().fit(frame.group)},
}


def trainer(**more):
    return pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        limit_train_batches=12,
        gradient_clip_val=0.1,
        callbacks=[
            metrics(pl.Callback),
            EarlyStopping(monitor="val_loss", min_delta=1e-4, patience=1, mode="min"),
            LearningRateMonitor(),
        ],
        **more,
    )


def run(make, **extra):
    pl.seed_everything(42)
    training = TimeSeriesDataSet(frame[frame.time < 52], **SHARED, **extra)
    validation = TimeSeriesDataSet.from_dataset(training, frame, min_prediction_idx=52)
    model = make(training)
    fitter = trainer()
    fitter.fit(model, training.to_dataloader(train=True, batch_size=16), validation.to_dataloader(batch_size=32))
    best = type(model).load_from_checkpoint(fitter.checkpoint_callback.best_model_path, weights_only=False)
    predicted = best.predict(
        validation.to_dataloader(batch_size=32), trainer_kwargs={"accelerator": "cpu"}, return_y=True
    )
    return {"weights": model, "best": best, "predicted": predicted.output, "y": predicted.y[0]}


tft = run(
    lambda data: TemporalFusionTransformer.from_dataset(
        data,
        learning_rate=0.03,
        hidden_size=8,
        attention_head_size=1,
        hidden_continuous_size=4,
        loss=QuantileLoss(),
        log_interval=5,
        reduce_on_plateau_patience=2,
    ),
    static_categoricals=["group"],
    time_varying_known_reals=["time"],
    add_relative_time_idx=True,
    add_target_scales=True,
    target_normalizer=GroupNormalizer(groups=["group"]),
)
nbeats = run(lambda data: NBeats.from_dataset(data, learning_rate=1e-2, widths=[16, 32], backcast_loss_ratio=0.1))
deepar = run(
    lambda data: DeepAR.from_dataset(
        data, learning_rate=1e-2, hidden_size=8, rnn_layers=1, loss=NormalDistributionLoss()
    ),
    static_categoricals=["group"],
    time_varying_known_reals=["time"],
)
keep(tft=tft, nbeats=nbeats, deepar=deepar)
