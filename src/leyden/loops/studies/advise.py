# SPDX-License-Identifier: Apache-2.0
"""The advisor: what compiling, fused optimizers, other numbers, workers and the like would bring to a fit, measured on it."""

from __future__ import annotations

import gc
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from leyden.errors import LeydenError, MisconfigurationException
from leyden.loops.start import unwrap
from leyden.loops.studies.trial import FEWEST, WARM, Change, Originals, Trial, like, run
from leyden.runtime.cores import cores
from leyden.runtime.ranks import say
from leyden.runtime.seed import isolate_rng, rng_state

ROUNDS = 3
"""How often a change takes its turn."""
NOISE = 0.02
"""Differences of less than this share are taken for noise, however quiet the machine seems."""
WAITS = 0.2
"""From this share of waiting for data on, more workers are tried."""
_BASELINE, _TOGETHER = "as it is", "together"
_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


@dataclass
class Candidate:
    """A change, and what came of it.

    Attributes:
        name: Its name in the table.
        change: What is different.
        reason: Why it is not measured, or why it failed.
        failed: Whether it failed.
        trials: Its trials.
        ratios: For each, the time of an update over that of the fit as it is right before, and right after.
    """

    name: str
    change: Change = field(default_factory=Change)
    reason: str = ""
    failed: bool = False
    trials: list[Trial] = field(default_factory=list)
    ratios: list[tuple[float, float]] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """The median of all ratios: below 1 is faster."""
        return statistics.median(ratio for pair in self.ratios for ratio in pair)

    def verdict(self, noise: float) -> str:
        """What it is: faster or slower if all of its ratios say so, and by more than the noise."""
        if not self.ratios:
            return "failed" if self.failed else "not applicable" if self.reason else "not measured"
        found = [ratio for pair in self.ratios for ratio in pair]
        least, most = min(found), max(found)
        if len(self.ratios) == 1:
            noise += most - least  # what it was compared with has changed meanwhile
        if self.ratio < 1 - noise and most < 1:
            return "faster"
        return "slower" if self.ratio > 1 + noise and least > 1 else "within noise"


class Advice:
    """What the advisor found. ``str()`` of it is the table.

    Attributes:
        rows: One dict of plain data for each candidate, the fit as it is first. ``candidate``, ``verdict`` (``"baseline"``,
            ``"faster"``, ``"slower"``, ``"within noise"``, ``"not applicable"``, ``"failed"``, ``"not measured"``),
            ``reason`` (of the last three) and ``write`` (what to write for it) are text; ``said`` is what was said in its
            fits only. ``ratio`` is the time of an update over that of the fit as it is (below 1 is faster), ``least`` and
            ``most`` its spread; ``seconds`` that time; ``startup`` what the first update took beyond that of the fit as it
            is, in seconds; ``memory`` the most bytes on a CUDA device; ``loss`` that after ``batches`` batches, and
            ``loss_difference`` what the fit as it is had less. None where there is nothing to say.
        arguments: The arguments of the Trainer that together were fastest; empty if nothing gained.
        lines: What to write for the fastest, a line each.
        noise: The share by which the fit as it is differs from itself.
        interrupted: Whether Ctrl-C ended it.
    """

    def __init__(self, rows: list[dict[str, Any]], best: Change, noise: float, interrupted: bool) -> None:
        self.rows, self.noise, self.interrupted = rows, noise, interrupted
        self.arguments, self.lines = dict(best.arguments), best.lines()

    def __str__(self) -> str:
        return _page(self)

    __repr__ = __str__


# --------------------------------------------------------------------------------------------- what is tried


def candidates(trainer: Any, module: nn.Module) -> list[Candidate]:
    """Return all changes that are known before anything has run, those that do not apply with the reason."""
    config, device, precision = trainer.config, trainer.strategy.root_device, trainer.strategy.precision
    cuda = device.type == "cuda"
    on = "on already"
    found = [
        Candidate("compile", Change({"compile": True}), on if config.compile else ""),
        Candidate("fused optimizers", Change({"fused_optimizers": True}), on if config.fused_optimizers else ""),
    ]
    if not type(precision).__module__.startswith("leyden."):
        why = "a Precision of your own"
    elif precision.precision in ("bf16-mixed", "bf16-true"):
        why = on
    elif precision.precision not in ("32-true", "16-mixed"):
        why = f"precision is {precision.precision}"
    else:
        why = "" if not cuda or torch.cuda.is_bf16_supported() else "this GPU has no bf16"
    found.append(Candidate("bf16-mixed", Change({"precision": "bf16-mixed"}), why))
    weights = [layer.weight for layer in module.modules() if isinstance(layer, _CONVOLUTIONS)]
    last = [weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last) for weight in weights]
    why = "no 2-D convolution" if not weights else on if all(last) else ""
    found.append(Candidate("channels_last", Change(channels_last=True), why))
    if not config.fast_data:
        found.append(Candidate("fast data", Change({"fast_data": True})))
    why = "needs CUDA"
    if cuda:
        able = torch.cuda.get_device_capability(device) >= (8, 0)
        why = "this GPU has no TF32" if not able else "" if torch.get_float32_matmul_precision() == "highest" else on
    found.append(Candidate("TF32", Change(tf32=True), why))
    why = "needs CUDA" if not cuda else on if config.cuda_graphs else ""
    found.append(Candidate("CUDA graphs", Change({"cuda_graphs": True}), why))
    return found


def more_workers(baseline: Trial, cores: int) -> list[Candidate]:
    """Return the numbers of workers that are worth a try, after what the fit as it is has shown."""
    name, now = "num_workers", baseline.workers
    if now is None:
        return [Candidate(name, reason="no DataLoader")]
    if baseline.wait < WAITS:
        return [Candidate(name, reason=f"no wait for data ({baseline.wait:.0%})")]
    numbers = [number for number in sorted({min(2, cores), min(max(cores, 1), 8)}) if number > now]
    if not numbers:
        return [Candidate(name, reason=f"{now} on {cores} cores already")]
    return [Candidate(f"{name}={number}", Change({name: number})) for number in numbers]


# --------------------------------------------------------------------------------------------- measuring


class Measurement:
    """Trials of changes, by turns with the fit as it is.

    Args:
        trainer: The user's.
        originals: What trials get copies of.
        seconds: For each candidate, the fit as it is beside it included.
        folder: For what trials might write.
    """

    def __init__(self, trainer: Any, originals: Originals, seconds: float, folder: str) -> None:
        self.trainer, self.originals, self.folder = trainer, originals, folder
        self.seconds, self.turn, self.rounds = seconds, seconds / (2 * ROUNDS), ROUNDS
        self.baseline: list[Trial] = []
        self.wall = 0.0

    def as_it_is(self) -> Trial:
        """Run the fit as it is, once more."""
        if not self.baseline:
            run(
                self.trainer, self.originals, Change(), 0.0, self.folder
            )  # the first of a process imports and allocates
        begun = time.perf_counter()
        self.baseline.append(run(self.trainer, self.originals, Change(), self.turn, self.folder))
        self.wall = self.wall or time.perf_counter() - begun
        if len(self.baseline) == 1 and (WARM + FEWEST) * self.baseline[0].step > 2 * self.turn:
            self.rounds = 1  # one turn is long enough
        return self.baseline[-1]

    def measure(self, wanted: list[Candidate]) -> None:
        """Give each candidate its turns; one that fails has no more."""
        for number in range(self.rounds):
            for candidate in wanted:
                # what takes long to start has one long turn
                once = bool(candidate.change.arguments.get("compile")) or self._starts_slowly(candidate)
                if candidate.failed or (number and once):
                    continue
                turn = self.turn * (self.rounds if once else 1)
                trial = self._try(candidate, turn)
                if trial is None:
                    _free(self.trainer.strategy.root_device)
                    continue
                candidate.trials.append(trial)
                before, after = self.baseline[-1].step, self.as_it_is().step
                candidate.ratios.append((trial.step / before, trial.step / after))

    def _try(self, candidate: Candidate, turn: float) -> Trial | None:
        try:
            return run(self.trainer, self.originals, candidate.change, turn, self.folder)
        except Exception as error:
            candidate.failed, candidate.reason = True, _first_line(error)
            return None

    def _starts_slowly(self, candidate: Candidate) -> bool:
        return any(trial.startup - self.baseline[0].startup > 4 * self.turn for trial in candidate.trials)

    @property
    def noise(self) -> float:
        """By what share the fit as it is differs from one time to the next."""
        steps = [trial.step for trial in self.baseline]
        apart = [abs(second / first - 1) for first, second in zip(steps, steps[1:], strict=False)]
        return max([NOISE, *([statistics.median(apart)] if apart else [])])

    def expected(self, count: int) -> float:
        """Seconds that so many candidates take, as the first run of the fit as it is has shown."""
        return 2 * count * self.rounds * self.wall

    def row(self, candidate: Candidate) -> dict[str, Any]:
        """Return what is known of a candidate, as plain data."""
        trials, measured = candidate.trials, bool(candidate.ratios)
        start = statistics.median(trial.startup for trial in self.baseline)
        row: dict[str, Any] = {
            "candidate": candidate.name,
            "verdict": candidate.verdict(self.noise),
            "reason": candidate.reason,
            "write": "; ".join(candidate.change.lines()),
            "ratio": candidate.ratio if measured else None,
            "least": min(min(pair) for pair in candidate.ratios) if measured else None,
            "most": max(max(pair) for pair in candidate.ratios) if measured else None,
            "seconds": statistics.median(trial.step for trial in trials) if trials else None,
            "startup": trials[0].startup - start if trials else None,
            "memory": max((trial.memory for trial in trials if trial.memory is not None), default=None),
            "loss": None,
            "loss_difference": None,
            "batches": None,
            "said": [],
        }
        if trials:
            usual = {line for trial in self.baseline for line in trial.said}
            row["said"] = [line for line in dict.fromkeys(trials[0].said) if line not in usual]
            self._compare(row, trials)
        return row

    def _compare(self, row: dict[str, Any], trials: list[Trial]) -> None:
        batches = min(len(trial.losses) for trial in [*self.baseline, *trials])
        if batches:
            reference = self.baseline[0].losses[batches - 1]
            found = max((trial.losses[batches - 1] for trial in trials), key=lambda loss: abs(loss - reference))
            row.update(batches=batches, loss=found, loss_difference=found - reference)

    def rows(self, wanted: list[Candidate]) -> list[dict[str, Any]]:
        """Return the rows of all candidates, that of the fit as it is first."""
        own = self.row(Candidate(_BASELINE, trials=self.baseline))
        steps = [trial.step / own["seconds"] for trial in self.baseline]
        own.update(verdict="baseline", ratio=1.0, least=min(steps), most=max(steps))
        own["startup"] = statistics.median(trial.startup for trial in self.baseline)
        return [own, *map(self.row, wanted)]


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _free(device: torch.device) -> None:
    """Give back what a fit that failed has left on a device, so that the next one finds room."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --------------------------------------------------------------------------------------------- the whole


def advise(
    trainer: Any, model: Any, train_dataloaders: Any = None, datamodule: Any = None, seconds: float = 3.0
) -> Advice:
    """Measure what each candidate brings to ``trainer.fit(model, ...)``, on copies; print the table and return it.

    Raises:
        MisconfigurationException: for what cannot be measured, or copied.
        Exception: what the fit as it is fails with.
    """
    _check(trainer, seconds)
    module, datamodule, loaders = unwrap(model, datamodule, train_dataloaders)
    wanted = candidates(trainer, module)
    interrupted, best = False, Change()
    with (
        isolate_rng(),
        _same_environment(),
        _quick_collections(),
        tempfile.TemporaryDirectory(prefix="leyden-advise-", ignore_cleanup_errors=True) as folder,
    ):
        originals = Originals(module, datamodule, loaders, trainer.callbacks, rng_state())
        bench = Measurement(trainer, originals, seconds, folder)
        count = sum(not each.reason for each in wanted)
        announced = count * seconds + bench.turn
        say(
            f"Measuring {count} changes against this fit as it is: about {math.ceil(announced)} s, and what compiling takes."
            " Ctrl-C ends it with the table so far."
        )
        try:
            first_of_all = like(trainer, Change(), folder)
            originals.set_up(first_of_all)
            originals.rng = rng_state()
            try:
                first = bench.as_it_is()
            except Exception as error:
                if not isinstance(error, LeydenError):
                    say("The fit failed as it is; no validation ran in it, and callbacks were left out.")
                raise
            wanted[-2:-2] = more_workers(first, cores())
            tried = [each for each in wanted if not each.reason]
            expected = bench.expected(len(tried))
            if expected > 1.5 * announced + 3:
                say(
                    f"An update takes {_time(first.step)}, and {_time(bench.wall)} until enough of them are timed: about"
                    f" {math.ceil(expected)} s in all."
                )
            bench.measure(tried)
            best = _together(bench, wanted)
        except KeyboardInterrupt:
            if not bench.baseline:
                raise
            interrupted = True
            best = _best(bench, wanted).change
        found = Advice(bench.rows(wanted), best, bench.noise, interrupted)
    say(str(found))
    return found


def _check(trainer: Any, seconds: Any) -> None:
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
        raise MisconfigurationException(f"advise(seconds={seconds!r}) is not valid: it must be a number more than 0.")
    if trainer.fast_dev_run:
        raise MisconfigurationException(
            "advise: Trainer(fast_dev_run=True) makes fits that are too short to be timed. Turn it off."
        )
    if trainer.world_size > 1:
        raise MisconfigurationException(
            f"advise measures on one device, and this Trainer uses {trainer.world_size} processes. Use Trainer(devices=1,"
            " num_nodes=1) for it; what gains there gains on each."
        )
    if trainer.state.stage is not None:
        raise MisconfigurationException("advise cannot be called inside a run of its Trainer. Call it before.")


def _gains(bench: Measurement, wanted: list[Candidate]) -> list[Candidate]:
    """Return the candidates that are faster, of several numbers of workers the fastest."""
    faster = sorted((each for each in wanted if each.verdict(bench.noise) == "faster"), key=lambda each: each.ratio)
    found: list[Candidate] = []
    for candidate in faster:
        taken = {name for each in found for name in each.change.arguments}
        if not taken & candidate.change.arguments.keys():
            found.append(candidate)
    return found


def _together(bench: Measurement, wanted: list[Candidate]) -> Change:
    """Measure all that gained, together; return the fastest change of all."""
    gains = _gains(bench, wanted)
    if len(gains) > 1:
        change = Change()
        for candidate in (each for each in wanted if each in gains):
            change |= candidate.change
        wanted.append(Candidate(_TOGETHER, change))
        bench.measure([wanted[-1]])
    return _best(bench, wanted).change


def _best(bench: Measurement, wanted: list[Candidate]) -> Candidate:
    gains = [each for each in wanted if each.verdict(bench.noise) == "faster"]
    return min(gains, key=lambda each: each.ratio, default=Candidate(""))


@contextmanager
def _quick_collections() -> Iterator[None]:
    """Let the garbage collections between trials look only at what has been made since."""
    ours = gc.get_freeze_count() == 0
    if ours:
        gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()


@contextmanager
def _same_environment() -> Iterator[None]:
    """Leave the environment of the process as it was, whatever hooks of the user put there."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        for name, value in before.items():
            if os.environ.get(name) != value:
                os.environ[name] = value


# --------------------------------------------------------------------------------------------- the table


def _page(advice: Advice) -> str:
    own, *others = advice.rows
    lines = [f"An update takes {_time(own['seconds'])} as it is, give or take {advice.noise:.0%}."]
    if own["batches"]:
        apart = own["loss_difference"]
        again = "the same" if not apart else f"{apart:+.1g}"
        lines[0] += (
            f" Loss of batch {own['batches']}: {own['loss'] - apart:.6g}; from the same seed once more: {again}."
        )
    memory = any(row["memory"] is not None for row in advice.rows)
    body = [["change", "time of an update", "verdict", "start", *(["memory"] if memory else []), "loss", "write"]]
    for row in [own, *others]:
        measured = row["ratio"] is not None
        ratio = f"{row['ratio']:.2f} ({row['least']:.2f} to {row['most']:.2f})" if measured else row["reason"]
        verdict = "" if row["verdict"] in ("baseline", "not applicable") else row["verdict"]
        cells = [row["candidate"], ratio, verdict, _startup(row)]
        if memory:
            cells.append("-" if row["memory"] is None else f"{row['memory'] / 1e6:.0f} MB")
        apart = row["loss_difference"]
        cells.append("-" if apart is None or row is own else "same" if not apart else f"{apart:+.1g}")
        body.append([*cells, row["write"] if measured and row is not own else ""])
    body = [[_short(cell) if number else cell for number, cell in enumerate(line)] for line in body]
    widths = [max(len(line[column]) for line in body) for column in range(len(body[0]) - 1)]
    for number, line in enumerate(body):
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=False)]
        lines.append("  ".join([*cells, line[-1]]).rstrip())
        if not number:
            lines.append("  ".join("─" * width for width in [*widths, max(len(row[-1]) for row in body)]))
    for row in others:
        lines += [f"{row['candidate']}: {said}" for said in row["said"][:2]]
    if advice.interrupted:
        lines.append("Interrupted: the rest was not measured.")
    if advice.lines:
        lines += ["The fastest:", *(f"    {line}" for line in advice.lines)]
    else:
        lines.append("Nothing of this makes this fit faster, beyond what is noise here.")
    return "\n".join(lines)


def _startup(row: dict[str, Any]) -> str:
    seconds = row["startup"]
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if row["verdict"] == "baseline" else f"{seconds:+.1f} s" if abs(seconds) >= 0.1 else ""


def _short(text: str, most: int = 100) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} microseconds"
