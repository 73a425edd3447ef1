# SPDX-License-Identifier: Apache-2.0
"""chemprop: a message passing network on molecules: fit, test, predict, the best checkpoint loaded."""

import numpy as np
from chemprop import data, featurizers, models, nn
from kept import keep, metrics
from lightning import pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

pl.seed_everything(11)
smiles = ["C" * length + tail for length in range(1, 9) for tail in ("O", "N", "C(=O)O", "c1ccccc1", "Cl", "C#N")]
targets = np.array([[len(text) + 2.0 * text.count("O")] for text in smiles])
points = [data.MoleculeDatapoint.from_smi(text, target) for text, target in zip(smiles, targets, strict=True)]
parts = [points[:32], points[32:40], points[40:]]
featurizer = featurizers.SimpleMoleculeMolGraphFeaturizer()
train, validation, test = (data.MoleculeDataset(part, featurizer) for part in parts)
scaler = train.normalize_targets()
validation.normalize_targets(scaler)

ffn = nn.RegressionFFN(output_transform=nn.UnscaleTransform.from_standard_scaler(scaler), input_dim=16, hidden_dim=16)
model = models.MPNN(
    nn.BondMessagePassing(d_h=16),
    nn.MeanAggregation(),
    ffn,
    batch_norm=True,
    metrics=[nn.metrics.RMSE(), nn.metrics.MAE()],
)
checkpoints = ModelCheckpoint("checkpoints", "best-{epoch}-{val_loss:.2f}", "val_loss", mode="min", save_last=True)
trainer = pl.Trainer(
    enable_checkpointing=True, enable_progress_bar=False, accelerator="cpu", devices=1, max_epochs=5,
    callbacks=[checkpoints, metrics(pl.Callback)], log_every_n_steps=2,
)  # fmt: skip
loader = data.build_dataloader(train, batch_size=8, num_workers=0, seed=3)
trainer.fit(model, loader, data.build_dataloader(validation, batch_size=8, num_workers=0, shuffle=False))
tests = data.build_dataloader(test, batch_size=8, num_workers=0, shuffle=False)
results = trainer.test(dataloaders=tests, weights_only=False)
predictions = trainer.predict(model, tests)
best = models.MPNN.load_from_checkpoint(checkpoints.best_model_path)
keep(weights=model, results=results, predictions=predictions, best=best)
