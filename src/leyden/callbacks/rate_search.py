# SPDX-License-Identifier: Apache-2.0
"""The learning-rate range test: the loss while the rate rises, and the rate at which it falls fastest.

L. N. Smith, Cyclical Learning Rates for Training Neural Networks, WACV 2017 (arXiv 1506.01186).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from leyden.callback import Callback
from leyden.callbacks.settings import has_setting, set_setting
from leyden.errors import MisconfigurationException, PossibleUserWarning
from leyden.optim import LRSchedulerConfig
from leyden.runtime.ranks import rank_zero_info, rank_zero_warn
from leyden.types import STEP_OUTPUT, TrainerView

log = logging.getLogger(__name__)

MODES = ("linear", "exponential")
"""How the rate rises."""
_NAMES = ("lr", "learning_rate")
_SMOOTHING = 0.98


class LRFinder:
    """What a range test has found.

    Args:
        mode: How the rate rose: ``"exponential"`` or ``"linear"``.
        lr_min: From here.
        lr_max: To here.
        num_training: In so many updates.

    Attributes:
        results: ``"lr"``, the rate of each update, and ``"loss"``, its smoothed loss; NaN where there was none.

    Raises:
        MisconfigurationException: for another mode.
    """

    def __init__(self, mode: str, lr_min: float, lr_max: float, num_training: int) -> None:
        if mode not in MODES:
            raise MisconfigurationException(f"LRFinder(mode={mode!r}): mode should be either of {MODES}.")
        self.mode, self.lr_min, self.lr_max, self.num_training = mode, lr_min, lr_max, num_training
        self.results: dict[str, Any] = {}
        self._total_batch_idx = 0
        """The index of the last batch that was taken."""
        self._optimal_idx: int | None = None

    def take(self, rates: list[float], losses: list[float], last_batch: int) -> None:
        """Keep what a test has measured, up to the batch with the index ``last_batch``."""
        self.results.update({"lr": rates, "loss": losses})
        self._total_batch_idx = last_batch

    def suggestion(self, skip_begin: int = 10, skip_end: int = 1) -> float | None:
        """Return the rate at which the loss falls fastest; None where there are too few points, which is said.

        Args:
            skip_begin: So many of the first points are left out: the average has not settled there.
            skip_end: And so many of the last, where the loss may explode.
        """
        points = range(len(self.results["loss"]))[skip_begin : -skip_end or None]
        losses = torch.tensor([self.results["loss"][point] for point in points])
        rates = torch.tensor([self.results["lr"][point] for point in points])
        finite = torch.isfinite(losses)
        if int(finite.sum()) < 2:
            self._optimal_idx = None
            log.error(
                "There is no suggestion for the learning rate: %d of %d points are left, and two are needed. Let the test run"
                " longer (num_training, early_stop_threshold=None, more batches), or skip fewer points.",
                int(finite.sum()), len(self.results["loss"]),
            )  # fmt: skip
            return None
        slopes = torch.gradient(losses[finite], spacing=[rates[finite]])[0]
        kept = [point for point, good in zip(points, finite.tolist(), strict=True) if good]
        self._optimal_idx = kept[int(torch.argmin(slopes))]
        return float(self.results["lr"][self._optimal_idx])

    def plot(self, suggest: bool = False, show: bool = False, ax: Any = None) -> Any:
        """Draw the loss over the rate; return the matplotlib figure.

        Args:
            suggest: Mark the suggestion by a red point.
            show: Open a window.
            ax: Axes to draw in; None makes a figure.

        Raises:
            MisconfigurationException: without matplotlib.
        """
        try:
            import matplotlib.pyplot as plt  # noqa: PLC0415  # only who draws
        except ImportError as error:
            raise MisconfigurationException(
                "LRFinder.plot() draws with matplotlib, which is not installed: pip install 'leyden[plots]'."
            ) from error
        if ax is None:
            _, ax = plt.subplots()
        rates, losses = self.results["lr"], self.results["loss"]
        ax.plot(rates, losses)
        if self.mode == "exponential":
            ax.set_xscale("log")
        ax.set_xlabel("Learning rate")
        ax.set_ylabel("Loss")
        if suggest and self.suggestion() is not None:
            assert self._optimal_idx is not None
            at = self._optimal_idx
            ax.plot(rates[at], losses[at], markersize=10, marker="o", color="red")
        if show:
            plt.show()
        return ax.figure


class Rise(LRScheduler):
    """Raises the rate from that of the optimizer to ``end_lr`` in ``num_iter`` updates.

    Attributes:
        lr: The rates of now, one for each group.
    """

    def __init__(self, optimizer: Optimizer, end_lr: float, num_iter: int, last_epoch: int = -1) -> None:
        self.end_lr, self.num_iter = end_lr, num_iter
        self.lr: list[float] = []
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The rates of the coming update."""
        part = (self.last_epoch + 1) / self.num_iter
        # the first update has the lowest rate
        bases = [float(base) for base in self.base_lrs]
        self.lr = [self.at(base, part) for base in bases] if self.last_epoch > 0 else bases
        return list(self.lr)

    def at(self, base: float, part: float) -> float:
        """The rate when ``part`` of the way from ``base`` is done."""
        raise NotImplementedError(f"{type(self).__name__} must override at().")


class ExponentialRise(Rise):
    """Multiplies the rate by the same factor for each update."""

    def at(self, base: float, part: float) -> float:
        """The rate when ``part`` of the way from ``base`` is done."""
        return float(base * (self.end_lr / base) ** part)


class LinearRise(Rise):
    """Adds the same amount to the rate for each update."""

    def at(self, base: float, part: float) -> float:
        """The rate when ``part`` of the way from ``base`` is done."""
        return base + part * (self.end_lr - base)


class _Curve(Callback):
    """Notes rate and smoothed loss of each update, and ends the test where the loss diverges."""

    def __init__(self, schedule: Rise, start: int, threshold: float | None, stop: Callable[[], None]) -> None:
        self.schedule, self.start, self.threshold, self.stop = schedule, start, threshold, stop
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.last_batch = -1
        self.average = self.best = 0.0
        self.diverged = False

    def on_train_batch_start(self, trainer: TrainerView, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note the rate, where the batch ends with an update."""
        self.last_batch += 1
        if (batch_idx + 1) % trainer.batches_per_update == 0:
            self.rates.append(self.schedule.lr[0])

    def on_train_batch_end(
        self, trainer: TrainerView, pl_module: Any, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss, and judge it."""
        if (batch_idx + 1) % trainer.batches_per_update != 0:
            return
        found = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(found, Tensor):
            self.losses.append(float("nan"))
            return
        step = trainer.global_step - self.start
        self.average = _SMOOTHING * self.average + (1 - _SMOOTHING) * float(found.item())
        # the exponent that Lightning has; one less would make it the mean of an exponential average
        smoothed = self.average / (1 - _SMOOTHING ** (step + 1))
        diverges = self.threshold is not None and step > 1 and smoothed > self.threshold * self.best
        # losses are those of each process, but all must end after the same batch
        if trainer.strategy.broadcast(diverges):
            self.diverged = True
            self.stop()
        if smoothed < self.best or step == 1:
            self.best = smoothed
        self.losses.append(smoothed)


def name_of_rate(module: Any, name: str = "") -> str:
    """Return the name of the setting that holds the learning rate: ``name``, or ``"lr"`` or ``"learning_rate"``.

    Raises:
        AttributeError: where nothing has a setting of that name.
    """
    for each in (name,) if name else _NAMES:
        if has_setting(module, each):
            return each
    raise AttributeError(
        f"The learning rate is to be set, but neither {type(module).__name__} nor its data module has"
        f" {name or ' or '.join(_NAMES)}, as an attribute or in hparams. Name the attribute that holds it (attr_name=...),"
        " or say update_attr=False."
    )


def find_rate(
    trainer: TrainerView,
    module: Any,
    min_lr: float = 1e-8,
    max_lr: float = 1,
    num_training: int = 100,
    mode: str = "exponential",
    early_stop_threshold: float | None = 4.0,
    update_attr: bool = False,
    attr_name: str = "",
) -> LRFinder | None:
    """Make a range test inside a hook of a fit; arguments as of :meth:`leyden.tuning.Tuner.lr_find`.

    Returns:
        What was found, the same on all processes; None with ``fast_dev_run``, which skips the test.

    Raises:
        MisconfigurationException: for more than one optimizer.
    """
    if trainer.fast_dev_run:
        rank_zero_warn("Skipping learning rate finder since `fast_dev_run` is enabled.")
        return None
    if update_attr:
        attr_name = name_of_rate(module, attr_name)
    optimizers = list(trainer.optimizers)
    if len(optimizers) != 1:
        raise MisconfigurationException(
            f"configure_optimizers() returned {len(optimizers)} optimizers, but the learning rate finder only works with"
            " single optimizer: with several there is no one rate to raise."
        )
    found = LRFinder(mode, min_lr, max_lr, num_training)
    start = trainer.global_step
    with trainer.rehearsal() as rehearsal:
        for group in optimizers[0].param_groups:
            group["lr"] = group["initial_lr"] = min_lr
        rise = (LinearRise if mode == "linear" else ExponentialRise)(optimizers[0], max_lr, num_training)
        curve = _Curve(rise, start, early_stop_threshold, rehearsal.stop)
        rehearsal.run(
            [curve], [LRSchedulerConfig(rise, interval="step")], max_steps=start + num_training, max_time=None,
            limit_val_batches=num_training if trainer.enable_validation else 0,
        )  # fmt: skip
    found.take(*trainer.strategy.broadcast((curve.rates, curve.losses, curve.last_batch)))
    tried = len(found.results["lr"])
    if curve.diverged:
        rank_zero_info(f"The learning-rate test stopped after {tried} of {num_training} rates: the loss diverged.")
    elif tried < num_training:
        rank_zero_warn(
            f"The learning-rate test tried {tried} of {num_training} rates: the fit has no more updates. Raise max_epochs or"
            " limit_train_batches for it, or lower num_training.",
            category=PossibleUserWarning,
        )
    rate = found.suggestion() if update_attr else None
    if rate is not None:
        set_setting(module, attr_name, rate)
        for group in optimizers[0].param_groups:
            group["lr"] = rate
        rank_zero_info(f"The learning rate is set to {rate}.")
    return found
