# SPDX-License-Identifier: Apache-2.0
"""What grows with what: the cost of a step against metrics logged, callbacks and epochs; one ``self.log`` alone.

python benchmarks/scaling.py [--steps 2000] [--rounds 5]
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import statistics
import tempfile
import time
from typing import Any

import harness
import workloads
from frameworks import RECORDED, by_hand, with_trainer
from harness import Section, spread_row, timed

NAMES = {"leyden": "leyden", "lightning": "lightning.pytorch"}


def frameworks() -> dict[str, str]:
    """Return by name the packages with Lightning's API that are installed."""
    return {name: package for name, package in NAMES.items() if importlib.util.find_spec(package.partition(".")[0])}


def differences(name: str, package: str, option: str, counts: tuple[int, ...], steps: int, rounds: int) -> list[Any]:
    """Return a row for each count beyond the first: microseconds that one more of ``option`` adds to a step."""
    work = workloads.tiny(steps)

    def seconds(count: int) -> float:
        return timed(lambda folder: with_trainer(work, folder, name=package, **{option: count})).wall

    for count in counts:
        seconds(count)
    taken = [[seconds(count) for count in counts] for _ in range(rounds)]
    found = []
    for index, count in enumerate(counts[1:], start=1):
        per_one = [(times[index] - times[0]) / steps / (count - counts[0]) * 1e6 for times in taken]
        found.append(
            spread_row(f"{name}: {count} {option}", per_one, "us/step", f"{counts[0]} {option}, for each more")
        )
    return found


def epochs(name: str, package: str, steps: int, rounds: int) -> list[Any]:
    """Return what an epoch costs beyond its steps, and whether late epochs cost more than early ones."""
    many = max(2, min(100, steps // 20))
    one, split = workloads.tiny(steps), workloads.tiny(steps // many, many)
    taken = []
    for _ in range(rounds + 1):
        longer = timed(lambda folder: with_trainer(split, folder, name=package)).wall
        shorter = timed(lambda folder: with_trainer(one, folder, name=package)).wall
        by_loop = timed(lambda folder: by_hand(split, folder)).wall - timed(lambda folder: by_hand(one, folder)).wall
        taken.append((longer - shorter - by_loop) / (many - 1) * 1e6)
    late = [late_to_early(package, 10 * many, steps // many) for _ in range(rounds)]
    return [
        spread_row(f"{name}: an epoch", taken[1:], "us", f"its steps and {RECORDED}"),
        spread_row(f"{name}: the last tenth of {10 * many} epochs", late, "times the first tenth", "with CSVLogger"),
    ]


def late_to_early(package: str, number: int, steps: int) -> float:
    """Fit for ``number`` epochs with a csv logger; return the time of the last tenth of them over that of the first."""
    L, loggers = importlib.import_module(package), importlib.import_module(f"{package}.loggers")
    work = workloads.tiny(max(1, steps))
    begun: list[float] = []

    class Module(L.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = work.network()

        def on_train_epoch_start(self) -> None:
            begun.append(time.perf_counter())

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = work.loss(self.net(batch[0]), batch[1])
            self.log("loss", loss, on_epoch=True, batch_size=work.batch_size)
            return loss

        def configure_optimizers(self) -> Any:
            return work.make_optimizer(self.parameters())

    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu", devices=1, max_epochs=number, log_every_n_steps=1, logger=loggers.CSVLogger(folder),
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(Module(), work.loader())
    lengths = [later - earlier for earlier, later in zip(begun, begun[1:], strict=False)]
    tenth = max(1, number // 10)
    return statistics.median(lengths[-tenth:]) / statistics.median(lengths[1 : tenth + 1])


def one_log(name: str, package: str, steps: int, rounds: int) -> list[Any]:
    """Return what one ``self.log`` of a 0-d tensor costs after its first call, detached and with a graph."""
    L = importlib.import_module(package)
    work, repeat = workloads.tiny(steps), 20

    class Module(L.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net, self.times = work.network(), ([], [])

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = work.loss(self.net(batch[0]), batch[1])
            for times, value in zip(self.times, (loss.detach(), loss), strict=True):
                for each in range(repeat):  # each its own name: what a step with many metrics does
                    begin = time.perf_counter()
                    self.log(f"metric_{value.requires_grad}_{each}", value)
                    times.append(time.perf_counter() - begin)
            return loss

        def configure_optimizers(self) -> Any:
            return work.make_optimizer(self.parameters())

    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        module = Module()
        trainer = L.Trainer(
            accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, work.loader())
        for medians, times in zip(found, module.times, strict=True):
            medians.append(statistics.median(times[repeat:]) * 1e6)  # after the first call of each
    return [
        spread_row(f"{name}: self.log of a detached 0-d tensor", found[0], "us", "one call alone"),
        spread_row(f"{name}: self.log of a 0-d tensor with a graph", found[1], "us", "one call alone"),
    ]


def measure(steps: int = 2000, rounds: int = 5, only: str = "") -> Section:
    """Measure (g) of the benchmarks, and one ``self.log`` alone."""
    found: list[Any] = []
    with harness.threads(1), harness.quiet():
        for name, package in frameworks().items():
            if only not in name:
                continue
            found += one_log(name, package, max(10, steps // 10), rounds)
            found += differences(name, package, "metrics", (1, 10, 100), steps, rounds)
            found += differences(name, package, "callbacks", (0, 5, 20), steps, rounds)
            found += epochs(name, package, steps, rounds)
    return Section(
        "(g) cost against metrics, callbacks and epochs",
        f"The tiny step of (a), {steps} steps, median of {rounds} rounds. A callback has an on_train_batch_end that does"
        " nothing; a metric is the loss under a further name.",
        found,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="batches in one run")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each")
    parser.add_argument("--only", default="", help="only the frameworks whose name contains this")
    options = parser.parse_args()
    print(harness.as_text(measure(options.steps, options.rounds, options.only)))


if __name__ == "__main__":
    main()
