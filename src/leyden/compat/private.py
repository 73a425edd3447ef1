# SPDX-License-Identifier: Apache-2.0
"""Names that are private in Lightning and that programs reach for all the same: what the public way is for each."""

from __future__ import annotations

_LOOPS = "the loops are trainer.fit_loop, trainer.validate_loop, trainer.test_loop and trainer.predict_loop"
_HOOKS = "override the hook in a Callback or in the LightningModule"
_LAUNCH = "say it to the strategy: DDPStrategy(start_method=...), or start the processes with torchrun"

WAYS = (
    # how the name, or the module that it is in, begins or ends; what to do
    ("_CheckpointConnector", "trainer.save_checkpoint(path) writes, trainer.fit(ckpt_path=...) restores"),
    ("_CallbackConnector", "pass callbacks to Trainer(callbacks=[...]) or return them from configure_callbacks()"),
    ("_DataConnector", "pass loaders or a data module to trainer.fit(...); trainer.train_dataloader reads them"),
    ("_DataLoaderSource", "trainer.train_dataloader and trainer.val_dataloaders are the loaders"),
    ("_DataHookSelector", "override transfer_batch_to_device() and its neighbours"),
    ("_DataFetcher", "override transfer_batch_to_device(), or take dataloader_iter in the step"),
    ("_PrefetchDataFetcher", "override transfer_batch_to_device(), or take dataloader_iter in the step"),
    ("_LoggerConnector", "read trainer.callback_metrics, trainer.logged_metrics and trainer.loggers"),
    ("_ResultCollection", "read trainer.callback_metrics and trainer.logged_metrics"),
    ("_ResultMetric", "log a torchmetrics Metric, or self.log(..., reduce_fx=...)"),
    ("_FxValidator", "self.log says itself where it is not allowed"),
    ("_SignalConnector", "trainer.received_sigterm tells; SLURMEnvironment(auto_requeue=...) chooses"),
    ("_Launcher", _LAUNCH),
    ("ScriptLauncher", _LAUNCH),
    ("MultiProcessingLauncher", _LAUNCH),
    ("_Loop", _LOOPS),
    ("_TrainingEpochLoop", _LOOPS),
    ("_AutomaticOptimization", "override optimizer_step(), or set automatic_optimization = False"),
    ("_ManualOptimization", "set automatic_optimization = False"),
    ("Progress", "read trainer.current_epoch, trainer.global_step and trainer.num_training_batches"),
    ("Tracker", "read trainer.current_epoch and trainer.global_step"),
    ("_call_and_handle_interrupt", "Callback.on_exception is called with what ends a run"),
    ("_call_", _HOOKS),
    ("_init_optimizers_and_lr_schedulers", "trainer.optimizers and trainer.lr_scheduler_configs are what it makes"),
    ("_lightning_optimizers", "self.optimizers() returns them"),
    ("_update_dataloader", "build the loader with the sampler that it should have"),
    ("_replace_dunder_methods", "loaders are shared out as they are; nothing has to be recorded"),
    ("_auto_add_worker_init_fn", "seed_everything(seed, workers=True)"),
    ("_init_dist_connection", "pass a ClusterEnvironment to Trainer(plugins=...) or use torch.distributed"),
    ("_scan_checkpoints", "Logger.after_save_checkpoint(callback): callback.best_k_models lists them"),
    ("_parse_gpu_ids", "CUDAAccelerator.parse_devices(devices)"),
    ("_determine_root_gpu_device", "trainer.strategy.root_device"),
    ("_pl_migrate_checkpoint", "utilities.migration.migrate_checkpoint(checkpoint)"),
    ("_tree_flatten", "torch.utils._pytree.tree_flatten"),
    ("_Connector", "pass the arguments to Fabric(...)"),
    ("_TunerExitException", "Tuner leaves the Trainer as it was; nothing has to be caught"),
    ("_FORWARD_INPUT", "it is only a word of annotations: use Any"),
)


def public_way(name: str) -> str:
    """Return what to do in the place of a private name, as a sentence that starts with a space; empty if that is unknown."""
    for known, way in WAYS:
        if name == known or name.startswith(known) or name.endswith(known):
            return f" The public way: {way}."
    return ""
