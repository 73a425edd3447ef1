# SPDX-License-Identifier: Apache-2.0
"""torch-geometric: graphs classified through LightningDataset: fit, test, predict."""

import lightning.pytorch as pl
import torch
from kept import keep, metrics
from torch_geometric.data import Data
from torch_geometric.data.lightning import LightningDataset
from torch_geometric.nn import GCN, global_mean_pool

generator = torch.Generator().manual_seed(0)


def graph(index):
    nodes = 6 + index % 5
    edges = torch.randint(0, nodes, (2, 3 * nodes), generator=generator)
    features = torch.randn(nodes, 4, generator=generator) + index % 2
    return Data(x=features, edge_index=edges, y=torch.tensor([index % 2]))


class Model(pl.LightningModule):
    def __init__(self, graphs):
        super().__init__()
        self.save_hyperparameters()
        self.gnn = GCN(4, 8, num_layers=2, out_channels=2, dropout=0.1)

    def step(self, batch, name):
        out = self.gnn(batch.x, batch.edge_index)
        if self.hparams.graphs:
            out, y = global_mean_pool(out, batch.batch), batch.y
        else:
            out, y = out[: batch.batch_size], batch.y[: batch.batch_size]
        loss = torch.nn.functional.cross_entropy(out, y)
        self.log(f"{name}_loss", loss, prog_bar=True, batch_size=len(y))
        self.log(f"{name}_acc", (out.argmax(-1) == y).float().mean(), batch_size=len(y), on_epoch=True, on_step=False)
        return loss

    def training_step(self, batch, batch_idx):
        return self.step(batch, "train")

    def validation_step(self, batch, batch_idx):
        self.step(batch, "val")

    def test_step(self, batch, batch_idx):
        self.step(batch, "test")

    def predict_step(self, batch, batch_idx):
        return self.gnn(batch.x, batch.edge_index)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), 1e-2)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


def run(datamodule, graphs):
    pl.seed_everything(1)
    model = Model(graphs)
    trainer = pl.Trainer(max_epochs=3, accelerator="cpu", callbacks=[metrics(pl.Callback)], log_every_n_steps=1)
    trainer.fit(model, datamodule=datamodule)
    return model, trainer.test(model, datamodule), trainer.predict(model, datamodule=datamodule)


data = [graph(index) for index in range(48)]
graphs = run(LightningDataset(data[:32], data[32:40], data[40:], data[40:], batch_size=8, num_workers=0), True)
keep(graphs=graphs)
