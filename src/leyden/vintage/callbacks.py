# SPDX-License-Identifier: Apache-2.0
"""What the Trainer of 2019 did by arguments of its own and callbacks do today: norms of gradients, NaN, the walltime."""

from __future__ import annotations

import os
import signal
import threading
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from leyden import files
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

    The cluster gets two functions: one that writes ``hpc_ckpt_<step>.ckpt`` into the folder of the first logger, one for
    the job that continues. Its signals (SIGUSR1, SIGTERM) may come in the middle of a step; the handlers that are there
    when fit begins are called after the batch that runs then, so that what they save is whole.

    Args:
        cluster: Has ``set_checkpoint_save_function(fn, kwargs)`` and ``set_checkpoint_load_function(fn, kwargs)``.
    """

    order: ClassVar[int] = 90

    def __init__(self, cluster: Any) -> None:
        for name in ("set_checkpoint_save_function", "set_checkpoint_load_function"):
            if not callable(getattr(cluster, name, None)):
                raise MisconfigurationException(
                    f"Trainer(cluster={cluster!r}): it must be a SlurmCluster; {type(cluster).__name__} has no {name}()."
                )
        self.cluster = cluster
        self._trainer: Callable[[], Any] | None = None
        self._handlers: dict[int, Any] = {}
        self._signal: int | None = None
        self._pid = 0
        self._saving = False

    def on_fit_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Give the cluster its functions, and take its signals over."""
        self._trainer, self._signal = weakref.ref(trainer), None
        self.cluster.set_checkpoint_save_function(self.save, {})
        self.cluster.set_checkpoint_load_function(self.load, {})
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGUSR1, signal.SIGTERM):
                if callable(signal.getsignal(number)):
                    self._handlers[number] = signal.signal(number, self._note)
        self._pid = os.getpid()

    def _note(self, number: int, frame: Any) -> None:
        if os.getpid() != self._pid:  # a forked worker of a DataLoader: it has nothing to save, and SIGTERM ends it
            self._handlers[number](number, frame)
        elif self._signal is None:
            self._signal = number

    def _answer(self) -> None:
        if self._signal is not None:
            number, self._signal = self._signal, None
            self._handlers[number](number, None)

    def on_train_batch_end(
        self, trainer: TrainerView, pl_module: Any, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Answer a signal that came during the batch."""
        self._answer()

    def on_validation_batch_end(
        self,
        trainer: TrainerView,
        pl_module: Any,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Answer a signal that came during the batch; the validation is run anew by the job that continues."""
        if not trainer.sanity_checking and trainer.state.fn == TrainerFn.FITTING:
            self._answer()

    def save(self) -> str:
        """Write the checkpoint, in the place of an earlier one; return its path."""
        trainer = self._trainer() if self._trainer is not None else None
        if trainer is None:
            raise MisconfigurationException("There is no run to save: Trainer.fit is not running.")
        folder = trainer.log_dir
        earlier = _hpc_files(folder)
        path = os.path.join(folder, f"hpc_ckpt_{trainer.global_step}.ckpt")
        self._saving = True
        try:
            trainer.save_checkpoint(path)
        finally:
            self._saving = False
        for old in earlier:
            if old != path:
                files.remove(old)
        return path

    def load(self) -> None:
        """What the cluster calls in a job that continues: nothing, fit takes the newest checkpoint by itself."""

    def on_save_checkpoint(self, trainer: TrainerView, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Let the module put in what only such a checkpoint needs."""
        if self._saving:
            checkpoint[_HPC] = True
            pl_module.on_hpc_save(checkpoint)

    def on_load_checkpoint(self, trainer: TrainerView, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Let the module take it out."""
        if checkpoint.get(_HPC):
            pl_module.on_hpc_load(checkpoint)

    def on_fit_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """The training is done: nothing has to go on from its middle."""
        for path in _hpc_files(trainer.log_dir):
            files.remove(path)

    def teardown(self, trainer: TrainerView, pl_module: Any, stage: str) -> None:
        """Give the signals back."""
        self._release()

    def on_exception(self, trainer: TrainerView, pl_module: Any, exception: BaseException) -> None:
        """Give the signals back."""
        self._release()

    def _release(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
        self._trainer = None


def _hpc_files(folder: str | None) -> list[str]:
    if folder is None or not os.path.isdir(folder):
        return []
    names = [name for name in os.listdir(folder) if name.startswith("hpc_ckpt_") and name.endswith(".ckpt")]
    return [os.path.join(folder, name) for name in names]
