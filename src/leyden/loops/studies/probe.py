# SPDX-License-Identifier: Apache-2.0
"""Writes down all that decides how a fit goes on, batch by batch: what ``verify_resume`` compares between two processes."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import random
import re
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import IterableDataset

from leyden.callback import Callback
from leyden.errors import MisconfigurationException
from leyden.loggers.base import DummyLogger
from leyden.module import LightningModule
from leyden.runtime.seed import rng_state

LARGEST = 50_000_000
"""So many numbers are kept, to say by how much tensors differ; of more, only that they do."""


@dataclass
class Task:
    """What one process of a verification does; passed to it as a file.

    Attributes:
        folder: A folder for all its files, removed afterwards.
        name: The name of this process's record.
        middle: The checkpoint is saved, or has been saved, after so many batches.
        stop: The fit ends after so many batches.
        resume: Go on from the checkpoint, rather than save it.
    """

    folder: str
    name: str
    middle: int
    stop: int
    resume: bool = False

    @property
    def checkpoint(self) -> str:
        """Where the checkpoint is."""
        return str(Path(self.folder) / "middle.ckpt")

    @property
    def record(self) -> Path:
        """Where the record of this process is."""
        return Path(self.folder) / f"{self.name}.pt"

    def write(self) -> Path:
        """Write the task to its folder; return the path."""
        path = Path(self.folder) / f"{self.name}.json"
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: str | Path) -> Task:
        """Return the task in the file ``path``."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))


class Enough(BaseException):
    """Ends a fit that has been watched long enough; no Exception, so that no script takes it for a failure."""


@dataclass
class Record:
    """What was seen around one batch: flat dicts, from path to plain value or, of a tensor, ``["tensor", digest, values]``.

    Attributes:
        batch: Batches since the fit began.
        epoch, batch_idx: Where that is.
        seen: By kind, in the order in which it happened: rows logged since the batch before, then the state in which
            the step begins, the batch, and the loss.
        aside: What is in no checkpoint by itself, and may be the cause of a difference.
    """

    batch: int
    epoch: int
    batch_idx: int
    seen: dict[str, dict[str, Any]] = field(default_factory=dict)
    aside: dict[str, Any] = field(default_factory=dict)


class Probe(Callback):
    """Keeps a record of each batch from the middle on, saves the checkpoint there, and ends the fit."""

    order: ClassVar[int] = 10_000  # after all others, those that save among them

    def __init__(self, task: Task) -> None:
        self.task = task
        self.records: list[Record] = []
        self.batches = task.middle if task.resume else 0
        self.stateless = False
        self._room = LARGEST
        self._rows = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Write down the state in which the step begins, and its batch."""
        if self.batches < self.task.middle:
            return
        record = self._begin(trainer, pl_module)
        if self.batches >= self.task.stop:
            raise Enough
        record.seen["batch"] = self._flat(batch)
        # drawn from while the batch was made: it comes after it
        record.seen["random generator"] = {name: _digest(repr(state)) for name, state in _generators().items()}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write down the loss; save, if this is the middle."""
        self.batches += 1
        if self.records:
            self.records[-1].seen["loss"] = self._flat(outputs)
        if self.batches == self.task.middle:
            trainer.save_checkpoint(self.task.checkpoint)
            self._rows = len(trainer.history)
            self._begin(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Write down what was restored."""
        if self.task.resume:
            self._begin(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write down the state at the end of a fit that ends by itself."""
        if self.batches >= self.task.middle:
            self._begin(trainer, pl_module)

    def _begin(self, trainer: Any, module: Any) -> Record:
        record = Record(self.batches, trainer.current_epoch, trainer.progress.batch_idx)
        rows = list(trainer.history)[self._rows :]
        self._rows += len(rows)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        optimizers, schedulers = trainer.optimizers, [each.scheduler for each in trainer.lr_scheduler_configs]
        record.seen = {
            "logged value": self._flat({f"row {number}": row for number, row in enumerate(rows, 1)}),
            "counter": self._flat(trainer.progress.state_dict()),
            "tensor": self._flat(module.state_dict()),
            "state of the optimizer": self._flat([_named(optimizer, names) for optimizer in optimizers]),
            "schedule": self._flat([scheduler.state_dict() for scheduler in schedulers]),
            "learning rate": self._flat([[group["lr"] for group in each.param_groups] for each in optimizers]),
        }
        loader = trainer.fit_loop.loader
        loaders = list(loader.flattened) if loader is not None else []
        self.stateless = any(
            isinstance(getattr(each, "dataset", None), IterableDataset) and not hasattr(each, "load_state_dict")
            for each in loaders
        )
        record.aside = dict(_aside(trainer, module, loaders))
        self.records.append(record)
        return record

    def _flat(self, tree: Any) -> dict[str, Any]:
        """Return ``tree`` as one level of paths; tensors are kept whole as long as there is room."""
        found: dict[str, Any] = {}
        for path, value in _leaves(tree):
            if isinstance(value, Tensor):
                kept = None
                whole = value.layout is torch.strided and not (value.is_nested or value.is_quantized)
                if whole and value.numel() <= self._room:
                    self._room -= value.numel()
                    kept = value.detach().to("cpu", copy=True)
                found[path] = ["tensor", _tensor_digest(value), kept]
            else:
                found[path] = value
        return found

    def write(self) -> None:
        """Write all records to the folder of the task."""
        records = [asdict(record) for record in self.records]
        content = {"batches": self.batches, "records": records, "stateless": self.stateless}
        torch.save(content, self.task.record)


def watch(trainer: Any, fit: Any, task: Task, *args: Any, **kwargs: Any) -> None:
    """Call ``fit(*args, **kwargs)``, which is that of ``trainer``, as ``task`` says; write the record.

    No logger logs, and what saves checkpoints saves them in the folder of the task.

    Raises:
        MisconfigurationException: for a fit that saves nothing.
    """
    if trainer.fast_dev_run:
        raise MisconfigurationException("verify-resume: Trainer(fast_dev_run=True) saves nothing. Turn it off.")
    probe = Probe(task)
    trainer.loggers = [DummyLogger() for _ in trainer.loggers]
    trainer.default_root_dir = task.folder
    for number, callback in enumerate(trainer.checkpoint_callbacks):
        if hasattr(callback, "dirpath"):
            callback.dirpath = str(Path(task.folder) / f"checkpoints-{number}")
    shown = ("ProgressBar", "ModelSummary")
    kept = [each for each in trainer.callbacks if not any(cls.__name__ in shown for cls in type(each).__mro__)]
    trainer.callbacks = [*kept, probe]
    if task.resume:
        kwargs["ckpt_path"] = task.checkpoint
    elif str(kwargs.get("ckpt_path")) in ("last", "best"):
        kwargs.pop("ckpt_path")  # a run that begins is as good
    with contextlib.suppress(Enough):
        fit(*args, **kwargs)
    if trainer.is_global_zero:  # all processes of a fit have one task, and so one file
        probe.write()


# --------------------------------------------------------------------------------------------- trees


_PLAIN = (bool, int, float, str, type(None))


def _leaves(tree: Any, path: str = "", above: tuple[int, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield path and value of each leaf: tensors, and plain values; of anything else a text that tells two apart."""
    if isinstance(tree, Tensor) or type(tree) in _PLAIN:
        yield path, tree
        return
    if id(tree) in above:
        return  # it contains itself
    above = (*above, id(tree))
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key), above)
    elif isinstance(tree, (list, tuple)):
        for number, value in enumerate(tree):
            yield from _leaves(value, f"{path}[{number}]", above)
    elif isinstance(tree, (set, frozenset)):
        yield path, str(sorted(map(_text, tree)))
    elif hasattr(tree, "tobytes"):  # arrays, numbers of numpy's, images
        yield from _bytes_of(tree, path, above)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        own = {each.name: getattr(tree, each.name, None) for each in dataclasses.fields(tree)}
        yield from _leaves({**own, **getattr(tree, "__dict__", {})}, path, above)
    elif hasattr(tree, "__dict__") and not callable(tree) and not isinstance(tree, Enum):
        yield from _leaves(vars(tree), path, above)
    elif not callable(tree):
        yield path, _text(tree)


def _bytes_of(array: Any, path: str, above: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    if getattr(array, "ndim", None) == 0:
        value = array.item()
        yield path, value if type(value) in _PLAIN else _text(value)
    elif getattr(getattr(array, "dtype", None), "hasobject", False):  # its bytes are addresses
        yield from _leaves(array.tolist(), path, above)
    else:
        about = f"{getattr(array, 'dtype', '')} {getattr(array, 'shape', getattr(array, 'size', ''))} "
        yield path, _digest(about.encode() + array.tobytes())


def _text(value: Any) -> str:
    """Return ``repr`` without addresses, which another process has others of."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _named(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """Return the state of an optimizer by the names of the parameters."""
    state: dict[str, Any] = {}
    for group in optimizer.param_groups:
        for number, parameter in enumerate(group["params"]):
            state[names.get(id(parameter), f"parameter {number}")] = dict(optimizer.state.get(parameter, {}))
    apart = ("params", "lr")  # the rate is looked at by itself
    groups = [{key: value for key, value in group.items() if key not in apart} for group in optimizer.param_groups]
    return {"of": state, "group": groups}


def _digest(data: bytes | str) -> str:
    return hashlib.blake2b(data.encode() if isinstance(data, str) else data, digest_size=12).hexdigest()


def _tensor_digest(tensor: Tensor) -> str:
    plain = tensor.detach().cpu()
    if plain.is_nested:
        return _digest(" ".join(map(_tensor_digest, plain.unbind())))
    about = f"{plain.dtype} {tuple(plain.shape)} "
    if plain.layout is not torch.strided or plain.is_quantized:
        plain = plain.to_dense() if not plain.is_quantized else plain.dequantize()
    plain = plain.resolve_conj().resolve_neg()
    return _digest(about.encode() + plain.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _generators() -> dict[str, Any]:
    return {name: _plain(state) for name, state in rng_state().items()}


def _plain(state: Any) -> Any:
    if isinstance(state, Tensor):
        return _tensor_digest(state)
    if isinstance(state, Mapping):
        return {key: _plain(value) for key, value in state.items()}
    return [_plain(value) for value in state] if isinstance(state, (list, tuple)) else state


# --------------------------------------------------------------------------------------------- what may be the cause


def _aside(trainer: Any, module: Any, loaders: list[Any]) -> Iterator[tuple[str, Any]]:
    """Yield plain values and generators that the module, its class, its file, the data and the callbacks hold."""
    seen: set[int] = set()
    for name, part in module.named_modules():
        yield from _held(part, f"self.{name}" if name else "self", seen, depth=1)
    for cls in type(module).__mro__:
        if not cls.__module__.startswith(("leyden.", "torch.")):
            yield from _values(vars(cls), cls.__name__, seen, depth=0)
    home = sys.modules.get(type(module).__module__)
    if home is not None:
        yield from _values(vars(home), "", seen, depth=0)
    for callback in trainer.callbacks:
        yield from _held(callback, type(callback).__name__, seen, depth=2)
    if trainer.datamodule is not None:
        yield from _held(trainer.datamodule, type(trainer.datamodule).__name__, seen, depth=2)
    for loader in loaders:
        for name in ("dataset", "sampler", "batch_sampler"):
            part = getattr(loader, name, None)
            if part is not None:
                yield from _held(part, f"the {name.replace('_', ' ')} ({type(part).__name__})", seen, depth=3)


def _held(owner: Any, label: str, seen: set[int], depth: int) -> Iterator[tuple[str, Any]]:
    ours = type(owner).__module__.startswith("leyden.")
    if not ours and hasattr(owner, "__dict__"):
        known = vars(LightningModule()) if isinstance(owner, LightningModule) else vars(nn.Module())
        own = {name: value for name, value in vars(owner).items() if name not in known}
        yield from _values(own, label, seen, depth)


def _values(found: Mapping[str, Any], label: str, seen: set[int], depth: int) -> Iterator[tuple[str, Any]]:
    for name, value in list(found.items()):
        path = f"{label}.{name}" if label else name
        if name.startswith("__"):
            continue
        if type(value) in (bool, int, float, str):
            yield path, value
        elif (state := _generator_state(value)) is not None:
            yield path, f"{type(value).__module__}.{type(value).__name__} {_digest(state)}"
        elif isinstance(value, Tensor):
            yield path, f"tensor {_tensor_digest(value)}"
        elif depth > 0 and id(value) not in seen and not isinstance(value, (type, types.ModuleType, nn.Module)):
            seen.add(id(value))
            if isinstance(value, (list, tuple)) and len(value) <= 16:
                yield from _values({str(number): each for number, each in enumerate(value)}, path, seen, depth - 1)
            elif isinstance(value, dict) and len(value) <= 64:
                yield from _values({str(key): each for key, each in value.items()}, path, seen, depth - 1)
            elif hasattr(value, "__dict__") and not callable(value):
                yield from _held(value, path, seen, depth - 1)


def _generator_state(value: Any) -> str | None:
    """Return the state of a random generator as text; None for anything else."""
    if isinstance(value, torch.Generator):
        return _tensor_digest(value.get_state())
    if isinstance(value, random.Random):
        return repr(value.getstate())
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.random.Generator):
        return repr(value.bit_generator.state)
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return repr(_plain_numpy(value.get_state(legacy=False)))
    return None


def _plain_numpy(state: Any) -> Any:
    if isinstance(state, Mapping):
        return {key: _plain_numpy(value) for key, value in state.items()}
    return state.tolist() if hasattr(state, "tolist") else state
