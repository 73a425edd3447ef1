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
_PRECISIONS = "BitsandbytesPrecision FSDPPrecision TransformerEnginePrecision XLAPrecision"
_WRITERS = "leyden.callbacks.prediction_writer"

_PYTORCH = (
    # ---- 2.x
    ("", "leyden", "Callback LightningDataModule LightningModule Trainer seed_everything"),
    ("accelerators", "leyden.runtime.devices", "Accelerator CPUAccelerator CUDAAccelerator MPSAccelerator"),
    ("accelerators", "leyden.runtime.devices", "find_usable_cuda_devices"),
    ("accelerators", "leyden.compat.registries", "AcceleratorRegistry"),
    ("accelerators", "leyden.compat.tpu", "XLAAccelerator"),
    ("accelerators.xla", "leyden.compat.tpu", "XLAAccelerator"),
    ("plugins.environments", "leyden.compat.tpu", "XLAEnvironment"),
    ("plugins.io", "leyden.compat.tpu", "XLACheckpointIO"),
    ("plugins.io.xla_plugin", "leyden.compat.tpu", "XLACheckpointIO"),
    ("strategies", "leyden.compat.tpu", "SingleDeviceXLAStrategy XLAStrategy"),
    ("strategies.single_xla", "leyden.compat.tpu", "SingleDeviceXLAStrategy"),
    ("strategies.xla", "leyden.compat.tpu", "XLAStrategy"),
    ("accelerators.accelerator", "leyden.runtime.devices", "Accelerator"),
    ("accelerators.cpu", "leyden.runtime.devices", "CPUAccelerator"),
    ("accelerators.cuda", "leyden.runtime.devices", "CUDAAccelerator"),
    ("accelerators.mps", "leyden.runtime.devices", "MPSAccelerator"),
    (
        "callbacks",
        "leyden.callbacks",
        "BasePredictionWriter Callback Checkpoint EarlyStopping GradientAccumulationScheduler LambdaCallback"
        " BatchSizeFinder LearningRateFinder"
        " LearningRateMonitor ModelCheckpoint ModelSummary OnExceptionCheckpoint ProgressBar RichModelSummary RichProgressBar"
        " TQDMProgressBar ThroughputMonitor Timer",
    ),
    (
        "callbacks",
        "leyden.callbacks",
        "BackboneFinetuning BaseFinetuning DeviceStatsMonitor ModelPruning SpikeDetection",
    ),
    ("callbacks", "leyden.callbacks", "EMAWeightAveraging StochasticWeightAveraging WeightAveraging"),
    ("callbacks.batch_size_finder", "leyden.callbacks", "BatchSizeFinder"),
    ("callbacks.callback", "leyden.callback", "Callback"),
    ("callbacks.checkpoint", "leyden.callbacks.checkpoint", "Checkpoint"),
    ("callbacks.device_stats_monitor", "leyden.callbacks.device_stats_monitor", "DeviceStatsMonitor"),
    ("callbacks.early_stopping", "leyden.callbacks.early_stopping", "EarlyStopping EarlyStoppingReason"),
    ("callbacks.finetuning", "leyden.callbacks.finetuning", "BackboneFinetuning BaseFinetuning multiplicative"),
    ("callbacks.gradient_accumulation_scheduler", "leyden.callbacks", "GradientAccumulationScheduler"),
    ("callbacks.lambda_function", "leyden.callbacks.lambda_function", "LambdaCallback"),
    ("callbacks.lr_finder", "leyden.callbacks", "LearningRateFinder"),
    ("callbacks.lr_monitor", "leyden.callbacks.learning_rate_monitor", "LearningRateMonitor"),
    ("callbacks.model_checkpoint", "leyden.callbacks.checkpoint", "ModelCheckpoint"),
    ("callbacks.model_summary", "leyden.callbacks.model_summary", "ModelSummary"),
    ("callbacks.on_exception_checkpoint", "leyden.callbacks", "OnExceptionCheckpoint"),
    ("callbacks.prediction_writer", _WRITERS, "BasePredictionWriter WriteInterval"),
    ("callbacks.progress", "leyden.callbacks.progress", "ProgressBar RichProgressBar TQDMProgressBar"),
    ("callbacks.progress.progress_bar", "leyden.callbacks.progress", "ProgressBar"),
    ("callbacks.progress.rich_progress", "leyden.callbacks.progress", "RichProgressBar RichProgressBarTheme"),
    ("callbacks.progress.tqdm_progress", "leyden.callbacks.progress", "TQDMProgressBar"),
    ("callbacks.pruning", "leyden.callbacks.model_pruning", "ModelPruning"),
    ("callbacks.progress.tqdm_progress", "leyden.callbacks.progress.tqdm_objects", "Tqdm"),
    ("callbacks.rich_model_summary", "leyden.callbacks.model_summary", "RichModelSummary"),
    ("callbacks.spike", "leyden.callbacks.spike_detection", "SpikeDetection"),
    ("callbacks.stochastic_weight_avg", "leyden.callbacks", "StochasticWeightAveraging"),
    ("callbacks.throughput_monitor", "leyden.callbacks.throughput_monitor", "ThroughputMonitor get_available_flops"),
    ("callbacks.weight_averaging", "leyden.callbacks.weight_averaging", "EMAWeightAveraging WeightAveraging"),
    ("callbacks.timer", "leyden.callbacks.timer", "Interval Timer"),
    ("core", "leyden", "LightningDataModule LightningModule"),
    ("core.datamodule", "leyden", "LightningDataModule"),
    ("core.hooks", "leyden.module_hooks", "DataHooks ModelHooks"),
    ("core.mixins", "leyden.hparams", "HyperparametersMixin"),
    ("core.mixins.hparams_mixin", "leyden.hparams", "HyperparametersMixin"),
    ("core.module", "leyden", "LightningModule"),
    ("core.optimizer", "leyden.optim", "LightningOptimizer"),
    ("core.saving", "leyden.hparams", "load_hparams_from_tags_csv load_hparams_from_yaml"),
    ("core.saving", "leyden.hparams", "save_hparams_to_tags_csv save_hparams_to_yaml"),
    ("loggers", "leyden.loggers", "CSVLogger CometLogger LitLogger Logger MLFlowLogger NeptuneLogger"),
    ("loggers", "leyden.loggers", "TensorBoardLogger WandbLogger"),
    ("loggers.comet", "leyden.loggers.comet", "CometLogger FRAMEWORK_NAME _COMET_AVAILABLE=AVAILABLE"),
    ("loggers.csv_logs", "leyden.loggers.csv", "CSVLogger ExperimentWriter"),
    ("loggers.litlogger", "leyden.loggers.gone", "LitLogger"),
    ("loggers.logger", "leyden.loggers.base", "DummyExperiment DummyLogger Logger rank_zero_experiment"),
    ("loggers.mlflow", "leyden.loggers.mlflow", "LOCAL_FILE_URI_PREFIX MLFlowLogger _MLFLOW_AVAILABLE=AVAILABLE"),
    (
        "loggers.mlflow",
        "leyden.loggers.mlflow",
        "_MLFLOW_SYNCHRONOUS_AVAILABLE=AVAILABLE _get_resolve_tags=tag_resolver",
    ),
    ("loggers.neptune", "leyden.loggers.gone", "NeptuneLogger"),
    ("loggers.tensorboard", "leyden.loggers.tensorboard", "TensorBoardLogger"),
    ("loggers.wandb", "leyden.loggers.wandb", "WandbLogger _WANDB_AVAILABLE=AVAILABLE"),
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
    ("plugins", "leyden.strategies.layer_sync", "LayerSync TorchSyncBatchNorm"),
    ("plugins.layer_sync", "leyden.strategies.layer_sync", "LayerSync TorchSyncBatchNorm"),
    ("plugins.io.wrapper", "leyden.checkpoint_io.wrapping", "_WrappingCheckpointIO=WrappingCheckpointIO"),
    ("plugins.io.async_plugin", "leyden.checkpoint_io", "AsyncCheckpointIO"),
    ("plugins.io.checkpoint_plugin", "leyden.checkpoint_io", "CheckpointIO"),
    ("plugins.io.torch_plugin", "leyden.checkpoint_io", "TorchCheckpointIO"),
    ("plugins.precision", "leyden.precision", "DoublePrecision HalfPrecision MixedPrecision Precision"),
    ("plugins.precision.amp", "leyden.precision", "MixedPrecision"),
    ("plugins", "leyden.precision.deepspeed", "DeepSpeedPrecision"),
    ("plugins.precision", "leyden.precision.deepspeed", "DeepSpeedPrecision"),
    ("plugins.precision.deepspeed", "leyden.precision.deepspeed", "DeepSpeedPrecision"),
    ("plugins", "leyden.precision", _PRECISIONS),
    ("plugins.precision", "leyden.precision", _PRECISIONS),
    ("plugins.precision.bitsandbytes", "leyden.precision", "BitsandbytesPrecision"),
    ("plugins.precision.fsdp", "leyden.precision", "FSDPPrecision"),
    ("plugins.precision.transformer_engine", "leyden.precision", "TransformerEnginePrecision"),
    ("plugins.precision.xla", "leyden.precision", "XLAPrecision"),
    ("plugins.precision.double", "leyden.precision", "DoublePrecision"),
    ("plugins.precision.half", "leyden.precision", "HalfPrecision"),
    ("plugins.precision.precision", "leyden.precision", "Precision"),
    ("profilers", "leyden.profilers", "AdvancedProfiler PassThroughProfiler Profiler PyTorchProfiler SimpleProfiler"),
    ("profilers", "leyden.profilers", "XLAProfiler"),
    ("profilers.advanced", "leyden.profilers", "AdvancedProfiler"),
    ("profilers.base", "leyden.profilers", "PassThroughProfiler"),
    ("profilers.profiler", "leyden.profilers", "Profiler"),
    ("profilers.pytorch", "leyden.profilers", "PyTorchProfiler"),
    ("profilers.simple", "leyden.profilers", "SimpleProfiler"),
    ("profilers.xla", "leyden.profilers", "XLAProfiler"),
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
    ("tuner", "leyden.tuning", "Tuner"),
    ("tuner.lr_finder", "leyden.callbacks.rate_search", "_LRFinder=LRFinder _determine_lr_attr_name=name_of_rate"),
    ("tuner.lr_finder", "leyden.callbacks.rate_search", "_ExponentialLR=ExponentialRise _LinearLR=LinearRise"),
    ("tuner.tuning", "leyden.tuning", "Tuner"),
    ("utilities", "leyden", "CombinedLoader rank_zero_deprecation rank_zero_info rank_zero_only rank_zero_warn"),
    ("utilities", "leyden.hparams", "AttributeDict"),
    ("utilities", "leyden.compat.pieces", "GradClipAlgorithmType"),
    ("utilities", "leyden.compat.pieces", "move_data_to_device"),
    ("utilities.combined_loader", "leyden", "CombinedLoader"),
    ("utilities", "leyden.compat.pieces", "grad_norm"),
    ("utilities", "leyden.runtime.flops", "measure_flops"),
    ("utilities.enums", "leyden.compat.pieces", "GradClipAlgorithmType"),
    (
        "utilities.exceptions",
        "leyden.errors",
        "MisconfigurationException SIGTERMException _TunerExitException=EndOfRun",
    ),
    ("utilities.grads", "leyden.compat.pieces", "grad_norm"),
    ("utilities.memory", "leyden.runtime.memory", "garbage_collection_cuda is_cuda_out_of_memory is_cudnn_snafu"),
    ("utilities.memory", "leyden.runtime.memory", "is_oom_error is_out_of_cpu_memory recursive_detach"),
    ("utilities.model_summary", "leyden.summary", "LayerSummary ModelSummary summarize"),
    ("utilities.model_summary", "leyden.summary", "get_human_readable_count=human_count parse_batch_shape=shape_of"),
    ("utilities.model_summary.model_summary", "leyden.summary", "LayerSummary ModelSummary summarize"),
    ("utilities.model_summary.model_summary", "leyden.summary", "get_human_readable_count=human_count"),
    ("utilities.model_summary.model_summary", "leyden.summary", "parse_batch_shape=shape_of"),
    ("utilities.parsing", "leyden.hparams", "AttributeDict"),
    ("utilities.parsing", "leyden.callbacks.settings", "lightning_getattr=get_setting lightning_hasattr=has_setting"),
    ("utilities.parsing", "leyden.callbacks.settings", "lightning_setattr=set_setting"),
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
    ("accelerators", "leyden.compat.tpu", "XLAAccelerator"),
    ("accelerators.xla", "leyden.compat.tpu", "XLAAccelerator"),
    ("plugins", "leyden.precision", _PRECISIONS),
    ("plugins.precision", "leyden.precision", _PRECISIONS),
    ("plugins.precision.bitsandbytes", "leyden.precision", "BitsandbytesPrecision"),
    ("plugins.precision.fsdp", "leyden.precision", "FSDPPrecision"),
    ("plugins.precision.transformer_engine", "leyden.precision", "TransformerEnginePrecision"),
    ("plugins.precision.xla", "leyden.precision", "XLAPrecision"),
    ("plugins.environments", "leyden.compat.tpu", "XLAEnvironment"),
    ("plugins.environments.xla", "leyden.compat.tpu", "XLAEnvironment"),
    ("plugins.io.xla", "leyden.compat.tpu", "XLACheckpointIO"),
    ("strategies", "leyden.compat.tpu", "SingleDeviceXLAStrategy XLAStrategy"),
    ("strategies.single_xla", "leyden.compat.tpu", "SingleDeviceXLAStrategy"),
    ("strategies.xla", "leyden.compat.tpu", "XLAStrategy"),
    ("loggers", "leyden.compat.fabric_loggers", "CSVLogger TensorBoardLogger"),
    ("loggers", "leyden.loggers", "Logger"),
    ("loggers.csv_logs", "leyden.compat.fabric_loggers", "CSVLogger"),
    ("loggers.logger", "leyden.loggers.base", "Logger"),
    ("loggers.tensorboard", "leyden.compat.fabric_loggers", "TensorBoardLogger"),
    ("plugins", "leyden.precision", "DoublePrecision HalfPrecision MixedPrecision Precision"),
    ("plugins.precision", "leyden.precision", "DoublePrecision HalfPrecision MixedPrecision Precision"),
    ("plugins.precision.amp", "leyden.precision", "MixedPrecision"),
    ("plugins", "leyden.precision", _PRECISIONS),
    ("plugins.precision", "leyden.precision", _PRECISIONS),
    ("plugins.precision.bitsandbytes", "leyden.precision", "BitsandbytesPrecision"),
    ("plugins.precision.fsdp", "leyden.precision", "FSDPPrecision"),
    ("plugins.precision.transformer_engine", "leyden.precision", "TransformerEnginePrecision"),
    ("plugins.precision.xla", "leyden.precision", "XLAPrecision"),
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
    ("plugins.collectives", "leyden.runtime.collectives", "Collective SingleDeviceCollective TorchCollective"),
    ("plugins.collectives.collective", "leyden.runtime.collectives", "Collective"),
    ("plugins.collectives.single_device", "leyden.runtime.collectives", "SingleDeviceCollective"),
    ("plugins.collectives.torch_collective", "leyden.runtime.collectives", "TorchCollective"),
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
    (
        "utilities.spike",
        "leyden.callbacks.spike_detection",
        "SpikeDetection=FabricSpikeDetection TrainingSpikeException",
    ),
    ("utilities.throughput", "leyden.profilers.throughput", "Throughput"),
    ("utilities.throughput", "leyden.runtime.flops", "get_available_flops measure_flops"),
    ("utilities.warnings", "leyden.errors", "PossibleUserWarning"),
)

_ENUMS = "leyden.compat.pieces.words"
_SAY = "leyden.compat.pieces.say"
_BORING = "leyden.compat.demos.boring_classes"
_TORCHES = [
    "1_8",
    "1_9",
    "1_10",
    "1_11",
    "1_12",
    "1_13",
    "2_0",
    "2_0_1",
    "2_1",
    "2_2",
    "2_3",
    "2_4",
    "2_4_1",
    "2_5",
    "2_5_1",
    "2_6",
    "2_7",
    "2_8",
    "2_9",
]
_METRICS = ["0_7", "0_8_0", "0_9_1", "0_11", "1_0_0"]
_FLAGS = (
    *(f"_TORCH_GREATER_EQUAL_{version}" for version in _TORCHES),
    *(f"_TORCHMETRICS_GREATER_EQUAL_{version}" for version in _METRICS),
    "_TORCH_EQUAL_2_4_0 _TORCH_EQUAL_2_8 _TORCH_EQUAL_2_9 _TORCH_LESS_EQUAL_2_6 _IS_WINDOWS _IS_INTERACTIVE",
    "_PYTHON_GREATER_EQUAL_3_8_0 _PYTHON_GREATER_EQUAL_3_10_0 _PYTHON_GREATER_EQUAL_3_11_0",
    "_NUMPY_AVAILABLE _OMEGACONF_AVAILABLE _RICH_AVAILABLE _TORCHVISION_AVAILABLE _REQUESTS_AVAILABLE",
    "_JSONARGPARSE_SIGNATURES_AVAILABLE",
)
_CHECKS = "package_available module_available compare_version RequirementCache=Requirement"

_SMALL = (
    # ---- small things of utilities and the like, under lightning.pytorch
    ("", _SAY, "disable_possible_user_warnings"),
    ("", "leyden.compat.pieces.available", "module_available"),
    ("accelerators.cpu", "leyden.compat.pieces.stats", "get_cpu_stats"),
    ("accelerators.cuda", "leyden.compat.pieces.stats", "get_nvidia_gpu_stats"),
    ("accelerators.mps", "leyden.compat.pieces.stats", "get_device_stats"),
    ("core.hooks", "leyden.module_hooks", "CheckpointHooks"),
    ("core.module", _ENUMS, "MODULE_OPTIMIZERS"),
    ("core.optimizer", "leyden.compat.pieces.closures", "do_nothing_closure"),
    ("core.saving", "leyden.compat.pieces.parsing", "CHECKPOINT_PAST_HPARAMS_KEYS convert update_hparams"),
    ("demos", _BORING, "BoringDataModule BoringModel DemoModel"),
    ("demos", "leyden.compat.demos.lstm", "LightningLSTM SequenceSampler SimpleLSTM"),
    ("demos", "leyden.compat.demos.transformer", "LightningTransformer Transformer WikiText2"),
    (
        "demos.boring_classes",
        _BORING,
        "BoringDataModule BoringDataModuleNoLen BoringModel DemoModel IterableBoringDataModule ManualOptimBoringModel Net"
        " RandomDataset RandomDictDataset RandomIterableDataset RandomIterableDatasetWithLen",
    ),
    ("demos.lstm", "leyden.compat.demos.lstm", "LightningLSTM SequenceSampler SimpleLSTM"),
    ("demos.mnist_datamodule", "leyden.compat.demos.mnist_datamodule", "MNIST MNISTDataModule _MNIST=FetchedMNIST"),
    (
        "demos.transformer",
        "leyden.compat.demos.transformer",
        "Dictionary LightningTransformer PositionalEncoding Transformer WikiText2 tokenize",
    ),
    ("loggers.logger", "leyden.compat.pieces.settings", "merge_dicts"),
    ("loops", "leyden.loops.fit", "_FitLoop=FitLoop"),
    ("loops", "leyden.loops.evaluate", "_EvaluationLoop=EvaluationLoop"),
    ("loops", "leyden.loops.predict", "_PredictionLoop=PredictLoop"),
    ("loops.fit_loop", "leyden.loops.fit", "_FitLoop=FitLoop"),
    ("loops.evaluation_loop", "leyden.loops.evaluate", "_EvaluationLoop=EvaluationLoop"),
    ("loops.prediction_loop", "leyden.loops.predict", "_PredictionLoop=PredictLoop"),
    ("loops.optimization.automatic", "leyden.compat.pieces.closures", "Closure ClosureResult"),
    ("loops.optimization.closure", "leyden.compat.pieces.closures", "AbstractClosure OutputResult T"),
    ("loops.optimization.manual", "leyden.compat.pieces.closures", "ManualResult"),
    ("loops.utilities", "leyden.compat.pieces.tensors", "check_finite_loss"),
    ("overrides.distributed", "leyden.compat.pieces.tensors", "prepare_for_backward"),
    (
        "overrides.distributed",
        "leyden.compat.pieces.samplers",
        "UnrepeatedDistributedSampler UnrepeatedDistributedSamplerWrapper",
    ),
    ("plugins.precision.double", "leyden.compat.pieces.removed", "DoublePrecisionPlugin"),
    ("plugins.precision.half", "leyden.compat.pieces.removed", "HalfPrecisionPlugin"),
    ("plugins.precision.amp", "leyden.compat.pieces.removed", "MixedPrecisionPlugin"),
    ("plugins.precision.deepspeed", "leyden.compat.pieces.removed", "DeepSpeedPrecisionPlugin"),
    ("plugins.precision.precision", "leyden.compat.pieces.removed", "PrecisionPlugin"),
    ("plugins.precision.precision_plugin", "leyden.precision", "Precision"),
    ("plugins.precision.precision_plugin", "leyden.compat.pieces.removed", "PrecisionPlugin"),
    *(
        (
            module,
            "leyden.compat.pieces.removed",
            "DeepSpeedPrecisionPlugin DoublePrecisionPlugin HPUPrecisionPlugin HalfPrecisionPlugin MixedPrecisionPlugin"
            " PrecisionPlugin",
        )
        for module in ("plugins", "plugins.precision")
    ),
    ("plugins", "leyden.compat.pieces.removed", "HPUCheckpointIO"),
    ("plugins.io", "leyden.compat.pieces.removed", "HPUCheckpointIO"),
    ("plugins.io.hpu_plugin", "leyden.compat.pieces.removed", "HPUCheckpointIO"),
    ("plugins.precision.hpu", "leyden.compat.pieces.removed", "HPUPrecisionPlugin"),
    ("accelerators", "leyden.compat.pieces.removed", "HPUAccelerator"),
    ("accelerators.hpu", "leyden.compat.pieces.removed", "HPUAccelerator"),
    ("strategies", "leyden.compat.pieces.removed", "HPUParallelStrategy SingleHPUStrategy"),
    ("strategies.hpu_parallel", "leyden.compat.pieces.removed", "HPUParallelStrategy"),
    ("strategies.single_hpu", "leyden.compat.pieces.removed", "SingleHPUStrategy"),
    ("serve", "leyden.compat.serve", "ServableModule ServableModuleValidator"),
    ("serve.servable_module", "leyden.compat.serve", "ServableModule"),
    ("serve.servable_module_validator", "leyden.compat.serve", "ServableModuleValidator"),
    ("strategies.strategy", _ENUMS, "TBroadcast=BroadcastT TReduce=ReduceT"),
    (
        "trainer.call",
        "leyden.compat.pieces.call",
        "_call_callback_hooks=call_callback_hooks _call_lightning_module_hook=call_lightning_module_hook"
        " _call_lightning_datamodule_hook=call_lightning_datamodule_hook _call_strategy_hook=call_strategy_hook",
    ),
    ("trainer.connectors.accelerator_connector", _ENUMS, "_LITERAL_WARN=Word _PRECISION_INPUT=PrecisionWord"),
    ("utilities", _ENUMS, "LightningEnum"),
    ("utilities", "leyden.compat.pieces.parsing", "is_picklable"),
    ("utilities", "leyden.compat.pieces.samplers", "is_shared_filesystem suggested_max_num_workers"),
    ("utilities", _SAY, "disable_possible_user_warnings"),
    (
        "utilities",
        "leyden.compat.pieces.tensors",
        "FLOAT16_EPSILON FLOAT32_EPSILON FLOAT64_EPSILON find_shared_parameters set_shared_parameters",
    ),
    (
        "utilities.argparse",
        "leyden.compat.pieces.environ",
        "_parse_env_variables=parse_env_variables _defaults_from_env_vars=defaults_from_env_vars",
    ),
    ("utilities.compile", "leyden.compat.pieces.compiled", "from_compiled to_uncompiled"),
    ("utilities.consolidate_checkpoint", "leyden.compat.pieces.files", "main=consolidate"),
    ("utilities.data", _ENUMS, "BType=Batch"),
    ("utilities.data", "leyden.compat.pieces.samplers", "extract_batch_size has_len_all_ranks"),
    ("utilities.data", "leyden.compat.pieces.samplers", "has_iterable_dataset sized_len"),
    ("utilities.data", "leyden.data.loaders", "_is_dataloader_shuffled=has_shuffle"),
    (
        "utilities.deepspeed",
        "leyden.compat.pieces.files",
        "CPU_DEVICE convert_zero_checkpoint_to_fp32_state_dict ds_checkpoint_dir",
    ),
    ("utilities.enums", _ENUMS, "LightningEnum"),
    ("utilities.imports", "leyden.compat.pieces.available", f"{' '.join(_FLAGS)} {_CHECKS}"),
    ("utilities.imports", "leyden.compat.pieces.available", "_try_import_module=try_import_module"),
    (
        "utilities.memory",
        "leyden.compat.pieces.tensors",
        "garbage_collection_cuda is_cuda_out_of_memory is_cudnn_snafu is_oom_error is_out_of_cpu_memory recursive_detach",
    ),
    ("utilities.migration", "leyden.compat.pieces.migration", "migrate_checkpoint pl_legacy_patch"),
    ("utilities.migration.utils", "leyden.compat.pieces.migration", "migrate_checkpoint pl_legacy_patch"),
    ("utilities.model_helpers", "leyden.compat.pieces.parsing", "is_overridden get_torchvision_model"),
    ("utilities.model_helpers", "leyden.compat.pieces.device", "_ModuleMode=ModuleMode"),
    ("utilities.model_helpers", "leyden.loading", "_restricted_classmethod=class_only"),
    (
        "utilities.model_summary",
        "leyden.compat.pieces.summaries",
        "DeepSpeedSummary get_formatted_model_size",
    ),
    (
        "utilities.model_summary.model_summary",
        "leyden.compat.pieces.summaries",
        "LEFTOVER_PARAMS_NAME NOT_APPLICABLE PARAMETER_NUM_UNITS UNKNOWN_SIZE get_formatted_model_size",
    ),
    (
        "utilities.model_summary.model_summary_deepspeed",
        "leyden.compat.pieces.summaries",
        "DeepSpeedLayerSummary DeepSpeedSummary deepspeed_param_size",
    ),
    ("utilities.parameter_tying", "leyden.compat.pieces.tensors", "find_shared_parameters set_shared_parameters"),
    (
        "utilities.parsing",
        "leyden.compat.pieces.parsing",
        "clean_namespace collect_init_args get_init_args is_picklable lightning_getattr lightning_hasattr lightning_setattr"
        " parse_class_init_keys save_hyperparameters",
    ),
    ("utilities.rank_zero", _SAY, "WarningCache rank_prefixed_message _get_rank=rank_from_environment"),
    ("utilities.rank_zero", "leyden.compat.pieces.say", "rank_zero_module=MODULE"),
    ("utilities.signature_utils", "leyden.compat.pieces.parsing", "is_param_in_hook_signature"),
    ("utilities.testing", "leyden.compat.pieces.runif", "_runif_reasons=runif_reasons"),
    ("utilities.types", _ENUMS, "DistributedDataParallel _PATH=PathOrText _DEVICE=Device _METRIC=Number"),
    ("utilities.types", _ENUMS, "LRScheduler ReduceLROnPlateau Optimizer"),
    ("utilities.upgrade_checkpoint", "leyden.compat.pieces.migration", "main"),
)

_SMALL_FABRIC = (
    # ---- the same, under lightning.fabric
    ("", _SAY, "disable_possible_user_warnings"),
    ("", "leyden.compat.pieces.available", "package_available"),
    ("accelerators.cuda", "leyden.compat.pieces.stats", "_clear_cuda_memory=clear_cuda_memory"),
    ("accelerators.registry", "leyden.compat.registries", "_AcceleratorRegistry=Registry call_register_accelerators"),
    ("cli", "leyden.compat.pieces.command", "main"),
    ("connector", _ENUMS, "_PRECISION_INPUT=PrecisionWord _PRECISION_INPUT_STR=PrecisionWord _PLUGIN_INPUT=Plugin"),
    ("plugins", "leyden.precision.deepspeed", "DeepSpeedPrecision"),
    ("plugins.precision", "leyden.precision.deepspeed", "DeepSpeedPrecision"),
    ("plugins.precision.deepspeed", "leyden.precision.deepspeed", "DeepSpeedPrecision"),
    ("strategies", "leyden.strategies", "DeepSpeedStrategy"),
    ("strategies", "leyden.compat.registries", "_StrategyRegistry=Registry"),
    ("strategies.deepspeed", "leyden.strategies", "DeepSpeedStrategy"),
    ("strategies.model_parallel", _ENUMS, "TModel=ModuleT"),
    ("strategies.registry", "leyden.compat.registries", "_StrategyRegistry=Registry"),
    ("strategies.strategy", _ENUMS, "TBroadcast=BroadcastT TReduce=ReduceT"),
    ("utilities", _ENUMS, "LightningEnum"),
    ("utilities", _SAY, "disable_possible_user_warnings"),
    ("utilities", "leyden.compat.pieces.samplers", "is_shared_filesystem suggested_max_num_workers"),
    ("utilities", "leyden.compat.pieces.throughput", "ThroughputMonitor"),
    (
        "utilities.apply_func",
        "leyden.compat.pieces.tensors",
        "CONVERSION_DTYPES convert_tensors_to_scalars convert_to_tensors",
    ),
    (
        "utilities.cloud_io",
        "leyden.compat.pieces.files",
        "get_filesystem _load=load _atomic_save=atomic_save _is_dir=is_dir _is_local_file_protocol=is_local_file_protocol",
    ),
    ("utilities.consolidate_checkpoint", "leyden.compat.pieces.files", "main=consolidate"),
    (
        "utilities.data",
        "leyden.compat.pieces.samplers",
        "has_iterable_dataset has_len sized_len suggested_max_num_workers",
    ),
    ("utilities.data", "leyden.compat.pieces.samplers", "_num_cpus_available=cpus"),
    ("utilities.data", "leyden.data.loaders", "_set_sampler_epoch=set_epoch"),
    ("utilities.device_dtype_mixin", "leyden.compat.pieces.device", "_DeviceDtypeModuleMixin=DeviceDtypeModuleMixin"),
    (
        "utilities.distributed",
        "leyden.compat.pieces.samplers",
        "DistributedSamplerWrapper is_shared_filesystem _DatasetSamplerWrapper=DrawnIndices",
    ),
    (
        "utilities.distributed",
        "leyden.compat.pieces.tensors",
        "_distributed_is_initialized=distributed_available _distributed_available=distributed_available"
        " _gather_all_tensors=gather_all_tensors _sync_ddp_if_available=sync_ddp_if_available"
        " _sync_ddp=sync_ddp_if_available",
    ),
    ("utilities.enums", _ENUMS, "LightningEnum"),
    ("utilities.imports", "leyden.compat.pieces.available", f"{' '.join(_FLAGS)} {_CHECKS}"),
    (
        "utilities.init",
        "leyden.compat.pieces.device",
        "_EmptyInit=EmptyInit _materialize_meta_tensors=materialize_meta_tensors"
        " _has_meta_device_parameters_or_buffers=has_meta_device_parameters_or_buffers",
    ),
    (
        "utilities.logger",
        "leyden.compat.pieces.settings",
        "_add_prefix=add_prefix _convert_json_serializable=convert_json_serializable _convert_params=convert_params"
        " _flatten_dict=flatten_dict _sanitize_callable_params=sanitize_callable_params _sanitize_params=sanitize_params",
    ),
    (
        "utilities.optimizer",
        "leyden.compat.pieces.tensors",
        "_optimizer_to_device=optimizer_to_device _optimizers_to_device=optimizers_to_device",
    ),
    ("utilities.rank_zero", _SAY, "WarningCache rank_prefixed_message _get_rank=rank_from_environment"),
    ("utilities.rank_zero", _SAY, "rank_zero_module=MODULE"),
    ("utilities.seed", "leyden.compat.pieces.words", "max_seed_value min_seed_value"),
    (
        "utilities.seed",
        "leyden.runtime.seed",
        "_collect_rng_states=rng_state _set_rng_states=set_rng_state",
    ),
    ("utilities.testing", "leyden.compat.pieces.runif", "_runif_reasons=runif_reasons"),
    ("utilities.throughput", "leyden.compat.pieces.throughput", "ThroughputMonitor T"),
    (
        "utilities.types",
        _ENUMS,
        "CollectibleGroup Optimizable Steppable UntypedStorage ProcessGroup ReduceOp RedOpType",
    ),
    ("utilities.types", _ENUMS, "LRScheduler ReduceLROnPlateau _TORCH_LRSCHEDULER=LRScheduler"),
    (
        "utilities.types",
        _ENUMS,
        "_DEVICE=Device _MAP_LOCATION_TYPE=MapLocation _PARAMETERS=Parameters _PATH=PathOrText _Stateful=Stateful",
    ),
    ("utilities.warnings", _SAY, "disable_possible_user_warnings"),
    ("wrappers", "leyden.wrappers", "_unwrap_objects=unwrapped"),
    ("wrappers", _ENUMS, "T_destination=DestinationT"),
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
    ("lightning.pytorch", (*_PYTORCH, *_SMALL)),
    ("lightning.fabric", (*_FABRIC, *_SMALL_FABRIC)),
    ("pytorch_lightning", (*_PYTORCH, *_SMALL, *_BEFORE_2)),
    ("lightning_fabric", (*_FABRIC, *_SMALL_FABRIC)),
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
