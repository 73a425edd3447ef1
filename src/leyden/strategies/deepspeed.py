# SPDX-License-Identifier: Apache-2.0
"""Several processes that share out optimizer state, gradients and weights by DeepSpeed's ZeRO, where it is installed.

DeepSpeed's engine has the forward, the backward and the step of a fit. Checkpoints are those of one process: whole weights
and whole optimizer state in one file, in which nothing is pickled. After a run the module is plain again.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from leyden.errors import MisconfigurationException
from leyden.loading import clean_name
from leyden.optim import NoOptimizer
from leyden.precision import Precision
from leyden.precision.deepspeed import DeepSpeedPrecision
from leyden.runtime.world import OURS
from leyden.strategies import deepspeed_arguments as arguments
from leyden.strategies.parallel import ParallelStrategy
from leyden.strategies.through import Through
from leyden.strategies.turns import in_turn

_OURS = (
    "accelerator", "parallel_devices", "cluster_environment", "config", "logging_level", "precision_plugin",
    "process_group_backend", "timeout", "start_method", "checkpoint_io", "nvme_path",
)  # fmt: skip
_SCALING = ("loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale")


class DeepSpeedStrategy(ParallelStrategy):
    """Trains by DeepSpeed's ZeRO: stage 1 shares out the optimizer's state, 2 gradients too, 3 weights too.

    ::

        Trainer(accelerator="gpu", devices=8, strategy="deepspeed_stage_3", precision="bf16-mixed")
        Trainer(devices=8, strategy=DeepSpeedStrategy(stage=2, offload_optimizer=True))
        Trainer(devices=8, strategy=DeepSpeedStrategy(config="zero.json"))

    The arguments are Lightning's. Those that are not listed go, under the same name, into DeepSpeed's configuration, see
    https://www.deepspeed.ai/docs/config-json.

    Args:
        accelerator: Accepted for compatibility.
        zero_optimization: Must be True: without it, ``ddp`` does the same.
        stage: 1, 2 or 3.
        remote_device: Accepted for compatibility: modules are made in host memory.
        offload_optimizer: Keep the optimizer's state on ``offload_optimizer_device``, ``"cpu"`` or ``"nvme"`` (stage 3).
        offload_parameters: Keep weights on ``offload_params_device`` (stage 3).
        nvme_path: The folder for ``"nvme"``.
        logging_batch_size_per_gpu: For DeepSpeed's own figures; ``"auto"`` is 1.
        config: DeepSpeed's configuration, as a dict or as the path of a JSON file; None takes the file that
            ``PL_DEEPSPEED_CONFIG_PATH`` names, if it does. All arguments about it are then left aside.
        logging_level: Of DeepSpeed's messages.
        parallel_devices: One device for each process of this machine; None takes the Trainer's.
        cluster_environment: Accepted for compatibility.
        loss_scale: For ``precision="16-mixed"``; 0 finds it itself, see ``initial_scale_power`` and the others.
        load_full_weights: Accepted for compatibility: checkpoints always have whole weights.
        precision_plugin: The number format; None is the Trainer's.
        process_group_backend: torch's name for how tensors travel; None is NCCL for GPUs and Gloo for CPUs.
        timeout: After how long an exchange that not all ranks take part in is an error.
        exclude_frozen_parameters: Leave parameters that are not trained out of checkpoints.
        start_method: As in ``DDPStrategy``.
        checkpoint_io: As in the base class.

    Raises:
        MisconfigurationException: for an argument that is unknown, a value that is not possible, or where DeepSpeed is not
            installed.
    """

    strategy_name = "deepspeed"

    def __init__(
        self,
        accelerator: Any = None,
        zero_optimization: bool = True,
        stage: int = 2,
        remote_device: str | None = None,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        offload_params_device: str = "cpu",
        nvme_path: str = "/local_nvme",
        params_buffer_count: int = 5,
        params_buffer_size: int = 100_000_000,
        max_in_cpu: int = 1_000_000_000,
        offload_optimizer_device: str = "cpu",
        optimizer_buffer_count: int = 4,
        block_size: int = 1048576,
        queue_depth: int = 8,
        single_submit: bool = False,
        overlap_events: bool = True,
        thread_count: int = 1,
        pin_memory: bool = False,
        sub_group_size: int = 1_000_000_000_000,
        contiguous_gradients: bool = True,
        overlap_comm: bool = True,
        allgather_partitions: bool = True,
        reduce_scatter: bool = True,
        allgather_bucket_size: int = 200_000_000,
        reduce_bucket_size: int = 200_000_000,
        zero_allow_untested_optimizer: bool = True,
        logging_batch_size_per_gpu: str | int = "auto",
        config: str | Path | dict[str, Any] | None = None,
        logging_level: int = logging.WARNING,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: Any = None,
        loss_scale: float = 0,
        initial_scale_power: int = 16,
        loss_scale_window: int = 1000,
        hysteresis: int = 2,
        min_loss_scale: int = 1,
        partition_activations: bool = False,
        cpu_checkpointing: bool = False,
        contiguous_memory_optimization: bool = False,
        synchronize_checkpoint_boundary: bool = False,
        load_full_weights: bool = False,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30),
        exclude_frozen_parameters: bool = False,
        start_method: Any = "popen",
        checkpoint_io: Any = None,
        **kwargs: Any,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")}
        arguments.refuse_unknown(kwargs, tuple(given))
        arguments.check(given)
        arguments.require_installed(stage, offload_optimizer or offload_parameters)
        super().__init__(
            parallel_devices,
            precision_plugin,
            checkpoint_io,
            process_group_backend,
            timeout or timedelta(minutes=30),
            start_method,
            cluster_environment,
        )
        read = arguments.read_config(config)
        self.config: dict[str, Any] = arguments.build(given) if read is None else read
        """DeepSpeed's configuration, before the Trainer's part is put in."""
        self.exclude_frozen_parameters, self._logging_level = exclude_frozen_parameters, logging_level
        self._scaling = {name: given[name] for name in _SCALING}
        self.engine: Any = None
        """DeepSpeed's engine, while a fit runs."""
        self._before: Any = None
        self._through: Through | None = None
        self._loop: Any = None
        self._clip = 0.0
        self._held: Mapping[str, Any] | None = None
        """Weights that came before the engine was made, whose 32 bits it is to have."""
        self._names = contextlib.ExitStack()
        """What environment variables a fit has added."""
        self._told = True
        """Whether the engine was told that the batch that ran last ends a window."""

    @property
    def precision(self) -> Precision:
        """The number format; DeepSpeed's own way of what the Trainer says."""
        return self._precision

    @precision.setter
    def precision(self, given: Precision) -> None:
        self._precision = given if isinstance(given, DeepSpeedPrecision) else DeepSpeedPrecision(given.precision)

    @property
    def stage(self) -> int:
        """How much is shared out: 1, 2 or 3."""
        return int(self.config["zero_optimization"]["stage"])

    # ------------------------------------------------------------------ the life of a module

    def connect(self, module: nn.Module) -> None:
        super().connect(module)
        self._held = None

    def distribute(self, fitting: bool) -> None:
        if self.world_size > 1:
            from leyden.runtime.collective import copy_flat  # noqa: PLC0415  # torch.distributed

            with torch.no_grad():
                copy_flat([tensor.detach() for tensor in (*self.module.parameters(), *self.module.buffers())])

    def exchange_optimizers(self, optimizers: list[Optimizer]) -> None:
        if self.engine is not None:
            raise MisconfigurationException(
                "DeepSpeed's engine has the optimizer of configure_optimizers() until the fit ends; it cannot get another."
            )
        super().exchange_optimizers(optimizers)

    def accompany(self, loop: Any, automatic: bool) -> None:
        if not automatic:
            raise MisconfigurationException(
                "DeepSpeed has the backward and the step of each batch, so self.automatic_optimization=False cannot be used"
                " with it. Use strategy='fsdp' or 'ddp' for manual optimization."
            )
        if len(self.optimizers) != 1:
            raise MisconfigurationException(
                f"DeepSpeed trains with one optimizer, but configure_optimizers() returned {len(self.optimizers)}. Give one"
                " with several groups of parameters, or use strategy='fsdp' or 'ddp'."
            )
        optimizer = self.optimizers[0]
        if isinstance(optimizer, (NoOptimizer, LBFGS)):
            raise MisconfigurationException(
                f"DeepSpeed needs an optimizer that steps once on its gradients; configure_optimizers() gave"
                f" {'none' if isinstance(optimizer, NoOptimizer) else 'LBFGS'}. Use one of torch.optim, or strategy='ddp'."
            )
        self._loop = loop
        self._start(optimizer)

    def _start(self, optimizer: Optimizer) -> None:
        module = self.module
        config = module.trainer.config
        complete = arguments.complete(
            self.config,
            precision=self.precision.precision,
            scaling=self._scaling,
            accumulate=config.accumulate_grad_batches,
            clip=config.gradient_clip_val,
            world_size=self.world_size,
        )
        with self._environment():
            deepspeed: Any = importlib.import_module("deepspeed")  # few programs have it
            from leyden.strategies.zero import Before  # noqa: PLC0415  # with it

            deepspeed.utils.logging.logger.setLevel(self._logging_level)
            device = deepspeed.accelerator.get_accelerator().device_name()
            if device.split(":")[0] != self.root_device.type:
                raise MisconfigurationException(
                    f"DeepSpeed works on {device!r}, but the Trainer on {self.root_device.type!r}. Set the environment"
                    f" variable DS_ACCELERATOR={self.root_device.type} before anything imports deepspeed."
                )
            self._through = Through(module)  # given back in teardown
            self._before = Before(module, optimizer)
            self.engine = deepspeed.initialize(
                model=module, optimizer=optimizer, config=complete, dist_init_required=False
            )[0]
            activations = complete.get("activation_checkpointing")
            if activations:
                deepspeed.checkpointing.configure(
                    mpu_=None,
                    partition_activations=activations.get("partition_activations"),
                    contiguous_checkpointing=activations.get("contiguous_memory_optimization"),
                    checkpoint_in_cpu=activations.get("cpu_checkpointing"),
                    synchronize=activations.get("synchronize_checkpoint_boundary"),
                    profile=activations.get("profile"),
                )
        self._names.enter_context(self._environment("LOCAL_RANK"))  # which it looks at in steps, without GPUs
        self.precision.engine = self.engine  # type: ignore[attr-defined]  # it is a DeepSpeedPrecision, see the setter
        self._clip = float(self.config.get("gradient_clipping") or 0.0)
        self._zero.clip_grad = self._clip  # what the Trainer says comes with each step, see clip_gradients
        held, self._held = self._held, None
        if held is not None and getattr(self.precision, "dtype", None) is not None:
            self._set_masters(held)

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimizer."""
        return self.engine.optimizer

    @contextlib.contextmanager
    def _environment(self, *names: str) -> Iterator[None]:
        """The environment variables (all, or ``names``) by which DeepSpeed knows this process; then as they were."""
        wanted = {**self._world.environment(self.local_rank), "DS_ACCELERATOR": self.root_device.type}
        names = names or tuple(name for name in wanted if name != OURS)
        added = {name: wanted[name] for name in names if name not in os.environ}
        os.environ.update(added)
        try:
            yield
        finally:
            for name in added:
                os.environ.pop(name, None)

    def teardown(self) -> None:
        if self._before is not None:
            self._stop()
        self._names.close()
        self._loop = self._held = None
        super().teardown()

    def _stop(self) -> None:
        from leyden.strategies import zero  # noqa: PLC0415  # with an engine

        engine, before = self.engine, self._before
        weights, state = {}, None
        if engine is not None and not self._alone:  # else the others take no part, and weights of stage 3 stay in parts
            weights = {p: zero.whole_weight(p, p in before.trained).to("cpu", copy=True) for p in before.dtypes}
            state = zero.optimizer_state(self._zero, before, self.is_global_zero)
        if self._through is not None:
            self._through.remove()
        self.engine = self.precision.engine = self._through = self._before = None  # type: ignore[attr-defined]
        if engine is not None:
            engine.destroy()
        before.restore(weights, state if self.is_global_zero else None)

    # ------------------------------------------------------------------ steps

    def _call(self, name: str, args: tuple[Any, ...]) -> Any:
        step, through = getattr(self.module, name), self._through
        if self.engine is None or through is None:
            with self.precision.step_context(name):
                return step(*args)
        through.step = step
        try:
            with self.precision.step_context(name):
                return self.engine(*args)
        finally:
            through.step = None

    def training_step(self, *args: Any) -> Any:
        if self.engine is None:
            return super().training_step(*args)
        self._told = bool(self._loop.steps)
        self.engine.set_gradient_accumulation_boundary(self._told)
        output = self._call("training_step", args)
        if output is None or (isinstance(output, Mapping) and output.get("loss", 0) is None):
            raise MisconfigurationException(
                "training_step() returned None, but under DeepSpeed each rank takes part in each backward. Return a loss that"
                " counts for nothing, such as 0.0 * prediction.sum()."
            )
        return output

    def validation_step(self, *args: Any) -> Any:
        return self._call("validation_step", args)

    def test_step(self, *args: Any) -> Any:
        return self._call("test_step", args)

    def predict_step(self, *args: Any) -> Any:
        return self._call("predict_step", args)

    def exchange_gradients(self, optimizer: Optimizer) -> None:
        """Nothing: the engine has averaged them."""

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any] | None = None, model: Any = None, **kwargs: Any
    ) -> Any:
        if self.engine is None:
            return super().optimizer_step(optimizer, closure, **kwargs)
        result = closure() if closure is not None else None
        if not self._told:
            raise MisconfigurationException(
                "The loader ended before its length said so, inside a window of accumulation, whose last batch DeepSpeed"
                " must know before its backward. Give the loader its true length, or none."
            )
        self.engine.step()
        self._zero.clip_grad = self._clip
        return result

    def clip_gradients(self, optimizer: Optimizer, value: float, algorithm: str) -> Tensor | None:
        if self.engine is None:
            return super().clip_gradients(optimizer, value, algorithm)
        if algorithm != "norm":
            raise MisconfigurationException(
                f"DeepSpeed clips gradients to a norm only: gradient_clip_algorithm={algorithm!r} cannot be used with it."
            )
        self._zero.clip_grad = float(value)  # the engine clips in its step
        return None

    def scale_gradients(self, optimizer: Optimizer, factor: Any) -> None:
        if self.engine is None:
            super().scale_gradients(optimizer, factor)
            return
        from leyden.strategies.zero import scale_gradients  # noqa: PLC0415  # with an engine

        scale_gradients(self._zero, factor)

    def gradients(self) -> dict[str, Tensor]:
        if self.engine is None or self.stage == 1:
            return super().gradients()
        from leyden.strategies.zero import waiting_gradients  # noqa: PLC0415  # with an engine

        return waiting_gradients(self._zero)

    def load_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        if self.engine is None or self.stage == 1:
            super().load_gradients(gradients)
            return
        from leyden.strategies.zero import load_waiting_gradients  # noqa: PLC0415  # with an engine

        load_waiting_gradients(self._zero, gradients)

    def evaluating(self, inference: bool) -> AbstractContextManager[Any]:
        return torch.no_grad() if self.engine is not None else super().evaluating(inference)

    def paced(self, batches: Iterator[tuple[Any, int, int]]) -> Iterator[tuple[Any, int, int]]:
        spread = self.engine is not None and self.stage == 3 and self.world_size > 1
        if not spread:
            return batches
        from leyden.strategies.zero import held_together  # noqa: PLC0415  # with an engine

        # where not all have a batch, the weights are brought together beforehand, on all ranks
        return in_turn(self, batches, lambda: False, lambda: held_together(self.engine))

    # ------------------------------------------------------------------ checkpoints

    def module_state_dict(self) -> dict[str, Any]:
        """The whole weights, in the number format of the module; in host memory on rank 0, without values elsewhere."""
        if self.engine is None:
            return super().module_state_dict()
        from leyden.strategies.zero import whole_weight  # noqa: PLC0415  # with an engine

        before, made = self._before, {}
        state: dict[str, Any] = self.module.state_dict(keep_vars=True)
        for name, value in list(state.items()):
            if isinstance(value, nn.Parameter):
                if self.exclude_frozen_parameters and value not in before.trained:
                    del state[name]
                    continue
                if value not in made:
                    whole = whole_weight(value, value in before.trained).to(before.dtype_of(name, value))
                    made[value] = (
                        whole.to("cpu", copy=True) if self.is_global_zero else torch.empty_like(whole, device="meta")
                    )
                state[name] = made[value]
            elif isinstance(value, Tensor):
                state[name] = value.detach().to("cpu", before.dtype_of(name, value), copy=True)
        return {clean_name(name): value for name, value in state.items()}

    def load_module_state_dict(self, state: dict[str, Any], strict: bool, source: str) -> None:
        """Load weights, also while the engine has the module."""
        if self.engine is None:
            if self.exclude_frozen_parameters:
                frozen = {clean_name(n): p.detach() for n, p in self.module.named_parameters() if not p.requires_grad}
                state = {**{name: value for name, value in frozen.items() if name not in state}, **state}
            super().load_module_state_dict(state, strict, source)
            self._held = state
            return
        from leyden.strategies.zero import gathered  # noqa: PLC0415  # with an engine

        with gathered(self.module.parameters(), writes=True):
            super().load_module_state_dict(state, strict, source)
        self._set_masters(state)

    def _set_masters(self, state: Mapping[str, Any]) -> None:
        """Let the optimizer step on these weights, with all of their digits."""
        from leyden.strategies.zero import set_master  # noqa: PLC0415  # with an engine

        for name, own in self.module.state_dict(keep_vars=True).items():
            value = state.get(clean_name(name))
            if own in self._before.trained and value is not None:
                set_master(own, value)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state of the optimizer, in host memory on rank 0; on other ranks tensors without values."""
        if self.engine is None:
            return super().optimizer_state(optimizer)
        from leyden.strategies.zero import optimizer_state  # noqa: PLC0415  # with an engine

        return optimizer_state(self._zero, self._before, self.is_global_zero)

    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Load the whole state of the optimizer: of any strategy, and of any number of processes."""
        if self.engine is None:
            super().load_optimizer_state(optimizer, state)
            return
        from leyden.strategies.zero import load_optimizer_state  # noqa: PLC0415  # with an engine

        load_optimizer_state(self._zero, self._before, state)
