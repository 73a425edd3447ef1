# SPDX-License-Identifier: Apache-2.0
"""optuna-integration: a study whose trials PyTorchLightningPruningCallback may end early."""

import lightning.pytorch as pl
import optuna
import torch
from kept import keep, metrics
from optuna_integration import PyTorchLightningPruningCallback


class Model(pl.LightningModule):
    def __init__(self, lr):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.hparams.lr)


pl.seed_everything(0)
x = torch.randn(128, 8)
data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))


def objective(trial):
    pl.seed_everything(trial.number)
    model = Model(trial.suggest_float("lr", 1e-4, 0.5, log=True))
    pruning = PyTorchLightningPruningCallback(trial, monitor="val_loss")
    off = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(max_epochs=5, accelerator="cpu", callbacks=[pruning, metrics(pl.Callback)], **off)
    trainer.fit(
        model,
        torch.utils.data.DataLoader(data, batch_size=16, shuffle=True),
        torch.utils.data.DataLoader(data, batch_size=64),
    )
    return trainer.callback_metrics["val_loss"].item()


study = optuna.create_study(
    direction="minimize", sampler=optuna.samplers.TPESampler(seed=1), pruner=optuna.pruners.MedianPruner(2)
)
study.optimize(objective, n_trials=8)
keep(trials=[[str(trial.state), trial.value, trial.params, trial.intermediate_values] for trial in study.trials])
