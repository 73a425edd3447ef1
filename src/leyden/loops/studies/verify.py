# SPDX-License-Identifier: Apache-2.0
"""Proves that a fit can be resumed: lets one process run through and a fresh one go on from the middle, and compares."""

from __future__ import annotations

import math
import os
import pickle
import runpy
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leyden.errors import MisconfigurationException
from leyden.loops.studies.probe import Task, watch
from leyden.runtime.seed import rng_state, set_rng_state

INSIDE = "LEYDEN_VERIFY_RESUME"
"""Set in the processes of a verification, so that none of them begins another."""
_SCRIPT_FORM = "Or put the fit into a script and run `leyden verify-resume script.py`, which needs no pickling."

Launch = Callable[[Task], list[str]]


@dataclass
class Report:
    """What a verification found; true if the resumed fit is the unbroken one, bit for bit.

    Attributes:
        batches: How many were compared, after the checkpoint.
        difference: The first thing that differs; empty if nothing does.
        hint: Its likely cause, where one was seen.
    """

    batches: int
    difference: str = ""
    hint: str = ""

    @property
    def exact(self) -> bool:
        """Whether nothing differs."""
        return not self.difference

    def __bool__(self) -> bool:
        return self.exact

    def __str__(self) -> str:
        if self.exact:
            return (
                f"exact: in the {self.batches} batches after the checkpoint, everything is the same, bit for bit: samples,"
                " losses, weights, optimizers, schedules, learning rates, counters, logged values, random generators."
            )
        return f"different: {self.difference}" + (f"\nLikely cause: {self.hint}" if self.hint else "")


class CouldNotRun(MisconfigurationException):
    """A process of the verification failed; the message ends with what it said."""


# --------------------------------------------------------------------------------------------- two processes


def verify(launch: Launch, steps: int, environment: Mapping[str, str] | None = None) -> Report:
    """Run a fit for ``steps`` batches, go on from the middle in a fresh process, and compare.

    Args:
        launch: Returns the command of a process that does a task.
        steps: Training batches; at least 2.
        environment: What its environment has besides that of this process.

    Raises:
        MisconfigurationException: for fewer steps, or inside a verification.
        CouldNotRun: if a process fails.
    """
    if type(steps) is not int or steps < 2:
        raise MisconfigurationException(f"verify_resume(steps={steps!r}): must be a whole number, 2 or more.")
    if INSIDE in os.environ:
        raise MisconfigurationException(
            "verify_resume was called by a process that a verification started. Call it under"
            " `if __name__ == '__main__':`."
        )
    with tempfile.TemporaryDirectory(prefix="leyden-verify-") as folder:

        def run(name: str, **fixed: str) -> dict[str, Any]:
            task = Task(folder, name, middle=steps // 2, stop=steps, resume=name != "whole")
            _run(launch(task), task, {**(environment or {}), **fixed})
            found: dict[str, Any] = torch.load(task.record, weights_only=True)
            return found

        whole = run("whole")
        if whole["batches"] < 2:
            raise CouldNotRun(f"The fit ended after {whole['batches']} batches: there is no middle to go on from.")
        if whole["batches"] < steps // 2 + 1:
            steps = whole["batches"]  # it is shorter than what was asked for: all of it, then
            whole = run("whole")
        resumed = run("resumed")
        report = compare(whole, resumed)
        if report.exact or report.hint:
            return report
        if compare(resumed, run("again")).exact:
            report.hint = (
                "state that is in no checkpoint: two resumed processes agree with each other, but not with the unbroken"
                " one. Look for what changes while training and is neither a parameter, nor a buffer, nor in a state_dict"
                " (on_save_checkpoint and on_load_checkpoint take anything along)."
            )
        elif compare(run("fixed", PYTHONHASHSEED="0"), run("fixed-again", PYTHONHASHSEED="0")).exact:
            report.hint = (
                "the order of a set, or hash(): with PYTHONHASHSEED=0 two resumed processes agree with each other, without"
                " it they do not. Sort what comes out of a set; take hashlib or zlib.crc32 in place of hash()."
            )
        else:
            report.hint = (
                "something that changes from process to process: two resumed processes do not agree with each other either."
                " Look for data or generators that are made without a seed (seed_everything comes first in a script), the"
                " time, the process id, os.urandom, an operation that is not deterministic."
            )
        return report


def _run(command: list[str], task: Task, environment: Mapping[str, str]) -> None:
    inherited = {**os.environ, **environment, INSIDE: task.name}
    done = subprocess.run(
        command, env=inherited, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", check=False,
    )  # fmt: skip
    if done.returncode != 0 or not task.record.exists():
        what = "that goes on from the checkpoint" if task.resume else "that runs without a break"
        said = "it ended without calling Trainer.fit" if done.returncode == 0 else f"exit status {done.returncode}"
        raise CouldNotRun(f"The process {what} did not get there ({said}). It said:\n{done.stdout[-4000:].strip()}")


# --------------------------------------------------------------------------------------------- the method


def verify_objects(trainer: Any, steps: int, **arguments: Any) -> Report:
    """Verify the fit ``trainer.fit(**arguments)`` on copies in other processes; nothing here changes.

    Raises:
        CouldNotRun: if something cannot be pickled, or a process fails.
    """
    if trainer.world_size > 1:
        raise CouldNotRun(
            f"verify_resume runs in one process, and this Trainer uses {trainer.world_size}. Use Trainer(devices=1,"
            " num_nodes=1) for it: what each rank has of its own is restored in the same way."
        )
    with tempfile.TemporaryDirectory(prefix="leyden-verify-") as folder:
        payload = Path(folder) / "payload"
        payload.write_bytes(_pickled(trainer, arguments))
        main = getattr(sys.modules.get("__main__"), "__file__", None) or ""
        code = "import sys; from leyden.loops.studies.verify import child; child(*sys.argv[1:])"
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)  # what can be imported here, can be there
        rest = [str(payload), os.path.abspath(main) if main else ""]
        return verify(lambda task: [sys.executable, "-c", code, str(task.write()), *rest], steps, {"PYTHONPATH": path})


def _pickled(trainer: Any, arguments: dict[str, Any]) -> bytes:
    """Pickle a copy of everything as it is before a fit: it logs nowhere, shows nothing, and has trained nothing."""
    try:
        dumps = import_module("cloudpickle").dumps
    except ImportError:
        dumps = pickle.dumps
    without: list[tuple[Any, str, Any]] = [
        (trainer, "loggers", []),
        (trainer, "callbacks", [each for each in trainer.callbacks if not _shows(each)]),
        *((trainer.strategy, name, []) for name in ("optimizers", "lightning_optimizers", "lr_scheduler_configs")),
        (trainer.strategy, "module", None),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in without]
    try:
        for owner, name, value in without:
            setattr(owner, name, value)
        packed: bytes = dumps((trainer, arguments, rng_state(include_cuda=False)))
    except Exception as error:
        raise CouldNotRun(
            f"verify_resume runs the fit in other processes, and something of it cannot be pickled:"
            f" {type(error).__name__}: {error}. {_SCRIPT_FORM}"
        ) from error
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
    return packed


def _shows(callback: Any) -> bool:
    return any(cls.__name__ == "ProgressBar" for cls in type(callback).__mro__)


def child(task: str, payload: str, main: str) -> None:
    """Do a task with pickled objects; the inside of a process that ``verify_objects`` starts."""
    try:
        trainer, arguments, generators = pickle.loads(Path(payload).read_bytes())
    except AttributeError as error:
        if "__main__" not in str(error) or not main:
            sys.exit(f"The objects cannot be unpickled: {error}. {_SCRIPT_FORM}")
        # classes of the program that called: it is run like a module, as multiprocessing does
        module = types.ModuleType("__mp_main__")
        sys.modules["__main__"] = sys.modules["__mp_main__"] = module
        vars(module).update(runpy.run_path(main, run_name="__mp_main__"))
        trainer, arguments, generators = pickle.loads(Path(payload).read_bytes())
    trainer.progress.reset()
    job = Task.read(task)
    if not job.resume:
        set_rng_state(generators)
    watch(trainer, trainer.fit, job, **arguments)


# --------------------------------------------------------------------------------------------- the comparison


def compare(whole: Mapping[str, Any], resumed: Mapping[str, Any]) -> Report:
    """Return the first thing that differs between two records, in the order in which things happened."""
    ours, theirs = whole["records"], resumed["records"]
    for index, (here, there) in enumerate(zip(ours, theirs, strict=False)):
        for kind, values in here["seen"].items():
            found = _first(values, there["seen"].get(kind, {}))
            if found is not None:
                first = ", the first after the checkpoint" if index == 1 else ""
                when = f"at batch {here['batch'] + 1} (epoch {here['epoch']}, batch_idx {here['batch_idx']}){first}"
                if index == 0:
                    when = "right after the checkpoint was restored"
                if kind == "logged value":
                    when = f"after batch {here['batch']}"
                difference = _describe(kind, found[0], found[1], found[2], when)
                return Report(len(theirs) - 2, difference, _hint(kind, here["aside"], there["aside"], whole))
    if len(ours) != len(theirs):
        return Report(
            len(theirs) - 2,
            f"the unbroken fit made {len(ours) - 2} batches after the checkpoint, the resumed {len(theirs) - 2}.",
        )
    return Report(sum("batch" in record["seen"] for record in ours))


def _first(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    missing = object()
    for path in [*ours, *(path for path in theirs if path not in ours)]:
        here, there = ours.get(path, missing), theirs.get(path, missing)
        if not _same(here, there):
            return path, None if here is missing else here, None if there is missing else there
    return None


def _same(here: Any, there: Any) -> bool:
    if isinstance(here, list) and isinstance(there, list):
        return bool(here[1] == there[1])
    if isinstance(here, float) and isinstance(there, float):
        return here == there or (math.isnan(here) and math.isnan(there))
    return type(here) is type(there) and bool(here == there)


def _describe(kind: str, path: str, here: Any, there: Any, when: str) -> str:
    name = f"the {kind} {path!r}" if path else f"the {kind}"
    if kind == "random generator":
        return f"{when}, the random generator of {path} is in another state."
    if isinstance(here, list) and isinstance(there, list):
        return f"{when}, {name}: {_tensors(here[2], there[2])}"
    return f"{when}, {name}: {_shown(here)} without a break, {_shown(there)} resumed."


def _tensors(here: Tensor | None, there: Tensor | None) -> str:
    if here is None or there is None:
        return "the values differ (of this kind, or of this size, it is not said by how much)."
    if here.shape != there.shape or here.dtype != there.dtype:
        return f"{tuple(here.shape)} {here.dtype} without a break, {tuple(there.shape)} {there.dtype} resumed."
    if here.numel() == 1:
        return f"{here.item()!r} without a break, {there.item()!r} resumed."
    apart = (here.to(torch.complex128) - there.to(torch.complex128)).abs()
    most = apart.max().item()
    values = f"; it begins {_begin(here)} without a break, {_begin(there)} resumed" if here.dim() <= 2 else ""
    return f"shape {tuple(here.shape)}, {int((apart != 0).sum())} values differ, by {most:.3g} at most{values}."


def _begin(tensor: Tensor) -> str:
    values = tensor.reshape(-1)[:4].tolist()
    shown = ", ".join(f"{value:.6g}" if isinstance(value, float) else str(value) for value in values)
    return f"[{shown}{', ...' if tensor.numel() > 4 else ''}]"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "a tensor" if value[2] is None else f"a tensor {_begin(value[2])}"
    return "nothing" if value is None else repr(value)


def _hint(kind: str, here: Mapping[str, Any], there: Mapping[str, Any], whole: Mapping[str, Any]) -> str:
    apart = [path for path in here if path in there and here[path] != there[path]]
    if kind == "batch":  # the module has no part in it
        # nor have tensors: those of the data are the data, and no state that one could save
        apart = [path for path in apart if not path.startswith("self.") and not str(here[path]).startswith("tensor ")]
    generators = [path for path in apart if _is_generator(here[path])]
    if kind == "batch" and whole.get("stateless"):
        return (
            "the data set is an IterableDataset and its loader keeps no state. Give the loader state_dict() and"
            " load_state_dict(), or take a data set with __getitem__."
            + (f" What differs there: {', '.join(apart[:3])}." if apart else "")
        )
    if generators:
        return (
            f"{generators[0]} is a random generator that is in no checkpoint. Save its state in on_save_checkpoint and set it"
            " in on_load_checkpoint, or draw from the global generators, which are saved."
        )
    if apart:
        both = [f"{path} is {_brief(here[path])} without a break, {_brief(there[path])} resumed" for path in apart[:3]]
        return (
            f"{'; '.join(both)}. That is in no checkpoint: make it a buffer (register_buffer), or save it in"
            " on_save_checkpoint and set it in on_load_checkpoint."
        )
    return ""


def _is_generator(value: Any) -> bool:
    return isinstance(value, str) and value.partition(" ")[0].rpartition(".")[2] in (
        "Generator",
        "Random",
        "RandomState",
    )


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
