# SPDX-License-Identifier: Apache-2.0
"""The names of 2019, as tables: what each one meant, its default then, and what it is called today."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

REQUIRED = object()
"""The default of an argument that has none."""


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of a constructor: its default then, its name today (``"precision"``), and what it means."""

    name: str
    default: Any
    modern: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Member:
    """One method, hook or property: how it is written then and now, and what it means."""

    name: str
    usage: str
    modern: str
    meaning: str


TRAINER_ARGUMENTS: tuple[Argument, ...] = (
    Argument("experiment", None, "logger", "an Experiment; one whose version has a checkpoint restores the session"),
    Argument("early_stop_callback", None, "callbacks", "an EarlyStopping"),
    Argument("checkpoint_callback", None, "callbacks", "a ModelCheckpoint; False writes no checkpoints"),
    Argument("gradient_clip", 0, "gradient_clip_val", "largest norm of the gradients; 0 clips nothing"),
    Argument("cluster", None, "callbacks", "a SlurmCluster: checkpoint and resubmit before the walltime is over"),
    Argument("process_position", 0, "callbacks", "row of the progress bar when several run in one terminal"),
    Argument("current_gpu_name", 0, "", "accepted; the device of a run is trainer.strategy.root_device"),
    Argument("nb_gpu_nodes", 1, "num_nodes", "number of machines; more than one turns dp into ddp"),
    Argument(
        "gpus", None, "devices", "ids as a list or '0,1', or '-1' for all; None is the CPU; left out, what there is"
    ),
    Argument("progress_bar", True, "enable_progress_bar", "whether there is a progress bar"),
    Argument(
        "overfit_pct", 0.0, "overfit_batches", "train, validate and test on this fraction of the data, unshuffled"
    ),
    Argument("track_grad_norm", -1, "callbacks", "log this norm of each layer's gradient, and the total, at each row"),
    Argument("max_nb_epochs", 1000, "max_epochs", "bound on epochs"),
    Argument("min_nb_epochs", 1, "min_epochs", "epochs that run whatever asks to stop"),
    Argument("train_percent_check", 1.0, "limit_train_batches", "fraction of the training batches of an epoch"),
    Argument("val_percent_check", 1.0, "limit_val_batches", "fraction of the validation batches"),
    Argument("test_percent_check", 1.0, "limit_test_batches", "fraction of the test batches"),
    Argument("log_save_interval", 100, "", "bring what was logged to disk every so many batches"),
    Argument("add_log_row_interval", 10, "log_every_n_steps", "updates between two rows"),
    Argument(
        "distributed_backend",
        "dp",
        "strategy",
        "'dp' or 'ddp', where several devices are asked for; 'ddp_cpu' with num_processes; 'ddp2' is dp on one machine",
    ),
    Argument("use_amp", False, "precision", "16-bit mixed precision (bfloat16 on a CPU)"),
    Argument("amp_level", "O2", "precision", "with use_amp: O0 is 32-true, O1 and O2 are 16-mixed, O3 is 16-true"),
    Argument("print_nan_grads", False, "callbacks", "print the names of the parameters whose gradients are NaN"),
    Argument("print_weights_summary", True, "enable_model_summary", "whether a summary of the layers is printed"),
    Argument("nb_sanity_val_steps", 5, "num_sanity_val_steps", "validation batches ahead of training"),
    Argument("enable_early_stop", True, "callbacks", "False leaves every EarlyStopping out"),
)
"""What only the Trainer of 2019 took."""

SAME_ARGUMENTS: tuple[Argument, ...] = (
    Argument("check_val_every_n_epoch", 1, "check_val_every_n_epoch", "validate in every n-th epoch"),
    Argument("fast_dev_run", False, "fast_dev_run", "run one batch of everything and write nothing"),
    Argument("accumulate_grad_batches", 1, "accumulate_grad_batches", "batches of one update"),
    Argument("val_check_interval", 0.95, "val_check_interval", "validate after this fraction of an epoch"),
)
"""What the Trainer still takes under the same name."""

SOON_AFTER: tuple[Argument, ...] = (
    Argument("num_processes", 1, "devices", "processes on the CPU, with 'ddp_cpu' (came a few months later)"),
)
"""What the Trainer took from the end of 2019 on, and takes no more."""

DEFAULTS: dict[str, Any] = {"val_check_interval": 0.95, "num_sanity_val_steps": 5, "log_every_n_steps": 10}
"""Arguments of today whose default is that of 2019 as soon as one argument of 2019 is given."""

HOOKS: dict[str, tuple[str, int]] = {
    "on_epoch_start": ("on_train_epoch_start", 0),
    "on_epoch_end": ("on_train_epoch_end", 0),
    "on_batch_start": ("on_train_batch_start", 1),
    "on_batch_end": ("on_train_batch_end", 0),
    "on_pre_performance_check": ("on_validation_start", 0),
    "on_post_performance_check": ("on_validation_end", 0),
}
"""The hook of a module then, the hook of today at whose place it runs, and how many of its arguments it gets."""

MODULE_MEMBERS: tuple[Member, ...] = (
    Member("training_step", "training_step(data_batch, batch_nb)", "training_step",
           "return the loss, or a dict with `loss` and, if you like, `prog`: tensors for the bar and the log"),
    Member("validation_step", "validation_step(data_batch, batch_nb)", "validation_step", "return a dict of tensors"),
    Member("validation_end", "validation_end(outputs)", "on_validation_epoch_end",
           "gets what the steps returned; returns a dict that is shown, logged and monitored"),
    Member("test_step", "test_step(data_batch, batch_nb)", "test_step", "the same for `trainer.test`"),
    Member("test_end", "test_end(outputs)", "on_test_epoch_end", "the same for `trainer.test`"),
    Member("configure_optimizers", "configure_optimizers()", "configure_optimizers",
           "optimizers, or (optimizers, schedulers); schedulers step once an epoch; all optimizers step on the one loss"),
    Member("tng_dataloader", "tng_dataloader()", "train_dataloader", "the training batches"),
    Member("val_dataloader", "val_dataloader()", "val_dataloader", "the validation batches"),
    Member("test_dataloader", "test_dataloader()", "test_dataloader", "the test batches"),
    Member("data_loader", "@data_loader", "", "the loader is made once, when it is first needed, and reads as a property"),
    Member("update_tng_log_metrics", "update_tng_log_metrics(logs)", "self.log", "return the row that is to be logged"),
    Member("on_tng_metrics", "on_tng_metrics(metrics)", "self.log", "change the row that is about to be logged"),
    Member("add_model_specific_args", "add_model_specific_args(parent_parser, root_dir)", "",
           "static: add the model's options to a parser and return it"),
    Member("on_save_checkpoint", "on_save_checkpoint(checkpoint)", "on_save_checkpoint", "put extra state in"),
    Member("on_load_checkpoint", "on_load_checkpoint(checkpoint)", "on_load_checkpoint", "take extra state out"),
    Member("on_hpc_save", "on_hpc_save(checkpoint)", "on_save_checkpoint", "the same, when a cluster's walltime ends"),
    Member("on_hpc_load", "on_hpc_load(checkpoint)", "on_load_checkpoint", "the same, in the job that continues"),
    Member("on_epoch_start", "on_epoch_start()", "on_train_epoch_start", "a training epoch begins"),
    Member("on_epoch_end", "on_epoch_end()", "on_train_epoch_end", "a training epoch ends"),
    Member("on_batch_start", "on_batch_start(batch)", "on_train_batch_start", "return -1 to end the epoch"),
    Member("on_batch_end", "on_batch_end()", "on_train_batch_end", "a training batch is done"),
    Member("on_pre_performance_check", "on_pre_performance_check()", "on_validation_start",
           "validation begins; not for the sanity check"),
    Member("on_post_performance_check", "on_post_performance_check()", "on_validation_end",
           "validation is done; not for the sanity check"),
    Member("on_before_zero_grad", "on_before_zero_grad(optimizer)", "on_before_zero_grad", "gradients are to be cleared"),
    Member("on_after_backward", "on_after_backward()", "on_after_backward", "gradients are there"),
    Member("current_epoch", "current_epoch", "current_epoch", "epochs completed"),
    Member("global_step", "global_step", "global_step", "updates so far"),
    Member("dtype", "dtype", "dtype", "the number format of the parameters"),
    Member("experiment", "experiment", "logger.experiment", "the Experiment of the Trainer"),
    Member("gradient_clip", "gradient_clip", "trainer.gradient_clip_val", "largest norm of the gradients, 0 for none"),
    Member("on_gpu", "on_gpu", "on_gpu", "whether the module is on a GPU"),
    Member("trainer", "trainer", "trainer", "the Trainer that runs the module"),
    Member("example_input_array", "example_input_array", "example_input_array",
           "when set, the summary prints the sizes of every layer"),
    Member("hparams", "hparams", "hparams", "what `__init__` was given; can be set"),
    Member("freeze", "freeze()", "freeze", "no parameter is trained"),
    Member("unfreeze", "unfreeze()", "unfreeze", "every parameter is trained"),
    Member("summarize", "summarize()", "ModelSummary(model)", "print the layers, return the summary"),
    Member("grad_norm", "grad_norm(p)", "", "the p-norm of each parameter's gradient, and the total"),
    Member("load_from_metrics", "load_from_metrics(weights_path, tags_csv, on_gpu, map_location=None)",
           "load_from_checkpoint(weights_path, hparams_file=tags_csv)", "build the model from `meta_tags.csv`"),
)  # fmt: skip
"""What a module of 2019 had."""

TRAINER_MEMBERS: tuple[Member, ...] = (
    Member("fit", "fit(model)", "fit(model)", "returns 1 after a run of 2019"),
    Member("tng_tqdm_dic", "tng_tqdm_dic", "progress_bar_metrics", "the metrics of the progress bar"),
)
"""What a Trainer of 2019 had."""

CALLBACK_ARGUMENTS: dict[str, tuple[Argument, ...]] = {
    "EarlyStopping": (
        Argument("monitor", "val_loss", "monitor", "the metric"),
        Argument("min_delta", 0.0, "min_delta", "an improvement by this much or less is none"),
        Argument("patience", 0, "patience", "checks without improvement"),
        Argument("verbose", 0, "verbose", "say why it stops"),
        Argument("mode", "auto", "mode", "'min', 'max', or 'auto': by the name of the metric"),
    ),
    "ModelCheckpoint": (
        Argument("filepath", REQUIRED, "dirpath", "the folder"),
        Argument("monitor", "val_loss", "monitor", "the metric, where only the best is kept"),
        Argument("verbose", 0, "verbose", "say what is saved"),
        Argument("save_best_only", False, "save_top_k", "keep the best only (1), or all (-1)"),
        Argument("save_weights_only", False, "save_weights_only", "leave out what is only needed to resume"),
        Argument("mode", "auto", "mode", "'min', 'max', or 'auto': by the name of the metric"),
        Argument("period", 1, "every_n_epochs", "epochs between two checkpoints"),
        Argument("prefix", "", "filename", "what the name of each file begins with"),
    ),
}
"""The constructors of the callbacks, their arguments in their order."""
