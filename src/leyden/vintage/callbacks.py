# SPDX-License-Identifier: Apache-2.0
"""What the Trainer of 2019 did by arguments of its own and callbacks do today: norms of gradients, NaN, the walltime."""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from leyden.callback import Callback
from leyden.errors import MisconfigurationException
from leyden.types import STEP_OUTPUT, TrainerFn, TrainerView

_HPC = "hpc_save"
"""The key by which a checkpoint tells that it was written because a walltime ended."""


def _gradients(module: Any) -> dict[str, Tensor]:
    """The gradients that are there, by the name of their parameter; of sparse ones the values."""
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {name: grad.coalesce().values() if grad.is_sparse else grad for name, grad in found.items()}


def gradient_norms(module: Any, p: float) -> dict[str, float]:
    """Return the ``p``-norm of each gradient, ``grad_<p>_norm_<parameter>``, and of all, ``grad_<p>_norm_total``."""
    gradients = _gradients(module)
    if not gradients:
        return {}
    norms = torch.stack([torch.linalg.vector_norm(grad.detach().float(), p) for grad in gradients.values()])
    # the norm of the norms is the norm of all; one tensor, so that the device is waited for once
    *each, total = torch.cat([norms, torch.linalg.vector_norm(norms, p).reshape(1)]).tolist()
    named = {f"grad_{p:g}_norm_{name}": value for name, value in zip(gradients, each, strict=True)}
    return {**named, f"grad_{p:g}_norm_total": total}


class GradientNorms(Callback):
    """Logs the norm of each layer's gradient and the total at each row, as they are before clipping.

    Args:
        p: Which norm; infinity is the largest value.
    """

    def __init__(self, p: float) -> None:
        self.p = p

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint."""
        return self.make_state_key(p=self.p)

    def on_before_optimizer_step(self, trainer: TrainerView, pl_module: Any, optimizer: Optimizer) -> None:
        """Log the norms, if this update ends with a row; once, where several optimizers step."""
        every = trainer.log_every_n_steps
        due = trainer.fast_dev_run or (every > 0 and (trainer.batches_that_stepped + 1) % every == 0)
        if due and optimizer is trainer.optimizers[0]:
            pl_module.log_dict(gradient_norms(pl_module, self.p))


class NaNGradients(Callback):
    """Prints the names of the parameters whose gradients are NaN, after each backward that brings some."""

    def on_after_backward(self, trainer: TrainerView, pl_module: Any) -> None:
        """Look at all gradients."""
        gradients = _gradients(pl_module)
        if not gradients:
            return
        counts = torch.stack([torch.isnan(grad).sum() for grad in gradients.values()]).tolist()
        for (name, grad), count in zip(gradients.items(), counts, strict=True):
            if count:
                trainer.print(
                    f"NaN gradient in epoch {trainer.current_epoch}, step {trainer.global_step}: {name}"
                    f" ({count} of {grad.numel()} values)"
                )


class Walltime(Callback):
    """Lets a SlurmCluster checkpoint a run before its walltime is over, and the job that continues go on from there.

    The cluster gets the function that saves. Its signal may come in the middle of a step: it is answered after the
    batch, or the validation, that runs then, so that what is saved is whole. A run outside of a job is not touched.

    Args:
        cluster: A SlurmCluster.
    """

    order: ClassVar[int] = 200  # after those that save checkpoints: what they did belongs into this one

    def __init__(self, cluster: Any) -> None:
        for name in ("set_checkpoint_save_function", "set_checkpoint_load_function"):
            if not callable(getattr(cluster, name, None)):
                raise MisconfigurationException(
                    f"Trainer(cluster={cluster!r}): it must be a SlurmCluster; {type(cluster).__name__} has no {name}()."
                )
        self.cluster = cluster
        self._saving = False

    def on_fit_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Take over from the cluster: from now on it only notes the signal."""
        if self.cluster.checkpoint_file is None:
            return
        # weak: the cluster outlives the run
        self.cluster.set_checkpoint_save_function(
            _save, {"callback": weakref.proxy(self), "trainer": weakref.proxy(trainer)}
        )
        self.cluster.set_checkpoint_load_function(_load)
        self.cluster.postponed = True

    def save(self, trainer: TrainerView) -> None:
        """Write the checkpoint of the trial."""
        self._saving = True
        try:
            trainer.save_checkpoint(self.cluster.checkpoint_file)
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
        self._leave_if_told(trainer)

    def on_validation_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """Save and leave, if it is time."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._leave_if_told(trainer)

    def _leave_if_told(self, trainer: TrainerView) -> None:
        told = self.cluster.checkpoint_file is not None and self.cluster.signalled
        if trainer.strategy.reduce_boolean_decision(told, all=False):
            self.cluster.leave()

    def teardown(self, trainer: TrainerView, pl_module: Any, stage: str) -> None:
        """Hand back to the cluster."""
        self.cluster.postponed = False

    def on_exception(self, trainer: TrainerView, pl_module: Any, exception: BaseException) -> None:
        """Hand back to the cluster."""
        self.cluster.postponed = False


def _save(callback: Walltime, trainer: TrainerView) -> None:
    callback.save(trainer)


def _load() -> None:
    """What a cluster calls in a job that goes on: nothing, since fit takes ``cluster.ckpt_path`` by itself."""
