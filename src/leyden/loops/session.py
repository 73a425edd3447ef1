# SPDX-License-Identifier: Apache-2.0
"""All that one run needs, gathered in one place: made when an entry point begins, dropped when it ends."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

from leyden.config import TrainerConfig
from leyden.datamodule import LightningDataModule
from leyden.hooks import is_written
from leyden.loggers.recorder import Recorder
from leyden.loops.dispatch import Hooks, bind
from leyden.loops.profiled import ProfiledStrategy
from leyden.loops.rows import Rows
from leyden.module import LightningModule
from leyden.precision import Precision
from leyden.progress import Progress
from leyden.results import Results
from leyden.signals import Interrupt
from leyden.strategies.base import Strategy
from leyden.strategies.verbs import calls_of, follow_steps, is_own
from leyden.types import RunningStage, TrainerFn, TrainerView

if TYPE_CHECKING:
    from leyden.data.resident import Shelf

STEPS = {
    TrainerFn.FITTING: ("training_step", "validation_step"),
    TrainerFn.VALIDATING: ("validation_step",),
    TrainerFn.TESTING: ("test_step",),
    TrainerFn.PREDICTING: ("predict_step",),
}
"""The steps that each kind of run takes."""
FORESEEN = "batches"
"""Under what ranks tell each other how many batches they have, before they meet."""
_LENT = ("log", "log_dict")
_TRANSFER = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class TrainerCore(TrainerView, Protocol):
    """What the loops may know of the Trainer, beyond what callbacks may."""

    config: TrainerConfig
    results: Results
    progress: Progress


class Owner:
    """A reference to a Trainer that does not keep it alive, and goes with it into a pickle."""

    def __init__(self, trainer: Any = None) -> None:
        self._found: Callable[[], Any] = (lambda: None) if trainer is None else weakref.ref(trainer)

    def __call__(self) -> Any:
        return self._found()

    def __reduce__(self) -> tuple[Any, ...]:
        return Owner, (self(),)


class Loop:
    """A loop of a Trainer."""

    owner = Owner()
    """Whose loop this is; set by the Trainer."""

    @property
    def trainer(self) -> Any:
        """The Trainer that this is a loop of, while there is one."""
        return self.owner()

    if not TYPE_CHECKING:  # a name that is not there stays an error to mypy

        def __getattr__(self, name: str) -> Any:
            """Answer names of Lightning's loops that libraries reach for."""
            from leyden.loops.lightning_names import view  # noqa: PLC0415  # only when such a name is asked for

            return view(self, name)


@dataclass
class Session:
    """The parts of one run. The loops read it; nothing keeps it after the run."""

    trainer: TrainerCore
    module: LightningModule
    datamodule: LightningDataModule | None
    strategy: Strategy
    results: Results
    progress: Progress
    rows: Rows
    recorder: Recorder
    interrupt: Interrupt
    sources: dict[str, Any] = field(default_factory=dict)
    """Loaders given to the entry point, by prefix ("train", "val", "test", "predict")."""
    hooks: Hooks = field(default_factory=Hooks)
    profiler: Any = None
    validates: bool = False
    """Whether this fit has all that a validation needs."""
    optimization: Any = None
    """The verbs of the fit, once the optimizers are configured."""
    compiler: Any = None
    """What the user has compiled the module with; None if he has not."""
    compilation: Any = None
    """What stands on the module while the run is compiled."""
    undo: Callable[[], None] | None = None
    """Takes away what was put on the module for the length of the run."""
    unfollow: Callable[[], None] | None = None
    """Takes away what follows the steps of a user's strategy."""
    checkpoint: dict[str, Any] | None = None
    """What a fit goes on from, until all of it is restored."""
    across: Any = None
    """What several processes tell each other where they meet; None for one process."""
    position: Any = None
    """Where a resumed fit stood in its data; None once it is there."""
    supplies: dict[str, Any] = field(default_factory=dict)
    """What the loops draw from, by prefix."""
    turns: int = 1
    """How many batches each process takes where it took one: the places of as many that are gone."""
    resized: bool = False
    """Whether updates have another number of samples than in the run that goes on."""
    update: dict[str, Any] | None = None
    """Of what an update is made, once the training loaders are known."""
    workers: dict[str, list[int | None]] = field(default_factory=dict)
    """How many workers were chosen for each loader, by prefix; None for one that has those that its owner gave it."""
    waits: Any = None
    """What measures the waits for data."""
    _shelf: Shelf | None = None

    @property
    def config(self) -> TrainerConfig:
        """The Trainer's knobs as they are now."""
        return self.trainer.config

    def enter(self, stage: RunningStage) -> None:
        """Say which loop runs now, and send ``self.log`` to it."""
        self.trainer.state.stage = stage
        if stage is RunningStage.TRAINING:
            self.results.active = self.results.train
        elif stage is RunningStage.PREDICTING:
            self.results.active = None
        else:
            self.results.active = self.results.eval

    def prepare_data(self) -> None:
        """Call ``prepare_data`` of the data module and the module, on one process of each machine, or on one of all."""
        strategy = self.strategy
        for owner, base in ((self.datamodule, LightningDataModule), (self.module, LightningModule)):
            if owner is None or not is_written(owner, "prepare_data", base):
                continue
            each = getattr(owner, "prepare_data_per_node", True)
            here = strategy.local_rank == 0 if each else strategy.is_global_zero
            strategy.prepare(f"{type(owner).__name__}.prepare_data()", owner.prepare_data, here)

    def set_up(self, stage: str, callbacks: list[Any]) -> None:
        """Call the ``setup`` hooks and let the module build itself."""
        module = self.module
        for logger in self.trainer.loggers:
            # hooks may ask for the name and folder of the run from here on
            begin = getattr(logger, "begin", None)
            _ = begin() if callable(begin) else getattr(logger, "experiment", None)
        self.agree_on_versions()
        if self.datamodule is not None:
            self.datamodule.setup(stage)
        for callback in callbacks:
            # a callback logs like the module does; taken back at the end of the run. What it calls log itself stays
            for name in _LENT:
                if not hasattr(callback, name):
                    setattr(callback, name, getattr(module, name))
            callback.setup(self.trainer, module, stage)
        module.setup(stage)
        self.strategy.barrier("post_setup")
        build = [
            name for name in ("configure_sharded_model", "configure_model") if is_written(module, name, LightningModule)
        ]
        if build and self.strategy.builds():
            with (
                self.strategy.model_sharded_context(),
                self.strategy.root_device,
                self.strategy.precision.init_context(),
            ):
                for name in build:
                    getattr(module, name)()

    def bind(self, callbacks: list[Any], profiler: Any) -> None:
        """Bind all hooks to the calls that somebody wrote, and send ``self.log`` to this run."""
        self.profiler = profiler
        theirs, self.unfollow = calls_of(self.strategy), follow_steps(self.strategy)
        if profiler is not None:
            self.strategy = cast("Strategy", ProfiledStrategy(self.strategy, profiler))
            if (attend := getattr(profiler, "attend", None)) is not None:
                attend(self.module)
        meet = self._across() if self.strategy.world_size > 1 else None
        self.hooks = bind(self.trainer, self.module, self.datamodule, callbacks, self.results, profiler, meet, theirs)
        if self.across is not None:
            from leyden.loops.several.same import facts  # noqa: PLC0415  # only for several processes

            self.across.bound(self.hooks, facts(self))
        if not self.config.barebones:
            self.module.log_into(self.results)

    def seconds_since(self, moment: float) -> float:
        """The time since ``moment`` of the monotonic clock; of several processes, whose clocks differ, that of rank 0."""
        return float(self.strategy.broadcast(time.monotonic() - moment))

    def agree_on_versions(self) -> None:
        """Let the loggers of all processes name the folder in which rank 0 logs."""
        if self.strategy.world_size == 1:
            return
        followers = [logger for logger in self.trainer.loggers if hasattr(logger, "follow")]
        mine = [logger.version for logger in followers] if self.strategy.is_global_zero else []
        for logger, version in zip(followers, self.strategy.broadcast(mine), strict=True):
            logger.follow(version)

    def agree_on_epoch(self) -> None:
        """Let all processes agree on the values of the training epoch that ends."""
        if self.across is not None:
            self.across.epoch(self.results.train)

    def agree_to_stop(self) -> None:
        """Let all processes stop if one of them wants to."""
        if self.across is not None:
            self.across.agree_to_stop()

    def _across(self) -> Callable[[], None]:
        from leyden.loops.several.across import Across  # noqa: PLC0415  # only for several processes

        local = self.config.rule("epoch_mean") == "local unless sync_dist"
        self.across = across = Across(self.strategy, self.results, self.trainer, local)
        return partial(across.after_hook, self.results.train, "on_train_epoch_end")

    def tear_down(self, stage: str, callbacks: list[Any]) -> None:
        """Call the ``teardown`` hooks."""
        if self.datamodule is not None:
            self.datamodule.teardown(stage)
        for callback in callbacks:
            callback.teardown(self.trainer, self.module, stage)
        self.module.teardown(stage)

    def release(self, callbacks: list[Any]) -> None:
        """Take back what the run lent out."""
        self.let_go()
        self.module.log_into(None)
        self.strategy.brings = None
        self.strategy.precision.detach()
        if self.compilation is not None:
            self.compilation.remove()
        if self._shelf is not None:
            self._shelf.release()
        for undo in filter(None, (self.undo, self.unfollow)):
            undo()
        for callback in callbacks:
            for name in _LENT:
                if getattr(vars(callback).get(name), "__self__", None) is self.module:
                    delattr(callback, name)

    def let_go(self) -> None:
        """Let go of what this session has made for itself alone."""
        if self.across is not None:
            self.across.close()
        if self._shelf is not None:
            self._shelf.release()

    def shelf(self, draws: bool = False) -> Shelf | None:
        """Return what keeps small data sets on the device for the length of the run; None where batches begin on the host.

        ``draws`` as for ``transfer``.
        """
        device = self.strategy.root_device
        if device.type == "cpu" or draws or _converts(self.strategy.precision) or not self.config.fast_data:
            return None
        # not from the hooks: loaders may be asked for before these are bound
        owners = ((self.datamodule, LightningDataModule), (self.module, LightningModule))
        if any(owner is not None and is_written(owner, name, base) for owner, base in owners for name in _TRANSFER):
            return None
        if self._shelf is None:
            from leyden.data.resident import Shelf  # noqa: PLC0415  # only where there is a device

            self._shelf = Shelf(device)
        return self._shelf

    def transfer(self, draws: bool = False) -> Callable[[Any, int], Any] | None:
        """Return the function that brings a batch to the device, or None if there is nothing to do.

        ``draws`` says that the step draws its batches itself; what it does with them is then its own affair.
        """
        if draws:
            return None
        strategy, module = self.strategy, self.module
        hooks = self.hooks
        before, move, after = (
            hooks.on_before_batch_transfer,
            hooks.transfer_batch_to_device,
            hooks.on_after_batch_transfer,
        )
        precision, device = strategy.precision, strategy.root_device
        converts = _converts(precision)
        own = is_own(strategy, "batch_to_device")
        if device.type == "cpu" and not (before or move or after or converts or own):
            return None  # loaders deliver host memory: nothing to move
        move_batch: Callable[..., Any] = move or module.transfer_batch_to_device
        if device.type == "cuda" and self.config.fast_data and not move and not own:
            from leyden.loops.speed.ahead import Ahead, Lane  # noqa: PLC0415  # only runs on CUDA copy batches ahead

            move_batch = ahead = Ahead(device, Lane(device))
            if not (before or after or converts):
                return ahead

        def bring(batch: Any, dataloader_idx: int = 0) -> Any:
            if converts:
                batch = precision.convert_input(batch)
            if before:
                batch = before(batch, dataloader_idx)
            if own:
                return strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)
            return arrive(batch, device, dataloader_idx)

        def arrive(batch: Any, device: Any, dataloader_idx: int) -> Any:
            batch = move_batch(batch, device, dataloader_idx)
            return after(batch, dataloader_idx) if after else batch

        if own:
            strategy.brings = arrive
        return bring


def _converts(precision: Precision) -> bool:
    return type(precision).convert_input is not Precision.convert_input
