# SPDX-License-Identifier: Apache-2.0
"""The process group of this process, and the few exchanges that the house needs of it, all of them small and on the CPU.

``meet`` opens the group once; it stays open for all runs of the process, whatever Trainer makes them, and is closed when
the process ends. Gradients do not travel here: a strategy has torch's own machinery for them.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # torch has them there

from leyden.errors import MisconfigurationException
from leyden.runtime.world import OURS, World

LOCAL = ("127.0.0.1", "localhost", "::1")
_STORES: dict[int, Store] = {}
"""The connection of process ``pid`` to the store at which all meet, in rank 0 with the store itself: a forked process has
none yet. One is enough, and each costs a look-up of the address that may take seconds."""


def serve(address: str = "127.0.0.1") -> int:
    """Open the store at which processes will meet, in this one, at a free port; return the port.

    Args:
        address: Of this machine, where the processes reach it.
    """
    store = _STORES[os.getpid()] = TCPStore(address, 0, is_master=True, wait_for_workers=False)
    return int(store.port)


def meet(world: World, backend: str, timeout: timedelta) -> None:
    """Open the process group of ``world``; one that is open already is taken as it is.

    Args:
        world: Which process this is.
        backend: torch's name for how tensors travel, such as ``"gloo"``.
        timeout: After how long an exchange that not all take part in is an error.

    Raises:
        MisconfigurationException: for a group that is open and has another size, or that cannot be opened.
    """
    if dist.is_initialized():
        if dist.get_world_size() != world.size:
            raise MisconfigurationException(
                f"This process is one of {dist.get_world_size()} that were started together, but the Trainer asks for"
                f" {world.size} (devices times num_nodes). All Trainers of a script that use several processes must use"
                " the same number; one device can always be used."
            )
        return
    with _loopback(world):
        try:
            store = PrefixStore("group", store_of(world, timeout))
            dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
        except (dist.DistNetworkError, dist.DistStoreError, TimeoutError) as error:
            raise MisconfigurationException(
                f"Rank {world.rank} of {world.size} could not meet the others at {world.address}:{world.port} within"
                f" {timeout.total_seconds():g} s ({_first_line(error)}). Check that the address and the port can be"
                " reached from this machine, that no other job uses the port, and that all processes were started."
            ) from error
    atexit.register(part)


def store_of(world: World, timeout: timedelta = timedelta(seconds=30)) -> Store:
    """Return the key-value store of the processes; reading and writing it is no collective, and works in any thread."""
    store = _STORES.get(os.getpid())
    if store is None:
        # torchrun's own process may serve it; so does the process that called, where processes run one call of it
        elsewhere = os.environ.get(OURS) == "spawn" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        serves = world.rank == 0 and not elsewhere and not dist.is_initialized()
        store = _STORES[os.getpid()] = TCPStore(
            world.address, world.port, None, is_master=serves, timeout=timeout, wait_for_workers=False
        )
    # the store of torchrun outlives the processes, which it may start anew
    return PrefixStore(f"leyden/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def part() -> None:
    """Close the process group, if it is open."""
    if dist.is_initialized():
        gc.collect()  # whatever still holds the group would keep its threads, which must not outlive the interpreter
        dist.destroy_process_group()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _loopback(world: World) -> Iterator[None]:
    """Let processes of one machine meet on its loopback device, whatever its name resolves to."""
    name = "GLOO_SOCKET_IFNAME"
    if world.address not in LOCAL or not sys.platform.startswith("linux") or name in os.environ:
        yield
        return
    os.environ[name] = "lo"
    try:
        yield
    finally:
        del os.environ[name]


# ---------------------------------------------------------------------------------------------- exchanges


def gather_numbers(numbers: Tensor) -> Tensor:
    """Return the flat ``numbers`` of all ranks, one row for each; the length must be the same everywhere.

    One collective. What is made of the rows comes out the same, to the last bit, on every rank.
    """
    sent = numbers.cuda() if dist.get_backend() == "nccl" else numbers
    rows = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, sent)
    return torch.stack(rows).to(numbers.device)


def gather_objects(item: Any, group: Any = None) -> list[Any]:
    """Return the objects of all ranks (whatever can be pickled), in their order; with a ``group``, in any thread of its own."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, item, group=group)
    return found


def broadcast_object(item: Any, src: int = 0) -> Any:
    """Return the object of rank ``src``."""
    box = [item]
    dist.broadcast_object_list(box, src)
    return box[0]


def average_flat(tensors: list[Tensor], group: Any = None) -> None:
    """Replace each tensor by its mean over all ranks (of a ``group``), in one collective for each dtype and device."""
    kinds: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for together in kinds.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in together])
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)
        _put_back(flat, together)


def copy_flat(tensors: list[Tensor]) -> None:
    """Give each tensor the value that it has on rank 0, in one collective for each dtype and device."""
    kinds: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for together in kinds.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in together])
        dist.broadcast(flat, 0)
        _put_back(flat, together)


def _put_back(flat: Tensor, tensors: list[Tensor]) -> None:
    for tensor, value in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(value.view_as(tensor))


class _Gather(torch.autograd.Function):
    """All-gather whose backward brings each rank the gradients that all ranks have for what it gave."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        rows = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(rows, tensor, group=group)
        return torch.stack(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        total = gradients[0].contiguous()
        dist.all_reduce(total, group=ctx.group)
        return total[dist.get_rank(ctx.group)], None


def gather_with_gradients(tensor: Tensor, group: Any = None) -> Tensor:
    """Return the tensors of all ranks, stacked; gradients flow back to the ranks that they came from."""
    gathered: Tensor = _Gather.apply(tensor.contiguous(), group)  # type: ignore[no-untyped-call]
    return gathered
