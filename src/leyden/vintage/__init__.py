# SPDX-License-Identifier: Apache-2.0
"""The names of 2019 beside those of today: what the core has to know of them, and that only.

The core calls ``arguments`` where the Trainer is given a name it does not know, ``adapt`` where a run begins, and marks
its callbacks with ``signature``; its module and its Trainer derive from ``VintageModule`` and ``VintageTrainer``. All
else is in the files beside this one, which only those load who write the names of 2019:

    tables       the names, their defaults, what they are called today
    translate    arguments of the Trainer and of callbacks, turned into those of today
    run          adapters on a module, for the length of a run
    callbacks    norms of gradients, NaN gradients
    page         the page of the documentation that lists it all
"""

from __future__ import annotations

import functools
import inspect
import math
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MethodType
from typing import Any, Generic, TypeVar, cast

from leyden import files
from leyden.errors import CheckpointDamagedError
from leyden.hooks import is_written
from leyden.hparams import AttributeDict, constructor_kwargs, load_hparams_from_tags_csv, running_arguments
from leyden.loading import apply_state_dict

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

_SIGNS = (
    "tng_dataloader", "validation_end", "test_end", "update_tng_log_metrics", "on_tng_metrics",
    "on_pre_performance_check", "on_post_performance_check",
)  # fmt: skip
"""A module that writes one of these is one of 2019."""
_LATER_DROPPED = {
    "on_epoch_start": "on_train_epoch_start",
    "on_epoch_end": "on_train_epoch_end",
    "on_batch_start": "on_train_batch_start",
    "on_batch_end": "on_train_batch_end",
}
"""Hooks of 2019 that outlived it: a module of a later year may still write them, but nothing called them in the end."""


def arguments(old: Mapping[str, Any], given: dict[str, Any], hint: Callable[[str, Iterable[str]], str]) -> Any:
    """Change ``given``, the Trainer's arguments of today, to what ``old``, those of 2019, say; return what remains.

    ``hint`` says what to write in the place of a name that is unknown, given those that are known.

    Raises:
        TypeError: for a name that is neither of then nor of today.
        MisconfigurationException: for a value that cannot be, or for both names of one thing.
    """
    from leyden.vintage import translate  # noqa: PLC0415 - only who writes the names of 2019 loads them

    return translate.arguments(old, given, hint)


def adapt(session: Any, wishes: Any) -> Callable[[], None] | None:
    """Adapt the module of a run that is one of 2019; return what takes the adapters away, None if there are none.

    Args:
        session: The parts of the run; nothing is bound yet.
        wishes: What ``arguments`` returned for the Trainer; None if it was built with the arguments of today.
    """
    if wishes is None and not writes_2019(session.module):
        return None
    from leyden.vintage import run  # noqa: PLC0415 - only who writes the names of 2019 loads them

    return run.adapt(session, wishes, VintageModule)


def earlier_session(trainer: Any, wishes: Any) -> Any:
    """Return the checkpoint from which the first fit of a Trainer goes on by itself; None if there is none.

    That is the one of its cluster, in a job that continues another; or the newest that the version which its Experiment
    writes has: in the folder of the version, or in a folder of a callback and written since the version began.
    """
    if wishes is None or trainer.global_step or trainer.fast_dev_run:
        return None
    if (path := getattr(wishes.cluster, "ckpt_path", None)) is not None:
        return path
    if not wishes.restores or not trainer.log_dir:
        return None
    savers = [each for each in trainer.checkpoint_callbacks if not getattr(each, "save_weights_only", False)]
    if trainer.checkpoint_callbacks and not savers:
        return None  # training cannot go on from weights alone
    folders = [folder for each in savers if (folder := getattr(each, "dirpath", None))]
    # several versions may share a callback's folder
    began = getattr(trainer.logger, "began", math.inf)
    found, damaged = [], []
    for places, since in ((f"{trainer.log_dir}/checkpoints", -math.inf), (folders, began)):
        try:
            found.append(files.newest(places, since=since))
        except CheckpointDamagedError as error:  # the other may have a good one
            damaged.append(error)
    newest = max((path for path in found if path), key=lambda path: files.recorded_step(path) or 0, default=None)
    if newest is None and damaged:
        raise damaged[0]
    return newest


def writes_2019(module: Any) -> bool:
    """Whether a module, in its class or on the instance, writes one of the names that only 2019 knew."""
    return any(is_written(module, name, VintageModule) for name in _SIGNS)


def uncalled(module: Any) -> dict[str, str]:
    """The hooks of 2019 that a module of today writes, with the names under which they would be called."""
    if module.__dict__.get("_adapted"):
        return {}
    return {old: new for old, new in _LATER_DROPPED.items() if is_written(module, old, VintageModule)}


def signature(init: F) -> F:
    """Decorate the constructor of a callback: it can be called with the arguments that it took in 2019, too."""
    name = init.__qualname__.split(".")[0]

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        from leyden.vintage import translate  # noqa: PLC0415 - only who makes such a callback loads them

        call = args, dict(kwargs)
        if translate.is_dated(name, init, args, kwargs):
            args, kwargs = (), translate.callback_arguments(name, init, args, kwargs)
        elif translate.fits_both(name, args, kwargs):
            self._call = call  # what takes it tells the year: see translate.as_then
        init(self, *args, **kwargs)

    # inspect.getfullargspec looks here, not behind __wrapped__
    __init__.__signature__ = inspect.signature(init)  # type: ignore[attr-defined]
    return cast("F", __init__)


# --------------------------------------------------------------------------------------------- loaders


class data_loader:
    """Decorate a method that returns a loader: it is called once, when the loader is first needed.

    The method then reads as a property too: ``self.val_dataloader`` stands for the loader (its length, its items, its
    attributes), and ``self.val_dataloader()`` returns it.
    """

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make
        self.__doc__ = make.__doc__
        self.name = make.__name__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: Any, owner: type) -> Any:
        return self if module is None else LoaderHandle(self, module)

    def loader(self, module: Any) -> Any:
        """Return the loader of ``module``; make it, if this is the first time."""
        key = f"_loader_of_{self.name}"
        if key not in vars(module):
            vars(module)[key] = self.make(module)
        return vars(module)[key]


class LoaderHandle:
    """Stands for a loader that is made when it is first needed; calling it returns the loader itself."""

    def __init__(self, method: data_loader, module: Any) -> None:
        self._method, self._module = method, module

    def __call__(self) -> Any:
        """Return the loader."""
        return self._method.loader(self._module)

    def __iter__(self) -> Iterator[Any]:
        return iter(self())

    def __len__(self) -> int:
        return len(self())

    def __getitem__(self, index: Any) -> Any:
        return self()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copy and pickle probe for special methods
            raise AttributeError(name)
        return getattr(self(), name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._method.name} of {type(self._module).__name__})"


# --------------------------------------------------------------------------------------------- the module


class _Member(Generic[T]):
    """A member under its name of 2019 that gives way: what a user's module has under that name hides it."""

    def __init__(self, call: Callable[[Any], T], method: bool) -> None:
        self.call, self.method = call, method
        self.name, self.__doc__ = call.__name__, call.__doc__

    def __get__(self, module: Any, owner: type) -> Any:
        if module is None:
            return self
        # an attribute is found before this; a layer of that name is not, because torch keeps layers aside
        layers = vars(module).get("_modules", {})
        if self.name in layers:
            return layers[self.name]
        return MethodType(self.call, module) if self.method else self.call(module)


def _property(call: Callable[[Any], T]) -> _Member[T]:
    return _Member(call, method=False)


def _method(call: Callable[..., T]) -> _Member[T]:
    return _Member(call, method=True)


class _Tags(AttributeDict):
    """Hyperparameters from a csv file; one that is missing is an error that names the file."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            raise AttributeError(
                f"The model asks for the hyperparameter {name!r}, which the tags do not have ({error}). Add a line"
                f" '{name},<value>' to the file, or build the model by hand and load the weights with load_state_dict."
            ) from None


class VintageModule:
    """What a module had in 2019 and has no more. Hooks are no-ops here; writing one makes a module one of 2019."""

    _adapted = ()  # type: tuple[str, ...]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if writes_2019(self):
            self._keep_arguments()

    def _keep_arguments(self: Any) -> None:
        """Let ``hparams`` hold what the constructor was given; parts of the model are not hyperparameters."""
        passed = running_arguments(self)[1]
        bundle = passed.get("hparams")
        if isinstance(bundle, (Mapping, Namespace)):
            self.save_hyperparameters(bundle)
        else:
            parts = [name for name, value in passed.items() if hasattr(value, "state_dict")]
            self.save_hyperparameters(ignore=parts)

    @_property
    def experiment(self: Any) -> Any:
        """The Experiment of the Trainer, or what its first logger writes with; None if there is none."""
        return getattr(self.logger, "experiment", None)

    @_property
    def gradient_clip(self: Any) -> float:
        """Largest norm of the gradients; 0 for none."""
        return (self.trainer.config.gradient_clip_val or 0) if self.attached else 0

    @_method
    def summarize(self: Any) -> Any:
        """Print the layers, their sizes if ``example_input_array`` is set, and the totals; return the summary."""
        from leyden.summary import summarize  # noqa: PLC0415 - runs that show no summary need not wait for it

        summary = summarize(self)
        self.print(summary)
        return summary

    @_method
    def grad_norm(self: Any, norm_type: float) -> dict[str, float]:
        """Return the norm of each parameter's gradient, ``grad_<p>_norm_<parameter>``, and ``grad_<p>_norm_total``."""
        from leyden.vintage.callbacks import gradient_norms  # noqa: PLC0415 - only who writes the names of 2019 loads it

        return gradient_norms(self, float(norm_type))

    @classmethod
    def load_from_metrics(
        cls: Any, weights_path: Any, tags_csv: Any, on_gpu: bool = False, map_location: Any = None
    ) -> Any:
        """Build the model from the ``meta_tags.csv`` of an Experiment, and load its weights.

        Args:
            weights_path: A checkpoint.
            tags_csv: The hyperparameters. A constructor with an argument ``hparams`` gets them all as one object.
            on_gpu: Whether the weights stay on the GPU that they were saved from; else they come to the CPU.
            map_location: Where to put the weights, as in ``torch.load``; wins over ``on_gpu``.

        Raises:
            MisconfigurationException: if the file lacks an argument of the constructor.
            CheckpointError: if the weights are missing or damaged, or do not fit.
        """
        tags = load_hparams_from_tags_csv(tags_csv)
        if "hparams" in inspect.signature(cls.__init__).parameters:
            kwargs = {"hparams": _Tags({**tags, "on_gpu": on_gpu})}
        else:
            kwargs = constructor_kwargs(cls, {**tags, "on_gpu": on_gpu}, {}, source=str(tags_csv))
        module = cls(**kwargs)
        location = map_location if map_location is not None else None if on_gpu else "cpu"
        checkpoint = files.load(weights_path, map_location=location)
        module.on_load_checkpoint(checkpoint)
        apply_state_dict(module, checkpoint["state_dict"], module.strict_loading, str(weights_path))
        return module

    @staticmethod
    def add_model_specific_args(parent_parser: Any, root_dir: Any = None) -> Any:  # noqa: ARG004 - for overrides
        """Add the model's options to a parser, and return it; ``root_dir`` is for paths among them."""
        return parent_parser

    def tng_dataloader(self: Any) -> Any:
        """Return the training batches."""
        raise NotImplementedError(f"{type(self).__name__} has no training batches.")

    def validation_end(self, outputs: list[Any]) -> dict[str, Any] | None:
        """Return what is to be shown, logged and monitored of a validation; ``outputs`` is what its steps returned.

        With several loaders ``outputs`` is a list for each of them.
        """

    def test_end(self, outputs: list[Any]) -> dict[str, Any] | None:
        """The same for a test."""

    def update_tng_log_metrics(self, logs: dict[str, float]) -> dict[str, Any]:
        """Return the row that is to be logged; ``logs`` is the row as it is."""
        return logs

    def on_tng_metrics(self, metrics: dict[str, float]) -> None:
        """Called with a row of training that is about to be logged; change it in place."""

    def on_epoch_start(self) -> None:
        """Called when a training epoch begins."""

    def on_epoch_end(self) -> None:
        """Called when a training epoch ends."""

    def on_batch_start(self, batch: Any) -> int | None:
        """Called before a training step; return -1 to end the epoch here."""

    def on_batch_end(self) -> None:
        """Called after a training step and its update."""

    def on_pre_performance_check(self) -> None:
        """Called before a validation."""

    def on_post_performance_check(self) -> None:
        """Called after a validation."""

    def on_hpc_save(self, checkpoint: dict[str, Any]) -> None:
        """Put extra state into the checkpoint that is written when the walltime of a cluster ends."""

    def on_hpc_load(self, checkpoint: dict[str, Any]) -> None:
        """Take extra state out of the checkpoint from which the next job goes on."""


class VintageTrainer:
    """What a Trainer had in 2019 and has no more."""

    @property
    def tng_tqdm_dic(self: Any) -> dict[str, float]:
        """The metrics of the progress bar."""
        metrics: dict[str, float] = self.progress_bar_metrics
        return metrics
