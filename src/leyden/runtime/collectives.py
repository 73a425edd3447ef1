# SPDX-License-Identifier: Apache-2.0
"""Collective operations as objects that own a group of processes: the interface of plug-ins for hand-written loops.

::

    collective = TorchCollective().setup(backend="gloo").create_group(ranks=[0, 1])
    total = collective.all_reduce(loss.detach(), op="sum")
    collective.teardown()
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from leyden.errors import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from typing_extensions import Self


class Collective(ABC):
    """What processes can do together. Tensors are changed in place where torch does so, and returned."""

    def __init__(self) -> None:
        self._group: Any = None

    # -- who

    @property
    @abstractmethod
    def rank(self) -> int:
        """The place of this process in the group."""

    @property
    @abstractmethod
    def world_size(self) -> int:
        """The number of processes of the group."""

    @property
    def group(self) -> Any:
        """The group that this object owns.

        Raises:
            RuntimeError: where it owns none.
        """
        if self._group is None:
            raise RuntimeError(f"This {type(self).__name__} owns no group; call create_group() first.")
        return self._group

    # -- exchanges

    @abstractmethod
    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        """Give ``tensor`` the values of rank ``src``."""

    @abstractmethod
    def all_reduce(self, tensor: Tensor, op: str) -> Tensor:
        """Put what ``op`` (``"sum"``, ``"max"``, …) makes of all tensors in the place of each."""

    @abstractmethod
    def reduce(self, tensor: Tensor, dst: int, op: str) -> Tensor:
        """As ``all_reduce``, on rank ``dst`` only."""

    @abstractmethod
    def all_gather(self, tensor_list: list[Tensor], tensor: Tensor) -> list[Tensor]:
        """Fill ``tensor_list`` with the tensors of all ranks."""

    @abstractmethod
    def gather(self, tensor: Tensor, gather_list: list[Tensor], dst: int = 0) -> list[Tensor]:
        """As ``all_gather``, on rank ``dst`` only; elsewhere ``gather_list`` is None."""

    @abstractmethod
    def scatter(self, tensor: Tensor, scatter_list: list[Tensor], src: int = 0) -> Tensor:
        """Give ``tensor`` the values that ``scatter_list`` of rank ``src`` has at the place of this rank."""

    @abstractmethod
    def reduce_scatter(self, output: Tensor, input_list: list[Tensor], op: str) -> Tensor:
        """Reduce the lists of all ranks, and put into ``output`` what is at the place of this rank."""

    @abstractmethod
    def all_to_all(self, output_tensor_list: list[Tensor], input_tensor_list: list[Tensor]) -> list[Tensor]:
        """Send each rank its part of ``input_tensor_list``; fill ``output_tensor_list`` with what comes."""

    @abstractmethod
    def send(self, tensor: Tensor, dst: int, tag: int = 0) -> None:
        """Send ``tensor`` to rank ``dst``."""

    @abstractmethod
    def recv(self, tensor: Tensor, src: int | None = None, tag: int = 0) -> Tensor:
        """Fill ``tensor`` with what rank ``src`` (None: any) sends."""

    @abstractmethod
    def barrier(self, device_ids: list[int] | None = None) -> None:
        """Wait for all processes of the group."""

    # -- groups

    @classmethod
    @abstractmethod
    def is_available(cls) -> bool:
        """Whether this kind of collective can be used here."""

    @classmethod
    @abstractmethod
    def is_initialized(cls) -> bool:
        """Whether the processes have met."""

    @classmethod
    @abstractmethod
    def init_group(cls, **kwargs: Any) -> None:
        """Let the processes meet."""

    @classmethod
    @abstractmethod
    def new_group(cls, **kwargs: Any) -> Any:
        """Return a new group of some of them; all must call this."""

    @classmethod
    @abstractmethod
    def destroy_group(cls, group: Any) -> None:
        """Close a group."""

    @classmethod
    @abstractmethod
    def _convert_to_native_op(cls, op: Any) -> Any:
        """Return what the exchange takes for the name of a reduction."""

    def setup(self, **kwargs: Any) -> Self:
        """Let the processes meet, if they have not; ``kwargs`` as for ``init_group``."""
        if not self.is_initialized():
            self.init_group(**kwargs)
        return self

    def create_group(self, **kwargs: Any) -> Self:
        """Make a group, and own it; ``kwargs`` as for ``new_group``.

        Raises:
            RuntimeError: where this object owns one already.
        """
        if self._group is not None:
            raise RuntimeError(f"This {type(self).__name__} owns a group already; call teardown() first.")
        self._group = self.new_group(**kwargs)
        return self

    def teardown(self) -> Self:
        """Close the group that this object owns.

        Raises:
            RuntimeError: where it owns none.
        """
        if self._group is None:
            raise RuntimeError(f"This {type(self).__name__} owns no group that could be closed.")
        group, self._group = self._group, None
        self.destroy_group(group)
        return self


class TorchCollective(Collective):
    """By torch.distributed. Without ``create_group`` it is about all processes.

    Raises:
        RuntimeError: for a torch that was built without torch.distributed.
    """

    manages_default_group = False
    """Whether ``setup`` has let the processes meet, so that the last ``teardown`` is to part them."""
    addr_key, port_key = "MASTER_ADDR", "MASTER_PORT"

    def __init__(self) -> None:
        if not dist.is_available():
            raise RuntimeError("TorchCollective needs torch.distributed, which this build of torch does not have.")
        super().__init__()

    @property
    def group(self) -> Any:
        """The group that this object owns; that of all processes, if it has made none."""
        if self._group is None:
            self._group = dist.GroupMember.WORLD
        return super().group

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def world_size(self) -> int:
        return dist.get_world_size(self.group)

    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        dist.broadcast(tensor, src, group=self.group)
        return tensor

    def all_reduce(self, tensor: Tensor, op: Any = "sum") -> Tensor:
        dist.all_reduce(tensor, op=self._convert_to_native_op(op), group=self.group)
        return tensor

    def reduce(self, tensor: Tensor, dst: int, op: Any = "sum") -> Tensor:
        dist.reduce(tensor, dst, op=self._convert_to_native_op(op), group=self.group)
        return tensor

    def all_gather(self, tensor_list: list[Tensor], tensor: Tensor) -> list[Tensor]:
        dist.all_gather(tensor_list, tensor, group=self.group)
        return tensor_list

    def gather(self, tensor: Tensor, gather_list: list[Tensor], dst: int = 0) -> list[Tensor]:
        dist.gather(tensor, gather_list, dst, group=self.group)
        return gather_list

    def scatter(self, tensor: Tensor, scatter_list: list[Tensor], src: int = 0) -> Tensor:
        dist.scatter(tensor, scatter_list, src, group=self.group)
        return tensor

    def reduce_scatter(self, output: Tensor, input_list: list[Tensor], op: Any = "sum") -> Tensor:
        dist.reduce_scatter(output, input_list, op=self._convert_to_native_op(op), group=self.group)
        return output

    def all_to_all(self, output_tensor_list: list[Tensor], input_tensor_list: list[Tensor]) -> list[Tensor]:
        dist.all_to_all(output_tensor_list, input_tensor_list, group=self.group)
        return output_tensor_list

    def send(self, tensor: Tensor, dst: int, tag: int = 0) -> None:
        dist.send(tensor, dst, tag=tag, group=self.group)

    def recv(self, tensor: Tensor, src: int | None = None, tag: int = 0) -> Tensor:
        dist.recv(tensor, src, tag=tag, group=self.group)
        return tensor

    def all_gather_object(self, object_list: list[Any], obj: Any) -> list[Any]:
        """Fill ``object_list`` with the objects of all ranks."""
        dist.all_gather_object(object_list, obj, group=self.group)
        return object_list

    def broadcast_object_list(self, object_list: list[Any], src: int, device: torch.device | None = None) -> list[Any]:
        """Give ``object_list`` the objects of rank ``src``."""
        dist.broadcast_object_list(object_list, src, group=self.group, device=device)
        return object_list

    def gather_object(self, obj: Any, object_gather_list: list[Any] | None, dst: int = 0) -> list[Any] | None:
        """Fill ``object_gather_list`` of rank ``dst`` (elsewhere None) with the objects of all ranks."""
        dist.gather_object(obj, object_gather_list, dst, group=self.group)
        return object_gather_list

    def scatter_object_list(
        self, scatter_object_output_list: list[Any], scatter_object_input_list: list[Any] | None, src: int = 0
    ) -> list[Any]:
        """Put the object that rank ``src`` has for this one at the first place of the output."""
        dist.scatter_object_list(scatter_object_output_list, scatter_object_input_list, src, group=self.group)
        return scatter_object_output_list

    def barrier(self, device_ids: list[int] | None = None) -> None:
        if self.group is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.barrier(group=self.group, device_ids=device_ids)

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """Wait for all processes of the group; after ``timeout`` an error names those that did not come."""
        dist.monitored_barrier(group=self.group, timeout=timeout, wait_all_ranks=wait_all_ranks)

    def setup(self, main_address: str | None = None, main_port: str | int | None = None, **kwargs: Any) -> Self:
        """Let the processes meet, if they have not.

        Args:
            main_address: Where rank 0 is; the environment's, if it says so.
            main_port: The port there; the same.
            kwargs: As for ``torch.distributed.init_process_group``.
        """
        if not self.is_initialized():
            with _set({self.addr_key: main_address, self.port_key: main_port}):
                super().setup(**kwargs)
            TorchCollective.manages_default_group = True
        return self

    def teardown(self) -> Self:
        """Close the group of this object, and that of all processes, if ``setup`` has opened it and it is the last."""
        member = self.group is not dist.GroupMember.NON_GROUP_MEMBER
        super().teardown()
        whole = dist.GroupMember.WORLD
        if whole is None:
            TorchCollective.manages_default_group = False
        elif member and TorchCollective.manages_default_group and len(_open_groups()) == 1:
            self.destroy_group(whole)
            TorchCollective.manages_default_group = False
        return self

    @classmethod
    def is_available(cls) -> bool:
        return dist.is_available()

    @classmethod
    def is_initialized(cls) -> bool:
        return cls.is_available() and dist.is_initialized()

    @classmethod
    def init_group(cls, **kwargs: Any) -> None:
        dist.init_process_group(**kwargs)

    @classmethod
    def new_group(cls, **kwargs: Any) -> Any:
        return dist.new_group(**kwargs)

    @classmethod
    def destroy_group(cls, group: Any) -> None:
        if group in _open_groups():  # processes that are not in it have nothing to close
            dist.destroy_process_group(group)

    @classmethod
    def _convert_to_native_op(cls, op: Any) -> Any:
        if isinstance(op, (dist.ReduceOp, dist.ReduceOp.RedOpType)):
            return op
        if not isinstance(op, str):
            raise ValueError(
                f"op={op!r} is not valid: it must be the name of a reduction, such as 'sum', or a ReduceOp."
            )
        found = dist.ReduceOp.RedOpType.__members__.get(op.upper())
        if found is None:
            names = [name.lower() for name in dist.ReduceOp.RedOpType.__members__]
            raise ValueError(
                f"op={op!r} is not a member of ReduceOp: it must be one of {names}.{did_you_mean(op, names)}"
            )
        return found


def _open_groups() -> Any:
    return dist.distributed_c10d._pg_map  # noqa: SLF001  # torch has no other list of them


@contextmanager
def _set(values: dict[str, Any]) -> Iterator[None]:
    """Have what the environment does not say in it, for as long as it is needed."""
    said = {key: str(value) for key, value in values.items() if value is not None and key not in os.environ}
    os.environ.update(said)
    try:
        yield
    finally:
        for key in said:
            os.environ.pop(key, None)


class SingleDeviceCollective(Collective):
    """Of one process: everything comes back as it was given."""

    @property
    def rank(self) -> int:
        return 0

    @property
    def world_size(self) -> int:
        return 1

    def broadcast(self, tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        return tensor

    def all_reduce(self, tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        return tensor

    def reduce(self, tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        return tensor

    def all_gather(self, tensor_list: list[Tensor], tensor: Tensor, **_: Any) -> list[Tensor]:
        return [tensor]

    def gather(self, tensor: Tensor, *_: Any, **__: Any) -> list[Tensor]:
        return [tensor]

    def scatter(self, tensor: Tensor, scatter_list: list[Tensor], *_: Any, **__: Any) -> Tensor:
        return scatter_list[0]

    def reduce_scatter(self, output: Tensor, input_list: list[Tensor], *_: Any, **__: Any) -> Tensor:
        return input_list[0]

    def all_to_all(
        self, output_tensor_list: list[Tensor], input_tensor_list: list[Tensor], *_: Any, **__: Any
    ) -> list[Tensor]:
        return input_tensor_list

    def send(self, *_: Any, **__: Any) -> None:
        pass

    def recv(self, tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        return tensor

    def barrier(self, *_: Any, **__: Any) -> None:
        pass

    @classmethod
    def is_available(cls) -> bool:
        return True

    @classmethod
    def is_initialized(cls) -> bool:
        return True

    @classmethod
    def init_group(cls, **_: Any) -> None:
        pass

    @classmethod
    def new_group(cls, **_: Any) -> Any:
        return object()

    @classmethod
    def destroy_group(cls, group: Any) -> None:
        pass

    @classmethod
    def _convert_to_native_op(cls, op: Any) -> Any:
        return op


__all__ = ["Collective", "SingleDeviceCollective", "TorchCollective"]
