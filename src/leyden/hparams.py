# SPDX-License-Identifier: Apache-2.0
"""Hyperparameters: captured as a class is constructed, split into plain data and the rest, saved and given back.

Each class that derives from :class:`HyperparametersMixin` has its ``__init__`` wrapped once, when the class is made.
The wrapper notes the arguments while the constructor runs and forgets them when it returns, so ``save_hyperparameters``
finds the arguments of its own object, as they were passed, without looking at anybody's stack frames.
"""

from __future__ import annotations

import ast
import csv
import dataclasses
import functools
import inspect
import json
import os
import sys
import threading
import types
import warnings
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from enum import Enum
from pathlib import Path, PurePath
from typing import IO, Any

import torch
from torch import nn

from leyden.errors import MisconfigurationException, did_you_mean
from leyden.plain import AttributeDict, pack, plain_hparams, restore_hparams, unpack
from leyden.runtime.ranks import rank_zero_warn
from leyden.types import PathLike

_WORDS = {"True": True, "False": False, "None": None}

CLASS_PATH, INSTANTIATOR = "_class_path", "_instantiator"
"""Names among hyperparameters that a command line adds: the class of the object, and what makes it again."""

_RECORDS = "_leyden_records_arguments"
_MAX_COPIED = 10_000
_MAX_DEPTH = 20


@dataclasses.dataclass(slots=True)
class _Call:
    """A constructor that is running: the object, the function, its arguments as passed, and copies of them."""

    obj: Any
    init: Callable[..., Any]
    passed: tuple[tuple[Any, ...], dict[str, Any]]
    copied: tuple[tuple[Any, ...], dict[str, Any]]

    def bind(self, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> dict[str, Any]:
        """Return the arguments by name, defaults included; ``**kwargs`` spread out, ``*args`` left out."""
        signature = inspect.signature(self.init)
        bound = signature.bind(self.obj, *arguments[0], **arguments[1])
        bound.apply_defaults()
        named: dict[str, Any] = {}
        for position, (name, parameter) in enumerate(signature.parameters.items()):
            if parameter.kind is parameter.VAR_KEYWORD:
                named.update(bound.arguments[name])
            elif parameter.kind is not parameter.VAR_POSITIONAL and position > 0:
                named[name] = bound.arguments[name]
        return named


class _Constructing(threading.local):
    """The constructors that run in this thread, outermost first."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.described: tuple[int, dict[str, Any]] | None = None

    def __reduce__(self) -> str:
        # a class that is pickled by value takes its constructor along, and that one means this object, wherever it is
        return "_constructing"


_constructing = _Constructing()


def _recording(init: Callable[..., None]) -> Callable[..., None]:
    """Wrap a constructor so that its arguments are on record while it runs."""

    @functools.wraps(init)
    def __init__(self: Any, /, *args: Any, **kwargs: Any) -> None:
        calls = _constructing.calls
        # copied now, so that what is saved is what was passed, whatever the constructor does to it
        calls.append(_Call(self, init, (args, kwargs), _copied((args, kwargs))))
        try:
            init(self, *args, **kwargs)
        finally:
            calls.pop()

    setattr(__init__, _RECORDS, True)
    # inspect.getfullargspec looks here, not behind __wrapped__
    __init__.__signature__ = inspect.signature(init)  # type: ignore[attr-defined]
    return __init__


_RECORDING = _recording(lambda: None).__code__
"""The code of what is wrapped around constructors."""


def _copied(value: Any, budget: list[int] | None = None, depth: int = 0) -> Any:
    """Return ``value`` with its plain containers copied and everything else shared.

    Stops after ten thousand items: an argument of that size is data, not a setting, and copying it would cost.
    """
    budget = [_MAX_COPIED] if budget is None else budget
    kind = type(value)
    items = vars(value) if kind in (Namespace, types.SimpleNamespace) else value
    if kind not in (dict, list, tuple, set, OrderedDict, AttributeDict, Namespace, types.SimpleNamespace):
        return value
    budget[0] -= len(items)
    if budget[0] < 0 or depth > _MAX_DEPTH:
        return value
    if kind is set:
        return set(value)
    if kind in (list, tuple):
        return kind([_copied(item, budget, depth + 1) for item in value])
    copies = {key: _copied(item, budget, depth + 1) for key, item in items.items()}
    return kind(**copies) if items is not value else kind(copies)


@contextmanager
def described_by(hparams: Mapping[str, Any]) -> Iterator[None]:
    """Let the object that is constructed in this ``with`` block keep ``hparams`` in the place of its arguments.

    A command line knows of which plain data the arguments were made (the class path of an encoder, not the encoder);
    only these can be saved and made into the same object again. Objects made inside its constructor keep their own.
    """
    before, _constructing.described = _constructing.described, (len(_constructing.calls), dict(hparams))
    try:
        yield
    finally:
        _constructing.described = before


def _description(obj: Any) -> dict[str, Any] | None:
    """Return what :func:`described_by` says of ``obj``, which is being constructed; None if it is of another."""
    described, calls = _constructing.described, _constructing.calls
    if described is None or (len(calls) > described[0] and calls[described[0]].obj is not obj):
        return None
    return _copied(described[1])  # type: ignore[no-any-return]


def running_arguments(obj: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the constructor arguments of ``obj``, copied and as passed: of all its constructors that are running,
    a derived class's before its base's."""
    copied: dict[str, Any] = {}
    passed: dict[str, Any] = {}
    # constructors that were put in after the class was made (dataclasses, attrs) leave their arguments as attributes
    for cls in reversed(type(obj).__mro__):
        init = cls.__dict__.get("__init__")
        late = issubclass(cls, HyperparametersMixin) and inspect.isfunction(init) and not hasattr(init, _RECORDS)
        if late and init is not None:
            for name in list(inspect.signature(init).parameters)[1:]:
                value = getattr(obj, name, _recording)
                if value is not _recording:
                    passed[name], copied[name] = value, _copied(value)
    for call in reversed(_constructing.calls):
        if call.obj is obj:
            copied.update(_copied(call.bind(call.copied)))  # once more, for the defaults
            passed.update(call.bind(call.passed))
    return copied, passed


_values = ["passed"]


def take_values(which: str) -> str:
    """Set which values ``save_hyperparameters()`` keeps; return what it was.

    ``"passed"``: those that the constructor was called with. ``"current"``: those that its arguments have when
    ``save_hyperparameters`` is called, as in Lightning; constructors that work on their arguments first count on it.
    """
    before, _values[0] = _values[0], which
    return before


def _current(obj: Any, frame: types.FrameType | None) -> dict[str, Any]:
    """Return what the arguments of the constructors of ``obj`` are now, a derived class's before its base's."""
    found: dict[str, Any] = {}
    while frame is not None:
        code, values = frame.f_code, frame.f_locals
        first = code.co_varnames[:1]
        if code.co_name == "__init__" and first and values.get(first[0]) is obj and code is not _RECORDING:
            count = code.co_argcount + code.co_kwonlyargcount
            found |= {name: values[name] for name in code.co_varnames[1:count] if name in values}
            if code.co_flags & inspect.CO_VARKEYWORDS:
                place = count + bool(code.co_flags & inspect.CO_VARARGS)
                found |= values.get(code.co_varnames[place], {})
        frame = frame.f_back
    return found


# --------------------------------------------------------------------------------------------- the mixin


class HyperparametersMixin:
    """Gives a class ``save_hyperparameters``, ``hparams`` and ``hparams_initial``."""

    # no annotations here: torch.jit would read them on every module
    __jit_unused_properties__ = ["hparams", "hparams_initial"]

    _log_hyperparams = False
    _hparams_name = None  # type: str | None
    _hparams = None  # type: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        init = cls.__init__
        own = "__init__" in cls.__dict__
        # an inherited constructor is wrapped where it stands, unless it comes from a class without this mixin
        if inspect.isfunction(init) and not hasattr(init, _RECORDS) and (own or _comes_from_outside(cls)):
            cls.__init__ = _recording(init)  # type: ignore[method-assign]

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: str | Iterable[str] | None = None,
        frame: types.FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """Keep the arguments of the constructor in ``hparams``: call it in ``__init__``.

        Without ``args`` all arguments are kept, with the values that were passed: those of the class and of each
        derived class whose constructor led here. ``args`` may name some of them, or be one dict, namespace or
        dataclass to keep instead. ``ignore`` names what to leave out, also of what a base class kept. ``logger``
        says whether loggers get them. In a program written for Lightning the values are those that the
        arguments have by now, in ``frame`` and the constructors that led there; elsewhere nothing looks at frames.

        Raises MisconfigurationException for a name that is no argument, and for an object that holds no names.
        """
        self._log_hyperparams = logger
        if len(args) == 1 and not isinstance(args[0], str) and (args[0] is None or _is_empty(args[0])):
            return
        ignored = {ignore} if isinstance(ignore, str) else set(ignore or ())
        copied, passed = running_arguments(self)
        if (description := _description(self)) is not None:
            copied = passed = description
        elif _values[0] == "current" and not (args and not isinstance(args[0], str)):
            now = _current(self, frame or sys._getframe(1))  # noqa: SLF001  # only the caller's variables have them
            copied.update(_copied({name: value for name, value in now.items() if name in copied}))
        copied = {name: value for name, value in copied.items() if name not in ignored}
        objects = [arg for arg in args if not isinstance(arg, str)]
        if len(objects) > 1:
            raise MisconfigurationException(
                f"save_hyperparameters() got {len(objects)} objects. Give one dict or namespace, or names of arguments."
            )
        if objects:
            hparams = _as_mapping(objects[0])
            self._hparams_name = next((n for n, v in passed.items() if _same(v, objects[0]) and n in copied), None)
        elif args:
            hparams = AttributeDict({name: _pick(copied, name, type(self)) for name in args})
            self._hparams_name = "kwargs"
        else:
            hparams = AttributeDict(copied)
            self._hparams_name = "kwargs" if copied else None
            if not passed and not any(call.obj is self for call in _constructing.calls):
                rank_zero_warn(
                    f"save_hyperparameters() of {type(self).__name__} was called outside its __init__, where there are "
                    "no arguments to save. Call it in __init__, or pass it a dict."
                )
        self._set_hparams(hparams)
        self.remove_ignored_hparams(ignored)
        for name, value in self.hparams.items():
            if isinstance(value, nn.Module):
                rank_zero_warn(
                    f"The hyperparameter {name!r} is a module. Its weights are in each checkpoint already; saved as a "
                    f"hyperparameter it is stored twice. Leave it out: save_hyperparameters(ignore=[{name!r}])."
                )
        self._hparams_initial = _snapshot(self.hparams)

    def _set_hparams(self, hparams: Any) -> None:
        hparams = _as_mapping(hparams)
        if isinstance(hparams, dict) and isinstance(self.hparams, dict):
            self.hparams.update(hparams)
        else:
            self._hparams = hparams

    def remove_ignored_hparams(self, ignore_list: Iterable[str]) -> None:
        """Drop these names from ``hparams``; names that are not there are passed over."""
        for name in ignore_list:
            self.hparams.pop(name, None)

    @property
    def hparams(self) -> Any:
        """What :meth:`save_hyperparameters` kept: an :class:`AttributeDict`, or the mapping it was given. Mutable."""
        if self._hparams is None:
            self._hparams = AttributeDict()
        return self._hparams

    @hparams.setter
    def hparams(self, hparams: Any) -> None:
        """Same as ``save_hyperparameters(hparams)`` with a dict, namespace or dataclass in the place of what was kept."""
        self._hparams = None
        self.save_hyperparameters(hparams)

    @property
    def hparams_initial(self) -> Any:
        """A copy of ``hparams`` as they were when :meth:`save_hyperparameters` last ran."""
        return _snapshot(self.__dict__.get("_hparams_initial", AttributeDict()))


def logs_hparams(obj: object) -> bool:
    """Return whether ``obj`` kept hyperparameters and wants loggers to have them."""
    return bool(getattr(obj, "_log_hyperparams", False))


def hparams_name(obj: object) -> str | None:
    """Return how ``obj`` got its hyperparameters: ``"kwargs"`` as arguments, another name as that one, else None."""
    name = getattr(obj, "_hparams_name", None)
    return name if isinstance(name, str) else None


def _comes_from_outside(cls: type) -> bool:
    owner = next(base for base in cls.__mro__ if "__init__" in base.__dict__)
    return owner not in (object, nn.Module) and not issubclass(owner, HyperparametersMixin)


def _is_empty(value: Any) -> bool:
    return isinstance(value, (Mapping, list, tuple, set)) and not value


def _same(value: Any, other: Any) -> bool:
    """Whether an argument is, or equals, the object that was given; an object that cannot say so is not."""
    if value is other:
        return True
    try:
        return type(value) is type(other) and bool(value == other)
    except Exception:
        return False


def _pick(arguments: Mapping[str, Any], name: str, cls: type) -> Any:
    if name not in arguments:
        raise MisconfigurationException(
            f"save_hyperparameters({name!r}): the constructor of {cls.__name__} has no argument of that name, "
            f"or it is ignored. It has: {', '.join(arguments) or 'none'}.{did_you_mean(name, arguments)}"
        )
    return arguments[name]


def _as_mapping(hparams: Any) -> Any:
    if isinstance(hparams, Namespace):
        return AttributeDict(_copied(vars(hparams)))
    if dataclasses.is_dataclass(hparams) and not isinstance(hparams, type):
        return AttributeDict({field.name: getattr(hparams, field.name) for field in dataclasses.fields(hparams)})
    if isinstance(hparams, dict):
        return AttributeDict(_copied(dict(hparams)))
    if isinstance(hparams, MutableMapping):
        return hparams
    raise MisconfigurationException(
        f"Hyperparameters must be a dict, a namespace or a dataclass, not {hparams!r} ({type(hparams).__name__})."
    )


def _snapshot(hparams: Any) -> Any:
    return _copied(hparams) if isinstance(hparams, AttributeDict) else deepcopy(hparams)


# --------------------------------------------------------------------------------------------- construct again


def constructor_kwargs(
    cls: type,
    saved: Mapping[str, Any],
    overrides: Mapping[str, Any],
    *,
    name: str | None = None,
    source: str = "the checkpoint",
    unreadable: Iterable[str] = (),
) -> dict[str, Any]:
    """Return the keyword arguments to construct ``cls`` with: those saved, replaced by ``overrides``.

    ``saved`` may be as :func:`plain_hparams` left it or as :func:`restore_hparams` gave it back, without the overrides.
    Saved values that the constructor does not take are dropped, unless it takes ``**kwargs``. ``name`` (of
    :func:`hparams_name`) tells that the saved values were passed as one argument. ``unreadable`` names those that
    are in the checkpoint but were not unpickled. ``source`` says in errors where the saved values come from.

    Raises MisconfigurationException if an argument without a default has no value, or an override fits nowhere.
    """
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    loaded = {key: value for key, value in restore_hparams(saved).items() if key not in (INSTANTIATOR, CLASS_PATH)}
    nested = name in named and name not in loaded
    if nested:
        loaded = {str(name): AttributeDict({**loaded, **overrides})}
    unknown = [key for key in overrides if key not in named and not takes_any and not (nested or key in saved)]
    if unknown:
        raise MisconfigurationException(
            f"{cls.__name__}.__init__() takes no argument {unknown[0]!r}. It takes: {', '.join(named) or 'none'}."
            f"{did_you_mean(unknown[0], named)}"
        )
    kwargs = {key: value for key, value in {**loaded, **overrides}.items() if takes_any or key in named}
    missing = [key for key, p in named.items() if p.default is p.empty and key not in kwargs]
    if missing:
        raise MisconfigurationException(_missing_arguments(cls, missing, saved, source, set(unreadable)))
    return kwargs


def _missing_arguments(
    cls: type, missing: list[str], saved: Mapping[str, Any], source: str, unreadable: set[str]
) -> str:
    text = f"{cls.__name__}.__init__() needs {', '.join(map(repr, missing))}, which {source} does not give"
    text += f" (it has: {', '.join(saved)})." if saved else " (it has no hyperparameters)."
    packed = [name for name in missing if name in unreadable]
    if packed:
        text += (
            f" {', '.join(map(repr, packed))}: stored pickled, because it is not plain data. If you trust the file, "
            "open it with weights_only=False."
        )
    example = ", ".join(f"{name}=..." for name in missing)
    return f"{text} Pass it: load_from_checkpoint(path, {example}), or call save_hyperparameters() in __init__."


# --------------------------------------------------------------------------------------------- files


def save_hparams_to_yaml(
    config_yaml: PathLike,
    hparams: Mapping[str, Any] | Namespace,
    use_omegaconf: bool = True,  # noqa: ARG001  # accepted
) -> None:
    """Write hyperparameters to a YAML file that ``yaml.safe_load`` reads; folders are made.

    What YAML cannot hold is written as its ``repr``, and a warning names it. ``use_omegaconf`` is accepted: containers of
    OmegaConf are written as the dicts and lists that they are.
    """
    import yaml  # noqa: PLC0415  # only who writes or reads YAML pays for it

    with _open(config_yaml, "w") as file:
        yaml.safe_dump({str(k): _to_yaml(v, str(k)) for k, v in _items(hparams)}, file, sort_keys=True)


def load_hparams_from_yaml(
    config_yaml: PathLike,
    use_omegaconf: bool = True,  # noqa: ARG001  # accepted
) -> dict[str, Any]:
    """Read hyperparameters from a YAML file; a file with tags that would run code is refused by the YAML reader.

    ``use_omegaconf`` is accepted; the result is a dict.
    """
    import yaml  # noqa: PLC0415  # only who writes or reads YAML pays for it

    with _open(config_yaml, "r") as file:
        loaded = yaml.safe_load(file)
    if not isinstance(loaded, dict | None):
        raise MisconfigurationException(
            f"{config_yaml} holds a {type(loaded).__name__}; it must hold names and values."
        )
    return loaded or {}


def save_hparams_to_tags_csv(tags_csv: PathLike, hparams: Mapping[str, Any] | Namespace) -> None:
    """Write hyperparameters to a csv file with the columns ``key`` and ``value``; folders are made."""
    with _open(tags_csv, "w") as file:
        csv.writer(file).writerows([("key", "value"), *((key, str(value)) for key, value in _items(hparams))])


def load_hparams_from_tags_csv(tags_csv: PathLike) -> dict[str, Any]:
    """Read hyperparameters from a csv file; values that :func:`cell_value` can read become them, others stay strings."""
    with _open(tags_csv, "r") as file:
        return {row[0]: cell_value(row[1]) for row in list(csv.reader(file))[1:]}


def cell_value(text: str) -> Any:
    """Return what a cell of a table of hyperparameters says: a JSON value, or a python literal; all else is a text."""
    if text in _WORDS:
        return _WORDS[text]
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # python's reader warns of backslashes that mean nothing
            return read(text)
    return text


def _items(hparams: Mapping[str, Any] | Namespace) -> Iterable[tuple[str, Any]]:
    return (vars(hparams) if isinstance(hparams, Namespace) else hparams).items()


def _open(path: PathLike, mode: str) -> IO[str]:
    if "://" in str(path):
        import fsspec  # noqa: PLC0415  # only for remote files

        file: IO[str] = fsspec.open(str(path), mode, newline="").open()
        return file
    if mode == "w":
        Path(path).expanduser().absolute().parent.mkdir(parents=True, exist_ok=True)
    return open(os.path.expanduser(path), mode, newline="", encoding="utf-8")


def _to_yaml(value: Any, name: str) -> Any:
    if isinstance(value, Enum):
        return value.name
    if type(value) in (bool, int, float, str, bytes, type(None)):
        return value
    if isinstance(value, (Mapping, Namespace)):
        return {str(key): _to_yaml(item, f"{name}.{key}") for key, item in _items(value)}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_to_yaml(item, name) for item in value]
    if isinstance(value, (PurePath, torch.device, torch.dtype)):
        return str(value)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        return value.item()
    rank_zero_warn(
        f"The hyperparameter {name!r} ({type(value).__name__}) cannot be written as YAML; its repr is written instead."
    )
    return repr(value)


__all__ = [
    "CLASS_PATH",
    "INSTANTIATOR",
    "AttributeDict",
    "HyperparametersMixin",
    "cell_value",
    "constructor_kwargs",
    "described_by",
    "hparams_name",
    "load_hparams_from_tags_csv",
    "load_hparams_from_yaml",
    "logs_hparams",
    "pack",
    "plain_hparams",
    "restore_hparams",
    "running_arguments",
    "save_hparams_to_tags_csv",
    "save_hparams_to_yaml",
    "unpack",
]
