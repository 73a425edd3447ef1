# SPDX-License-Identifier: Apache-2.0
"""Several processes, each with the whole module and its share of the data: gradients are averaged while they are computed.

torch's DistributedDataParallel does that, and nothing else travels in an ordinary batch.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from leyden.errors import MisconfigurationException, did_you_mean
from leyden.precision import Precision
from leyden.runtime.ranks import rank_zero_warn
from leyden.strategies.base import Strategy
from leyden.strategies.buckets import Order
from leyden.strategies.parallel import ParallelStrategy
from leyden.strategies.through import Through
from leyden.tree import parameters_of

_WRAPPER = (
    "bucket_cap_mb", "broadcast_buffers", "init_sync", "find_unused_parameters", "check_reduction",
    "gradient_as_bucket_view", "static_graph", "delay_all_reduce_named_params", "param_to_hook_all_reduce",
    "mixed_precision", "skip_all_reduce_unused_params", "dim", "device_mesh",
)  # fmt: skip


class DDPStrategy(ParallelStrategy):
    """Trains on several devices by torch's DistributedDataParallel.

    ::

        Trainer(accelerator="cpu", devices=2, strategy=DDPStrategy(find_unused_parameters=True))

    Args:
        accelerator: Accepted for compatibility.
        parallel_devices: One device for each process of this machine; None takes the Trainer's.
        cluster_environment: Says which process this is and where they meet; None reads what the launchers set that we know.
        checkpoint_io: As in the base class.
        precision_plugin: The number format; None is the Trainer's.
        ddp_comm_state: State of ``ddp_comm_hook``.
        ddp_comm_hook: How the gradients of a bucket are exchanged, see ``register_comm_hook`` of torch.
        ddp_comm_wrapper: Wraps ``ddp_comm_hook``.
        model_averaging_period: With a ``PostLocalSGDState`` as ``ddp_comm_state``: after how many updates weights are averaged
            over all processes, beginning with the state's ``start_localSGD_iter``.
        process_group_backend: torch's name for how tensors travel; None is NCCL for GPUs and Gloo for CPUs.
        timeout: After how long an exchange that not all ranks take part in is an error.
        start_method: Where nobody else starts the processes: ``"popen"`` runs the same script once more in each;
            ``"spawn"``, ``"fork"``, ``"forkserver"`` and ``"fresh"`` run the one call (``fit``, say) in each, and bring its
            results back; ``"notebook"`` chooses among these; ``"ray"`` or an ``OnRay`` runs it in actors of a Ray cluster.
        hang_timeout: After how long without any event a run is ended whose ranks wait for one that hangs; None is ``timeout``.
        uneven: What happens where ranks have other numbers of training batches: ``"stop"``, ``"join"`` or ``"pad"``, see
            ``ParallelStrategy``.
        **kwargs: Arguments of DistributedDataParallel: ``find_unused_parameters``, ``static_graph``,
            ``gradient_as_bucket_view``, ``bucket_cap_mb``, ``broadcast_buffers``.

    Raises:
        MisconfigurationException: for an argument that is unknown, or a value that is not possible.
    """

    strategy_name = "ddp"

    def __init__(
        self,
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Precision | None = None,
        ddp_comm_state: Any = None,
        ddp_comm_hook: Callable[..., Any] | None = None,
        ddp_comm_wrapper: Callable[..., Any] | None = None,
        model_averaging_period: int | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30),
        start_method: Any = "popen",
        hang_timeout: timedelta | None = None,
        uneven: str = "stop",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            parallel_devices, precision_plugin, checkpoint_io, process_group_backend, timeout, start_method,
            cluster_environment, hang_timeout, uneven,
        )  # fmt: skip
        unknown = next((name for name in kwargs if name not in _WRAPPER), None)
        if unknown is not None:
            raise MisconfigurationException(
                f"DDPStrategy({unknown}=...) is not known; it takes the arguments of torch's DistributedDataParallel."
                f"{did_you_mean(unknown, _WRAPPER)}"
            )
        self.ddp_kwargs = kwargs
        self.shares_statistics = bool(kwargs.get("broadcast_buffers", True))
        self._hook = ddp_comm_state, ddp_comm_hook, ddp_comm_wrapper
        self.model_averaging_period = model_averaging_period
        self._averages: list[Any] = []
        """The hooks of optimizers that average weights."""
        self._wrapped: Any = None
        """The module, wrapped, while a fit runs."""
        self._through: _Through | None = None
        self._loop: Any = None
        self._by_hand = False
        """Whether gradients are exchanged right before an optimizer steps, not while they are computed."""
        self._checked, self._automatic = False, True
        self._frozen: list[nn.Parameter] = []
        """What did not require gradients when the module was wrapped: of this the wrapper never learns."""
        self._asleep: dict[Optimizer, tuple[list[int] | None, list[nn.Parameter]]] = {}
        """What of it an optimizer has, with the sizes of its groups then."""
        self._met: dict[nn.Parameter, tuple[Tensor | None, int]] = {}
        """Gradients that were averaged ahead of a step, with the version that they had then."""
        self._order: Order | None = None
        self._search: Any = None

    # ------------------------------------------------------------------ the life of a module

    def distribute(self, fitting: bool) -> None:
        module = self.module
        if fitting and any(parameter.requires_grad for parameter in module.parameters()):
            self._wrap(module)
        elif self.world_size > 1:
            from leyden.runtime.collective import copy_flat  # noqa: PLC0415  # see launch

            with torch.no_grad():
                copy_flat([tensor.detach() for tensor in (*module.parameters(), *module.buffers())])

    def _wrap(self, module: nn.Module) -> None:
        self._through = _Through(module)  # given back in teardown
        self._frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
        if self._wrapped is None:
            self.configure_ddp()

    def configure_ddp(self) -> None:
        """Put what averages gradients around the module: ``self.model`` is that, while a fit runs."""
        self.model = self._setup_model(self.module)

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return self._averaged(model)

    def determine_ddp_device_ids(self) -> list[int] | None:
        """What DistributedDataParallel gets as ``device_ids``."""
        return None if self.root_device.type == "cpu" else [self.root_device.index]

    def setup_module(self, module: nn.Module) -> nn.Module:
        if any(parameter.requires_grad for parameter in module.parameters()):
            return _naming(self._averaged(module), self)
        return super().setup_module(module)

    def _averaged(self, module: nn.Module) -> nn.Module:
        """Return a wrapper that averages gradients while they are computed."""
        from torch.nn.parallel import DistributedDataParallel  # noqa: PLC0415  # where there are several processes

        # DistributedDataParallel imports it, and that import keeps the frames in which it runs, with all that they hold
        thread = threading.Thread(target=importlib.import_module, args=("torch._dynamo",))
        thread.start()
        thread.join()
        wrapped = DistributedDataParallel(module, device_ids=self.determine_ddp_device_ids(), **self.ddp_kwargs)
        state, hook, around = self._hook
        if hook is not None:
            wrapped.register_comm_hook(state, hook if around is None else around(hook))
        return wrapped

    def accompany(self, loop: Any, automatic: bool) -> None:
        self._loop, self._checked, self._automatic, self._met = loop, False, automatic, {}
        # one backward for each forward is what DistributedDataParallel can follow
        self._by_hand = not automatic or len(self.optimizers) > 1
        if self._wrapped is not None:
            self._average_weights()
            self._wrapped.require_backward_grad_sync = not self._by_hand
            self._checked = self._by_hand or bool(
                self.ddp_kwargs.get("find_unused_parameters") or self.ddp_kwargs.get("static_graph")
            )
        # nobody's order matters between two, and a hook may exchange anything in any way
        if self._wrapped is not None and not self._checked and self.world_size > 2 and self._hook[1] is None:
            self._order = Order(self._wrapped, [p for p in self.module.parameters() if p.requires_grad])
            self._order.listen()
        if self._wrapped is not None and self.world_size > 1 and not self._by_hand:
            self._probe(self._wrapped)

    def _probe(self, wrapper: Any) -> None:
        """Look at what the search for unused parameters finds in the first updates, if there is one."""
        if wrapper.static_graph or not wrapper.find_unused_parameters:
            return
        from leyden.strategies.searched import Search  # noqa: PLC0415  # few runs search

        self._search = Search(wrapper, self.module, partial(self.hear, "searched"))

    def on_its_own(self) -> Strategy | None:
        # layers that share statistics meet in their forward
        return None if self.sync_batchnorm and self.world_size > 1 else _OnItsOwn(self)

    def exchange_order(self) -> list[int]:
        return [] if self._order is None else self._order.found

    def follow_order(self, order: list[int]) -> None:
        if self._order is not None and order:
            self._order.follow(order, self._bring_zeros)

    def _bring_zeros(self, parameters: list[Tensor]) -> None:
        model, through = self._wrapped, self._through
        assert through is not None
        model.require_backward_grad_sync = True
        through.step, through.counts = partial(through.idle, parameters), False
        model().backward()

    def teardown(self) -> None:
        self._unwrap()
        self._loop = None
        while self._averages:
            self._averages.pop().remove()
        super().teardown()

    def _average_weights(self) -> None:
        """Let weights be averaged now and then, where gradients are not always: post-local SGD.

        Raises:
            MisconfigurationException: without ``model_averaging_period``.
        """
        start = getattr(self._hook[0], "start_localSGD_iter", None)
        if start is None:
            return
        if self.model_averaging_period is None:
            raise MisconfigurationException(
                "DDPStrategy(ddp_comm_state=PostLocalSGDState(...)) averages weights now and then: say after how many updates,"
                " DDPStrategy(model_averaging_period=...)."
            )
        from torch.distributed.algorithms.model_averaging.averagers import (  # noqa: PLC0415  # few ask
            PeriodicModelAverager,
        )

        averager = PeriodicModelAverager(period=self.model_averaging_period, warmup_steps=start)

        def average(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
            averager.average_parameters(iter(parameters_of(optimizer)))

        self._averages += [optimizer.register_step_post_hook(average) for optimizer in self.optimizers]

    def _unwrap(self) -> None:
        if self._order is not None:
            self._order.close()
        self._order = None
        if self._search is not None:
            self._search.close()
        through, self._through, self._wrapped, self._search = self._through, None, None, None
        self._frozen, self._met, self._asleep = [], {}, {}
        if through is not None:
            through.remove()

    # ------------------------------------------------------------------ steps

    def training_step(self, *args: Any) -> Any:
        model, through = self._wrapped, self._through
        if model is None or through is None:
            return super().training_step(*args)
        if not self._by_hand and model.require_backward_grad_sync is not self._loop.steps:
            model.require_backward_grad_sync = self._loop.steps  # inside a window of accumulation nothing travels
        through.step = self.module.training_step
        through.counts = self._loop.steps and not self._by_hand
        try:
            with self.precision.train_step_context():
                return model(*args)
        except RuntimeError as error:
            if "finished reduction in the prior iteration" in str(error):
                raise self.unused(self.module, error) from None
            raise
        finally:
            through.step = None

    def why_no_join(self) -> str | None:
        return self.statistics_need_all()

    def idle_step(self) -> None:
        model, through = self._wrapped, self._through
        if model is None or through is None or self._alone:
            return
        travels = model.require_backward_grad_sync = self._loop.steps and not self._by_hand
        through.step, through.counts = through.idle, False
        loss = model()  # the wrapper exchanges something of its own ahead of some steps
        if travels:
            loss.backward()

    def exchange_gradients(self, optimizer: Optimizer) -> None:
        """Average what has not been averaged while it was computed; runs before each step of an optimizer."""
        model = self._wrapped
        if model is None:
            return
        several = self.world_size > 1 and not self._alone
        travels = several and not model.require_backward_grad_sync
        late = self._late(optimizer) if several and self._frozen else []
        if self._checked and not travels and not late:
            return  # an ordinary step: nothing is looked for among the parameters
        parameters = parameters_of(optimizer)
        if not self._checked:
            self._checked = True
            if any(parameter.grad is None and parameter.requires_grad for parameter in parameters):
                raise self.unused(self.module, None)
            if self._order is not None:
                self._order.settle()
        if travels:
            self._average(parameters)
        elif late:
            self._average(late)

    def _late(self, optimizer: Optimizer) -> list[nn.Parameter]:
        """Parameters of an optimizer that were frozen when the module was wrapped, and are not any more."""
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        former, frozen = self._asleep.get(optimizer, (None, []))
        if former != sizes:  # few optimizers have any of them: they are looked for once, and when there are others
            known = set(self._frozen)
            frozen = [p for p in parameters_of(optimizer) if p in known]
            self._asleep[optimizer] = sizes, frozen
        return [p for p in frozen if p.requires_grad]

    def _average(self, parameters: list[nn.Parameter]) -> None:
        """Average gradients over all ranks, unless they have been averaged and nobody has touched them since."""
        from leyden.runtime.collective import average_flat, gather_numbers  # noqa: PLC0415  # see launch

        if not parameters:
            return
        met = [self._met.pop(parameter, None) for parameter in parameters]
        touched_here = not all(map(_is_as, parameters, met))
        there = torch.tensor([*(float(p.grad is not None) for p in parameters), float(touched_here)])
        *anywhere, touched = gather_numbers(there).sum(0).tolist()
        if not touched:
            return
        grads = []
        for parameter, count in zip(parameters, anywhere, strict=True):
            if count:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                elif parameter.grad.is_sparse:
                    parameter.grad = parameter.grad.to_dense()
                grads.append(parameter.grad.detach())
        if grads:
            average_flat(grads)

    def clip_gradients(self, optimizer: Optimizer, value: float, algorithm: str) -> Tensor | None:
        if self._automatic or self._wrapped is None or self.world_size == 1 or self._alone:
            return super().clip_gradients(optimizer, value, algorithm)
        # by hand this comes ahead of the step, which averages: the norm is to be that of the mean
        self.exchange_gradients(optimizer)
        norm = super().clip_gradients(optimizer, value, algorithm)
        for p in parameters_of(optimizer):
            self._met[p] = p.grad, 0 if p.grad is None else p.grad._version  # noqa: SLF001  # torch has no other name for it
        return norm

    def unused(self, module: nn.Module, error: RuntimeError | None) -> RuntimeError:
        """Return the error that names the parameters that took no part in the loss, their modules, and the ranks."""
        names = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
        if not names:  # what was frozen after the module was wrapped has no gradients either
            begun_frozen = set(self._frozen)
            names = [name for name, p in module.named_parameters() if not p.requires_grad and p not in begun_frozen]
        mine = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        kinds = {type(module.get_submodule(path)).__name__: path for path in (n.rpartition(".")[0] for n in names)}
        inside = ", ".join(f"{path or 'the module itself'}: {kind}" for kind, path in list(kinds.items())[:4])
        mine = f"{mine} (in {inside})" if names else _first_line(error)
        # no exchange: the others may wait for these gradients
        told = self.hear("unused", mine)
        ranks: dict[str, list[int]] = {}
        for rank, text in told.items():
            ranks.setdefault(text, []).append(rank)
        where = "; ".join(
            f"on rank{'s' if len(those) > 1 else ''} {', '.join(map(str, those))}: {text}"
            for text, those in ranks.items()
        )
        return RuntimeError(
            f"On rank {self.global_rank}, these parameters of {type(module).__name__} took no part in the loss of"
            f" the last batch, so the others wait for gradients that do not come: {mine}."
            f"{f' By rank: {where}.' if len(told) > 1 else ''} If that is meant, use"
            " strategy='ddp_find_unused_parameters_true', also where they are frozen in the middle of a run; else let them take"
            " part, freeze them (requires_grad=False) before the run begins, or remove them."
        )


class _OnItsOwn(Strategy):
    """One of several processes, which steps without the others: the module is not wrapped, and nothing travels."""

    def __init__(self, strategy: DDPStrategy) -> None:
        super().__init__(strategy.root_device, strategy.precision, strategy.checkpoint_io)
        self.module, self._ranks = strategy.module, (strategy.global_rank, strategy.local_rank, strategy.node_rank)

    @property
    def global_rank(self) -> int:
        return self._ranks[0]

    @property
    def local_rank(self) -> int:
        return self._ranks[1]

    @property
    def node_rank(self) -> int:
        return self._ranks[2]

    @property
    def data_rank(self) -> int:
        return 0


def _is_as(parameter: nn.Parameter, met: tuple[Tensor | None, int] | None) -> bool:
    """Whether the gradient of a parameter is still what was ``met``, and nobody has written to it since."""
    gradient = parameter.grad
    return (
        met is not None and met[0] is gradient and (gradient is None or met[1] == gradient._version)  # noqa: SLF001  # torch has no other name for it
    )


def _naming(wrapper: nn.Module, strategy: DDPStrategy) -> nn.Module:
    """Let a wrapper name the parameters that took no part in the last loss; a Trainer does so itself."""
    kind: Any = type(wrapper)

    class Naming(kind):  # type: ignore[misc]  # its class is known here only
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return super().forward(*args, **kwargs)
            except RuntimeError as error:
                if "finished reduction in the prior iteration" not in str(error):
                    raise
                raise strategy.unused(self.module, error) from None

    Naming.__name__ = Naming.__qualname__ = kind.__name__
    wrapper.__class__ = Naming
    return wrapper


class _Through(Through):
    """Lets a batch without a loss count with gradients of 0.

    Attributes:
        counts: Whether the others wait for gradients of what the next call returns.
    """

    counts = weighs = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stepping = self.step is not None
        output = super().__call__(*args, **kwargs)
        if not stepping:
            return output
        if self.counts and (output is None or (isinstance(output, Mapping) and output.get("loss", 0) is None)):
            return self.nothing()
        self.weighs = isinstance(output, Mapping) and "num_items" in output
        return output

    def nothing(self) -> Any:
        """A loss whose gradients are 0: the batch of a rank that skips it, so that the others need not wait."""
        rank_zero_warn(
            "training_step() returned None: with several processes the batch counts with gradients of 0, so that the"
            " other ranks get theirs."
        )
        loss = self.idle()
        return {"loss": loss, "num_items": 0.0} if self.weighs else loss

    def idle(self, parameters: Iterable[Tensor] | None = None) -> Tensor:
        """A loss that is 0, and so are all its gradients."""
        among = self.module.parameters() if parameters is None else parameters
        parts = [(parameter * 0.0).sum() for parameter in among if parameter.requires_grad]
        return torch.stack(parts).sum()


def _first_line(error: BaseException | None) -> str:
    return (str(error).strip().splitlines() or [""])[0]
