# SPDX-License-Identifier: Apache-2.0
"""A project template of 2019: its parser and default options, an Experiment, callbacks, two optimizers on one loss."""

import json
import os
import sys

import pytorch_lightning as ptl
import torch
from pytorch_lightning.callbacks.pt_callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.models.trainer import Trainer
from pytorch_lightning.root_module.root_module import LightningModule
from pytorch_lightning.utilities.arg_parse import add_default_args
from test_tube import Experiment, HyperOptArgumentParser, SlurmCluster
from torch.utils.data import DataLoader, TensorDataset

assert SlurmCluster


class TemplateModel(LightningModule):
    def __init__(self, hparams):
        super(TemplateModel, self).__init__()
        self.hparams = hparams
        self.first = torch.nn.Linear(2, hparams.width)
        self.second = torch.nn.Linear(hparams.width, 1)
        self.data = TensorDataset(torch.randn(64, 2), torch.ones(64, 1))

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))

    def training_step(self, data_batch, batch_nb):
        x, y = data_batch
        loss = torch.nn.functional.mse_loss(self.forward(x), y)
        return {"loss": loss, "prog": {"tng_error": loss.sqrt()}}

    def validation_step(self, data_batch, batch_nb):
        x, y = data_batch
        return {"val_loss": torch.nn.functional.mse_loss(self.forward(x), y)}

    def validation_end(self, outputs):
        return {"val_loss": torch.stack([x["val_loss"] for x in outputs]).mean()}

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.first, self.second)]

    @ptl.data_loader
    def tng_dataloader(self):
        return DataLoader(self.data, batch_size=16)

    @ptl.data_loader
    def val_dataloader(self):
        return DataLoader(self.data, batch_size=32)

    @staticmethod
    def add_model_specific_args(parent_parser, root_dir):
        parser = HyperOptArgumentParser(strategy=parent_parser.strategy, parents=[parent_parser])
        parser.opt_list("--width", default=8, type=int, options=[4, 8], tunable=True)
        return parser


def main(hparams):
    torch.manual_seed(hparams.random_seed)
    model = TemplateModel(hparams)
    exp = Experiment(name=hparams.tt_name, debug=hparams.debug, save_dir=hparams.tt_save_path)
    exp.argparse(hparams)
    exp.save()
    early_stop = EarlyStopping(
        monitor=hparams.early_stop_metric,
        patience=hparams.early_stop_patience,
        mode=hparams.early_stop_mode,
    )
    checkpoint = ModelCheckpoint(
        filepath=os.path.join(hparams.model_save_path, exp.name, str(exp.version)),
        save_best_only=True,
        monitor=hparams.model_save_monitor_value,
        mode=hparams.model_save_monitor_mode,
    )
    trainer = Trainer(
        experiment=exp,
        checkpoint_callback=checkpoint,
        early_stop_callback=early_stop,
        max_nb_epochs=hparams.max_nb_epochs,
        min_nb_epochs=hparams.min_nb_epochs,
    )
    trained = trainer.fit(model)
    print(
        json.dumps(
            {
                "loss": trainer.tng_tqdm_dic["val_loss"],
                "trained": trained,
                "weight": model.first.weight.sum().item(),
                "steps": trainer.global_step,
                "files": sorted(os.listdir(exp.get_data_path(exp.name, exp.version))),
                "saved": len(os.listdir(os.path.join(hparams.model_save_path, exp.name, str(exp.version)))),
            }
        )
    )


if __name__ == "__main__":
    root_dir = os.path.split(os.path.dirname(sys.modules["__main__"].__file__))[0]
    parent_parser = HyperOptArgumentParser(strategy="random_search", add_help=False)
    add_default_args(parent_parser, os.getcwd(), rand_seed=8)
    parser = TemplateModel.add_model_specific_args(parent_parser, root_dir)
    main(parser.parse_args())
