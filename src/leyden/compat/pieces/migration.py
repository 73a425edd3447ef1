# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of earlier versions: brought to the present form, one at a time or all files of a folder."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from leyden.compat.hook import installed
from leyden.compat.table import VERSIONS
from leyden.errors import PossibleUserWarning
from leyden.loading import modernized
from leyden.loops.lightning_loops import to_lightning
from leyden.progress import Progress
from leyden.runtime.ranks import rank_zero_warn

_VERSION = "pytorch-lightning_version"
_HERE = VERSIONS["lightning"]
_MOVED = (
    # what the keys of the fit loop began with, and begin with since 2.0
    ("epoch_loop.batch_loop.optimizer_loop.", "epoch_loop.automatic_optimization."),
    ("epoch_loop.batch_loop.manual_loop.", "epoch_loop.manual_optimization."),
    ("epoch_loop.optimizer_loop.", "epoch_loop.automatic_optimization."),
    ("epoch_loop.manual_loop.", "epoch_loop.manual_optimization."),
)


def _numbers(version: str) -> tuple[int, ...]:
    digits = "".join(letter if letter.isdigit() else " " for letter in version.partition("+")[0])
    return tuple(int(part) for part in digits.split())[:3] if digits.split() else (0,)


def _callbacks_of_2020(checkpoint: dict[str, Any]) -> None:
    if "checkpoint_callback_best" in checkpoint:
        checkpoint.setdefault("checkpoint_callback_best_model_score", checkpoint.pop("checkpoint_callback_best"))
    found = modernized(checkpoint)
    checkpoint.clear()
    checkpoint.update(found)


def _progress(checkpoint: dict[str, Any]) -> None:
    """Before 1.6 only two numbers said how far the run was."""
    loops = checkpoint.setdefault("loops", {})
    if "fit_loop" not in loops:
        epoch, steps = int(checkpoint.get("epoch", 0)), int(checkpoint.get("global_step", 0))
        counters = Progress(epoch=epoch, global_step=steps, batches_that_stepped=steps, optimizer_steps=[steps])
        loops["fit_loop"] = to_lightning(counters, [], last=True)["fit_loop"]


def _batches_that_stepped(checkpoint: dict[str, Any]) -> None:
    state = checkpoint.get("loops", {}).get("fit_loop", {}).setdefault("epoch_loop.state_dict", {})
    state.setdefault("_batches_that_stepped", checkpoint.get("global_step", 0))


def _names_of_callbacks(checkpoint: dict[str, Any]) -> None:
    states = checkpoint.get("callbacks") or {}
    renamed: dict[Any, Any] = {}
    for name, state in states.items():
        new = name
        if isinstance(name, str) and name.startswith("ModelCheckpoint"):
            for value in ("None", "True", "False"):
                new = new.replace(f", 'save_on_train_epoch_end': {value}", "")
        renamed[new] = state
    if len(renamed) < len(states):
        rank_zero_warn(
            "Several ModelCheckpoint callbacks of this checkpoint have one name today, so their states are left as they"
            " are, and at least one of them does not get its state back.",
            category=PossibleUserWarning,
        )
    elif states:
        checkpoint["callbacks"] = renamed


def _loops_of_2(checkpoint: dict[str, Any]) -> None:
    if checkpoint.pop("amp_scaling_state", None) is not None:
        rank_zero_warn("The checkpoint has the state of apex, which nothing reads any more; it is left out.")
    loops = checkpoint.get("loops") or {}
    fit: dict[str, Any] = loops.get("fit_loop", {})
    fit.pop("epoch_loop.batch_loop.state_dict", None)
    for before, after in _MOVED:
        for key in [key for key in fit if key.startswith(before)]:
            fit[after + key.removeprefix(before)] = fit.pop(key)
    fit.get("epoch_loop.automatic_optimization.optim_progress", {}).pop("optimizer_position", None)
    for name in ("validate_loop", "test_loop", "predict_loop"):
        loop = loops.get(name, {})
        loop.pop("dataloader_progress", None)
        for key in [key for key in loop if key.startswith("epoch_loop.")]:
            loop[key.removeprefix("epoch_loop.")] = loop.pop(key)


_STEPS = (
    ("0.10.0", (_callbacks_of_2020,)),
    ("1.6.0", (_progress,)),
    ("1.6.5", (_batches_that_stepped,)),
    ("1.9.0", (_names_of_callbacks,)),
    ("2.0.0", (_loops_of_2,)),
)


def migrate_checkpoint(
    checkpoint: dict[str, Any], target_version: str | None = None
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Bring a checkpoint to the present form, in place.

    Args:
        checkpoint: What the file holds.
        target_version: Take the steps up to this version only; None: all.

    Returns:
        The checkpoint, and by version the steps that were taken.
    """
    wrote = str(checkpoint.get(_VERSION, _HERE))
    if _numbers(wrote) > _numbers(_HERE):
        rank_zero_warn(
            f"The checkpoint was written by Lightning {wrote}, which is newer than {_HERE}, the version Leyden knows.",
            category=PossibleUserWarning,
        )
        return checkpoint, {}
    taken = {}
    for version, steps in _STEPS:
        wanted = target_version is None or _numbers(version) <= _numbers(target_version)
        if wanted and _numbers(wrote) < _numbers(version):
            for step in steps:
                step(checkpoint)
            taken[version] = [step.__name__.lstrip("_") for step in steps]
    if wrote != _HERE:
        checkpoint.setdefault(f"legacy_{_VERSION}", wrote)
    checkpoint[_VERSION] = _HERE
    return checkpoint, taken


class pl_legacy_patch:
    """A context in which pickles that name Lightning's modules, the old ones too, open with the classes of Leyden."""

    def __enter__(self) -> pl_legacy_patch:
        self._names = installed()
        self._names.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._names.__exit__(kind, error, trace)


def main(args: Sequence[str] | None = None) -> None:
    """Bring checkpoint files to the present form; each leaves a copy of what it was behind, ``.bak`` at its end.

    Args:
        args: As on the command line: a file, or a folder with ``--extension``; ``--map-to-cpu``.
    """
    parser = argparse.ArgumentParser(prog="upgrade_checkpoint", description=(main.__doc__ or "").partition("\n")[0])
    parser.add_argument("path", help="a checkpoint, or a folder that is searched for them")
    parser.add_argument("--extension", "-e", default=".ckpt", help="what files of a folder end with")
    parser.add_argument("--map-to-cpu", action="store_true", help="for files of a GPU, on a machine without one")
    options = parser.parse_args(args)
    path = Path(options.path)
    if not path.exists():
        parser.error(f"{path} does not exist")
    files = [path] if path.is_file() else sorted(path.rglob(f"*{options.extension}"))
    if not files:
        parser.error(f"{path} has no files that end with {options.extension}")
    for file in files:
        with pl_legacy_patch():
            checkpoint = torch.load(file, map_location="cpu" if options.map_to_cpu else None, weights_only=False)
        _, taken = migrate_checkpoint(checkpoint)
        copy = file.with_name(f"{file.name}.bak")
        if not copy.exists():
            shutil.copyfile(file, copy)
        torch.save(checkpoint, file)
        print(f"{file}: {', '.join(step for steps in taken.values() for step in steps) or 'nothing to do'}")
