# SPDX-License-Identifier: Apache-2.0
"""One short, timed fit of copies of a user's objects, with a change to try: what the advisor compares with others."""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from leyden.callback import Callback
from leyden.checkpoint_io.base import TorchCheckpointIO
from leyden.data.generators import find
from leyden.data.loaders import stop_workers
from leyden.datamodule import LightningDataModule
from leyden.errors import MisconfigurationException
from leyden.hooks import is_written
from leyden.loggers.base import DummyLogger
from leyden.precision import make_precision
from leyden.runtime.seed import set_rng_state
from leyden.tree import leaves, tree_map

WARM = 3
"""So many updates at the beginning of a fit are not counted."""
FEWEST = 4
"""So many updates are counted at least, however long they take."""
LOSSES = 20
"""So many losses are remembered."""
LARGE = 64_000_000
"""Bytes. Data sets that come to more are not copied for each fit: it reads from the user's own."""
_DEPTH, _WIDTH = 8, 64
_TRAINING = ("GradientAccumulationScheduler", "BaseFinetuning", "StochasticWeightAveraging", "WeightAveraging")
"""Callbacks that are part of the training itself. What others do is theirs: they show, write, watch, or stop."""


@dataclass(frozen=True)
class Change:
    """What a trial changes: arguments of the Trainer, and two things that the user would write."""

    arguments: Mapping[str, Any] = field(default_factory=dict)
    channels_last: bool = False
    tf32: bool = False

    def __or__(self, other: Change) -> Change:
        return Change(
            {**self.arguments, **other.arguments}, self.channels_last or other.channels_last, self.tf32 or other.tf32
        )

    def lines(self) -> list[str]:
        """What is to be written for it, a line each."""
        found = []
        if self.arguments:
            found.append(f"Trainer({', '.join(f'{name}={value!r}' for name, value in self.arguments.items())})")
        if self.tf32:
            found.append('torch.set_float32_matmul_precision("high")')
        if self.channels_last:
            found.append("model.to(memory_format=torch.channels_last), and images too")
        return found


@dataclass
class Trial:
    """What a timed fit measured.

    Attributes:
        step: Seconds of an update, the wait for its data included.
        startup: Seconds from the call of fit to the end of the first update.
        wait: The share of the time in which the loop waited for a batch.
        memory: The most bytes that tensors took on a CUDA device; None elsewhere.
        losses: Of the first batches; empty where a step returns none.
        workers: How many load the data, in the loader that has the most; None where there is no DataLoader.
        said: What was said in it, and warned of.
    """

    step: float
    startup: float
    wait: float
    memory: int | None
    losses: list[float]
    workers: int | None
    said: list[str]


class Enough(BaseException):
    """Ends a fit that has been timed long enough; no Exception, so that no code of the user's takes it for a failure."""


class Stopwatch(Callback):
    """Takes the time of each update, from the end of one to the end of the next, and ends the fit."""

    order: ClassVar[int] = 10_000  # after all others

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self.marks: list[Any] = []
        self.losses: list[Tensor] = []
        self.begun = time.perf_counter()
        self.startup = 0.0
        self.wait = 0.0
        self.workers: int | None = None
        self._until = float("inf")
        self._ended: float | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Let schedules do without the metrics of a validation, which does not run."""
        for schedule in trainer.lr_scheduler_configs:
            schedule.strict = False

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Add up the wait for this batch."""
        if self._ended is not None:
            self.wait += time.perf_counter() - self._ended

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note the time, where an update has ended, and the loss."""
        if len(self.losses) < LOSSES:
            # of several losses the first; a copy, for a captured graph writes each loss to the same place
            found = [
                loss for loss in leaves(dict(outputs).get("loss")) if isinstance(loss, Tensor) and loss.numel() == 1
            ]
            self.losses += [loss.detach().clone() for loss in found[:1]]
        if not trainer.fit_loop.steps:
            return
        self.marks.append(self._mark())
        now = time.perf_counter()
        counted = len(self.marks) - 1 - WARM
        if counted == -WARM:
            self._settle()
            self.startup = time.perf_counter() - self.begun
        if counted == 0:
            self._until = now + self.seconds
        if counted >= FEWEST and now >= self._until:
            raise Enough
        if counted >= 0:
            self._ended = now

    def _mark(self) -> Any:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            return event
        self._settle()
        return time.perf_counter()

    def _settle(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def intervals(self) -> list[float]:
        """The seconds of each update that counts; those of a fit that was too short to warm up, but for its first half."""
        self._settle()
        pairs = list(zip(self.marks, self.marks[1:], strict=False))[min(WARM, len(self.marks) // 2) :]
        if self.device.type == "cuda":
            return [first.elapsed_time(second) / 1000 for first, second in pairs]
        return [second - first for first, second in pairs]


def typical(intervals: list[float]) -> float:
    """The time of an update: the median over blocks, since workers deliver batches in bursts and epochs begin slowly."""
    size = max(FEWEST, len(intervals) // 8)
    starts = range(0, max(len(intervals) - size + 1, 1), size)
    return statistics.median(statistics.fmean(intervals[start : start + size]) for start in starts)


# --------------------------------------------------------------------------------------------- copies


class Originals:
    """What the user gave, of which each trial gets copies.

    Args:
        module: The module.
        datamodule: The data module, or None.
        loaders: The training loaders, or None.
        callbacks: Of the Trainer; those that belong to the training are copied too.
        rng: The state of the random generators in which each trial begins.
    """

    def __init__(
        self, module: Any, datamodule: Any, loaders: Any, callbacks: list[Any], rng: Mapping[str, Any]
    ) -> None:
        kept = [callback for callback in callbacks if trains(callback)]
        self.parts: tuple[Any, Any, Any, list[Any]] = (module, datamodule, loaders, kept)
        self.rng = rng

    def copies(self) -> tuple[Any, Any, Any, list[Any]]:
        """Return copies of the module, the data module, the loaders and the callbacks.

        Raises:
            MisconfigurationException: for something that cannot be copied.
        """
        data = list(_data_in(self.parts))
        memo: dict[int, Any] = {id(each): each for each in _large([*data, self.parts[2]])}
        for generator in find({str(n): part for n, part in enumerate([*self.parts, *data])}).values():
            if isinstance(generator, torch.Generator):
                memo[id(generator)] = torch.Generator(generator.device).set_state(generator.get_state())
        # the processes of persistent workers: only set aside, for they cannot be copied
        running = [(vars(each), vars(each)["_iterator"]) for each in data if vars(each).get("_iterator") is not None]
        try:
            for attributes, _ in running:
                attributes["_iterator"] = None
            module, datamodule, loaders, callbacks = copy.deepcopy(self.parts, memo)
        except Exception as error:
            raise MisconfigurationException(
                f"advise runs the fit on copies of the module, the data and the loaders, and something of them cannot be"
                f" copied (copy.deepcopy): {type(error).__name__}: {error}."
            ) from error
        finally:
            for attributes, iterator in running:
                attributes["_iterator"] = iterator
        configured = module.configure_callbacks
        vars(module)["configure_callbacks"] = lambda: [each for each in _several(configured()) if trains(each)]
        return module, datamodule, loaders, callbacks

    def set_up(self, trainer: Any) -> None:
        """Let a copy of the data module prepare its data, once for all trials, which go on from there.

        Args:
            trainer: What the copy finds as its ``trainer`` meanwhile.
        """
        _, datamodule, _, _ = self.copies()
        if datamodule is None:
            return
        datamodule.trainer = trainer
        datamodule.prepare_data()
        datamodule.setup("fit")
        for name in ("prepare_data", "setup", "teardown"):
            if is_written(datamodule, name, LightningDataModule):
                vars(datamodule)[name] = _nothing
        module, _, loaders, callbacks = self.parts
        self.parts = (module, datamodule, loaders, callbacks)


def _nothing(stage: Any = None) -> None:
    """Stands in for the set-up of a data module that is set up."""


def trains(callback: Any) -> bool:
    """Whether a callback belongs to the training itself."""
    return any(cls.__name__ in _TRAINING for cls in type(callback).__mro__)


def _several(given: Any) -> list[Any]:
    return list(given) if isinstance(given, (list, tuple)) else [given] if given else []


def _within(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values()) if len(value) <= _WIDTH else []
    if isinstance(value, (list, tuple)):
        return list(value) if len(value) <= _WIDTH else []
    attributes = getattr(value, "__dict__", None)
    plain = isinstance(value, (type, Callable)) and not isinstance(value, torch.nn.Module)  # type: ignore[arg-type]
    return list(attributes.values()) if isinstance(attributes, dict) and not plain else []


def _walk(root: Any) -> Iterator[Any]:
    """Yield what is within ``root``, some levels down, each once; not what is in tensors, arrays and long lists."""
    seen: set[int] = set()
    level = [root]
    for _ in range(_DEPTH):
        deeper: list[Any] = []
        for value in level:
            if id(value) in seen:
                continue
            seen.add(id(value))
            yield value
            if not isinstance(value, Tensor):
                deeper += _within(value)
        level = deeper


def _data_in(root: Any) -> Iterator[Any]:
    return (value for value in _walk(root) if isinstance(value, (DataLoader, Dataset)))


def _large(data: list[Any]) -> list[Any]:
    """Return the tensors, arrays and long lists of data sets, if together they are large."""
    sizes = {id(value): (value, size) for each in data for value in _walk(each) if (size := _size(value))}
    if sum(size for _, size in sizes.values()) <= LARGE:
        return []
    return [value for value, size in sizes.values() if size > LARGE // 64]


def _size(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (list, tuple, dict)):
        if len(value) <= _WIDTH:
            return 0
        first = next(iter(value.values() if isinstance(value, dict) else value))
        inner = first if isinstance(first, (list, tuple)) and len(first) <= _WIDTH else [first]
        return len(value) * sum(max(_size(each), sys.getsizeof(each)) for each in inner)
    size = getattr(value, "nbytes", 0)  # an array
    return size if isinstance(size, int) else 0


# --------------------------------------------------------------------------------------------- a trial


def like(trainer: Any, change: Change, folder: str) -> Any:
    """Return a new Trainer with the settings of ``trainer`` and a change, that logs, shows and writes nothing.

    Args:
        trainer: Stays as it is.
        change: What is different.
        folder: What it takes for its folder.
    """
    cls: Any = type(trainer)
    base: Any = next(each for each in cls.__mro__ if each.__module__ == "leyden.trainer")
    arguments = dict(change.arguments)
    name = arguments.pop("precision", None)
    strategy = copy.copy(trainer.strategy)
    strategy.module, strategy.optimizers = None, []
    strategy.lightning_optimizers, strategy.lr_scheduler_configs = [], []
    strategy.checkpoint_io = TorchCheckpointIO()
    strategy.precision = make_precision(name, strategy.root_device) if name else copy.deepcopy(strategy.precision)
    plugins = None
    if os.environ.get("SLURM_JOB_ID"):
        from leyden.runtime.cluster import SLURMEnvironment  # noqa: PLC0415  # only for jobs of a cluster

        plugins = SLURMEnvironment(auto_requeue=False)  # a trial goes on from no checkpoint, and requeues nothing
    found = cls.__new__(cls)  # the constructor of a subclass may take anything
    base.__init__(
        found, accelerator=trainer.accelerator, strategy=strategy, devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, plugins=plugins,
    )  # fmt: skip
    own, theirs = vars(found), vars(trainer)
    own.update({key: value for key, value in theirs.items() if key not in own and not hasattr(base, key)})
    own.update({key: theirs[key] for key in ("_vintage", "_told_semantics")})
    found.loggers = [DummyLogger() for _ in trainer.loggers]
    found.config = trainer.config.replace(
        limit_val_batches=0, num_sanity_val_steps=0, max_time=None, min_epochs=None, min_steps=None, **arguments
    )
    return found


def run(trainer: Any, originals: Originals, change: Change, seconds: float, folder: str) -> Trial:
    """Fit copies with a change for so many seconds after it has warmed up, and return what was measured.

    A fit that ends before is begun anew, so that its schedules are never asked for more than they plan.

    Raises:
        KeyboardInterrupt: after Ctrl-C.
        Exception: what the fit failed with.
        MisconfigurationException: for a fit that is too short to be timed.
    """
    device = trainer.strategy.root_device
    intervals: list[float] = []
    first: Stopwatch | None = None
    startup = wait = 0.0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    with _listening() as said:
        while True:
            watch = Stopwatch(device, seconds)
            _fit(trainer, originals, change, watch, folder)
            fresh = watch.intervals()
            intervals += fresh
            wait += watch.wait
            if first is None:
                first, startup = watch, watch.startup
            if not fresh:
                raise MisconfigurationException(
                    f"The fit ends after {len(watch.marks)} updates, which is too short to be timed. Give it more data, or"
                    " larger bounds (max_epochs, max_steps, limit_train_batches)."
                )
            long = sum(intervals) >= 0.9 * seconds or time.perf_counter() - start > 2 * seconds
            if len(intervals) >= FEWEST and long:
                break
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    losses = [float(loss) for loss in first.losses]
    return Trial(typical(intervals), startup, min(wait / sum(intervals), 1.0), memory, losses, first.workers, said)


def _fit(trainer: Any, originals: Originals, change: Change, watch: Stopwatch, folder: str) -> None:
    set_rng_state(originals.rng)
    module, datamodule, loaders, callbacks = originals.copies()
    made = like(trainer, change, folder)
    made.callbacks = [*callbacks, watch]
    if change.channels_last:
        _lay_out(module, datamodule)
    matmul = torch.get_float32_matmul_precision()
    try:
        if change.tf32:
            torch.set_float32_matmul_precision("high")
        watch.begun = time.perf_counter()
        made.fit(module, train_dataloaders=loaders, datamodule=datamodule)
        if made.interrupted:
            raise KeyboardInterrupt
    except Enough:
        pass
    except SystemExit as ending:
        # with the semantics of Lightning that is how a run answers Ctrl-C
        if isinstance(ending.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        torch.set_float32_matmul_precision(matmul)
        flat = made.fit_loop.loader.flattened if made.fit_loop.loader is not None else []
        watch.workers = max((each.num_workers for each in flat if isinstance(each, DataLoader)), default=None)
        for loader in flat:
            stop_workers(loader)
        made.strategy.module = None
        del module, datamodule, loaders, callbacks, made, flat
        gc.collect()


def _lay_out(module: Any, datamodule: Any) -> None:
    """Let a module compute in channels_last, and give it images laid out so."""
    module.to(memory_format=torch.channels_last)
    name = "on_after_batch_transfer"
    owner = datamodule if datamodule is not None and is_written(datamodule, name, LightningDataModule) else module
    own = getattr(owner, name)

    def after(batch: Any, dataloader_idx: int) -> Any:
        return tree_map(
            lambda tensor: tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor,
            own(batch, dataloader_idx),
        )

    vars(owner)[name] = after


@contextlib.contextmanager
def _listening() -> Iterator[list[str]]:
    """Keep what is said and warned of from the user, and hand it over."""
    said: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        said.append(record.getMessage())
        return False

    logger = logging.getLogger("leyden")
    logger.addFilter(keep)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield said
    finally:
        logger.removeFilter(keep)
    passing = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
    said += [str(warning.message) for warning in caught if not issubclass(warning.category, passing)]
