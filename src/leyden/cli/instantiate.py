# SPDX-License-Identifier: Apache-2.0
"""Makes objects of plain data: a class path and arguments, as configs and checkpoints hold them."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from typing import Any

from leyden.cli.parser import ArgumentParser, make, require_jsonargparse
from leyden.errors import MisconfigurationException
from leyden.hparams import CLASS_PATH, INSTANTIATOR, described_by


def instantiate_class(args: Any, init: Mapping[str, Any]) -> Any:
    """Make an object of ``init``, which has a ``class_path`` and perhaps ``init_args``.

    Args:
        args: What is passed ahead of the ``init_args``: one value, or a tuple of them.
        init: The class and the rest of its arguments.
    """
    home, _, name = init["class_path"].rpartition(".")
    cls = getattr(importlib.import_module(home), name)
    return cls(*(args if isinstance(args, tuple) else (args,)), **(init.get("init_args") or {}))


def instantiate_module(class_type: Any, config: Mapping[str, Any]) -> Any:
    """Make a module, or a data module, of the hyperparameters that a command line has kept of it.

    Args:
        class_type: Its class, or a base of that if ``config`` names a class as ``_class_path``.
        config: Its arguments, in which classes may stand as class paths.

    Raises:
        ModuleNotFoundError: if jsonargparse is not installed.
    """
    require_jsonargparse()
    parser = ArgumentParser(exit_on_error=False)
    arguments = {name: value for name, value in config.items() if name not in (CLASS_PATH, INSTANTIATOR)}
    if CLASS_PATH in config:
        parser.add_subclass_arguments(class_type, "module", fail_untyped=False)
        arguments = {"class_path": config[CLASS_PATH], "dict_kwargs": arguments}
    else:
        parser.add_class_arguments(class_type, "module", fail_untyped=False)
    return make(parser, parser.parse_object({"module": arguments})).module


def instantiate_from_checkpoint(
    cls: Any, kwargs: Mapping[str, Any], *, safe: bool, source: str, kept: Mapping[str, Any]
) -> Any:
    """Make the object of a checkpoint; if ``safe``, the file neither imports a module nor makes what is python's own.

    Args:
        cls: The class, which is imported.
        kwargs: Its arguments.
        safe: Whether the file is not known to be trusted.
        source: What to call the file in errors.
        kept: What the object's hyperparameters hold beside its arguments.

    Raises:
        MisconfigurationException: for a class that the file may not name.
    """
    if safe:
        require_safe(cls, kwargs, source)
    require_jsonargparse()

    def described(class_type: Any, *args: Any, **arguments: Any) -> Any:
        with described_by({**kwargs, **kept}):  # so that the next checkpoint can be opened like this one
            return class_type(*args, **arguments)

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "module", fail_untyped=False)
    return make(parser, parser.parse_object({"module": dict(kwargs)}), [(described, cls, False)]).module


def require_safe(cls: Any, kwargs: Mapping[str, Any], source: str) -> None:
    """Check that arguments of a strange file name only classes that the program has imported, and none of python's.

    What is no type but a text to the constructor (``name: str``) may be any text.

    Raises:
        MisconfigurationException: for a class, or the path of a function, that they may not name.
    """
    parameters = inspect.signature(cls).parameters
    for name, value in kwargs.items():
        hint = parameters[name].annotation if name in parameters else None
        if not (isinstance(value, str) and hint in (str, "str")):
            _require_safe(value, name, source)


def _require_safe(value: Any, name: str, source: str) -> None:
    if isinstance(value, Mapping):
        if "class_path" in value:
            _require_known(str(value["class_path"]), name, source)
        for key, item in value.items():
            if key != "class_path":
                _require_safe(item, f"{name}.{key}", source)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _require_safe(item, name, source)
    elif isinstance(value, str) and "." in value and all(part.isidentifier() for part in value.split(".")):
        root = value.partition(".")[0]
        if root in sys.modules or importlib.util.find_spec(root) is not None:
            _require_known(value, name, source)


def _require_known(path: str, name: str, source: str) -> None:
    home, _, attribute = path.rpartition(".")
    found = getattr(sys.modules.get(home), attribute, None)
    own = {path.partition(".")[0], str(getattr(found, "__module__", "")).partition(".")[0]} & sys.stdlib_module_names
    if found is None or own:
        why = "is part of python itself" if found is not None else "is not imported"
        raise MisconfigurationException(
            f"{source} names {path!r} for {name!r}, which {why}; a checkpoint may name only what the program has imported."
            f" If you trust the file, {'import it first, or ' if found is None else ''}pass weights_only=False; or give"
            f" {name.partition('.')[0]!r} yourself."
        )
