# SPDX-License-Identifier: Apache-2.0
"""``LightningModule``: what a user writes of a model: its steps, its optimizers, its data and its hooks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from leyden.errors import MisconfigurationException
from leyden.hparams import HyperparametersMixin
from leyden.loading import class_only, load_from_checkpoint
from leyden.module_hooks import DataHooks, ModelHooks
from leyden.optim import LightningOptimizer
from leyden.results import Results
from leyden.runtime.ranks import rank_zero_warn
from leyden.tree import parameters_of
from leyden.types import STEP_OUTPUT, OptimizerLRScheduler, TrainerView
from leyden.vintage import VintageModule

M = TypeVar("M", bound="LightningModule")


class LightningModule(ModelHooks, DataHooks, VintageModule, HyperparametersMixin, nn.Module):
    """A model and everything the Trainer needs to train it.

    Write ``training_step`` and ``configure_optimizers``; everything else is optional. Hooks that are not overridden
    cost nothing. See ``leyden.hooks`` for all hooks and their order.
    """

    CHECKPOINT_HYPER_PARAMS_KEY = "hyper_parameters"
    CHECKPOINT_HYPER_PARAMS_NAME = "hparams_name"
    CHECKPOINT_HYPER_PARAMS_TYPE = "hparams_type"
    _compiled: tuple[str, ...] = ()
    """What a compiled run has put on the instance."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._trainer_ref: Callable[[], TrainerView | None] | None = None
        self._fabric: Any = None
        self._fabric_optimizers: list[Any] = []
        self._results: Results | None = None
        self._example_input_array: Any = None
        self._automatic_optimization = True
        self._strict_loading: bool | None = None
        self._toggled: dict[nn.Parameter, bool] = {}

    # ------------------------------------------------------------------ attachment

    @property
    def trainer(self) -> Any:
        """The Trainer that runs this module.

        Raises:
            RuntimeError: when there is none.
        """
        trainer = self._trainer_ref() if self._trainer_ref is not None else None
        if trainer is None and self._fabric is not None:
            return self._fabric  # ranks, device, loggers and the exchanges have the same names there
        if trainer is None:
            raise RuntimeError(
                f"{type(self).__name__} is not attached to a Trainer: self.trainer can be read while fit, validate, test"
                " or predict runs, and afterwards as long as the Trainer lives."
            )
        return trainer

    @trainer.setter
    def trainer(self, trainer: TrainerView | None) -> None:
        # weak: a module never keeps its trainer alive, so both are freed as soon as the user lets go of them
        self._trainer_ref = None if trainer is None else weakref.ref(trainer)
        for child in self.children():
            if isinstance(child, LightningModule):
                child.trainer = trainer

    @property
    def attached(self) -> bool:
        """Whether a living Trainer runs, or ran, this module."""
        return self._trainer_ref is not None and self._trainer_ref() is not None

    def log_into(self, results: Results | None) -> None:
        """Say where ``self.log`` stores its values; the Trainer calls this at the start and the end of a run."""
        self._results = results
        for child in self.children():
            if isinstance(child, LightningModule):
                child.log_into(results)

    @property
    def results_of_run(self) -> Results | None:
        """Where ``self.log`` stores its values now; None outside of a run."""
        return self._results

    def __getstate__(self) -> dict[str, Any]:
        # what a run has put on the instance belongs to the run
        lent = (*self._adapted, *self._compiled)
        state = {name: value for name, value in self.__dict__.items() if name not in lent}
        state["_trainer_ref"] = state["_results"] = state["_fabric"] = None
        state["_fabric_optimizers"] = []
        return state

    @property
    def fabric(self) -> Any:
        """The Fabric that drives this module in a hand-written loop; None if there is none."""
        return self._fabric

    @fabric.setter
    def fabric(self, fabric: Any) -> None:
        self._fabric = fabric
        for child in self.children():
            if isinstance(child, LightningModule):
                child.fabric = fabric

    # ------------------------------------------------------------------ where things stand

    @property
    def device(self) -> torch.device:
        """The device of the first parameter or buffer; without any, the one the Trainer uses, else the CPU."""
        for tensor in self._tensors():
            return tensor.device
        return self.trainer.strategy.root_device if self.attached else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point parameter or buffer; without any, torch's default."""
        for tensor in self._tensors():
            if tensor.is_floating_point():
                return tensor.dtype
        return torch.get_default_dtype()

    @dtype.setter
    def dtype(self, new_dtype: Any) -> None:
        raise RuntimeError(f"dtype cannot be set to {new_dtype!r}: call module.to({new_dtype!r}).")

    def _tensors(self) -> Iterator[Tensor]:
        yield from self.parameters()
        yield from self.buffers()
        for child in self.modules():  # of a copy that torch has made for one of several GPUs
            yield from vars(child).get("_former_parameters", {}).values()

    @property
    def example_input_array(self) -> Any:
        """A batch for ``forward`` (tensor, tuple or dict); with it the summary shows sizes and loggers draw the graph."""
        return self._example_input_array

    @example_input_array.setter
    def example_input_array(self, example: Any) -> None:
        self._example_input_array = example

    @property
    def current_epoch(self) -> int:
        """Epochs completed; 0 when no Trainer is attached."""
        return int(self.trainer.current_epoch) if self.attached else 0

    @property
    def global_step(self) -> int:
        """Updates of the model so far; 0 when no Trainer is attached."""
        return int(self.trainer.global_step) if self.attached else 0

    @property
    def global_rank(self) -> int:
        """Index of this process among all; 0 when no Trainer is attached."""
        return int(self.trainer.global_rank) if self.attached or self._fabric is not None else 0

    @property
    def local_rank(self) -> int:
        """Index of this process on its node; 0 when no Trainer is attached."""
        return int(self.trainer.local_rank) if self.attached or self._fabric is not None else 0

    @property
    def on_gpu(self) -> bool:
        """Whether the module is on a CUDA device."""
        return self.device.type == "cuda"

    @property
    def device_mesh(self) -> Any:
        """The mesh of devices of a model-parallel strategy; None for any other."""
        return getattr(self.trainer.strategy, "device_mesh", None)

    @property
    def automatic_optimization(self) -> bool:
        """Whether the Trainer runs backward and the optimizers; False hands both to ``training_step``."""
        return self._automatic_optimization

    @automatic_optimization.setter
    def automatic_optimization(self, automatic: bool) -> None:
        self._automatic_optimization = automatic

    @property
    def strict_loading(self) -> bool:
        """Whether the keys of a checkpoint must match this module's exactly."""
        return True if self._strict_loading is None else self._strict_loading

    @strict_loading.setter
    def strict_loading(self, strict: bool) -> None:
        self._strict_loading = strict

    @property
    def logger(self) -> Any:
        """The first logger of the Trainer, or of Fabric; None if there is none."""
        return self.trainer.logger if self.attached else next(iter(self.loggers), None)

    @property
    def loggers(self) -> list[Any]:
        """All loggers of the Trainer, or of Fabric."""
        return list(self.trainer.loggers) if self.attached or self._fabric is not None else []

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on rank 0 only, without disturbing the progress bar."""
        if self.attached or self._fabric is not None:
            self.trainer.print(*args, **kwargs)
        else:
            print(*args, **kwargs)

    # ------------------------------------------------------------------ steps

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Same as ``torch.nn.Module.forward``."""
        return super().forward(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """``training_step(batch, batch_idx)``: return the loss, a dict with the key ``"loss"``, or None to skip the batch.

        ``batch_idx`` may be left out. Under manual optimization any dict or None may be returned. With several
        optimizers under automatic optimization all step on the one loss; return a list of losses for one loss each
        (None in it leaves an optimizer out), or take the argument ``optimizer_idx`` for one call each. Where batches
        of one window of accumulation differ in size, return ``{"loss": mean, "num_items": n}``: the update is then
        that of the mean over all items.
        """
        raise self._no_step("training_step", "fit")

    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """``validation_step(batch, batch_idx, dataloader_idx=0)``: log what should be known of a validation batch."""
        raise self._no_step("validation_step", "validate")

    def test_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """``test_step(batch, batch_idx, dataloader_idx=0)``: log what should be known of a test batch."""
        raise self._no_step("test_step", "test")

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """``predict_step(batch, batch_idx, dataloader_idx=0)``: return the predictions; by default ``self(batch)``."""
        return self(kwargs.get("batch", args[0] if args else None))

    def _no_step(self, name: str, entry: str) -> MisconfigurationException:
        return MisconfigurationException(f"{type(self).__name__} has no {name}(): Trainer.{entry}() needs it.")

    def configure_callbacks(self) -> Any:
        """Return a callback or a list of them; they replace those of the same type given to the Trainer."""
        return []

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizers and schedulers, in any of the forms that ``leyden.optim.normalize`` takes."""
        raise MisconfigurationException(
            f"{type(self).__name__} has no configure_optimizers(): return an optimizer there, for example"
            " torch.optim.Adam(self.parameters(), lr=1e-3); or None to train without one."
        )

    # ------------------------------------------------------------------ logging

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str | Callable[..., Any] = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Log one value; it is copied, and read back only when a row is due.

        Args:
            name: The key in loggers, progress bar and ``trainer.callback_metrics``.
            value: A number, a tensor with one element, or a metric object (recognised by its methods).
            prog_bar: Also show it on the progress bar.
            logger: Send it to the loggers; None means True.
            on_step: Log the value of each step. None: True in training, else False.
            on_epoch: Log the reduction over the epoch. None: False in training, else True. With both, the keys are
                ``name_step`` and ``name_epoch``.
            reduce_fx: ``"mean"`` (weighted by the batch size), ``"sum"``, ``"min"`` or ``"max"`` over the epoch.
            enable_graph: Keep the autograd graph of the value.
            sync_dist: Also reduce the per-step value over devices. Epoch values always are.
            sync_dist_group: The process group for that.
            add_dataloader_idx: With several evaluation loaders, append ``/dataloader_idx_N``.
            batch_size: Samples behind the value; None reads it off the batch.
            metric_attribute: Accepted; a metric object is found without it.
            rank_zero_only: Only rank 0 has the value.

        Raises:
            MisconfigurationException: where logging means nothing (the message says where it does).
            ValueError: for a value that is not a single number.
        """
        store = self._results.active if self._results is not None else None
        if store is None:
            self._log_elsewhere(name, value, logger is not False)
        else:
            store.log(
                name, value, prog_bar, logger, on_step, on_epoch, reduce_fx, add_dataloader_idx, batch_size,
                (enable_graph, sync_dist, sync_dist_group, metric_attribute, rank_zero_only),
            )  # fmt: skip

    def log_dict(
        self,
        dictionary: Mapping[str, Any],
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str | Callable[..., Any] = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Log each entry of a dict, or each metric of a collection of metrics; the arguments are those of ``log``."""
        entries: Any = dictionary
        try:
            # a collection of metrics gives its parts as they are, not copies of their state
            items = entries.items(keep_base=False, copy_state=False)
        except TypeError:
            items = entries.items()
        for name, value in items:
            self.log(
                name, value, prog_bar, logger, on_step, on_epoch, reduce_fx, enable_graph, sync_dist, sync_dist_group,
                add_dataloader_idx, batch_size, None, rank_zero_only,
            )  # fmt: skip

    def _log_elsewhere(self, name: str, value: Any, to_loggers: bool) -> None:
        if self._fabric is not None:
            if to_loggers:
                self._fabric.log(name, value)
            return
        if torch.compiler.is_dynamo_compiling() and self._results is None:
            return  # somebody looks at what torch makes of a step: saying something would break the graph
        if not self.attached:
            rank_zero_warn(
                f"self.log({name!r}, ...) was called without a Trainer (the `self.trainer` reference is not"
                " registered); the value is dropped. It works while fit,"
                " validate or test runs."
            )
        elif self.trainer.barebones:
            rank_zero_warn(f"self.log({name!r}, ...) does nothing under Trainer(barebones=True).")
        else:
            raise MisconfigurationException(
                f"self.log({name!r}, ...) is not possible here: no training, validation or test loop is running. Log in"
                " a step, a batch hook or an epoch hook (predict has no logging), or call"
                " self.logger.log_metrics({...}) directly."
            )

    # ------------------------------------------------------------------ optimization

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """Return the optimizer, or the list of optimizers if there are several.

        Args:
            use_pl_optimizer: Wrapped, so that ``step`` runs the Trainer's hooks, precision and counters (default), or
                as ``configure_optimizers`` returned them. Under Fabric: as ``setup`` returned them, or was given them.
        """
        if self._fabric is not None and not self.attached:
            ours = [one if use_pl_optimizer else one.optimizer for one in self._fabric_optimizers]
            return ours[0] if len(ours) == 1 else ours
        strategy = self.trainer.strategy
        found = strategy.lightning_optimizers if use_pl_optimizer else strategy.optimizers
        return found[0] if len(found) == 1 else list(found)

    def lr_schedulers(self) -> Any:
        """Return the scheduler, the list of schedulers, or None; step them yourself under manual optimization."""
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        if not schedulers:
            return None
        return schedulers[0] if len(schedulers) == 1 else schedulers

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run backward under manual optimization, with loss scaling and the backward hooks.

        Raises:
            MisconfigurationException: under automatic optimization.
        """
        if self._fabric is not None:
            self._fabric.backward(loss, *args, **kwargs)
            return
        if self.automatic_optimization:
            raise MisconfigurationException(
                "manual_backward() is for manual optimization: set self.automatic_optimization = False in __init__."
            )
        self.trainer.strategy.manual_backward(loss, *args, **kwargs)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute the gradients of ``loss``; override to do it your own way."""
        if self._fabric is not None:
            self._fabric.backward(loss, *args, **kwargs)
        else:
            loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]

    def toggle_optimizer(self, optimizer: Optimizer | LightningOptimizer) -> None:
        """Make only the parameters of ``optimizer`` require gradients, until ``untoggle_optimizer``."""
        own = set(map(id, parameters_of(optimizer)))
        for other in self.trainer.strategy.optimizers:
            for group in other.param_groups:
                for parameter in group["params"]:
                    if id(parameter) not in own and parameter not in self._toggled:
                        self._toggled[parameter] = parameter.requires_grad
                        parameter.requires_grad = False
        self.trainer.strategy.toggled()

    def untoggle_optimizer(self, optimizer: Optimizer | LightningOptimizer) -> None:
        """Give back what ``toggle_optimizer`` took."""
        for parameter, required in self._toggled.items():
            parameter.requires_grad = required
        self._toggled = {}
        self.trainer.strategy.toggled()

    @contextmanager
    def toggled_optimizer(self, optimizer: Optimizer | LightningOptimizer) -> Iterator[None]:
        """``toggle_optimizer`` for the length of a ``with`` block."""
        self.toggle_optimizer(optimizer)
        try:
            yield
        finally:
            self.untoggle_optimizer(optimizer)

    def clip_gradients(
        self,
        optimizer: Optimizer | LightningOptimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of the parameters of ``optimizer``, after unscaling them where they are scaled.

        Args:
            optimizer: Whose parameters.
            gradient_clip_val: Largest norm or absolute value; None takes the Trainer's.
            gradient_clip_algorithm: ``"norm"`` or ``"value"``; None takes the Trainer's, else ``"norm"``.
        """
        config = self.trainer.config
        value = config.gradient_clip_val if gradient_clip_val is None else gradient_clip_val
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"clip_gradients(gradient_clip_val={value!r}): it must be an int or a float.")
        algorithm = gradient_clip_algorithm or config.gradient_clip_algorithm or "norm"
        raw = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        self.trainer.strategy.clip_gradients(raw, value, str(getattr(algorithm, "value", algorithm)).lower())

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Called before each optimizer step with the Trainer's values; override to clip your own way."""
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Take one optimizer step; an override must call ``optimizer.step(closure=optimizer_closure)``.

        The closure runs the training step, zero_grad and backward.
        """
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Clear the gradients of ``optimizer``."""
        optimizer.zero_grad()

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step one scheduler; ``metric`` is the value of its monitor, or None."""
        if metric is None:
            scheduler.step()
        else:
            scheduler.step(metric)

    # ------------------------------------------------------------------ checkpoints and export

    @class_only
    def load_from_checkpoint(
        cls: type[M],
        checkpoint_path: str | Path | IO[bytes],
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> M:
        """Build a module from a checkpoint: its constructor arguments and its weights.

        Args:
            checkpoint_path: File of a Leyden or Lightning run.
            map_location: Where to put tensors, as in ``torch.load``.
            hparams_file: A ``hparams.yaml`` or ``meta_tags.csv`` whose values win over those in the file.
            strict: Whether all keys must match; None takes the module's ``strict_loading``.
            weights_only: None or True never runs code from the file; False opens pickled values: only for files you
                trust.
            **kwargs: Constructor arguments that win over all others.

        Raises:
            CheckpointError: the file is missing, damaged, or does not fit this class; the message says how.
        """
        loaded = load_from_checkpoint(cls, checkpoint_path, map_location, hparams_file, strict, weights_only, kwargs)
        return cast("M", loaded)

    def freeze(self: M) -> M:
        """Stop training: no parameter requires a gradient, eval mode. Returns the module."""
        for parameter in self.parameters():
            parameter.requires_grad = False
        return self.eval()

    def unfreeze(self: M) -> M:
        """Undo ``freeze``: every parameter requires a gradient, train mode. Returns the module."""
        for parameter in self.parameters():
            parameter.requires_grad = True
        return self.train()

    def all_gather(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """Gather tensors from all processes: each gets a leading dimension of size world_size if there are several."""
        return self.trainer.strategy.all_gather(data, group=group, sync_grads=sync_grads)

    def to_onnx(self, file_path: Any = None, input_sample: Any = None, **kwargs: Any) -> Any:
        """Write the module in the ONNX format; see :func:`leyden.export.to_onnx`."""
        from leyden import export  # noqa: PLC0415  # only who exports

        return export.to_onnx(self, file_path, input_sample, **kwargs)

    def to_torchscript(
        self, file_path: Any = None, method: str | None = "script", example_inputs: Any = None, **kwargs: Any
    ) -> Any:
        """Compile the module to TorchScript, which torch has retired; see :func:`leyden.export.to_torchscript`."""
        from leyden import export  # noqa: PLC0415  # only who exports

        return export.to_torchscript(self, file_path, method, example_inputs, **kwargs)

    def to_tensorrt(
        self, file_path: Any = None, input_sample: Any = None, ir: str = "default",
        output_format: str = "exported_program", retrace: bool = False, default_device: Any = "cuda",
        **compile_kwargs: Any,
    ) -> Any:  # fmt: skip
        """Compile the module for NVIDIA GPUs; see :func:`leyden.export.to_tensorrt`."""
        from leyden import export  # noqa: PLC0415  # only who exports

        return export.to_tensorrt(
            self, file_path, input_sample, ir, output_format, retrace, default_device, **compile_kwargs
        )


# torch.jit.script would compile them: they are of a run
LightningModule.__jit_unused_properties__ = [
    name for cls in LightningModule.__mro__ for name, value in vars(cls).items() if isinstance(value, property)
]
