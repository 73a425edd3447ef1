# SPDX-License-Identifier: Apache-2.0
"""``Trainer``: owns the parts of a run and has its four entry points: fit, validate, test, predict."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch

from leyden import vintage
from leyden.errors import EndOfRun, NoModuleError
from leyden.loggers.base import keeps_position
from leyden.loggers.history import History
from leyden.loops import hardware, resolve, snapshot
from leyden.loops.evaluate import EvaluationLoop
from leyden.loops.fit import FitLoop
from leyden.loops.predict import PredictLoop
from leyden.loops.session import Owner, Session
from leyden.loops.start import (
    check,
    checkpoint_path,
    compile_steps,
    configure_optimizers,
    epoch_bounds,
    log_hyperparams,
    make_session,
    uncompiled,
    unwrap,
    warn_of_memory,
)
from leyden.module import LightningModule
from leyden.progress import Progress
from leyden.results import Results
from leyden.runtime.devices import current
from leyden.runtime.ranks import rank_zero_info, rank_zero_warn
from leyden.runtime.seed import isolate_rng
from leyden.signals import Interrupt
from leyden.trainer_face import TrainerFace
from leyden.types import RunningStage, TrainerFn, TrainerState, TrainerStatus
from leyden.version import __version__

if TYPE_CHECKING:
    from leyden import argument_types as types


class Trainer(TrainerFace):
    """Trains, validates, tests and predicts with a ``LightningModule``.

    All arguments are keyword-only, have the names and meanings of PyTorch Lightning's Trainer, and are checked here.

    Args:
        accelerator: ``"auto"``, ``"cpu"``, ``"gpu"``, ``"cuda"``, ``"mps"`` or an Accelerator.
        strategy: ``"auto"`` or a Strategy.
        devices: How many or which devices; ``"auto"`` is one.
        num_nodes: How many machines.
        precision: ``"32-true"``, ``"64-true"``, ``"16-mixed"``, ``"bf16-mixed"``, ``"16-true"``, ``"bf16-true"``.
        logger: None or True for TensorBoard, False for none, a Logger or several. ``trainer.history`` has all rows anyway.
        callbacks: A callback or a list of them.
        fast_dev_run: Run n batches of everything (True: one) and write nothing.
        max_epochs: Bound on epochs; -1 is none; None is 1000 unless ``max_steps`` or ``max_time`` is given.
        min_epochs: Epochs that run whatever asks to stop.
        max_steps: Bound on updates of the model; -1 is none.
        min_steps: Updates that are made whatever asks to stop.
        max_time: Bound on the time of training: ``"DD:HH:MM:SS"``, ``"30min"``, a timedelta or a dict of its arguments.
        limit_train_batches: Batches of an epoch: a fraction (float) or a number (int). The other three alike.
        limit_val_batches: See ``limit_train_batches``.
        limit_test_batches: See ``limit_train_batches``.
        limit_predict_batches: See ``limit_train_batches``.
        overfit_batches: Train and validate on the same few batches, unshuffled.
        val_check_interval: When to validate inside training: a fraction of an epoch (float), batches (int), ``"500
            steps"``, or a duration.
        check_val_every_n_epoch: Validate in every n-th epoch; None counts batches across epochs.
        num_sanity_val_steps: Validation batches ahead of training; -1 is all.
        log_every_n_steps: Updates between two rows; 0 is never.
        enable_checkpointing: Add a ModelCheckpoint if no callback writes checkpoints.
        enable_progress_bar: Add a progress bar.
        enable_model_summary: Print a summary of the layers.
        accumulate_grad_batches: Batches of one update.
        gradient_clip_val: Largest norm or absolute value of gradients.
        gradient_clip_algorithm: ``"norm"`` or ``"value"``.
        deterministic: Use deterministic algorithms for the length of a run; ``"warn"`` where there are any.
        benchmark: Let cuDNN search for the fastest algorithms.
        inference_mode: Evaluate under ``torch.inference_mode`` rather than ``no_grad``.
        use_distributed_sampler: Share samples out between several devices.
        keep_global_batch: Where fewer processes go on with a run, accumulate gradients so that an update keeps its samples.
        profiler: ``"simple"``, ``"advanced"``, ``"pytorch"``, ``"xla"``, or a Profiler.
        detect_anomaly: Find the operation that made a NaN; slow.
        barebones: Everything off that costs time.
        plugins: A Precision, a CheckpointIO, a ClusterEnvironment, or a list of one of each.
        sync_batchnorm: Share batch statistics between several devices.
        reload_dataloaders_every_n_epochs: Ask for new loaders every n epochs; 0 is never.
        default_root_dir: Where logs and checkpoints go; None is the working directory.
        enable_autolog_hparams: Log hyperparameters when a run begins.
        model_registry: Accepted for compatibility.
        semantics: ``"leyden"``, or ``"lightning"`` for its behaviour where ours differs on purpose. None is ``"leyden"``,
            except in a program that imports Lightning's names (``leyden.compat``).
        compile: Compile the steps with ``torch.compile``; a dict holds its arguments (``{"mode": "max-autotune"}``). What
            cannot be compiled runs uncompiled, with a warning that says why.
        cuda_graphs: Capture the whole update as a CUDA graph and replay it; where it cannot be, one line says why.
        fused_optimizers: Give Adam, AdamW, SGD and Adagrad their fused form, where the device has one.
        fast_data: Read data that lies in memory a batch at a time, keep it on the device where it is small, copy batches
            ahead, keep workers. The batches are the same, to the last bit; False leaves it all to the DataLoader.
        num_workers: Worker processes of the DataLoaders: an int, or ``"auto"``, which measures at the beginning of a run; a
            resumed run has those of its checkpoint. None leaves them as they are.

    Raises:
        MisconfigurationException: for a value that cannot be; the message names the argument.
        TypeError: for an unknown argument, with the closest known one.
    """

    @resolve.from_environment
    def __init__(
        self,
        *,
        accelerator: str | types.Accelerator = "auto",
        strategy: str | types.Strategy = "auto",
        devices: types.Devices = "auto",
        num_nodes: int = 1,
        precision: types.PrecisionName | None = None,
        logger: types.Loggers | None = None,
        callbacks: types.Callbacks | None = None,
        fast_dev_run: int | bool = False,
        max_epochs: int | None = None,
        min_epochs: int | None = None,
        max_steps: int = -1,
        min_steps: int | None = None,
        max_time: types.Duration | None = None,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        overfit_batches: int | float = 0.0,
        val_check_interval: int | float | types.Duration | None = None,
        check_val_every_n_epoch: int | None = 1,
        num_sanity_val_steps: int | None = None,
        log_every_n_steps: int | None = None,
        enable_checkpointing: bool | None = None,
        enable_progress_bar: bool | None = None,
        enable_model_summary: bool | None = None,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
        deterministic: bool | Literal["warn"] | None = None,
        benchmark: bool | None = None,
        inference_mode: bool = True,
        use_distributed_sampler: bool = True,
        keep_global_batch: bool = True,
        profiler: types.Profiler | str | None = None,
        detect_anomaly: bool = False,
        barebones: bool = False,
        plugins: types.Plugins | None = None,
        sync_batchnorm: bool = False,
        reload_dataloaders_every_n_epochs: int = 0,
        default_root_dir: str | os.PathLike[str] | None = None,
        enable_autolog_hparams: bool = True,
        model_registry: str | None = None,
        semantics: str | None = None,
        compile: bool | dict[str, Any] = False,
        cuda_graphs: bool = False,
        fused_optimizers: bool = False,
        fast_data: bool = True,
        num_workers: int | str | None = None,
        **unknown: Any,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "unknown", "__class__")}
        self._vintage: Any = vintage.arguments(unknown, given, resolve.instead_of) if unknown else None
        self.config = config = resolve.config(given)
        self.default_root_dir = resolve.root_dir(default_root_dir)
        self.state = TrainerState()
        self.progress = Progress()
        self.results = Results()
        self.history = History()
        self.should_stop = False
        self.fit_loop = FitLoop()
        self.validate_loop = EvaluationLoop(RunningStage.VALIDATING)
        self.test_loop = EvaluationLoop(RunningStage.TESTING)
        self.predict_loop = PredictLoop()
        for loop in (self.fit_loop, self.fit_loop.validation, self.validate_loop, self.test_loop, self.predict_loop):
            loop.owner = Owner(self)
        names = ("strategy", "accelerator", "devices", "num_nodes", "precision", "plugins", "sync_batchnorm")
        self._strategy, self._accelerator = hardware.strategy(*(given[name] for name in names))
        self._profiler = resolve.profiler(profiler)
        switches = ("enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        wanted = {name: not config.barebones if given[name] is None else given[name] for name in switches}
        self._loggers = resolve.loggers(given["logger"], self.default_root_dir, config, config.barebones)
        self._callbacks = resolve.callbacks(
            given["callbacks"],
            config,
            checkpointing=wanted["enable_checkpointing"] and not config.fast_dev_run,
            bar=wanted["enable_progress_bar"],
            summary=wanted["enable_model_summary"],
            explicit=given,
        )
        self._given: Any = None
        self._session: Session | None = None
        self._interrupt = Interrupt()
        self._cluster = hardware.cluster(plugins, self._strategy)
        self._datamodule = self._ckpt_path = self._recorder = None
        self._dated = False
        self._told_semantics = semantics is not None

    # ------------------------------------------------------------------ entry points

    def fit(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        weights_only: bool | None = None,
    ) -> int | None:
        """Train ``model``.

        Args:
            model: The module.
            train_dataloaders: An iterable of batches, a list or dict of them, or a data module. None: the module's own.
            val_dataloaders: The same for validation.
            datamodule: Provides all loaders.
            ckpt_path: Go on from this checkpoint: a path, ``"last"``, ``"best"``, or ``"hpc"``, the newest of those that
                jobs of a cluster leave behind. A job that SLURM has started anew goes on by itself.
            weights_only: None or True never runs code from the checkpoint; False is for files you trust.

        A second ``fit`` of the same module goes on from where the first stopped; of another module, it starts anew.
        Returns None; 1 ("trained") where the module or the Trainer is written with the names of 2019.
        After Ctrl-C it finishes the step, saves, runs ``on_exception`` and returns; ``trainer.interrupted`` is then True.

        Raises:
            SIGTERMException: (a SystemExit, code 143) when a signal asks the process to end and the run is saved.
        """
        if self._strategy.spawns:
            return self._strategy.run_elsewhere(self, "fit", locals())  # type: ignore[no-any-return]
        model, datamodule, train_dataloaders = unwrap(model, datamodule, train_dataloaders, val_dataloaders)
        sources = {"train": train_dataloaders, "val": val_dataloaders}
        with self._running(TrainerFn.FITTING, RunningStage.TRAINING):
            session = self._start(model, sources, datamodule, ckpt_path, weights_only)
            self._sanity_check(session)
            # not set_detect_anomaly(False), which would switch off what the user has switched on
            with torch.autograd.set_detect_anomaly(True) if self.config.detect_anomaly else contextlib.nullcontext():
                self.fit_loop.run(session)
            self._end(session)
        return 1 if self._dated and self.state.finished else None

    def validate(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        verbose: bool = True,
        datamodule: Any = None,
        weights_only: bool | None = None,
    ) -> list[dict[str, float]]:
        """Run validation; return the logged values of each loader.

        Args:
            model: The module; None takes the last one, with its best weights unless ``ckpt_path`` says otherwise.
            dataloaders: An iterable of batches, a list or dict of them, or a data module. None: the module's own.
            ckpt_path: Take the weights from this checkpoint: a path, ``"best"`` or ``"last"``.
            verbose: Print the values as a table.
            datamodule: Provides the loaders.
            weights_only: As in ``fit``.
        """
        return self._evaluate(
            TrainerFn.VALIDATING, self.validate_loop, model, dataloaders, ckpt_path, verbose, datamodule, weights_only
        )

    def test(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        verbose: bool = True,
        datamodule: Any = None,
        weights_only: bool | None = None,
    ) -> list[dict[str, float]]:
        """Run the test; return the logged values of each loader. Arguments as in ``validate``."""
        return self._evaluate(
            TrainerFn.TESTING, self.test_loop, model, dataloaders, ckpt_path, verbose, datamodule, weights_only
        )

    def _evaluate(
        self, fn: TrainerFn, loop: EvaluationLoop, model: LightningModule | None, dataloaders: Any, ckpt_path: Any,
        verbose: bool, datamodule: Any, weights_only: bool | None,
    ) -> list[dict[str, float]]:  # fmt: skip
        if self._strategy.spawns:
            return self._strategy.run_elsewhere(self, str(fn), locals())  # type: ignore[no-any-return]
        provided = model is not None
        model, datamodule, dataloaders = unwrap(self._known(model, str(fn)), datamodule, dataloaders)
        results: list[dict[str, float]] = []
        with self._running(fn, loop.stage):
            session = self._start(model, {loop.prefix: dataloaders}, datamodule, ckpt_path, weights_only, provided)
            results = loop.run(session)
            self._end(session)
            if verbose and self.is_global_zero:
                loop.tell(results)
        return results

    def predict(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        datamodule: Any = None,
        return_predictions: bool | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        weights_only: bool | None = None,
        gather: bool = False,
    ) -> list[Any] | None:
        """Run ``predict_step`` over all batches; return what it returned, as a list (of lists, with several loaders).

        Args:
            model: As in ``validate``.
            dataloaders: As in ``validate``.
            datamodule: As in ``validate``.
            return_predictions: False keeps nothing in memory and returns None.
            ckpt_path: As in ``validate``.
            weights_only: As in ``fit``.
            gather: With several processes, return on each what all have predicted, in the order of the data.
        """
        if self._strategy.spawns:
            return self._strategy.run_elsewhere(self, "predict", locals())  # type: ignore[no-any-return]
        provided = model is not None
        model, datamodule, dataloaders = unwrap(self._known(model, "predict"), datamodule, dataloaders)
        predictions: list[Any] | None = None
        with self._running(TrainerFn.PREDICTING, RunningStage.PREDICTING):
            session = self._start(model, {"predict": dataloaders}, datamodule, ckpt_path, weights_only, provided)
            self.predict_loop.return_predictions, self.predict_loop.gather = return_predictions is not False, gather
            predictions = self.predict_loop.run(session)
            self._end(session)
        return predictions

    def _known(self, model: Any, entry: str) -> Any:
        found = self.lightning_module if model is None else model
        if model is None and found is not None and uncompiled(self._given) is found:
            return self._given  # compiled, if it was given so
        if found is None:
            raise NoModuleError(f"`Trainer.{entry}()` requires a `LightningModule`: this Trainer has not run one yet.")
        return found

    # ------------------------------------------------------------------ a run, from start to end

    @contextlib.contextmanager
    def _running(self, fn: TrainerFn, stage: RunningStage) -> Iterator[None]:
        """Frame of every entry point: states, signals, and what happens when an exception ends the run."""
        self.state.fn, self.state.status, self.state.stage = fn, TrainerStatus.RUNNING, stage
        self.should_stop = False
        self._interrupt, device = Interrupt(self._strategy.asked_to_stop), self._strategy.root_device
        try:
            # around the saving too: a signal that comes then is noted, or is the second one
            with self._interrupt, resolve.Determinism(self.config), current(self._accelerator, device):
                try:
                    self._strategy.launch(self._interrupt, self.progress)
                    try:
                        yield
                    except EndOfRun:
                        self._end(self._session, early=True)
                    self.state.status = TrainerStatus.FINISHED
                except BaseException as exception:
                    ending = self._fail(exception)
                    try:
                        if not self._returns_after(ending):
                            if ending is exception:
                                raise
                            raise ending from exception
                    finally:
                        del ending  # or the exception and this frame would keep each other alive
                else:
                    if self._strategy.agree_on(self._interrupt):  # while everybody was told that the run is over
                        from leyden.loops import leave  # noqa: PLC0415  # few runs end so

                        self._interrupt.answered = True
                        leave.leave(self, self._session, self._cluster, self._interrupt)
                        if not self._returns_after(self._interrupt.exception()):
                            raise self._interrupt.exception()
        finally:
            self._strategy.land()
            self._release()

    def _returns_after(self, exception: BaseException) -> bool:
        """Whether a run that ends with ``exception`` returns to its caller: after Ctrl-C, and inside another run."""
        interrupt = self._interrupt
        self.state.status = TrainerStatus.INTERRUPTED
        if interrupt.answered and interrupt.outer is not None and interrupt.error is None:
            return True  # the outer run got the same signal, and answers it when it is between two batches
        if not isinstance(exception, KeyboardInterrupt):
            return False
        if self.config.rule("interrupt") == "exit":
            sys.exit(1)
        rank_zero_info(f"Trainer.{self.state.fn} was interrupted; trainer.interrupted is True.")
        return True

    def _start(
        self, model: Any, sources: dict[str, Any], datamodule: Any, ckpt_path: Any, weights_only: bool | None,
        provided: bool = True,
    ) -> Session:  # fmt: skip
        """Everything before the first batch, in Lightning's order of hooks."""
        fn, strategy = self.state.fn, self._strategy
        assert fn is not None
        self._given, model = model, uncompiled(model)
        fitting = fn is TrainerFn.FITTING
        named = ckpt_path or self._ckpt_path
        path = self._checkpoint_path(ckpt_path, provided)
        self._ckpt_path_named = path is not None and path == named
        if fitting:
            if model is not strategy.module:
                if self.progress.batches:
                    warn_of_memory(self._callbacks)
                self.progress.reset()
                self.history = History()
            if not self._bounds_known:  # taken from the arguments once: afterwards they can be set on the loop
                self.fit_loop.min_epochs, self.fit_loop.max_epochs = epoch_bounds(self.config)
                self._bounds_known = True
            self.fit_loop.renew()
        if not self._told_semantics and vintage.writes_2019(model):
            self.config = self.config.replace(semantics="leyden")
        self._datamodule = datamodule
        session = self._session = make_session(self, model, datamodule, sources, self._interrupt)
        self._recorder, session.compiler = session.recorder, getattr(self._given, "dynamo_ctx", None)
        session.undo = vintage.adapt(session, self._vintage)
        self._dated = session.undo is not None
        strategy.connect(model)
        self._callbacks = resolve.merge_callbacks(self._callbacks, model.configure_callbacks())
        check(session, fn)
        if self._profiler is not None:
            self._profiler.setup(stage=str(fn), local_rank=self.local_rank, log_dir=self.log_dir)
        checkpoint = self._read(path, weights_only) if path is not None else None
        session.checkpoint = checkpoint if fitting else None
        session.prepare_data()
        session.set_up(str(fn), self._callbacks)
        if checkpoint is not None:
            snapshot.restore_model(
                checkpoint, str(path), trainer=self, strategy=strategy, datamodule=datamodule,
                callbacks=self._callbacks, fitting=True,
            )  # fmt: skip
        self.results.clear()
        session.bind(self._callbacks, self._profiler)
        strategy.setup(self)
        strategy.distribute(fitting)
        compile_steps(session, fn)
        if fitting:
            # after the set-up: a callback may have asked for saving behind the training
            strategy.checkpoint_io.listen(self._interrupt.fail)
            configure_optimizers(session)
            strategy.accompany(self.fit_loop, model.automatic_optimization)
            session.hooks.on_fit_start()
        if self.config.enable_autolog_hparams and not self.config.barebones:
            log_hyperparams(self._loggers, model, datamodule)
        if checkpoint is not None and fitting:
            from leyden.loops import resume  # noqa: PLC0415  # only a run that goes on with another

            session.position = snapshot.restore_training(
                checkpoint, str(path), strategy=strategy, progress=self.progress, results=self.results,
                max_epochs=self.fit_loop.max_epochs,
            )  # fmt: skip
            resume.rewind(self._loggers)
            session.checkpoint = None
        if path is not None:
            rank_zero_info(f"{'Restored the run' if fitting else 'Loaded the weights'} from {path}.")
        model.zero_grad()
        if session.position is not None and session.position.window:
            session.optimization.load_state_dict(session.position.window)
        if strategy.agree_on(self._interrupt):
            self._interrupt.answer()  # it came while data were prepared, say
        return session

    def _read(self, path: Any, weights_only: bool | None) -> dict[str, Any]:
        safe = self.config.rule("loading") if weights_only is None else weights_only
        return snapshot.read(self._strategy, path, safe)

    def _checkpoint_path(self, given: Any, provided: bool) -> Any:
        """Resolve ``"best"``, ``"last"``, a path, or what ``trainer.ckpt_path`` was set to."""
        if self._ckpt_wish and given is not None:
            rank_zero_warn(
                f"trainer.ckpt_path is {self._ckpt_wish!r}, but {self.state.fn}(ckpt_path={given!r}) was called: that one"
                " is taken."
            )
            self._ckpt_wish = None
        given = self._ckpt_wish or given
        found = checkpoint_path(self, given, provided, self._cluster, self._vintage)
        self._ckpt_path = path = self._strategy.broadcast(found)  # other ranks may have seen the newest later
        return path

    def _sanity_check(self, session: Session) -> None:
        """Run a few validation batches ahead of training; they leave no trace in metrics, loggers or generators."""
        steps = self.config.num_sanity_val_steps
        if not self.enable_validation or not steps:
            return
        position = session.position
        if position is not None and (self.progress.batch_idx or self.progress.tail or position.opened):
            return
        with isolate_rng(), self.results.aside():
            self.state.stage = RunningStage.SANITY_CHECKING
            session.hooks.on_sanity_check_start()
            self.fit_loop.validation.run(session, RunningStage.SANITY_CHECKING)
            session.hooks.on_sanity_check_end()
            session.enter(RunningStage.TRAINING)

    def _end(self, session: Session | None, early: bool = False) -> None:
        """Everything after the last batch, when nothing went wrong; ``early``: a hook has ended the run before."""
        assert session is not None
        if self._strategy.agree_on(self._interrupt):
            self._interrupt.answer()  # it came too late for the loop, but whoever sent it wants to stop here
        fn = self.state.fn
        self._strategy.teardown()
        self.results.to_cpu()
        self.results.active = None
        if fn is TrainerFn.FITTING and not early:
            session.hooks.on_fit_end()
        session.tear_down(str(fn), self._callbacks)
        self._strategy.checkpoint_io.settle()
        session.recorder.close("success")
        if self._profiler is not None:
            _ = None if early else self._profiler.describe()
            self._profiler.teardown(stage=str(fn))

    def _fail(self, exception: BaseException) -> BaseException:
        """Tell everybody what the run ends with, and return that: ``exception``, or what it stands for."""
        from leyden.loops import leave  # noqa: PLC0415  # few runs end so

        self.state.status = TrainerStatus.INTERRUPTED
        ending = leave.ending(self, self._session, exception, self._interrupt)
        try:
            if self._session is not None:
                leave.tell(self, ending, self._interrupt)
            leave.leave(self, self._session, self._cluster, self._interrupt)
        finally:
            if self._recorder is not None:
                self._recorder.close("failed", reraise=False)
            if self._session is not None:
                self._strategy.teardown()
                if self._profiler is not None:
                    self._profiler.teardown(stage=str(self.state.fn))
        return ending

    def _release(self) -> None:
        """Let go of the session: nothing that a run made outlives it."""
        session, self._session, self._recorder = self._session, None, None
        self._strategy.checkpoint_io.listen(None)
        self.results.active = None
        self.results.train.clear()
        self.results.eval.clear()
        self.state.stage = None
        self.fit_loop.release()
        if session is not None:
            session.release(self._callbacks)

    # ------------------------------------------------------------------ checkpoints and the rest

    def save_checkpoint(
        self, filepath: str | os.PathLike[str], weights_only: bool | None = None, storage_options: Any = None
    ) -> None:
        """Write a checkpoint of where the run stands: atomically, or not at all.

        While a fit saves asynchronously, it returns as soon as a snapshot is taken; otherwise when the file is complete.

        Args:
            filepath: Where.
            weights_only: True leaves out optimizers, schedules, callbacks and generators.
            storage_options: For fsspec, where ``filepath`` is remote.

        Raises:
            AttributeError: before the first run, when there is no module.
            CheckpointError: when the file cannot be written.
        """
        if self.lightning_module is None:
            raise AttributeError("Trainer.save_checkpoint(): this Trainer has no module yet. Run fit first.")
        checkpoint_io = self._strategy.checkpoint_io
        checkpoint_io.settle()  # a failed save changes what the state of its callback says
        if self._recorder is not None and not weights_only and any(map(keeps_position, self._loggers)):
            self._recorder.settle()  # the checkpoint says how far the logs reach
        with self.results.inside("on_save_checkpoint"):
            checkpoint = snapshot.gather(
                trainer=self,
                strategy=self._strategy,
                progress=self.progress,
                fit_loop=self.fit_loop,
                datamodule=self._datamodule,
                callbacks=self._callbacks,
                optimization=self._session.optimization if self._session is not None else None,
                weights_only=bool(weights_only),
                version=__version__,
                name=os.path.basename(os.fspath(filepath)),
            )
        if self._cluster is not None:
            checkpoint["leyden"]["job"] = self._cluster.name_of_fit
        self._strategy.save_checkpoint(checkpoint, os.fspath(filepath), storage_options)
        if self._session is None or self.state.stopped:
            checkpoint_io.settle()  # nothing goes on that could use the time
        self._strategy.barrier("Trainer.save_checkpoint")

    def init_module(self, empty_init: bool | None = None) -> contextlib.AbstractContextManager[None]:
        """Build a module directly on the device and in the number format of this Trainer.

        Args:
            empty_init: True leaves the weights uninitialised (when a checkpoint follows).
        """
        return self._strategy.module_init_context(empty_init)
