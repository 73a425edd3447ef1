# SPDX-License-Identifier: Apache-2.0
"""The beginning of a run: what was given is recognised, checked before anything runs, and gathered into a session."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable
from typing import Any

from leyden import vintage
from leyden.callback import Callback
from leyden.config import TrainerConfig, resolve_limits
from leyden.datamodule import LightningDataModule
from leyden.errors import LeydenWarning, MisconfigurationException, PossibleUserWarning, RemovedHookError
from leyden.hooks import is_written, misspelt
from leyden.hparams import CLASS_PATH, logs_hparams
from leyden.loggers.recorder import Recorder
from leyden.loops.batches import has_source, positional
from leyden.loops.optimize import Optimization
from leyden.loops.rows import Rows
from leyden.loops.session import STEPS, Session
from leyden.module import LightningModule
from leyden.optim import NoOptimizer, normalize
from leyden.runtime.ranks import rank_zero_info, rank_zero_warn
from leyden.strategies.verbs import is_own, replace_optimizers
from leyden.types import TrainerFn

_REMOVED = {
    "training_epoch_end": "on_train_epoch_end",
    "validation_epoch_end": "on_validation_epoch_end",
    "test_epoch_end": "on_test_epoch_end",
}
_STEPS = {
    TrainerFn.FITTING: ("training_step", "train"),
    TrainerFn.VALIDATING: ("validation_step", "val"),
    TrainerFn.TESTING: ("test_step", "test"),
    TrainerFn.PREDICTING: ("predict_step", "predict"),
}


def unwrap(model: Any, datamodule: Any, loaders: Any, more: Any = None) -> tuple[Any, Any, Any]:
    """Recognise the arguments of an entry point: a compiled module, a data module in the place of loaders.

    A compiled module is returned as it was given.

    Raises:
        TypeError: for something that is no LightningModule.
        MisconfigurationException: for loaders and a data module at once.
    """
    module = uncompiled(model)
    if isinstance(module, type):
        raise TypeError(f"The model is the class {module.__name__}; pass an object of it: {module.__name__}(...).")
    if not isinstance(module, LightningModule):
        from leyden.loops.foreign import of_another  # noqa: PLC0415  # the run ends here

        raise TypeError(
            of_another(module)
            or f"The model must be a `LightningModule`, got `{type(model).__qualname__}` of {type(model).__module__}. Derive"
            " its class from leyden.LightningModule and write training_step and configure_optimizers."
        )
    if datamodule is not None and (isinstance(datamodule, type) or not callable(getattr(datamodule, "setup", None))):
        shown = f"the class {datamodule.__name__}" if isinstance(datamodule, type) else repr(datamodule)
        raise TypeError(f"The datamodule must be a LightningDataModule object; it is {shown}.")
    if _is_data_module(loaders):
        if datamodule is not None:
            raise MisconfigurationException("Two data modules were given: one in the place of the loaders. Give one.")
        loaders, datamodule = None, loaders
    if (loaders is not None or more is not None) and datamodule is not None:
        raise MisconfigurationException("Both loaders and a datamodule were given. Give one of the two.")
    return model, datamodule, loaders


def _is_data_module(given: Any) -> bool:
    """Whether it is a data module, ours or another library's, which works by its methods."""
    return any(cls.__name__ == "LightningDataModule" for cls in type(given).__mro__)


def uncompiled(model: Any) -> Any:
    """Return the module in what torch.compile returned for it: the loops and checkpoints want the module itself."""
    return getattr(model, "_orig_mod", model)


def compile_steps(session: Session, fn: TrainerFn) -> None:
    """Compile the steps of a run, if the Trainer says so, or the user has compiled the module or one of its steps."""
    wanted = session.config.compile
    steps = [getattr(session.module, name) for name in STEPS[fn]]
    if wanted or session.compiler is not None or any(hasattr(step, "_torchdynamo_orig_callable") for step in steps):
        from leyden.loops.speed.compiled import Compilation  # noqa: PLC0415  # loads all of torch's compiler

        session.compilation = Compilation(session, fn)


def make_session(
    trainer: Any, module: LightningModule, datamodule: Any, sources: dict[str, Any], interrupt: Any
) -> Session:
    """Gather the parts of a run on ``trainer``."""
    module.trainer = trainer
    if datamodule is not None:
        datamodule.trainer = trainer
    recorder = Recorder(trainer.loggers)
    session = Session(
        trainer=trainer,
        module=module,
        datamodule=datamodule,
        strategy=trainer.strategy,
        results=trainer.results,
        progress=trainer.progress,
        rows=Rows(trainer.history, recorder.put if trainer.loggers else None),
        recorder=recorder,
        interrupt=interrupt,
        sources=sources,
    )
    session.validates = is_written(module, "validation_step", LightningModule) and has_source(session, "val")
    return session


def configure_optimizers(session: Session) -> None:
    """Ask the module for its optimizers and hand them to the strategy."""
    module, config = session.module, session.config
    # the first optimizer of a process makes torch import a thousand modules; a third of that time is Python looking
    # through all of them for garbage, again and again
    collects = gc.isenabled()
    gc.disable()
    try:
        returned = module.configure_optimizers()
    finally:
        if collects:
            gc.enable()
    if returned is None:
        rank_zero_warn("configure_optimizers() returned `None`: this fit will run with no optimizer.")
        returned = NoOptimizer()
    optimizers, schedules = normalize(
        returned,
        automatic=module.automatic_optimization,
        custom_step=is_written(module, "lr_scheduler_step", LightningModule),
        bare_scheduler=config.rule("bare_scheduler"),
    )
    if len(optimizers) > 1 and module.automatic_optimization and config.rule("several_optimizers") == "manual only":
        raise MisconfigurationException(
            f"configure_optimizers() returned {len(optimizers)} optimizers; with semantics='lightning' that takes manual"
            " optimization: set self.automatic_optimization = False."
        )
    for optimizer in optimizers:
        if (fused := getattr(optimizer, "_leyden_fused", None)) is not None:
            fused.undo()  # by an earlier fit, which had the same object, or what this one wraps
    if config.fused_optimizers:
        from leyden.loops.speed.fused import fuse  # noqa: PLC0415  # only runs that ask for it

        fuse(optimizers, module)
    optimizers = session.strategy.precision.attach(module, optimizers, [each.scheduler for each in schedules])
    session.strategy.optimizers, session.strategy.lr_scheduler_configs = optimizers, schedules
    optimization = session.optimization = Optimization(session)
    session.strategy.set_optimizers(optimizers, schedules, optimization.step_with_closure, optimization.backward)
    if is_own(session.strategy, "setup_optimizers"):
        replace_optimizers(session.strategy, session.trainer)


def check(session: Session, fn: TrainerFn) -> None:
    """Everything that can be known to be wrong before anything runs.

    Raises:
        MisconfigurationException: naming what is missing or contradictory.
    """
    module, name = session.module, type(session.module).__name__
    step, prefix = _STEPS[fn]
    for old, new in _REMOVED.items():
        if callable(getattr(module, old, None)):
            raise RemovedHookError(
                f"Support for `{old}` has been removed: {name}.{old}() is not called any more. Keep what the steps"
                f" return in a list of your own and read it in {new}()."
            )
    _warn_misspelt(session)  # here: what is missing below may only be misspelt
    if fn is not TrainerFn.PREDICTING and not is_written(module, step, LightningModule):
        raise MisconfigurationException(
            f"No `{step}()` method defined to run `Trainer.{fn}`: write it in {name}, or a class that it derives from."
        )
    written = is_written(module, step, LightningModule)
    if fn is TrainerFn.PREDICTING and not written and type(module).forward is LightningModule.forward:
        raise MisconfigurationException(f"{name} has neither predict_step() nor forward(): write one of them.")
    steps = ("training_step", "validation_step") if fn is TrainerFn.FITTING else (step,)
    for wanted in steps:
        if is_written(module, wanted, LightningModule) and positional(getattr(module, wanted)) == 0:
            raise MisconfigurationException(
                f"{name}.{wanted}() takes no positional argument, so it cannot be given a batch. Write"
                f" {wanted}(self, batch, batch_idx)."
            )
    if not has_source(session, prefix):
        argument = "train_dataloaders" if prefix == "train" else "dataloaders"
        raise MisconfigurationException(
            f"There is no data for Trainer.{fn}(): pass {argument}= or datamodule=, or write"
            f" {name}.{prefix}_dataloader()."
        )
    if fn is TrainerFn.FITTING:
        _check_fit(session, name)


def _check_fit(session: Session, name: str) -> None:
    module, config = session.module, session.config
    if not is_written(module, "configure_optimizers", LightningModule):
        raise MisconfigurationException(
            f"No `configure_optimizers()` method defined in {name}: return an optimizer there, for example"
            " torch.optim.Adam(self.parameters(), lr=1e-3); or None to train without one."
        )
    has_step = is_written(module, "validation_step", LightningModule)
    has_data = has_source(session, "val")
    if has_data and not has_step:
        rank_zero_warn(
            f"You passed in a `val_dataloader` but have no `validation_step` in {name}: no validation runs.",
            category=PossibleUserWarning,
        )
    if has_step and not has_data:
        rank_zero_warn(
            f"You defined a `validation_step` but have no `val_dataloader` in {name}: no validation runs. Pass"
            " val_dataloaders= or write val_dataloader().",
            category=PossibleUserWarning,
        )
    if not module.automatic_optimization:
        if config.gradient_clip_val:
            raise MisconfigurationException(
                f"Trainer(gradient_clip_val={config.gradient_clip_val}) does nothing under manual optimization: call"
                " self.clip_gradients(optimizer, gradient_clip_val=..., gradient_clip_algorithm=...) before"
                " optimizer.step() in training_step."
            )
        if config.accumulate_grad_batches != 1:
            raise MisconfigurationException(
                f"Trainer(accumulate_grad_batches={config.accumulate_grad_batches}) does nothing under manual"
                " optimization: call optimizer.step() only every n batches in training_step."
            )


def _warn_misspelt(session: Session) -> None:
    owners: list[tuple[Any, str, type]] = [(session.module, "M", LightningModule)]
    owners += [(callback, "C", Callback) for callback in session.trainer.callbacks if isinstance(callback, Callback)]
    if isinstance(session.datamodule, LightningDataModule):
        owners.append((session.datamodule, "D", LightningDataModule))
    for old, new in vintage.uncalled(session.module).items():
        rank_zero_warn(
            f"{type(session.module).__name__}.{old}() is no hook any more, so nothing calls it. Write {new}().",
            category=LeydenWarning,
        )
    for owner, kind, base in owners:
        for wrong, suggestion in misspelt(owner, kind, base):
            if owner is session.module and wrong in session.strategy.calls:
                continue
            rank_zero_warn(
                f"{type(owner).__name__}.{wrong}() is no hook, so nothing calls it.{suggestion}", category=LeydenWarning
            )


def checkpoint_path(trainer: Any, given: Any, provided: bool, cluster: Any, dated: Any) -> Any:
    """Return the checkpoint that the run begins with, or None; a fit's loggers go on with its run, or begin a new one.

    Args:
        trainer: Whose run begins.
        given: A path, ``"best"``, ``"last"``, ``"hpc"``, or None.
        provided: Whether the entry point was given a module.
        cluster: What starts this job anew; None where nobody does.
        dated: The arguments of 2019; None where there are none.
    """
    fn = trainer.state.fn
    fitting = fn is TrainerFn.FITTING
    if given is None and fitting:
        given = vintage.earlier_session(trainer, dated)
    if fitting and os.environ.get("TORCHELASTIC_RUN_ID"):
        from leyden.loops.several import restarted  # noqa: PLC0415  # only under torchrun

        given = restarted.resume_point(trainer, given)
    if given == "hpc" or (cluster is not None and fitting):
        from leyden.loops import leave  # noqa: PLC0415  # only for jobs of a cluster

        given = leave.resume_point(trainer, given, cluster if fitting else None)
    if given is None and not fitting and not provided and getattr(trainer.checkpoint_callback, "best_model_path", None):
        given = "best"
        rank_zero_info(
            f"Trainer.{fn}() without a model takes the best weights. Pass the model for its weights as they are."
        )
    if given is None:
        return None
    from leyden.loops import resume  # noqa: PLC0415  # only a run that goes on with another

    path = resume.find_checkpoint(given, trainer)
    if fitting and path is None:
        resume.set_aside(trainer.loggers)
    elif fitting and trainer.config.rule("resumed_log") == "same version":
        resume.continue_runs(trainer.loggers, path)
    return path


def epoch_bounds(config: TrainerConfig) -> tuple[int | None, int]:
    """The bounds on epochs that the Trainer's arguments come to: the smallest and the largest number (-1: no bound)."""
    min_epochs, max_epochs, defaulted = resolve_limits(config)
    if defaulted:
        rank_zero_warn(
            "Trainer(max_epochs=None): nothing bounds this fit, so it stops after 1000 epochs. Say max_epochs=n, or"
            " max_epochs=-1 to train until you stop it."
        )
    return min_epochs, max_epochs


def warn_of_memory(callbacks: Iterable[Any]) -> None:
    """Warn, when a Trainer trains another module than before, of callbacks that remember the former one."""
    names = [type(callback).__name__ for callback in callbacks if is_written(callback, "state_dict", Callback)]
    if names:
        rank_zero_warn(
            f"Trainer.fit() got another module than last time. Its counters begin anew, but {', '.join(names)} go on with"
            " what they have seen of the other one (best scores and files, patience). Make a new Trainer for each module."
        )


def log_hyperparams(loggers: Iterable[Any], module: LightningModule, datamodule: Any) -> None:
    """Log the hyperparameters of the module and the data module, and the graph, where a logger wants them.

    A name that both have with different values is logged as ``datamodule/<name>`` for the data module.
    """
    loggers = list(loggers)
    if not loggers:
        return
    params: dict[str, Any] = dict(module.hparams_initial) if logs_hparams(module) else {}
    if datamodule is not None and logs_hparams(datamodule):
        for name, value in dict(datamodule.hparams_initial).items():
            clash = name in params and name != CLASS_PATH and not _same(params[name], value)
            params[f"datamodule/{name}" if clash else name] = value
    params.pop(CLASS_PATH, None)  # how to build the module again; it stays in the checkpoint
    for logger in loggers:
        if params:
            logger.log_hyperparams(params)
        logger.log_graph(module)
        logger.save()


def _same(first: Any, second: Any) -> bool:
    try:
        return first is second or bool(first == second)
    except (ValueError, RuntimeError):  # arrays and tensors have no single truth value
        return False
