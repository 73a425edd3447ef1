# SPDX-License-Identifier: Apache-2.0
"""``add_default_args`` of 2019: the options that scripts of then took from the library rather than declare."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

_FLAGS = (
    # option, attribute, what it says
    ("--eval_test_set", "eval_test_set", "test after training"),
    ("--enable_single_run", "single_run", "one run, no search"),
    ("--log_stdout", "log_stdout", "write what is printed to a file"),
    ("--single_run_gpu", "single_run_gpu", "one run on a GPU, no search"),
    ("--use_amp", "use_amp", "16-bit"),
    ("--check_grad_nans", "check_grad_nans", "name the parameters whose gradients are NaN"),
    ("--on_cluster", "on_cluster", "run on a cluster"),
    ("--fast_dev_run", "fast_dev_run", "one batch of everything"),
    ("--enable_tqdm", "enable_tqdm", "show the progress bar"),
    ("--interactive", "interactive", "run on the GPU of this machine"),
    ("--debug", "debug", "an Experiment that writes nothing"),
    ("--local", "local", "run on this machine"),
)
_VALUES: tuple[tuple[str, Any, type], ...] = (
    # option, default, type
    ("--check_val_every_n_epoch", 1, int),
    ("--max_nb_epochs", 200, int),
    ("--min_nb_epochs", 2, int),
    ("--train_percent_check", 1.0, float),
    ("--val_percent_check", 1.0, float),
    ("--test_percent_check", 1.0, float),
    ("--val_check_interval", 0.95, float),
    ("--log_save_interval", 100, int),
    ("--row_log_interval", 100, int),
    ("--early_stop_metric", "val_acc", str),
    ("--early_stop_mode", "min", str),
    ("--early_stop_patience", 3, int),
    ("--gradient_clip_val", -1, int),
    ("--track_grad_norm", -1, int),
    ("--model_save_monitor_value", "val_acc", str),
    ("--model_save_monitor_mode", "max", str),
    ("--model_load_weights_path", None, str),
    ("--nb_hopt_trials", 1, int),
    ("--gpus", None, str),
    ("--default_tensor_type", "torch.cuda.FloatTensor", str),
    ("--amp_level", "O2", str),
    ("--overfit", -1, float),
    ("--lr_scheduler_milestones", None, str),
)


def add_default_args(
    parser: argparse.ArgumentParser,
    root_dir: str | os.PathLike[str],
    rand_seed: int | None = None,
    possible_model_names: Sequence[str] | None = None,
) -> None:
    """Add the options of 2019 with their defaults of then.

    Args:
        parser: A HyperOptArgumentParser, or any ArgumentParser.
        root_dir: Models are saved and logs written below it.
        rand_seed: The default of ``--random_seed``; None leaves the option out.
        possible_model_names: Shown in the help of ``--model_name``; None leaves the option out.
    """
    root = os.fspath(root_dir)
    for option, attribute, text in _FLAGS:
        parser.add_argument(option, dest=attribute, action="store_true", help=text)
    parser.add_argument("--disable_early_stop", dest="enable_early_stop", action="store_false")
    for option, default, kind in _VALUES:
        parser.add_argument(option, default=default, type=kind)
    parser.add_argument("--accumulate_grad_batches", default=1, type=int)
    parser.add_argument("--model_save_path", default=f"{root}/model_weights")
    parser.add_argument("-en", "--tt_name", default="pt_test")
    parser.add_argument("-td", "--tt_description", default="pytorch lightning test")
    parser.add_argument("--tt_save_path", default=os.path.join(root, "test_tube_logs"))
    if possible_model_names is not None:
        parser.add_argument("--model_name", default="", help=", ".join(possible_model_names))
    if rand_seed is not None:
        parser.add_argument("--random_seed", default=rand_seed, type=int)
