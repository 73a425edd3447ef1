# SPDX-License-Identifier: Apache-2.0
"""A run that is compiled: its steps go through ``torch.compile`` whole, and what they log comes out beside the result.

    whole steps      the loss is compiled with the model; under manual optimization the layers are, one by one, since a
                     step that runs backward and optimizers is no graph
    self.log         writes on a tape while it is traced; after the step the tape is played to where values are kept
    numbers          the index of the batch and the counters come in as sizes of empty tensors, which may change without
                     a new graph; so may the number of samples, where the last batch of a loader is a short one
    failures         torch runs the code that it cannot compile as it is, and from then on so do we
    reports          torch tells when it compiles; only then is anything looked at

It is made when a run begins and taken away when it ends: no setting of torch, no attribute of the module outlives it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import re
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import callback, config, maybe_mark_dynamic
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import get_compilation_metrics
from torch._functorch import config as backward_config
from torch.utils.data import BatchSampler

from leyden.errors import MisconfigurationException
from leyden.hooks import keywords_in, names_in
from leyden.loops import batches
from leyden.loops.session import STEPS, Session
from leyden.module import LightningModule
from leyden.results import Store
from leyden.runtime.ranks import rank_zero_info, rank_zero_warn
from leyden.tree import leaves
from leyden.types import MetricLike, TrainerFn

REPORTS = 3
"""So many recompilations of a run are told of one by one."""
_COUNTERS = {"current_epoch": "epoch", "global_step": "global_step"}
_NUMBER = re.compile(
    r"tensor '(?:counters\[')?(batch_idx|epoch|global_step)[\]']+ size mismatch at index 0. expected (\d+), actual (\d+)"
)
"""What torch says of a number that is the size of a tensor, and did become a constant."""
_NOTHING = object()


class _Entry:
    """One call of ``self.log`` on a tape, and the entry before it.

    Not a list of all: code that goes on after a break in its graph would be compiled for what is in it by then.
    """

    def __init__(self, before: _Entry | None, arguments: tuple[Any, ...]) -> None:
        self.before, self.arguments = before, arguments


class Tape:
    """Stands in for ``Store.log``: code that is traced writes on it; calls of other code go on to the store.

    Args:
        store: Where values are kept.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.last: _Entry | None = None
        self.before = vars(store).get("log", _NOTHING)
        vars(store)["log"] = self.log

    def log(self, name: str, value: Any, *options: Any) -> None:
        """Take the arguments of ``Store.log``; the last of ``options`` begins with ``enable_graph``."""
        if torch.compiler.is_dynamo_compiling():
            if isinstance(value, Tensor):
                # a copy: what the step does to its tensor afterwards must not change what was logged
                value = (value if options[-1][0] else value.detach()).clone()
            self.last = _Entry(self.last, (name, value, *options))
            return
        if self.last is not None:
            self.play()  # what the step has logged until here
        Store.log(self.store, name, value, *options)

    def play(self) -> None:
        """Store what is on the tape, and leave it empty."""
        entry, self.last = self.last, None
        calls = []
        while entry is not None:
            calls.append(entry.arguments)
            entry = entry.before
        for arguments in reversed(calls):
            Store.log(self.store, *arguments)

    def wipe(self) -> None:
        """Forget what is on the tape."""
        self.last = None

    def remove(self) -> None:
        """Give the store back as it was."""
        _put(vars(self.store), "log", self.before)


def _put(attributes: dict[str, Any], name: str, value: Any) -> None:
    if value is _NOTHING:
        attributes.pop(name, None)
    else:
        attributes[name] = value


def _traced(
    step: Callable[..., Any],
    batch: Any,
    rest: tuple[Any, ...],
    batch_idx: Any,
    counters: Mapping[str, Any],
    progress: Any,
) -> Any:
    """What is compiled: a step, with numbers that become no constants of its graph."""
    if batch_idx is not None:
        rest = (batch_idx.shape[0] - 2, *rest[1:])
    for name in counters:
        # written before anybody reads it: the graph goes by the size, not by the value that it saw first
        setattr(progress, name, counters[name].shape[0] - 2)
    return step(batch, *rest)


def _called(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What is compiled of a layer: its call, with its hooks."""
    call: Any = layer._call_impl  # noqa: SLF001  # the call itself would lead back here
    return call(*args, **kwargs)


def _sized(number: int) -> Tensor:
    """Return an empty tensor that stands for ``number``. Sizes of 0 and 1 would be constants, hence the 2."""
    tensor = torch.empty((number + 2, 0), device="cpu")
    maybe_mark_dynamic(tensor, 0)
    return tensor


def _own_code(function: Any, name: str) -> Any:
    """Return ``function`` with code of its own: torch keeps graphs by code, so those of another run are not in the way."""
    if isinstance(function, types.MethodType):
        return types.MethodType(_own_code(function.__func__, name), function.__self__)
    if not isinstance(function, types.FunctionType):
        return function
    code = function.__code__.replace(co_name=name)
    own = types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return own


class CompiledStep:
    """Stands on the module in the place of one of its steps, for the length of a run.

    Args:
        run: The compilation of the run.
        name: The name of the step.
        step: The step.
        compile: What compiles the step; None leaves it as it is.
        loader: Returns the loaders that the batches come from, once they are there.
    """

    def __init__(
        self, run: Compilation, name: str, step: Callable[..., Any], compile: Callable[..., Any] | None,
        loader: Callable[[], Any],
    ) -> None:  # fmt: skip
        functools.update_wrapper(self, step)
        self.run, self.name, self.plain, self.loader = run, name, step, loader
        self.step = step if compile is None else _own_code(step, name)
        self.compiled = None if compile is None else compile(_own_code(_traced, name))
        self.tape = run.tapes[name == "training_step"]
        self.off = compile is None
        """Whether the step runs as it is: compiled by the user, in its layers, or not at all any more."""
        self.ragged: bool | None = None
        """Whether its batches differ in the number of samples; None until the loaders are there."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = self.run
        if torch.compiler.is_dynamo_compiling() or run.inside or kwargs:
            return self.plain(*args, **kwargs)  # a part of the step that runs
        run.inside = True
        self.tape.wipe()  # of somebody who traced a step without running it here
        try:
            output = self.plain(*args) if self.off else self._run(args)
        finally:
            run.inside = False
        if self.tape.last is not None:
            self.tape.play()
        if run.news:
            run.report(self)
        return output

    def _run(self, args: tuple[Any, ...]) -> Any:
        run, batch, rest = self.run, args[0], args[1:]
        if self.ragged is None:
            self.ragged = _ragged(self.loader())
        if self.ragged and not _mark(batch):
            return self.plain(*args)
        batch_idx = _sized(rest[0]) if rest and type(rest[0]) is int else None
        counters = {name: _sized(getattr(run.progress, name)) for name in run.reads}
        try:
            return self.compiled(self.step, batch, rest, batch_idx, counters, run.progress)  # type: ignore[misc]
        except TorchDynamoException as error:
            # only with fullgraph=True: the step is then one piece of code, of which nothing has run
            run.failure, run.news = error, True
        self.tape.wipe()
        return self.plain(*args)


def _mark(batch: Any) -> bool:
    """Let the number of samples in ``batch`` change without a new graph; False for a batch of a single sample.

    torch would make a graph of its own for that.
    """
    tensors = [leaf for leaf in leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
    if tensors and all(tensor.shape[0] == 1 for tensor in tensors):
        return False
    for tensor in tensors:
        maybe_mark_dynamic(tensor, 0)
    return True


def _ragged(loaders: Any) -> bool:
    """Whether the batches of ``loaders`` are known to differ in the number of samples."""
    sizes: set[int] = set()
    for loader in getattr(loaders, "flattened", ()):
        sampler = getattr(loader, "batch_sampler", None)
        if type(sampler) is BatchSampler and hasattr(sampler.sampler, "__len__"):
            samples = len(sampler.sampler)  # type: ignore[arg-type]
            sizes.add(min(samples, sampler.batch_size))
            if samples > sampler.batch_size and samples % sampler.batch_size and not sampler.drop_last:
                return True
    return len(sizes) > 1 and loaders.mode == "sequential"


class Compilation:
    """All that a compiled run puts in place.

    Args:
        session: The run; its hooks are bound.
        fn: Which entry point runs.

    Raises:
        MisconfigurationException: for arguments that ``torch.compile`` does not take.
    """

    def __init__(self, session: Session, fn: TrainerFn) -> None:
        self.module, self.progress = session.module, session.progress
        self.inside = False
        """Whether a step runs now: one that it calls is a part of it."""
        self.news = False
        """Whether torch has compiled something since the last report."""
        self.failure: BaseException | None = None
        """What torch could not compile since the last report."""
        self.reads = [] if _records(session) else _reads(self.module)
        self.tapes = [Tape(session.results.eval), Tape(session.results.train)]
        self.before: dict[str, Any] = {}
        self.layers: list[nn.Module] = []
        self.told: set[str] = set()
        self.again: dict[str, int] = {}
        self.last: Any = next(reversed(get_compilation_metrics()), None)
        self.stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            stack.callback(self.remove)
            self._settings()
            self._install(session, fn)
            stack.pop_all()

    def _settings(self) -> None:
        """Say to torch what holds for the length of the run."""
        # what fails to compile runs as it is, from where it stands: nothing happens twice
        self._set(config, "suppress_errors")
        # backward together with forward, so that it is known before the first batch whether it can be
        self._set(backward_config, "force_non_lazy_backward_lowering")
        # loss.item() is part of the graph, and no end of it
        self._set(config, "capture_scalar_outputs")
        # a number in the model that changes, such as a counter, may change again
        self._set(config, "allow_unspec_int_on_nn_module")
        # backward may run twice: one for each of several losses, or as the user asks with retain_graph=True
        self._set(backward_config, "donated_buffer", False)
        callback.on_compile_end(self._note)
        self.stack.callback(self._stop_noting)
        said = logging.getLogger("torch._dynamo.convert_frame")
        said.addFilter(self._hear)
        self.stack.callback(said.removeFilter, self._hear)

    def _set(self, settings: Any, name: str, value: bool = True) -> None:
        if hasattr(settings, name):  # not every version of torch has all of them
            self.stack.enter_context(settings.patch(**{name: value}))

    def _note(self, *args: Any) -> None:
        self.news = True

    def _stop_noting(self) -> None:
        with contextlib.suppress(ValueError):  # whoever resets torch's compiler removes it
            callback.callback_handler.remove_end_callback(self._note)

    def _hear(self, record: logging.LogRecord) -> bool:
        """Take what torch has to say of a failure, which fills a screen; we say it in a line."""
        if record.levelno < logging.WARNING:
            return True
        self.news = True
        if record.exc_info and self.failure is None:
            self.failure = record.exc_info[1]
            if getattr(self.failure, "frame_exec_strategy", _NOTHING) is None:
                # what the code calls need not be tried for itself
                kinds: Any = importlib.import_module("torch._dynamo.types")  # newer than the oldest torch
                skip = kinds.FrameExecStrategy(kinds.FrameAction.SKIP, kinds.FrameAction.SKIP)
                self.failure.frame_exec_strategy = skip  # type: ignore[union-attr]
        return False

    def _install(self, session: Session, fn: TrainerFn) -> None:
        trainer: Any = session.trainer
        compile = _compiler(session)
        loops = {
            "training_step": trainer.fit_loop,
            "validation_step": trainer.fit_loop.validation if fn is TrainerFn.FITTING else trainer.validate_loop,
            "test_step": trainer.test_loop,
            "predict_step": trainer.predict_loop,
        }
        for name in STEPS[fn]:
            if name == "validation_step" and fn is TrainerFn.FITTING and not session.validates:
                continue
            step = getattr(self.module, name)
            if isinstance(step, CompiledStep):
                step = step.plain  # of the run around this one
            if batches.takes(step, "dataloader_iter"):
                rank_zero_info(f"{name} draws its batches itself, so it is not compiled.")
                continue
            whole = None if by_user(step) else compile
            if whole is not None and name == "training_step" and _differentiates_twice(self.module):
                rank_zero_warn(
                    f"{name} runs uncompiled: the module asks for gradients of gradients (create_graph), which torch"
                    " cannot compute through what it has compiled."
                )
                whole = None
            if whole is None and not by_user(step):
                continue
            if whole is not None and name == "training_step" and not self.module.automatic_optimization:
                self._compile_layers(self.module, whole)
                whole = None
            self._put(name, CompiledStep(self, name, step, whole, functools.partial(getattr, loops[name], "loader")))
        self._put("_compiled", (*self.before, "_compiled"))

    def _put(self, name: str, value: Any) -> None:
        own = vars(self.module)
        self.before[name] = own.get(name, _NOTHING)
        own[name] = value

    def _compile_layers(self, module: nn.Module, compile: Callable[..., Any]) -> None:
        """Compile the layers of ``module`` in place, but for those that the user has compiled, and for metrics."""
        for layer in module.children():
            if isinstance(layer, MetricLike) or hasattr(layer, "_orig_mod") or vars(layer).get("_compiled_call_impl"):
                continue
            if type(layer).forward is nn.Module.forward:
                self._compile_layers(layer, compile)  # a list of layers, or a dict
            elif next(layer.parameters(), None) is not None:
                # what Module.compile does, which leaves layers of torch's own as they are
                compiled = compile(_own_code(_called, type(layer).__name__))
                vars(layer)["_compiled_call_impl"] = functools.partial(compiled, layer)
                self.layers.append(layer)

    def remove(self) -> None:
        """Give everything back as it was."""
        for name, before in self.before.items():
            _put(vars(self.module), name, before)
        for layer in self.layers:
            vars(layer).pop("_compiled_call_impl", None)
        for tape in self.tapes:
            tape.remove()
        self.stack.close()

    # ------------------------------------------------------------------ what torch did

    def report(self, step: CompiledStep) -> None:
        """Say what torch did while ``step`` ran: what it could not compile, and what it had to compile again."""
        self.news = False
        failure, self.failure = self.failure, None
        news = self._metrics()
        if failure is not None:
            self._give_up(step, str(failure))
            return
        for metrics in news:
            name, again = str(metrics.co_name), getattr(metrics, "recompile_reason", None)
            broken = [str(metrics.fail_reason)] if metrics.fail_type else sorted(metrics.restart_reasons or ())
            broken = [reason for reason in broken if "Explanation:" in reason]
            if metrics.fail_type is None and again:
                self._tell_again(name.removeprefix("torch_dynamo_resume_in_").partition("_at_")[0], again)
            elif again:
                self._tell(
                    f"limit of {step.name}",
                    f"{step.name}, or a part of it, has been compiled as often as torch allows"
                    " (torch._dynamo.config.recompile_limit): what fits none of its graphs runs uncompiled. The last"
                    f" reason: {_guard(again)}",
                )
            elif broken:
                self._tell(
                    f"break in {step.name}",
                    f"{step.name} is compiled in parts, since torch cannot compile it as a whole: {_reason(broken[0])}",
                )

    def _metrics(self) -> list[Any]:
        """What torch has measured of its compilations of code, not of backward, since the last report."""
        news = []
        for metrics in reversed(get_compilation_metrics()):
            if metrics is self.last:
                break
            news.append(metrics)
        self.last = news[0] if news else self.last
        return [metrics for metrics in reversed(news) if getattr(metrics, "is_forward", None) is not False]

    def _give_up(self, step: CompiledStep, why: str) -> None:
        step.off = True
        for layer in self.layers if step.name == "training_step" else ():
            vars(layer).pop("_compiled_call_impl", None)
        reason = _reason(why)
        if reason not in self.told:
            self.told.add(reason)
            rank_zero_warn(
                f"{step.name} could not be compiled, so it runs uncompiled, as will every step that fails in the same way:"
                f" {reason}"
            )

    def _tell_again(self, name: str, why: str) -> None:
        self.again[name] = self.again.get(name, 0) + 1
        total = sum(self.again.values())
        if total <= REPORTS:
            times = "" if self.again[name] == 1 else f" ({self.again[name]} times by now)"
            rank_zero_info(f"{name} was compiled again{times}: {_guard(why)}")
        elif total == REPORTS + 1:
            rank_zero_info("Something was compiled again; from here on TORCH_LOGS=recompiles tells what, and why.")

    def _tell(self, topic: str, text: str) -> None:
        """Say ``text``, once in a run."""
        if topic not in self.told:
            self.told.add(topic)
            rank_zero_info(text)


def by_user(step: Any) -> bool:
    """Whether somebody has put ``torch.compile`` around a step already."""
    return hasattr(step, "_torchdynamo_orig_callable") and not getattr(step, "_torchdynamo_disable", False)


def _compiler(session: Session) -> Callable[..., Any] | None:
    """What compiles a function as the user wants it: as he compiled the module, else with the Trainer's arguments."""
    given: Any = session.config.compile
    if session.compiler is not None:
        found: Callable[..., Any] = session.compiler
        return found
    options = dict(given) if isinstance(given, Mapping) else {}
    if not (options or given is True) or options.pop("disable", False):
        return None

    def compile(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return torch.compile(function, **options)
        except (RuntimeError, TypeError, ValueError) as error:
            raise MisconfigurationException(
                f"Trainer(compile={given!r}) is not valid. torch.compile says: {error}"
            ) from error

    return compile


def _records(session: Session) -> bool:
    """Whether torch records CUDA graphs: it would record one for each value of a number that goes into a graph."""
    given: Any = session.config.compile
    if session.strategy.root_device.type != "cuda" or not isinstance(given, Mapping):
        return False
    options = given.get("options") or {}
    return given.get("mode") in ("reduce-overhead", "max-autotune") or bool(options.get("triton.cudagraphs"))


def _reads(module: nn.Module) -> list[str]:
    """Return the counters that the code of a module's class mentions, as ``Progress`` calls them."""
    theirs = [cls for cls in type(module).__mro__ if cls not in LightningModule.__mro__]
    names = {name for cls in theirs for method in vars(cls).values() for name in names_in(method)}
    return [counter for name, counter in _COUNTERS.items() if name in names]


def _differentiates_twice(module: nn.Module) -> bool:
    """Whether the code of a module, or of a part of it that is not torch's, passes ``create_graph``."""
    found = {cls for part in module.modules() for cls in type(part).__mro__}
    theirs = [cls for cls in found - set(LightningModule.__mro__) if not cls.__module__.startswith("torch.")]
    return any("create_graph" in keywords_in(method) for cls in theirs for method in vars(cls).values())


def _reason(text: str) -> str:
    """Return what matters of a message of torch's, in a line."""
    told, _, code = text.partition("from user code:")
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    reason = next((line.removeprefix("Explanation: ") for line in lines if line.startswith("Explanation: ")), "")
    reason = reason or next((line for line in lines if not line.startswith("backend=")), "")
    place = [line.strip() for line in code.splitlines() if line.strip().startswith("File ")]
    return _cut(reason) + (f" ({place[-1]})" if place else "")


def _guard(text: str) -> str:
    """Return what torch says of the guard that failed, in a line: without its number, and the code it comes from."""
    first = text.strip().partition("\n")[0].partition("  #")[0].strip()
    if (number := _NUMBER.search(first)) is not None:
        name, before, now = number.groups()
        return f"it computes something else where {name} is {int(now) - 2} than where it is {int(before) - 2}."
    return _cut(first.partition(": ")[2] or first) + " does not hold any more." * ("mismatch" not in first)


def _cut(text: str) -> str:
    return text if len(text) <= 240 else text[:239] + "…"
