# SPDX-License-Identifier: Apache-2.0
"""A search as SLURM jobs: one for each trial, which before its walltime saves a checkpoint and submits its continuation.

Each job runs the very script that submitted it. There, ``optimize_parallel_cluster_gpu`` (or ``_cpu``) finds the trial's
file, named by the environment variable LEYDEN_SLURM_TRIAL, and calls the function once instead of submitting. The file
also says whether there is a checkpoint: a job that SLURM requeues after a preemption, or that is submitted again by hand,
goes on from it as well.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from leyden.errors import MisconfigurationException, SIGTERMException
from leyden.runtime.ranks import rank_zero_info
from leyden.search import sbatch
from leyden.search.parser import HyperOptNamespace
from leyden.search.sbatch import Directive
from leyden.search.trial_process import call
from leyden.search.trials import at_least_one, formerly
from leyden.signals import AnswersSignals

TRIAL_VARIABLE = "LEYDEN_SLURM_TRIAL"
"""In a job: the path of its trial's file."""

_MOST_SECONDS = 65535  # of SLURM's --signal


class SlurmCluster(AnswersSignals):
    """Runs the trials of a search as SLURM jobs.

    Args:
        hyperparam_optimizer: What ``HyperOptArgumentParser.parse_args()`` returned.
        log_path: The folder for scripts and logs; each search gets a subfolder of it.
        python_cmd: How the job starts python, as a piece of shell.
        enable_log_err: Write what the trial prints to stderr to a file under ``slurm_err_logs``.
        enable_log_out: The same for stdout, ``slurm_out_logs``.
        test_tube_exp_name: The name of the subfolder; None takes the ``job_name``.

    Attributes:
        per_experiment_nb_gpus: GPUs a node (``optimize_parallel_cluster_gpu`` only).
        per_experiment_nb_cpus: CPU cores a task.
        per_experiment_nb_nodes: Nodes.
        memory_mb_per_node: Main memory a node, in MB; 0 is all that the node has; or as SLURM writes it, ``"24G"``.
        job_time: The walltime, ``[[days-]hours:]minutes:seconds``.
        minutes_to_checkpoint_before_walltime: So long before its walltime the job is told to save and go; may be a fraction.
        gpu_type: The kind of GPU, such as ``"a100"``; None takes any.
        hpc_exp_number: In a job: the number of its trial; else None.
    """

    def __init__(
        self,
        hyperparam_optimizer: argparse.Namespace,
        log_path: str | os.PathLike[str],
        python_cmd: str = "python3",
        enable_log_err: bool = True,
        enable_log_out: bool = True,
        test_tube_exp_name: str | None = None,
    ) -> None:
        if not isinstance(hyperparam_optimizer, HyperOptNamespace):
            raise MisconfigurationException(
                f"SlurmCluster(hyperparam_optimizer=...): got a {type(hyperparam_optimizer).__name__}. Pass what"
                " HyperOptArgumentParser.parse_args() returns."
            )
        self.hyperparam_optimizer = hyperparam_optimizer
        self.log_path = Path(log_path).absolute()
        self.python_cmd = python_cmd
        self.enable_log_err = enable_log_err
        self.enable_log_out = enable_log_out
        self.test_tube_exp_name = test_tube_exp_name

        self.per_experiment_nb_gpus = 1
        self.per_experiment_nb_cpus = 1
        self.per_experiment_nb_nodes = 1
        self.memory_mb_per_node: int | str = 2000
        self.job_time = "15:00"
        self.minutes_to_checkpoint_before_walltime: float = 5
        self.gpu_type: str | None = None

        self.modules: list[str] = []
        self.commands: list[str] = []
        self.slurm_commands: list[tuple[str, object, str]] = []
        self.email: str | None = None
        self.notify_on_end = False
        self.notify_on_fail = False

        self.postponed = False
        """True: the signal is only noted, and whoever set this asks for ``signalled`` and calls ``leave`` when it suits."""
        self._save: tuple[Callable[..., Any], Mapping[str, Any]] | None = None
        self._load: tuple[Callable[..., Any], Mapping[str, Any]] | None = None
        self._signal: int | None = None
        self._leaving = False
        self._pid = 0
        self._environment: dict[str, str] = {}

        path = os.environ.get(TRIAL_VARIABLE)
        self._file = None if path is None else Path(path)
        self._record = {} if self._file is None else _read(self._file)
        self.hpc_exp_number: int | None = self._record.get("trial")

    # ------------------------------------------------------------------ what goes into the submit script

    def add_slurm_cmd(self, cmd: str, value: object = None, comment: str = "") -> None:
        """Add the line ``#SBATCH --cmd=value``, with a comment above it. It overrides lines of the same name."""
        self.slurm_commands.append((cmd, value, comment))

    def add_command(self, cmd: str) -> None:
        """Add a line of shell that runs before the trial."""
        self.commands.append(cmd)

    def load_modules(self, modules: Sequence[str]) -> None:
        """Load these environment modules before the trial runs."""
        if isinstance(modules, str):
            raise MisconfigurationException(f"load_modules({modules!r}): must be a list of names, [{modules!r}].")
        self.modules = list(modules)

    def notify_job_status(self, email: str, on_done: bool, on_fail: bool) -> None:
        """Have SLURM send an e-mail when a job is done, when it fails, or both."""
        self.email, self.notify_on_end, self.notify_on_fail = email, on_done, on_fail

    # ------------------------------------------------------------------ submit, or run

    @formerly(train_function="train_fn")
    def optimize_parallel_cluster_gpu(
        self,
        train_fn: Callable[..., Any],
        nb_trials: int | None,
        job_name: str,
        job_display_name: str | None = None,
        *,
        enable_auto_resubmit: bool = True,
    ) -> Any:
        """Submit a job for each trial; in such a job, run its trial.

        Args:
            train_fn: Called as ``train_fn(hparams, cluster, results_dict)``; it may take only the first of these. What it
                puts into ``results_dict`` (plain data) is kept in the trial's file; see :meth:`results`.
            nb_trials: How many trials at most; None takes the whole grid.
            job_name: Names the folder, unless ``test_tube_exp_name`` does.
            job_display_name: What SLURM's queue shows; None takes ``job_name``.
            enable_auto_resubmit: False: no signal before the walltime, no checkpoint, no continuation.

        Returns:
            The numbers of the jobs, as strings. In a job: what ``train_fn`` returned.

        Raises:
            MisconfigurationException: if there is no sbatch on the path, or an attribute cannot be.
            LeydenError: if sbatch refuses a script.
        """
        return self._optimize(train_fn, nb_trials, job_name, job_display_name, enable_auto_resubmit, on_gpu=True)

    @formerly(train_function="train_fn")
    def optimize_parallel_cluster_cpu(
        self,
        train_fn: Callable[..., Any],
        nb_trials: int | None,
        job_name: str,
        job_display_name: str | None = None,
        *,
        enable_auto_resubmit: bool = True,
    ) -> Any:
        """As :meth:`optimize_parallel_cluster_gpu`, but ask for no GPUs."""
        return self._optimize(train_fn, nb_trials, job_name, job_display_name, enable_auto_resubmit, on_gpu=False)

    def _optimize(
        self,
        train_fn: Callable[..., Any],
        nb_trials: int | None,
        job_name: str,
        display: str | None,
        resubmit: bool,
        on_gpu: bool,
    ) -> Any:
        if self._file is not None:
            return self._run_trial(train_fn, resubmit)
        sbatch.find_sbatch()
        self._check(job_name, resubmit)
        program = sbatch.python_program()
        trials = self.hyperparam_optimizer.generate_trials(nb_trials)
        records = [_values(trial, self.hyperparam_optimizer.tunable_names()) for trial in trials]
        folder = self._folder(job_name)
        logs = {"out": self.enable_log_out, "err": self.enable_log_err}
        for name in ("scripts", "trials", "checkpoints", *(f"{kind}_logs" for kind, wanted in logs.items() if wanted)):
            (folder / f"slurm_{name}").mkdir(parents=True, exist_ok=True)
        environment = sbatch.outside_of_the_job(os.environ)
        jobs = []
        for values in records:
            number, file = _claim_number(folder / "slurm_trials")
            name = f"trial_{number}_{time.strftime('%Y-%m-%d__%H-%M-%S')}"
            path = folder / "slurm_scripts" / f"{name}.sh"
            record = {"trial": number, "state": "submitted", "values": values, "script": str(path)}
            _write(file, {**record, "checkpoints": 0, "jobs": [], "results": {}})
            text = sbatch.script(
                f"Trial {number} of {job_name}, submitted by Leyden: {json.dumps(values)}",
                self._directives(folder, name, f"{display or job_name}v{number}", resubmit, on_gpu),
                # since 22.05 srun does not take the number of cores over from sbatch by itself; it may be add_slurm_cmd's
                {TRIAL_VARIABLE: shlex.quote(str(file)), "SRUN_CPUS_PER_TASK": '"$SLURM_CPUS_PER_TASK"'},
                self.modules,
                self.commands,
                f"{self.python_cmd} {shlex.join(program)}",
            )
            path.write_text(text, encoding="utf-8")
            path.chmod(0o755)
            jobs.append(sbatch.submit(path, environment))
            rank_zero_info("Trial %d is job %s: %s", number, jobs[-1], path)
        return jobs

    def _directives(self, folder: Path, name: str, display: str, resubmit: bool, on_gpu: bool) -> Iterator[Directive]:
        """Yield the #SBATCH lines of a job."""
        yield Directive("job-name", display, "its name in the queue")
        if self.enable_log_out:
            path = folder / "slurm_out_logs" / f"{name}.out"
            yield Directive("output", sbatch.log_name(path), "what the trial prints, and its continuations after it")
        if self.enable_log_err:
            yield Directive("error", sbatch.log_name(folder / "slurm_err_logs" / f"{name}.err"), "and to stderr")
        for kind, wanted in (("output", self.enable_log_out), ("error", self.enable_log_err)):
            if not wanted:
                yield Directive(kind, os.devnull, "not wanted")
        yield Directive("open-mode", "append", "")
        yield Directive("chdir", os.getcwd(), "where the search was started")
        yield Directive("time", self.job_time, "the walltime")
        seconds = round(self.minutes_to_checkpoint_before_walltime * 60)
        if resubmit and seconds:
            yield Directive("signal", f"USR1@{seconds}", "time to save and to submit the continuation")
        if on_gpu and self.per_experiment_nb_gpus:
            kind = "gpu" if self.gpu_type is None else f"gpu:{self.gpu_type}"
            yield Directive("gres", f"{kind}:{self.per_experiment_nb_gpus}", "GPUs a node")
        yield Directive("cpus-per-task", self.per_experiment_nb_cpus, "CPU cores")
        yield Directive("nodes", self.per_experiment_nb_nodes, "")
        yield Directive("mem", self.memory_mb_per_node, "memory a node, in MB unless it says otherwise; 0 is all")
        events = [name for name, wanted in (("END", self.notify_on_end), ("FAIL", self.notify_on_fail)) if wanted]
        if events:
            yield Directive("mail-type", ",".join(events), "e-mail")
            yield Directive("mail-user", self.email, "")
        for command in self.slurm_commands:
            yield Directive(*command)

    def _check(self, job_name: str, resubmit: bool) -> None:
        for name, value in (("job_name", job_name), ("test_tube_exp_name", self.test_tube_exp_name or job_name)):
            if value in (".", "..") or not re.fullmatch(r"[^/\s]+", str(value)):
                raise MisconfigurationException(f"{name}={value!r}: must be a name without spaces and slashes.")
        for name in ("per_experiment_nb_cpus", "per_experiment_nb_nodes"):
            at_least_one(getattr(self, name), name)
        memory = self.memory_mb_per_node
        if isinstance(memory, bool) or not re.fullmatch(r"\d+[KMGT]?B?", str(memory), re.IGNORECASE):
            raise MisconfigurationException(
                f"memory_mb_per_node={memory!r}: must be a number of MB, 0 for all of a node, or a text such as '24G'."
            )
        if self.per_experiment_nb_gpus:
            at_least_one(self.per_experiment_nb_gpus, "per_experiment_nb_gpus")
        if (self.notify_on_end or self.notify_on_fail) and not self.email:
            raise MisconfigurationException(f"notify_job_status(email={self.email!r}): needs an address.")
        walltime = sbatch.walltime_seconds(self.job_time)
        minutes = self.minutes_to_checkpoint_before_walltime
        if resubmit and not 0 <= minutes * 60 < min(walltime, _MOST_SECONDS):
            raise MisconfigurationException(
                f"minutes_to_checkpoint_before_walltime={minutes!r} with job_time={self.job_time!r}: must be at least 0 and"
                f" less than the walltime of {walltime / 60:g} minutes (SLURM allows at most {_MOST_SECONDS // 60}). Raise"
                " job_time, or pass enable_auto_resubmit=False."
            )

    def _folder(self, job_name: str) -> Path:
        return self.log_path / (self.test_tube_exp_name or job_name)

    def results(self, job_name: str) -> list[dict[str, Any]]:
        """Return what is known of each trial of a search so far, in order.

        Keys: ``trial``, ``state`` (``submitted``, ``running``, ``checkpointed``, ``done`` or ``failed``; a job that SLURM
        kills stays ``running``), ``values``, ``results`` (the ``results_dict``), ``checkpoints``, ``jobs``.
        """
        files = (self._folder(job_name) / "slurm_trials").glob("trial_*.json")
        # an empty file is that of a trial which is being submitted at this moment
        return sorted((_read(file) for file in files if file.stat().st_size), key=lambda record: int(record["trial"]))

    # ------------------------------------------------------------------ checkpoints

    @formerly(fx="fn")
    def set_checkpoint_save_function(
        self, fn: Callable[..., Any] | None, kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Call ``fn(**kwargs)`` when the walltime is near; None: there is nothing to save any more.

        It runs between two lines of the trial's main thread, wherever that stands. A Trainer is better served by
        :class:`~leyden.search.walltime.WalltimeCheckpoint`, which saves between two batches.
        """
        self._save = None if fn is None else (fn, dict(kwargs or {}))

    @formerly(fx="fn")
    def set_checkpoint_load_function(self, fn: Callable[..., Any], kwargs: Mapping[str, Any] | None = None) -> None:
        """Call ``fn(**kwargs)`` at once if this job goes on from a checkpoint.

        A continuation is submitted only where this was called (or where a WalltimeCheckpoint is at work): one that could
        not load would begin anew each time.
        """
        self._load = (fn, dict(kwargs or {}))
        if self.continues:
            fn(**self._load[1])

    @property
    def continues(self) -> bool:
        """Whether this is a job that goes on from a checkpoint of a former one."""
        return bool(self._record.get("checkpoints"))

    @property
    def checkpoint_file(self) -> Path | None:
        """In a job: where this trial may keep its checkpoint; the folder is there."""
        if self._file is None:
            return None
        return self._file.parent.parent / "slurm_checkpoints" / f"trial_{self.hpc_exp_number}.ckpt"

    @property
    def ckpt_path(self) -> Path | None:
        """What to pass to ``trainer.fit(ckpt_path=...)``: the checkpoint, if this job goes on from one, else None."""
        return self.checkpoint_file if self.continues else None

    # ------------------------------------------------------------------ inside a job

    @property
    def signalled(self) -> bool:
        """Whether the job was told to save and go."""
        return self._signal is not None

    def _run_trial(self, train_fn: Callable[..., Any], resubmit: bool) -> Any:
        """Run the trial of this job; note in its file how it went."""
        self._environment = dict(os.environ)  # before the trial changes it: the continuation shall start from the same
        hparams = self.hyperparam_optimizer.replaced(self._record["values"])
        hparams.hpc_exp_number = self.hpc_exp_number
        results = self._record["results"]
        self._note(state="running", jobs=[*self._record["jobs"], os.environ.get("SLURM_JOB_ID", "")])
        state = "failed"
        try:
            with self._signals(resubmit):
                value = call(train_fn, hparams, self, results)
            state = "done"
            return value
        except SystemExit as error:
            if self._leaving:
                state = "checkpointed"
            elif not error.code:
                state = "done"
            raise
        finally:
            self._note(state=state)

    @contextlib.contextmanager
    def _signals(self, wanted: bool) -> Iterator[None]:
        """Listen for SIGUSR1 (the walltime is near) and SIGTERM (preempted or cancelled), and stop listening at the end."""
        if not wanted or threading.current_thread() is not threading.main_thread():
            yield
            return
        self._pid = os.getpid()
        former = {number: signal.signal(number, self._on_signal) for number in (signal.SIGUSR1, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # SLURM sends it to every process of the job, and forked workers of a DataLoader have inherited this handler
        if os.getpid() != self._pid:
            if number == signal.SIGTERM:  # their own end, and nobody's checkpoint
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self._leaving:
            return  # it is being saved already, and SLURM waits a while before it kills
        if self._signal is None:
            self._signal = number
        if not self.postponed:
            self.leave()

    def leave(self) -> None:
        """Save a checkpoint, submit the continuation and end the process; or return, if nothing can be saved or loaded.

        After SIGTERM nothing is submitted: what SLURM preempts it requeues, and what a person cancels stays cancelled.
        The process ends with SystemExit: code 0 after SIGUSR1, 143 after SIGTERM.
        """
        terminated = self._signal == signal.SIGTERM
        self._signal = None
        if self._save is None:
            if terminated:
                raise SIGTERMException
            self._say(
                "the walltime is near, but there is nothing to save (set_checkpoint_save_function was not called, or the"
                " Trainer is gone): going on until it is over."
            )
            return
        self._leaving = True
        self._say("saving a checkpoint.")
        save, kwargs = self._save
        save(**kwargs)
        self._note(state="checkpointed", checkpoints=int(self._record["checkpoints"]) + 1)
        if terminated:
            raise SIGTERMException
        if self._load is None and not self.postponed:
            self._leaving = False
            self._say("saved, but set_checkpoint_load_function was not called: going on until the walltime is over.")
            self._note(state="running")
            return
        self._continue()

    def _continue(self) -> NoReturn:
        if self._is_first_process():
            environment = sbatch.outside_of_the_job(self._environment)
            job = sbatch.submit(Path(self._record["script"]), environment)
            self._say(f"saved; the continuation is job {job}.")
        raise SystemExit(0)

    def _is_first_process(self) -> bool:
        return os.environ.get("SLURM_PROCID", "0") == "0"

    def _note(self, **changes: Any) -> None:
        """Change the trial's file."""
        self._record.update(changes)
        if self._file is not None and self._is_first_process():
            _write(self._file, self._record)

    def _say(self, text: str) -> None:
        print(f"Trial {self.hpc_exp_number}: {text}", file=sys.stderr, flush=True)


def _values(trial: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Return the values of ``trial`` under ``names``; the others the job's own parser will find again."""
    values = {name: getattr(trial, name) for name in names}
    for name, value in values.items():
        try:
            same = json.loads(json.dumps(value)) == value
        except (TypeError, ValueError):
            same = False
        if not same:
            raise MisconfigurationException(
                f"The option {name!r} has the value {value!r}, which a job cannot be told: it travels as JSON. Use numbers,"
                " strings, booleans, None, and lists and dicts of them."
            )
    return values


def _claim_number(folder: Path) -> tuple[int, Path]:
    """Return the number after the highest trial's, and its file, which is made at once.

    So a second search of the same name overwrites nothing, even if it is submitted at the same moment.
    """
    numbers = [int(path.stem.removeprefix("trial_")) for path in folder.glob("trial_*.json")]
    number = max(numbers, default=-1) + 1
    while True:
        file = folder / f"trial_{number}.json"
        try:
            file.touch(exist_ok=False)
        except FileExistsError:
            number += 1
        else:
            return number, file


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise MisconfigurationException(
            f"The trial's file {path} cannot be read ({error}). It is written when a search is submitted: submit it again"
            f" or, outside of a job, unset {TRIAL_VARIABLE}."
        ) from error


def _write(path: Path, record: Mapping[str, Any]) -> None:
    """Replace a file as a whole: a job that is killed meanwhile leaves the old one."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(record, file, indent=1, default=_plain)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _plain(value: Any) -> Any:
    """Return a number for a tensor or numpy value, a list for an array, text for anything else."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
