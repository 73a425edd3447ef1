# SPDX-License-Identifier: Apache-2.0
"""Hyperparameters: captured by the class at construction (W1 to W4), and given back to a constructor (B5)."""

from __future__ import annotations

import abc
import copy
import dataclasses
import inspect
import pickle
import threading
import warnings
import weakref
from argparse import Namespace
from enum import Enum
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import pytest
import torch
from torch import nn

from leyden.errors import LeydenWarning, MisconfigurationException
from leyden.hparams import (
    AttributeDict,
    HyperparametersMixin,
    constructor_kwargs,
    hparams_name,
    load_hparams_from_tags_csv,
    load_hparams_from_yaml,
    logs_hparams,
    plain_hparams,
    save_hparams_to_tags_csv,
    save_hparams_to_yaml,
)


class Base(HyperparametersMixin, nn.Module):
    """As a user's base class: the mixin and a module."""

    def __init__(self, *args, **kwargs):
        super().__init__()


class Saves(Base):
    def __init__(self, a, b=2, **kw):
        super().__init__()
        self.save_hyperparameters()


# ------------------------------------------------------------------ what is captured


def test_all_arguments_with_defaults_and_extra_keywords():
    m = Saves(1, z=9)
    assert m.hparams == {"a": 1, "b": 2, "z": 9}
    assert m.hparams.z == 9
    assert isinstance(m.hparams, AttributeDict)
    assert hparams_name(m) == "kwargs"
    assert logs_hparams(m)


def test_nothing_saved():
    m = Base()
    assert m.hparams == {}
    assert m.hparams_initial == {}
    assert hparams_name(m) is None
    assert not logs_hparams(m)


def test_derived_class_adds_its_arguments_and_wins():
    class Child(Saves):
        def __init__(self, c, b=5):
            super().__init__(a=1, b=b + 1, z=9)

    assert Child(3).hparams == {"a": 1, "b": 5, "c": 3, "z": 9}


def test_saved_by_base_then_by_child_with_ignore():
    class Child(Saves):
        def __init__(self, c, b=5):
            super().__init__(a=1, b=b + 1)
            self.save_hyperparameters(ignore="a")

    assert Child(3).hparams == {"b": 5, "c": 3}


def test_inherited_constructor():
    class Child(Saves):
        pass

    assert Child(1).hparams == {"a": 1, "b": 2}


def test_saved_before_the_module_is_initialised():
    class Early(Base):
        def __init__(self, a):
            self.save_hyperparameters()
            super().__init__()

    m = Early(4)
    assert m.hparams == {"a": 4}
    assert logs_hparams(m)


def test_saved_in_a_function_that_the_constructor_calls():
    def helper(module):
        module.save_hyperparameters()

    class Delegates(Base):
        def __init__(self, a):
            super().__init__()
            helper(self)

    assert Delegates(4).hparams == {"a": 4}


def test_positional_only_and_args():
    class Odd(Base):
        def __init__(self, a, /, *args, n=3):
            super().__init__()
            self.save_hyperparameters()

    assert Odd(1, 2, 3).hparams == {"a": 1, "n": 3}


def test_self_and_kwargs_may_have_any_name():
    class Odd(Base):
        def __init__(this, x, **self):
            super().__init__()
            this.save_hyperparameters()

    assert Odd(1, self=5).hparams == {"x": 1, "self": 5}


def test_W1_arguments_of_other_objects_do_not_leak():
    """W1: an object that is built inside another one's constructor keeps its own arguments only."""

    class Outer(Base):
        def __init__(self, secret, a=100):
            super().__init__()
            self.inner = Saves(1)
            self.save_hyperparameters()

    m = Outer("s")
    assert m.inner.hparams == {"a": 1, "b": 2}
    assert m.hparams == {"secret": "s", "a": 100}


def test_W1_threads_do_not_see_each_other():
    seen = {}

    class Waits(Base):
        def __init__(self, a, gate):
            super().__init__()
            gate.wait(5)
            self.save_hyperparameters(ignore="gate")

    gate = threading.Barrier(2)
    threads = [threading.Thread(target=lambda i=i: seen.update({i: Waits(i, gate).hparams})) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert seen == {0: {"a": 0}, 1: {"a": 1}}


def test_W4_values_are_those_that_were_passed():
    """W4: what the constructor does to its arguments does not change what is saved."""

    class Mutates(Base):
        def __init__(self, lr=None, layers=(1,), options=None, ns=None):
            super().__init__()
            lr = lr or 0.1
            options["deep"]["list"].append(99)
            options["new"] = 1
            ns.x = 5
            self.save_hyperparameters()

    options = {"deep": {"list": [1]}}
    m = Mutates(options=options, ns=Namespace(x=1))
    assert m.hparams == {"lr": None, "layers": (1,), "options": {"deep": {"list": [1]}}, "ns": Namespace(x=1)}
    assert options["new"] == 1  # the constructor itself got the real thing


def test_W4_mutable_default():
    class Default(Base):
        def __init__(self, layers=[1, 2]):  # noqa: B006
            super().__init__()
            self.save_hyperparameters()
            layers.append(3)

    assert Default().hparams == {"layers": [1, 2]}


def test_W4_later_changes_of_hparams_do_not_reach_the_initial_ones():
    m = Saves([1], b={"x": [1]})
    m.hparams.a.append(2)
    m.hparams.b["x"].append(2)
    m.hparams.c = 3
    m.hparams_initial["d"] = 1
    assert m.hparams_initial == {"a": [1], "b": {"x": [1]}}


def test_data_is_shared_not_copied():
    tensor, array, module, many = torch.ones(3), np.ones(3), object(), list(range(20_000))
    m = Saves([tensor, array], module=module, many=many)
    assert m.hparams.a[0] is tensor
    assert m.hparams.a[1] is array
    assert m.hparams.module is module
    assert m.hparams.many is many


def test_recursive_argument():
    loop = [1]
    loop.append(loop)
    assert Saves(loop).hparams.a[0] == 1


def test_arguments_are_forgotten_after_construction():
    class Big:
        pass

    class Forgets(Base):
        def __init__(self, big):
            super().__init__()

    big = Big()
    ref = weakref.ref(big)
    m = Forgets(big)
    with pytest.raises(TypeError):
        Forgets()
    del big
    assert ref() is None
    assert set(vars(m)) == set(vars(nn.Module()))


# ------------------------------------------------------------------ ways to call it


def test_named():
    class Named(Base):
        def __init__(self, a, b, **kw):
            super().__init__()
            self.save_hyperparameters("a", "q", logger=False)

    m = Named(1, 2, q=3)
    assert m.hparams == {"a": 1, "q": 3}
    assert not logs_hparams(m)


def test_unknown_name():
    class Wrong(Base):
        def __init__(self, learning_rate):
            super().__init__()
            self.save_hyperparameters("learning_rat")

    with pytest.raises(MisconfigurationException, match="no argument of that name.*Did you mean 'learning_rate'"):
        Wrong(1)


@pytest.mark.parametrize("given", [{"x": 1}, Namespace(x=1), AttributeDict(x=1)])
@pytest.mark.parametrize("changed", [False, True])
def test_one_object(given, changed):
    class Takes(Base):
        def __init__(self, cfg, other=1):
            super().__init__()
            if changed:
                vars(cfg).update(x=2) if isinstance(cfg, Namespace) else cfg.update(x=2)
            self.save_hyperparameters(cfg)

    m = Takes(copy.deepcopy(given))
    assert m.hparams == {"x": 2 if changed else 1}
    assert hparams_name(m) == "cfg"


def test_one_object_that_is_no_argument():
    class Takes(Base):
        def __init__(self, a, t):
            super().__init__()
            self.save_hyperparameters({"x": [1]}, ignore=["y"])

    m = Takes(1, torch.ones(2))
    assert m.hparams == {"x": [1]}
    assert hparams_name(m) is None


def test_a_dataclass_as_the_object():
    @dataclasses.dataclass
    class Config:
        x: int = 1

    class Takes(Base):
        def __init__(self, cfg):
            super().__init__()
            self.save_hyperparameters(cfg)

    assert Takes(Config()).hparams == {"x": 1}


def test_two_calls_add_up():
    class Twice(Base):
        def __init__(self, a, b):
            super().__init__()
            self.save_hyperparameters("a")
            self.save_hyperparameters({"c": 3})

    assert Twice(1, 2).hparams == {"a": 1, "c": 3}


@pytest.mark.parametrize("empty", [{}, [], None])
def test_empty_object_saves_nothing(empty):
    class Nothing(Base):
        def __init__(self, a):
            super().__init__()
            self.save_hyperparameters(empty)

    assert Nothing(1).hparams == {}


@pytest.mark.parametrize("bad", [1, 3.0, [1, 2]])
def test_object_without_names(bad):
    with pytest.raises(MisconfigurationException, match="must be a dict, a namespace or a dataclass"):
        Base().save_hyperparameters(bad)


def test_two_objects():
    with pytest.raises(MisconfigurationException, match="got 2 objects"):
        Base().save_hyperparameters({"a": 1}, {"b": 1})


@pytest.mark.parametrize("ignore", ["a", ["a", "unknown"], ("a",), {"a"}])
def test_ignore(ignore):
    class Ignores(Base):
        def __init__(self, a, b=1):
            super().__init__()
            self.save_hyperparameters(ignore=ignore, frame=inspect.currentframe())

    assert Ignores(1).hparams == {"b": 1}


def test_ignore_applies_to_an_object_too():
    m = Base()
    m.save_hyperparameters({"a": 1, "b": 2}, ignore="a")
    assert m.hparams == {"b": 2}


def test_outside_of_the_constructor():
    m = Base()
    with pytest.warns(LeydenWarning, match="Base was called outside its __init__"):
        m.save_hyperparameters()
    assert m.hparams == {}


def test_W2_module_as_hyperparameter_is_kept_and_named():
    layer = nn.Linear(1, 1)
    with pytest.warns(LeydenWarning, match=r"'net' is a module.*ignore=\['net'\]"):
        m = Saves(1, net=layer)
    assert m.hparams.net is layer


# ------------------------------------------------------------------ kinds of classes


def test_dataclass():
    @dataclasses.dataclass(eq=False)
    class Data(Base):
        a: int
        b: list = dataclasses.field(default_factory=lambda: [1])
        hidden: int = dataclasses.field(default=0, init=False)

        def __post_init__(self):
            super().__init__()
            self.save_hyperparameters()

    class Child(Data):
        def __init__(self, c):
            super().__init__(a=c + 1)

    assert Data(3).hparams == {"a": 3, "b": [1]}
    assert Child(3).hparams == {"a": 4, "b": [1], "c": 3}


def test_constructor_put_in_later():
    class Late(Base):
        pass

    def __init__(self, a):
        Base.__init__(self)
        self.a = a
        self.save_hyperparameters()

    Late.__init__ = __init__
    assert Late(3).hparams == {"a": 3}


def test_constructor_from_a_class_without_the_mixin():
    class Plain:
        def __init__(self, a):
            super().__init__()
            self.save_hyperparameters()

    class PlainModule(nn.Module):
        def __init__(self, a):
            super().__init__()

    class Both(Plain, Base):
        pass

    class Third(PlainModule, HyperparametersMixin):
        def forward(self):
            self.save_hyperparameters()

    assert Both(3).hparams == {"a": 3}
    assert Third(3).hparams == {}


def test_abstract_and_generic_classes():
    T = TypeVar("T")

    class Abstract(Base, abc.ABC, Generic[T]):
        def __init__(self, a):
            super().__init__()
            self.save_hyperparameters()

        @abc.abstractmethod
        def f(self): ...

    class Concrete(Abstract[int]):
        def f(self): ...

    assert Concrete(1).hparams == {"a": 1}
    with pytest.raises(TypeError, match="abstract"):
        Abstract(1)


def test_signature_and_documentation_are_kept():
    assert list(inspect.signature(Saves).parameters) == ["a", "b", "kw"]
    assert inspect.getfullargspec(Saves.__init__).args == ["self", "a", "b"]
    assert Saves.__init__.__qualname__ == "Saves.__init__"
    assert "self.save_hyperparameters()" in inspect.getsource(Saves.__init__)
    with pytest.raises(TypeError, match=r"Saves.__init__\(\) missing 1 required positional argument: 'a'"):
        Saves()


def test_one_frame_per_constructor():
    class Counts(Base):
        def __init__(self, depth):
            super().__init__()
            self.depth = len(inspect.stack(0)) - depth

    assert Counts(len(inspect.stack(0))).depth == 2


def test_wrapped_once():
    class Shares(Base):
        __init__ = Saves.__init__

    assert Shares.__init__ is Saves.__init__


def test_copies_and_pickles():
    m = Saves(1, b=[2])
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert other.hparams == other.hparams_initial == {"a": 1, "b": [2]}
        assert other.hparams is not m.hparams


def test_scripting():
    class Scripted(Base):
        def __init__(self, a):
            super().__init__()
            self.save_hyperparameters()

        def forward(self, x):
            return x + 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates scripting
        assert torch.jit.script(Scripted(1))(torch.zeros(1)) == 1


# ------------------------------------------------------------------ construct again


class Target:
    def __init__(self, a, b=2, *, c):
        pass


class TakesAny:
    def __init__(self, a, **kw):
        pass


class TakesConfig:
    def __init__(self, cfg, extra=1):
        pass


def test_constructor_kwargs_filters_and_overrides():
    saved = {"a": 1, "c": 3, "logged": 4, "_instantiator": "os.system", "_class_path": "x"}
    assert constructor_kwargs(Target, saved, {"c": 5}) == {"a": 1, "c": 5}
    assert constructor_kwargs(TakesAny, saved, {"more": 5}) == {"a": 1, "c": 3, "logged": 4, "more": 5}


def test_constructor_kwargs_restores_what_was_stored():
    plain, _ = plain_hparams({"a": Path("x"), "c": [Namespace(y=1)]})
    assert constructor_kwargs(Target, plain, {}) == {"a": Path("x"), "c": [Namespace(y=1)]}


def test_constructor_kwargs_nested():
    kwargs = constructor_kwargs(TakesConfig, {"lr": 1, "n": 2}, {"lr": 5, "extra": 3}, name="cfg")
    assert kwargs == {"cfg": {"lr": 5, "n": 2, "extra": 3}, "extra": 3}
    assert kwargs["cfg"].lr == 5


def test_B5_missing_arguments_are_named_with_their_source():
    with pytest.raises(MisconfigurationException) as error:
        constructor_kwargs(Target, {"b": 1}, {}, source="'best.ckpt'", unreadable=["a"])
    text = str(error.value)
    assert "Target.__init__() needs 'a', 'c', which 'best.ckpt' does not give (it has: b)." in text
    assert "'a': stored pickled" in text
    assert "weights_only=False" in text
    assert "load_from_checkpoint(path, a=..., c=...)" in text


def test_misspelt_override():
    with pytest.raises(MisconfigurationException, match="takes no argument 'aa'. It takes: a, b, c. Did you mean 'a'"):
        constructor_kwargs(Target, {"a": 1, "c": 2}, {"aa": 3})


# ------------------------------------------------------------------ files


class Colour(Enum):
    RED = 1


VALUES = {
    "i": 1, "f": 0.5, "s": "x", "n": None, "l": [1, "a"], "d": {"k": {"z": 1}}, "b": True,
}  # fmt: skip


@pytest.mark.parametrize("wrap", [dict, AttributeDict, lambda v: Namespace(**v)])
def test_yaml_and_csv_round_trips(tmp_path, wrap):
    save_hparams_to_yaml(tmp_path / "new" / "h.yaml", wrap(VALUES))
    assert load_hparams_from_yaml(tmp_path / "new" / "h.yaml") == VALUES
    save_hparams_to_tags_csv(str(tmp_path / "newer" / "h.csv"), wrap(VALUES))
    assert load_hparams_from_tags_csv(str(tmp_path / "newer" / "h.csv")) == VALUES


def test_yaml_of_other_values(tmp_path):
    values = {
        "enum": Colour.RED,
        "path": Path("a/b"),
        "tuple": (1, 2),
        "device": torch.device("cpu"),
        "np": np.float32(0.5),
        "ns": Namespace(x=AttributeDict(y=1)),
        "f": {"g": len},
    }
    with pytest.warns(LeydenWarning, match=r"'f.g' \(builtin_function_or_method\) cannot be written as YAML"):
        save_hparams_to_yaml(tmp_path / "h.yaml", values)
    assert load_hparams_from_yaml(tmp_path / "h.yaml") == {
        "enum": "RED",
        "path": "a/b",
        "tuple": [1, 2],
        "device": "cpu",
        "np": 0.5,
        "ns": {"x": {"y": 1}},
        "f": {"g": "<built-in function len>"},
    }


def test_yaml_runs_no_code(tmp_path):
    (tmp_path / "h.yaml").write_text("x: !!python/object/apply:os.system ['echo hi']")
    with pytest.raises(Exception, match="could not determine a constructor"):
        load_hparams_from_yaml(tmp_path / "h.yaml")


def test_yaml_that_is_no_mapping(tmp_path):
    (tmp_path / "h.yaml").write_text("- 1")
    with pytest.raises(MisconfigurationException, match="h.yaml holds a list"):
        load_hparams_from_yaml(tmp_path / "h.yaml")
    (tmp_path / "h.yaml").write_text("")
    assert load_hparams_from_yaml(tmp_path / "h.yaml") == {}


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_hparams_from_yaml(tmp_path / "none.yaml")


def test_remote_file():
    save_hparams_to_yaml("memory://h/h.yaml", VALUES)
    assert load_hparams_from_yaml("memory://h/h.yaml") == VALUES
