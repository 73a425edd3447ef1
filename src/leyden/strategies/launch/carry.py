# SPDX-License-Identifier: Apache-2.0
"""What travels when one call of a Trainer runs in other processes: there its arguments, and back what it changed."""

from __future__ import annotations

import contextlib
import inspect
import os
import pickle
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.multiprocessing.spawn import ProcessRaisedException

from leyden.errors import NoModuleError
from leyden.runtime.seed import rng_state, set_rng_state
from leyden.runtime.world import OURS, World
from leyden.tree import leaves, move_to

PICKLER: Any = pickle
"""What pickles in this process: cloudpickle, where it was sent what it runs by that."""
_KEPT = ("callback", "logged", "bar")
_OWN = ("history", "should_stop", "_bounds_known", "_ckpt_path", "_dated")
"""What a Trainer knows after a run, for the next one."""


def arguments_of(trainer: Any, entry: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``trainer.<entry>`` that are among ``given``, with the module that it runs.

    Raises:
        NoModuleError: where there is no module.
    """
    if not _is_trainer(trainer):
        return dict(given)
    names = inspect.signature(getattr(type(trainer), entry)).parameters
    arguments = {name: value for name, value in given.items() if name in names and name != "self"}
    arguments["model"] = trainer.lightning_module if arguments["model"] is None else arguments["model"]
    if arguments["model"] is None:
        raise NoModuleError(f"`Trainer.{entry}()` requires a `LightningModule`: this Trainer has not run one yet.")
    return arguments


def _is_trainer(owner: Any) -> bool:
    """Whether a call changes what it belongs to; Fabric's only returns something."""
    return hasattr(owner, "results")


def uncompiled(model: Any) -> Any:
    """Return the module that ``torch.compile`` has wrapped, or ``model`` itself."""
    return getattr(model, "_orig_mod", model)


def become(world: World, threads: int, generators: Mapping[str, Any]) -> None:
    """Let this process be one of ``world``, with so many threads, and the random state of the one that called."""
    set_rng_state(generators)
    os.environ.update({**world.environment(world.local_rank), OURS: "spawn"})
    torch.set_num_threads(threads)


def modules_in(arguments: Any) -> list[nn.Module]:
    """Return the modules among the arguments of a call."""
    return [item for item in leaves(arguments) if isinstance(item, nn.Module)]


def own_memory(module: Any) -> None:
    """Give this process weights of its own, of one module or of a tree of them: pickled tensors are shared by processes."""
    for part in leaves(module):
        for tensor in (*part.parameters(), *part.buffers()) if isinstance(part, nn.Module) else ():
            tensor.data = tensor.data.clone()


def entry(trainer: Any, name: str, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """Run ``trainer.<name>``, in one of the processes; return what the one that called wants to know, on rank 0."""
    returned = getattr(trainer, name)(**arguments)
    return _report(trainer, uncompiled(arguments["model"]), returned) if trainer.is_global_zero else None


def again(function: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of a call whose processes start anew: a fit goes on from its newest checkpoint."""
    if function is not entry or arguments[1] != "fit":
        return arguments
    trainer, name, given = arguments
    return trainer, name, {**given, "ckpt_path": "last"}


def _report(trainer: Any, module: nn.Module, returned: Any) -> dict[str, Any]:
    host = torch.device("cpu")
    if not _is_trainer(trainer):
        return {"returned": move_to(returned, host)}
    return {
        "weights": move_to(dict(module.state_dict()), host),
        "metrics": {name: move_to(dict(getattr(trainer.results, name)), host) for name in _KEPT},
        "generators": rng_state(include_cuda=False),
        "progress": trainer.progress.state_dict(),
        "state": (trainer.state.status, trainer.state.fn),
        "trainer": {name: vars(trainer)[name] for name in _OWN if name in vars(trainer)},
        "bounds": (trainer.fit_loop.min_epochs, trainer.fit_loop.max_epochs),
        "callbacks": [_picklable(vars(callback)) for callback in trainer.callbacks],
        "versions": [logger.version for logger in trainer.loggers if hasattr(logger, "follow")],
        "returned": move_to(returned, host),
    }


def _picklable(attributes: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in attributes.items():
        with contextlib.suppress(Exception):
            PICKLER.dumps(value)
            found[name] = value
    return found


def take(trainer: Any, model: Any, found: Mapping[str, Any]) -> Any:
    """Bring what rank 0 reported into this process; return what the call returned there."""
    if not _is_trainer(trainer):
        return found["returned"]
    module = uncompiled(model)
    module.load_state_dict(found["weights"])
    module.trainer = trainer
    trainer.strategy.connect(module)
    for name in _KEPT:
        setattr(trainer.results, name, found["metrics"][name])
    trainer.progress.load_state_dict(found["progress"])
    trainer.state.status, trainer.state.fn = found["state"]
    set_rng_state(found["generators"])
    vars(trainer).update(found["trainer"])
    trainer.fit_loop.min_epochs, trainer.fit_loop.max_epochs = found["bounds"]
    for callback, attributes in zip(trainer.callbacks, found["callbacks"], strict=False):
        vars(callback).update(attributes)
    followers = [logger for logger in trainer.loggers if hasattr(logger, "follow")]
    for logger, version in zip(followers, found["versions"], strict=False):
        logger.follow(version)  # the next call goes on in the same folder
    return found["returned"]


class Failure(NamedTuple):
    """What one process ended with."""

    when: float
    """By the clock of its machine."""
    rank: int
    text: str
    """The traceback."""
    error: bytes | None
    """The exception itself, where it can be pickled."""


def failure(rank: int, error: BaseException) -> Failure:
    """Return what is said of an exception that ended a process."""
    when, text, pickled = time.time(), "".join(traceback.format_exception(error)), None
    with contextlib.suppress(Exception):
        pickled = PICKLER.dumps(error.with_traceback(None))
    return Failure(when, rank, text, pickled)


def raised(first: Failure, loads: Callable[[bytes], Any], pid: int = 0) -> Exception:
    """Return the exception to raise for the process that failed first; what it raised there is its cause, if it is known."""
    found = ProcessRaisedException(
        f"\n\n-- Rank {first.rank} ended with the following error:\n{first.text}", first.rank, pid
    )
    if first.error is not None:
        with contextlib.suppress(Exception):
            found.__cause__ = loads(first.error)
    return found
