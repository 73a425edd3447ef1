# SPDX-License-Identifier: Apache-2.0
"""All forms that ``configure_optimizers`` may return, turned into one: a list of optimizers and a list of schedules."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from leyden.errors import MisconfigurationException, did_you_mean
from leyden.runtime.ranks import rank_zero_info, rank_zero_warn
from leyden.tree import parameters_of


@dataclass
class LRSchedulerConfig:
    """One learning-rate schedule and when it steps.

    Attributes:
        scheduler: The scheduler object.
        name: The name under which LearningRateMonitor logs it.
        interval: ``"step"`` (after an optimizer step) or ``"epoch"`` (at the end of a training epoch).
        frequency: Step after every ``frequency`` intervals.
        reduce_on_plateau: Whether it gets the value of ``monitor``.
        monitor: Key in ``trainer.callback_metrics``.
        strict: Whether a missing ``monitor`` is an error (else a warning).
    """

    scheduler: Any
    name: str | None = None
    interval: str = "epoch"
    frequency: int = 1
    reduce_on_plateau: bool = False
    monitor: str | None = None
    strict: bool = True


class NoOptimizer(Optimizer):
    """Stands in when ``configure_optimizers`` returns None: every verb is there and does nothing."""

    def __init__(self) -> None:
        super().__init__([torch.zeros(1)], {})

    def add_param_group(self, param_group: dict[str, Any]) -> None: ...

    def step(self, closure: Any = None) -> Any:
        return closure() if closure is not None else None

    def zero_grad(self, set_to_none: bool = True) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


_FORMS = (
    "an Optimizer; a list of them; ([optimizers], [schedulers]);"
    " {'optimizer': …, 'lr_scheduler': … or {'scheduler': …, 'interval': 'step' | 'epoch', 'monitor': …}}; a list of"
    " such dicts; or None"
)


def is_optimizer(value: Any) -> bool:
    """Whether ``value`` can be stepped: a torch optimizer or anything with its verbs."""
    return isinstance(value, Optimizer) or (
        not isinstance(value, (dict, list, tuple))
        and all(callable(getattr(value, verb, None)) for verb in ("step", "state_dict", "load_state_dict"))
        and hasattr(value, "param_groups")
    )


def normalize(
    returned: Any, *, automatic: bool, custom_step: bool, bare_scheduler: str
) -> tuple[list[Optimizer], list[LRSchedulerConfig]]:
    """Turn what ``configure_optimizers`` returned into ``(optimizers, schedules)``.

    Args:
        returned: The value, in any of the forms that PyTorch Lightning documents.
        automatic: Whether the module uses automatic optimization.
        custom_step: Whether the module overrides ``lr_scheduler_step``, so that any object may be a scheduler.
        bare_scheduler: The interval of a scheduler that knows its total number of steps, when none was given.

    Raises:
        MisconfigurationException: for an unknown form, an unknown interval, a plateau without monitor, or a scheduler
            of an optimizer that was not returned.
        TypeError: for a scheduler without ``state_dict`` and ``load_state_dict``.
    """
    optimizers, schedulers, monitor = _split(returned)
    schedules = [_schedule(item, monitor, automatic, bare_scheduler) for item in schedulers]
    for schedule in schedules:
        _check_schedule(schedule, optimizers, automatic, custom_step)
    return optimizers, schedules


def _split(returned: Any) -> tuple[list[Optimizer], list[Any], str | None]:
    if is_optimizer(returned):
        return [returned], [], None
    if isinstance(returned, Mapping):
        optimizer, schedulers = _from_dict(returned)
        return [optimizer], schedulers, returned.get("monitor")
    if isinstance(returned, (list, tuple)):
        if len(returned) == 2 and isinstance(returned[0], (list, tuple)):
            first, second = returned
            if all(is_optimizer(item) for item in first):
                more = list(second) if isinstance(second, (list, tuple)) else [] if second is None else [second]
                return list(first), more, None
        elif returned and all(isinstance(item, Mapping) for item in returned):
            pairs = [_from_dict(item) for item in returned]
            return [pair[0] for pair in pairs], [item for pair in pairs for item in pair[1]], None
        elif returned and all(is_optimizer(item) for item in returned):
            return list(returned), [], None
    raise MisconfigurationException(
        "Unknown configuration for model optimizers: "
        f"configure_optimizers() returned {_describe(returned)}, which is not one of the known forms: {_FORMS}."
    )


def _from_dict(returned: Mapping[str, Any]) -> tuple[Optimizer, list[Any]]:
    known = ("optimizer", "lr_scheduler", "monitor")
    for key in returned:
        if key not in known:
            rank_zero_warn(
                f"configure_optimizers() returned a dict with the unknown key {key!r}; it is ignored."
                f" Known keys: {', '.join(known)}.{did_you_mean(str(key), known)}",
                category=RuntimeWarning,
            )
    if "optimizer" not in returned or not is_optimizer(returned["optimizer"]):
        raise MisconfigurationException(
            f"configure_optimizers() returned a dict whose 'optimizer' is {_describe(returned.get('optimizer'))};"
            f" it must be an optimizer. Known forms: {_FORMS}."
        )
    scheduler, monitor = returned.get("lr_scheduler"), returned.get("monitor")
    if isinstance(scheduler, Mapping):
        if scheduler.get("reduce_on_plateau", isinstance(scheduler.get("scheduler"), ReduceLROnPlateau)):
            scheduler = {"monitor": monitor, **scheduler}
    elif isinstance(scheduler, ReduceLROnPlateau):
        scheduler = {"scheduler": scheduler, "monitor": monitor}
    return returned["optimizer"], [] if scheduler is None else [scheduler]


def _schedule(item: Any, monitor: str | None, automatic: bool, bare: str) -> LRSchedulerConfig:
    given = dict(item) if isinstance(item, Mapping) else {"scheduler": item}
    known = tuple(f.name for f in fields(LRSchedulerConfig))
    for key in [key for key in given if key not in known]:
        rank_zero_warn(
            f"Found unsupported keys in the lr scheduler dict: {key!r} is ignored. Known keys: {', '.join(known)}."
            f"{did_you_mean(str(key), known)}",
            category=RuntimeWarning,
        )
        del given[key]
    if given.get("scheduler") is None:
        raise MisconfigurationException(
            f'The lr scheduler dict must have the key "scheduler" that holds the scheduler; its keys are {sorted(given)}.'
        )
    scheduler = given["scheduler"]
    if not automatic:
        ignored = [key for key in ("reduce_on_plateau", "monitor", "strict") if key in given]
        if ignored:
            rank_zero_warn(
                f"The lr scheduler dict has the keys {ignored}, which mean nothing under manual optimization: call"
                " lr_scheduler.step(...) in training_step yourself.",
                category=RuntimeWarning,
            )
        return LRSchedulerConfig(**{key: value for key, value in given.items() if key not in ignored})
    if given.get("interval", "epoch") not in ("step", "epoch"):
        raise MisconfigurationException(
            f'The "interval" key in lr scheduler dict must be "step" or "epoch"; it is {given["interval"]!r}.'
            f"{did_you_mean(str(given['interval']), ('step', 'epoch'))}"
        )
    plateau = given.setdefault("reduce_on_plateau", isinstance(scheduler, ReduceLROnPlateau))
    if plateau and given.get("monitor") is None:
        given["monitor"] = monitor
        if monitor is None:
            raise MisconfigurationException(
                "`configure_optimizers` must include a monitor when a `ReduceLROnPlateau` scheduler is used: return"
                " {'optimizer': optimizer, 'lr_scheduler': {'scheduler': scheduler, 'monitor': 'val_loss'}}."
            )
    knows_total = hasattr(scheduler, "total_steps") and isinstance(scheduler.total_steps, int)
    if knows_total and "interval" not in given and bare == "step":
        given["interval"] = "step"
        rank_zero_info(
            f"{type(scheduler).__name__} plans {scheduler.total_steps} steps and came without an interval: it is stepped"
            " after every optimizer step. Say {'interval': 'epoch'} to step it once per epoch."
        )
    elif knows_total and given.get("interval", "epoch") == "epoch":
        rank_zero_warn(
            f"{type(scheduler).__name__} plans {scheduler.total_steps} steps but is stepped once per epoch. Did you"
            " mean {'interval': 'step'}?",
            category=RuntimeWarning,
        )
    return LRSchedulerConfig(**given)


def _check_schedule(
    schedule: LRSchedulerConfig, optimizers: Sequence[Optimizer], automatic: bool, custom_step: bool
) -> None:
    scheduler = schedule.scheduler
    kind = type(scheduler).__name__
    if not (hasattr(scheduler, "state_dict") and hasattr(scheduler, "load_state_dict")):
        raise TypeError(f"The lr scheduler {kind} is not valid: it must have state_dict() and load_state_dict().")
    frequency: Any = schedule.frequency
    if not isinstance(frequency, int) or frequency < 1:
        raise MisconfigurationException(f"The 'frequency' of an lr scheduler must be an int >= 1; it is {frequency!r}.")
    standard = isinstance(scheduler, (torch.optim.lr_scheduler.LRScheduler, ReduceLROnPlateau))
    if automatic and not standard and not custom_step:
        raise MisconfigurationException(
            f"The lr scheduler {kind} does not follow torch's LRScheduler: override"
            " LightningModule.lr_scheduler_step(scheduler, metric) to say how it steps."
        )
    owner = getattr(scheduler, "optimizer", None)
    if owner is not None and not any(owner is optimizer for optimizer in optimizers):
        raise MisconfigurationException(
            f"The lr scheduler {kind} belongs to an optimizer that configure_optimizers() did not return. Return that"
            " optimizer too, or build the scheduler on one of those returned."
        )


def _describe(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of ({', '.join(type(item).__name__ for item in value)})"
    if isinstance(value, Mapping):
        return f"a dict with the keys {sorted(map(str, value))}"
    return f"{type(value).__name__} {value!r}"


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether ``optimizer.step`` must be given a closure that runs forward and backward.

    True for an optimizer whose ``step`` has a ``closure`` without default (LBFGS), and for every optimizer that is not
    torch's own: some of those (sharpness-aware ones) only work with a closure, and none suffers from it.
    """
    # a wrapper may have no step of its own, and hand on what it is asked for
    step = getattr(type(optimizer), "step", None) or optimizer.step
    try:
        closure = inspect.signature(step).parameters.get("closure")
    except (TypeError, ValueError):
        return True
    if closure is None:
        return False
    return closure.default is inspect.Parameter.empty or not type(optimizer).__module__.startswith(
        ("torch.", "leyden.")
    )


def _plain_step(optimizer: Optimizer, closure: Callable[[], Any] | None, **kwargs: Any) -> Any:
    return optimizer.step(**kwargs) if closure is None else optimizer.step(closure, **kwargs)


class LightningOptimizer:
    """The optimizer that user code gets: looks and types like the one it wraps, and steps the way the Trainer does.

    ``isinstance`` holds for the class of the wrapped optimizer too. All attributes are those of the wrapped one.
    """

    def __init__(
        self, optimizer: Optimizer, step: Callable[..., Any] | None = None, peers: Sequence[Optimizer] = ()
    ) -> None:
        self._optimizer = optimizer
        self._step = step or _plain_step  # one that user code makes steps as the wrapped one does
        self._peers = tuple(peers)

    @property
    def optimizer(self) -> Optimizer:
        """The wrapped optimizer."""
        return self._optimizer

    def release(self) -> None:
        """Let go of the run: from now on ``step`` is the wrapped optimizer's own."""
        self._step = _plain_step

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # schedulers and user code ask isinstance(optimizer, Optimizer); type() still says LightningOptimizer
        return type(self._optimizer)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_optimizer"):  # not set yet: a copy or unpickling under way
            raise AttributeError(name)
        return getattr(self._optimizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # a scheduler built on the wrapper puts a counting function in the place of "step": around ours, not around the
        # step of the wrapped optimizer, which ours calls
        if name in ("_optimizer", "_step", "_peers", "step"):
            object.__setattr__(self, name, value)
        else:
            setattr(self._optimizer, name, value)

    def __repr__(self) -> str:
        return f"LightningOptimizer({self._optimizer!r})"

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Take one optimizer step, with the hooks, gradient scaling and counters of the Trainer.

        Args:
            closure: Runs forward and backward again and returns the loss; optional.
            **kwargs: Passed to the wrapped optimizer's ``step``.
        """
        if closure is not None and not callable(closure):
            raise MisconfigurationException(f"optimizer.step(closure={closure!r}): the closure must be callable.")
        return self._step(self._optimizer, closure, **kwargs)

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        """Freeze all parameters but this optimizer's for the duration, as ``LightningModule.toggle_optimizer`` does.

        ``sync_grad=False`` also holds back the exchange of gradients between devices.
        """
        # one device has no gradients to exchange, so sync_grad changes nothing here
        own = set(map(id, parameters_of(self._optimizer)))
        theirs = (p for peer in self._peers for p in parameters_of(peer))
        states = [(p, p.requires_grad) for p in theirs if id(p) not in own]
        for parameter, _ in states:
            parameter.requires_grad = False
        try:
            yield
        finally:
            for parameter, required in states:
                parameter.requires_grad = required
