# SPDX-License-Identifier: Apache-2.0
"""The verbs of a strategy; the base class is the working null object: one process, one device, nothing to exchange."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from leyden import files
from leyden.errors import CheckpointError
from leyden.loading import apply_state_dict, clean_names
from leyden.optim import LightningOptimizer
from leyden.precision import Precision
from leyden.precision.base import WithoutInit
from leyden.signals import Interrupt
from leyden.strategies.verbs import Verbs
from leyden.tree import move_to, parameters_of
from leyden.types import PathLike

if TYPE_CHECKING:
    from leyden.checkpoint_io.base import CheckpointIO

T = TypeVar("T")

IDLE: Any = object()
"""Stands in the place of a batch in a turn of an evaluation in which only other processes have one."""


class Strategy(Verbs):
    """Runs the steps of a module on ``root_device``, in the number format of its ``precision``.

    Args:
        device: The device of this process.
        precision: The number format; None is 32-true.
        checkpoint_io: Writes, reads and removes checkpoints; None keeps them in files.
        accelerator: Accepted for compatibility.
        precision_plugin: Another name for ``precision``.
    """

    strategy_name = "single"
    saves_shards = False
    """Whether a checkpoint is a folder to which every process writes its part, rather than one file."""
    calls: tuple[str, ...] = ()
    """Methods of a module that this strategy calls beside the hooks."""
    uneven = "stop"
    """What happens where ranks have other numbers of training batches; see ``ParallelStrategy``."""

    def __init__(
        self,
        device: torch.device | str = "cpu",
        precision: Precision | None = None,
        checkpoint_io: CheckpointIO | None = None,
        *,
        accelerator: Any = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        self._root_device = torch.device(device)
        self.precision = precision or precision_plugin or Precision()
        self._checkpoint_io = checkpoint_io
        self.module: Any = None
        self.optimizers: list[Optimizer] = []
        self.lightning_optimizers: list[LightningOptimizer] = []
        self.lr_scheduler_configs: list[Any] = []
        self._step: Callable[..., Any] | None = None
        self._manual_backward: Callable[..., None] | None = None

    # -- who and where

    @property
    def root_device(self) -> torch.device:
        """The device of this process."""
        return self._root_device

    @property
    def lightning_module(self) -> Any:
        """The user's module."""
        return self.module

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return 1

    @property
    def global_rank(self) -> int:
        """Index of this process among all."""
        return 0

    @property
    def local_rank(self) -> int:
        """Index of this process on its node."""
        return 0

    @property
    def node_rank(self) -> int:
        """Index of this node."""
        return 0

    @property
    def data_size(self) -> int:
        """Among how many the data are shared out: fewer than processes where several of them work on one batch."""
        return self.world_size

    @property
    def data_rank(self) -> int:
        """Which share of the data this process has; those that work on one batch have the same."""
        return self.global_rank

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the process that writes."""
        return self.global_rank == 0

    # -- a run

    @property
    def spawns(self) -> bool:
        """Whether an entry point of the Trainer is to run in processes that are started for it alone."""
        return False

    def run_elsewhere(self, trainer: Any, entry: str, given: Mapping[str, Any]) -> Any:
        """Run ``trainer.<entry>`` with the arguments that are among ``given`` in such processes; return what it returned."""
        raise NotImplementedError(f"{type(self).__name__} starts no processes.")

    def launch(self, interrupt: Interrupt, progress: Any) -> None:
        """Start the processes that are missing, and meet them; a run begins, with these counters."""
        self.setup_environment()

    def land(self) -> None:
        """A run is over, in whatever way."""

    def fail(self, error: BaseException, together: bool) -> bool:
        """``error`` ends the run; ``together`` says that it does so on all ranks, after the same batch.

        Returns:
            Whether it comes after the failure of another process.
        """
        return False

    def prepare(self, name: str, work: Callable[[], Any], here: bool) -> None:
        """Run ``work``, called ``name``, in the processes in which ``here`` is true; all go on when it is done everywhere.

        It may take as long as it likes.
        """
        if here:
            work()

    def on_its_own(self) -> Strategy | None:
        """Return what takes the steps of this process without the others; None where a step takes all of them."""
        return self

    # -- the life of a module

    def connect(self, module: nn.Module) -> None:
        """Take the module of the coming run."""
        self.module = module

    def builds(self) -> bool:
        """Whether ``configure_model`` is to be called in the coming run; not for a module that is as it left it."""
        return True

    def setup(self, trainer: Any = None) -> None:
        """Bring the module to its device and number format."""
        self.module = self.precision.convert_module(self.module)
        self.model_to_device()

    def place(self) -> None:
        """Bring the module to its device."""
        self.module.to(self.root_device)

    def distribute(self, fitting: bool) -> None:
        """Make the module one with those of the other processes; runs after ``setup``."""

    def accompany(self, loop: Any, automatic: bool) -> None:
        """Go with the loop of a fit, whose ``steps`` says whether a batch ends with an update; the optimizers are set."""

    def set_optimizers(
        self, optimizers: list[Optimizer], schedules: list[Any], step: Callable[..., Any], backward: Callable[..., None]
    ) -> None:
        """Take the optimizers and schedules of the coming fit.

        Args:
            optimizers: As ``configure_optimizers`` returned them.
            schedules: Their learning-rate schedules.
            step: Called by the wrapped optimizers as ``step(optimizer, closure, **kwargs)``.
            backward: Called by ``module.manual_backward``.
        """
        self.optimizers, self.lr_scheduler_configs = optimizers, schedules
        self._step, self._manual_backward = step, backward
        self.exchange_optimizers(optimizers)

    def exchange_optimizers(self, optimizers: list[Optimizer]) -> None:
        """Go on with these optimizers; in the middle of a fit as well."""
        self.optimizers[:] = optimizers  # in place: the loops hold this list
        if self._step is not None:
            self.lightning_optimizers = [
                LightningOptimizer(one, self._step, self.optimizers) for one in self.optimizers
            ]

    def teardown(self) -> None:
        """Let go of what only the run needed; bring the module and the optimizer state back to the host.

        Raises:
            Exception: what a checkpoint that was still being written failed with.
        """
        if self._checkpoint_io is not None:
            self._checkpoint_io.teardown()
        for wrapped in self.lightning_optimizers:
            wrapped.release()  # user code may have kept it
        self._step = self._manual_backward = None
        if self.module is not None:
            self.come_home()

    def come_home(self) -> None:
        """Bring the module and the optimizer state back to the host."""
        if self.root_device.type != "cpu":
            host = torch.device("cpu")
            self.module.to(host)
            for optimizer in self.optimizers:
                for key, value in optimizer.state.items():
                    optimizer.state[key] = move_to(value, host)

    # -- a loop of the user's own (leyden.fabric)

    def turn_to(self, module: nn.Module) -> None:
        """What follows, states say, is about ``module``, which ``setup_module`` has had; it may be one of several."""
        self.module = module

    def begin(self) -> None:
        """Start the processes that are missing, and meet them, for the rest of the program."""

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Make ``module``, which is on its device, one with those of the other processes.

        Returns:
            What its forward is to go through: the module itself, or what wraps it.
        """
        self.connect(module)
        self.distribute(fitting=any(parameter.requires_grad for parameter in module.parameters()))
        return cast("nn.Module", self.module)

    def no_backward_sync(self, module: nn.Module, enabled: bool = True) -> AbstractContextManager[Any]:
        """Return a context in which gradients of what ``setup_module`` returned are not exchanged, if ``enabled``."""
        return nullcontext()

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """A context in which tensors are made on the device and in the number format of the run."""
        with self.root_device, self.precision.tensor_init_context():
            yield

    @contextmanager
    def module_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """A context in which modules are built on the device and in the number format of the run.

        Args:
            empty_init: True leaves the weights uninitialised (when a checkpoint follows).
        """
        with self.tensor_init_context(), self.precision.init_context(), WithoutInit() if empty_init else nullcontext():
            yield

    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """Clip the gradients of the optimizer's parameters to a total norm; return the norm before, the same everywhere.

        Raises:
            RuntimeError: with ``error_if_nonfinite``, where the norm is infinite or no number.
        """
        self.precision.unscale(optimizer)
        return nn.utils.clip_grad_norm_(parameters_of(optimizer), max_norm, norm_type, error_if_nonfinite)

    def clip_gradients_value(self, module: nn.Module, optimizer: Optimizer, clip_val: float) -> None:
        """Clip each element of the gradients of the optimizer's parameters to [-clip_val, clip_val]."""
        self.precision.unscale(optimizer)
        nn.utils.clip_grad_value_(parameters_of(optimizer), clip_val)

    # -- steps

    def training_step(self, *args: Any) -> Any:
        """Run ``module.training_step`` in the precision's context."""
        with self.precision.train_step_context():
            return self.module.training_step(*args)

    def idle_step(self) -> None:
        """Take part in the training step of the others, without a batch: with gradients of 0."""

    def validation_step(self, *args: Any) -> Any:
        """Run ``module.validation_step`` in the precision's context."""
        with self.precision.val_step_context():
            return self.module.validation_step(*args)

    def test_step(self, *args: Any) -> Any:
        """Run ``module.test_step`` in the precision's context."""
        with self.precision.test_step_context():
            return self.module.test_step(*args)

    def predict_step(self, *args: Any) -> Any:
        """Run ``module.predict_step`` in the precision's context."""
        with self.precision.predict_step_context():
            return self.module.predict_step(*args)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients, scaled where the precision scales them."""
        if args and (args[0] is None or isinstance(args[0], Optimizer)):
            args = args[1:]  # Lightning's own have the optimizer there
        self.precision.backward(loss, *args, **kwargs)

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backward with its hooks, for manual optimization.

        Raises:
            RuntimeError: outside fit.
        """
        if self._manual_backward is None:
            raise RuntimeError("manual_backward() works inside Trainer.fit only: no fit is running.")
        self._manual_backward(loss, *args, **kwargs)

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any] | None = None, model: Any = None, **kwargs: Any
    ) -> Any:
        """Step ``optimizer``; ``precision.skipped_step`` tells whether the step was left out."""
        return self.precision.optimizer_step(optimizer, closure, **kwargs)

    def clip_gradients(self, optimizer: Optimizer, value: float, algorithm: str) -> Tensor | None:
        """Clip the gradients of the optimizer's parameters; return their total norm before, for ``"norm"``."""
        return self.precision.clip(optimizer, value, algorithm)

    def scale_gradients(self, optimizer: Optimizer, factor: Any) -> None:
        """Multiply the gradients of the optimizer's parameters by a number, or by a tensor with one element."""
        grads = [p.grad for p in parameters_of(optimizer) if p.grad is not None]
        if grads:
            torch._foreach_mul_(grads, factor)

    def toggled(self) -> None:
        """Some parameters require gradients from now on, or do not any more: in the middle of a step as well."""

    def gradients(self) -> dict[str, Tensor]:
        """What this process has of the gradients of a window of accumulation that is open, by the names of parameters."""
        return {name: p.grad for name, p in self.module.named_parameters() if p.grad is not None}

    def load_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Take over what ``gradients`` returned; what is of another shape is left out."""
        for name, parameter in self.module.named_parameters():
            gradient = gradients.get(name)
            if gradient is not None and gradient.shape == parameter.shape:
                parameter.grad = gradient.to(parameter.device, parameter.dtype)

    def evaluating(self, inference: bool) -> AbstractContextManager[Any]:
        """Return the context of an evaluation; ``inference`` says that nothing of it is wanted by training later."""
        return torch.inference_mode() if inference else torch.no_grad()

    def paced(self, batches: Iterator[tuple[Any, int, int]]) -> Iterator[tuple[Any, int, int]]:
        """Return the batches of an evaluation, with their number and that of their loader, as this process is to run them.

        Where all processes take part in each step of any, one without a batch gets ``IDLE``, and calls ``keep_up``.
        """
        return batches

    def why_no_join(self) -> str | None:
        """Why a process cannot take part in the training step of others without a batch; None if it can."""
        return f"{type(self).__name__} cannot let a rank take part in a step without a batch"

    def keep_up(self) -> None:
        """Take part in the exchanges of a step that other processes run, where this one has no batch."""

    # -- between processes

    def barrier(self, name: str | None = None) -> None:
        """Wait for all processes."""

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return the object of process ``src``."""
        return obj

    def reduce(self, tensor: Any, group: Any = None, reduce_op: str | None = "mean") -> Any:
        """Reduce a tensor over processes."""
        return tensor

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Agree on a yes or no: of all processes (``all``), or of any."""
        return decision

    def gather_objects(self, item: Any) -> list[Any]:
        """Return the objects of all processes, in their order."""
        return [item]

    def gather_numbers(self, numbers: Tensor) -> Tensor:
        """Return the flat ``numbers`` (on the CPU) of all processes, one row for each."""
        return numbers[None]

    def all_gather(self, tensor: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """Gather a tensor, or a tree of them, from all processes; with one process the input itself."""
        return tensor

    def asked_to_stop(self, interrupt: Interrupt) -> None:
        """Make ``interrupt.received`` true after the same batch in all processes; runs in a signal handler.

        See ``Interrupt`` for how several processes agree without an exchange in an ordinary batch.
        """
        interrupt.received = True

    def ends_after(self, batch: int) -> bool:
        """Whether a run that was asked to stop ends after this batch, the one that is just done, in all processes."""
        return True

    def all_skip(self, batch: int) -> bool:
        """Whether all processes skip the rest of the epoch at batch ``batch``; RuntimeError if only some do."""
        return True

    def unanimous(self, about: str) -> bool:
        """Whether all processes ask this at the same point, without an exchange where they do not."""
        return True

    def announce(self, about: str) -> None:
        """Let other processes know that this one is going to ``hear`` about something; no exchange."""

    def hear(self, about: str, mine: str) -> dict[int, str]:
        """Tell ``mine``; return, by rank, what others have told that are at it too: no exchange, this may be the only one."""
        return {self.global_rank: mine}

    def agree_on(self, interrupt: Interrupt) -> bool:
        """Make what ``interrupt`` says the same in all processes, where all are at the same point; return ``received``."""
        return interrupt.received

    # -- checkpoints

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """What writes, reads and removes checkpoints."""
        if self._checkpoint_io is None:
            from leyden.checkpoint_io.base import TorchCheckpointIO  # noqa: PLC0415 - in a run, not on import

            self._checkpoint_io = TorchCheckpointIO()
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, checkpoint_io: CheckpointIO) -> None:
        self._checkpoint_io = checkpoint_io

    def module_state_dict(self) -> dict[str, Any]:
        """The weights, under the names that they have when no layer is compiled."""
        return clean_names(self.module.state_dict())

    def load_module_state_dict(self, state: dict[str, Any], strict: bool, source: str) -> None:
        """Load weights; what does not fit is an error that lists it."""
        apply_state_dict(self.module, state, strict, source)

    def own_buffers(self) -> dict[str, Tensor]:
        """The buffers of the module that are others on other processes: the statistics of a batch norm, say."""
        return {}

    def load_own_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        """Take over what ``own_buffers`` returned."""
        own = dict(self.module.named_buffers())
        with torch.no_grad():
            for name, value in buffers.items():
                if name in own and own[name].shape == value.shape:
                    own[name].copy_(value)

    def exchange_order(self) -> list[int]:
        """The order in which gradients are exchanged, where the last bit of a sum depends on it."""
        return []

    def follow_order(self, order: list[int]) -> None:
        """Take over what ``exchange_order`` returned; all ranks do so together."""

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of one optimizer."""
        return dict(optimizer.state_dict())

    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Load the state of one optimizer, on the device of its parameters."""
        optimizer.load_state_dict(state)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: PathLike, storage_options: Any = None) -> None:
        """Write a complete checkpoint, atomically, on the process that writes.

        Raises:
            CheckpointError: on every process, if that one could not.
        """
        self.on_rank_zero(
            lambda: self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options), filepath
        )

    def save_folder(
        self,
        path: PathLike,
        write: Callable[[Path], None],
        record: Mapping[str, Any] | None = None,
        gather: Callable[[Any], list[Any]] | None = None,
    ) -> None:
        """Let every process write its part of a checkpoint folder, and commit it only when all of them have.

        Args:
            path: Where, on a file system that the processes share; see ``files.save_folder``.
            write: Called on every process with the folder to write into.
            record: Plain data by which the checkpoint is known without opening it: ``global_step``, ``epoch``.
            gather: How the processes hear of each other on this thread; None is ``gather_objects``.

        Raises:
            CheckpointError: on every process, if any of them failed; then what was there before is still there.
        """
        from leyden import folders  # noqa: PLC0415  # only for checkpoints of several processes

        place = files.require_local(path)
        folder: Path = self.on_rank_zero(lambda: folders.begin(place), path, gather)
        try:
            self.on_all_ranks(lambda: write(folder), path, gather)
            self.on_all_ranks(lambda: folders.note(folder, self.global_rank, self.world_size), path, gather)
            self.on_rank_zero(lambda: folders.commit(folder, place, record), path, gather)
        except BaseException:
            if self.is_global_zero:
                folders.abandon(folder)
            raise

    def on_rank_zero(
        self, work: Callable[[], T], path: PathLike = "", gather: Callable[[Any], list[Any]] | None = None
    ) -> T:
        """Return what ``work`` returns on rank 0, on every process; what it raises there is raised on every process.

        Args:
            work: Writes a checkpoint, or a part of it. What it returns must be something that can be broadcast.
            path: What it writes, for the message of an error that is none of ours.
            gather: As for ``save_folder``.
        """
        result, error = None, None
        if self.is_global_zero:
            try:
                with files.explained(path):
                    result = work()
            except CheckpointError as failure:
                error = failure
        said = result, None if error is None else str(error)
        result, message = self.broadcast(said) if gather is None else gather(said)[0]
        if message is not None:
            raise error if error is not None else CheckpointError(f"On rank 0: {message}")
        return cast("T", result)

    def on_all_ranks(
        self, work: Callable[[], None], path: PathLike = "", gather: Callable[[Any], list[Any]] | None = None
    ) -> None:
        """Call ``work`` on every process; if any of them fails, every process raises CheckpointError.

        Args:
            work: Writes or reads a part of a checkpoint.
            path: As for ``on_rank_zero``.
            gather: As for ``save_folder``.
        """
        error = None
        try:
            with files.explained(path):
                work()
        except CheckpointError as failure:
            error = failure
        said = (gather or self.gather_objects)(None if error is None else str(error))
        if error is not None:
            raise error
        failed = next(((rank, message) for rank, message in enumerate(said) if message is not None), None)
        if failed is not None:
            raise CheckpointError(f"On rank {failed[0]}: {failed[1]}")

    def load_checkpoint(self, filepath: PathLike, weights_only: bool | None = True) -> dict[str, Any]:
        """Read a checkpoint to host memory, and compare it with its checksums."""
        from leyden.checkpoint_io.base import load_by  # noqa: PLC0415 - in a run, not on import

        return load_by(self.checkpoint_io, filepath, "cpu", weights_only is not False)

    def remove_checkpoint(self, filepath: PathLike) -> None:
        """Delete a checkpoint that this run wrote."""
        if self.is_global_zero:
            self.checkpoint_io.remove_checkpoint(filepath)
