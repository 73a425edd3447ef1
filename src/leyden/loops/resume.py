# SPDX-License-Identifier: Apache-2.0
"""Which run a fit goes on with: the checkpoint that ``"last"`` and ``"best"`` mean, and the logs that belong to it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from leyden import files
from leyden.callbacks.checkpoint_files import default_folder, paths_in, versions_folder
from leyden.errors import CheckpointDamagedError, CheckpointError, MisconfigurationException, PossibleUserWarning
from leyden.folders import stand_ins
from leyden.hooks import is_written
from leyden.loggers.base import Logger
from leyden.loggers.folder import FolderLogger
from leyden.loops.session import TrainerCore
from leyden.runtime.ranks import rank_zero_info, rank_zero_warn

# --------------------------------------------------------------------------------------------- the checkpoint


def find_checkpoint(given: Any, trainer: TrainerCore) -> Any:
    """Resolve ``ckpt_path``: None, a path, ``"best"`` or ``"last"``.

    ``"last"`` is the newest complete checkpoint, by the step it records, of the run whose checkpoint was written last.
    It is looked for in the folders of the callbacks; in ``checkpoints`` of the first logger's version or, where the user
    has not named one, of all its versions; without a logger in ``checkpoints`` of ``default_root_dir``. ``"best"`` is
    what the callbacks know as such, or else what they knew when that last checkpoint was written.

    Raises:
        MisconfigurationException: for ``"best"`` when no best checkpoint is known.
        CheckpointError: for ``"last"`` when there are checkpoints and none of them can be used.
    """
    if given == "best":
        return _best(trainer)
    if given != "last":
        return given  # a file that is not there is an error when it is read
    places = _Places(trainer)
    if trainer.world_size == 1:
        found = places.newest()
    else:  # on one of them: it may mean to read all of a checkpoint, and only one sees what is there at one moment
        found = trainer.strategy.on_rank_zero(places.newest, str(places))
    fn = str(trainer.state.fn)
    if found is None:
        rank_zero_warn(
            f"Trainer.{fn}(ckpt_path='last'): there is no checkpoint in {places}. "
            + "No checkpoint will be loaded: "
            + ("the fit starts anew." if fn == "fit" else "the weights stay as they are."),
            category=PossibleUserWarning,
        )
    elif len(places.runs) > 1:
        rank_zero_info(
            f"Trainer.{fn}(ckpt_path='last') takes {found}: of {len(places.runs)} runs with checkpoints, it is of the one"
            " that wrote its newest checkpoint last. For another, give the path of its file."
        )
    return found


def _best(trainer: TrainerCore) -> Any:
    callbacks = trainer.checkpoint_callbacks
    for callback in callbacks:
        if path := getattr(callback, "best_model_path", ""):
            return path
    last = _Places(trainer).newest()
    states: Any = skim(last).get("callbacks") if last is not None else None
    if isinstance(states, Mapping):
        ours = [states.get(getattr(callback, "state_key", None)) for callback in callbacks]
        for state in [*ours, *states.values()]:
            path = str(state.get("best_model_path") or "") if isinstance(state, Mapping) else ""
            # a tree that was moved as a whole has it beside the newest
            beside = os.path.join(os.path.dirname(str(last)), os.path.basename(path))
            for candidate in (path, beside) if path else ():
                if files.is_remote(candidate) or os.path.exists(candidate):
                    return candidate
    reason = (
        "`ModelCheckpoint` is not configured."
        if not callbacks
        else "`ModelCheckpoint` is not configured to save the best model, or has not saved any."
    )
    raise MisconfigurationException(
        f"Trainer.{trainer.state.fn}(ckpt_path='best'): no best checkpoint is known: {reason} It takes a ModelCheckpoint"
        " that has saved one (not with `fast_dev_run=True`); otherwise pass an exact checkpoint path."
    )


class _Places:
    """Where the checkpoints of a Trainer may lie; nothing is made by looking.

    Attributes:
        runs: For each run that left checkpoints in a folder of the first logger, its folders of them; the run that
            wrote its newest one last comes first.
    """

    def __init__(self, trainer: TrainerCore) -> None:
        endings = [getattr(each, "FILE_EXTENSION", None) for each in trainer.checkpoint_callbacks]
        self.suffixes = tuple(dict.fromkeys([files.SUFFIX, *(each for each in endings if each)]))
        self.named = list(dict.fromkeys(path for each in trainer.checkpoint_callbacks for path in _folders(each)))
        self.looked: list[str] = list(self.named)
        logger = trainer.loggers[0] if trainer.loggers else None
        if trainer.progress.batches:
            logger = None  # this Trainer has trained already: its own run is meant
        if isinstance(logger, FolderLogger):
            inside = [part for path in self.named if (part := logger.within(path))]
            parts = list(dict.fromkeys(["checkpoints", *inside]))
            runs = [[os.path.join(folder, part) for part in parts] for folder in logger.folders()]
            self.looked.append(
                os.path.join(logger.root_dir, "version_*", "checkpoints") if len(runs) != 1 else runs[0][0]
            )
        elif logger is not None and is_written(logger, "load_state_dict", Logger):
            versions = versions_folder(trainer)
            runs = [[os.path.join(path, "checkpoints")] for path in sorted(paths_in(versions), reverse=True)]
            self.looked.append(os.path.join(versions, "*", "checkpoints"))
        else:
            runs = [[default_folder(trainer)]]
            if trainer.log_dir:
                runs[0].append(os.path.join(trainer.log_dir, "checkpoints"))
            self.looked += runs[0]
        dated = [(written, run) for run in runs if (written := max(map(self._last_written, run))) > 0]
        self.runs = [run for _, run in sorted(dated, key=lambda pair: -pair[0])]

    def __str__(self) -> str:
        return str(sorted(set(self.looked)))

    def newest(self) -> Any:
        """Return the newest checkpoint of the newest run; None if there is none.

        Raises:
            CheckpointError: when there are files and none of them can be used: to begin anew would be a surprise.
        """
        folders = list(dict.fromkeys([*self.named, *(self.runs[0] if self.runs else [])]))
        found, damaged = [], []
        for folder in folders:
            try:
                if (path := files.newest(folder, self.suffixes)) is not None:
                    found.append(path)
            except CheckpointDamagedError as error:  # another folder may have a good one
                damaged.append(error)
        if not found:
            if damaged:
                raise damaged[0]
            if unusable := [folder for folder in folders if self._last_written(folder)]:
                raise CheckpointError(
                    f"ckpt_path='last': none of the checkpoints in {unusable} can be used; the warnings above say why."
                    " Remove them to begin anew, or give the path of another."
                )
            return None
        latest = max(found, key=_written)
        marks = _marks(latest)
        same_run = [path for path in found if path == latest or marks & _marks(path)]
        return max(same_run, key=lambda path: (_step(path), _written(path)))

    def _last_written(self, folder: str) -> float:
        """When the newest checkpoint in ``folder`` was written, in seconds since 1970; 0 if there is none."""
        names = [path for path in paths_in(folder) if path.endswith(self.suffixes)]
        names = [path for path in names if not os.path.basename(path).startswith(".")]
        if not files.is_remote(folder):
            # committed, but its process died before it got its name
            names += map(str, stand_ins(files.local_path(folder)))
        return max(map(_written, names), default=0.0)


def _folders(callback: Any) -> list[str]:
    last, folder = getattr(callback, "last_model_path", ""), getattr(callback, "dirpath", None)
    return [os.path.dirname(str(last))] * bool(last) + [str(folder)] * bool(folder)


def _step(path: Any) -> int:
    step = skim(path).get("global_step")
    return step if isinstance(step, int) else -1


def _marks(path: Any) -> set[str]:
    ours: Any = skim(path).get("leyden")
    return set(ours.get("marks", ())) if isinstance(ours, Mapping) else set()


def _written(path: Any) -> float:
    if not files.is_remote(path):
        try:
            return os.stat(path).st_mtime
        except FileNotFoundError:
            return 0.0  # a link that leads nowhere
    from fsspec.core import url_to_fs  # noqa: PLC0415  # only for remote files

    filesystem, target = url_to_fs(str(path))
    try:
        return float(filesystem.modified(target).timestamp())
    except NotImplementedError:
        return 1.0  # some cannot tell


# --------------------------------------------------------------------------------------------- its logs


def continue_runs(loggers: Iterable[Any], path: Any) -> None:
    """Let each logger go on with the run that the checkpoint ``path`` names, before it makes one of its own.

    The first logger of a class gets the state of the first of that class, and so on.
    """
    ours: Any = skim(path).get("leyden")
    states = list(ours.get("loggers", ())) if isinstance(ours, Mapping) else []
    for logger in loggers:
        take = getattr(logger, "load_state_dict", None)
        state = next((each for each in states if each.get("class") == type(logger).__qualname__), None)
        if state is not None:
            states.remove(state)
            if callable(take):
                take({**state, "checkpoint": str(path)})


def rewind(loggers: Iterable[Any]) -> None:
    """Let each logger take back the rows that came after the checkpoint."""
    for logger in loggers:
        if callable(take_back := getattr(logger, "rewind", None)):
            take_back()


def set_aside(loggers: Iterable[Any]) -> None:
    """Let each logger put away the rows of a run that left no checkpoint, where the user named its version."""
    for logger in loggers:
        if callable(put_away := getattr(logger, "set_aside", None)):
            put_away()


# --------------------------------------------------------------------------------------------- a look into a file


def skim(path: Any) -> dict[str, Any]:
    """Return what is in a checkpoint, without its tensors and without running anything of it.

    Empty for a file that is not there or is no checkpoint: what is wrong with it is said when it is read.
    """
    try:
        found = files.look(path)
    except (CheckpointError, OSError):
        return {}
    return dict(found) if isinstance(found, Mapping) else {}
