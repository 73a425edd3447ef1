# SPDX-License-Identifier: Apache-2.0
"""The parser of ``LightningCLI``: jsonargparse's, which knows Trainers, modules, data modules, optimizers and schedulers."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, Union, cast, get_args

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from leyden.callback import Callback
from leyden.cli.origins import Origins, explain
from leyden.datamodule import LightningDataModule
from leyden.errors import MisconfigurationException
from leyden.module import LightningModule
from leyden.trainer import Trainer

KEEP_UNSET = {"skip_none": False}
"""The argument by which a parser's ``dump`` and ``save`` keep what is None; jsonargparse has given it another name."""

try:
    import jsonargparse
    from jsonargparse import set_parsing_settings

    # typed loosely: without jsonargparse there are stand-ins, and its own types differ between versions
    ArgumentParser: Any = jsonargparse.ArgumentParser
    Namespace: Any = jsonargparse.Namespace
    register_unresolvable_import_paths: Any = jsonargparse.register_unresolvable_import_paths
    ActionConfigFile: Any = vars(jsonargparse)["ActionConfigFile"]  # public, but not declared so for type checkers
    class_from_function: Any = vars(jsonargparse)["class_from_function"]
except ImportError as error:
    # a library may import our names and never make a command line
    MISSING: ImportError | None = error
    ArgumentParser, Namespace = object, dict
    ActionConfigFile = class_from_function = register_unresolvable_import_paths = None

else:
    MISSING = None
    register_unresolvable_import_paths(torch)  # functions such as torch.relu do not say where they are from
    set_parsing_settings(config_read_mode_fsspec_enabled=True)
    _SETTINGS = inspect.signature(set_parsing_settings).parameters
    if "unset_sentinel" in _SETTINGS:
        KEEP_UNSET = {"skip_unset": False}
    if "instantiate_subclass_spec_in_any" in _SETTINGS:
        # a class path for an argument without a type becomes an object, as it always did
        set_parsing_settings(instantiate_subclass_spec_in_any=True)


class ReduceLROnPlateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
    """PyTorch's scheduler, which also knows the name of the metric that it watches.

    Args:
        optimizer: Whose learning rates it lowers.
        monitor: The name of the metric, as it is logged.
        *args: As in PyTorch, and so are the others.
        **kwargs: The same.
    """

    def __init__(self, optimizer: Optimizer, monitor: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(optimizer, *args, **kwargs)
        self.monitor = monitor


LRSchedulerTypeTuple = (LRScheduler, ReduceLROnPlateau)
"""The bases of all schedulers that a command line takes, for ``isinstance``."""
# unions that are evaluated: jsonargparse reads them at run time, on Python 3.10 too
LRSchedulerTypeUnion = Union[LRScheduler, ReduceLROnPlateau]
LRSchedulerType = Union[type[LRScheduler], type[ReduceLROnPlateau]]
ArgsType = Union[list[str], dict[str, Any], Namespace, None]
"""What ``LightningCLI(args=...)`` takes: words of a command line, or settings by name."""
OptimizerCallable = Callable[[Iterable[Any]], Optimizer]
"""A parameter of this type gets a function that makes the optimizer, given parameters."""
LRSchedulerCallable = Callable[[Optimizer], Union[LRScheduler, ReduceLROnPlateau]]
"""A parameter of this type gets a function that makes the scheduler, given the optimizer."""

_FAMILIES = ("leyden.callbacks", "leyden.loggers", "leyden.profilers", "leyden.strategies", "leyden.precision")


def know_all_classes() -> None:
    """Import the callbacks, loggers and so on: a class has to be there to be found by its bare name."""
    for family in _FAMILIES:
        module = importlib.import_module(family)
        for name in module.__all__:
            try:
                getattr(module, name)
            except ImportError:  # its own library is not installed; who names it in full reads that
                continue


def require_jsonargparse() -> None:
    """Raise ModuleNotFoundError, which says what to install, if jsonargparse is not."""
    if MISSING is not None:
        raise ModuleNotFoundError(
            "LightningCLI needs jsonargparse: pip install 'leyden[cli]'.", name="jsonargparse"
        ) from MISSING


def make(parser: Any, config: Any, makers: Sequence[tuple[Any, Any, bool]] = ()) -> Any:
    """Return ``config`` with objects in the place of class paths.

    Args:
        parser: The parser that made it.
        config: The settings.
        makers: Functions that make the objects of some classes: the function, the class, and whether subclasses too.
    """
    if hasattr(parser, "instantiate"):
        return parser.instantiate(config, instantiators=list(makers))
    for maker, cls, subclasses in makers:  # jsonargparse before 4.49
        parser.add_instantiator(maker, cls, subclasses=subclasses)
    return parser.instantiate_classes(config)


class LightningArgumentParser(ArgumentParser):  # type: ignore[misc]
    """A parser whose arguments are those of classes: of the Trainer, modules, data modules, callbacks, optimizers.

    Args:
        *args: As in jsonargparse's ``ArgumentParser``, and so are ``kwargs``.
        description: What ``--help`` begins with.
        env_prefix: What the names of environment variables begin with, where they are read.
        default_env: Read environment variables: ``PL_FIT__TRAINER__MAX_EPOCHS`` for ``fit --trainer.max_epochs``.
        **kwargs: See ``args``.

    Raises:
        ModuleNotFoundError: if jsonargparse is not installed.
    """

    def __init__(
        self,
        *args: Any,
        description: str = "Lightning Trainer command line tool",
        env_prefix: str = "PL",
        default_env: bool = False,
        **kwargs: Any,
    ) -> None:
        require_jsonargparse()
        super().__init__(*args, description=description, env_prefix=env_prefix, default_env=default_env, **kwargs)
        self.callback_keys: list[str] = []
        self._optimizers: dict[str, tuple[type | tuple[type, ...], str]] = {}
        self._lr_schedulers: dict[str, tuple[type | tuple[type, ...], str]] = {}
        self.origins: Origins | None = None
        self.link_targets: list[str] = []

    @property
    def optimizer_groups(self) -> dict[str, tuple[type | tuple[type, ...], str]]:
        """The groups that ``add_optimizer_args`` made: key, class or classes, and where they are linked to."""
        return self._optimizers

    @property
    def lr_scheduler_groups(self) -> dict[str, tuple[type | tuple[type, ...], str]]:
        """The groups that ``add_lr_scheduler_args`` made, in the same form."""
        return self._lr_schedulers

    @property
    def subcommand_parsers(self) -> dict[str, Any]:
        """The parsers of the subcommands, by their names."""
        action = self._subcommands_action
        return {} if action is None else dict(action.choices)

    @property
    def destinations(self) -> list[str]:
        """The keys of all settings, such as ``trainer.max_epochs``, and of the subcommands."""
        return [action.dest for action in self._actions] + list(self.subcommand_parsers)

    @property
    def options(self) -> list[str]:
        """All options, such as ``--trainer.max_epochs``."""
        return [option for action in self._actions for option in action.option_strings]

    def classes_for(self, key: str) -> list[str]:
        """Return the names of the classes that the setting ``key`` takes, as far as they are imported."""
        hint = next((getattr(action, "_typehint", None) for action in self._actions if action.dest == key), None)
        return sorted(_class_names(hint))

    def add_lightning_class_args(
        self,
        lightning_class: Callable[..., Any] | type[Trainer | LightningModule | LightningDataModule | Callback],
        nested_key: str,
        subclass_mode: bool = False,
        required: bool = True,
    ) -> list[str]:
        """Add the arguments of a class, or of a function that returns an object of it.

        Args:
            lightning_class: A Trainer, module, data module or callback.
            nested_key: The group: arguments are ``--<nested_key>.<name>``.
            subclass_mode: Take any subclass, by ``class_path`` and ``init_args``.
            required: Whether the group has to be given, in subclass mode.

        Returns:
            The names of the arguments.

        Raises:
            MisconfigurationException: for anything else.
        """
        target: Any = lightning_class
        if callable(target) and not isinstance(target, type):
            target = class_from_function(target)
        if not (
            isinstance(target, type) and issubclass(target, (Trainer, LightningModule, LightningDataModule, Callback))
        ):
            raise MisconfigurationException(
                f"Cannot add arguments from: {lightning_class!r}. It must be a Trainer, LightningModule,"
                " LightningDataModule or Callback, or a function whose annotation says that it returns one."
            )
        if issubclass(target, Callback):
            self.callback_keys.append(nested_key)
        if subclass_mode:
            added = self.add_subclass_arguments(target, nested_key, fail_untyped=False, required=required)
        else:
            # the Trainer is made by LightningCLI.instantiate_trainer
            made = not issubclass(target, Trainer)
            added = self.add_class_arguments(target, nested_key, fail_untyped=False, instantiate=made, sub_configs=True)
        return cast("list[str]", added)

    def add_optimizer_args(
        self,
        optimizer_class: type[Optimizer] | tuple[type[Optimizer], ...] = (Optimizer,),
        nested_key: str = "optimizer",
        link_to: str = "AUTOMATIC",
    ) -> None:
        """Add the arguments of an optimizer.

        Args:
            optimizer_class: One class, or a tuple: any subclass of these.
            nested_key: The group.
            link_to: ``"AUTOMATIC"`` makes ``configure_optimizers`` of it; else the argument that gets it.
        """
        self._check(optimizer_class, (Optimizer,), "add_optimizer_args(optimizer_class=")
        self._add_part(optimizer_class, nested_key, "params")
        self._optimizers[nested_key] = (optimizer_class, link_to)

    def add_lr_scheduler_args(
        self,
        lr_scheduler_class: Any = LRSchedulerTypeTuple,
        nested_key: str = "lr_scheduler",
        link_to: str = "AUTOMATIC",
    ) -> None:
        """Add the arguments of a learning-rate scheduler; as ``add_optimizer_args``.

        Args:
            lr_scheduler_class: One class, or a tuple: any subclass of these. ReduceLROnPlateau is the one of this module.
            nested_key: The group.
            link_to: ``"AUTOMATIC"`` makes ``configure_optimizers`` of it; else the argument that gets it.
        """
        self._check(lr_scheduler_class, LRSchedulerTypeTuple, "add_lr_scheduler_args(lr_scheduler_class=")
        self._add_part(lr_scheduler_class, nested_key, "optimizer")
        self._lr_schedulers[nested_key] = (lr_scheduler_class, link_to)

    def _check(self, given: Any, bases: tuple[type, ...], argument: str) -> None:
        classes = given if isinstance(given, tuple) else (given,)
        if not all(isinstance(cls, type) and issubclass(cls, bases) for cls in classes):
            allowed = " or ".join(f"{base.__module__}.{base.__qualname__}" for base in bases)
            raise AssertionError(f"{argument}{given!r}) is not valid: it must be a subclass of {allowed}, or a tuple.")

    def _add_part(self, cls: Any, nested_key: str, skip: str) -> None:
        options: dict[str, Any] = {"instantiate": False, "fail_untyped": False, "skip": {skip}}
        if isinstance(cls, tuple):
            self.add_subclass_arguments(cls, nested_key, **options)
        else:
            self.add_class_arguments(cls, nested_key, sub_configs=True, **options)

    def link_arguments(self, source: Any, target: str, *rest: Any, **kwargs: Any) -> None:
        """Compute the argument ``target`` of others, as jsonargparse does."""
        super().link_arguments(source, target, *rest, **kwargs)
        self.link_targets.append(target)

    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any) -> Any:
        """Parse the words of a command line, as jsonargparse does; remember what they say, for errors and origins."""
        self.origins = Origins(self, args)
        return super().parse_args(args, *rest, **kwargs)

    def parse_object(self, obj: Any, *rest: Any, **kwargs: Any) -> Any:
        """Parse settings that are given as a dict or namespace."""
        if self.origins is None:
            self.origins = Origins(self, obj)
        return super().parse_object(obj, *rest, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the program (status 2) with what is wrong, where it is written and what was perhaps meant."""
        root: Any = self
        while getattr(root, "parent_parser", None) is not None:
            root = root.parent_parser
        super().error(explain(message, root, self), ex)
        raise AssertionError("unreachable")  # jsonargparse's error does not return


def _class_names(hint: Any) -> set[str]:
    if isinstance(hint, type) and hint.__module__ != "builtins" and not get_args(hint):
        below: list[Any] = type.__subclasses__(hint)
        return {hint.__name__}.union(*(_class_names(cls) for cls in below))
    parts: set[str] = set()
    return parts.union(*(_class_names(part) for part in get_args(hint)))


__all__ = [
    "ActionConfigFile",
    "ArgsType",
    "KEEP_UNSET",
    "ArgumentParser",
    "LRSchedulerCallable",
    "LRSchedulerType",
    "LRSchedulerTypeTuple",
    "LRSchedulerTypeUnion",
    "LightningArgumentParser",
    "Namespace",
    "OptimizerCallable",
    "ReduceLROnPlateau",
    "class_from_function",
    "know_all_classes",
    "make",
    "register_unresolvable_import_paths",
    "require_jsonargparse",
]
