# SPDX-License-Identifier: Apache-2.0
"""The callback that saves a Trainer's run between two batches when its SLURM job is about to end."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any, ClassVar

from leyden.callback import Callback
from leyden.errors import MisconfigurationException
from leyden.search.slurm import SlurmCluster
from leyden.types import STEP_OUTPUT, TrainerView


class WalltimeCheckpoint(Callback):
    """Before the walltime of its job, saves a checkpoint and has the cluster submit the continuation.

    ::

        def train(hparams, cluster, results):
            trainer = Trainer(callbacks=[WalltimeCheckpoint(cluster)])
            trainer.fit(model, ckpt_path=cluster.ckpt_path)

    The signal is only noted when it comes; the checkpoint is saved after the batch, or the validation, that is running,
    and the continuation goes on from there as if nothing had happened. A run outside of a job is not touched.

    Args:
        cluster: The one that the function got.
        filepath: Where to save. None takes ``cluster.checkpoint_file``.
    """

    order: ClassVar[int] = 200  # after those that save checkpoints: what they did belongs into this one

    def __init__(self, cluster: SlurmCluster, filepath: str | os.PathLike[str] | None = None) -> None:
        self._cluster = cluster
        self._path = cluster.checkpoint_file if filepath is None else Path(filepath)
        self._every = 1
        self._seen = 0

    def setup(self, trainer: TrainerView, pl_module: Any, stage: str) -> None:
        """Take over from the cluster: from now on it only notes the signal."""
        if stage != "fit" or self._path is None:
            return
        if self._cluster.continues and trainer.ckpt_path is None:
            raise MisconfigurationException(
                "This job continues a trial, but fit(ckpt_path=None) would begin it anew. Pass"
                " fit(..., ckpt_path=cluster.ckpt_path), which is None in a trial's first job."
            )
        # several processes must leave after the same batch; asking the others costs, so they ask only now and then
        self._every = 1 if trainer.world_size == 1 else max(trainer.log_every_n_steps, 1)
        # no strong reference: the cluster outlives the trainer
        self._cluster.set_checkpoint_save_function(_save, {"trainer": weakref.proxy(trainer), "path": self._path})
        self._cluster.postponed = True

    def on_train_batch_end(
        self, trainer: TrainerView, pl_module: Any, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Save and leave, if it is time."""
        self._seen += 1
        if self._seen % self._every == 0:
            self._leave_if_told(trainer)

    def on_validation_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """Save and leave, if it is time."""
        if not trainer.sanity_checking:
            self._leave_if_told(trainer)

    def teardown(self, trainer: TrainerView, pl_module: Any, stage: str) -> None:
        """Hand back to the cluster."""
        if stage == "fit" and self._path is not None:
            self._cluster.postponed = False

    def _leave_if_told(self, trainer: TrainerView) -> None:
        told = self._cluster.signalled
        if trainer.world_size > 1:
            told = trainer.strategy.reduce_boolean_decision(told, all=False)
        if told and self._cluster.postponed:
            self._cluster.leave()


def _save(trainer: Any, path: Path) -> None:
    trainer.save_checkpoint(path)
    trainer.strategy.checkpoint_io.settle()  # the job that goes on needs the whole file
