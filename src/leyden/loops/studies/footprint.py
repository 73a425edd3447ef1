# SPDX-License-Identifier: Apache-2.0
"""What a module weighs, measured on a copy that has shapes and no memory: weights, gradients, optimizer state, activations."""

from __future__ import annotations

import logging
import math
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from leyden.data.combined import CombinedLoader
from leyden.datamodule import LightningDataModule
from leyden.hooks import is_written
from leyden.loops.batches import positional
from leyden.loops.optimize import read_loss
from leyden.loops.studies.skeleton import Stand, exchange, fake_of, size_of, skeleton_of
from leyden.module import LightningModule
from leyden.optim import NoOptimizer, needs_closure, normalize
from leyden.runtime.seed import isolate_rng
from leyden.strategies import units
from leyden.tree import leaves, parameters_of, tree_map

_READS = "aten._local_scalar_dense.default"
"""The operation that reads a number from a tensor."""
_GUESSES = (1, 0)
"""What stands for a number that a step reads from a tensor, by turns until one of them lets the step run to its end."""


@dataclass
class Piece:
    """One parameter.

    Attributes:
        name: Its first name in the module.
        shape: Its shape.
        itemsize: Bytes of an element, in the number format of the run.
        trainable: Whether it gets a gradient.
        like: Bytes of the optimizer's tensors of the same shape: they are sharded with it.
        other: Bytes of the optimizer's other tensors for it (counters of steps): every process has them.
        whole: Whether every process keeps all of it, however the others are cut.
    """

    name: str
    shape: tuple[int, ...]
    itemsize: int
    trainable: bool
    like: int = 0
    other: int = 0
    whole: bool = False

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.numel * self.itemsize

    def part(self, size: int, among: int) -> int:
        """Of ``size`` bytes that lie like it, the most that one of so many processes has: chunks of the first dimension."""
        if among == 1 or self.whole or not self.shape or not self.shape[0]:
            return size
        return size // self.shape[0] * math.ceil(self.shape[0] / among)

    def split(self, dimension: int, among: int) -> Piece:
        """Return what one device has of it, where one of its dimensions is shared out evenly among so many."""
        shape = list(self.shape)
        shape[dimension] //= among
        return replace(self, shape=tuple(shape), like=self.like // among)


@dataclass
class Calls:
    """How often a layer ran in a step, and what tensor parallelism would have to exchange for it.

    Attributes:
        count: How often.
        given: Bytes of its outputs.
        learnt: How often a gradient flowed back through its first input.
        taken: Bytes of these inputs.
    """

    count: int = 0
    given: int = 0
    learnt: int = 0
    taken: int = 0


@dataclass
class Footprint:
    """What was found of a module.

    Attributes:
        pieces: Its parameters, each once.
        buffers: Bytes of its buffers.
        buffer_count: How many there are.
        batch: Bytes of the batch on the device; 0 without one.
        activations: The most bytes that forward and backward hold at a time, beyond weights, gradients and the batch; None
            if unknown.
        saved: Bytes that are held at the end of the forward pass for the backward; None if unknown.
        update: The most bytes that the optimizers' steps hold at a time beyond their state.
        unknown: By name (``"activations"``, ``"optimizer"``), why something is not known.
        layers: The calls of each layer that ran, by its name.
        optimizers: The names of the optimizers' classes.
        by_hand: Whether ddp exchanges gradients right before each optimizer steps, not while they are computed.
        guessed: Whether the step read numbers from tensors, for which another number stood in.
    """

    pieces: list[Piece]
    buffers: int
    buffer_count: int
    batch: int = 0
    activations: int | None = None
    saved: int | None = None
    update: int = 0
    unknown: dict[str, str] = field(default_factory=dict)
    layers: dict[str, Calls] = field(default_factory=dict)
    optimizers: list[str] = field(default_factory=list)
    by_hand: bool = False
    guessed: bool = False


def measure(trainer: Any, module: nn.Module, batch: Any = None) -> tuple[Footprint, nn.Module]:
    """Measure what ``trainer.fit(module, ...)`` needs on one device; nothing of either changes.

    Args:
        trainer: Its device, precision, accumulation and ``fused_optimizers`` count.
        module: On any device, the meta device included; or one that builds itself in ``configure_model``.
        batch: What one device gets for one step; None if activations are of no interest.

    Returns:
        What was found, and the copy on the meta device, whose modules have the names of ``module``.

    Raises:
        MisconfigurationException: for a module that cannot be copied, or has parameters without a shape.
    """
    with isolate_rng(), _quiet():
        skeleton = skeleton_of(trainer, module)
        stand = Stand(trainer, skeleton)
        device = trainer.strategy.root_device
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = partial(fake_of, mode, device)
            names = exchange(skeleton, fake)
            found = Footprint(
                [
                    Piece(name, tuple(p.shape), p.element_size(), p.requires_grad and bool(p.numel()))
                    for name, p in names.items()
                ],
                sum(size_of(buffer) for buffer in skeleton.buffers()),
                sum(1 for _ in skeleton.buffers()),
            )
            if batch is None:
                found.unknown["activations"] = "no batch was given"
            else:
                _measure_step(found, trainer, skeleton, tree_map(fake, batch))
            _measure_optimizers(found, trainer, skeleton, names)
    stand.release()
    return found, skeleton


def first_batch(given: Any, set_up: bool = False) -> Any:
    """Return a batch: ``given`` itself, or the first of a loader, of several, or of a data module.

    Args:
        given: Data that are drawn from stay as they are, but for what their own code does.
        set_up: Whether a data module is yet to be set up.
    """
    if isinstance(given, LightningDataModule):
        if set_up:
            given.prepare_data()
            given.setup("fit")
        given = given.train_dataloader()
    if isinstance(given, (DataLoader, CombinedLoader)) or any(isinstance(leaf, DataLoader) for leaf in leaves(given)):
        combined = given if isinstance(given, CombinedLoader) else CombinedLoader(given)
        with isolate_rng():
            drawn = next(iter(combined), None)
        return None if drawn is None else drawn[0]
    return given


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep to ourselves what is warned of on the way: it will be warned of in the fit."""
    logger = logging.getLogger("leyden")
    disabled, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = disabled


# ------------------------------------------------------------------------------------------ forward and backward


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's __init_subclass__
    """Counts the bytes of the storages that operations make, as long as they live; works with real tensors as well.

    Args:
        known: Tensors whose storages do not count.
        guess: If given, stands for a number that is read from a tensor that has none.

    Attributes:
        now: Bytes that live now.
        most: The most since ``reset``.
        guessed: Whether a guess was needed.
    """

    def __init__(self, known: Any = (), guess: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._outside: list[Any] = [tensor.untyped_storage() for tensor in known]
        for storage in self._outside:
            self._seen[storage] = 0
        self._guess = guess
        self.now = self.most = 0
        self.guessed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._guess is not None and str(func) == _READS:
            self.guessed = True
            kind = args[0].dtype
            return (
                bool(self._guess)
                if kind is torch.bool
                else float(self._guess)
                if kind.is_floating_point
                else self._guess
            )
        found = func(*args, **(kwargs or {}))
        for tensor in leaves(found):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                self._add(tensor.untyped_storage())
        return found

    def _add(self, storage: Any) -> None:
        if storage in self._seen:
            return
        size = storage.nbytes()
        self._seen[storage] = size
        weakref.finalize(storage, self._gone, size).atexit = False
        self.now += size
        self.most = max(self.most, self.now)

    def _gone(self, size: int) -> None:
        self.now -= size

    def leave_out(self, tensor: Tensor) -> None:
        """Count a tensor's storage no more: it is counted elsewhere."""
        storage = tensor.untyped_storage()
        size = self._seen.get(storage, 0)
        if size:
            self._seen[storage] = 0
            self.now -= size
            weakref.finalize(storage, self._gone, -size).atexit = False
        self._outside.append(storage)

    def reset(self) -> None:
        """Forget the most so far."""
        self.most = self.now


def _measure_step(found: Footprint, trainer: Any, module: Any, batch: Any) -> None:
    """Run ``training_step`` and backward on fakes, and note what they hold."""
    name = type(module).__name__
    if not isinstance(module, LightningModule) or not is_written(module, "training_step", LightningModule):
        found.unknown["activations"] = f"{name} has no training_step"
        return
    if not module.automatic_optimization:
        found.unknown["activations"] = f"{name} optimizes by hand: what it holds at a time is up to its training_step"
        return
    module.train()
    policy = getattr(trainer.strategy, "activation_checkpointing_policy", None)
    if policy is not None:
        for layer in units.matching(module, policy, "activation_checkpointing_policy"):
            vars(layer)["forward"] = partial(checkpoint, layer.forward, use_reentrant=False)
    why: str | None = None
    for guess in _GUESSES:
        for parameter in module.parameters():
            parameter.grad = None
        found.layers.clear()
        why = _try_step(found, trainer, module, batch, guess)
        if why is None or not found.guessed:
            break
    if why is None:
        found.unknown.pop("activations", None)
    else:
        found.unknown["activations"] = why
    for parameter in module.parameters():
        parameter.grad = None


def _try_step(found: Footprint, trainer: Any, module: Any, batch: Any, guess: int) -> str | None:
    """Return why it could not be measured; None if it was."""
    precision, device = trainer.strategy.precision, trainer.strategy.root_device
    handles: list[Any] = []
    live: Live | None = None
    try:
        batch = precision.convert_input(batch)
        batch = module.on_before_batch_transfer(batch, 0)
        batch = module.on_after_batch_transfer(module.transfer_batch_to_device(batch, device, 0), 0)
        inputs = [leaf for leaf in leaves(batch) if isinstance(leaf, Tensor) and leaf.layout is torch.strided]
        found.batch = sum({id(t.untyped_storage()): t.untyped_storage().nbytes() for t in inputs}.values())
        live = Live((*module.parameters(), *module.buffers(), *inputs), guess)
        for part_name, part in module.named_modules():
            handles.append(part.register_forward_hook(partial(_note_layer, found.layers, part_name)))
        for parameter in module.parameters():
            if parameter.requires_grad:
                handles.append(parameter.register_post_accumulate_grad_hook(partial(_note_gradient, live)))
        with live:
            with precision.forward_context(), torch.enable_grad():
                output = module.training_step(*(batch, 0, 0)[: positional(module.training_step)])
            loss: Any = read_loss(output)
            if isinstance(loss, (list, tuple)):
                loss = sum(loss)
            if not isinstance(loss, Tensor):
                return "training_step returned no loss for this batch"
            del output
            saved = live.now
            loss.backward()  # type: ignore[no-untyped-call]
        found.saved, found.activations = saved, live.most
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0][:160]
        return f"training_step cannot run without numbers: {type(error).__name__}: {first}"
    finally:
        found.guessed = live is not None and live.guessed
        for handle in handles:
            handle.remove()
    return None


def _note_layer(layers: dict[str, Calls], name: str, _: Any, inputs: Any, output: Any) -> None:
    first = next((leaf for leaf in leaves(inputs) if isinstance(leaf, Tensor)), None)
    last = next((leaf for leaf in leaves(output) if isinstance(leaf, Tensor)), None)
    calls = layers.setdefault(name, Calls())
    calls.count += 1
    calls.given += size_of(last) if last is not None else 0
    if first is not None and first.requires_grad:
        # not counted here: a layer whose activations are given up is called once more, and learns once
        first.register_hook(partial(_note_learnt, calls, size_of(first)))  # type: ignore[no-untyped-call]


def _note_learnt(calls: Calls, size: int, _: Tensor) -> None:
    calls.learnt += 1
    calls.taken += size


def _note_gradient(live: Live, parameter: Tensor) -> None:
    if parameter.grad is not None and parameter.grad.layout is torch.strided:
        live.leave_out(parameter.grad)


# ------------------------------------------------------------------------------------------ optimizers


def _measure_optimizers(found: Footprint, trainer: Any, module: Any, names: dict[str, Any]) -> None:
    """Step the module's optimizers on fakes, and note what state they have then."""
    if not isinstance(module, LightningModule) or not is_written(module, "configure_optimizers", LightningModule):
        found.unknown["optimizer"] = f"{type(module).__name__} has no configure_optimizers"
        return
    try:
        returned = module.configure_optimizers()
        optimizers, _ = normalize(
            NoOptimizer() if returned is None else returned,
            automatic=module.automatic_optimization,
            custom_step=is_written(module, "lr_scheduler_step", LightningModule),
            bare_scheduler=trainer.config.rule("bare_scheduler"),
        )
        if trainer.config.fused_optimizers:
            from leyden.loops.speed.fused import fuse  # noqa: PLC0415  # only runs that ask for it

            fuse(optimizers, module)
        found.optimizers = [type(one).__name__ for one in optimizers if not isinstance(one, NoOptimizer)]
        found.by_hand = not module.automatic_optimization or len(optimizers) > 1
        pieces = {id(parameter): piece for piece, parameter in zip(found.pieces, names.values(), strict=True)}
        for optimizer in optimizers:
            _measure_optimizer(found, optimizer, pieces)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0][:160]
        found.unknown["optimizer"] = f"it could not be made or stepped without numbers: {type(error).__name__}: {first}"


def _measure_optimizer(found: Footprint, optimizer: Any, pieces: dict[int, Piece]) -> None:
    parameters = parameters_of(optimizer)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    live = Live((*parameters, *gradients), guess=1)
    with live, torch.no_grad():
        optimizer.step(lambda: torch.zeros(())) if needs_closure(optimizer) else optimizer.step()
    kept: set[int] = set()
    for parameter, state in optimizer.state.items():
        piece = pieces.get(id(parameter))
        for tensor in _tensors(state):
            if piece is None or id(tensor) in kept:
                continue
            kept.add(id(tensor))
            if tensor.shape == parameter.shape and tensor.dim():
                piece.like += size_of(tensor)
            else:
                piece.other += size_of(tensor)
    found.update = max(found.update, live.most - live.now)
    for parameter in parameters:
        parameter.grad = None
    if isinstance(optimizer, torch.optim.LBFGS):
        # one step shows none of the history that it will have
        whole = sum(pieces[id(p)].size for p in parameters if p.requires_grad and id(p) in pieces)
        first = pieces[id(parameters[0])]
        first.other = whole * (2 * optimizer.param_groups[0]["history_size"] + 3)


def _tensors(state: Any) -> Iterator[Tensor]:
    return (leaf for leaf in leaves(state) if isinstance(leaf, Tensor))
