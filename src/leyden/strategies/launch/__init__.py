# SPDX-License-Identifier: Apache-2.0
"""How processes are started where nobody else has: by running the script once more, or for one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

STARTS = ("popen", "spawn", "fork", "forkserver", "fresh", "notebook", "ray")
"""The names of the ways. ``popen`` runs the script once more in each process; the others run one call of the Trainer."""


def call(strategy: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run ``function(*arguments)`` in as many processes as ``strategy`` has; return what it returned on rank 0.

    Args:
        strategy: Says how many processes there are, and how they are started.
        function: With what it is given, and returns, something that can be pickled; ``strategy`` may be a part of it.
        arguments: Of the call. What the processes do to them is seen in the processes only.

    Raises:
        torch.multiprocessing.ProcessRaisedException: with the traceback of the process that failed first.
        MisconfigurationException: where processes cannot be started so.
    """
    how = strategy.start_method
    if how == "ray":
        from leyden.strategies.launch.ray import OnRay  # noqa: PLC0415  # each way where it is taken

        how = OnRay()
    if not isinstance(how, str):
        return how.call(strategy, function, *arguments)
    if how == "notebook":
        from leyden.strategies.launch.fresh import way_of_notebooks  # noqa: PLC0415  # see above

        how = way_of_notebooks()
    if how == "fresh":
        from leyden.strategies.launch import fresh  # noqa: PLC0415  # see above

        return fresh.call(strategy, function, *arguments)
    from leyden.strategies.launch import spawn  # noqa: PLC0415  # see above

    return spawn.call(strategy, function, *arguments, method=how)


def run(trainer: Any, entry: str, given: Mapping[str, Any]) -> Any:
    """Run ``trainer.<entry>`` in processes that are started for it; return what it returned on rank 0.

    The module has the weights of rank 0 afterwards, and the Trainer its metrics, counters and the state of its callbacks.

    Args:
        trainer: Whose strategy says how many processes there are, and how they are started.
        entry: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        given: The arguments of the call, among others; ``"model"`` is the module, None the last one.
    """
    from leyden.strategies.launch import carry  # noqa: PLC0415  # see above

    arguments = carry.arguments_of(trainer, entry, given)
    return carry.take(trainer, arguments["model"], call(trainer.strategy, carry.entry, trainer, entry, arguments))
