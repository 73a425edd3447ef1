# SPDX-License-Identifier: Apache-2.0
"""The one table of foreign import names: which module of Leyden answers each name of each foreign module.

A row is a foreign module below its root, the module of ours that answers, and the names; ``then=now`` where ours has
another name. A module may have several rows. To answer one more name, add it here.
"""

from __future__ import annotations

from typing import NamedTuple

VERSIONS = {"lightning": "2.6.6", "pytorch_lightning": "2.6.6", "lightning_fabric": "2.6.6", "test_tube": "0.7.5"}
"""The packages whose names are answered, and the version that each says it is: libraries look at it."""

_ENVIRONMENTS = (
    "ClusterEnvironment KubeflowEnvironment LSFEnvironment LightningEnvironment MPIEnvironment SLURMEnvironment"
    " TorchElasticEnvironment"
)
_WRITERS = "leyden.callbacks.prediction_writer"

_PYTORCH = (
    # ---- 2.x
    ("", "leyden", "Callback LightningDataModule LightningModule Trainer seed_everything"),
    ("accelerators", "leyden.runtime.devices", "Accelerator CPUAccelerator CUDAAccelerator MPSAccelerator"),
    ("accelerators", "leyden.runtime.devices", "find_usable_cuda_devices"),
    ("accelerators", "leyden.compat.registries", "AcceleratorRegistry"),
    ("accelerators.accelerator", "leyden.runtime.devices", "Accelerator"),
    ("accelerators.cpu", "leyden.runtime.devices", "CPUAccelerator"),
    ("accelerators.cuda", "leyden.runtime.devices", "CUDAAccelerator"),
    ("accelerators.mps", "leyden.runtime.devices", "MPSAccelerator"),
    (
        "callbacks",
        "leyden.callbacks",
        "BasePredictionWriter Callback Checkpoint EarlyStopping GradientAccumulationScheduler LambdaCallback"
        " LearningRateMonitor ModelCheckpoint ModelSummary OnExceptionCheckpoint ProgressBar RichModelSummary RichProgressBar"
        " TQDMProgressBar ThroughputMonitor Timer",
    ),
    ("callbacks.callback", "leyden.callback", "Callback"),
    ("callbacks.checkpoint", "leyden.callbacks.checkpoint", "Checkpoint"),
    ("callbacks.early_stopping", "leyden.callbacks.early_stopping", "EarlyStopping EarlyStoppingReason"),
    ("callbacks.gradient_accumulation_scheduler", "leyden.callbacks", "GradientAccumulationScheduler"),
    ("callbacks.lambda_function", "leyden.callbacks.lambda_function", "LambdaCallback"),
    ("callbacks.lr_monitor", "leyden.callbacks.learning_rate_monitor", "LearningRateMonitor"),
    ("callbacks.model_checkpoint", "leyden.callbacks.checkpoint", "ModelCheckpoint"),
    ("callbacks.model_summary", "leyden.callbacks.model_summary", "ModelSummary"),
    ("callbacks.on_exception_checkpoint", "leyden.callbacks", "OnExceptionCheckpoint"),
    ("callbacks.prediction_writer", _WRITERS, "BasePredictionWriter WriteInterval"),
    ("callbacks.progress", "leyden.callbacks.progress", "ProgressBar RichProgressBar TQDMProgressBar"),
    ("callbacks.progress.progress_bar", "leyden.callbacks.progress", "ProgressBar"),
    ("callbacks.progress.rich_progress", "leyden.callbacks.progress", "RichProgressBar RichProgressBarTheme"),
    ("callbacks.progress.tqdm_progress", "leyden.callbacks.progress", "TQDMProgressBar"),
    ("callbacks.rich_model_summary", "leyden.callbacks.model_summary", "RichModelSummary"),
    ("callbacks.throughput_monitor", "leyden.callbacks.throughput_monitor", "ThroughputMonitor get_available_flops"),
    ("callbacks.timer", "leyden.callbacks.timer", "Interval Timer"),
    ("cli", "leyden.cli.lightning_cli", "LightningCLI instantiate_class instantiate_module"),
    ("cli", "leyden.cli.save_config", "SaveConfigCallback"),
    (
        "cli",
        "leyden.cli.parser",
        "ActionConfigFile ArgsType ArgumentParser LRSchedulerCallable LRSchedulerType LRSchedulerTypeTuple LRSchedulerTypeUnion"
        " LightningArgumentParser Namespace OptimizerCallable ReduceLROnPlateau class_from_function"
        " register_unresolvable_import_paths",
    ),
    ("cli", "leyden", "Callback LightningDataModule LightningModule Trainer seed_everything"),
    ("cli", "torch.optim", "Optimizer"),
    ("cli", "torch.optim.lr_scheduler", "LRScheduler"),
    ("core", "leyden", "LightningDataModule LightningModule"),
    ("core.datamodule", "leyden", "LightningDataModule"),
    ("core.hooks", "leyden.module_hooks", "DataHooks ModelHooks"),
    ("core.mixins", "leyden.hparams", "HyperparametersMixin"),
    ("core.mixins.hparams_mixin", "leyden.hparams", "HyperparametersMixin"),
    ("core.module", "leyden", "LightningModule"),
    ("core.optimizer", "leyden.optim", "LightningOptimizer"),
    ("core.saving", "leyden.hparams", "load_hparams_from_tags_csv load_hparams_from_yaml"),
    ("core.saving", "leyden.hparams", "save_hparams_to_tags_csv save_hparams_to_yaml"),
    ("loggers", "leyden.loggers", "CSVLogger Logger TensorBoardLogger"),
    ("loggers.csv_logs", "leyden.loggers.csv", "CSVLogger ExperimentWriter"),
    ("loggers.logger", "leyden.loggers.base", "DummyExperiment DummyLogger Logger rank_zero_experiment"),
    ("loggers.tensorboard", "leyden.loggers.tensorboard", "TensorBoardLogger"),
    ("plugins", "leyden.precision", "DoublePrecision HalfPrecision MixedPrecision Precision"),
    ("plugins", "leyden.checkpoint_io", "AsyncCheckpointIO CheckpointIO TorchCheckpointIO"),
    ("plugins", "leyden.runtime.cluster", "ClusterEnvironment"),
    ("plugins.environments", "leyden.runtime.cluster", _ENVIRONMENTS),
    ("plugins.environments.cluster_environment", "leyden.runtime.cluster", "ClusterEnvironment"),
    ("plugins.environments.kubeflow_environment", "leyden.runtime.cluster", "KubeflowEnvironment"),
    ("plugins.environments.lightning_environment", "leyden.runtime.cluster", "LightningEnvironment"),
    ("plugins.environments.lsf_environment", "leyden.runtime.cluster", "LSFEnvironment"),
    ("plugins.environments.slurm_environment", "leyden.runtime.cluster", "SLURMEnvironment"),
    ("plugins.environments.torchelastic_environment", "leyden.runtime.cluster", "TorchElasticEnvironment"),
    ("plugins.io", "leyden.checkpoint_io", "AsyncCheckpointIO CheckpointIO TorchCheckpointIO"),
    ("plugins.io.async_plugin", "leyden.checkpoint_io", "AsyncCheckpointIO"),
    ("plugins.io.checkpoint_plugin", "leyden.checkpoint_io", "CheckpointIO"),
    ("plugins.io.torch_plugin", "leyden.checkpoint_io", "TorchCheckpointIO"),
    ("plugins.precision", "leyden.precision", "DoublePrecision HalfPrecision MixedPrecision Precision"),
    ("plugins.precision.amp", "leyden.precision", "MixedPrecision"),
    ("plugins", "leyden.precision.deepspeed", "DeepSpeedPrecision"),
    ("plugins.precision", "leyden.precision.deepspeed", "DeepSpeedPrecision"),
    ("plugins.precision.deepspeed", "leyden.precision.deepspeed", "DeepSpeedPrecision"),
    ("plugins.precision.double", "leyden.precision", "DoublePrecision"),
    ("plugins.precision.half", "leyden.precision", "HalfPrecision"),
    ("plugins.precision.precision", "leyden.precision", "Precision"),
    ("profilers", "leyden.profilers", "PassThroughProfiler Profiler SimpleProfiler"),
    ("profilers.base", "leyden.profilers", "PassThroughProfiler"),
    ("profilers.profiler", "leyden.profilers", "Profiler"),
    ("profilers.simple", "leyden.profilers", "SimpleProfiler"),
    ("strategies", "leyden.strategies", "DDPStrategy ParallelStrategy SingleDeviceStrategy Strategy"),
    ("strategies", "leyden.strategies", "DeepSpeedStrategy FSDPStrategy ModelParallelStrategy"),
    ("strategies", "leyden.compat.registries", "StrategyRegistry"),
    ("strategies.ddp", "leyden.strategies", "DDPStrategy"),
    ("strategies.deepspeed", "leyden.strategies", "DeepSpeedStrategy"),
    ("strategies.fsdp", "leyden.strategies", "FSDPStrategy"),
    ("strategies.model_parallel", "leyden.strategies", "ModelParallelStrategy"),
    ("strategies.parallel", "leyden.strategies", "ParallelStrategy"),
    ("strategies.single_device", "leyden.strategies", "SingleDeviceStrategy"),
    ("strategies.strategy", "leyden.strategies", "Strategy"),
    ("trainer", "leyden", "Trainer seed_everything"),
    ("trainer.states", "leyden.types", "RunningStage TrainerFn TrainerState TrainerStatus"),
    ("trainer.trainer", "leyden", "Trainer"),
    ("utilities", "leyden", "CombinedLoader rank_zero_deprecation rank_zero_info rank_zero_only rank_zero_warn"),
    ("utilities", "leyden.hparams", "AttributeDict"),
    ("utilities", "leyden.compat.pieces", "GradClipAlgorithmType"),
    ("utilities", "leyden.compat.pieces", "move_data_to_device"),
    ("utilities.combined_loader", "leyden", "CombinedLoader"),
    ("utilities", "leyden.compat.pieces", "grad_norm"),
    ("utilities", "leyden.runtime.flops", "measure_flops"),
    ("utilities.enums", "leyden.compat.pieces", "GradClipAlgorithmType"),
    ("utilities.exceptions", "leyden.errors", "MisconfigurationException SIGTERMException"),
    ("utilities.grads", "leyden.compat.pieces", "grad_norm"),
    ("utilities.model_summary", "leyden.summary", "LayerSummary ModelSummary summarize"),
    ("utilities.model_summary", "leyden.summary", "get_human_readable_count=human_count parse_batch_shape=shape_of"),
    ("utilities.model_summary.model_summary", "leyden.summary", "LayerSummary ModelSummary summarize"),
    ("utilities.model_summary.model_summary", "leyden.summary", "get_human_readable_count=human_count"),
    ("utilities.model_summary.model_summary", "leyden.summary", "parse_batch_shape=shape_of"),
    ("utilities.parsing", "leyden.hparams", "AttributeDict"),
    ("utilities.rank_zero", "leyden.errors", "LightningDeprecationWarning=LeydenDeprecationWarning"),
    (
        "utilities.rank_zero",
        "leyden.runtime.ranks",
        "rank_zero_debug rank_zero_deprecation rank_zero_info rank_zero_only rank_zero_warn",
    ),
    ("utilities.seed", "leyden.runtime.seed", "isolate_rng"),
    ("utilities.types", "leyden.types", "EVAL_DATALOADERS OptimizerLRScheduler STEP_OUTPUT TRAIN_DATALOADERS"),
    ("utilities.types", "leyden.types", "LRSchedulerTypeUnion=LRScheduler LRSchedulerPLType=LRScheduler"),
    ("utilities.types", "leyden.optim", "LRSchedulerConfig"),
    ("utilities.types", "leyden.compat.pieces", "LRSchedulerConfigType LRSchedulerType LRSchedulerTypeTuple"),
    ("utilities.types", "leyden.compat.pieces", "OptimizerConfig OptimizerLRSchedulerConfig"),
    ("utilities.warnings", "leyden.errors", "PossibleUserWarning"),
)

_BEFORE_2 = (
    # ---- 1.x, where it had other modules for the same things
    ("callbacks.base", "leyden.callback", "Callback"),
    ("callbacks.progress.base", "leyden.callbacks.progress", "ProgressBarBase=ProgressBar"),
    ("core.lightning", "leyden", "LightningModule"),
    ("loggers.base", "leyden.loggers.base", "DummyExperiment DummyLogger LightningLoggerBase=Logger"),
    ("loggers.base", "leyden.loggers.base", "rank_zero_experiment"),
    ("strategies", "leyden.strategies", "DataParallelStrategy"),
    ("strategies.dp", "leyden.strategies", "DataParallelStrategy"),
    ("profiler", "leyden.profilers", "BaseProfiler=Profiler PassThroughProfiler Profiler SimpleProfiler"),
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

_FABRIC = (
    ("", "leyden", "Fabric seed_everything"),
    ("", "leyden.wrappers", "is_wrapped"),
    ("accelerators", "leyden.runtime.devices", "Accelerator CPUAccelerator CUDAAccelerator MPSAccelerator"),
    ("accelerators.accelerator", "leyden.runtime.devices", "Accelerator"),
    ("accelerators.cpu", "leyden.runtime.devices", "CPUAccelerator"),
    ("accelerators.cuda", "leyden.runtime.devices", "CUDAAccelerator find_usable_cuda_devices"),
    ("accelerators.mps", "leyden.runtime.devices", "MPSAccelerator"),
    ("accelerators", "leyden.compat.registries", "ACCELERATOR_REGISTRY"),
    ("accelerators.cuda", "leyden.compat.pieces", "is_cuda_available num_cuda_devices"),
    ("fabric", "leyden", "Fabric"),
    ("loggers", "leyden.loggers", "CSVLogger Logger TensorBoardLogger"),
    ("loggers.csv_logs", "leyden.loggers.csv", "CSVLogger"),
    ("loggers.logger", "leyden.loggers.base", "Logger"),
    ("loggers.tensorboard", "leyden.loggers.tensorboard", "TensorBoardLogger"),
    ("plugins", "leyden.precision", "DoublePrecision HalfPrecision MixedPrecision Precision"),
    ("plugins.precision", "leyden.precision", "DoublePrecision HalfPrecision MixedPrecision Precision"),
    ("plugins.precision.amp", "leyden.precision", "MixedPrecision"),
    ("plugins.precision.double", "leyden.precision", "DoublePrecision"),
    ("plugins.precision.half", "leyden.precision", "HalfPrecision"),
    ("plugins.precision.precision", "leyden.precision", "Precision"),
    ("strategies", "leyden.strategies", "DDPStrategy FSDPStrategy ModelParallelStrategy ParallelStrategy"),
    ("strategies", "leyden.strategies", "DataParallelStrategy SingleDeviceStrategy Strategy"),
    ("strategies", "leyden.compat.registries", "STRATEGY_REGISTRY"),
    ("strategies.dp", "leyden.strategies", "DataParallelStrategy"),
    ("strategies.ddp", "leyden.strategies", "DDPStrategy"),
    ("strategies.fsdp", "leyden.strategies", "FSDPStrategy"),
    ("strategies.model_parallel", "leyden.strategies", "ModelParallelStrategy"),
    ("strategies.parallel", "leyden.strategies", "ParallelStrategy"),
    ("strategies.single_device", "leyden.strategies", "SingleDeviceStrategy"),
    ("strategies.strategy", "leyden.strategies", "Strategy"),
    ("wrappers", "leyden.wrappers", "_FabricDataLoader _FabricModule _FabricOptimizer is_wrapped"),
    ("accelerators", "leyden.runtime.devices", "find_usable_cuda_devices"),
    ("loggers.logger", "leyden.loggers.base", "rank_zero_experiment"),
    ("plugins", "leyden.checkpoint_io", "CheckpointIO TorchCheckpointIO"),
    ("plugins", "leyden.runtime.cluster", "ClusterEnvironment"),
    ("plugins.environments", "leyden.runtime.cluster", _ENVIRONMENTS),
    ("plugins.environments.cluster_environment", "leyden.runtime.cluster", "ClusterEnvironment"),
    ("plugins.environments.kubeflow", "leyden.runtime.cluster", "KubeflowEnvironment"),
    ("plugins.environments.lightning", "leyden.runtime.cluster", "LightningEnvironment"),
    ("plugins.environments.lightning", "leyden.compat.pieces", "find_free_network_port"),
    ("plugins.environments.lsf", "leyden.runtime.cluster", "LSFEnvironment"),
    ("plugins.environments.mpi", "leyden.runtime.cluster", "MPIEnvironment"),
    ("plugins.environments.slurm", "leyden.runtime.cluster", "SLURMEnvironment"),
    ("plugins.environments.torchelastic", "leyden.runtime.cluster", "TorchElasticEnvironment"),
    ("plugins.io", "leyden.checkpoint_io", "CheckpointIO TorchCheckpointIO"),
    ("plugins.io.checkpoint_io", "leyden.checkpoint_io", "CheckpointIO"),
    ("plugins.io.torch_io", "leyden.checkpoint_io", "TorchCheckpointIO"),
    ("utilities", "leyden", "rank_zero_deprecation rank_zero_info rank_zero_only rank_zero_warn"),
    ("utilities", "leyden.hparams", "AttributeDict"),
    ("utilities", "leyden.compat.pieces", "move_data_to_device"),
    ("utilities", "leyden.profilers.throughput", "Throughput"),
    ("utilities", "leyden.runtime.flops", "measure_flops"),
    ("utilities.apply_func", "leyden.compat.pieces", "move_data_to_device"),
    ("utilities.data", "leyden.hparams", "AttributeDict"),
    ("utilities.exceptions", "leyden.errors", "MisconfigurationException"),
    (
        "utilities.rank_zero",
        "leyden.runtime.ranks",
        "rank_zero_debug rank_zero_deprecation rank_zero_info rank_zero_only rank_zero_warn",
    ),
    ("utilities.rank_zero", "leyden.errors", "LightningDeprecationWarning=LeydenDeprecationWarning"),
    ("utilities.seed", "leyden.runtime.seed", "pl_worker_init_function reset_seed seed_everything"),
    ("utilities.throughput", "leyden.profilers.throughput", "Throughput"),
    ("utilities.throughput", "leyden.runtime.flops", "get_available_flops measure_flops"),
    ("utilities.warnings", "leyden.errors", "PossibleUserWarning"),
)

_LIGHTNING = (("", "leyden", "Callback Fabric LightningDataModule LightningModule Trainer seed_everything"),)

_TEST_TUBE = (
    ("", "leyden", "Experiment HyperOptArgumentParser SlurmCluster"),
    ("argparse_hopt", "leyden.search", "HyperOptArgumentParser TTNamespace=HyperOptNamespace"),
    ("hpc", "leyden", "Experiment HyperOptArgumentParser SlurmCluster"),
    ("log", "leyden", "Experiment"),
)

_PLACES = (
    # root, rows
    ("lightning", _LIGHTNING),
    ("lightning.pytorch", _PYTORCH),
    ("lightning.fabric", _FABRIC),
    ("pytorch_lightning", (*_PYTORCH, *_BEFORE_2)),
    ("lightning_fabric", _FABRIC),
    ("test_tube", _TEST_TUBE),
)

ROOTS = tuple(root for root, _ in _PLACES)
"""The modules that say their version."""


class Target(NamedTuple):
    """What answers a name: an attribute of a module of ours."""

    module: str
    name: str


def read() -> dict[str, dict[str, Target]]:
    """Return all foreign modules, the packages between them too, each with the names that it answers."""
    modules: dict[str, dict[str, Target]] = {}
    for root, rows in _PLACES:
        for path, home, names in rows:
            parts = [root, *path.split(".")] if path else [root]
            for count in range(1, len(parts) + 1):
                modules.setdefault(".".join(parts[:count]), {})
            for word in names.split():
                then, _, now = word.partition("=")
                modules[".".join(parts)][then] = Target(home, now or then)
    return modules
