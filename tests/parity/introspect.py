# SPDX-License-Identifier: Apache-2.0
"""Describes modules, classes and functions in plain lines, the same way for Lightning's and for ours, and compares them.

A line of the table is ``kind name(arguments)``; the members of a class stand below it, indented. ``from module: names`` are
names that a module has from another one of the table.
"""

from __future__ import annotations

import ast
import enum
import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, NamedTuple


class Argument(NamedTuple):
    """One argument of a signature: its name with ``*`` or ``**``, whether it is by keyword only, and its default's text."""

    name: str
    keyword_only: bool
    default: str | None

    @property
    def is_rest(self) -> bool:
        return self.name.startswith("*")


class Entry(NamedTuple):
    """One thing: what it is (class, function, method, property, value …) and, where it is called, its arguments."""

    kind: str
    arguments: tuple[Argument, ...] | None

    def __str__(self) -> str:
        return self.kind if self.arguments is None else f"{self.kind} {signature_text(self.arguments)}"


# ---------------------------------------------------------------------------------------------------- what a thing is


_NOTHING = object()


def default_text(value: Any) -> str:
    """The text of a default: the same for an enum and its value, ``…`` for what has no plain text."""
    if isinstance(value, enum.Enum):
        value = value.value
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        inner = ", ".join(map(default_text, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{default_text(k)}: {default_text(v)}" for k, v in value.items()) + "}"
    if type(value).__name__ in ("timedelta", "device"):
        return f"{value}".replace(" ", "_")
    name = getattr(value, "__name__", None)
    return str(name) if name and name != "<lambda>" else "…"


def arguments_of(function: Any, skip_first: bool) -> tuple[Argument, ...] | None:
    """The arguments of a function; None where python cannot tell."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (ValueError, TypeError):
        return None
    found = []
    for parameter in parameters[1 if skip_first else 0 :]:
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = None if parameter.default is parameter.empty else default_text(parameter.default)
        found.append(Argument(stars + parameter.name, parameter.kind is parameter.KEYWORD_ONLY, default))
    return tuple(found)


def describe(thing: Any) -> Entry:
    """What a name of a module is."""
    if inspect.isclass(thing):
        if issubclass(thing, enum.Enum) or (issubclass(thing, tuple) and hasattr(thing, "_fields")):
            names = list(thing.__members__) if issubclass(thing, enum.Enum) else list(thing._fields)
            return Entry("class", tuple(Argument(name, False, None) for name in names))
        init = thing.__init__
        if init is object.__init__ or not isinstance(inspect.unwrap(init), FunctionType):
            return Entry("class", None)
        return Entry("class", arguments_of(init, skip_first=True))
    if inspect.isroutine(thing) or (callable(thing) and _is_ours(thing)):
        return Entry("function", arguments_of(thing, skip_first=False))
    if inspect.ismodule(thing):
        return Entry("module", None)
    return Entry("value", None)


def _is_ours(thing: Any) -> bool:
    """Whether an object is of a class of ours: one that can be called serves as a function."""
    return type(thing).__module__.split(".")[0] == "leyden"


def describe_member(owner: type, name: str) -> Entry | None:
    """What a member of a class is; None if it has none of that name."""
    raw = inspect.getattr_static(owner, name, _NOTHING)
    if raw is _NOTHING:
        return Entry("attribute", None) if name in assigned_names(owner) else None
    if isinstance(raw, staticmethod):
        return Entry("staticmethod", arguments_of(raw.__func__, skip_first=False))
    if isinstance(raw, classmethod):
        return Entry("classmethod", arguments_of(raw.__func__, skip_first=True))
    if isinstance(raw, FunctionType):
        return Entry("method", arguments_of(raw, skip_first=True))
    if isinstance(raw, property) or type(raw).__name__ in ("cached_property", "_DeprecatedProperty"):
        return Entry("settable" if getattr(raw, "fset", None) else "property", None)
    bound = getattr(owner, name, None)
    if inspect.ismethod(bound):  # a decorator of one's own
        return Entry("classmethod", arguments_of(bound, skip_first=False))
    if callable(getattr(raw, "__get__", None)) and callable(getattr(raw, "__func__", getattr(raw, "method", None))):
        inner = getattr(raw, "__func__", getattr(raw, "method", None))
        return Entry("classmethod", arguments_of(inner, skip_first=True))
    return Entry("attribute", None)


def assigned_names(owner: type) -> set[str]:
    """The names that the source of a class, and of its bases, gives to ``self`` or declares."""
    found: set[str] = set()
    for base in owner.__mro__:
        if base is object or base.__module__.split(".")[0] in ("torch", "builtins", "typing", "abc"):
            continue
        found |= set(vars(base).get("__annotations__", {}))
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue
        for node in ast.walk(tree):
            stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            if stored and isinstance(node.value, ast.Name) and node.value.id == "self":
                found.add(node.attr)
    return found


# ---------------------------------------------------------------------------------------------------- texts


def signature_text(arguments: Iterable[Argument]) -> str:
    """``(a, b=1, *, c=None, **rest)``."""
    words, bare = [], False
    for argument in arguments:
        if argument.keyword_only and not bare and not any(word.startswith("*") for word in words):
            words.append("*")
        bare = bare or argument.keyword_only
        words.append(argument.name if argument.default is None else f"{argument.name}={argument.default}")
    return f"({', '.join(words)})"


def parse_signature(text: str) -> tuple[Argument, ...]:
    """The reverse of ``signature_text``."""
    found, keyword_only = [], False
    for word in _split(text.strip()[1:-1]):
        if word == "*":
            keyword_only = True
            continue
        name, sign, default = word.partition("=")
        rest = name.startswith("*")
        found.append(Argument(name, keyword_only and not rest, default if sign else None))
        keyword_only = keyword_only or (rest and not name.startswith("**"))
    return tuple(found)


def _split(text: str) -> list[str]:
    words, depth, quote, word = [], 0, "", ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "([{") - (letter in ")]}")
            if letter == "," and not depth:
                words.append(word.strip())
                word = ""
                continue
        word += letter
    return [*words, word.strip()] if word.strip() else words


# ---------------------------------------------------------------------------------------------------- the table


class Row(NamedTuple):
    """A name of the table: ``name`` is ``Class.member`` for a member; ``home`` is set for a name of another module."""

    module: str
    name: str
    entry: Entry | None
    home: str = ""

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


def read_table(path: Path) -> list[Row]:
    """Read the table."""
    rows: list[Row] = []
    module = owner = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("["):
            module = line.strip("[]")
            continue
        kind, _, rest = line.strip().partition(" ")
        if kind == "from":
            home, _, names = rest.partition(": ")
            rows += [Row(module, name, None, home) for name in names.split()]
            continue
        name, sign, text = rest.partition("(")
        entry = Entry(kind, parse_signature(f"({text}") if sign else None)
        if line.startswith(" "):
            name = f"{owner}.{name}"
        else:
            owner = name
        rows.append(Row(module, name, entry))
    return rows


def lines_of(rows: Iterable[Row]) -> Iterator[str]:
    """Yield the lines of a table."""
    module = ""
    reexports: dict[str, list[str]] = {}

    def flush() -> Iterator[str]:
        for home, names in reexports.items():
            yield f"from {home}: {' '.join(names)}"
        reexports.clear()

    for row in rows:
        if row.module != module:
            yield from flush()
            module = row.module
            yield f"\n[{module}]"
        if row.home:
            reexports.setdefault(row.home, []).append(row.name)
            continue
        assert row.entry is not None
        text = "" if row.entry.arguments is None else signature_text(row.entry.arguments)
        indent, name = ("  ", row.name.partition(".")[2]) if "." in row.name else ("", row.name)
        yield f"{indent}{row.entry.kind} {name}{text}"
    yield from flush()


def find(module: str, name: str) -> Any:
    """Import a name of a module, as a program does."""
    return getattr(importlib.import_module(module), name)


# ---------------------------------------------------------------------------------------------------- comparing


def difference(theirs: Entry, ours: Entry) -> str:
    """What a program written for ``theirs`` could trip over with ``ours``; nothing if they agree."""
    if not _kind_serves(theirs.kind, ours.kind):
        return f"is a {ours.kind}, there a {theirs.kind}"
    if theirs.arguments is None or ours.arguments is None:
        return ""
    return _arguments_differ(theirs.arguments, ours.arguments)


def _kind_serves(theirs: str, ours: str) -> bool:
    if theirs == ours:
        return True
    serving = {
        "property": ("settable", "attribute"),
        "settable": ("attribute",),
        "attribute": ("property", "settable"),
        "staticmethod": ("classmethod",),
        "function": ("class",),
        "value": ("class", "function"),
    }
    return ours in serving.get(theirs, ())


def _arguments_differ(theirs: tuple[Argument, ...], ours: tuple[Argument, ...]) -> str:
    by_name = {argument.name: argument for argument in ours}
    rests = {argument.name[: argument.name.rindex("*") + 1] for argument in ours if argument.is_rest}
    for argument in theirs:
        if argument.name.lstrip("*").startswith("_") and argument.is_rest:
            continue  # a hook that wants no more of what it is called with
        if argument.is_rest:
            stars = argument.name[: argument.name.rindex("*") + 1]
            if stars not in rests:
                return f"takes no {argument.name}"
            continue
        mine = by_name.get(argument.name)
        if mine is None:
            return f"lacks the argument {argument.name}"
        if mine.keyword_only and not argument.keyword_only:
            return f"takes {argument.name} by keyword only"
        if mine.default != argument.default:
            return f"{argument.name}={mine.default}, there {argument.default}"
    positional = [argument.name for argument in theirs if not argument.keyword_only and not argument.is_rest]
    mine_positional = [argument.name for argument in ours if not argument.keyword_only and not argument.is_rest]
    if mine_positional[: len(positional)] != positional:
        return f"has its arguments in another order: {', '.join(mine_positional)}"
    known = {argument.name for argument in theirs}
    if any(argument.name.startswith("*") and not argument.name.startswith("**") for argument in theirs):
        return ""
    for argument in ours:
        if argument.name not in known and not argument.is_rest and argument.default is None:
            return f"needs {argument.name}, which is unknown there"
    return ""


# ---------------------------------------------------------------------------------------------------- recording


def rows_of_module(name: str, private: Iterable[str] = (), members: Callable[[type], bool] = bool) -> Iterator[Row]:
    """Yield the public names of a module that is installed, the members of its classes after them."""
    module = importlib.import_module(name)
    for public in sorted(names_of(module) | set(private)):
        thing = getattr(module, public)
        home = getattr(thing, "__module__", name)
        is_object = inspect.isclass(thing) or inspect.isroutine(thing)
        elsewhere = isinstance(home, str) and home != name and home.split(".")[0] == name.split(".")[0]
        if is_object and elsewhere and getattr(thing, "__name__", "") == public:
            yield Row(name, public, None, home)
            continue
        yield Row(name, public, describe(thing))
        if inspect.isclass(thing) and members(thing):
            yield from rows_of_class(name, public, thing)


def rows_of_class(module: str, name: str, owner: type) -> Iterator[Row]:
    """Yield the public bases of a class, and the public members that it, or a private base, declares."""
    root = module.split(".")[0]
    seen: set[str] = set()
    known: set[type] = set()
    for base in owner.__mro__:
        if base.__module__.split(".")[0] != root or issubclass(owner, enum.Enum) or base in known:
            continue
        if base is not owner and not base.__name__.startswith("_") and "._" not in base.__module__:
            yield Row(module, f"{name}.{base.__module__}.{base.__name__}", Entry("base", None))
            known |= set(base.__mro__)  # its members stand with it
        else:
            seen |= {member for member in vars(base) if not member.startswith("_")}
    if issubclass(owner, enum.Enum):
        seen |= {key for key in vars(owner) if not key.startswith("_") and key not in owner.__members__}
    for member in sorted(seen):
        entry = describe_member(owner, member)
        if entry is not None:
            yield Row(module, f"{name}.{member}", entry)


def names_of(module: ModuleType) -> set[str]:
    """The public names that a module defines, lists in ``__all__``, or, as a package, brings in from below."""
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    lines = Path(str(module.__file__)).read_text(encoding="utf-8").splitlines()
    found = set(getattr(module, "__all__", ()))
    package = str(module.__file__).endswith("__init__.py")
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node in tree.body:
            found.add(node.name)
        elif isinstance(node, ast.Assign) and node in tree.body:
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and node in tree.body and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning"):
            here = package or "F401" in lines[node.lineno - 1]
            found |= {alias.asname or alias.name for alias in node.names if here}
    return {name for name in found if not name.startswith("_") and hasattr(module, name)} - {"log", "warning_cache"}
