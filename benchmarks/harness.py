# SPDX-License-Identifier: Apache-2.0
"""What every benchmark shares: contenders take turns with the loop that they are compared with; a table of ratios.

A contender is prepared (its construction and imports are not timed), then its run is timed. In every round each one
runs right after a fresh run of its hand-written loop, so that a machine that is slow for a while is slow for both. The
row shows the median of the rounds' ratios, the least and the most, and whether all did the same work: both start from
the same seed, so the final weights must be those of the loop.

On a machine that others use too, medians of whole runs scatter. The column ``calm`` compares single steps instead: of
all steps of all rounds the time that 5 % stay below, which nobody disturbed, over that of the loop; set-up is not in it.
"""

from __future__ import annotations

import gc
import logging
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from workloads import MOMENTS

SEED = 1


class Prepared(NamedTuple):
    """A run that is ready to be timed, and how to get at the weights that it trained."""

    run: Callable[[], Any]
    weights: Callable[[], Iterable[Tensor]]


Prepare = Callable[[str], Prepared]
"""Makes a run from a folder in which it may write."""


@dataclass(frozen=True)
class Contender:
    """A way to train: its name, how it is made, and the name of the loop that it is compared with."""

    name: str
    prepare: Prepare
    against: str


class Timed(NamedTuple):
    """One run: seconds that it took, seconds that each of its steps took, and the final weights."""

    wall: float
    steps: list[float]
    weights: list[Tensor]


@dataclass
class Row:
    """One line of a table: a contender, or any other figure with a spread."""

    name: str
    figure: float
    unit: str
    loop: float | None = None
    """The same figure of the loop that it is compared with."""
    ratio: float | None = None
    least: float = 0.0
    most: float = 0.0
    calm: float | None = None
    """The ratio of the steps that nothing disturbed."""
    weights: str = ""
    """``"equal"`` to the loop's, to the last bit; ``"close"``; ``"own order"`` where the data came in another order."""
    against: str = ""


@dataclass
class Section:
    """A table with its title and what it measures."""

    title: str
    text: str
    rows: list[Row] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what frameworks say about themselves out of the table."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """For the length of the block, let torch compute with ``number`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def timed(prepare: Prepare) -> Timed:
    """Prepare a run under a fixed seed, then time it alone."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(SEED)
        prepared = prepare(folder)
        gc.collect()
        torch.manual_seed(SEED)  # whatever the preparation drew: the order of the data is the loop's
        MOMENTS.clear()
        begin = time.perf_counter()
        prepared.run()
        wall = time.perf_counter() - begin
        steps = [later - earlier for earlier, later in zip(MOMENTS, MOMENTS[1:], strict=False)]
        return Timed(wall, steps, [weight.detach().clone() for weight in prepared.weights()])


def updates(prepare: Prepare) -> int:
    """Run once and return how many steps the optimizers of ``torch.optim`` made."""
    count = [0]

    def note(*args: Any) -> None:
        count[0] += 1

    handle = register_optimizer_step_post_hook(note)
    try:
        timed(prepare)
    finally:
        handle.remove()
    return count[0]


def same(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> str:
    """Say how far two lists of weights agree."""
    pairs = list(zip(mine, theirs, strict=True))
    if all(torch.equal(a, b) for a, b in pairs):
        return "equal"
    return "close" if all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in pairs) else "own order"


def compare(loops: dict[str, Prepare], contenders: Sequence[Contender], rounds: int, steps: int) -> list[Row]:
    """Let all contenders run ``rounds`` times, each right after its loop; return a row for each, in us per step.

    Args:
        loops: The hand-written loops by name.
        contenders: What is compared with them.
        rounds: Runs of each contender.
        steps: How many batches one run trains on; that a contender makes as many updates is checked first.

    Raises:
        RuntimeError: for a contender that makes more or fewer updates than there are steps.
    """
    wanted = {contender.against for contender in contenders}
    first = [(name, loop) for name, loop in loops.items() if name in wanted]
    for name, prepare in [*first, *((contender.name, contender.prepare) for contender in contenders)]:
        made = updates(prepare)  # this run also does what is done only once in a process
        if made not in (0, steps):  # 0: an optimizer that is not torch's
            raise RuntimeError(f"{name} made {made} updates where {steps} were expected")
    pairs: dict[str, list[tuple[Timed, Timed]]] = {contender.name: [] for contender in contenders}
    found: dict[str, str] = {}
    for _ in range(rounds):
        for contender in contenders:
            theirs, mine = timed(loops[contender.against]), timed(contender.prepare)
            found[contender.name] = same(mine.weights, theirs.weights)
            # the weights served their purpose: a model of 10 M parameters need not be kept for each round
            pairs[contender.name].append((theirs._replace(weights=[]), mine._replace(weights=[])))
    rows = []
    for contender in contenders:
        taken = pairs[contender.name]
        ratios = [mine.wall / theirs.wall for theirs, mine in taken]
        rows.append(
            Row(
                name=contender.name,
                figure=statistics.median(mine.wall for _, mine in taken) / steps * 1e6,
                unit="us/step",
                loop=statistics.median(theirs.wall for theirs, _ in taken) / steps * 1e6,
                ratio=statistics.median(ratios),
                least=min(ratios),
                most=max(ratios),
                calm=_calm([mine.steps for _, mine in taken]) / _calm([theirs.steps for theirs, _ in taken]),
                weights=found[contender.name],
                against=contender.against,
            )
        )
    return rows


def _calm(runs: Sequence[Sequence[float]]) -> float:
    """Return the time that one in twenty steps stays below, the first few of each run left out."""
    steps = sorted(step for run in runs for step in (run[min(20, len(run) // 2) :] or [1.0]))
    return steps[len(steps) // 20]


def spread_row(name: str, figures: Sequence[float], unit: str, against: str = "") -> Row:
    """Make a row of figures that are no ratios: their median, the least and the most."""
    return Row(name, statistics.median(figures), unit, least=min(figures), most=max(figures), against=against)


# --- what is printed ------------------------------------------------------------------------------------------------


def machine() -> str:
    """Describe the machine in one line."""
    return (
        f"{_processor()}, {os.cpu_count()} CPUs, {platform.system()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def cells(row: Row) -> list[str]:
    """Return the texts of one line of a table."""
    figure = f"{_number(row.figure)} {row.unit}"
    if row.ratio is None:
        return [row.name, figure, f"({_number(row.least)}, {_number(row.most)})", row.against]
    spread = f"({row.least:.2f}, {row.most:.2f})"
    loop = f"{_number(row.loop or 0)}"
    return [row.name, figure, loop, f"{row.ratio:.2f}", spread, f"{row.calm or 0:.2f}", row.weights, row.against]


def heads(section: Section) -> list[str]:
    """Return the texts above the columns of a table."""
    if any(row.ratio is not None for row in section.rows):
        return ["", "median", "loop's", "ratio", "(least, most)", "calm", "weights", "to"]
    return ["", "median", "(least, most)", "beyond" if any(row.against for row in section.rows) else ""]


def as_text(section: Section) -> str:
    """Lay a section out for a terminal."""
    lines = [heads(section), *(cells(row) for row in section.rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([f"== {section.title}", section.text, *shown, ""])


def as_markdown(section: Section) -> str:
    """Lay a section out for a page, with a chart of the ratios where there are any."""
    lines = [heads(section), ["---"] * len(heads(section)), *(cells(row) for row in section.rows)]
    table = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([f"## {section.title}", "", section.text, "", *table, *chart(section.rows), ""])


def chart(rows: Sequence[Row], width: int = 60) -> list[str]:
    """Draw the ratios as bars of text; the mark is where a hand-written loop stands."""
    drawn = [row for row in rows if row.ratio is not None]
    if len(drawn) < 2:
        return []
    most = max(row.ratio or 0 for row in drawn)
    scale = width / max(most, 1.2)
    names = max(len(row.name) for row in drawn)
    mark = round(scale)
    lines = []
    for row in sorted(drawn, key=lambda row: row.ratio or 0):
        length = max(1, round((row.ratio or 0) * scale))
        bar = "█" * length
        bar = bar[:mark] + "┃" + bar[mark + 1 :] if length > mark else bar.ljust(mark) + "┃"
        lines.append(f"{row.name:<{names}}  {bar}  {row.ratio:.2f}")
    return ["", "```", *lines, "```"]
