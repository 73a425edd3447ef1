# SPDX-License-Identifier: Apache-2.0
"""A profiler that reports, for each action, in which functions of Python its time goes."""

from __future__ import annotations

import cProfile
import io
import pstats
from pathlib import Path
from typing import Any

from leyden.errors import MisconfigurationException
from leyden.profilers.base import Profiler
from leyden.types import PathLike


class AdvancedProfiler(Profiler):
    """Runs Python's cProfile for each action by itself; actions inside others are theirs alone. Slow.

    Args:
        dirpath: See ``Profiler``.
        filename: See ``Profiler``.
        line_count_restriction: How many functions of each action are listed: a number (int), or a part (float).
        dump_stats: Write the raw numbers of each action too, for ``pstats``, as
            ``{stage}-{filename}-{local rank}-{action}.prof`` in ``dirpath``.
    """

    def __init__(
        self,
        dirpath: PathLike | None = None,
        filename: str | None = None,
        line_count_restriction: float = 1.0,
        dump_stats: bool = False,
    ) -> None:
        super().__init__(dirpath=dirpath, filename=filename)
        self.profiled_actions: dict[str, cProfile.Profile] = {}
        self.line_count_restriction = line_count_restriction
        self.dump_stats = dump_stats
        self._running: list[str] = []

    def start(self, action_name: str) -> None:
        """Begin to profile an action; the one around it pauses."""
        if self._running:
            self.profiled_actions[self._running[-1]].disable()
        self._running.append(action_name)
        self.profiled_actions.setdefault(action_name, cProfile.Profile()).enable()

    def stop(self, action_name: str) -> None:
        """End the profile of an action; the one around it goes on.

        Raises:
            ValueError: if it was never started.
        """
        profile = self.profiled_actions.get(action_name)
        if profile is None:
            raise ValueError(
                f"stop({action_name!r}): this action was never started; running are {sorted(self._running)}."
            )
        profile.disable()
        if action_name in self._running:
            self._running.reverse()
            self._running.remove(action_name)
            self._running.reverse()
        if self._running:
            self.profiled_actions[self._running[-1]].enable()

    def summary(self) -> str:
        """Return the functions of each action, those with the most cumulative time first; with ``dump_stats``, write them.

        Raises:
            MisconfigurationException: for ``dump_stats`` without a folder.
        """
        parts = [self.title]
        for action, profile in self.profiled_actions.items():
            profile.disable()
            if self.dump_stats:
                self._dump(action, profile)
            text = io.StringIO()
            pstats.Stats(profile, stream=text).strip_dirs().sort_stats("cumulative").print_stats(
                self.line_count_restriction
            )
            parts.append(f"Profile stats for: {action} rank: {self.local_rank}\n{text.getvalue().rstrip()}")
        return "\n".join(parts) if len(parts) > 1 else ""

    def _dump(self, action: str, profile: cProfile.Profile) -> None:
        if not self.dirpath:
            raise MisconfigurationException(
                "AdvancedProfiler(dump_stats=True) needs a folder: give dirpath, or the Trainer a logger that has one."
            )
        name = self.prepare_filename(action_name=action, extension=".prof")
        if "://" in str(self.dirpath):
            import marshal  # noqa: PLC0415  # what dump_stats writes; it writes local files only

            import fsspec  # noqa: PLC0415  # only remote folders need it

            profile.create_stats()
            with fsspec.open(f"{str(self.dirpath).rstrip('/')}/{name}", "wb") as file:
                stats: Any = vars(profile).get("stats", {})
                file.write(marshal.dumps(stats))
            return
        folder = Path(str(self.dirpath))
        folder.mkdir(parents=True, exist_ok=True)
        profile.dump_stats(folder / name)

    def teardown(self, stage: str | None) -> None:
        """Forget what was measured."""
        for profile in self.profiled_actions.values():
            profile.disable()
        self.profiled_actions, self._running = {}, []

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "profiled_actions": {}, "_running": []}  # profiles cannot travel
