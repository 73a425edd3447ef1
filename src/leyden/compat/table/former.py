# SPDX-License-Identifier: Apache-2.0
"""Rows of where ``pytorch_lightning`` had things before 2.0, and of 2019's ``test_tube``."""

from __future__ import annotations

ROWS = (
    # ---- 1.x, where it had other modules for the same things
    ("callbacks.base", "leyden.callback", "Callback"),
    ("callbacks", "leyden.callbacks.progress", "ProgressBarBase=ProgressBar"),
    ("callbacks.progress.base", "leyden.callbacks.progress", "ProgressBarBase=ProgressBar"),
    ("core.lightning", "leyden", "LightningModule"),
    ("loggers.base", "leyden.loggers.base", "DummyExperiment DummyLogger LightningLoggerBase=Logger"),
    ("loggers.base", "leyden.loggers.base", "rank_zero_experiment"),
    ("strategies", "leyden.strategies", "DataParallelStrategy"),
    ("strategies.dp", "leyden.strategies", "DataParallelStrategy"),
    ("profiler", "leyden.profilers", "BaseProfiler=Profiler PassThroughProfiler Profiler SimpleProfiler"),
    ("profiler", "leyden.profilers", "AdvancedProfiler PyTorchProfiler XLAProfiler"),
    ("trainer.supporters", "leyden", "CombinedLoader"),
    ("utilities", "leyden.errors", "MisconfigurationException"),
    ("utilities.apply_func", "leyden.compat.pieces", "move_data_to_device"),
    (
        "utilities.distributed",
        "leyden",
        "rank_zero_debug rank_zero_deprecation rank_zero_info rank_zero_only rank_zero_warn",
    ),
    ("utilities.seed", "leyden.runtime.seed", "pl_worker_init_function reset_seed seed_everything"),
    # ---- 0.4, of 2019
    ("", "leyden", "data_loader"),
    ("callbacks.pt_callbacks", "leyden.callbacks", "EarlyStopping GradientAccumulationScheduler ModelCheckpoint"),
    ("models.trainer", "leyden", "Trainer"),
    ("root_module.decorators", "leyden", "data_loader"),
    ("root_module.model_saving", "leyden.hparams", "load_hparams_from_tags_csv"),
    ("root_module.root_module", "leyden", "LightningModule"),
    ("utilities.arg_parse", "leyden.compat.arguments", "add_default_args"),
)

TEST_TUBE = (
    ("", "leyden", "Experiment HyperOptArgumentParser SlurmCluster"),
    ("argparse_hopt", "leyden.search", "HyperOptArgumentParser TTNamespace=HyperOptNamespace"),
    ("hpc", "leyden", "Experiment HyperOptArgumentParser SlurmCluster"),
    ("log", "leyden", "Experiment"),
)
