# SPDX-License-Identifier: Apache-2.0
"""scvi-tools: SCVI with early stopping and SCANVI on top of it, on simulated cells; saved, loaded, latent space."""

import anndata
import numpy as np
import scvi
from kept import keep, metrics
from lightning.pytorch import Callback

scvi.settings.seed = 4
rng = np.random.default_rng(0)
cells = anndata.AnnData(rng.poisson(2.0, (192, 30)).astype(np.float32))
cells.obs["batch"] = [f"batch{index % 2}" for index in range(192)]
cells.obs["kind"] = [("a", "b", "unknown")[index % 3] for index in range(192)]
shared = {"accelerator": "cpu", "batch_size": 24, "callbacks": [metrics(Callback)], "enable_progress_bar": False}

scvi.model.SCVI.setup_anndata(cells, batch_key="batch", labels_key="kind")
model = scvi.model.SCVI(cells, n_latent=4, n_hidden=16)
model.train(max_epochs=6, early_stopping=True, early_stopping_patience=2, check_val_every_n_epoch=1,
            plan_kwargs={"reduce_lr_on_plateau": True, "lr": 1e-2}, **shared)  # fmt: skip
latent = model.get_latent_representation()
model.save("saved", overwrite=True)
again = scvi.model.SCVI.load("saved", cells).get_latent_representation()

semi = scvi.model.SCANVI.from_scvi_model(model, unlabeled_category="unknown")
semi.train(max_epochs=3, check_val_every_n_epoch=1, **shared)
keep(
    weights=model.module,
    history=dict(model.history.items()),
    latent=latent,
    again=again,
    semi=semi.module,
    predicted=semi.predict(soft=True),
    denoised=model.get_normalized_expression(n_samples=1),
)
