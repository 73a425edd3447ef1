# SPDX-License-Identifier: Apache-2.0
"""Several processes, each with a share of the data and a share of every weight: torch's fully_shard, by a policy.

A layer's weights are brought together right before it runs and let go of right after; gradients are averaged and shared
out while they are computed; the optimizer works on this process's share. The module needs no code for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from leyden.errors import MisconfigurationException
from leyden.precision import Precision
from leyden.precision.base import TruePrecision
from leyden.runtime.ranks import rank_zero_warn
from leyden.strategies import fsdp_arguments as arguments
from leyden.strategies import fully_sharded, units
from leyden.strategies.mesh import DATA, MeshStrategy, local, rebuilt
from leyden.strategies.root import ROOT, Entered, Gap, Root, uncalled
from leyden.tree import leaves, tree_map

REPLICATE = "replicate"


class FSDPStrategy(MeshStrategy):
    """Trains on several devices, each of which keeps a share of the weights, the gradients and the optimizer's state.

    ::

        Trainer(devices=8, strategy="fsdp")
        Trainer(devices=8, strategy=FSDPStrategy(auto_wrap_policy={Block}, activation_checkpointing_policy={Block}))

    Args:
        accelerator: Accepted for compatibility.
        parallel_devices: One device for each process of this machine; None takes the Trainer's.
        cluster_environment: Accepted for compatibility.
        checkpoint_io: As in the base class.
        precision_plugin: The number format; None is the Trainer's.
        process_group_backend: torch's name for how tensors travel; None is NCCL for GPUs and Gloo for CPUs.
        timeout: After how long an exchange that not all ranks take part in is an error.
        cpu_offload: Keep weights, gradients and the optimizer's state in host memory, and bring weights to the GPU layer
            by layer. On CPUs they are there.
        mixed_precision: A ``MixedPrecisionPolicy`` (or torch's older ``MixedPrecision``) that says in which numbers weights
            travel and gradients are summed up. None follows the Trainer's precision, with the numbers of one process.
        auto_wrap_policy: Which layers have an exchange of their own: a set of classes, a function of a layer, or one of
            ``torch.distributed.fsdp.wrap``. None: the blocks that repeat, and whatever else is large.
        activation_checkpointing: The former name of ``activation_checkpointing_policy``.
        activation_checkpointing_policy: Which layers compute their activations again in backward rather than keep them: a
            set of classes or a function of a layer.
        sharding_strategy: ``"FULL_SHARD"``; ``"SHARD_GRAD_OP"`` keeps weights together between forward and backward;
            ``"HYBRID_SHARD"`` shares out within a machine and has a copy on each; ``"NO_SHARD"`` keeps all on each process.
        state_dict_type: ``"full"``: a checkpoint is one file, as of one process. ``"sharded"``: a folder, to which each
            process writes its share.
        device_mesh: For ``"HYBRID_SHARD"``, how many copies and over how many processes each is spread, as in ``(2, 4)``;
            or a DeviceMesh of two dimensions.
        start_method, hang_timeout, uneven: As for DDPStrategy.
        find_unused_parameters: Parameters may take part in the loss on some ranks only; where they do not, they count with
            gradients of 0. Needs torch 2.10.
        **kwargs: ``ignored_modules`` or ``ignored_states``: layers, or parameters, that every process keeps whole.

    Raises:
        MisconfigurationException: for an argument that is unknown, or a value that is not possible.
    """

    strategy_name = "fsdp"

    def __init__(
        self,
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30),
        cpu_offload: Any = None,
        mixed_precision: Any = None,
        auto_wrap_policy: units.Policy = None,
        activation_checkpointing: Any = None,
        activation_checkpointing_policy: units.Policy = None,
        sharding_strategy: Any = "FULL_SHARD",
        state_dict_type: str = "full",
        device_mesh: Any = None,
        start_method: Any = "popen",
        find_unused_parameters: bool = False,
        hang_timeout: timedelta | None = None,
        uneven: str = "stop",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            parallel_devices, precision_plugin, checkpoint_io, process_group_backend, timeout, start_method,
            cluster_environment, hang_timeout, uneven,
        )  # fmt: skip
        self._ignored = arguments.read_kwargs(kwargs)
        self.find_unused_parameters = find_unused_parameters
        self.cpu_offload = bool(getattr(cpu_offload, "offload_params", cpu_offload))
        self.mixed_precision = arguments.read_mixed_precision(mixed_precision)
        self.auto_wrap_policy = auto_wrap_policy
        if find_unused_parameters and not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
            raise MisconfigurationException(
                f"FSDPStrategy(find_unused_parameters=True) needs a newer torch than {torch.__version__}: leave it out, and let"
                " all parameters take part in the loss on all ranks, or on none."
            )
        units.find(nn.Module(), auto_wrap_policy)  # says what is wrong with it
        if activation_checkpointing is not None and activation_checkpointing_policy is not None:
            raise MisconfigurationException(
                "FSDPStrategy(activation_checkpointing=..., activation_checkpointing_policy=...): both say the same. Give"
                " the second only."
            )
        self.activation_checkpointing_policy = (
            activation_checkpointing if activation_checkpointing_policy is None else activation_checkpointing_policy
        )
        if self.activation_checkpointing_policy is not None:
            units.matching(nn.Module(), self.activation_checkpointing_policy, "activation_checkpointing_policy")
        self.sharding_strategy = arguments.one_of(
            "sharding_strategy", getattr(sharding_strategy, "name", sharding_strategy), arguments.STRATEGIES
        )
        self.state_dict_type = arguments.one_of("state_dict_type", state_dict_type, arguments.STATE_DICT_TYPES)
        self.saves_shards = self.state_dict_type == "sharded"
        self._given_mesh = arguments.read_mesh(device_mesh, self.sharding_strategy)
        self._root: Any = None
        """What a step runs in, which brings the weights together that belong to no sharded layer."""
        self._gap: Gap | None = None
        self._loop: Any = None
        self._by_hand = False
        """Whether training_step runs backward itself."""
        self._exchanging = True
        """Whether gradients are exchanged while they are computed; not inside a window of accumulation."""
        self._pending = False
        """Whether there are gradients of a window that have not been exchanged."""
        self._tape: list[Any] | None = None
        """The outputs of layers in the training step that runs."""
        self._order: list[Any] = []
        """The sharded layers in the order in which the step that ran last has called them; None where a call ended."""
        self._learned: list[Any] = []
        """The same of the training step that ran last, or of an evaluation before the first."""
        self._knows = False
        """Whether a step of the evaluation that runs has told the order."""
        self._held_together = False
        """Whether the next step of an evaluation has all weights together already."""
        self._reshards = self.sharding_strategy in ("FULL_SHARD", "HYBRID_SHARD")
        """Whether the weights of a layer are let go of after its forward."""
        self._recomputed: list[tuple[nn.Module, Any]] = []

    # ------------------------------------------------------------------ who and where

    def mesh_shape(self) -> dict[str, int]:
        given = self._given_mesh
        if isinstance(given, tuple):
            return {REPLICATE: given[0], DATA: given[1]}
        if self.sharding_strategy == "NO_SHARD":
            return {REPLICATE: self.world_size, DATA: 1}
        if "HYBRID" in self.sharding_strategy:
            return {REPLICATE: self.num_nodes, DATA: self.world_size // self.num_nodes}
        return {DATA: self.world_size}

    def make_mesh(self) -> DeviceMesh:
        return self._given_mesh if isinstance(self._given_mesh, DeviceMesh) else super().make_mesh()

    def data_mesh(self) -> DeviceMesh:
        """The dimensions of the mesh over which parameters are sharded, or have a copy."""
        return self.device_mesh

    # ------------------------------------------------------------------ the life of a module

    def setup(self, trainer: Any = None) -> None:
        super().setup(trainer)
        self._own_scaler()

    def setup_module(self, module: nn.Module) -> nn.Module:
        self._own_scaler()
        return self.entered(super().setup_module(module))

    def entered(self, module: nn.Module) -> nn.Module:
        """Return what a loop of the user's own calls in the place of a module that is spread."""
        return Entered(module) if ROOT in vars(module) else module

    def _own_scaler(self) -> None:
        """Let the scaler of ``"16-mixed"`` look at the gradients of all processes."""
        scaler = getattr(self.precision, "scaler", None)
        if type(scaler) is torch.amp.GradScaler:
            from leyden.strategies.scaler import ShardedScaler  # noqa: PLC0415  # for "16-mixed"

            self.precision.scaler = ShardedScaler.instead_of(scaler)  # type: ignore[attr-defined]

    def distribute(self, fitting: bool) -> None:
        super().distribute(fitting)
        self._begin()

    def spread(self, module: nn.Module, fitting: bool) -> None:
        fully_sharded.import_compiler()
        chosen = {id(layer) for layer in units.find(module, self.auto_wrap_policy)}
        if self.activation_checkpointing_policy is not None:
            self._recompute(
                units.matching(module, self.activation_checkpointing_policy, "activation_checkpointing_policy")
            )
        policy = self._numbers()
        shard = partial(
            fully_shard,
            mesh=self.data_mesh(),
            reshard_after_forward=None if self._reshards else False,
            mp_policy=policy,
            offload_policy=CPUOffloadPolicy() if self.cpu_offload and self._on_gpu else OffloadPolicy(),
        )
        _make_contiguous(module)
        ties = units.Ties(module)
        for layer in units.inner_first(module):
            units.initialise(layer, self.root_device, filled=self._held is not None)
            ties.tie(layer)
            if id(layer) in chosen:
                shard(layer, ignored_params=self._whole_on_each(module))
        if any(True for _ in module.parameters()):
            # the batch is cast, if at all, before the call: what the loss is computed with as well
            root_policy = MixedPrecisionPolicy(policy.param_dtype, policy.reduce_dtype, policy.output_dtype, False)
            self.stand_around(module, partial(shard, mp_policy=root_policy), self._whole_on_each(module))

    def stand_around(self, module: nn.Module, shard: Callable[..., Any], ignored: set[nn.Parameter]) -> None:
        """Let steps run in what ``shard`` makes of a layer around ``module``."""
        vars(module)[ROOT] = shard(Root(module), ignored_params=ignored)

    def _whole_on_each(self, module: nn.Module) -> set[nn.Parameter]:
        ignored: list[nn.Parameter] = []
        for item in self._ignored:
            ignored += item.parameters() if isinstance(item, nn.Module) else [item]
        return {p for p in units.plain(module, ignored) if not isinstance(p, DTensor)}

    def _numbers(self) -> MixedPrecisionPolicy:
        """In which numbers weights travel and gradients are summed up."""
        if self.mixed_precision is not None:
            return self.mixed_precision
        # autocast casts weights where one process does; what is in 16 bits for good is summed up in 32
        halves = isinstance(self.precision, TruePrecision) and self.precision.dtype.itemsize < 4
        return MixedPrecisionPolicy(reduce_dtype=torch.float32 if halves else None)

    @property
    def _on_gpu(self) -> bool:
        return self.root_device.type == "cuda"

    def _begin(self) -> None:
        """Stand on the module for the length of the run."""
        module: Any = self.module
        self._root = root = vars(module).get(ROOT)
        if root is None:
            return  # it has no parameters
        root.let_be()
        if self._begun:  # a loop of the user's own goes through Entered, and asks for none of what follows
            with torch.no_grad():
                root(lambda: None)
            root.reshard()
            return
        untraced: Any = torch.compiler.disable  # like torch's own hooks, where steps are compiled
        note_call, note_output = untraced(self._note_call), untraced(self._note_output)
        self._gap = gap = Gap(untraced(root.unshard))
        for layer in self._layers():
            root.handles.append(layer.register_forward_pre_hook(note_call))
            root.handles.append(layer.register_forward_hook(note_output))
        if self.find_unused_parameters:
            root.set_reduce_scatter_unused_params(True)
        # what is called by itself, in a hook or after a backward by hand, finds its weights as well
        owners = {part._module_info.module for part in fully_sharded.own_parts(root)}  # noqa: SLF001  # torch does not tell
        for owner in (module, *(owners - {module})):
            root.handles.append(owner.register_forward_pre_hook(gap.before_call))
        # the first call makes this the root: it must not be one of the layers, called in some hook
        with torch.no_grad():
            self._call(lambda: None)
        root.reshard()

    def accompany(self, loop: Any, automatic: bool) -> None:
        self._loop, self._by_hand = loop, not automatic
        self._exchange(True)
        self._pending = False

    def unspread(self, module: nn.Module) -> None:
        root = vars(module).pop(ROOT, None)
        if root is not None:
            root.let_be()
            fully_sharded.come_apart(root)
            fully_sharded.take_off(root)
        super().unspread(module)
        for layer, former in self._recomputed:
            vars(layer).pop("forward", None)
            if former is not None:
                vars(layer)["forward"] = former
        self._recomputed = []

    def come_home(self) -> None:
        super().come_home()
        self._loop, self._tape, self._order, self._learned = None, None, [], []
        self._by_hand = self._pending = False
        if self._root is not None and vars(self.module).get(ROOT) is None:
            self._root = self._gap = None

    def _recompute(self, layers: list[nn.Module]) -> None:
        for layer in layers:
            self._recomputed.append((layer, vars(layer).get("forward")))
            vars(layer)["forward"] = partial(_recomputing, layer.forward)

    # ------------------------------------------------------------------ steps

    def _call(self, step: Callable[..., Any], *args: Any) -> Any:
        """Run ``step`` inside a call of the module, where the weights that belong to no layer are brought together."""
        root, gap = self._root, self._gap
        if root is None or gap is None:
            return step(*args)
        gap.open = self._by_hand
        try:
            return root(partial(step, *args))
        except RuntimeError as error:
            if "mixed torch.Tensor and DTensor" in str(error):
                raise uncalled(error) from error
            raise
        finally:
            gap.open = True

    def _cast(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        policy = self.mixed_precision
        if policy is None or policy.param_dtype is None or not policy.cast_forward_inputs:
            return args
        dtype = policy.param_dtype
        cast: tuple[Any, ...] = tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, args)
        return cast

    def training_step(self, *args: Any) -> Any:
        return super().training_step(*args) if self._root is None else self._run(self._learning, self._cast(args))

    def why_no_join(self) -> str | None:
        return self.statistics_need_all()

    def idle_step(self) -> None:
        if self._root is None or self._by_hand or self._alone or self.world_size == 1:
            return
        self.backward(self._run(self._nothing, ()))

    def _run(self, step: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        exchanging = self._by_hand or self._loop.steps
        if exchanging is not self._exchanging:
            self._exchange(exchanging)
        self._tape, self._order = [], []
        try:
            with self.precision.train_step_context():
                output = self._call(step, *args)
        finally:
            self._tape = None
        self._pending, self._learned = not exchanging, self._order or self._learned
        return output

    def _learning(self, *args: Any) -> Any:
        output = self.module.training_step(*args)
        if self._by_hand or self.world_size == 1:
            return output
        if output is None or (isinstance(output, Mapping) and output.get("loss", 0) is None):
            rank_zero_warn(
                "training_step() returned None: with several processes the batch counts with gradients of 0, so that the"
                " other ranks get theirs."
            )
            return self._nothing()
        return output

    def validation_step(self, *args: Any) -> Any:
        return self._evaluate("validation_step", args)

    def test_step(self, *args: Any) -> Any:
        return self._evaluate("test_step", args)

    def predict_step(self, *args: Any) -> Any:
        return self._evaluate("predict_step", args)

    def _evaluate(self, name: str, args: tuple[Any, ...]) -> Any:
        self._order, self._knows = [], True
        with self.precision.step_context(name):
            output = self._call(getattr(self.module, name), *self._cast(args))
        self._learned = self._learned or self._order
        self._let_go()
        return output

    def _let_go(self) -> None:
        """Leave each process with its share of the weights, also of those that a step has kept together."""
        if self._root is not None:
            for layer in fully_sharded.sharded_layers(self._root):
                layer.reshard()
        if self._held_together:
            self._held_together = False
            for layer in self._layers():
                layer.set_reshard_after_forward(self._reshards, recurse=False)

    def _note_call(self, layer: Any, _args: Any) -> None:
        self._order.append(layer)
        if self._gap is not None and self._gap.open:
            self._gap.used = True

    def _note_output(self, _layer: Any, _args: Any, output: Any) -> None:
        self._order.append(None)
        if self._tape is not None and not self._by_hand and torch.is_grad_enabled():
            self._tape.append(output)

    # ------------------------------------------------------------------ gradients

    def _exchange(self, exchanging: bool) -> None:
        self._exchanging = exchanging
        if self._root is not None:
            self._root.set_requires_gradient_sync(exchanging)

    def join_backward(self, loss: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Prepare what ``loss.backward(**kwargs)`` is to be called on; runs before each backward."""
        if self._root is None:
            return loss, kwargs
        if isinstance(loss, DTensor) and DATA in (loss.device_mesh.mesh_dim_names or ()):
            raise uncalled("The loss has been computed from weights of which each process has a share.")
        if kwargs.get("inputs") is not None:
            twins = {id(part.sharded_param): fully_sharded.twin(part) for part in fully_sharded.parts(self._root)}
            kwargs = {
                **kwargs,
                "inputs": [found for p in kwargs["inputs"] if (found := twins.get(id(p), p)) is not None],
            }
        if self._by_hand:
            # backward is to find the module's own hooks; no argument, which torch would take for its input
            loss = self._call(loss.clone)
        return loss, kwargs

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss, kwargs = self.join_backward(loss, kwargs)
        super().backward(loss, *args, **kwargs)

    def exchange_gradients(self, optimizer: Optimizer) -> None:
        self.flush()
        super().exchange_gradients(optimizer)

    def flush(self) -> None:
        """Exchange the gradients that a window of accumulation, or a backward by hand, has left waiting."""
        waits = self._pending or (self._by_hand and self._root is not None and self._left_over())
        if waits and not self._alone:
            self._flush()

    def _left_over(self) -> bool:
        """Whether backward was called in a way that the module has not noticed."""
        return any(fully_sharded.waiting(part) is not None for part in fully_sharded.own_parts(self._root))

    def _flush(self) -> None:
        """Exchange the gradients that are waiting."""
        self._pending = False
        self._exchange(True)
        with torch.enable_grad():
            loss = self._call(torch.zeros((), device=self.root_device, requires_grad=True).clone)
        loss.backward()

    def clip_gradients(self, optimizer: Optimizer, value: float, algorithm: str) -> Tensor | None:
        if self._by_hand:
            self.exchange_gradients(optimizer)  # else that has been done
        return super().clip_gradients(optimizer, value, algorithm)

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any] | None = None, model: Any = None, **kwargs: Any
    ) -> Any:
        result = super().optimizer_step(optimizer, closure, **kwargs)
        if self._gap is not None and self._gap.used:
            self._gap.used = False
            self._let_go()  # what has been brought together since backward is out of date
        return result

    def toggled(self) -> None:
        if self._root is not None:
            fully_sharded.follow_requires_grad(self._root)

    def _nothing(self) -> Tensor:
        """A loss whose gradients are 0: the batch of a rank that skips it, so that the others need not wait."""
        if not self._tape and self._layers():
            return self._ghost()
        outputs = [tensor for tensor in leaves(self._tape) if isinstance(tensor, Tensor) and tensor.requires_grad]
        return _zero(outputs) + _zero(self._own_parameters(self._root))

    def _layers(self) -> list[Any]:
        """The layers that are sharded each by itself, outer ones first."""
        return fully_sharded.sharded_layers(self._root)[1:]

    @staticmethod
    def _own_parameters(layer: Any) -> list[Any]:
        whole = [fully_sharded.twin(part) for part in fully_sharded.own_parts(layer)]
        return [parameter for parameter in whole if parameter is not None and parameter.requires_grad]

    def _ghost(self) -> Tensor:
        """Take part in a training step of the others without a batch: each layer adds nothing, and has gradients of 0.

        Layers are called as in this rank's last step, for each call is an exchange; before it has run any, in their order.
        """
        calls = self._learned or [each for layer in self._layers() for each in (layer, None)]
        return self._repeat(iter(calls), _zero(self._own_parameters(self._root)))

    def _repeat(self, calls: Iterator[Any], total: Tensor) -> Tensor:
        """Repeat ``calls`` of layers, those inside of each as well, up to the end of the one that is running."""
        for layer in calls:
            if layer is None:
                break

            def inside(tensor: Tensor, layer: Any = layer) -> Tensor:
                return self._repeat(calls, tensor) + _zero(self._own_parameters(layer))

            with _standing_in(layer, inside):
                total = layer(total)
        return total

    # ------------------------------------------------------------------ evaluations

    def paced(self, batches: Iterator[tuple[Any, int, int]]) -> Iterator[tuple[Any, int, int]]:
        self._knows = False
        return super().paced(batches) if self._root is not None else batches

    def knows_the_step(self) -> bool:
        return self._knows

    def hold_together(self) -> None:
        for layer in fully_sharded.sharded_layers(self._root):
            layer.unshard()
            if self._reshards:
                layer.set_reshard_after_forward(False, recurse=False)
        self._held_together = True

    def keep_up(self) -> None:
        if not self._held_together:
            self._root.unshard()
            for layer in (each for each in self._order if each is not None):
                layer.unshard()
                if self._reshards:
                    layer.reshard()
        self._let_go()

    # ------------------------------------------------------------------ checkpoints

    def gradients(self) -> dict[str, Tensor]:
        found = super().gradients()
        if self._root is None:
            return found
        self._let_go()
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        for part in fully_sharded.parts(self._root):
            gradient = fully_sharded.waiting(part)
            if gradient is not None:
                found[names[id(part.sharded_param)]] = local(gradient)
        return found

    def load_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        if self._root is not None:
            names = {id(parameter): name for name, parameter in self.module.named_parameters()}
            for layer in fully_sharded.sharded_layers(self._root):
                layer.unshard()  # makes what gradients that wait stand on
                layer.reshard()
            for part in fully_sharded.parts(self._root):
                gradient = gradients.get(names.get(id(part.sharded_param), ""))
                whole = fully_sharded.twin(part)
                if gradient is not None and gradient.shape == local(whole).shape:
                    waits = rebuilt(gradient, whole) if isinstance(whole, DTensor) else gradient
                    fully_sharded.let_wait(part, waits)
                    self._pending = True
        super().load_gradients(gradients)


def _recomputing(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


@contextmanager
def _standing_in(layer: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    former = vars(layer).get("forward")
    vars(layer)["forward"] = forward
    try:
        yield
    finally:
        del vars(layer)["forward"]
        if former is not None:
            vars(layer)["forward"] = former


def _zero(tensors: list[Any]) -> Tensor:
    """The sum of nothing of each tensor: 0, with gradients of 0."""
    total = torch.zeros(())
    for tensor in tensors:
        total = total.to(tensor.device) + (tensor * 0.0).sum().float()
    return total


def _make_contiguous(module: nn.Module) -> None:
    for parameter in module.parameters():
        if not isinstance(parameter, DTensor) and not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
