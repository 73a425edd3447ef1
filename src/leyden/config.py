# SPDX-License-Identifier: Apache-2.0
"""What a Trainer was asked to do: one frozen dataclass, each field checked once, when the Trainer is built."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from leyden.errors import MisconfigurationException, did_you_mean
from leyden.types import Interval

SEMANTICS: dict[str, dict[str, Any]] = {
    # Where Lightning's behaviour is a known trap, "leyden" is the right one; "lightning" gives theirs back.
    # short_window: divisor of the last, short window of gradient accumulation
    # global_step: what one step counts      bare_scheduler: when a scheduler that knows its total is stepped
    # interrupt: what Ctrl-C does            log_folder: the default folder of the default logger
    # worker_seeds: what the random numbers of data workers follow from: the batch, or the worker that loads it
    # loading: how checkpoint files are read by default (None: as torch.load decides)
    # resumed_log: where a fit that goes on from a checkpoint logs
    # epoch_mean: over which samples the mean of an epoch goes, with several processes
    # shared_order: the order of training samples that several processes share: the loader's, or one shuffled by the epoch
    # shared_evaluation: whether a sample may be evaluated twice, so that all processes have as many
    # lottery_ticket: to what ModelPruning puts weights back: their first values, or memory that training has written to
    # saved_average: whether a checkpoint of weights alone has the average of WeightAveraging: always, or not
    # saved_config: what LightningCLI does where a run before has left its config
    # config_from_checkpoint: whether the hyperparameters in LightningCLI's --ckpt_path fill gaps, or win over what is given
    # data_wait: whether ThroughputMonitor also logs the share of time that was spent waiting for data
    "leyden": {
        "short_window": "actual",
        "global_step": "model updates",
        "several_optimizers": "automatic",
        "bare_scheduler": "step",
        "interrupt": "return",
        "worker_seeds": "batch",
        "loading": True,
        "log_folder": "leyden_logs",
        "resumed_log": "same version",
        "epoch_mean": "all samples",
        "shared_order": "loader",
        "shared_evaluation": "once",
        "lottery_ticket": "first values",
        "saved_average": "always",
        "data_wait": True,
        "saved_config": "next name",
        "config_from_checkpoint": "fills",
    },
    "lightning": {
        "short_window": "constant",
        "global_step": "optimizer steps",
        "several_optimizers": "manual only",
        "bare_scheduler": "epoch",
        "interrupt": "exit",
        "worker_seeds": "worker",
        "loading": None,
        "log_folder": "lightning_logs",
        "resumed_log": "new version",
        "epoch_mean": "local unless sync_dist",
        "shared_order": "shuffled",
        "shared_evaluation": "padded",
        "lottery_ticket": "shared memory",
        "saved_average": "never alone",
        "data_wait": False,
        "saved_config": "refuse",
        "config_from_checkpoint": "wins",
    },
}
_default = ["leyden"]
CALLBACK_GROUPS = ["leyden.callbacks"]
"""The groups of entry points by which installed packages add callbacks."""


def default_semantics() -> str:
    """The semantics of a Trainer that is not told: ``"leyden"``, unless the program imports Lightning's Trainer from us."""
    return _default[0]


def set_default_semantics(name: str) -> str:
    """Set the semantics of Trainers that are not told; return what it was."""
    before, _default[0] = _default[0], name
    return before


@dataclass(frozen=True)
class TrainerConfig:
    """The knobs of the loops. Counts are batches, epochs or optimizer steps as the name says; ``None`` means no limit.

    ``replace(name=value)`` gives a changed copy, checked again; nothing else can change it.
    """

    max_epochs: int | None = None
    min_epochs: int | None = None
    max_steps: int = -1
    min_steps: int | None = None
    max_time: Interval = None
    limit_train_batches: int | float = 1.0
    limit_val_batches: int | float = 1.0
    limit_test_batches: int | float = 1.0
    limit_predict_batches: int | float = 1.0
    overfit_batches: int | float = 0.0
    val_check_interval: Interval = 1.0
    check_val_every_n_epoch: int | None = 1
    num_sanity_val_steps: int | float = 2
    log_every_n_steps: int = 50
    accumulate_grad_batches: int = 1
    gradient_clip_val: int | float | None = None
    gradient_clip_algorithm: str | None = None
    reload_dataloaders_every_n_epochs: int = 0
    inference_mode: bool = True
    deterministic: bool | str | None = None
    benchmark: bool | None = None
    detect_anomaly: bool = False
    fast_dev_run: int | bool = False
    enable_autolog_hparams: bool = True
    barebones: bool = False
    semantics: str = "leyden"
    compile: bool | Mapping[str, Any] = False
    cuda_graphs: bool = False
    fused_optimizers: bool = False
    fast_data: bool = True
    num_workers: int | str | None = None
    use_distributed_sampler: bool = True
    keep_global_batch: bool = True

    def __post_init__(self) -> None:
        _check_counts(self)
        _check_limits(self)
        _check_clipping(self)
        if self.semantics not in SEMANTICS:
            raise _bad(
                "semantics", self.semantics, "'leyden' or 'lightning'", did_you_mean(str(self.semantics), SEMANTICS)
            )
        if self.deterministic not in (None, True, False, "warn"):
            raise _bad("deterministic", self.deterministic, "True, False, 'warn' or None")
        for name in _SWITCHES:
            check_switch(name, getattr(self, name))
        _check_speed(self)
        parse_val_check_interval(self.val_check_interval)
        parse_duration(self.max_time, "max_time")
        if self.check_val_every_n_epoch is None and parse_val_check_interval(self.val_check_interval).unit == "epoch":
            raise MisconfigurationException(
                f"check_val_every_n_epoch=None counts batches across epochs, so val_check_interval must be a number of"
                f" batches (int) or a duration; it is {self.val_check_interval!r}."
            )

    @property
    def fast_dev_batches(self) -> int:
        """How many batches each loop runs in a fast dev run; 0 when it is not one."""
        return int(self.fast_dev_run)

    def replace(self, **changes: Any) -> TrainerConfig:
        """Return a copy with ``changes``, checked like the first one."""
        return dataclasses.replace(self, **changes)

    def rule(self, topic: str) -> Any:
        """Return what the chosen semantics say on one topic of the table ``SEMANTICS``."""
        return SEMANTICS[self.semantics][topic]


_SWITCHES = (
    "benchmark", "inference_mode", "detect_anomaly", "enable_autolog_hparams", "barebones", "cuda_graphs",
    "fused_optimizers", "fast_data", "keep_global_batch",
)  # fmt: skip


def _bad(name: str, value: Any, allowed: str, hint: str = "", must: str = "it must") -> MisconfigurationException:
    return MisconfigurationException(f"Trainer({name}={value!r}) is not valid: {must} be {allowed}.{hint}")


def check_switch(name: str, value: Any) -> None:
    """Raise MisconfigurationException unless ``value`` is True, False or None: ``"no"`` would count as True."""
    if value is not None and not (isinstance(value, (bool, int)) and value in (0, 1)):
        raise _bad(name, value, "True or False")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_counts(config: TrainerConfig) -> None:
    rules: list[tuple[str, int, bool]] = [
        # name, smallest value, None allowed
        ("max_epochs", -1, True),
        ("min_epochs", 0, True),
        ("max_steps", -1, False),
        ("min_steps", 0, True),
        ("check_val_every_n_epoch", 1, True),
        ("log_every_n_steps", 0, False),
        ("accumulate_grad_batches", 1, False),
        ("reload_dataloaders_every_n_epochs", 0, False),
    ]
    for name, smallest, optional in rules:
        value = getattr(config, name)
        if value is None and optional:
            continue
        if not _is_int(value) or value < smallest:
            allowed = "a non-negative integer or -1, for no limit" if smallest == -1 else f"an integer >= {smallest}"
            must = f"`{name}` {'must' if smallest == -1 else 'should'}"
            raise _bad(name, value, allowed + (", or None" if optional else ""), must=must)
    steps = config.num_sanity_val_steps
    if not (_is_int(steps) and steps >= -1) and steps != math.inf:
        raise _bad("num_sanity_val_steps", steps, "an int >= 0, or -1 for all")
    fast: Any = config.fast_dev_run
    if not isinstance(fast, (bool, int)) or fast < 0:
        raise MisconfigurationException(
            f"Trainer(fast_dev_run={fast!r}): fast_dev_run={fast!r} is not a valid configuration. It should be >= 0, a number"
            " of batches, or True or False."
        )


def _check_limits(config: TrainerConfig) -> None:
    for name in (
        "overfit_batches",  # first: it sets two of the others
        "limit_train_batches",
        "limit_val_batches",
        "limit_test_batches",
        "limit_predict_batches",
    ):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not (value >= 0):
            raise _bad(name, value, "a fraction from 0.0 to 1.0 or a number of batches >= 0")
        if isinstance(value, float) and value > 1.0 and value != math.inf:
            raise _bad(
                name,
                value,
                "a fraction from 0.0 to 1.0 (float) or a number of batches (int)",
                f" Did you mean {int(value)}?" if value.is_integer() else "",
            )


def _check_clipping(config: TrainerConfig) -> None:
    value, algorithm = config.gradient_clip_val, config.gradient_clip_algorithm
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise TypeError(
            f"Trainer(gradient_clip_val={value!r}) is not valid: `gradient_clip_val` should be an int or a float, or None."
        )
    algorithm = getattr(algorithm, "value", algorithm)
    if algorithm is not None and str(algorithm).lower() not in ("norm", "value"):
        raise MisconfigurationException(
            f"Trainer(gradient_clip_algorithm={algorithm!r}): `gradient_clip_algorithm` {algorithm} is invalid; it must be"
            f" 'norm' or 'value'.{did_you_mean(str(algorithm), ('norm', 'value'))}"
        )


def _check_speed(config: TrainerConfig) -> None:
    if not isinstance(config.compile, (bool, Mapping)):
        raise _bad("compile", config.compile, "True, False or a dict of arguments of torch.compile")
    if isinstance(config.compile, Mapping):
        known = [name for name in inspect.signature(torch.compile).parameters if name != "model"]
        for name in config.compile:
            if name not in known:
                raise _bad(
                    "compile", config.compile, f"a dict of arguments of torch.compile: {', '.join(known)}",
                    did_you_mean(str(name), known),
                )  # fmt: skip
    workers = config.num_workers
    if workers is not None and workers != "auto" and not (_is_int(workers) and int(workers) >= 0):
        raise _bad("num_workers", workers, "an int >= 0, 'auto' or None")


def parse_duration(value: Interval, name: str) -> timedelta | None:
    """Turn ``"DD:HH:MM:SS"``, ``"30min"``, a timedelta or a dict of timedelta arguments into a timedelta.

    Raises:
        MisconfigurationException: for anything else; None gives None.
    """
    if value is None:
        return None
    if isinstance(value, timedelta):
        return value
    if isinstance(value, Mapping):
        try:
            return timedelta(**value)
        except TypeError as error:
            raise _bad(
                name, value, "a dict of arguments of datetime.timedelta, such as {'hours': 2}", f" ({error})"
            ) from None
    if isinstance(value, str):
        parts = value.strip().split(":")
        if len(parts) == 4 and all(part.isdigit() for part in parts):
            days, hours, minutes, seconds = (int(part) for part in parts)
            return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
        number, unit = _split_unit(value)
        if number is not None and unit in _SECONDS:
            return timedelta(seconds=number * _SECONDS[unit])
    raise _bad(name, value, "'DD:HH:MM:SS', a string such as '30min', a datetime.timedelta or a dict of its arguments")


_SECONDS = {"s": 1, "sec": 1, "second": 1, "min": 60, "minute": 60, "h": 3600, "hour": 3600, "d": 86400, "day": 86400}


def _split_unit(text: str) -> tuple[float | None, str]:
    text = text.strip().lower().replace(" ", "")
    digits = text.rstrip("abcdefghijklmnopqrstuvwxyz")
    unit = text[len(digits) :]
    if len(unit) > 1 and unit.endswith("s"):
        unit = unit[:-1]
    try:
        return float(digits), unit
    except ValueError:
        return None, unit


@dataclass(frozen=True, slots=True)
class ValInterval:
    """When validation runs inside training: after ``value`` batches, optimizer steps, seconds, or parts of an epoch."""

    unit: str  # "batch" | "step" | "epoch" | "time"
    value: float


def parse_val_check_interval(value: Interval) -> ValInterval:
    """Read ``val_check_interval`` in all its forms.

    int: batches. float: fraction of an epoch. ``"500 steps"``: optimizer steps. ``"0.25 epoch"``, ``"100 batches"``,
    ``"30min"``, ``"DD:HH:MM:SS"``, timedelta or dict: as they say.
    """
    name, allowed = (
        "val_check_interval",
        (
            "a number of batches (int), a fraction of an epoch (float from 0.0 to 1.0), a duration ('DD:HH:MM:SS', '30min',"
            " timedelta, dict) or a string such as '500 steps', '100 batches', '0.25 epoch'"
        ),
    )
    if value is None:
        return ValInterval("epoch", 1.0)
    if isinstance(value, bool):
        raise _bad(name, value, allowed)
    if isinstance(value, int):
        if value < 0:
            raise _bad(name, value, allowed)
        return ValInterval("batch", value)
    if isinstance(value, float):
        if not 0.0 <= value <= 1.0:
            hint = f" Did you mean {int(value)}?" if value.is_integer() and value > 1 else ""
            raise _bad(name, value, allowed, hint)
        return ValInterval("epoch", value)
    if isinstance(value, str):
        number, unit = _split_unit(value.replace("batches", "batch"))
        if number is not None and unit in ("step", "batch", "epoch"):
            whole = unit != "epoch"
            if number <= 0 or (whole and number != int(number)) or (unit == "epoch" and number > 1):
                raise _bad(name, value, allowed)
            return ValInterval(unit, number)
    try:
        duration = parse_duration(value, name)
    except MisconfigurationException:
        raise _bad(name, value, allowed) from None
    assert duration is not None
    return ValInterval("time", duration.total_seconds())


def resolve_limits(config: TrainerConfig) -> tuple[int | None, int, bool]:
    """Return ``(min_epochs, max_epochs, defaulted)``: the bounds that a fit uses; ``max_epochs`` -1 means no bound.

    Without any bound (``max_epochs``, ``max_steps``, ``max_time``) the default is 1000 epochs and ``defaulted`` is True.
    """
    max_epochs, defaulted = config.max_epochs, False
    if max_epochs is None:
        if config.max_steps == -1 and config.max_time is None:
            max_epochs, defaulted = 1000, True
        else:
            max_epochs = -1
    min_epochs = config.min_epochs
    if min_epochs is None and config.min_steps is not None:
        min_epochs = 1
    return min_epochs, max_epochs, defaulted
