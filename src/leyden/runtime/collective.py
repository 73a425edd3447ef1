# SPDX-License-Identifier: Apache-2.0
"""The process group of this process, and the few exchanges that the house needs of it, all of them small and on the CPU.

``meet`` opens the group once; it stays open for all runs of the process, whatever Trainer makes them, and is closed when
the process ends. Gradients do not travel here: a strategy has torch's own machinery for them.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # torch has them there

from leyden.errors import MisconfigurationException
from leyden.runtime.world import OURS, World

NOTICE = 30.0
"""Seconds that processes wait for each other to start, before they say so."""
PATIENCE = 10.0
"""Seconds that a thread has, at the end of the program, to come back from a question to the store."""
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


class Gate:
    """Where copies of this process, made by ``fork``, wait until all of them are made.

    The store's thread looks up the name of each process that connects, under a lock of the C library. A copy that is made
    at that moment has the lock as it is then, held by a thread that it does not have, and would wait for it for ever.
    """

    def __init__(self) -> None:
        self._reads, self._writes = os.pipe()

    def wait(self) -> None:
        """In a copy: return when all are made, or the process that makes them is gone."""
        os.close(self._writes)
        os.read(self._reads, 1)  # nothing is ever written: this returns when nobody could any more
        os.close(self._reads)

    def open(self) -> None:
        """In the process that makes them: no more are made."""
        os.close(self._writes)
        os.close(self._reads)


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
    with _interface(world):
        try:
            store = store_of(world, timeout)
            _roll_call(PrefixStore("roll", store), world, timeout)
            dist.init_process_group(
                backend, store=PrefixStore("group", store), rank=world.rank, world_size=world.size, timeout=timeout
            )
        except (dist.DistNetworkError, dist.DistStoreError, TimeoutError, OSError) as error:
            in_use = "EADDRINUSE" in str(error) or "address already in use" in str(error).lower()
            what = (
                f"port {world.port} of this machine is in use: by another job, or by processes that an earlier one has left."
                " Set MASTER_PORT to a free port, the same for all processes"
                if in_use
                else f"{_first_line(error)}. Check that MASTER_ADDR and MASTER_PORT are those of the machine of rank 0, that"
                " they can be reached from this machine, that no other job uses the port, and that all processes were"
                " started"
            )
            raise MisconfigurationException(
                f"Rank {world.rank} of {world.size} could not meet the others at {world.address}:{world.port}"
                f"{'' if in_use else f' within {timeout.total_seconds():g} s'}: {what}."
            ) from error
    atexit.register(part)


def store_of(world: World, timeout: timedelta = timedelta(seconds=30)) -> Store:
    """Return the key-value store of the processes; reading and writing it is no collective, and works in any thread."""
    store = _STORES.get(os.getpid())
    if store is None:
        # torchrun's own process may serve it; so does the process that called, where processes run one call of it
        elsewhere = os.environ.get(OURS) == "spawn" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        serves = world.rank == 0 and not elsewhere and not dist.is_initialized()
        store = _STORES[os.getpid()] = _connect(world, timeout, serves)
    # the store of torchrun outlives the processes, which it may start anew: after a failure, which it counts, or since
    # there are more of them, which it does not
    return PrefixStore(f"leyden/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{world.size}", store)


def _connect(world: World, timeout: timedelta, serves: bool) -> Store:
    """Connect to the store at which all meet, or open it; say so, where that takes long.

    Raises:
        Exception: what torch raises, if nobody answers there in time.
    """
    found: list[Any] = []

    def connect() -> None:
        try:
            found.append(TCPStore(world.address, world.port, None, serves, timeout, wait_for_workers=False))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=connect, name="leyden-connect", daemon=True)
    began, notice = time.monotonic(), NOTICE
    thread.start()
    guard(thread)
    until = began + timeout.total_seconds() + 1.0  # torch itself waits for ever for an answer from who is no store
    while thread.is_alive():
        thread.join(min(notice, max(until - time.monotonic(), 0.01)))
        if thread.is_alive() and time.monotonic() > until:
            raise TimeoutError("whoever listens there does not answer as rank 0 would")
        if thread.is_alive() and time.monotonic() - began >= notice:
            notice *= 4
            _say(
                f"rank {world.rank} of {world.size} waits to reach rank 0 at {world.address}:{world.port}, for"
                f" {time.monotonic() - began:.0f} s so far"
            )
    if isinstance(found[0], Exception):
        raise found[0]
    store: Store = found[0]
    return store


_GUARDED: dict[threading.Thread, Callable[[], None]] = {}
"""Threads that may be in a call of torch when the interpreter ends, with what tells them to stop."""


def guard(thread: threading.Thread, stop: Callable[[], None] = lambda: None) -> None:
    """See to it that ``thread``, which asks the store, is over before the interpreter ends.

    Python ends a daemon thread that comes back from a call at that moment, in the middle of torch's C++, which takes that
    for the end of the process: "terminate called without an active exception", and SIGABRT for an exit code.

    Args:
        thread: Which has begun.
        stop: Lets it end soon.
    """
    for each in [each for each in _GUARDED if not each.is_alive()]:
        del _GUARDED[each]
    _GUARDED[thread] = stop
    atexit.unregister(_end_threads)
    atexit.register(_end_threads)  # ahead of what was registered before, which may wait for the store as well


def _end_threads() -> None:
    """The program is over: stop the threads, and where one cannot, leave without the end that it would not survive."""
    for thread, stop in _GUARDED.items():
        if thread.is_alive():  # in a copy of this process it is not
            with contextlib.suppress(Exception):
                stop()
            thread.join(PATIENCE)
    if not any(thread.is_alive() for thread in _GUARDED):
        return
    _say(
        "the program is over, but the store of rank 0 does not answer: its process hangs or is stopped, or the way is cut"
    )
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(1)


def _roll_call(store: Store, world: World, timeout: timedelta) -> None:
    """Wait until all processes are here; say who is missing, where that takes long.

    Raises:
        TimeoutError: naming those that did not come in time.
    """
    store.set(str(world.rank), socket.gethostname())
    began, notice, here = time.monotonic(), NOTICE, store.add("here", 1)
    while here < world.size:
        waited = time.monotonic() - began
        if waited >= min(notice, timeout.total_seconds()):
            missing = [rank for rank in range(world.size) if not store.check([str(rank)])]
            shown = ", ".join(map(str, missing[:16])) + (f" and {len(missing) - 16} more" if len(missing) > 16 else "")
            if waited >= timeout.total_seconds() and missing:
                raise TimeoutError(f"these ranks have not come: {shown}")
            notice *= 4
            if world.rank == 0:
                _say(f"rank 0 of {world.size} waits for the ranks {shown} to start, for {waited:.0f} s so far")
        time.sleep(min(max(waited / 10, 0.002), 0.5))
        here = store.add("here", 0)


def _say(text: str) -> None:
    with contextlib.suppress(Exception):
        print(f"leyden: {text}.", file=sys.stderr, flush=True)


def part() -> None:
    """Close the process group, if it is open."""
    if dist.is_initialized():
        gc.collect()  # whatever still holds the group would keep its threads, which must not outlive the interpreter
        dist.destroy_process_group()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _interface(world: World) -> Iterator[None]:
    """Let Gloo use the network device by which rank 0 is reached, and on one machine its loopback.

    By itself it takes that of the address to which the machine's name resolves, which others may not reach.
    """
    name = "GLOO_SOCKET_IFNAME"
    device = None
    if sys.platform.startswith("linux") and name not in os.environ:
        device = "lo" if world.address in LOCAL else _device_towards(world) if world.nodes > 1 else None
    if device is None:
        yield
        return
    os.environ[name] = device
    try:
        yield
    finally:
        del os.environ[name]


def _device_towards(world: World) -> str | None:
    """The network device of this machine by which ``world.address`` is reached; None where that is not known."""
    import fcntl  # noqa: PLC0415  # Linux has it

    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((world.address, world.port or 9))  # sends nothing
            source = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                with contextlib.suppress(OSError):  # one without an address
                    # SIOCGIFADDR: the address stands behind a name of 16 bytes and 4 of the kind and the port
                    found = fcntl.ioctl(probe.fileno(), 0x8915, name.encode()[:15].ljust(256, b"\0"))
                    if socket.inet_ntoa(found[20:24]) == source:
                        return name
    except OSError:
        pass
    return None


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
