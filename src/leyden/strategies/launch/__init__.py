# SPDX-License-Identifier: Apache-2.0
"""How processes are started where nobody else has: by running the script once more, or for one call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STARTS = ("popen", "spawn", "fork", "forkserver", "fresh", "notebook", "ray")
"""The names of the ways. ``popen`` runs the script once more in each process; the others run one call of the Trainer."""


def run(how: Any, trainer: Any, entry: str, given: Mapping[str, Any]) -> Any:
    """Run ``trainer.<entry>`` in processes that are started for it, in the way ``how``; return what it returned on rank 0.

    Args:
        how: One of ``STARTS``, or an object with a ``run`` of its own, see ``launch.ray.OnRay``.
        trainer: Whose strategy says how many processes there are.
        entry: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        given: The arguments of the call, among others.
    """
    if how == "ray":
        from leyden.strategies.launch.ray import OnRay  # noqa: PLC0415  # each way where it is taken

        how = OnRay()
    if not isinstance(how, str):
        return how.run(trainer, entry, given)
    if how == "notebook":
        from leyden.strategies.launch.fresh import way_of_notebooks  # noqa: PLC0415  # see above

        how = way_of_notebooks()
    if how == "fresh":
        from leyden.strategies.launch import fresh  # noqa: PLC0415  # see above

        return fresh.run(trainer, entry, given)
    from leyden.strategies.launch import spawn  # noqa: PLC0415  # see above

    return spawn.run(trainer, entry, given, how)
