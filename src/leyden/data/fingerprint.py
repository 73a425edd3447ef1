# SPDX-License-Identifier: Apache-2.0
"""What an object is made of: two readings of it are equal only if nothing in it has changed between them.

Read are numbers, words, containers, attributes, arrays and tensors; of functions also what they enclose and the globals
that they name, in modules too; of a class of the user's its attributes and functions; and the environment of the process.
Where that is not enough to know an object (an open file, an iterator, a cache in use, more than the limits below), there
is no reading.

What a reading cannot see: the state that the libraries in ``_TRUSTED`` keep elsewhere than in attributes, that of code
which is not Python's, and what is outside the process.
"""

from __future__ import annotations

import array
import builtins
import copyreg
import functools
import io
import logging
import mmap
import os
import pickle
import random
import sys
import sysconfig
import threading
import types
import weakref
import zlib
from collections import OrderedDict, deque
from collections.abc import Iterable
from enum import Enum
from itertools import chain, repeat
from pathlib import PurePath
from types import (
    BuiltinFunctionType,
    ClassMethodDescriptorType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MappingProxyType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any, Generic, Protocol

import torch
from torch import Tensor, nn

from leyden.data.generators import Streams, is_generator

ITEMS = 100_000
"""How many entries of containers are read."""
OBJECTS = 5000
"""How many objects are opened."""
SMALL = 1 << 20
"""Bytes of which a checksum is taken; of more there are sums of rows and of columns, which is quicker."""
BYTES = 1 << 28
"""How many bytes of arrays and tensors are read."""
_COLUMNS = 4093
"""How long the rows are of which there are sums."""
_TRUSTED = frozenset(
    "torch torchvision torchaudio numpy pandas scipy sklearn skimage PIL cv2 h5py pyarrow polars datasets".split()  # noqa: SIM905
)
"""Installed libraries whose code is not read; what draws random numbers there draws them from the global generators."""
_HIDING = frozenset(("globals", "import_module", "__import__", "exec"))
"""Names by which a function may reach what it does not name."""
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), range, type(NotImplemented))
_LEAVES = frozenset(_PLAIN)
_BY_IDENTITY = (logging.Logger, logging.Handler, type(threading.Lock()), type(threading.RLock()))
"""Of these only which one it is counts, and a level."""

_CACHE = type(functools.lru_cache(len))
_CONTAINERS: tuple[Any, ...] = (OrderedDict, dict, list, tuple, set, frozenset, deque)

_REDUCED = ("numpy", "torch", "pandas")
_BUILT_IN = frozenset(part for home in (builtins, types) for part in vars(home).values() if isinstance(part, type))
_ON_HEAP = 1 << 9  # Python's flag of classes that were made while it runs


class UnknownError(Exception):
    """There is something in the object whose state cannot be read."""


class Itself:
    """Stands for one very object, and equals only what stands for the same; keeps it alive only where it must."""

    __slots__ = ("_held", "_ref")

    def __init__(self, value: Any) -> None:
        self._held = None
        try:
            self._ref: Any = weakref.ref(value)
        except TypeError:
            self._ref, self._held = None, (value,)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Itself) or (self._held is None) is not (other._held is None):
            return False
        if self._held is not None and other._held is not None:
            return self._held[0] is other._held[0]
        mine = self._ref()
        return mine is not None and mine is other._ref()

    __hash__ = None  # type: ignore[assignment]  # only compared


def surroundings() -> list[Any]:
    """Return what a process is set to, and hands on to the workers that it starts.

    Raises:
        UnknownError: where its folder is gone.
    """
    try:
        folder = os.getcwd()
    except OSError as error:
        raise UnknownError("the folder of the process is gone") from error
    strict = torch.are_deterministic_algorithms_enabled()
    return [dict(os.environ), folder, torch.get_default_dtype(), torch.get_default_device(), strict]


def read(roots: Iterable[Any], seeded: Iterable[Any] = ()) -> list[Any]:
    """Return what ``roots`` are made of, to be compared by ``==`` with another reading of this process.

    ``seeded`` are random generators whose state does not count.

    Raises:
        UnknownError: where that cannot be known, or is too much to read.
    """
    try:
        return _Reading(seeded).read(list(roots))
    except UnknownError:
        raise
    except Exception as error:  # an object may answer anything when it is looked at
        raise UnknownError(f"{type(error).__name__}: {error}") from error


class _Reading:
    def __init__(self, seeded: Iterable[Any]) -> None:
        self.facts: list[Any] = []
        self.seen: dict[int, int] = {}
        self.alive: list[Any] = []
        """What was made on the way: its id must not come again."""
        self.waiting: list[Any] = []
        self.items = self.bytes = 0
        self.stored: set[int] = set()
        """Where the memory of large tensors is that was read."""
        self.in_python: dict[type, bool] = {}  # not for longer than a reading: a class may hold what it was made with
        # the global generators are seeded for each batch; functions such as random.random are bound to them
        self.seeded = {id(generator) for generator in (*seeded, torch.default_generator, random.random.__self__)}  # type: ignore[attr-defined]
        self.numpy: Any = sys.modules.get("numpy")
        if self.numpy is not None:
            self.seeded.add(id(self.numpy.random.rand.__self__))

    def read(self, roots: list[Any]) -> list[Any]:
        self.alive.append(roots)
        self.waiting = roots[::-1]
        while self.waiting:
            value = self.waiting.pop()
            kind = type(value)
            if kind in _LEAVES:
                self.facts.append((kind, value if kind is not float else value.hex()))  # -0.0 equals 0.0
                continue
            number = self.seen.get(id(value))
            if number is not None:
                self.facts.append(number)
                continue
            number = self.seen[id(value)] = len(self.seen)
            self.facts.append((kind, number))
            if number > OBJECTS:
                raise UnknownError(f"more than {OBJECTS} objects")
            self.open(value, kind)
        return self.facts

    def open(self, value: Any, kind: type) -> None:
        """Note what ``value`` is, and what is to be read of it."""
        if isinstance(value, Tensor):
            self.tensor(value)
        elif is_generator(value):
            if id(value) not in self.seeded:
                state = Streams({"": value}).of_held()[""]
                # not pickled: that names a tensor by where it lies
                self.facts.append(state.numpy().tobytes() if isinstance(state, Tensor) else pickle.dumps(state))
        elif self.numpy is not None and isinstance(value, (self.numpy.ndarray, self.numpy.generic)):
            self.array(value)
        elif (pandas := sys.modules.get("pandas")) is not None and isinstance(
            value, (pandas.DataFrame, pandas.Series, pandas.Index)
        ):
            self.table(value)
        elif issubclass(kind, type):
            self.facts.append(Itself(value))
            if not _is_foreign(value):
                written = [(n, part) for n, part in vars(value).items() if not n.startswith("__") or callable(part)]
                self.several([*(part for name, part in written if name != "_abc_impl"), *value.__bases__])
            if not _is_foreign(kind):
                self.several([kind])
        elif issubclass(kind, ModuleType):
            self.facts.append(Itself(value))
            if _is_own(value):
                self.several([part for name, part in vars(value).items() if not name.startswith("__")])
        elif issubclass(kind, (*_BY_IDENTITY, Enum)):
            self.facts += [Itself(value), getattr(value, "level", None)]
            if issubclass(kind, Enum):
                self.own(value, kind)
        elif issubclass(kind, (PurePath, torch.dtype, torch.device)):
            self.facts.append(str(value))
        elif isinstance(value, FunctionType):
            self.function(value)
        elif isinstance(value, MethodType):
            self.several([value.__self__, value.__func__])
        elif isinstance(value, BuiltinFunctionType) or kind.__name__ == "cython_function_or_method":
            self.facts.append(value.__name__)
            bound = getattr(value, "__self__", None)
            self.several([None if isinstance(bound, (ModuleType, type)) else bound])
        elif kind is _CACHE:
            self.cache(value)
        elif isinstance(value, (staticmethod, classmethod)):
            self.several([value.__func__])
        elif isinstance(value, property):
            self.several([value.fget])
        elif isinstance(value, MappingProxyType):
            self.several([dict(value)])
        elif isinstance(value, functools.partial):
            self.several([value.func, value.args, value.keywords, vars(value)])
        elif isinstance(value, _CONTAINERS):
            self.container(value, kind)
        elif isinstance(value, (bytearray, array.array)):
            self.memory(memoryview(value))
            self.own(value, kind)
        elif isinstance(value, io.BytesIO):
            self.memory(value.getbuffer())
            self.facts.append(value.tell())
            self.own(value, kind)
        else:
            self.instance(value, kind)

    def several(self, values: list[Any]) -> None:
        self.alive.append(values)
        self.facts.append(len(values))
        self.waiting.extend(reversed(values))

    def own(self, value: Any, kind: type) -> None:
        """What a subclass adds: attributes, and its code."""
        if attributes := getattr(value, "__dict__", None):
            self.several([attributes])
        if not _is_foreign(kind):
            self.several([kind])

    def container(self, value: Any, kind: type) -> None:
        base = next(base for base in _CONTAINERS if isinstance(value, base))
        # by the functions of Python's own class: those of a subclass might load what they return
        self.items += base.__len__(value)
        if self.items > ITEMS:
            raise UnknownError(f"more than {ITEMS} entries")
        items = list(base.__iter__(value))
        if issubclass(base, dict):
            items += dict.values(value) if base is dict else map(base.__getitem__, repeat(value), items[:])
        kinds = tuple(map(type, items))
        if set(kinds) <= _LEAVES:
            self.facts += [kinds, tuple(items)]
            if float in kinds:  # -0.0 equals 0.0
                self.facts.append(array.array("d", [item for item in items if type(item) is float]).tobytes())
        elif set(kinds) == {tuple}:  # such as the files of an image folder, each with its label
            flat = list(chain.from_iterable(items))
            self.items += len(flat)
            inner = tuple(map(type, flat))
            if set(inner) <= _LEAVES and self.items <= ITEMS:
                self.facts += [tuple(map(len, items)), inner, tuple(flat)]
            else:
                self.several(items)
        else:
            self.several(items)
        self.own(value, kind)

    def cache(self, value: Any) -> None:
        """A function with a ``functools.lru_cache``, as long as there is nothing in it: nobody can look into one."""
        found = value.cache_info()
        if found.currsize or found.misses:
            raise UnknownError("a cache that is in use")
        self.facts.append(found.maxsize)
        self.several([value.__wrapped__])

    def tensor(self, value: Tensor) -> None:
        """A tensor: which one, its version, and its memory, for changes that leave no version behind."""
        if value.is_inference():
            raise UnknownError("a tensor that does not count its changes")
        self.facts += [Itself(value), value._version]  # noqa: SLF001  # torch has no other name for it
        if own := getattr(value, "__dict__", None):
            self.several([own])
        if value.device.type != "cpu":
            return
        kind = type(value)
        if value.layout != torch.strided or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
            raise UnknownError(f"a {kind.__name__} whose memory cannot be read")
        if kind not in (Tensor, nn.Parameter):
            self.several([kind])
            with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001  # torch has no other name for it
                value = value.as_subclass(Tensor)
        if value.numel() * value.element_size() > SMALL:
            # the whole of the memory of which it is a view: that is in one piece, and read once for all views of it
            storage = value.untyped_storage()
            self.facts.append((value.data_ptr(), value.shape, value.stride()))
            if storage.data_ptr() in self.stored:
                return
            self.stored.add(storage.data_ptr())
            flat = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)
        else:
            flat = value.detach().reshape(-1).contiguous().view(torch.uint8)
        self.memory(memoryview(flat.numpy()))  # type: ignore[arg-type]

    def array(self, value: Any) -> None:
        """An array by its content; a large file that is mapped into memory, and cannot be written to, by which one it is."""
        numpy = self.numpy
        if value.dtype.hasobject:
            self.several([value.shape, value.tolist()])
            return
        self.facts += [str(value.dtype), value.shape]
        own = {name: part for name, part in getattr(value, "__dict__", {}).items() if not isinstance(part, mmap.mmap)}
        if own:
            self.several([own])
        if value.nbytes <= SMALL:
            self.facts.append(zlib.crc32(value.tobytes()))
            return
        base = value
        while isinstance(base, numpy.ndarray) and not base.flags.writeable:
            base = base.base
        if isinstance(base, (bytes, mmap.mmap)):
            self.facts.append(Itself(value))
            return
        if not value.flags.c_contiguous:
            raise UnknownError("an array that is large and not in one piece")
        self.memory(memoryview(value.reshape(-1).view(numpy.uint8)))

    def memory(self, view: memoryview) -> None:
        """What is in a piece of memory."""
        self.bytes += view.nbytes
        if self.bytes > BYTES:
            raise UnknownError("memory that is too large to be read, and can be written to")
        self.facts.append(view.nbytes)
        numpy = self.numpy
        if view.nbytes <= SMALL or numpy is None:
            self.facts.append(zlib.crc32(view))
            return
        data = numpy.frombuffer(view, dtype=numpy.uint8)
        end = len(data) // (8 * _COLUMNS) * 8 * _COLUMNS
        table = data[:end].view(numpy.uint64).reshape(-1, _COLUMNS)
        # of what is exchanged within a column the sums of rows tell, and the other way round
        self.facts += [zlib.crc32(part.tobytes()) for part in (table.sum(0), table.sum(1), data[end:])]

    def table(self, value: Any) -> None:
        """A table of pandas, a column or an index: its columns, as arrays where they are, else entry by entry."""
        if hasattr(value, "columns"):
            self.several([value.index, value.columns, *(value.iloc[:, place] for place in range(value.shape[1]))])
        elif isinstance(value.dtype, self.numpy.dtype) and not value.dtype.hasobject:
            self.several([value.name, value.to_numpy(), getattr(value, "index", None)])
        else:
            self.items += len(value)
            if self.items > ITEMS:
                raise UnknownError(f"more than {ITEMS} entries")
            self.several([value.name, list(value), getattr(value, "index", None)])

    def function(self, value: Any) -> None:
        """A function: which one, what it encloses, and the globals that it names."""
        code = value.__code__
        self.facts += [Itself(value), Itself(code)]
        cells: list[Any] = []
        read: list[Any] = []
        for cell in value.__closure__ or ():
            try:
                cells.append(cell.cell_contents)
            except ValueError:  # not filled yet
                cells.append(None)
        if _is_installed(code.co_filename):
            # a library's decorator, which encloses a function of the user's
            self.several([*cells, value.__defaults__, value.__kwdefaults__, vars(value)])
            return
        known, named = value.__globals__, names(code)
        if "get_worker_info" in named and "seed" in named:
            raise UnknownError("a function that asks for the seed of its worker, which each one has of its own")
        if not _HIDING.isdisjoint(named) or {"sys", "modules"}.issubset(named):
            raise UnknownError("a function that reaches what it does not name")
        modules: list[ModuleType] = []
        for name in named:
            if name in known:
                found = known[name]
                (modules if isinstance(found, ModuleType) else read).append(found)
            else:  # imported in the function, by its whole name or from its package
                modules += [
                    found
                    for whole in (name, f"{known.get('__package__')}.{name}")
                    if isinstance(found := sys.modules.get(whole), ModuleType)
                ]
        walked: set[int] = set()
        for module in modules:  # grows on the way: package.module.NAME
            if id(module) in walked:
                continue
            walked.add(id(module))
            own = _is_own(module)
            parts = [vars(module)[name] for name in named if name in vars(module)]
            modules += [part for part in parts if isinstance(part, ModuleType)]
            read += [part for part in parts if type(part) in _LEAVES or (own and not isinstance(part, ModuleType))]
        self.several([*cells, value.__defaults__, value.__kwdefaults__, vars(value), *read])

    def instance(self, value: Any, kind: type) -> None:
        """Any other object: its attributes and its class; as it would be pickled, if it is not written in Python."""
        written = [base for base in kind.__mro__ if base not in (object, Generic, Protocol)]
        for base in written:
            if base not in self.in_python:
                self.in_python[base] = _in_python(base)
        foreign = next((base for base in written if not self.in_python[base]), None)
        if foreign is None:
            own = getattr(value, "__dict__", None)
            named = [
                name for base in written for name, part in vars(base).items() if isinstance(part, MemberDescriptorType)
            ]
            self.several([own if isinstance(own, dict) else None, *(getattr(value, name, None) for name in named)])
        elif foreign.__module__.partition(".")[0] == "pyarrow":
            self.facts.append(Itself(value))  # nobody changes what is in there
            return
        else:
            self.several(_reduced(value, kind, foreign))
        for base in written:
            if not _is_foreign(base):
                self.several([base])


def _reduced(value: Any, kind: type, foreign: type) -> list[Any]:
    """What an object would be pickled as; only of classes of which it is known that this is cheap, and all there is."""
    root = foreign.__module__.partition(".")[0]
    known = foreign in _BUILT_IN if root == "builtins" else root in _REDUCED or root in sys.stdlib_module_names
    if not known or hasattr(kind, "__next__"):
        raise UnknownError(f"a {kind.__name__}, whose state cannot be seen")
    try:
        reduced = reduce(value) if (reduce := copyreg.dispatch_table.get(kind)) else value.__reduce_ex__(4)
    except Exception as error:  # whatever its author thought of
        raise UnknownError(f"a {kind.__name__}, which cannot be pickled") from error
    return [reduced] if isinstance(reduced, str) else [*reduced[:3], *map(list, filter(None, reduced[3:5]))]


def _in_python(kind: type) -> bool:
    """Whether a class is written in Python, so that what its objects have are attributes."""
    descriptors = (MethodDescriptorType, WrapperDescriptorType, ClassMethodDescriptorType, BuiltinFunctionType)
    return bool(kind.__flags__ & _ON_HEAP) and not any(
        isinstance(part, descriptors)
        or (isinstance(part, GetSetDescriptorType) and name not in ("__dict__", "__weakref__"))
        for name, part in vars(kind).items()
    )


@functools.lru_cache(1024)
def names(code: CodeType) -> tuple[str, ...]:
    """The names that a function, and those within it, look up."""
    inner = chain.from_iterable(names(part) for part in code.co_consts if isinstance(part, CodeType))
    return tuple(dict.fromkeys([*code.co_names, *inner]))


def _is_foreign(kind: type) -> bool:
    """Whether a class is Python's or an installed library's."""
    module = sys.modules.get(kind.__module__)
    if module is None:
        return False
    path = getattr(module, "__file__", None)
    return kind.__module__ != "__main__" if path is None else _is_installed(path)


def _is_own(module: ModuleType) -> bool:
    """Whether a module is neither Python's nor that of a library that is not read."""
    path = getattr(module, "__file__", None)
    return module.__name__.partition(".")[0] not in sys.stdlib_module_names if path is None else not _is_installed(path)


@functools.lru_cache(1024)
def _is_installed(path: str) -> bool:
    for home in ("site-packages", "dist-packages"):
        before, _, inside = path.rpartition(home)
        if before:
            return PurePath(inside[1:] or ".").parts[0].partition(".")[0] in _TRUSTED
    return path.startswith((*_STANDARD, "<frozen"))


_STANDARD = tuple({sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")})
