# SPDX-License-Identifier: Apache-2.0
"""Reads what a code base imports from Lightning and test_tube, and finds what of it Leyden lacks, without running it."""

from __future__ import annotations

import ast
import importlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from leyden.compat.hook import explain, members
from leyden.compat.table import VERSIONS, Target, read
from leyden.errors import MisconfigurationException, did_you_mean

_SKIPPED = {"__pycache__", "node_modules", "site-packages"}


class Finding(NamedTuple):
    """One use of a foreign name that would not resolve."""

    path: Path
    line: int
    text: str
    guarded: bool
    """Whether the program goes on without it: it is imported in a ``try`` that catches the error."""

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}{' (the program catches this)' if self.guarded else ''}"


class Report(NamedTuple):
    """What was read, how many uses of foreign names there are in it, and those that would not resolve."""

    files: int
    uses: int
    missing: list[Finding]


def check(paths: Sequence[str | Path]) -> Report:
    """Read python files, and all python files below folders.

    Raises:
        MisconfigurationException: if a path does not exist.
    """
    modules, files, uses, missing = read(), 0, 0, []
    for path in _files(paths):
        files += 1
        try:
            tree = ast.parse(path.read_bytes(), str(path))
        except (SyntaxError, ValueError) as error:
            line = getattr(error, "lineno", None) or 1
            missing.append(Finding(path, line, f"this is not python that can be read: {error}", False))
            continue
        reader = _Reader(path, modules)
        reader.visit(tree)
        found = reader.finish(tree)
        uses += reader.uses
        missing += sorted(found, key=lambda finding: finding.line)
    return Report(files, uses, missing)


def _files(paths: Sequence[str | Path]) -> Iterator[Path]:
    for path in map(Path, paths):
        if path.is_file():
            yield path
        elif path.is_dir():
            for file in sorted(path.rglob("*.py")):
                inner = file.relative_to(path).parts
                if not any(part in _SKIPPED or part.startswith(".") for part in inner):
                    yield file
        else:
            raise MisconfigurationException(f"{path} does not exist: name a python file, or a folder of them.")


class _Reader(ast.NodeVisitor):
    """Collects the imports of one file, then looks up what the file takes from them."""

    def __init__(self, path: Path, modules: dict[str, dict[str, Target]]) -> None:
        self.path, self.modules = path, modules
        self.uses = 0
        self._known: dict[str, str] = {}  # name in the file -> dotted foreign name
        self._bound: Counter[str] = Counter()  # how many things the file binds to a name
        self._findings: list[Finding] = []
        self._caught: list[set[str]] = []  # by the blocks around what is being read
        self._guarded: set[int] = set()  # attributes whose absence the program catches

    # ------------------------------------------------------------------ imports

    def visit_Import(self, node: ast.Import) -> None:
        for item in node.names:
            root = item.name.partition(".")[0]
            name = item.asname or root
            if root not in VERSIONS:
                self._bound[name] += 1
            elif self._resolves(item.name, node.lineno):
                self._learn(name, item.name if item.asname else root)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        foreign = not node.level and module.partition(".")[0] in VERSIONS
        for item in node.names:
            name = item.asname or item.name
            if not foreign:
                self._bound[name] += 1
            elif item.name == "*":
                self._resolves(module, node.lineno)
                for member in self.modules.get(module, ()):
                    self._learn(member, f"{module}.{member}")
            elif self._resolves(f"{module}.{item.name}", node.lineno):
                self._learn(name, f"{module}.{item.name}")

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func
        called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        first = node.args[0] if node.args else None
        text = first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else ""
        if called == "import_module" and text.partition(".")[0] in VERSIONS:
            self._resolves(text, node.lineno)
        self.generic_visit(node)

    def visit_Try(self, node: ast.Try) -> None:
        self._visit_body(node.body, {name for handler in node.handlers for name in _names(handler.type)})
        for part in (*node.handlers, *node.orelse, *node.finalbody):
            self.visit(part)

    visit_TryStar = visit_Try

    def visit_With(self, node: ast.With) -> None:
        calls = [item.context_expr for item in node.items if isinstance(item.context_expr, ast.Call)]
        for item in node.items:
            self.visit(item)
        self._visit_body(
            node.body,
            {name for call in calls if "suppress" in _names(call.func) for arg in call.args for name in _names(arg)},
        )

    def _visit_body(self, body: list[ast.stmt], caught: set[str]) -> None:
        self._caught.append(caught)
        for statement in body:
            self.visit(statement)
        self._caught.pop()

    def _catches(self, *errors: str) -> bool:
        """Whether a block around what is being read goes on after one of these errors."""
        return any(names & {*errors, "Exception", "BaseException"} for names in self._caught)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if self._catches("AttributeError"):
            self._guarded.add(id(node))
        self.generic_visit(node)

    # ------------------------------------------------------------------ everything else that binds a name

    def visit_Name(self, node: ast.Name) -> None:
        if not isinstance(node.ctx, ast.Load):
            self._bound[node.id] += 1

    def visit_arg(self, node: ast.arg) -> None:
        self._bound[node.arg] += 1
        self.generic_visit(node)

    def visit_ExceptHandler(self, node: ast.ExceptHandler | ast.MatchAs) -> None:
        self._bound[node.name or ""] += 1
        self.generic_visit(node)

    visit_MatchAs = visit_ExceptHandler

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        self._bound[node.name] += 1
        self.generic_visit(node)

    visit_AsyncFunctionDef = visit_FunctionDef
    visit_ClassDef = visit_FunctionDef

    def _learn(self, name: str, meaning: str) -> None:
        before = self._known.setdefault(name, meaning)
        # the same thing under two roots (try: lightning, except: pytorch_lightning) is one thing
        if before != meaning and before.partition(".")[0] == meaning.partition(".")[0]:
            self._bound[name] += 1

    # ------------------------------------------------------------------ looking up

    def finish(self, tree: ast.Module) -> list[Finding]:
        """Look up the attributes that are taken of imported names; a name that means other things too is left alone."""
        inner: set[int] = set()
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or id(node) in inner:
                continue
            inner |= {id(part) for part in ast.walk(node.value)} if _dotted(node) else set()
            parts = _dotted(node)
            if parts and parts[0] in self._known and not self._bound[parts[0]] and isinstance(node.ctx, ast.Load):
                dotted = ".".join([self._known[parts[0]], *parts[1:]])
                self._resolves(dotted, node.lineno, guarded=id(node) in self._guarded)
        return list(dict.fromkeys(self._findings))

    def _resolves(self, dotted: str, line: int, guarded: bool | None = None) -> bool:
        """Count a use of a foreign name; note it and return False if Leyden lacks it."""
        self.uses += 1
        if guarded is None:  # an import
            guarded = self._catches("ImportError", "ModuleNotFoundError")
        module = dotted
        parts: list[str] = []
        while module not in self.modules:
            module, _, part = module.rpartition(".")
            parts.insert(0, part)
        if not parts or (len(parts) == 1 and parts[0].startswith("__")):
            return True
        if parts[0] not in members(module, self.modules):
            self._findings.append(Finding(self.path, line, _short(module, parts[0], self.modules), guarded))
            return False
        return self._has(self.modules[module][parts[0]], f"{module}.{parts[0]}", parts[1:], line, guarded)

    def _has(self, target: Target, shown: str, rest: list[str], line: int, guarded: bool) -> bool:
        """Whether what answers a name has the attributes that the file takes of it (of a class: what it declares)."""
        if not rest:
            return True
        value = getattr(importlib.import_module(target.module), target.name)
        for part in rest:
            if not hasattr(value, part):
                hint = did_you_mean(part, dir(value))
                self._findings.append(Finding(self.path, line, f"Leyden has no {shown}.{part}.{hint}", guarded))
                return False
            value, shown = getattr(value, part), f"{shown}.{part}"
            if not isinstance(value, type):
                return True
        return True


def _short(module: str, name: str, modules: dict[str, dict[str, Target]]) -> str:
    return explain(module, name, modules).partition(" `leyden compat")[0]


def _names(expression: ast.expr | None) -> Iterator[str]:
    """Yield the names in what a block catches, and of what is taken from modules the last part; all, for a bare except."""
    if expression is None:
        yield "BaseException"
    else:
        for node in ast.walk(expression):
            if isinstance(node, (ast.Name, ast.Attribute)):
                yield node.id if isinstance(node, ast.Name) else node.attr


def _dotted(node: ast.expr) -> list[str]:
    """Return the names of ``a.b.c``; an empty list for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return [node.id, *parts] if isinstance(node, ast.Name) else []
