# SPDX-License-Identifier: Apache-2.0
"""Steps the learning-rate schedules that are due, with the hook of the module."""

from __future__ import annotations

from typing import Any

from leyden.errors import MisconfigurationException, PossibleUserWarning, did_you_mean
from leyden.loops.session import Session
from leyden.runtime.ranks import rank_zero_warn


def step_schedules(session: Session, interval: str, plateau: bool, done: int) -> None:
    """Step each schedule of this ``interval``.

    Args:
        session: The run.
        interval: ``"step"`` or ``"epoch"``.
        plateau: Only those that read a metric (True) or only the others (False).
        done: How many batches of the epoch, or epochs, are done: a schedule steps when its frequency divides it.

    Raises:
        MisconfigurationException: when a strict schedule monitors a metric that was not logged.
    """
    if interval == "step":
        done //= session.turns
    for schedule in session.strategy.lr_scheduler_configs:
        if schedule.interval != interval or schedule.reduce_on_plateau is not plateau or done % schedule.frequency:
            continue
        if session.progress.resized and _is_over(schedule.scheduler):
            continue
        metric = None
        if schedule.reduce_on_plateau:
            known = session.trainer.callback_metrics
            metric = known.get(schedule.monitor)
            if metric is None:
                text = (
                    f"The lr scheduler {type(schedule.scheduler).__name__} monitors {schedule.monitor!r}, which has not"
                    f" been logged; known metrics: {sorted(known)}.{did_you_mean(str(schedule.monitor), known)}"
                )
                if schedule.strict:
                    raise MisconfigurationException(text + " Log it, or set 'strict': False to skip the step.")
                rank_zero_warn(text + " The step is skipped.", category=RuntimeWarning)
                continue
        if session.hooks.lr_scheduler_step:
            session.hooks.lr_scheduler_step(schedule.scheduler, metric)
        elif metric is None:
            schedule.scheduler.step()
        else:
            schedule.scheduler.step(metric)
        session.progress.scheduler_steps += 1


def _is_over(scheduler: Any) -> bool:
    """Whether a schedule that knows its total has come to its end, in a run that has more updates now than it then knew.

    It keeps its last learning rate then: to end the run for it, hours after other processes have taken it on, helps nobody.
    """
    total, done = getattr(scheduler, "total_steps", None), getattr(scheduler, "last_epoch", 0)
    if not isinstance(total, int) or done < total:
        return False
    rank_zero_warn(
        f"The lr scheduler {type(scheduler).__name__} was made for {total} steps, but updates have another number of samples"
        " since other processes go on with the run, so that there are more: it keeps its last learning rate.",
        category=PossibleUserWarning,
    )
    return True
