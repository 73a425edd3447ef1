# SPDX-License-Identifier: Apache-2.0
"""The end of a run that is not finished: who is told, what is saved when a signal ended it, and where it goes on.

What a signal ends is saved where ``ckpt_path="last"`` looks for it, in the folder of the first callback that saves
checkpoints, as ``interrupted.ckpt``; not at all, if a file of the run has that very step already. A job that SLURM will
start anew needs a place that does not depend on callbacks: ``hpc_ckpt_<n>.ckpt`` in ``default_root_dir``, Lightning's
name. It is the same file under a second name, or the only one, if no callback saves checkpoints.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from leyden import atomic, files
from leyden.callbacks.checkpoint_files import is_url, paths_in
from leyden.data.loaders import says_workers_are_gone
from leyden.errors import CheckpointError, CheckpointNotFoundError
from leyden.loops.session import Session
from leyden.runtime.ranks import rank_zero_info, rank_zero_warn
from leyden.signals import Interrupt
from leyden.types import TrainerFn

_HPC = re.compile(r"hpc_ckpt_(\d+)\.ckpt$")
_SUFFIX = ".ckpt"


def tell(trainer: Any, exception: BaseException, interrupt: Interrupt) -> None:
    """Call ``on_exception`` of all callbacks and the data module; what fails there must not take the exception's place.

    Checkpoints that are still being written are waited for, before and after.
    """
    _settle(trainer, exception)
    told = [*trainer.callbacks, trainer.datamodule, trainer.strategy]
    if interrupt.forced:  # in the middle of a step: what is written there is nothing to go on from
        told = [listener for listener in told if listener not in trainer.checkpoint_callbacks]
    for listener in told:
        try:
            if listener is trainer.datamodule or listener is trainer.strategy:
                if listener is not None:
                    listener.on_exception(exception)
            else:
                listener.on_exception(trainer, trainer.lightning_module, exception)
        except Exception as error:
            rank_zero_warn(
                f"{type(listener).__name__}.on_exception failed while {type(exception).__name__} ended the run:"
                f" {type(error).__name__}: {error}"
            )
    _settle(trainer, exception)


def _settle(trainer: Any, exception: BaseException) -> None:
    try:
        trainer.strategy.checkpoint_io.settle()
    except Exception as error:
        if error is not exception:
            rank_zero_warn(f"A checkpoint could not be written while {type(exception).__name__} ended the run: {error}")


def ending(trainer: Any, session: Session | None, error: BaseException, interrupt: Interrupt) -> BaseException:
    """Return what a run ends with that ``error`` has ended: the signal, where that has ended its workers before.

    The other processes of the run learn of it, if they do not end with it after the same batch.
    """
    found = error
    if interrupt.received and says_workers_are_gone(error):
        interrupt.answered = is_whole(trainer, session, error)
        found = interrupt.exception()
    trainer.strategy.fail(found, together=interrupt.answered and not interrupt.forced)
    return found


def is_whole(trainer: Any, session: Session | None, error: BaseException) -> bool:
    """Whether ``error``, of a loader, came while a loop asked for a batch: between two steps then, not inside one."""
    trace, ours, asked = error.__traceback__, False, False
    while trace is not None:
        home = trace.tb_frame.f_globals.get("__name__", "")
        if home.startswith("leyden.loops.") and not home.startswith("leyden.loops.batches"):
            ours, asked = True, False
        elif ours:  # the first frame below our loops tells
            ours, asked = False, home.startswith(("torch.utils.data.", "leyden.data.", "leyden.loops.batches"))
        trace = trace.tb_next
    evaluation = trainer.fit_loop.validation
    inside = session is not None and (trainer.validating or trainer.sanity_checking)
    # with several processes the others may be in another batch
    return asked and trainer.world_size == 1 and (not inside or evaluation.cuts(session))


def leave(trainer: Any, session: Session | None, cluster: Any, interrupt: Interrupt) -> None:
    """Save what a signal has ended between two steps; have the job started anew, where that is what the signal means.

    Raises:
        CheckpointError: when it cannot be saved.
    """
    number = interrupt.number
    if number is None or not interrupt.answered:
        return
    name = signal.Signals(number).name
    if trainer.state.fn is not TrainerFn.FITTING or session is None:
        rank_zero_info(f"{name}: Trainer.{trainer.state.fn} stops here.")
        return
    path = ""
    # a fit that resumed and has not trained yet has nothing that the checkpoint it came from has not
    if session.position is None and not trainer.fast_dev_run:
        path = _in_folder(trainer)
        if cluster is not None:
            path = _beside_it(trainer, cluster, path)
    where = (
        f"is saved in {path}" if path else "has nothing to save" if session.position is not None else "saves nothing"
    )
    rank_zero_info(f"{name}: the fit stops at step {trainer.global_step} and {where}.")
    if cluster is not None and number == cluster.requeue_signal and trainer.is_global_zero:
        cluster.requeue()


def _in_folder(trainer: Any) -> str:
    """Save in the folder of the callback that saves checkpoints, unless that step is there; return the path."""
    callbacks, step = trainer.checkpoint_callbacks, trainer.global_step
    written = [path for callback in callbacks for path in getattr(callback, "files", ())]
    current = trainer.strategy.broadcast(next((path for path in written if _resumes_at(path, step)), ""))
    if current:
        return str(current)
    for callback in callbacks:
        ledger, folder = getattr(callback, "ledger", None), getattr(callback, "dirpath", None)
        if ledger is not None and folder:
            with ledger.interrupt(trainer, folder, _SUFFIX) as path:
                trainer.save_checkpoint(path)
            return str(path)
    return ""


def _beside_it(trainer: Any, cluster: Any, path: str) -> str:
    """Give the checkpoint ``path`` its name for the job that goes on; write it, if there is none. Return the new path."""
    root, former = trainer.default_root_dir, _hpc_files(trainer.default_root_dir)
    if is_url(root):
        new = trainer.strategy.broadcast(f"{root.rstrip('/')}/hpc_ckpt_{max(former, default=0) + 1}{_SUFFIX}")
        trainer.save_checkpoint(new)
    else:
        temporary = trainer.strategy.broadcast(os.path.join(root, f".hpc_ckpt.{os.getpid()}.tmp"))
        if not path or is_url(path):
            trainer.save_checkpoint(temporary)
        elif trainer.is_global_zero:
            _second_name(path, temporary)
        new = _take_name(temporary, root, max(former, default=0) + 1) if trainer.is_global_zero else ""
    if trainer.is_global_zero:
        for old in former.values():
            if peek(old).get("job") == cluster.name_of_fit:
                files.remove(old)
    return str(trainer.strategy.broadcast(new))


def _second_name(path: str, name: str) -> None:
    """Make ``name`` the same file as ``path``, or a copy where a file cannot have two names; of a folder, its files."""
    if os.path.isdir(path):
        from leyden import folders  # noqa: PLC0415  # only for checkpoints of several processes

        folders.second(Path(path), Path(name))
        return
    try:
        os.link(path, name)
    except OSError:
        import shutil  # noqa: PLC0415  # another disk

        shutil.copyfile(path, name)
        atomic.sync_file(Path(name))


def _take_name(temporary: str, root: str, number: int) -> str:
    """Give the file its name with the first free number, whatever other jobs do there at this moment."""
    while True:
        path = os.path.join(root, f"hpc_ckpt_{number}{_SUFFIX}")
        try:
            os.link(temporary, path)
        except FileExistsError:
            number += 1
        except OSError:  # no second names here
            if os.path.exists(path):
                number += 1
                continue
            os.rename(temporary, path)
            break
        else:
            os.unlink(temporary)
            break
    atomic.sync_folder(Path(root))  # the name is on the disk, too
    return path


def _hpc_files(root: str) -> dict[int, str]:
    """The checkpoints of jobs in ``root``, by their numbers."""
    found = ((_HPC.fullmatch(os.path.basename(path)), path) for path in paths_in(root))
    return {int(match[1]): path for match, path in found if match is not None}


# ---------------------------------------------------------------------------------------------- where it goes on


def resume_point(trainer: Any, given: Any, cluster: Any) -> Any:
    """Return where a fit goes on: ``given``, unless its job has been started anew and left a checkpoint behind.

    Args:
        trainer: Whose ``default_root_dir`` is looked at.
        given: The ``ckpt_path`` that the user gave; ``"hpc"`` is the checkpoint of a job with the highest number.
        cluster: None outside of a job.

    Raises:
        CheckpointNotFoundError: for ``"hpc"``, if there is none.
    """
    root = trainer.default_root_dir
    found = _hpc_files(root)
    if cluster is not None:
        cluster.begin_fit()
        if (own := _own(trainer, cluster.name_of_fit, found)) is not None:
            rank_zero_info(f"The job {cluster.job_id()} was started anew: it goes on from {own}.")
            return own
    if given == "hpc":
        newest = first_good([found[number] for number in sorted(found, reverse=True)])
        if newest is None:
            raise CheckpointNotFoundError(
                f"Trainer.{trainer.state.fn}(ckpt_path='hpc'): there is no good hpc_ckpt_<n>.ckpt in {root!r}, where a job"
                " of a cluster leaves it (Trainer(default_root_dir=...)). Pass the path of a checkpoint, or None."
            )
        return newest
    if given is None and found:
        newest = found[max(found)]
        facts = peek(newest)
        if facts and "job" not in facts:  # Lightning's do not say of which job they are
            return newest
        rank_zero_info(f"{newest} is of another job, and is not used. To go on from it, pass ckpt_path='hpc'.")
    return given


def _own(trainer: Any, name: str, found: dict[int, str]) -> str | None:
    """The newest good checkpoint that the fit ``name`` has written, in the folders where it may have written some."""
    folders = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    folders.append(os.path.join(trainer.default_root_dir, "checkpoints"))
    candidates = dict.fromkeys(found.values())
    if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":  # a node may fail before any signal comes
        if not is_url(trainer.default_root_dir):
            folders += map(str, Path(trainer.default_root_dir).glob("*/version_*/checkpoints"))
        candidates |= dict.fromkeys(checkpoints_in(folder for folder in folders if folder))
    own: list[tuple[int, bool, str]] = []
    for path in candidates:
        facts = peek(path, warns=path in found.values())
        if facts.get("job") == name and facts["resumes"]:
            own.append((facts["step"], path in found.values(), path))
    return first_good([path for *_, path in sorted(own, reverse=True)])


def first_good(paths: Iterable[str]) -> str | None:
    """The first of ``paths`` that is what was written; says which ones are not."""
    for path in paths:
        try:
            files.verify(path)
        except CheckpointError as error:
            rank_zero_warn(f"Passed over while looking for where the job goes on: {error}")
        else:
            return path
    return None


def checkpoints_in(folders: Iterable[str]) -> list[str]:
    """Return the checkpoints in some folders, those that are no URLs."""
    names = [path for folder in folders if not is_url(folder) for path in paths_in(folder)]
    return [path for path in names if path.endswith(_SUFFIX) and not os.path.basename(path).startswith(".")]


def _resumes_at(path: str, step: int) -> bool:
    """Whether a local file is a complete checkpoint of ``step`` that training can go on from."""
    facts = peek(path)
    return bool(facts.get("resumes")) and facts["step"] == step


def peek(path: str, warns: bool = False) -> dict[str, Any]:
    """What a checkpoint says of itself, without its tensors; nothing, if it cannot be read."""
    try:
        checkpoint = files.look(path)
    except CheckpointError as error:
        if warns:
            rank_zero_warn(f"Passed over while looking for where the job goes on: {error}")
        return {}
    if not isinstance(checkpoint, Mapping) or not isinstance(checkpoint.get("global_step"), int):
        return {}
    facts = {"step": checkpoint["global_step"], "resumes": "optimizer_states" in checkpoint}
    ours = checkpoint.get("leyden", {})
    facts["batches"] = ours.get("progress", {}).get("batches", 0)
    return {**facts, **{key: ours[key] for key in ("job", "launch") if key in ours}}
