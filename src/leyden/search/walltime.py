# SPDX-License-Identifier: Apache-2.0
"""The callback that saves a Trainer's run between two batches when its SLURM job is about to end."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any, ClassVar

from leyden.callback import Callback
from leyden.errors import MisconfigurationException
from leyden.types import STEP_OUTPUT, TrainerFn, TrainerView

_HPC = "hpc_save"
"""The key by which a checkpoint tells that it was written because a walltime ended."""


class WalltimeCheckpoint(Callback):
    """Before the walltime of its job, saves a checkpoint and has the cluster submit the continuation.

    ::

        def train(hparams, cluster, results):
            trainer = Trainer(callbacks=[WalltimeCheckpoint(cluster)])
            trainer.fit(model, ckpt_path=cluster.ckpt_path)

    The signal is only noted when it comes; the checkpoint is saved after the batch, or the validation, that is running,
    and the continuation goes on from there as if nothing had happened. The module can add to this checkpoint in
    ``on_hpc_save`` and take it out again in ``on_hpc_load``. A run outside of a job is not touched.

    Args:
        cluster: The one that the function got.
        filepath: Where to save. None takes ``cluster.checkpoint_file``.

    Raises:
        MisconfigurationException: if ``cluster`` is none; and in a job that continues, if fit would begin anew.
    """

    order: ClassVar[int] = 200  # after those that save checkpoints: what they did belongs into this one

    def __init__(self, cluster: Any, filepath: str | os.PathLike[str] | None = None) -> None:
        if not callable(getattr(cluster, "set_checkpoint_save_function", None)):
            raise MisconfigurationException(f"cluster={cluster!r}: it must be a SlurmCluster.")
        self._cluster = cluster
        self._path = cluster.checkpoint_file if filepath is None else Path(filepath)
        self._every = 1
        self._seen = 0
        self._saving = False

    def setup(self, trainer: TrainerView, pl_module: Any, stage: str) -> None:
        """Take over from the cluster: from now on it only notes the signal."""
        if stage != "fit" or self._path is None:
            return
        if self._cluster.continues and trainer.ckpt_path is None and not trainer.global_step:
            raise MisconfigurationException(
                "This job continues a trial, but fit(ckpt_path=None) would begin it anew. Pass"
                " fit(..., ckpt_path=cluster.ckpt_path), which is None in a trial's first job."
            )
        # several processes must leave after the same batch; asking the others costs, so they ask only now and then
        self._every = 1 if trainer.world_size == 1 else max(trainer.log_every_n_steps, 1)
        # no strong reference: the cluster outlives the trainer, and has nothing to save without it
        cluster = weakref.proxy(self._cluster)
        run = weakref.ref(trainer, lambda _: cluster.set_checkpoint_save_function(None))
        self._cluster.set_checkpoint_save_function(_save, {"callback": weakref.ref(self), "run": run})
        self._cluster.postponed = True

    def save(self, trainer: TrainerView) -> None:
        """Write the checkpoint."""
        assert self._path is not None
        self._saving = True
        try:
            trainer.save_checkpoint(self._path)
            trainer.strategy.checkpoint_io.settle()  # the job that goes on needs the whole file
        finally:
            self._saving = False

    def on_save_checkpoint(self, trainer: TrainerView, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Let the module put in what only such a checkpoint needs."""
        if self._saving:
            checkpoint[_HPC] = True
            pl_module.on_hpc_save(checkpoint)

    def on_load_checkpoint(self, trainer: TrainerView, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Let the module take it out."""
        if checkpoint.get(_HPC):
            pl_module.on_hpc_load(checkpoint)

    def on_train_batch_end(
        self, trainer: TrainerView, pl_module: Any, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Save and leave, if it is time."""
        self._seen += 1
        if self._seen % self._every == 0:
            self._leave_if_told(trainer)

    def on_validation_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """Save and leave, if it is time."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._leave_if_told(trainer)

    def teardown(self, trainer: TrainerView, pl_module: Any, stage: str) -> None:
        """Hand back to the cluster."""
        self._cluster.postponed = False

    def on_exception(self, trainer: TrainerView, pl_module: Any, exception: BaseException) -> None:
        """Hand back to the cluster."""
        self._cluster.postponed = False

    def _leave_if_told(self, trainer: TrainerView) -> None:
        told = self._path is not None and self._cluster.signalled
        if trainer.world_size > 1:
            told = trainer.strategy.reduce_boolean_decision(told, all=False)
        if told and self._cluster.postponed:
            self._cluster.leave()


def _save(callback: weakref.ref[WalltimeCheckpoint], run: weakref.ref[Any]) -> None:
    owner, trainer = callback(), run()
    assert owner is not None
    assert trainer is not None
    owner.save(trainer)
