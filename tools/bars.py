# SPDX-License-Identifier: Apache-2.0
"""Measures the bars that keep the house small, prints them as a table, and fails if one is broken.

    python tools/bars.py

    frames from fit to training_step     our own stack frames between the user's two functions
    framework calls per batch            Python calls into leyden, counted by sys.setprofile: exact on any machine
    files in import circles              lazy imports, imports for typing and `__init__` files counted
    longest file, hot loop, function     lines
    without a docstring                  files, and public names in them
    modules loaded by an import          ours and third parties', beyond those of torch

Times are not bars: they differ from machine to machine and stand in benchmarks/ as ratios.
"""

from __future__ import annotations

import ast
import inspect
import logging
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "leyden"


class Bar(NamedTuple):
    """One line of the table: what was measured, what it may be at most, and what is behind the figure."""

    name: str
    measured: float
    limit: float
    detail: str = ""

    @property
    def holds(self) -> bool:
        return self.measured <= self.limit


# --- the source ---------------------------------------------------------------------------------------------------


def source_files() -> list[Path]:
    """Return every Python file of the package, sorted."""
    return sorted(SOURCE.rglob("*.py"))


def longest_file() -> tuple[int, str]:
    """Return the number of lines of the longest file, and its path."""
    return max((len(path.read_text(encoding="utf-8").splitlines()), _relative(path)) for path in source_files())


def lines_of_hot_loop() -> int:
    """Return the number of lines of ``loops/fit.py``."""
    return len((SOURCE / "loops" / "fit.py").read_text(encoding="utf-8").splitlines())


def longest_function() -> tuple[int, str]:
    """Return the lines of the longest function body (docstring left out), and where it is."""
    longest = (0, "")
    for path in source_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
                lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
                longest = max(longest, (lines, f"{_relative(path)}:{node.lineno} {node.name}"))
    return longest


def undocumented() -> list[str]:
    """Return files without licence line or sentence of purpose, and public classes and functions without docstring."""
    found = []
    for path in source_files():
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        if not text.startswith("# SPDX-License-Identifier: Apache-2.0\n") or not ast.get_docstring(tree):
            found.append(_relative(path))
        for node in tree.body:
            named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if named and not node.name.startswith("_") and not ast.get_docstring(node):
                found.append(f"{_relative(path)}:{node.lineno} {node.name}")
    return found


def import_graph(source: Path = SOURCE) -> dict[str, set[str]]:
    """Return, for each module of the package, the modules of the package that it names in an import statement.

    Imports inside functions and under ``TYPE_CHECKING`` count like any other. A package stands for its
    ``__init__`` file: ``from leyden.callbacks import x`` is an edge to ``leyden.callbacks.x`` if that is a module,
    else to ``leyden.callbacks``. Names that a PEP 562 ``__getattr__`` looks up in a table of
    strings are no imports.
    """
    modules = {_module_name(path, source): path for path in source.rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        statements = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        graph[name] = {target for node in statements for target in _imports(node, package, set(modules))} - {name}
    return graph


def _imports(node: ast.AST, package: str, modules: set[str]) -> Iterator[str]:
    """Yield the ``modules`` that an import statement in ``package`` names."""
    if isinstance(node, ast.Import):
        yield from modules.intersection(alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parents = package.split(".")
            base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
        for alias in node.names:
            both = (f"{base}.{alias.name}", base)  # a module of that name, else a name that base defines
            yield from [target for target in both if target in modules][:1]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other, directly or by way of others (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph[node]):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            group = []
            while True:
                group.append(stack.pop())
                if group[-1] == node:
                    break
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def _module_name(path: Path, source: Path) -> str:
    parts = path.relative_to(source.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _relative(path: Path) -> str:
    return str(path.relative_to(SOURCE))


# --- imports ------------------------------------------------------------------------------------------------------


def modules_loaded(statement: str) -> list[str]:
    """Return the modules that a fresh interpreter loads for ``statement``: ours and third parties', but torch's."""
    code = (
        f"import sys; sys.path.insert(0, {str(SOURCE.parent)!r}); import torch; before = set(sys.modules); "
        f"{statement}; "
        "print('\\n'.join(sorted(set(sys.modules) - before)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
    )
    return [name for name in run.stdout.split() if name.partition(".")[0] not in {*sys.stdlib_module_names, "torch"}]


# --- one run ------------------------------------------------------------------------------------------------------


def _module(log: bool, probe: Any = None) -> Any:
    import torch

    import leyden as L

    class Tiny(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if probe is not None:
                probe()
            loss = self.layer(batch).pow(2).mean()
            if log:
                self.log("loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.layer(batch).pow(2).mean())

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    return Tiny()


def _fit(batches: int, *, attached: bool, probe: Any = None, count: list[int] | None = None) -> None:
    """Fit for one epoch; with ``attached``: one ``self.log`` a step, a csv logger and three callbacks of ours."""
    import torch
    from torch.utils.data import DataLoader

    import leyden as L
    from leyden.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
    from leyden.loggers import CSVLogger

    data = DataLoader(torch.ones(2 * batches, 4), batch_size=2)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
        if attached:
            callbacks = [ModelCheckpoint(monitor="val_loss"), EarlyStopping("val_loss"), LearningRateMonitor("step")]
            parts = {"logger": CSVLogger(folder), "callbacks": callbacks}
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **parts,
        )
        module = _module(attached, probe)
        said = logging.getLogger("leyden")
        level = said.level
        said.setLevel(logging.WARNING)
        try:
            with _counting(count):
                trainer.fit(module, data, DataLoader(torch.ones(2, 4)) if attached else None)
        finally:
            said.setLevel(level)


class _counting:
    """While it lasts, counts the calls of Python functions that are written in the package."""

    def __init__(self, count: list[int] | None) -> None:
        self._count = count

    def __enter__(self) -> None:
        if self._count is None:
            return
        count, prefix = self._count, str(SOURCE)

        def note(frame: FrameType, event: str, argument: Any) -> None:
            if event == "call" and frame.f_code.co_filename.startswith(prefix):
                count[0] += 1

        sys.setprofile(note)

    def __exit__(self, *exc: object) -> None:
        if self._count is not None:
            sys.setprofile(None)


def calls_per_batch(attached: bool, few: int = 10, many: int = 60) -> float:
    """Return the calls into the package that one more batch costs, from two runs of different length."""
    _fit(few, attached=attached)  # what is done only once in a process
    totals = []
    for batches in (few, many):
        count = [0]
        _fit(batches, attached=attached, count=count)
        totals.append(count[0])
    return (totals[1] - totals[0]) / (many - few)


def frames_to_training_step() -> list[str]:
    """Return our own functions that stand on the stack between the script that calls ``fit`` and ``training_step``."""
    seen: list[list[str]] = []

    def probe() -> None:
        here = inspect.currentframe()
        frame = here.f_back.f_back if here and here.f_back else None  # the caller of training_step
        frames = []
        while frame is not None and frame.f_code is not _fit.__code__:
            if frame.f_code.co_filename.startswith(str(SOURCE)):
                frames.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}")
            frame = frame.f_back
        seen.append(frames[::-1])

    _fit(2, attached=False, probe=probe)
    return max(seen, key=len)


# --- the table ----------------------------------------------------------------------------------------------------


def bars() -> Iterable[Bar]:
    """Measure every bar; takes some seconds."""
    frames = frames_to_training_step()
    yield Bar("own frames from fit to training_step", len(frames), 4, " > ".join(frames))
    yield Bar("framework calls per batch, nothing attached", calls_per_batch(attached=False), 40)
    yield Bar("framework calls per batch, self.log, three callbacks, csv", calls_per_batch(attached=True), 90)
    found = circles(import_graph())
    yield Bar("files in import circles", sum(map(len, found)), 0, "; ".join(" <> ".join(group) for group in found))
    yield Bar("lines of the longest file", *_with_limit(longest_file(), 600))
    yield Bar("lines of loops/fit.py, the hot loop", lines_of_hot_loop(), 400)
    yield Bar("lines of the longest function body", *_with_limit(longest_function(), 100))
    silent = undocumented()
    yield Bar("files and public names without a docstring", len(silent), 0, "; ".join(silent))
    yield Bar("modules loaded by import leyden", len(modules_loaded("import leyden")), 60)
    names = "from leyden import Callback, LightningDataModule, LightningModule, Trainer"
    yield Bar("modules loaded by the names a script needs", len(modules_loaded(names)), 60)


def _with_limit(measured: tuple[int, str], limit: int) -> tuple[int, int, str]:
    return measured[0], limit, measured[1]


def main() -> int:
    measured = list(bars())
    width = max(len(bar.name) for bar in measured)
    print(f"{'bar':<{width}}  measured  at most")
    for bar in measured:
        mark = "  " if bar.holds else "  BROKEN  "
        print(f"{bar.name:<{width}}  {bar.measured:8g}  {bar.limit:7g}{mark}{bar.detail}".rstrip())
    broken = sum(not bar.holds for bar in measured)
    print(f"{broken} of {len(measured)} bars are broken" if broken else "all bars hold")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
