# SPDX-License-Identifier: Apache-2.0
"""``Trainer(cuda_graphs=True)``: a whole update, captured once as a CUDA graph and replayed for each further batch.

The first steps are ordinary ones, of real batches; the last of them is watched (``loops/speed/graphable.py``). The next batch
that looks the same is captured: forward, backward, clipping and the optimizers' step are recorded without running. From
then on a step copies its batch to where the graph reads it, writes the learning rate to where the graph reads it, replays,
and does in Python what Python does at each step: counters, what was logged, and all that runs around the step.
"""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from leyden.config import TrainerConfig
from leyden.data.generators import differs
from leyden.loops.optimize import Optimization, check_loss, read_loss
from leyden.loops.session import Session
from leyden.loops.speed.capturable import Captured
from leyden.loops.speed.graphable import (
    Index,
    Logs,
    Spy,
    Traces,
    Unfit,
    Watch,
    host_values,
    noted,
    obstacle,
    signature,
)
from leyden.runtime.ranks import rank_zero_info
from leyden.runtime.seed import rng_state
from leyden.tree import tree_map
from leyden.types import MetricLike

WARMUP = 3
"""Steps that run as always before the capture, as torch asks for: libraries set themselves up in the first ones."""
MOST = 4
"""Captures of one fit; a module that changes more often than that is not worth it."""
PATIENCE = 10
"""Batches of ever new shapes after which nothing is captured any more."""
_SYNC = "called a synchronizing CUDA operation"


class CudaGraphs:
    """What capturing needs of ``torch.cuda``: a stream to warm up and to capture on, and the graph.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._side = _stream(device)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Run the block on the stream that captures: what autograd keeps for a parameter belongs to that stream then."""
        main = torch.cuda.current_stream(self.device)
        self._side.wait_stream(main)
        try:
            with torch.cuda.stream(self._side):
                yield
        finally:
            main.wait_stream(self._side)

    @contextmanager
    def waits(self) -> Iterator[list[str]]:
        """Yield a list that holds, after the block, what made the host wait for the device in it."""
        found: list[str] = []
        mode: int = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if mode == 0:
                torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        for one in caught:
            if _SYNC in str(one.message):
                found.append(f"{one.filename}:{one.lineno}")
            elif "Synchronization debug mode" not in str(one.message):
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno, source=one.source)

    def host_generators(self) -> dict[str, Any]:
        """Return the states of the generators from which only the host draws."""
        return rng_state(include_cuda=False)

    def record(self, region: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Capture what ``region`` gives the device to do; return what replays it, and what ``region`` returned.

        Raises:
            Exception: for a region that cannot be captured; the generator of the device is then as it was.
        """
        graph = torch.cuda.CUDAGraph()
        pool, index = torch.cuda.graph_pool_handle(), torch.cuda.current_device()
        generator = torch.cuda.default_generators[index]
        state = generator.get_state()
        collects = gc.isenabled()
        gc.disable()  # the garbage may hold memory of the device, which must not be given back meanwhile
        try:
            # the outer context: where a capture fails, torch's own does not go back to the stream it came from
            with (
                torch.cuda.stream(torch.cuda.current_stream(self.device)),
                torch.cuda.graph(graph, pool, stream=self._side, capture_error_mode="thread_local"),
            ):
                result = region()
        except BaseException:
            # a capture that has failed leaves the generator and the allocator as if it went on: every other draw is
            # refused then, and memory that is cached is not given back any more where it runs out
            _end_allocation(index, pool)
            generator.graphsafe_set_state(torch.Generator(self.device))
            generator.set_state(state)
            raise
        finally:
            if collects:
                gc.enable()
        return graph.replay, result


def _end_allocation(index: int, pool: Any) -> None:
    """Let a pool of memory go to which a failed capture would go on to allocate."""
    # raised where the capture could be ended after all, and did this itself; names that are not public may move
    with suppress(RuntimeError, AttributeError):
        memory: Any = torch.cuda.memory
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            getattr(memory, name)(index, pool)


@functools.cache
def _stream(device: torch.device) -> Any:
    """Return the stream to capture on: one for all runs, since libraries keep memory for each stream that they have seen."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def device_graphs(device: torch.device) -> CudaGraphs | None:
    """Return what captures on ``device``; None for one that has no graphs."""
    return CudaGraphs(device) if device.type == "cuda" else None


def graphed(session: Session, train: Callable[..., Any], why: str | None) -> Callable[..., Any]:
    """Return what trains a batch by replaying a graph; where that is not possible, say why and return ``train``.

    Args:
        session: The run.
        train: Trains a batch eagerly.
        why: What is known already to stand against it.
    """
    device = session.strategy.root_device
    graphs = device_graphs(device)
    if graphs is None:
        why = f"there is no CUDA device in this run, it is on {device}"
    why = why or obstacle(session)
    if why is not None or graphs is None:
        _say(why)
        return train
    return Graphed(session, train, graphs)


def _say(why: str | None) -> None:
    rank_zero_info(f"Trainer(cuda_graphs=True): the steps run eagerly, without a graph: {why}.")


@dataclass
class Held:
    """A graph, and the tensors that it reads from and writes to."""

    replay: Callable[[], None]
    signature: Any
    inputs: list[Tensor]
    output: Any
    logs: Logs
    grads: list[tuple[nn.Parameter, Tensor]]
    watch: Watch
    config: TrainerConfig

    def attach(self) -> None:
        """Let the parameters have the gradients of the graph, where somebody has taken them away."""
        if any(parameter.grad is not gradient for parameter, gradient in self.grads):
            for parameter, gradient in self.grads:
                parameter.grad = gradient


class Graphed:
    """Trains a batch: eagerly at first, then by replaying a graph wherever the batch fits it.

    Args:
        session: The run.
        train: Trains a batch eagerly.
        graphs: What captures.
    """

    def __init__(self, session: Session, train: Callable[..., Any], graphs: CudaGraphs) -> None:
        self.session, self.train, self.graphs = session, train, graphs
        self.held: Held | None = None
        self.why: str | None = None
        """Why nothing is captured any more."""
        self.warm = self.captures = self.misses = 0
        self.seen: Any = None
        """What the batch before looked like."""
        self.constants: dict[str, Any] = {}
        """What the step that was watched has logged from the host."""
        self.optimizers = Captured(session, session.strategy.root_device)
        # a list, not self: the session would keep itself alive, and the memory of the graph with it
        self._undone = undone = [self.optimizers]
        outer = session.undo

        def undo() -> None:
            undone[0].undo()
            if outer is not None:
                outer()

        session.undo = undo

    def __call__(
        self, session: Session, opt: Optimization, args: tuple[Any, ...], batch_idx: int, first: bool, steps: bool,
        divisor: int,
    ) -> Any:  # fmt: skip
        """Train one batch; return what ``training_step`` returned, detached and copied where a graph has written it."""
        self.optimizers.write()
        run = (session, opt, args, batch_idx, first, steps, divisor)
        whole = first and steps and divisor == 1
        if self.over() or not whole:
            return self.eager(*run)
        tensors: list[Tensor] = []
        try:
            looks = signature(args[0], session.strategy.root_device, tensors)
        except Unfit as error:
            self.give_up(str(error))
            return self.eager(*run)
        if self.held is not None:
            changed = self.held.watch.changed() if self.held.config is session.config else "an argument of the Trainer"
            if changed is not None:
                self.forget(changed)
        if self.held is None and self.warm >= WARMUP:
            if looks == self.seen:
                self.capture(opt, args, looks, tensors)
            else:
                self.misses += 1
                if self.misses >= PATIENCE:
                    self.give_up("no two batches in a row have the same shapes and plain values")
        held = self.held
        if held is not None:
            return self.replay(held, opt, tensors) if held.signature == looks else self.eager(*run)
        return self.eager(*run) if self.over() else self.warm_up(looks, *run)

    def over(self) -> bool:
        """Whether nothing is captured any more."""
        return self.why is not None

    def eager(self, *run: Any) -> Any:
        """Train a batch without the graph, with the kernels that a graph has."""
        with nullcontext() if self.over() else self.graphs.aside(), self.optimizers.on_device():
            return self.train(*run)

    def warm_up(self, looks: Any, session: Session, opt: Optimization, args: tuple[Any, ...], *run: Any) -> Any:
        """Train one of the first batches; the last of them is watched."""
        self.warm += 1
        self.seen = looks
        if self.warm != WARMUP:
            return self.eager(session, opt, args, *run)
        module, logs = session.module, Logs()
        if len(args) > 1:
            args = (args[0], Index(args[1]))
        # the options of an optimizer that steps after a replay are those of the moment
        spy = Spy(
            session.trainer, ("strategy", "optimizers", "lr_scheduler_configs") if self.optimizers.outside else ()
        )
        generators = self.graphs.host_generators()
        numbers = [group["lr"] for optimizer in opt.optimizers for group in optimizer.param_groups]
        module.trainer = spy
        try:
            traces = Traces(module)
            with self.graphs.waits() as waits, noted(session.results.train, logs, passes_on=True):
                output = self.eager(session, opt, args, *run)
            changed = traces.changed()
        finally:
            module.trainer = session.trainer
        self.constants = host_values(logs, session.strategy.root_device)
        metric = next((name for name, value, _ in logs if _is_metric(value)), None)
        after = self.graphs.host_generators()
        if changed is not None:
            self.give_up(f"the step changes the attribute {changed!r} of the module, which a replay would not")
        elif metric is not None:
            self.give_up(f"self.log({metric!r}) is given a metric object, which counts in Python")
        elif any(rest[-1][0] for _, _, rest in logs):
            self.give_up("self.log(enable_graph=True) keeps the graph of a value")
        elif spy.seen:
            self.give_up(f"the step uses trainer.{spy.seen[0]}, which a replay would not")
        elif numbers != [group["lr"] for optimizer in opt.optimizers for group in optimizer.param_groups]:
            self.give_up("the step sets a learning rate, which a replay would not")
        elif len(args) > 1 and getattr(args[1], "used", False):
            self.give_up("the step computes with batch_idx, which is the same number in every replay")
        elif waits:
            self.give_up(f"the step waits for the device ({waits[0]}), as .item() and .cpu() do")
        elif any(name not in generators or differs(generators[name], after[name]) for name in after):
            self.give_up("the step draws random numbers on the host, which would be the same in every replay")
        return output

    def capture(self, opt: Optimization, args: tuple[Any, ...], looks: Any, tensors: list[Tensor]) -> None:
        """Capture the step for batches that look like this one; nothing runs on the device, and no state changes."""
        session, strategy = self.session, self.session.strategy
        self.captures += 1
        inputs = [tensor.clone() for tensor in tensors]
        turn = iter(inputs)
        args = (tree_map(lambda _: next(turn), args[0], Tensor), *args[1:])
        parameters = list(session.module.parameters())

        def region() -> Any:
            logs: Logs = []
            with noted(session.results.train, logs, passes_on=False), self.optimizers.on_device():
                output = strategy.training_step(*args)
                loss = read_loss(output)
                if not isinstance(loss, Tensor):
                    raise Unfit("training_step returns several losses" if loss else "training_step returns no loss")
                check_loss(loss, custom_backward=False)
                opt.zero_grad(0)
                opt.backward(loss)
                for optimizer in opt.optimizers:
                    opt.before_step(optimizer)
                    if not any(optimizer is other for other in self.optimizers.outside):
                        strategy.optimizer_step(optimizer)
            grads = [parameter.grad for parameter in parameters]
            return tree_map(Tensor.detach, output), logs, grads

        watch = Watch(session.module, opt.optimizers, self.optimizers.free, self.optimizers.outside)
        before = [parameter.grad for parameter in parameters]
        try:
            replay, (output, logs, grads) = self.graphs.record(region)
            if host_values(logs, strategy.root_device) != self.constants:
                raise Unfit("the step logs numbers from the host that differ from step to step")
            if (changed := watch.changed()) is not None:
                raise Unfit(f"the step sets {changed!r} anew")
        except Exception as error:
            watch.restore()
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient
            self.give_up(_reason(error))
            return
        pairs = [(p, gradient) for p, gradient in zip(parameters, grads, strict=True) if gradient is not None]
        self.held = Held(replay, looks, inputs, output, logs, pairs, watch, session.config)

    def replay(self, held: Held, opt: Optimization, tensors: list[Tensor]) -> Any:
        """Train a batch by the graph, and do what Python does at each step."""
        for static, tensor in zip(held.inputs, tensors, strict=True):
            static.copy_(tensor, non_blocking=True)
        held.replay()
        held.attach()
        for optimizer in self.optimizers.outside:
            opt.strategy.optimizer_step(optimizer)
        for index in range(len(opt.optimizers)):
            opt.count(index)
        opt.end_window()
        log = self.session.results.train.log
        for name, value, rest in held.logs:
            log(name, value, *rest)
        if not self.session.hooks.on_train_batch_end:
            return None  # nobody looks at it
        # a copy: the next replay writes to the same place
        return tree_map(Tensor.clone, held.output)

    def forget(self, changed: str) -> None:
        """Drop a graph that does not fit any more; after a few ordinary steps there will be another one."""
        self.held, self.warm, self.misses = None, 0, 0
        if self.captures >= MOST:
            self.give_up(f"{changed} changes again and again, which takes a new graph each time")
            return
        self.optimizers.undo()
        self.optimizers = self._undone[0] = Captured(self.session, self.session.strategy.root_device)
        self.optimizers.write()

    def give_up(self, why: str) -> None:
        """Say why, once, and train eagerly from here on."""
        self.held = None
        if self.why is None:
            self.why = why
            _say(why)


def _is_metric(value: Any) -> bool:
    return isinstance(value, MetricLike) and not isinstance(value, Tensor)


def _reason(error: BaseException) -> str:
    """What went wrong first: what torch says at the end of a failed capture is only what came of it."""
    while error.__context__ is not None:
        error = error.__context__
    text = str(error).strip().partition("\n")[0].rstrip(".")
    return text if isinstance(error, Unfit) else f"it cannot be captured: {type(error).__name__}: {text}"
