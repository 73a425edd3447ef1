# SPDX-License-Identifier: Apache-2.0
"""Several processes that run one script together: who they are, how they begin and end, and what they say to each other.

Processes come from torchrun, SLURM, MPI or LSF, or are started by ``strategies.launch``; what stops one of them stops all,
see ``strategies.watch``. How a module and its gradients are spread over them is the affair of the strategies made of this.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from leyden.errors import MisconfigurationException
from leyden.precision import Precision
from leyden.runtime import world as worlds
from leyden.runtime.ranks import rank_zero_only
from leyden.runtime.world import World
from leyden.signals import Interrupt
from leyden.strategies import launch
from leyden.strategies.base import Strategy
from leyden.tree import leaves, tree_map

_PROGRAMS = itertools.count()
_RUNS = itertools.count()
"""All ranks run the same script, and so make the same runs in the same order."""
_SOON = 1.0
"""Seconds that a rank listens for others that may not be at what it is at."""
UNEVEN = ("stop", "join", "pad")
"""What may happen where ranks have other numbers of training batches."""


class ParallelStrategy(Strategy):
    """What all strategies of several processes have in common.

    Args:
        parallel_devices: One device for each process of this machine; None takes the Trainer's.
        precision: The number format; None is the Trainer's.
        checkpoint_io: As in the base class.
        process_group_backend: torch's name for how tensors travel; None is NCCL for GPUs and Gloo for CPUs.
        timeout: After how long an exchange that not all ranks take part in is an error.
        start_method: Where nobody else starts the processes: ``"popen"`` runs the same script once more in each;
            ``"spawn"``, ``"fork"``, ``"forkserver"`` and ``"fresh"`` run the one call (``fit``, say) in each, and bring its
            results back; ``"notebook"`` chooses among these; ``"ray"`` or an ``OnRay`` runs it in actors of a Ray cluster.
        cluster_environment: Says which process this is and where they meet; None reads what the launchers set that we know.
        hang_timeout: After how long without any event a run is ended whose ranks wait for one that hangs; each rank then
            prints where it stands. None is ``timeout``.
        uneven: What happens in training where ranks have other numbers of batches: ``"stop"`` ends the epoch with the rank
            that has the fewest; ``"join"`` lets those that are done take part with gradients of 0, and averages over those
            that have a batch; ``"pad"`` lets those that are done begin their loaders anew.
        accelerator: Accepted for compatibility.
        precision_plugin: Another name for ``precision``.

    Raises:
        MisconfigurationException: for a value that is not possible.
    """

    def __init__(
        self,
        parallel_devices: list[torch.device] | None = None,
        precision: Precision | None = None,
        checkpoint_io: Any = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30),
        start_method: Any = "popen",
        cluster_environment: Any = None,
        hang_timeout: timedelta | None = None,
        uneven: str = "stop",
        *,
        accelerator: Any = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__("cpu", precision or precision_plugin, checkpoint_io)
        timeout = timedelta(minutes=30) if timeout is None else timeout
        name = type(self).__name__
        if start_method not in launch.STARTS and not callable(getattr(start_method, "call", None)):
            raise MisconfigurationException(
                f"{name}(start_method={start_method!r}) is not valid: it must be one of {list(launch.STARTS)}, or an OnRay"
                " object."
            )
        for argument, value in (("timeout", timeout), ("hang_timeout", hang_timeout)):
            if value is not None and value <= timedelta(0):
                raise MisconfigurationException(
                    f"{name}({argument}={value!r}) is not valid: it must be a positive datetime.timedelta."
                )
        if uneven not in UNEVEN:
            raise MisconfigurationException(
                f"{name}(uneven={uneven!r}) is not valid: it must be one of {list(UNEVEN)}."
            )
        self.parallel_devices: Any = parallel_devices
        self.process_group_backend, self.timeout, self.start_method = process_group_backend, timeout, start_method
        self._cluster_environment = cluster_environment
        self.hang_timeout, self.uneven = hang_timeout, uneven
        self._world = World()
        self.sync_batchnorm = False
        self.layer_sync: Any = None
        self._norms: list[Any] = []
        self._begun = False
        """Whether a loop of the user's own runs, not that of a Trainer."""
        self._alone = False
        """Whether this rank is on its way out of a run by itself: it must not wait for the others any more."""
        self._watch: Any = None

    # ------------------------------------------------------------------ who and where

    def assign(self, devices: list[torch.device], num_nodes: int) -> None:
        """Take the devices of this machine, one for each process, and find out which process this is.

        Raises:
            MisconfigurationException: where somebody has started another number of processes.
        """
        if self.parallel_devices is not None:
            devices = self.parallel_devices
        self.parallel_devices = devices = list(devices)
        environment = self._cluster_environment
        if environment is not None:
            from leyden.runtime.cluster import world_of  # noqa: PLC0415  # for those who name their cluster

            self._world = world_of(environment, len(devices), num_nodes)
            environment.set_world_size(self._world.size)
            environment.set_global_rank(self._world.rank)
        elif (found := worlds.joined()) is None:
            elsewhere = self.start_method == "ray" or not isinstance(self.start_method, str)
            whole = World(size=len(devices) * num_nodes, local_size=len(devices))  # whoever starts them knows the nodes
            self._world = whole if elsewhere else worlds.planned(len(devices), num_nodes)
        else:
            if found.size != len(devices) * num_nodes:
                starter = _STARTERS.get(found.starter, found.starter)
                raise MisconfigurationException(
                    f"Trainer(devices={len(devices)}, num_nodes={num_nodes}) asks for {len(devices) * num_nodes}"
                    f" processes, but {starter} has started {found.size}. Ask for as many of both."
                )
            self._world = found
        self._root_device = devices[self._world.local_rank % len(devices)]
        rank_zero_only.rank = self._world.rank

    @property
    def spawns(self) -> bool:
        """Whether an entry point of the Trainer is to run in processes that are started for it alone."""
        if self.start_method == "popen" or self._world.starter != "leyden":
            return False
        return worlds.OURS not in os.environ and not worlds.has_started()

    def run_elsewhere(self, trainer: Any, entry: str, given: Mapping[str, Any]) -> Any:
        return launch.run(trainer, entry, given)

    @property
    def cluster_environment(self) -> Any:
        """What says which process this is: the user's, or the one of ours that fits what has started the processes."""
        if self._cluster_environment is None:
            from leyden.runtime.cluster import environment_of  # noqa: PLC0415  # few ask

            return environment_of(self._world)
        return self._cluster_environment

    @cluster_environment.setter
    def cluster_environment(self, environment: Any) -> None:
        self._cluster_environment = environment

    @property
    def names_environment(self) -> bool:
        """Whether the user has named a cluster environment."""
        return self._cluster_environment is not None

    @property
    def world_size(self) -> int:
        return self._world.size

    @property
    def num_processes(self) -> int:
        """Number of processes on this machine."""
        return self._world.local_size

    @property
    def num_nodes(self) -> int:
        return self._world.nodes

    @property
    def global_rank(self) -> int:
        return self._world.rank

    @property
    def local_rank(self) -> int:
        return self._world.local_rank

    @property
    def node_rank(self) -> int:
        return self._world.node

    @property
    def is_distributed(self) -> bool:
        """Whether it is made for several processes."""
        return True

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """How many share the data, and which of them this is."""
        return {"num_replicas": self.data_size, "rank": self.data_rank}

    # ------------------------------------------------------------------ a run

    def launch(self, interrupt: Interrupt, progress: Any) -> None:
        from leyden.runtime import collective  # noqa: PLC0415  # torch.distributed, where there are several processes

        world = self._world
        if world.starter == "leyden":
            from leyden.strategies.launch import script  # noqa: PLC0415  # in a script that we have started

            if world.size > 1 and worlds.OURS not in os.environ and not worlds.has_started():
                script.start_others(world)
            self._world = world = worlds.joined() or world  # of an earlier Trainer of this script, maybe
            script.enter()
        self.setup_environment()
        self._alone = False
        if world.size > 1:
            from leyden.strategies.watch import Watch  # noqa: PLC0415  # where there is somebody to watch
            from leyden.strategies.where import Where  # noqa: PLC0415  # as above

            limit = self.timeout if self.hang_timeout is None else min(self.hang_timeout, self.timeout)
            self._watch = Watch(
                collective.store_of(world), f"run{next(_RUNS)}", world.rank, world.size, interrupt,
                lambda: int(progress.batches), limit=limit.total_seconds(), where=Where(progress, lambda: self.module),
            )  # fmt: skip

    def setup_environment(self) -> None:
        self.setup_distributed()

    def setup_distributed(self) -> None:
        """Meet the other processes."""
        from leyden.runtime import collective  # noqa: PLC0415  # see launch

        collective.meet(self._world, self._backend(), self.timeout)

    def begin(self) -> None:
        self._begun = True
        self.launch(Interrupt(), SimpleNamespace(batches=0))
        atexit.register(self._leave, f"program{next(_PROGRAMS)}/left")

    def _leave(self, key: str) -> None:
        """The program of this rank is over, by an error or not."""
        error = getattr(sys, "last_value", None)  # of a traceback that has been printed
        if error is not None:
            self.fail(error, together=False)
        elif self._watch is not None:
            with contextlib.suppress(Exception):  # the store is gone
                self._leave_last(key)
        self.land()

    def _leave_last(self, key: str) -> None:
        """Say that this rank leaves; rank 0, which may keep the store, waits for the others, unless the watch ends it."""
        from leyden.runtime import collective  # noqa: PLC0415  # see launch

        store = collective.store_of(self._world)
        store.add(key, 1)
        until = time.monotonic() + self.timeout.total_seconds()
        while self.global_rank == 0 and store.add(key, 0) < self.world_size and time.monotonic() < until:
            time.sleep(0.05)

    def land(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.close()
        if self._cluster_environment is not None:
            self._cluster_environment.teardown()
        if self._world.starter == "leyden" and (script := sys.modules.get("leyden.strategies.launch.script")):
            script.leave()

    def fail(self, error: BaseException, together: bool) -> bool:
        if together or self._watch is None:
            return False
        self._alone = True
        first = self._watch.failed(error)
        if first is not None:
            with contextlib.suppress(Exception):
                print(
                    f"leyden: what rank {self.global_rank} says comes after another failure: {first}",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
        return first is not None

    def _backend(self) -> str:
        if self.process_group_backend is not None:
            return self.process_group_backend
        # both: what is small, and every decision, travels between hosts without a word to the device
        return "cpu:gloo,cuda:nccl" if self.root_device.type == "cuda" else "gloo"

    def on_its_own(self) -> Strategy | None:
        return self if self.world_size == 1 else None

    # ------------------------------------------------------------------ the life of a module

    def setup(self, trainer: Any = None) -> None:
        if self.sync_batchnorm and self.root_device.type == "cuda":
            self.module = nn.SyncBatchNorm.convert_sync_batchnorm(self.module)  # type: ignore[no-untyped-call]
        if self.layer_sync is not None and self.world_size > 1:
            self.module = self.layer_sync.apply(self.module)
        super().setup(trainer)
        if self.sync_batchnorm and self.root_device.type == "cpu" and self.world_size > 1:
            from leyden.strategies.sync_norm import synchronise  # noqa: PLC0415  # only where it is asked for

            self._norms = synchronise(self.module)

    def teardown(self) -> None:
        if self._norms:
            from leyden.strategies.sync_norm import release  # noqa: PLC0415  # see setup

            release(self._norms)
            self._norms = []
        if self.layer_sync is not None and self.world_size > 1 and self.module is not None:
            self.layer_sync.revert(self.module)
        super().teardown()

    @contextlib.contextmanager
    def no_backward_sync(self, module: nn.Module, enabled: bool = True) -> Iterator[None]:
        wrapper: Any = module
        if not enabled:
            yield
        elif hasattr(module, "no_sync"):  # DistributedDataParallel
            with wrapper.no_sync():
                yield
        elif hasattr(module, "set_requires_gradient_sync"):  # fully_shard
            wrapper.set_requires_gradient_sync(False)
            try:
                yield
            finally:
                wrapper.set_requires_gradient_sync(True)
        else:
            yield

    shares_statistics = True
    """Whether all ranks are to have the running statistics of rank 0 in an evaluation."""

    def evaluating(self, inference: bool) -> contextlib.AbstractContextManager[Any]:
        self.share_statistics()
        return super().evaluating(inference)

    def share_statistics(self) -> None:
        """Give the numbers that layers keep of their data, such as those of a batch norm, the values of rank 0.

        An evaluation is of one model then, the one that is saved, though each rank has trained on its own batches.
        """
        if not self._exchanges or not self.shares_statistics:
            return
        from leyden.runtime.collective import copy_flat  # noqa: PLC0415  # see launch

        found: dict[int, Tensor] = {}
        ignored = getattr(self.module, "_ddp_params_and_buffers_to_ignore", ())
        for path, layer in self.module.named_modules():
            for name, buffer in layer.named_buffers(recurse=False):
                kept = name not in layer._non_persistent_buffers_set  # noqa: SLF001  # torch has no other name for it
                kept = kept and (f"{path}.{name}" if path else name) not in ignored
                if kept and _is_plain(buffer) and buffer.is_floating_point():
                    found[id(buffer)] = buffer
        with torch.no_grad():
            copy_flat(list(found.values()))

    def statistics_need_all(self) -> str | None:
        """Why the batch norms need a batch of every process; None if they do not."""
        return (
            "with sync_batchnorm=True a rank without a batch has no statistics for the others"
            if self.sync_batchnorm
            else None
        )

    def block_backward_sync(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which gradients of the module are not exchanged."""
        return self.no_backward_sync(self.model)

    def own_buffers(self) -> dict[str, Tensor]:
        found = {name: buffer for name, buffer in self.module.named_buffers() if _is_plain(buffer)}
        sums = self.gather_objects({name: _checksum(buffer) for name, buffer in found.items()}) if found else []
        return {name: buffer for name, buffer in found.items() if any(s.get(name) != sums[0].get(name) for s in sums)}

    def prepare(self, name: str, work: Callable[[], Any], here: bool) -> None:
        if here:
            work()
        if self._watch is None or self._alone:
            self.barrier(name)
        else:
            self._watch.gather(name)

    # ------------------------------------------------------------------ between processes

    @property
    def _exchanges(self) -> bool:
        return self.world_size > 1 and not self._alone

    def barrier(self, name: str | None = None) -> None:
        if self._exchanges:
            torch.distributed.barrier() if self.root_device.type != "cuda" else self.reduce_boolean_decision(True)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if not self._exchanges:
            return obj
        from leyden.runtime.collective import broadcast_object  # noqa: PLC0415  # see launch

        return broadcast_object(obj, src)

    def gather_objects(self, item: Any) -> list[Any]:
        if not self._exchanges:
            return [item]
        from leyden.runtime.collective import gather_objects  # noqa: PLC0415  # see launch

        return gather_objects(item)

    def gather_numbers(self, numbers: Tensor) -> Tensor:
        if not self._exchanges:
            return numbers[None]
        from leyden.runtime.collective import gather_numbers  # noqa: PLC0415  # see launch

        return gather_numbers(numbers)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce a tensor over processes: ``"mean"`` (or ``"avg"``), ``"sum"``, or an operation of torch.distributed."""
        if not isinstance(tensor, Tensor) or not self._exchanges:
            return tensor
        dist = torch.distributed
        name = reduce_op.lower() if isinstance(reduce_op, str) else reduce_op
        mean = name in ("mean", "avg", None, dist.ReduceOp.AVG)
        op = dist.ReduceOp.SUM if mean else getattr(dist.ReduceOp, str(name).upper()) if isinstance(name, str) else name
        result = tensor.detach().clone()
        dist.all_reduce(result, op=op, group=group)
        if not mean:
            return result
        size = dist.get_world_size(group)
        return result / size if result.is_floating_point() or result.is_complex() else result // size

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        if not self._exchanges:
            return decision
        votes = self.gather_numbers(torch.tensor([float(decision)]))
        return bool(votes.min() if all else votes.max())

    def all_gather(self, tensor: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """Gather a tensor, or a tree of them and of numbers, from all processes: a leading dimension of ``world_size``.

        Raises:
            RuntimeError: where the shapes differ between ranks; on all of them.
        """
        if not self._exchanges:
            return tensor
        whole = tree_map(lambda leaf: torch.as_tensor(leaf, device=self.root_device), tensor, (Tensor, int, float))
        shapes = (
            self.gather_objects([tuple(t.shape) for t in leaves(whole) if isinstance(t, Tensor)])
            if group is None
            else []
        )
        if any(other != shapes[0] for other in shapes):
            raise RuntimeError(f"all_gather() got tensors of other shapes on other ranks; by rank: {shapes}.")

        def gather(leaf: Tensor) -> Tensor:
            dist = torch.distributed
            if sync_grads:
                from leyden.runtime.collective import gather_with_gradients  # noqa: PLC0415  # see launch

                return gather_with_gradients(leaf, group)
            rows = [
                torch.empty_like(leaf, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))
            ]
            dist.all_gather(rows, leaf.detach().contiguous(), group=group)
            return torch.stack(rows)

        return tree_map(gather, whole)

    # ------------------------------------------------------------------ to stop together

    def asked_to_stop(self, interrupt: Interrupt) -> None:
        if self._watch is None:
            interrupt.received = True  # else it is the watch that sees what was asked, and tells all

    def ends_after(self, batch: int) -> bool:
        return self._watch is None or self._watch.ends_after(batch)

    def unanimous(self, about: str) -> bool:
        return self._watch is None or self._watch.unanimous(about)

    def announce(self, about: str) -> None:
        if self._watch is not None:
            self._watch.announce(about)

    def hear(self, about: str, mine: str) -> dict[int, str]:
        return super().hear(about, mine) if self._watch is None else dict(self._watch.hear(about, mine, _SOON))

    def all_skip(self, batch: int) -> bool:
        if self._watch is None or self._watch.unanimous(f"skip/{batch}", self.timeout.total_seconds()):
            return True
        raise RuntimeError(
            f"on_train_batch_start returned -1 on rank {self.global_rank} in batch {batch}, which ends the epoch, but not on"
            " all ranks: the others wait for gradients that do not come. Decide from what is the same on all ranks, or let"
            " them agree: trainer.strategy.reduce_boolean_decision(wish, all=False)."
        )

    def agree_on(self, interrupt: Interrupt) -> bool:
        if not self._exchanges:
            return interrupt.received
        error = None if interrupt.error is None else f"rank {self.global_rank}: {interrupt.error}"
        said: list[tuple[bool, int | None, str | None]] = self.gather_objects(
            (interrupt.received or interrupt.asked, interrupt.number, error)
        )
        if any(received for received, _, _ in said):
            from leyden.errors import CheckpointError  # noqa: PLC0415  # few runs end so

            interrupt.received = True
            number = next((number for _, number, _ in said if number is not None), None)
            interrupt.number = number if interrupt.number is None else interrupt.number
            text = next((text for _, _, text in said if text is not None), None)
            if interrupt.error is None and text is not None:
                interrupt.error = CheckpointError(f"The run was ended by {text}")
        return interrupt.received


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_meta


def _checksum(tensor: Tensor) -> int:
    content: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(content)


_STARTERS = {
    "torchrun": "torchrun (WORLD_SIZE)", "slurm": "SLURM (SLURM_NTASKS)", "mpi": "mpirun", "lsf": "jsrun",
    "leyden": "the first Trainer of this script that uses several processes",
}  # fmt: skip
