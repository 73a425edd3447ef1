# SPDX-License-Identifier: Apache-2.0
"""Accelerators, and how ``Trainer(accelerator=..., devices=...)`` becomes a list of torch devices."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from leyden.errors import MisconfigurationException, did_you_mean
from leyden.runtime.ranks import rank_zero_info, rank_zero_warn


class Accelerator:
    """A kind of device. A subclass of one's own may be passed as ``Trainer(accelerator=MyAccelerator())``."""

    @staticmethod
    def name() -> str:
        """Return the name, as in ``Trainer(accelerator=...)``; also the type of its torch devices."""
        raise NotImplementedError("An accelerator needs a name().")

    @staticmethod
    def is_available() -> bool:
        """Return whether this machine has such a device."""
        raise NotImplementedError("An accelerator needs is_available().")

    @staticmethod
    def auto_device_count() -> int:
        """Return how many devices ``devices="auto"`` takes."""
        raise NotImplementedError("An accelerator needs auto_device_count().")

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        """Return what ``Trainer(devices=...)`` means, for :meth:`get_parallel_devices`; raise if it means nothing."""
        raise NotImplementedError("An accelerator needs parse_devices().")

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """Return the torch devices for what :meth:`parse_devices` returned."""
        raise NotImplementedError("An accelerator needs get_parallel_devices().")

    def setup_device(self, device: torch.device) -> None:
        """Make ``device`` the current one of this process; raise if it is of another kind."""
        if device.type != self.name():
            raise MisconfigurationException(f"{type(self).__name__} cannot use the device {str(device)!r}.")

    def setup(self, trainer: Any) -> None:
        """Called when a run begins, after ``setup_device``; for an accelerator of one's own."""

    def get_device_stats(self, device: torch.device | str | int) -> dict[str, Any]:
        """Return figures on the load of ``device`` by name."""
        return {}

    @classmethod
    def register_accelerators(cls, accelerator_registry: Any) -> None:
        """Put the class into a registry under its name, if it is not there."""
        name = cls.name()
        if name not in accelerator_registry:
            accelerator_registry.register(name, cls, description=cls.__name__)

    def teardown(self) -> None:
        """Give back at the end of a run what is cached on the device."""


class CPUAccelerator(Accelerator):
    """The CPU; ``devices`` is a number of processes, which share its cores."""

    @staticmethod
    def name() -> str:
        return "cpu"

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def parse_devices(devices: int | str) -> int:
        """Return the number of processes, at least 1; -1 is 1."""
        count = int(devices) if isinstance(devices, str) and _is_int(devices) else devices
        if not isinstance(count, int) or (count <= 0 and count != -1):
            raise MisconfigurationException(
                f"devices={devices!r} with the CPU accelerator: give a number of processes, at least 1, or 'auto'."
            )
        return 1 if count == -1 else int(count)

    @staticmethod
    def get_parallel_devices(devices: int | str) -> list[torch.device]:
        return [torch.device("cpu")] * CPUAccelerator.parse_devices(devices)

    def get_device_stats(self, device: torch.device | str | int) -> dict[str, Any]:
        """Return ``cpu_vm_percent``, ``cpu_percent``, ``cpu_swap_percent``; needs psutil."""
        return _system_load("cpu")


class CUDAAccelerator(Accelerator):
    """NVIDIA GPUs, and AMD's under ROCm."""

    @staticmethod
    def name() -> str:
        return "cuda"

    @staticmethod
    def is_available() -> bool:
        return torch.cuda.device_count() > 0

    @staticmethod
    def auto_device_count() -> int:
        return torch.cuda.device_count()

    @staticmethod
    def parse_devices(devices: int | str | Sequence[int]) -> list[int]:
        """Return the indices of the GPUs: -1 is all, n the first n, ``"0,2"`` and ``[0, 2]`` those."""
        return _parse_indices(devices, list(range(torch.cuda.device_count())), "cuda")

    @staticmethod
    def get_parallel_devices(devices: Sequence[int]) -> list[torch.device]:
        return [torch.device("cuda", index) for index in devices]

    def setup_device(self, device: torch.device) -> None:
        super().setup_device(device)
        torch.cuda.set_device(device)

    @staticmethod
    def set_nvidia_flags(local_rank: int) -> None:  # noqa: ARG004  # others number them by it
        """Count GPUs as ``nvidia-smi`` does, by their place on the bus."""
        os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"

    def get_device_stats(self, device: torch.device | str | int) -> dict[str, Any]:
        """Return what :func:`torch.cuda.memory_stats` says, in bytes and counts."""
        return dict(torch.cuda.memory_stats(device))

    def teardown(self) -> None:
        torch.cuda.empty_cache()  # does nothing where CUDA was not used


class MPSAccelerator(Accelerator):
    """The GPU of Apple silicon; there is one."""

    @staticmethod
    def name() -> str:
        return "mps"

    @staticmethod
    def is_available() -> bool:
        return torch.backends.mps.is_available()

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def parse_devices(devices: int | str | Sequence[int]) -> list[int]:
        """Return ``[0]`` for 1, -1, ``[0]`` and their like."""
        return _parse_indices(devices, [0] if MPSAccelerator.is_available() else [], "mps")

    @staticmethod
    def get_parallel_devices(devices: Sequence[int]) -> list[torch.device]:
        return [torch.device("mps", index) for index in devices]

    def get_device_stats(self, device: torch.device | str | int) -> dict[str, Any]:
        """Return ``M1_vm_percent``, ``M1_percent``, ``M1_swap_percent``; needs psutil."""
        return _system_load("M1")


@contextmanager
def current(accelerator: Accelerator, device: torch.device) -> Iterator[None]:
    """For the length of the block, ``device`` is the current one of its kind; then what was cached on it is given back."""
    former = torch.cuda.current_device() if device.type == "cuda" else None
    accelerator.setup_device(device)
    try:
        yield
    finally:
        accelerator.teardown()
        if former is not None:
            torch.cuda.set_device(former)


ACCELERATORS: dict[str, type[Accelerator]] = {
    "mps": MPSAccelerator,
    "cuda": CUDAAccelerator,
    "cpu": CPUAccelerator,
}
"""By name; ``"auto"`` takes the first that is available, ``"gpu"`` the first but the CPU."""


def make_accelerator(accelerator: str | Accelerator) -> Accelerator:
    """Return the accelerator that ``Trainer(accelerator=...)`` means: ``"auto"``, ``"gpu"``, a name, or an instance.

    Raises MisconfigurationException if it is unknown or this machine has none.
    """
    available = [name for name, kind in ACCELERATORS.items() if kind.is_available()]
    if isinstance(accelerator, Accelerator):
        chosen = accelerator
    elif accelerator == "auto":
        return ACCELERATORS[available[0]]()
    elif accelerator == "gpu":
        devices_but_cpu = [name for name in available if name != "cpu"]
        if not devices_but_cpu:
            raise MisconfigurationException(
                "accelerator='gpu': torch finds no GPU here, neither by CUDA nor by MPS. "
                "Check the driver and that torch is built for it, or use accelerator='cpu' or 'auto'."
            )
        return ACCELERATORS[devices_but_cpu[0]]()
    elif str(accelerator).lower() in ACCELERATORS:
        chosen = ACCELERATORS[str(accelerator).lower()]()
    else:
        allowed = ("auto", "gpu", *ACCELERATORS)
        # three letters are soon alike: do not suggest a CPU to who asks for a TPU
        other = str(accelerator).lower() in ("tpu", "hpu", "xpu", "npu")
        hint = " Leyden does not support that kind." if other else did_you_mean(str(accelerator), allowed)
        raise MisconfigurationException(
            f"You selected an invalid accelerator name: `accelerator={accelerator!r}`. Use one of"
            f" {', '.join(map(repr, allowed))}, or an instance of Accelerator.{hint}"
        )
    if not chosen.is_available():
        raise MisconfigurationException(
            f"accelerator={chosen.name()!r} is not available here. Available: {', '.join(map(repr, available))}."
        )
    return chosen


def choose(accelerator: str | Accelerator = "auto", devices: int | str | Sequence[int] = "auto") -> list[torch.device]:
    """Return the devices that ``Trainer(accelerator=..., devices=...)`` means; at least one.

    ``devices``: ``"auto"`` for all (one process on a CPU; one GPU in a notebook), -1 for all, a number n for the first
    n, a list or a string (``"0,2"``) for those. Raises MisconfigurationException for what is unknown or not here.
    """
    return parse_devices(make_accelerator(accelerator), devices)


def parse_devices(accelerator: Accelerator, devices: int | str | Sequence[int]) -> list[torch.device]:
    """Return the devices that ``Trainer(devices=...)`` means with ``accelerator``; see :func:`choose`."""
    wanted: Any = devices
    if wanted in (0, "0", [], ()) or isinstance(wanted, bool):
        raise MisconfigurationException(
            f"devices={wanted!r}: the value is not a valid input using {accelerator.name()} accelerator. "
            "Give a number of at least 1, a list of indices, -1 for all, or 'auto'."
        )
    if isinstance(wanted, str) and wanted.strip().lower() == "auto":
        wanted = accelerator.auto_device_count()
        free = _free(wanted) if type(accelerator) is CUDAAccelerator else []
        if wanted > 1 and accelerator.name() == "cuda" and hasattr(sys, "ps1"):
            rank_zero_info(
                "Using 1 of %d GPUs, as this is an interactive session. Ask for more with devices=...", wanted
            )
            wanted, free = 1, free[:1]
        wanted = free or wanted
    return accelerator.get_parallel_devices(accelerator.parse_devices(wanted))


def _free(count: int) -> list[int]:
    """Return the GPUs that no other process computes on, of ``count``; empty where all are to be taken.

    Raises:
        MisconfigurationException: where there are several, and all are in use.
    """
    from leyden.runtime.taken import taken  # noqa: PLC0415  # where there are GPUs to choose from

    busy = {index: by for index, by in taken().items() if index < count}
    free = [index for index in range(count) if index not in busy]
    by = "; ".join(f"cuda:{index} by {who}" for index, who in busy.items())
    if busy and count == 1:
        rank_zero_warn(f"The GPU is in use: {by}. It is taken all the same, as there is no other.")
        return []
    if not free:
        raise MisconfigurationException(
            f"devices='auto': all {count} GPUs are in use: {by}. Say which ones are to be shared with devices=[0] (say), or"
            " end those processes."
        )
    if busy:
        rank_zero_info("Leaving out what is in use: %s.", by)
    return free if busy else []


def find_usable_cuda_devices(num_devices: int = -1) -> list[int]:
    """Return the indices of the first ``num_devices`` GPUs (-1: of all) that a tensor can be put on at this moment.

    Useful where GPUs are in exclusive mode and some are taken. Raises MisconfigurationException (a ValueError) if the
    machine has fewer, RuntimeError if fewer are free.
    """
    if num_devices == 0:
        return []
    visible = torch.cuda.device_count()
    if visible == 0 or num_devices > visible:
        raise MisconfigurationException(f"num_devices={num_devices}: this machine has {visible} visible CUDA devices.")
    usable: list[int] = []
    taken: list[int] = []
    for index in range(visible):
        if len(usable) == num_devices:
            break
        try:
            torch.tensor(0, device=torch.device("cuda", index))
        except RuntimeError:
            taken.append(index)
        else:
            usable.append(index)
    if num_devices != -1 and len(usable) < num_devices:
        raise RuntimeError(f"num_devices={num_devices}: only {len(usable)} CUDA devices are free; taken are {taken}.")
    return usable


def _is_int(text: str) -> bool:
    return text.strip().removeprefix("-").isdigit()


def _parse_indices(devices: Any, available: list[int], kind: str) -> list[int]:
    """Return the indices that ``devices`` names; all of them must be in ``available``, each once."""
    allowed = "Give a number of devices, a list of indices, a string such as '0,2', -1 for all, or 'auto'."
    parsed: Any = devices
    if isinstance(devices, str):
        parts = [part for part in devices.split(",") if part.strip()]
        if not parts or not all(map(_is_int, parts)):
            raise MisconfigurationException(f"devices={devices!r} is not understood. {allowed}")
        # one number alone is a count, with a comma it is an index
        parsed = [int(part) for part in parts] if "," in devices else int(devices)
    if isinstance(parsed, int) and not isinstance(parsed, bool) and (parsed > 0 or parsed == -1):
        parsed = available if parsed == -1 else list(range(parsed))
    if not isinstance(parsed, (list, tuple)) or not all(type(index) is int for index in parsed):
        raise MisconfigurationException(f"devices={devices!r} is not understood. {allowed}")
    if len(set(parsed)) != len(parsed):
        raise MisconfigurationException(f"devices={devices!r} names a device twice.")
    absent = [index for index in parsed if index not in available]
    if absent or not parsed:
        raise MisconfigurationException(
            f"devices={devices!r} asks for {kind} devices {absent} that are not here. Here are: {available}."
        )
    return list(parsed)


def _system_load(prefix: str) -> dict[str, float]:
    try:
        psutil: Any = importlib.import_module("psutil")  # an optional dependency
    except ImportError as error:
        raise ModuleNotFoundError("Figures on the load of the machine need psutil: pip install psutil") from error
    return {
        f"{prefix}_vm_percent": psutil.virtual_memory().percent,
        f"{prefix}_percent": psutil.cpu_percent(),
        f"{prefix}_swap_percent": psutil.swap_memory().percent,
    }
