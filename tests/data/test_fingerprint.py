# SPDX-License-Identifier: Apache-2.0
"""Two readings of an object differ as soon as anything in it has changed, and what cannot be known has none."""

from __future__ import annotations

import functools
import importlib
import io
import itertools
import logging
import random
import re
import sys
import threading
from abc import ABC
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Subset, TensorDataset, default_collate

from leyden.data import fingerprint
from leyden.data.fingerprint import Itself, UnknownError, read, surroundings
from leyden.data.generators import find

LEVEL = 1
TABLE = {"level": 1}


class Reads:
    def __call__(self) -> int:
        return LEVEL + TABLE["level"]


class Slots:
    __slots__ = ("at",)

    def __init__(self) -> None:
        self.at = 0


class Point(NamedTuple):
    x: int
    y: list[int]


class Kind(type):
    epoch = 0


class Counts(Reads, ABC):
    seen = 0


class Further(Counts):
    pass


class Color(Enum):
    RED = 1


class Sub(Tensor):
    pass


@torch.no_grad()
def decorated() -> int:
    return TABLE["level"]


@functools.singledispatch
def dispatching(x: Any) -> int:
    return 0


def _set(name: str, value: Any) -> Callable[[Any], None]:
    return lambda target: setattr(target, name, value)


def _at(index: Any, value: Any) -> Callable[[Any], None]:
    def change(target: Any) -> None:
        target[index] = value

    return change


def _namespace(**values: Any) -> SimpleNamespace:
    return SimpleNamespace(**values)


LARGE = np.zeros(1_000_003, dtype=np.int32)

CHANGES: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "number": (_namespace(a=1), _set("a", 2)),
    "type of a number": (_namespace(a=1), _set("a", True)),
    "new attribute": (_namespace(a=1), _set("b", 1)),
    "none": (_namespace(a=None), _set("a", 0.0)),
    "long list": (list(range(50_000)), _at(33_333, -1)),
    "files of an image folder": ([(f"{i}.png", i % 3) for i in range(1000)], _at(700, ("700.png", 0))),
    "list of lists": ([[i] for i in range(100)], lambda target: target[50].append(1)),
    "dict": ({"a": {"b": 1}}, lambda target: target["a"].update(b=2)),
    "key": (OrderedDict(a=1), lambda target: target.update(b=target.pop("a"))),
    "set": ({1, 2}, lambda target: target.add(3)),
    "deque": (deque([1], maxlen=2), lambda target: target.append(1)),
    "bytearray": (bytearray(3), _at(0, 1)),
    "tuple with a name": (Point(1, []), lambda target: target.y.append(1)),
    "slots": (Slots(), _set("at", 1)),
    "subclass of a list": (type("Own", (list,), {})(), _set("a", 1)),
    "tensor in place": ([torch.zeros(3)], lambda target: target[0].add_(1)),
    "another tensor": ([torch.zeros(3)], _at(0, torch.zeros(3))),
    "parameter": (nn.Linear(2, 2), lambda target: nn.init.zeros_(target.weight)),
    "tensor past its version": ([torch.zeros(3)], lambda target: target[0].data.add_(1)),
    "tensor of another kind": ([torch.zeros((), dtype=torch.bfloat16)], lambda target: target[0].data.add_(1)),
    "small array": (np.zeros((3, 4)), _at((2, 3), 1)),
    "large tensor past its version": ([torch.zeros(600_000)], lambda target: target[0].data[333_333].add_(1)),
    "large tensor by way of numpy": ([torch.zeros(600, 1000).T], lambda target: target[0].numpy().fill(1)),
    "one of two views": (list(torch.zeros(2, 600_000)), lambda target: target[1].data.add_(1)),
    "rows as long as those of which there are sums": (
        np.arange(409_300 * 2).reshape(-1, 4093),
        lambda target: np.random.default_rng(0).shuffle(target),
    ),
    "attribute of a tensor": ([torch.zeros(3)], lambda target: setattr(target[0], "epoch", 1)),
    "order of a dict": (OrderedDict(a=1, b=2), lambda target: target.move_to_end("a")),
    "numbers of the array module": (array("d", [1, 2]), _at(0, 3)),
    "file in memory": (io.BytesIO(bytes(10)), lambda target: target.write(b"a")),
    "class of a class": (type.__call__(Kind, "Of", (), {}), lambda _: setattr(Kind, "epoch", Kind.epoch + 1)),
    "base of a class": ([Further], lambda _: setattr(Counts, "seen", Counts.seen + 1)),
    "zero": (_namespace(a=0.0), _set("a", -0.0)),
    "zero in a list": ([1.0, 0.0], _at(1, -0.0)),
    "subclass of a tensor": ([torch.zeros(3).as_subclass(Sub)], lambda target: target[0].data.add_(1)),
    "code of a function": ([lambda: 0], lambda target: setattr(target[0], "__code__", (lambda: 1).__code__)),
    "function in a library's decorator": (decorated, lambda _: TABLE.update(level=TABLE["level"] + 1)),
    "module that is held": (ModuleType("held"), _set("epoch", 1)),
    "enum": (Color.RED, _set("epoch", 1)),
    "level of a log": (logging.getLogger("leyden_test"), lambda target: target.setLevel(7)),
    "shape": ([np.zeros(6)], lambda target: _at(0, target[0].reshape(2, 3))(target)),
    "large array": (LARGE, _at(654_321, 1)),
    "end of a large array": (np.zeros(1_000_003, dtype=np.int32), _at(-1, 1)),
    "rows swapped": (np.arange(2_000_000).reshape(-1, 100), lambda target: np.random.default_rng(0).shuffle(target)),
    "array of objects": (np.array([[1], 2], dtype=object), lambda target: target[0].append(1)),
    "generator": (np.random.default_rng(0), lambda target: target.random()),
    "generator of torch": (torch.Generator(), lambda target: torch.rand(1, generator=target)),
    "generator of python": (random.Random(0), lambda target: target.random()),
    "subset": (Subset(TensorDataset(torch.zeros(3)), [0, 1]), lambda target: target.indices.append(2)),
    "nested": (ConcatDataset([TensorDataset(torch.zeros(3))]), lambda target: target.datasets[0].tensors[0].add_(1)),
    "partial": (functools.partial(max, [1]), lambda target: target.args[0].append(1)),
    "default": (lambda x, seen=[]: seen, lambda target: target(1).append(1)),
    "bound method": (deque([1]).append, lambda target: target(1)),
    "class": (Counts(), lambda _: setattr(Counts, "seen", Counts.seen + 1)),
    "function of a class": (Counts(), lambda _: setattr(Counts, "other", lambda self: 1)),
    "global": (Reads(), lambda _: globals().update(LEVEL=LEVEL + 1)),
    "global dict": (Reads().__call__, lambda _: TABLE.update(level=TABLE["level"] + 1)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen_and_nothing_else(name: str) -> None:
    value, change = CHANGES[name]
    before = read([value])
    assert read([value]) == before
    change(value)
    assert read([value]) != before


@pytest.mark.parametrize("size", [3, 600_000])
def test_tensors_are_read_wherever_new_ones_would_be(size: int) -> None:
    tensor = torch.zeros(size)
    before = read([tensor])
    with torch.inference_mode(), torch.device("meta"):
        assert read([tensor]) == before
        tensor.numpy()[2] = 1
        assert read([tensor]) != before


def test_what_a_function_encloses() -> None:
    level = 1

    def read_level() -> int:
        return level

    before = read([read_level])
    assert read([read_level]) == before
    level = 2
    assert read([read_level]) != before


def test_what_is_equal_and_not_the_same() -> None:
    first, second = object(), object()
    assert Itself(first) == Itself(first) != Itself(second)
    assert Itself(None) == Itself(None)
    assert Itself(first) != first
    tensor = torch.zeros(1)
    gone = Itself(tensor)
    assert gone == Itself(tensor)
    del tensor
    assert gone != Itself(torch.zeros(1))


def test_circles_and_what_comes_twice() -> None:
    circle: list[Any] = [1]
    circle.append(circle)
    assert read([circle]) == read([circle])
    shared = [1]
    assert read([[shared, shared]]) != read([[shared, [1]]])


def test_generators_that_are_seeded_do_not_count() -> None:
    data = _namespace(rng=np.random.default_rng(0), draw=random.random, other=np.random.rand, third=random.randint)
    seeded = list(find({"data": data}).values())
    before = read([data], seeded)
    for draw in (data.rng.random, data.draw, data.other, lambda: data.third(1, 9), lambda: torch.rand(1)):
        draw()
        assert read([data], seeded) == before


def test_what_is_common_in_data_sets_can_be_read() -> None:
    data = _namespace(
        root=Path("here"), pattern=re.compile("a"), lock=threading.Lock(), log=logging.getLogger("x"), add=np.add,
        collate=default_collate, dtype=torch.float32, kind=np.dtype("f4"), number=np.float32(1), module=random,
    )  # fmt: skip
    assert read([data]) == read([data])


def test_arrays_that_nobody_can_write_to_are_read_as_somebody_may_allow_it_again() -> None:
    data = np.zeros(1 << 20)
    view = data.view()
    data.flags.writeable = view.flags.writeable = False
    for each in (data, view):
        before = read([each])
        data.flags.writeable = True
        data[77] += 1
        data.flags.writeable = False
        assert read([each]) != before


def test_modules_within_modules_and_those_that_a_function_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a package keeps in a module of its own is seen, however a function gets there; installed ones too."""
    package = tmp_path / "site-packages" / "leyden_test_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from . import config\n")
    (package / "config.py").write_text("EPOCH = 0\nSTATE = [0]\n")
    (package / "code.py").write_text(
        "import leyden_test_package.config\nimport leyden_test_package as short\n\n"
        "def whole(): return leyden_test_package.config.EPOCH\n"
        "def alias(): return short.config.STATE\n"
        "def within():\n    from leyden_test_package.config import EPOCH\n    return EPOCH\n"
        "def relative():\n    from .config import EPOCH\n    return EPOCH\n"
        "def package():\n    from . import config\n    return config.STATE[0]\n"
        "class Data:\n    def __getitem__(self, i): return alias()\n"
    )
    monkeypatch.syspath_prepend(str(package.parent))
    code, config = importlib.import_module("leyden_test_package.code"), sys.modules["leyden_test_package.config"]
    roots = [code.whole, code.alias, code.within, code.relative, code.package, code.Data()]
    before = [read([root]) for root in roots]
    assert [read([root]) for root in roots] == before
    config.EPOCH, config.STATE[0] = 1, 1
    assert not any(read([root]) == former for root, former in zip(roots, before, strict=True))
    for name in [name for name in sys.modules if name.startswith("leyden_test_package")]:
        monkeypatch.delitem(sys.modules, name)


def test_a_cache_is_known_only_as_long_as_it_is_empty() -> None:
    @functools.lru_cache(None)
    def cached(index: int) -> list[int]:
        return [index]

    assert read([cached]) == read([cached])
    cached(1)
    with pytest.raises(UnknownError, match="a cache that is in use"):
        read([cached])


def test_containers_are_read_without_the_code_of_a_subclass() -> None:
    class Loads(list[int]):
        def __iter__(self) -> Any:
            raise AssertionError

        __len__ = __iter__  # type: ignore[assignment]

    value = Loads([1])
    before = read([value])
    list.append(value, 2)
    assert read([value]) != before


def test_the_surroundings_of_a_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = surroundings()
    assert surroundings() == before
    monkeypatch.setenv("LEYDEN_TEST", "1")
    changed = surroundings()
    assert changed != before
    monkeypatch.chdir(tmp_path)
    assert surroundings() != changed


def test_tables_of_pandas() -> None:
    pandas = pytest.importorskip("pandas")
    names = [f"{i}.png" for i in range(100)]
    table = pandas.DataFrame({"file": names, "label": range(100), "time": pandas.date_range("2020", periods=100)})
    before = read([_namespace(table=table)])
    _ = table.iloc[3], table.loc[5], table["label"].to_numpy(), table.label.sum()  # fills what pandas keeps ready
    assert read([_namespace(table=table)]) == before
    for change in (
        lambda: table.__setitem__("more", 1), lambda: table.iloc.__setitem__((3, 1), 7),
        lambda: table.iloc.__setitem__((50, 0), "other.png"), lambda: setattr(table, "index", range(1, 101)),
    ):  # fmt: skip
        change()
        assert read([_namespace(table=table)]) != before
        before = read([_namespace(table=table)])


def test_large_files_mapped_into_memory_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_bytes(bytes(2 << 20))
    tokens = np.memmap(tmp_path / "tokens", dtype=np.uint16, mode="r")
    assert any(isinstance(fact, Itself) for fact in read([tokens]))
    assert read([tokens]) == read([tokens])
    with pytest.raises(UnknownError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprint, "BYTES", 1 << 20)
        read([np.memmap(tmp_path / "tokens", dtype=np.uint16, mode="c")])


def test_objects_of_libraries_that_are_not_written_in_python_are_unknown() -> None:
    yaml = pytest.importorskip("yaml")
    if not hasattr(yaml, "CParser"):
        pytest.skip("yaml is written in Python here")
    with pytest.raises(UnknownError, match="CParser, whose state"):
        read([yaml.CParser("a: 1")])


def _endless(monkeypatch: pytest.MonkeyPatch, name: str, limit: int) -> None:
    monkeypatch.setattr(fingerprint, name, limit)


@pytest.mark.parametrize(
    "value",
    [
        iter([1]), itertools.count(), (i for i in [1]), (_ for _ in ()), np.zeros((3000, 3000))[:, ::2],
        memoryview(b"a"),
        torch.eye(3).to_sparse(), dispatching, lambda: globals()["LEVEL"], lambda: sys.modules["leyden"],
    ],
    ids=["iterator", "count", "generator", "empty generator", "large and not in one piece", "cannot be pickled",
         "sparse", "registry", "globals", "modules"],
)  # fmt: skip
def test_what_cannot_be_known_has_no_reading(value: Any) -> None:
    with pytest.raises(UnknownError):
        read([[value]])


def test_an_open_file_has_no_reading(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file, pytest.raises(UnknownError):
        read([file])


def test_inference_tensors_have_no_reading() -> None:
    with torch.inference_mode():
        tensor = torch.zeros(2)
    with pytest.raises(UnknownError):
        read([tensor])


@pytest.mark.parametrize(("name", "value"), [("ITEMS", [1] * 11), ("OBJECTS", [[i] for i in range(11)])])
def test_too_much_has_no_reading(monkeypatch: pytest.MonkeyPatch, name: str, value: Any) -> None:
    read([value])
    _endless(monkeypatch, name, 10)
    with pytest.raises(UnknownError, match="more than 10"):
        read([value])


def test_arrays_that_are_too_large_have_no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    _endless(monkeypatch, "BYTES", 1 << 20)
    with pytest.raises(UnknownError, match="large"):
        read([LARGE])
