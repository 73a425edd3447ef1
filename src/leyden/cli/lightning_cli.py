# SPDX-License-Identifier: Apache-2.0
"""``LightningCLI``: a command line for a module, its data and the Trainer, with configs; made by jsonargparse."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any, Union, cast

import torch
import yaml
from torch.optim import Optimizer

from leyden.cli.instantiate import instantiate_class as instantiate_class
from leyden.cli.instantiate import instantiate_module as instantiate_module
from leyden.cli.instantiate import require_safe
from leyden.cli.origins import annotated
from leyden.cli.parser import (
    KEEP_UNSET,
    ActionConfigFile,
    ArgsType,
    LightningArgumentParser,
    LRSchedulerTypeTuple,
    LRSchedulerTypeUnion,
    Namespace,
    ReduceLROnPlateau,
    class_from_function,
    know_all_classes,
    make,
    require_jsonargparse,
)
from leyden.cli.parser import LRSchedulerCallable as LRSchedulerCallable
from leyden.cli.parser import LRSchedulerType as LRSchedulerType
from leyden.cli.parser import OptimizerCallable as OptimizerCallable
from leyden.cli.save_config import SaveConfigCallback
from leyden.compat.configs import INSTANTIATOR, header
from leyden.config import SEMANTICS, default_semantics
from leyden.datamodule import LightningDataModule
from leyden.errors import MisconfigurationException
from leyden.hparams import CLASS_PATH, described_by
from leyden.hparams import INSTANTIATOR as INSTANTIATOR_KEY
from leyden.module import LightningModule
from leyden.plain import restore_hparams
from leyden.runtime.ranks import rank_zero_warn
from leyden.runtime.seed import seed_everything
from leyden.trainer import Trainer

_ORIGINS = "origins"


class LightningCLI:
    """A command line that makes a module, its data and a Trainer of arguments and configs, and runs them.

    ``python train.py fit --config run.yaml --model.lr 0.1 --trainer.max_epochs 5``. Needs ``pip install 'leyden[cli]'``.
    A value on the command line wins over one in a file, that over the checkpoint's hyperparameters, and those over
    defaults; ``--print_config=origins`` shows where each one comes from.

    Args:
        model_class: A LightningModule, or a function that returns one. None takes any, by ``--model NAME``.
        datamodule_class: The same for the data: ``--data NAME``, which may be left out.
        save_config_callback: Saves the config in the folder of the run; None saves none.
        save_config_kwargs: Its arguments.
        trainer_class: A Trainer, or a function that returns one.
        trainer_defaults: Defaults of its arguments. ``callbacks`` in it are there always, and no config has them.
        seed_everything_default: The default of ``--seed_everything``: a number, True for one that is chosen, False for none.
        parser_kwargs: Arguments of the parsers; those of one subcommand under its name.
        parser_class: A subclass of LightningArgumentParser.
        subclass_mode_model: Take any subclass of ``model_class``, by ``class_path`` and ``init_args``.
        subclass_mode_data: The same for ``datamodule_class``.
        args: Words, or settings by name, in the place of the process's own command line.
        run: Have subcommands (fit, validate, test, predict), and run the one that is named. False only makes the objects.
        auto_configure_optimizers: Have ``--optimizer`` and ``--lr_scheduler``, which make ``configure_optimizers``.
        load_from_checkpoint_support: Let ``save_hyperparameters`` keep what the config says of each argument, so that
            ``load_from_checkpoint`` can make objects among the arguments again.

    Attributes:
        config: All settings.
        config_init: The same, with objects in the place of their class paths.
        model: The module.
        datamodule: The data module, or None.
        trainer: The Trainer.
        parser: The parser at the top.
        subcommand: The subcommand that runs, or None.

    Raises:
        ModuleNotFoundError: if jsonargparse is not installed.
        SystemExit: with status 2 for arguments that are not right, after a message on standard error.
    """

    def __init__(
        self,
        model_class: type[LightningModule] | Callable[..., LightningModule] | None = None,
        datamodule_class: type[LightningDataModule] | Callable[..., LightningDataModule] | None = None,
        save_config_callback: type[SaveConfigCallback] | None = SaveConfigCallback,
        save_config_kwargs: dict[str, Any] | None = None,
        trainer_class: type[Trainer] | Callable[..., Trainer] = Trainer,
        trainer_defaults: dict[str, Any] | None = None,
        seed_everything_default: bool | int = True,
        parser_kwargs: dict[str, Any] | dict[str, dict[str, Any]] | None = None,
        parser_class: type[LightningArgumentParser] = LightningArgumentParser,
        subclass_mode_model: bool = False,
        subclass_mode_data: bool = False,
        args: ArgsType = None,
        run: bool = True,
        auto_configure_optimizers: bool = True,
        load_from_checkpoint_support: bool = True,
    ) -> None:
        require_jsonargparse()
        know_all_classes()
        self.save_config_callback = save_config_callback
        self.save_config_kwargs = save_config_kwargs or {}
        self.trainer_class = trainer_class
        self.trainer_defaults = trainer_defaults or {}
        self.seed_everything_default = seed_everything_default
        self.parser_kwargs = parser_kwargs or {}
        self.parser_class = parser_class
        self.auto_configure_optimizers = auto_configure_optimizers
        self.model_class = model_class
        self._model_class: Any = model_class or LightningModule
        self.subclass_mode_model = model_class is None or subclass_mode_model
        self.datamodule_class = datamodule_class
        self._datamodule_class: Any = datamodule_class or LightningDataModule
        self.subclass_mode_data = datamodule_class is None or subclass_mode_data
        self._prints_origins = False
        self._makers: list[tuple[Any, Any, bool]] = []

        self.setup_parser(run, *self._setup_parser_kwargs(self.parser_kwargs))
        self.parse_arguments(self.parser, args)
        self._parse_ckpt_path()
        self.subcommand: str | None = self.config["subcommand"] if run else None
        if self._prints_origins:
            self._print_origins()
        self._set_seed()
        if load_from_checkpoint_support:
            self._add_instantiators()
        self.before_instantiate_classes()
        self.instantiate_classes()
        self.after_instantiate_classes()
        if self.subcommand is not None:
            self._run_subcommand(self.subcommand)

    # ------------------------------------------------------------------ parsers

    def _setup_parser_kwargs(self, parser_kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        of_subcommands = {name: value for name, value in parser_kwargs.items() if name in self.subcommands()}
        return {name: value for name, value in parser_kwargs.items() if name not in of_subcommands}, of_subcommands

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make a parser that has nothing yet but ``--config``."""
        kwargs.setdefault("dump_header", [header()])
        parser = self.parser_class(**kwargs)
        parser.add_argument(
            "-c", "--config", action=ActionConfigFile, help="Path to a configuration file in json or yaml format."
        )
        return parser

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]
    ) -> None:
        """Make the parser, and those of the subcommands."""
        self.parser = self.init_parser(**main_kwargs)
        self._subcommand_parsers: dict[str, LightningArgumentParser] = {}
        self._subcommand_method_arguments: dict[str, list[str]] = {}
        if add_subcommands:
            self._add_subcommands(self.parser, **subparser_kwargs)
        else:
            self._add_arguments(self.parser)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--seed_everything``."""
        parser.add_argument(
            "--seed_everything",
            type=Union[bool, int],
            default=self.seed_everything_default,
            help="The seed that seed_everything gets before objects are made: a number, true to have one chosen, or false.",
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the arguments of the Trainer, the module and the data."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults(
            {f"trainer.{name}": value for name, value in self.trainer_defaults.items() if name != "callbacks"}
        )
        parser.add_lightning_class_args(self._model_class, "model", subclass_mode=self.subclass_mode_model)
        parser.add_lightning_class_args(
            self._datamodule_class,
            "data",
            subclass_mode=self.subclass_mode_data,
            required=self.datamodule_class is not None,  # the module may have its own loaders
        )

    def _add_arguments(self, parser: LightningArgumentParser) -> None:
        self.add_default_arguments_to_parser(parser)
        self.add_core_arguments_to_parser(parser)
        self.add_arguments_to_parser(parser)
        if self.auto_configure_optimizers:  # unless add_arguments_to_parser has added some
            if not parser.optimizer_groups:
                parser.add_optimizer_args((Optimizer,))
            if not parser.lr_scheduler_groups:
                parser.add_lr_scheduler_args(LRSchedulerTypeTuple)
        self.link_optimizers_and_lr_schedulers(parser)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Override to add arguments, or to link some: ``parser.link_arguments("data.size", "model.size")``."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The methods of the Trainer that are subcommands, each with those of its arguments that are no settings."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": {"model", "dataloaders", "datamodule"},
            "test": {"model", "dataloaders", "datamodule"},
            "predict": {"model", "dataloaders", "datamodule"},
        }

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        commands = parser.add_subcommands()
        target: Any = self.trainer_class
        trainer_class = target if isinstance(target, type) else class_from_function(target)
        for name in self.subcommands():
            summary = (inspect.getdoc(getattr(trainer_class, name)) or "").partition("\n\n")[0].replace("\n", " ")
            options = {"description": summary, **kwargs.get(name, {})}
            self._subcommand_parsers[name] = self._prepare_subcommand_parser(trainer_class, name, **options)
            commands.add_subcommand(name, self._subcommand_parsers[name], help=summary)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = self.init_parser(**kwargs)
        self._add_arguments(parser)
        skip: set[str | int] = set(self.subcommands()[subcommand])
        self._subcommand_method_arguments[subcommand] = parser.add_method_arguments(klass, subcommand, skip=skip)
        return parser

    @staticmethod
    def link_optimizers_and_lr_schedulers(parser: LightningArgumentParser) -> None:
        """Link the groups of optimizers and schedulers that say where they go (``link_to``)."""
        for key, (cls, link_to) in {**parser.optimizer_groups, **parser.lr_scheduler_groups}.items():
            if link_to == "AUTOMATIC":
                continue
            if isinstance(cls, tuple):
                parser.link_arguments(key, link_to)
            else:
                parser.link_arguments(key, link_to, compute_fn=functools.partial(_class_and_arguments, cls))

    # ------------------------------------------------------------------ settings

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Read the command line, or ``args``, into ``self.config``."""
        if args is not None and len(sys.argv) > 1:
            rank_zero_warn(
                "LightningCLI(args=...) stands in the place of the command line, and this process has one, which is not read:"
                f" sys.argv[1:]={sys.argv[1:]}, args={args}."
            )
        if isinstance(args, (dict, Namespace)):
            self.config = parser.parse_object(args)
        else:
            self.config = parser.parse_args(self._without_origins(args))

    def _without_origins(self, args: Any) -> Any:
        """Take ``--print_config=origins`` out of the words: all values have to be known to print it."""
        words = list(sys.argv[1:] if args is None else args)
        option = f"--print_config={_ORIGINS}"
        if option not in words:
            return args
        self._prints_origins = True
        return [word for word in words if word != option]

    def _parse_ckpt_path(self) -> None:
        """Take the hyperparameters in the checkpoint that is named for values of the module that nobody has given."""
        subcommand = self.config.get("subcommand")
        if not subcommand:
            return
        settings = self.config[subcommand]
        path = settings.get("ckpt_path")
        if not path or not os.path.isfile(path):
            return
        rules = SEMANTICS[(settings.get("trainer") or {}).get("semantics") or default_semantics()]
        safe = settings.get("weights_only")
        checkpoint = torch.load(path, weights_only=safe is not False, map_location="cpu", mmap=_is_zip(path))
        saved = restore_hparams(checkpoint.get("hyper_parameters") or {})
        class_path = saved.pop(CLASS_PATH, None)
        saved.pop(INSTANTIATOR_KEY, None)
        if rules["config_from_checkpoint"] == "fills":
            saved = self._not_given(saved, class_path)
            if safe is not False:
                require_safe(_module_type(self._model_class), saved, str(path))
        if not saved and (class_path is None or rules["config_from_checkpoint"] == "fills"):
            return
        found: dict[str, Any] = saved
        if class_path is not None:
            found = {"class_path": class_path, "dict_kwargs": saved}
        if self.parser.origins is not None:
            self.parser.origins.from_checkpoint(f"{subcommand}.model", saved, str(path))
        try:
            self.config = self.parser.parse_object({subcommand: {"model": found}}, self.config)
        except SystemExit:
            sys.stderr.write(f"Parsing of ckpt_path hyperparameters failed! They are in {path}.\n")
            raise

    def _not_given(self, saved: dict[str, Any], class_path: str | None) -> dict[str, Any]:
        """Return the saved values of the module that the command line and configs leave open."""
        subcommand, origins = str(self.config["subcommand"]), self.parser.origins
        model = self.config[subcommand].get("model")
        chosen = model.get("class_path") if isinstance(model, Namespace) else None
        if class_path is not None and chosen is not None and chosen != class_path:
            return {}  # of another class than the one that was chosen
        targets = _link_targets(self._parser(subcommand))
        return {
            name: value
            for name, value in saved.items()
            if name not in targets and (origins is None or not origins.wrote(f"{subcommand}.model.{name}"))
        }

    def _print_origins(self) -> None:
        parser = self._parser(self.subcommand)
        config = self.config[self.subcommand] if self.subcommand else self.config
        text = parser.dump(config, format="yaml", **KEEP_UNSET)
        assert self.parser.origins is not None  # parse_args has made them
        sys.stdout.write(annotated(text, self.parser.origins, f"{self.subcommand}." if self.subcommand else ""))
        raise SystemExit(0)

    def _set_seed(self) -> None:
        seed = self._get(self.config, "seed_everything")
        if seed is False:
            return
        chosen = seed_everything(None if seed is True else seed, workers=True)
        (self.config[self.subcommand] if self.subcommand else self.config)["seed_everything"] = chosen

    # ------------------------------------------------------------------ objects

    def _dump_config(self) -> None:
        """Keep the config as plain data, as it is before objects are made."""
        if not hasattr(self, "config_dump"):
            options = {"skip_link_targets": False, "format": "yaml", **KEEP_UNSET}
            self.config_dump = yaml.safe_load(self.parser.dump(self.config, **options))
            if "subcommand" in self.config:
                self.config_dump = self.config_dump[self.config.subcommand]

    def _add_instantiators(self) -> None:
        for key, target, subclasses in (
            ("model", self._model_class, self.subclass_mode_model),
            ("data", self._datamodule_class, self.subclass_mode_data),
        ):
            self._makers.append((functools.partial(self._make, key), _module_type(target), subclasses))

    def _make(
        self, _key: str, class_type: Any, /, *args: Any, applied_instantiation_links: dict[str, Any], **kwargs: Any
    ) -> Any:
        """Make the module or the data module; what it keeps as hyperparameters is what the config says of it."""
        self._dump_config()
        hparams = self.config_dump.get(_key) or {}
        path = hparams.get("class_path")
        if path is not None:
            if not _is_at(class_type, path):
                return class_type(*args, **kwargs)  # a module among the arguments of the module
            hparams = {CLASS_PATH: path, **(hparams.get("init_args") or {}), **(hparams.get("dict_kwargs") or {})}
        hparams = dict(hparams)
        for name, value in applied_instantiation_links.items():
            if name.startswith(f"{_key}."):
                _put(hparams, name.removeprefix(f"{_key}.").removeprefix("init_args."), value)
        hparams[INSTANTIATOR_KEY] = INSTANTIATOR
        with described_by(hparams):
            return class_type(*args, **kwargs)

    def before_instantiate_classes(self) -> None:
        """Override to do something before objects are made."""

    def instantiate_classes(self) -> None:
        """Make the objects: ``config_init``, ``datamodule``, ``model`` and ``trainer``."""
        self.config_init = make(self.parser, self.config, self._makers)
        self.datamodule = self._get(self.config_init, "data")
        self.model = self._get(self.config_init, "model")
        self._add_configure_optimizers_method_to_model(self.subcommand)
        self.trainer = self.instantiate_trainer()

    def after_instantiate_classes(self) -> None:
        """Override to do something when objects are made."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make a Trainer of the settings; ``kwargs`` win over them."""
        extra = [self._get(self.config_init, key) for key in self._parser(self.subcommand).callback_keys]
        return self._instantiate_trainer({**self._get(self.config_init, "trainer", default={}), **kwargs}, extra)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Trainer:
        if "callbacks" in config:
            always = self.trainer_defaults.get("callbacks", [])
            config["callbacks"] = [*_listed(config["callbacks"]), *callbacks, *_listed(always)]
            if self.save_config_callback and not config.get("fast_dev_run", False):
                settings = self.config.get(str(self.subcommand), self.config)
                config["callbacks"].append(
                    self.save_config_callback(self._parser(self.subcommand), settings, **self.save_config_kwargs)
                )
        else:
            rank_zero_warn(
                f"The `{self.trainer_class.__qualname__}` class does not expose the `callbacks` argument, so that none is"
                " passed to it, and no config is saved."
            )
        return self.trainer_class(**config)

    def _parser(self, subcommand: str | None) -> LightningArgumentParser:
        return self.parser if subcommand is None else self._subcommand_parsers[subcommand]

    # ------------------------------------------------------------------ optimizers

    @staticmethod
    def configure_optimizers(
        lightning_module: LightningModule,  # noqa: ARG004  # for who overrides it
        optimizer: Optimizer,
        lr_scheduler: LRSchedulerTypeUnion | None = None,
    ) -> Any:
        """What the module's ``configure_optimizers`` becomes where ``--optimizer`` is given; override to change it.

        Args:
            lightning_module: The module.
            optimizer: Made of ``--optimizer``.
            lr_scheduler: Made of ``--lr_scheduler``.
        """
        if lr_scheduler is None:
            return optimizer
        if isinstance(lr_scheduler, ReduceLROnPlateau):
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": lr_scheduler, "monitor": lr_scheduler.monitor},
            }
        return [optimizer], [lr_scheduler]

    def _add_configure_optimizers_method_to_model(self, subcommand: str | None) -> None:
        """Put :meth:`configure_optimizers` into the module, if an optimizer is given and goes nowhere else."""
        if not self.auto_configure_optimizers:
            return
        parser = self._parser(subcommand)
        optimizers = _automatic(parser.optimizer_groups, (Optimizer,))
        schedulers = _automatic(parser.lr_scheduler_groups, LRSchedulerTypeTuple)
        if not optimizers:
            return
        if len(optimizers) > 1 or len(schedulers) > 1:
            raise MisconfigurationException(
                f"{type(self).__name__} expects at most one optimizer and one lr_scheduler to be 'AUTOMATIC', but found"
                f" {optimizers + schedulers}. Link them to arguments of the module (link_to=...), and have it configure them."
            )
        chosen = self._part(parser.optimizer_groups, optimizers[0])
        if not chosen:
            return
        scheduling = self._part(parser.lr_scheduler_groups, schedulers[0]) if schedulers else None
        if "configure_optimizers" in vars(self.model) or (
            inspect.unwrap(type(self.model).configure_optimizers) is not LightningModule.configure_optimizers
        ):
            name, own = type(self.model).__name__, type(self).__name__
            rank_zero_warn(
                f"`{name}.configure_optimizers` will be overridden by `{own}.configure_optimizers`, because an optimizer was"
                " chosen for the run; LightningCLI(auto_configure_optimizers=False) keeps the module's."
            )
        optimizer = instantiate_class(self.model.parameters(), chosen)
        scheduler = instantiate_class(optimizer, scheduling) if scheduling else None
        configure = functools.partial(self.configure_optimizers, optimizer=optimizer, lr_scheduler=scheduler)
        functools.update_wrapper(configure, self.configure_optimizers)
        self.model.configure_optimizers = types.MethodType(configure, self.model)

    def _part(self, groups: Mapping[str, tuple[Any, str]], key: str) -> dict[str, Any] | None:
        """Return class path and arguments of a group; None if nobody chose a class."""
        settings = self._get(self.config_init, key)
        cls = groups[key][0]
        return _as_dict(settings) if isinstance(cls, tuple) else _class_and_arguments(cls, settings)

    # ------------------------------------------------------------------ the run

    def _get(self, config: Any, key: str, default: Any = None) -> Any:
        """Return a setting, of the subcommand if there is one."""
        return config.get(str(self.subcommand), config).get(key, default)

    def _run_subcommand(self, subcommand: str) -> None:
        for name in (f"before_{subcommand}", subcommand, f"after_{subcommand}"):
            call = getattr(self, name, None)
            if name == subcommand:
                # a method of the command line goes ahead of the Trainer's
                call = call or getattr(self.trainer, subcommand)
                call(**self._prepare_subcommand_kwargs(subcommand))
            elif callable(call):
                call()

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        names = self._subcommand_method_arguments[subcommand]
        kwargs = {name: value for name, value in self.config_init[subcommand].items() if name in names}
        kwargs["model"] = self.model
        if self.datamodule is not None:
            kwargs["datamodule"] = self.datamodule
        return kwargs


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _as_dict(settings: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", settings.as_dict() if isinstance(settings, Namespace) else settings)


def _class_and_arguments(cls: type, settings: Any) -> dict[str, Any]:
    return {"class_path": f"{cls.__module__}.{cls.__name__}", "init_args": _as_dict(settings) or {}}


def _automatic(groups: Mapping[str, tuple[Any, str]], bases: tuple[type, ...]) -> list[str]:
    """Return the groups of which ``configure_optimizers`` is made."""
    return [
        key
        for key, (cls, link_to) in groups.items()
        if link_to == "AUTOMATIC" and any(issubclass(one, bases) for one in (cls if isinstance(cls, tuple) else (cls,)))
    ]


def _module_type(target: Any) -> Any:
    """Return a class, or what a function says that it returns."""
    if isinstance(target, type):
        return target
    return inspect.signature(target, eval_str=True).return_annotation


def _is_at(cls: Any, path: str) -> bool:
    home, _, name = path.rpartition(".")
    found = getattr(sys.modules.get(home), name, None)
    return found is None or found is cls or not isinstance(found, type)


def _put(settings: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        settings = settings[parent]
    settings[last] = value


def _link_targets(parser: LightningArgumentParser) -> set[str]:
    """Return the arguments of the module that are computed of others."""
    prefix = "model."
    return {
        target.removeprefix(prefix).removeprefix("init_args.")
        for target in parser.link_targets
        if target.startswith(prefix)
    }


def _is_zip(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK"
