# SPDX-License-Identifier: Apache-2.0
"""Saves checkpoints while a model trains: periodically, the best k by a metric, and always the last one.

The parts stand in files of their own: the policies (when a save is due, what the best k are, what the last one is) in
``checkpoint_policies.py``, names in ``checkpoint_names.py``, and which files are this run's own, the only ones that are
ever overwritten or deleted, in ``checkpoint_files.py``. Here they are put together: the hooks, and the saving itself.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from leyden.callback import Callback
from leyden.callbacks.checkpoint_files import (
    Ledger,
    default_folder,
    exists,
    is_url,
    link,
    open_path,
    replaceable,
    require_writable,
    warn_of_others,
)
from leyden.callbacks.checkpoint_names import fill_fields
from leyden.callbacks.checkpoint_policies import KeptBy, Last, Occasions, Policy, TopK, check_arguments
from leyden.errors import MisconfigurationException, did_you_mean
from leyden.hooks import is_written
from leyden.runtime.ranks import rank_zero_info, rank_zero_warn
from leyden.types import STEP_OUTPUT, PathLike, TrainerFn, TrainerView
from leyden.vintage import signature

_RESUMES = ("_last_checkpoint_saved", "_last_global_step_saved", "_last_file_step", "_deferred")
_BOOKS = ("_ledger", "_top", "_last", "_last_checkpoint_saved", "_last_global_step_saved")


class Checkpoint(Callback):
    """Base of all callbacks that save checkpoints; the Trainer calls them after all other callbacks."""

    order: ClassVar[int] = 100
    monitors: ClassVar[bool] = True


class ModelCheckpoint(Checkpoint):
    """Saves the model and the state of training, by default at the end of each epoch, keeping the newest file.

    Args:
        dirpath: Folder, or the URL of one (``s3://...``). None: ``checkpoints`` in the folder of the first logger, or
            in the Trainer's ``default_root_dir`` if there is no logger.
        filename: Name without extension, with fields as in ``"{epoch}-{val_loss:.2f}"``; a metric that was not logged
            is written as 0. None: ``"{epoch}-{step}"``.
        monitor: The name under which the metric is logged that makes a checkpoint better than another. On a step that
            also validates, its value is the one of that validation.
        verbose: Say what is saved and why.
        save_last: Keep the newest checkpoint as ``last.ckpt`` too: True as a file, ``"link"`` as a symbolic link to the
            newest of the top k where that is as new. When ``fit`` ends, for whatever reason, it is the state after the
            last optimizer step.
        save_top_k: How many of the best to keep; -1 all, 0 none. Without ``monitor`` only -1, 0 and 1 make sense.
        save_on_exception: Save a checkpoint when an exception ends the training.
        save_weights_only: Leave out what is only needed to resume.
        mode: ``"min"`` or ``"max"``: which way ``monitor`` is better.
        auto_insert_metric_name: Write ``epoch=3`` for ``{epoch}``. Turn it off for names with a ``/``.
        every_n_train_steps: Save after each so many optimizer steps.
        train_time_interval: Save after each so much time (checked after each batch).
        every_n_epochs: Save after each so many epochs; 1 if none of the three is given. 0 is off. Only one of the
            three can be on.
        save_on_train_epoch_end: Whether an epoch's checkpoint is saved when the training epoch ends, or when validation
            ends. None: the former if validation runs once in each epoch, at its end, or never.
        enable_version_counter: Append ``-v1``, ``-v2`` ... to a name that is taken. If False, files are overwritten.
        async_save: Write while training goes on: a save takes a snapshot in host memory (once the size of the
            checkpoint) and returns. A save that comes while one is being written waits for it, and so does the end of
            ``fit``. A failed write ends the fit at the end of the batch that runs. See ``AsyncCheckpointIO``.

    Attributes:
        best_model_path, best_model_score: The best checkpoint (without ``monitor``: the newest) and its metric.
        last_model_path: Where the last checkpoint is; empty without ``save_last``.
        best_k_models: From path to metric, for the top k.
        kth_best_model_path, kth_value: The worst of these, once there are k.
        current_score: The metric of the newest of the top k.

    A name is taken if this run already uses it, or if a file is there that this run did not write. A run that resumes
    in the same folder is the same run: it goes on with the same names. The state of the callback and a mark in the
    files tell; files of others are neither overwritten nor deleted.

    Raises:
        MisconfigurationException: for values that cannot be; and during training, as soon as it is certain that
            ``monitor`` is not logged.
    """

    CHECKPOINT_JOIN_CHAR = "-"
    CHECKPOINT_EQUALS_CHAR = "="
    CHECKPOINT_NAME_LAST = "last"
    FILE_EXTENSION = ".ckpt"
    STARTING_VERSION = 1

    save_top_k = KeptBy[int]("_top")
    mode = KeptBy[str]("_top")
    current_score = KeptBy["Tensor | None"]("_top")
    best_k_models = KeptBy[dict[str, Tensor]]("_top")
    kth_best_model_path = KeptBy[str]("_top")
    kth_value = KeptBy[Tensor]("_top")
    best_model_score = KeptBy["Tensor | None"]("_top")
    best_model_path = KeptBy[str]("_top")
    last_model_path = KeptBy[str]("_last")
    _last_file_step = KeptBy[int]("_last")
    _every_n_train_steps = KeptBy[int]("_occasions")
    _every_n_epochs = KeptBy[int]("_occasions")
    _train_time_interval = KeptBy["timedelta | None"]("_occasions")

    @signature
    def __init__(
        self,
        dirpath: PathLike | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        verbose: bool = False,
        save_last: bool | Literal["link"] | None = None,
        save_top_k: int = 1,
        save_on_exception: bool = False,
        save_weights_only: bool = False,
        mode: str = "min",
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        enable_version_counter: bool = True,
        *,
        async_save: bool = False,
    ) -> None:
        if every_n_train_steps is None and every_n_epochs is None and train_time_interval is None:
            every_n_epochs = 1
        self._occasions = Occasions(every_n_train_steps or 0, train_time_interval, every_n_epochs or 0)
        self._top = TopK(save_top_k, mode)
        self._last = Last()
        self.monitor = monitor
        self.verbose = verbose
        self.save_last = save_last
        self.save_on_exception = save_on_exception
        self.save_weights_only = save_weights_only
        self.auto_insert_metric_name = auto_insert_metric_name
        self.async_save = async_save
        self.filename = filename
        self.dirpath: str | None = None
        if dirpath:
            self.dirpath = str(dirpath) if is_url(dirpath) else os.path.realpath(os.path.expanduser(dirpath))
        self._provisional: str | None = None  # a default folder that no fit has used yet
        self._save_on_train_epoch_end = save_on_train_epoch_end
        self._enable_version_counter = enable_version_counter
        check_arguments(monitor, save_last, self._top, self._occasions)

        self._ledger = Ledger()
        self._last_checkpoint_saved = ""
        self._last_global_step_saved = 0  # nothing to save before the first step
        self._deferred = False  # a save is due that waits for the monitored metric
        self._first_step: int | None = None  # where this fit began; None outside of training
        self._has_validated = False
        self._behind: Any = None  # what writes behind the training, while it stands before the strategy's plug-in

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint."""
        return self.make_state_key(monitor=self.monitor, mode=self.mode, **self._occasions.arguments())

    @property
    def every_n_epochs(self) -> int | None:
        """After how many epochs a checkpoint is saved; 0 is never."""
        return self._every_n_epochs

    @property
    def files(self) -> tuple[str, ...]:
        """The paths of the checkpoints that this run wrote and has not deleted."""
        return tuple(self._ledger.files)

    @property
    def ledger(self) -> Ledger:
        """Which files are this run's own."""
        return self._ledger

    @property
    def mark(self) -> str:
        """A word that is in each file of this run, weights-only ones too."""
        return self._ledger.mark

    def unused_hooks(self, trainer: TrainerView) -> frozenset[str]:
        """Return the hooks that this instance does not need in this run."""
        unused = ["on_train_start", "on_train_batch_end", "on_train_epoch_end", "on_validation_end", "on_train_end"]
        if trainer.state.fn == TrainerFn.FITTING and not trainer.fast_dev_run:
            unused = [] if self._occasions.looks_at_batches() else ["on_train_batch_end"]
        return frozenset(name for name in unused if not is_written(self, name, ModelCheckpoint))

    def setup(self, trainer: TrainerView, pl_module: Any, stage: str) -> None:
        """Settle the folder, and let the strategy write behind the training if that is wanted."""
        # a fit that resumes goes on with the version of its checkpoint, whatever a validation before it has logged to
        is_default = self.dirpath is None or self.dirpath == self._provisional
        self.dirpath = trainer.strategy.broadcast(default_folder(trainer) if is_default else self.dirpath)
        assert self.dirpath is not None
        self._provisional = self.dirpath if is_default and stage != "fit" else None
        if self.save_last == "link" and is_url(self.dirpath):
            raise ValueError(f"ModelCheckpoint(save_last='link') needs a local folder; dirpath is {self.dirpath!r}.")
        if stage == "fit" and not trainer.fast_dev_run and trainer.is_global_zero:
            require_writable(self.dirpath)
            if self.save_top_k != 0 and trainer.ckpt_path is None:
                warn_of_others(self.dirpath, self.FILE_EXTENSION, self.files)
        if stage == "fit" and not trainer.fast_dev_run and self.async_save:
            from leyden.checkpoint_io.behind import write_behind  # noqa: PLC0415 - only for those who want it

            self._write_through(trainer)  # a fit that was cut short had no time to
            self._behind = write_behind(trainer.strategy)

    def teardown(self, trainer: TrainerView, pl_module: Any, stage: str) -> None:
        """Wait until all is written."""
        self._write_through(trainer)

    def on_train_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Start counting; delete what a killed run had no time to delete."""
        self._occasions.start(trainer)
        self._first_step = trainer.global_step
        self._has_validated = False
        self._ledger.distrust_doomed()
        self._ledger.delete_doomed(trainer)

    def on_train_batch_end(
        self, trainer: TrainerView, pl_module: Any, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Save, if so many steps or so much time have passed."""
        if not self._occasions.due_after_batch(trainer):
            return
        if self._should_skip_saving_checkpoint(trainer):
            return
        candidates = self._monitor_candidates(trainer)
        if self._waits_for_metric(trainer, candidates):
            self._deferred = True
        else:
            self._save(trainer, candidates)

    def on_validation_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """Save what waited for this validation, or what is saved after validation rather than after the epoch."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self._has_validated = True
        if self._should_skip_saving_checkpoint(trainer):
            return
        candidates = self._monitor_candidates(trainer)
        at_epoch_end = self._should_save_on_train_epoch_end(trainer)
        if self._deferred:
            # where the epoch ends right after this validation, the metric may still be logged there
            is_certain = self.monitor in candidates or not at_epoch_end
        else:
            is_certain = self._occasions.due_after_epoch(trainer) and not at_epoch_end
        if is_certain:
            self._save(trainer, candidates)

    def on_train_epoch_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """Save, if the epoch's checkpoint is saved here, or if a save waits for a metric that no validation brings."""
        if self._should_skip_saving_checkpoint(trainer):
            return
        candidates = self._monitor_candidates(trainer)
        if self._deferred:
            if self.monitor in candidates or not self._validation_is_to_come(trainer):
                self._save(trainer, candidates)
        elif self._occasions.due_after_epoch(trainer) and self._should_save_on_train_epoch_end(trainer):
            self._save(trainer, candidates)

    def on_train_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """Bring the last checkpoint up to the last optimizer step."""
        trainer.strategy.checkpoint_io.settle()
        is_current = self._last_file_step == trainer.global_step
        if self.save_last and not is_current and not trainer.fast_dev_run and self._first_step is not None:
            with self._saving(trainer):
                self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        self._first_step, self._deferred = None, False

    def on_exception(self, trainer: TrainerView, pl_module: Any, exception: BaseException) -> None:
        """Save what the training has reached; a failure to do so is reported and the exception goes on."""
        try:
            # saving takes all processes; an exception is often one's own, and the others would wait forever
            saves_last = self.save_last and (trainer.world_size == 1 or self.save_on_exception)
            if (saves_last or self.save_on_exception) and self._has_unsaved_steps(trainer):
                self._save_what_is_reached(trainer, exception)
            trainer.strategy.checkpoint_io.settle()
        except Exception as error:
            rank_zero_warn(
                f"The checkpoint that ModelCheckpoint saves when an exception ({type(exception).__name__}) ends the"
                f" training could not be saved: {type(error).__name__}: {error}"
            )
        finally:
            self._first_step = None
            self._write_through(trainer)

    def _save_what_is_reached(self, trainer: TrainerView, exception: BaseException) -> None:
        candidates = self._monitor_candidates(trainer)
        with self._saving(trainer):
            if self.save_on_exception and self._last_global_step_saved != trainer.global_step:
                path = self._free_path(trainer, candidates)
                with self._undone_on_failure(trainer):
                    self._save_checkpoint(trainer, path)
                rank_zero_info(f"{type(exception).__name__}: {exception}. Saved the state of training to {path}")
            self._save_last_checkpoint(trainer, candidates)

    def _write_through(self, trainer: TrainerView) -> None:
        """Wait until all is written, and give the strategy its plug-in back."""
        behind, self._behind = self._behind, None
        if behind is not None and trainer.strategy.checkpoint_io is behind:
            trainer.strategy.checkpoint_io = behind.checkpoint_io
            behind.settle()

    def _waits_for_metric(self, trainer: TrainerView, candidates: dict[str, Tensor]) -> bool:
        """Whether the metric to rank by is not there yet, or is about to be replaced by that of a new validation."""
        if self.monitor is None or self.save_top_k == 0:
            return False
        if self.monitor in candidates:
            return trainer.validation_due()
        # an epoch without end logs nothing at its end
        return self._validation_is_to_come(trainer) or not math.isinf(trainer.num_training_batches)

    def _should_skip_saving_checkpoint(self, trainer: TrainerView) -> bool:
        return (
            bool(trainer.fast_dev_run)
            or trainer.state.fn != TrainerFn.FITTING
            or trainer.sanity_checking
            or self._last_global_step_saved == trainer.global_step
        )

    def _has_unsaved_steps(self, trainer: TrainerView) -> bool:
        """Whether this fit made optimizer steps that the last checkpoint does not contain."""
        return (
            self._first_step is not None
            and not trainer.fast_dev_run
            and not trainer.sanity_checking
            and trainer.global_step not in (self._first_step, self._last_file_step)
        )

    def _should_save_on_train_epoch_end(self, trainer: TrainerView) -> bool:
        if self._save_on_train_epoch_end is not None:
            return self._save_on_train_epoch_end
        interval = trainer.val_check_interval
        is_count = interval is None or isinstance(interval, (int, float))
        if not is_count or trainer.check_val_every_n_epoch != 1:
            return False
        return sum(trainer.num_val_batches) == 0 or interval in (1.0, None)

    def _validation_is_to_come(self, trainer: TrainerView) -> bool:
        """Whether this fit will validate, and has not yet."""
        # until the first epoch that validates, it is not known yet how many batches there are
        batches = trainer.num_val_batches
        return not self._has_validated and trainer.enable_validation and (not batches or sum(batches) > 0)

    def _monitor_candidates(self, trainer: TrainerView) -> dict[str, Tensor]:
        """Return what file names and ``monitor`` may refer to: the metrics, ``epoch`` and ``step``."""
        candidates = dict(trainer.callback_metrics)
        for name, count in (("epoch", trainer.current_epoch), ("step", trainer.global_step)):
            logged = candidates.get(name)
            candidates[name] = logged.int() if isinstance(logged, Tensor) else torch.tensor(count)
        return candidates

    def _save(self, trainer: TrainerView, candidates: dict[str, Tensor]) -> None:
        self._deferred = False
        with self._saving(trainer):
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    @contextmanager
    def _saving(self, trainer: TrainerView) -> Iterator[None]:
        """For the files of one moment; what they replace is deleted when all of them are complete."""
        checkpoint_io = trainer.strategy.checkpoint_io
        with checkpoint_io.together():
            yield
            checkpoint_io.then(lambda: self._ledger.delete_doomed(trainer))

    def _save_topk_checkpoint(self, trainer: TrainerView, candidates: dict[str, Tensor]) -> None:
        if self.save_top_k == 0:
            return
        if self.monitor is None:
            self._save_newest(trainer, candidates)
        elif self.monitor not in candidates:
            self._complain(trainer)
        elif self.check_monitor_top_k(trainer, candidates[self.monitor]):
            self._update_best_and_save(candidates[self.monitor], trainer, candidates)
        elif self.verbose:
            where = f"Epoch {candidates['epoch']:d}, global step {candidates['step']:d}"
            rank_zero_info(f"{where}: {self.monitor!r} was not in top {self.save_top_k}")

    def _complain(self, trainer: TrainerView) -> None:
        metrics = trainer.callback_metrics
        available = ", ".join(map(repr, metrics)) or "nothing"
        message = (
            f"ModelCheckpoint(monitor={self.monitor!r}): could not find the monitored key in the returned metrics: {available}."
            f"{did_you_mean(str(self.monitor), metrics)} Log it with `self.log({self.monitor!r}, value)`, or change"
            " `monitor`."
        )
        if not self._validation_is_to_come(trainer):
            raise MisconfigurationException(message)
        rank_zero_warn(f"{message} No checkpoint is ranked until a validation has run.")

    def _save_newest(self, trainer: TrainerView, candidates: dict[str, Tensor]) -> None:
        previous = self.best_model_path
        path = self._free_path(trainer, candidates, ours=previous)
        with self._undone_on_failure(trainer):
            self.best_model_path = path
            if self.save_top_k == 1:
                self._ledger.replace(trainer, previous, path)
            self._save_checkpoint(trainer, path)

    def check_monitor_top_k(self, trainer: TrainerView, current: Tensor | None = None) -> bool:
        """Return whether a checkpoint with the metric ``current`` is among the best k; all processes agree."""
        if current is None:
            return False
        return bool(trainer.strategy.reduce_boolean_decision(self._top.admits(current)))

    def _update_best_and_save(self, current: Tensor, trainer: TrainerView, candidates: dict[str, Tensor]) -> None:
        with self._undone_on_failure(trainer):
            beaten = self._top.beaten()
            path = self._free_path(trainer, candidates, ours=beaten)
            self._top.enter(path, current, beaten)
            if self.verbose:
                where = f"Epoch {candidates['epoch']:d}, global step {candidates['step']:d}"
                k = len(self.best_k_models) if self.save_top_k == -1 else self.save_top_k
                rank_zero_info(
                    f"{where}: {self.monitor!r} reached {self.current_score:0.5f} (best {self.best_model_score:0.5f}),"
                    f" saving model to {path!r} as top {k}"
                )
            self._ledger.replace(trainer, beaten, path)
            self._save_checkpoint(trainer, path)

    def _save_last_checkpoint(self, trainer: TrainerView, candidates: dict[str, Tensor]) -> None:
        if not self.save_last:
            return
        previous = self.last_model_path
        path = self._free_path(trainer, candidates, previous, self.CHECKPOINT_NAME_LAST)
        target = self._last_checkpoint_saved
        # a link only to a file of this very step, and never to one that is about to go
        can_link = (
            self.save_last == "link"
            and self._last_global_step_saved == trainer.global_step
            and target in self.files
            and target not in (previous, path)
        )
        with self._undone_on_failure(trainer):
            self._last.enter(path, trainer.global_step)
            self._ledger.replace(trainer, previous, path)
            if can_link:
                self._ledger.add(path)
                if trainer.is_global_zero:
                    trainer.strategy.checkpoint_io.then(lambda: link(target, path))
                trainer.strategy.barrier()
            else:
                self._save_checkpoint(trainer, path)

    def _save_checkpoint(self, trainer: TrainerView, filepath: str) -> None:
        """Write one file, in whose state of this callback it is there already; loggers are told when it is complete."""
        self._ledger.add(filepath)
        if not self.save_weights_only:
            self._ledger.supersede(trainer, filepath)
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        trainer.save_checkpoint(filepath, self.save_weights_only)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                trainer.strategy.checkpoint_io.then(partial(logger.after_save_checkpoint, self))

    @contextmanager
    def _undone_on_failure(self, trainer: TrainerView) -> Iterator[None]:
        """Take back the bookkeeping if the file cannot be written, now or behind the training."""
        books: dict[str, Any] = {name: getattr(self, name) for name in _BOOKS}
        before = {name: value.copy() if isinstance(value, (Policy, Ledger)) else value for name, value in books.items()}
        try:
            yield
            trainer.strategy.checkpoint_io.otherwise(lambda: vars(self).update(before))
        except BaseException:
            vars(self).update(before)
            raise

    def format_checkpoint_name(
        self,
        metrics: Mapping[str, Any],
        filename: str | None = None,
        ver: int | None = None,
        prefix: str | None = None,
    ) -> str:
        """Return the path of a checkpoint.

        Args:
            metrics: Values of the fields in the name; a missing one is 0.
            filename: Template to use in place of the callback's ``filename``.
            ver: Version to append (``-v1``).
            prefix: What to put in front of the name.
        """
        template = filename or self.filename or f"{{epoch}}{self.CHECKPOINT_JOIN_CHAR}{{step}}"
        parts = [fill_fields(template, metrics, self.CHECKPOINT_EQUALS_CHAR if self.auto_insert_metric_name else None)]
        if prefix is not None:
            parts.insert(0, prefix)
        if ver is not None:
            parts.append(f"v{ver}")
        name = self.CHECKPOINT_JOIN_CHAR.join(parts) + self.FILE_EXTENSION
        return os.path.join(self.dirpath, name) if self.dirpath else name

    def _free_path(
        self, trainer: TrainerView, candidates: dict[str, Tensor], ours: str = "", name: str | None = None
    ) -> str:
        """Return the first path that is not taken; ``ours`` is free, because its file is to be replaced."""
        # rank 0's: a value of a step is another one on each rank
        path = trainer.strategy.broadcast(self.format_checkpoint_name(candidates, name))
        version, ours = self.STARTING_VERSION, trainer.strategy.broadcast(replaceable(trainer, ours))
        while self._enable_version_counter and path != ours and self._ledger.is_taken(trainer, path):
            path = trainer.strategy.broadcast(self.format_checkpoint_name(candidates, name, ver=version))
            version += 1
        return str(path)

    def file_exists(self, filepath: PathLike, trainer: TrainerView) -> bool:
        """Return whether the file exists for rank 0; all processes get the same answer."""
        is_there = trainer.is_global_zero and exists(str(filepath))
        return bool(trainer.strategy.reduce_boolean_decision(is_there, all=False))

    def to_yaml(self, filepath: PathLike | None = None) -> None:
        """Write ``best_k_models`` as YAML: path and metric of each. Default: ``best_k_models.yaml`` in the folder."""
        import yaml  # noqa: PLC0415 - needed nowhere else in this file

        if filepath is None:
            assert self.dirpath is not None
            filepath = os.path.join(self.dirpath, "best_k_models.yaml")
        with open_path(str(filepath), "w") as stream:
            yaml.safe_dump({path: score.item() for path, score in self.best_k_models.items()}, stream)

    def state_dict(self) -> dict[str, Any]:
        """Return the top k and the last; under ``"run"`` what a resume needs to go on as if nothing had happened."""
        return {
            "monitor": self.monitor,
            "best_model_score": self.best_model_score,
            "best_model_path": self.best_model_path,
            "current_score": self.current_score,
            "dirpath": self.dirpath,
            "best_k_models": dict(self.best_k_models),
            "kth_best_model_path": self.kth_best_model_path,
            "kth_value": self.kth_value,
            "last_model_path": self.last_model_path,
            "run": {**self._ledger.state_dict(), **{name: getattr(self, name) for name in _RESUMES}},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what ``state_dict`` returned; in another folder only ``best_model_path``."""
        self.best_model_path = state_dict.get("best_model_path", "")
        before = state_dict.get("dirpath", self.dirpath)
        if before != self.dirpath:
            rank_zero_warn(
                f"The checkpoint folder has changed from {before!r} to {self.dirpath!r}: of the state of"
                " ModelCheckpoint only `best_model_path` is taken over, the top k start anew."
            )
            return
        self.best_model_score = state_dict.get("best_model_score")
        self.current_score = state_dict.get("current_score", self.current_score)
        self.best_k_models = dict(state_dict.get("best_k_models", self.best_k_models))
        self.kth_best_model_path = state_dict.get("kth_best_model_path", self.kth_best_model_path)
        self.kth_value = state_dict.get("kth_value", self.kth_value)
        self.last_model_path = state_dict.get("last_model_path", self.last_model_path)
        # a file written by Lightning does not say which files are its own, but these must be
        known = [path for path in (*self.best_k_models, self.best_model_path, self.last_model_path) if path]
        run = state_dict.get("run", {"files": list(dict.fromkeys(known))})
        self._ledger.load_state_dict(run, str(self.dirpath))
        for name in _RESUMES:
            setattr(self, name, run.get(name, getattr(self, name)))


__all__ = ["Checkpoint", "ModelCheckpoint"]
