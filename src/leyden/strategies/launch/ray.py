# SPDX-License-Identifier: Apache-2.0
"""Runs one call in actors of a Ray cluster, and brings back its result.

Ray places the actors, starts them anew when they die, and carries the call there and its results back; the ranks then meet
through torch.distributed, as everywhere.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from leyden.errors import MisconfigurationException
from leyden.runtime import collective
from leyden.runtime.ranks import rank_zero_warn
from leyden.runtime.world import LOCALHOST, World
from leyden.strategies.launch import carry
from leyden.strategies.launch.fresh import pack, perform

START = 30.0
"""Seconds that an actor has to answer when Ray starts it anew."""
GRACE = 3.0
"""Seconds in which the death of an actor shows, after another one has failed: it may be what that one failed of."""


class OnRay:
    """Starts the processes of a strategy as actors of a Ray cluster.

    ::

        Trainer(strategy="ddp_ray", devices=4, num_nodes=2)
        Trainer(strategy=DDPStrategy(start_method=OnRay(num_cpus=4, max_restarts=3)), devices=4, num_nodes=2)

    ``devices`` actors share a node, and there are ``num_nodes`` of them. The cluster is the one that this program is
    connected to, else the one that ``RAY_ADDRESS`` names or that runs on this machine, else one that is started here for
    the length of the call.

    Args:
        num_cpus: CPUs of each actor.
        num_gpus: GPUs of each actor; None is one where the Trainer computes on GPUs, else none.
        resources: Other resources of each actor, by Ray's names.
        max_restarts: How many times all ranks are started anew when an actor dies or its machine does; a fit goes on from
            its newest checkpoint, which must lie where all nodes can read it. An exception of the program ends the run.
        timeout: Seconds that the cluster has to place the actors.

    Raises:
        MisconfigurationException: for a value that is not possible.
    """

    def __init__(
        self,
        num_cpus: float = 1,
        num_gpus: float | None = None,
        resources: Mapping[str, float] | None = None,
        max_restarts: int = 0,
        timeout: float = 300.0,
    ) -> None:
        numbers: dict[str, Any] = {"num_cpus": num_cpus, "num_gpus": num_gpus or 0, "max_restarts": max_restarts}
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
                raise MisconfigurationException(f"OnRay({name}={value!r}) is not valid: it must be 0 or more.")
        self.num_cpus, self.num_gpus, self.resources = num_cpus, num_gpus, dict(resources or {})
        self.max_restarts, self.timeout = max_restarts, timeout

    def call(self, strategy: Any, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run ``function(*arguments)`` in actors; return what it returned on rank 0. See ``launch.call``. No actor is left.

        Raises:
            torch.multiprocessing.ProcessRaisedException: with the traceback of the rank that failed first.
            RuntimeError: when an actor is lost once too often.
            MisconfigurationException: where Ray is missing, or the cluster has not what is asked for.
        """
        ray = _ray()
        each = self._each(strategy.root_device.type)
        with _connected(ray, each["CPU"] * strategy.world_size):
            actors = _Actors(ray, self, each, strategy.num_nodes, strategy.num_processes)
            try:
                return self._until_done(ray, actors, strategy, function, arguments)
            finally:
                actors.close()

    def _until_done(
        self, ray: Any, actors: _Actors, strategy: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
    ) -> Any:
        restarts = 0
        while True:
            packed = pack(ray.cloudpickle, strategy, function, arguments)
            try:
                return ray.cloudpickle.loads(actors.perform(packed))
            except _Lost as lost:
                if restarts >= self.max_restarts:
                    more = "" if self.max_restarts else " OnRay(max_restarts=n) starts all ranks anew, n times."
                    raise RuntimeError(f"{lost}{more}") from lost.__cause__
                restarts += 1
                rank_zero_warn(f"{lost} All ranks start anew ({restarts} of {self.max_restarts}).")
                arguments = carry.again(function, arguments)
                actors.renew()

    def _each(self, device: str) -> dict[str, float]:
        cards = (1 if device == "cuda" else 0) if self.num_gpus is None else self.num_gpus
        return {"CPU": self.num_cpus, **({"GPU": cards} if cards else {}), **self.resources}


class _Lost(Exception):
    """An actor is gone: not by an exception of the program, but with its process or its machine."""


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise MisconfigurationException("strategy='ddp_ray' needs Ray: pip install ray.") from error


@contextlib.contextmanager
def _connected(ray: Any, cpus: float) -> Iterator[None]:
    """For the length of the block, be connected to a cluster; one that was started here for this alone is ended."""
    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": True, "configure_logging": True}
    ends = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), **quiet)
    except ConnectionError:
        if "RAY_ADDRESS" in os.environ:
            raise
        number = max(int(-(-cpus // 1)), os.cpu_count() or 1)
        ray.init(address="local", num_cpus=number, include_dashboard=False, _node_ip_address=LOCALHOST, **quiet)
    try:
        yield
    finally:
        ray.shutdown()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ends)  # Ray has put its own there


class _Actors:
    """The actors of one call, a node's share of them in each bundle of a placement group."""

    def __init__(self, ray: Any, options: OnRay, each: Mapping[str, float], nodes: int, on_each: int) -> None:
        self.ray, self.nodes, self.on_each = ray, nodes, on_each
        groups = importlib.import_module("ray.util.placement_group")
        bundle = {name: amount * on_each for name, amount in each.items() if amount}
        self.group = groups.placement_group([bundle] * nodes, strategy="STRICT_SPREAD" if nodes > 1 else "PACK")
        self._remove = groups.remove_placement_group
        self.actors: list[Any] = []
        self.places: list[dict[str, Any]] = []
        try:
            self._wait_for_room(bundle, options.timeout)
            strategies = importlib.import_module("ray.util.scheduling_strategies")
            others = {name: amount for name, amount in each.items() if name not in ("CPU", "GPU") and amount}
            for rank in range(nodes * on_each):
                where = strategies.PlacementGroupSchedulingStrategy(self.group, rank // on_each)
                actor = ray.remote(_Rank).options(
                    num_cpus=each["CPU"], num_gpus=each.get("GPU", 0), resources=others, max_restarts=-1,
                    scheduling_strategy=where,
                )  # fmt: skip
                self.actors.append(actor.remote())
        except BaseException:
            self.close()
            raise

    def _answers(self, ask: Callable[[], Any]) -> Any:
        """Return what actors answer; one that Ray is just starting anew is asked again."""
        until = time.monotonic() + START
        while True:
            try:
                return self.ray.get(ask())
            except self.ray.exceptions.ActorUnavailableError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)

    def _wait_for_room(self, bundle: Mapping[str, float], timeout: float) -> None:
        ray, began = self.ray, time.monotonic()
        while not ray.wait([self.group.ready()], timeout=2.0)[0]:
            has = ray.cluster_resources()
            short = {name: amount for name, amount in bundle.items() if has.get(name, 0) < amount * self.nodes}
            if time.monotonic() - began > (10.0 if short else timeout):
                asked = (
                    f"{self.nodes} nodes with {dict(bundle)} each" if self.nodes > 1 else f"a node with {dict(bundle)}"
                )
                free = {name: ray.available_resources().get(name, 0) for name in bundle}
                raise MisconfigurationException(
                    f"The Ray cluster cannot give {asked}: of these it has"
                    f" { ({name: has.get(name, 0) for name in bundle}) } in all, {free} free, on"
                    f" {len(ray.nodes())} nodes. Ask for fewer devices or nodes, or for less with OnRay(num_cpus=...,"
                    " num_gpus=...)."
                )

    # ------------------------------------------------------------------ a call

    def perform(self, call: bytes) -> bytes:
        """Run the call in all actors; return the report of rank 0.

        Raises:
            ProcessRaisedException: with the traceback of the rank that failed first.
            _Lost: when an actor is gone.
        """
        ray = self.ray
        try:
            self.places = self._answers(lambda: [actor.place.remote() for actor in self.actors])
            one_machine = len({place["node"] for place in self.places}) == 1
            address = LOCALHOST if one_machine else self.places[0]["address"]
            port = self._answers(lambda: self.actors[0].serve.remote(address))
        except ray.exceptions.RayActorError as error:
            raise _Lost(f"An actor ended before the run began ({_first_line(error)}).") from error
        size, what, path = len(self.actors), ray.put(call), [os.path.abspath(entry) for entry in sys.path]
        world = World(size=size, local_size=self.on_each, address=address, port=port)
        running = {}
        for rank, actor in enumerate(self.actors):
            mine = replace(world, rank=rank, local_rank=rank % self.on_each, node=rank // self.on_each)
            cards = visible([place["cards"] for place in self.places[mine.node * self.on_each :][: self.on_each]])
            running[actor.perform.remote(mine, cards, path, what)] = rank
        reports = self._results(running)
        return reports[0]

    def _results(self, running: dict[Any, int]) -> dict[int, bytes]:
        """Wait for all; the first Ctrl-C is theirs to answer, the second one ends them."""
        ray, interrupted = self.ray, False
        done: dict[int, bytes] = {}
        failures: list[carry.Failure] = []
        until = float("inf")  # one that is gone takes some time to be missed
        while running:
            try:
                ready, _ = ray.wait(list(running), timeout=0.5)
                for ref in ready:
                    rank = running[ref]
                    try:
                        outcome = ray.get(ref)
                    except ray.exceptions.RayActorError as error:
                        raise self._lost(rank, error) from error
                    del running[ref]
                    if isinstance(outcome, bytes):
                        done[rank] = outcome
                    else:
                        failures.append(carry.Failure(*outcome))
                        until = min(until, time.monotonic() + GRACE)
                if time.monotonic() > until:
                    break
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                self._interrupt()
        if failures:
            first = min(failures)
            found = carry.raised(first, ray.cloudpickle.loads, self.places[first.rank]["pid"])
            if interrupted and isinstance(found.__cause__, KeyboardInterrupt):
                raise found.__cause__
            raise found
        return done

    def _lost(self, rank: int, error: BaseException) -> _Lost:
        place = self.places[rank]
        return _Lost(
            f"The actor of rank {rank} (process {place['pid']} on {place['address']}) is gone: {_first_line(error)}."
        )

    def _interrupt(self) -> None:
        """Bring a Ctrl-C to all ranks, wherever they are: Ray's own processes let none through."""
        ray = self.ray
        here, affinity = (
            ray.get_runtime_context().get_node_id(),
            importlib.import_module("ray.util.scheduling_strategies"),
        )
        for place in self.places:
            if place["node"] == here:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(place["pid"], signal.SIGINT)
            else:
                where = affinity.NodeAffinitySchedulingStrategy(place["node"], soft=False)
                ray.remote(os.kill).options(num_cpus=0, scheduling_strategy=where).remote(place["pid"], signal.SIGINT)

    # ------------------------------------------------------------------ the end of them

    def renew(self) -> None:
        """Have Ray start all of them anew, those that are still in the call as well."""
        ray = self.ray
        for actor, place in zip(self.actors, self.places, strict=True):
            ray.kill(actor, no_restart=False)
            until = time.monotonic() + 60.0
            while time.monotonic() < until:  # until it is another process, whichever way it went
                with contextlib.suppress(ray.exceptions.RayActorError):
                    if ray.get(actor.place.remote())["pid"] != place["pid"]:
                        break
                time.sleep(0.1)

    def close(self) -> None:
        """End all of them, and give back the room."""
        ray = self.ray
        for actor in self.actors:
            ray.kill(actor)
        until = time.monotonic() + 10.0
        for actor in self.actors:  # not before they are gone
            with contextlib.suppress(ray.exceptions.RayError):
                while time.monotonic() < until:
                    ray.get(actor.place.remote(), timeout=10.0)
        self._remove(self.group)


def visible(cards: Sequence[Sequence[int | str]]) -> str | None:
    """Return what CUDA_VISIBLE_DEVICES is in each process of a node, given the GPUs that each was given; None for none.

    All see those of all, so that each can reach its neighbour's, and the local rank is the index of its own.
    """
    seen = [str(index) for mine in cards for index in mine]
    return ",".join(dict.fromkeys(seen)) or None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")


class _Rank:
    """The actor: one process of the run."""

    def place(self) -> dict[str, Any]:
        """Where this process is, and which GPUs it was given."""
        ray = _ray()
        context = ray.get_runtime_context()
        return {
            "pid": os.getpid(), "node": context.get_node_id(), "address": ray.util.get_node_ip_address(),
            "cards": ray.get_gpu_ids(),
        }  # fmt: skip

    def serve(self, address: str) -> int:
        """Open the store at which all meet; return its port."""
        return collective.serve(address)

    def perform(self, world: World, cards: str | None, path: Sequence[str], call: bytes) -> Any:
        """Run the call as one of ``world``; return the report of rank 0, or what it failed with as a tuple."""
        if cards is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = cards
        sys.path += [entry for entry in path if entry not in sys.path and os.path.exists(entry)]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return perform(_ray().cloudpickle, call, world)
        except BaseException as error:
            return tuple(carry.failure(world.rank, error))
