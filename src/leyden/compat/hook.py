# SPDX-License-Identifier: Apache-2.0
"""The one import hook: modules that stand under foreign names and answer each of them with a class of Leyden's."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import FrameType, ModuleType
from typing import Any

from leyden.compat.private import public_way
from leyden.compat.table import ROOTS, VERSIONS, Target, read
from leyden.errors import MisconfigurationException, did_you_mean

ORIGIN = "leyden.compat"
"""What ``module.__spec__.origin`` says of a module of ours."""


class ForeignModule(ModuleType):
    """A module under a foreign name. A name is looked up in the table, and its home imported, when it is first used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked for by importlib, inspect and the like
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        modules = _finder.modules
        if name in modules.get(self.__name__, {}):
            target = modules[self.__name__][name]
            value = getattr(importlib.import_module(target.module), target.name)
            if target in _THEIRS and self.__name__.partition(".")[0] != "test_tube":
                _use_their_semantics()
        elif f"{self.__name__}.{name}" in modules:
            value = importlib.import_module(f"{self.__name__}.{name}")
        elif _is_an_import_statement():
            raise ImportError(explain(self.__name__, name, modules), name=self.__name__)
        else:
            raise AttributeError(explain(self.__name__, name, modules), name=name, obj=self)
        self.__dict__[name] = value
        return value

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *members(self.__name__, _finder.modules)})

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to another process by name: cloudpickle knows modules by their exact type only."""
        return arrive, (self.__name__,)


_LOGGERS = ("CSVLogger", "MLFlowLogger", "TensorBoardLogger", "WandbLogger")
_THEIRS = (
    Target("leyden", "Trainer"),
    Target("leyden", "Fabric"),
    Target("leyden.cli.lightning_cli", "LightningCLI"),
    # whose default name is that of a folder there
    *(Target("leyden.loggers", name) for name in _LOGGERS),
    *(Target("leyden.compat.fabric_loggers", name) for name in _LOGGERS),
    Target("leyden.loggers.csv", "CSVLogger"),
    Target("leyden.loggers.mlflow", "MLFlowLogger"),
    Target("leyden.loggers.tensorboard", "TensorBoardLogger"),
    Target("leyden.loggers.wandb", "WandbLogger"),
)
"""Who takes one of these from Lightning's modules means what it does there."""


class _Finder:
    """Finds the modules of the table, loads them, and answers for the packages that they stand for."""

    def __init__(self) -> None:
        self.modules: dict[str, dict[str, Target]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a module of the table; None for what is not under its roots, or for a bare question."""
        if fullname.partition(".")[0] not in VERSIONS:
            return None
        if fullname in self.modules:
            # all are packages, so that `from module import name` passes through importlib, which asks for submodules
            loader: Any = self  # not importlib.abc's class: that would load 6 ms of modules
            return ModuleSpec(fullname, loader, origin=ORIGIN, is_package=True)
        if _is_an_import_statement():
            parent, _, name = fullname.rpartition(".")
            raise ModuleNotFoundError(explain(parent, name, self.modules), name=fullname)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return an empty module; its names come when they are used."""
        return ForeignModule(spec.name, f"Leyden, under the name of {spec.name!r}. See leyden.compat.")

    def exec_module(self, module: ModuleType) -> None:
        """Say the version and the public names."""
        rows = self.modules[module.__name__]
        vars(module)["__all__"] = sorted(rows)
        if module.__name__ in ROOTS:
            vars(module)["__version__"] = VERSIONS[module.__name__.partition(".")[0]]

    def find_distributions(self, context: Any = None) -> Iterator[Any]:
        """Let ``importlib.metadata.version("lightning")`` and the like say the version, too."""
        from leyden.compat.packages import distributions  # noqa: PLC0415  # importlib.metadata is heavy; it asks, so it is there

        return distributions(getattr(context, "name", None))


_finder = _Finder()
_semantics_before: list[str] = []
_CALLBACK_GROUP = "lightning.pytorch.callbacks_factory"
"""The group of entry points by which packages for Lightning add callbacks."""


def install() -> None:
    """Answer the import names of Lightning and of 2019's test_tube with Leyden, from now on, in this process.

    Call it before the program imports any of them. Calling it again changes nothing. Child processes that start anew
    (spawn) run the main script again, and with it this call; ``leyden run`` reaches every child.

    From the moment when a program takes ``Trainer`` or ``Fabric`` out of Lightning's modules, a Trainer that is not told its
    ``semantics`` has ``"lightning"``, unless it or its module is written with the names of 2019.

    Raises:
        MisconfigurationException: if the real package of one of these names is already imported.
    """
    for root in VERSIONS:
        module = sys.modules.get(root)
        if module is not None and not isinstance(module, ForeignModule):
            raise MisconfigurationException(
                f"leyden.compat.install(): {root} {getattr(module, '__version__', '')} is already imported, from"
                f" {getattr(module, '__file__', None) or 'an unknown place'}; one program cannot have two under one name."
                " Call install() before the first import of it, or start the program with `leyden run`."
            )
    if not _finder.modules:
        _finder.modules = read()
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def arrive(name: str) -> ModuleType:
    """Return the module of that name, in a process to which it was sent: the names are installed there, too."""
    install()
    return importlib.import_module(name)


def uninstall() -> None:
    """Undo ``install``: the names are again what is installed, if anything. Classes that were taken remain as they are."""
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    for name in [name for name, module in sys.modules.items() if isinstance(module, ForeignModule)]:
        del sys.modules[name]
    if _semantics_before:
        from leyden import config, hparams  # noqa: PLC0415  # loaded already: somebody took the Trainer

        config.set_default_semantics(_semantics_before.pop())
        config.CALLBACK_GROUPS.remove(_CALLBACK_GROUP)
        hparams.take_values("passed")


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """``install`` for the length of a ``with`` block. Within a program that has installed it, this changes nothing."""
    before = _finder in sys.meta_path
    install()
    try:
        yield
    finally:
        if not before:
            uninstall()


def _use_their_semantics() -> None:
    from leyden import config, hparams  # noqa: PLC0415  # loaded already, with the Trainer

    if not _semantics_before:
        hparams.take_values("current")
        _semantics_before.append(config.set_default_semantics("lightning"))
        config.CALLBACK_GROUPS.append(_CALLBACK_GROUP)  # a package of that group imports names that are answered now


def _is_an_import_statement() -> bool:
    """Whether an import runs us, and not ``hasattr``, ``getattr`` or ``importlib.util.find_spec``: those want no error."""
    frame: FrameType | None = sys._getframe(2)  # noqa: SLF001  # there is no other way to the caller
    while frame is not None and frame.f_globals.get("__name__") == "importlib._bootstrap":
        if frame.f_code.co_name in ("_handle_fromlist", "_find_and_load"):
            return True
        frame = frame.f_back
    return False


def members(module: str, modules: Mapping[str, Mapping[str, Target]]) -> set[str]:
    """Return the names and submodules that a foreign module has."""
    below = {name.removeprefix(f"{module}.").partition(".")[0] for name in modules if name.startswith(f"{module}.")}
    return {*modules.get(module, {}), *below}


def explain(module: str, name: str, modules: Mapping[str, Mapping[str, Target]]) -> str:
    """Say that Leyden has no ``name`` in a foreign module, and what was perhaps meant."""
    said = f"Leyden has no {module}.{name}."
    if name.startswith("_"):
        return f"{said} It is private there; Leyden answers the public names only.{public_way(name)}"
    root = module.partition(".")[0]
    elsewhere = sorted((key for key in modules if name in modules[key] and key.startswith(root)), key=len)
    hint = f" It is in {elsewhere[0]}." if elsewhere else did_you_mean(name, members(module, modules))
    return f"{said}{hint} `leyden compat check PATH` lists all that a program misses."
