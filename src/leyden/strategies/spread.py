# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a module whose parameters are spread over processes: each writes, and reads, the parts that it has.

Written as folders, see ``leyden.shards`` and ``leyden.folders``; read from folders and from files. At no moment does a
process have the whole of what is spread.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from leyden import archive, files, folders, shards
from leyden.errors import CheckpointError, MisconfigurationException
from leyden.loading import clean_name
from leyden.strategies.parallel import ParallelStrategy
from leyden.types import PathLike

if TYPE_CHECKING:
    from leyden.sharded import Source


from leyden.tree import parameters_of


class ShardedCheckpoints(ParallelStrategy):
    """How strategies save and load whose parameters are DTensors: as folders, where ``saves_shards``."""

    _called: Mapping[int, str] = MappingProxyType({})
    """The names of the parameters that the optimizers have, by their ``id``."""
    _source: Source | None = None
    """Where the tensors are read from that a checkpoint has empty ones for, while a run begins."""
    _group: Any = None
    """The processes, once more: for what the threads that write behind the training say to each other."""

    # ------------------------------------------------------------------ saved

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: PathLike, storage_options: Any = None) -> None:
        """Write a complete checkpoint, atomically; as a folder, if ``saves_shards``, into which all processes write.

        Raises:
            CheckpointError: on every process, if one of them could not.
            TypeError: for ``storage_options`` of a folder, which is not written through the CheckpointIO.
        """
        if not self.saves_shards:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        if storage_options is not None:
            raise TypeError(
                f"Trainer.save_checkpoint(storage_options={storage_options!r}): a checkpoint of shards is a folder on a file"
                " system that all processes share, and takes none."
            )
        if self._alone:
            raise CheckpointError(
                f"The checkpoint {str(filepath)!r} could not be written: each process has a part of it, and rank"
                f" {self.global_rank} is on its way out of the run by itself."
            )
        path: str = self.broadcast(str(filepath))
        files.require_local(path)
        rest, mine = shards.take_out(checkpoint, self.is_global_zero)
        record: dict[str, Any] = {key: rest[key] for key in ("global_step", "epoch") if key in rest}
        content = archive.with_manifest(rest) if self.is_global_zero else None, mine.tensors
        write = partial(self._write_folder, path, mine.plan, record, self._group_behind())
        self.on_all_ranks(lambda: self.checkpoint_io.hand_over(content, write), path)

    def _write_folder(self, path: str, plan: Any, record: Mapping[str, Any], group: Any, content: Any) -> None:
        """Write this process's share of a folder; on a thread, with a ``group`` of its own."""
        rest, tensors = content

        def write(folder: Path) -> None:
            shards.Shards(tensors, plan).write(folder, group, alone=self.world_size == 1)
            if rest is not None:
                files.write(rest, folder / shards.META)

        self.save_folder(path, write, record, None if group is None else self._gather_in(group))

    @staticmethod
    def _gather_in(group: Any) -> Callable[[Any], list[Any]]:
        from leyden.runtime.collective import gather_objects  # noqa: PLC0415  # as in ParallelStrategy

        return partial(gather_objects, group=group)

    def _group_behind(self) -> Any:
        """Return the group for exchanges on a thread; None where saves are complete when they return."""
        from leyden.checkpoint_io.behind import AsyncCheckpointIO  # noqa: PLC0415  # where a checkpoint is written

        if self.world_size == 1 or not isinstance(self.checkpoint_io, AsyncCheckpointIO):
            return None
        if self._group is None:
            self._group = torch.distributed.new_group(backend="gloo", timeout=self.timeout)
        return self._group

    def remove_checkpoint(self, filepath: PathLike) -> None:
        place = None if files.is_remote(filepath) else files.local_path(filepath)
        if place is None or not place.is_dir() or place.is_symlink():
            super().remove_checkpoint(filepath)
        elif self.is_global_zero:
            self.checkpoint_io.settle()
            files.remove(place)

    def teardown(self) -> None:
        self._source = None
        try:
            super().teardown()
        finally:
            group, self._group = self._group, None
            if group is not None and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group(group)

    # ------------------------------------------------------------------ loaded

    def load_checkpoint(self, filepath: PathLike, weights_only: bool | None = True) -> dict[str, Any]:
        """Return a checkpoint whose weights and optimizer states are not read yet.

        Of a folder, empty tensors on the device ``meta`` stand in their places; those of a file are mapped into memory.
        ``load_module_state_dict`` and ``load_optimizer_state`` take the parts of this process. The checksums have been
        compared, of a folder by all processes together.

        Raises:
            CheckpointError: on every process, if it cannot be used.
        """
        from leyden.checkpoint_io import AsyncCheckpointIO, TorchCheckpointIO  # noqa: PLC0415  # where one is read
        from leyden.sharded import Source  # noqa: PLC0415  # loads torch.distributed.checkpoint

        self._source, plugin = None, self.checkpoint_io
        plugin.settle()
        if isinstance(plugin, AsyncCheckpointIO):
            plugin = plugin.checkpoint_io
        if files.is_remote(filepath) or not isinstance(plugin, TorchCheckpointIO):
            return super().load_checkpoint(filepath, weights_only)
        place, safe = files.require_file(files.local_path(filepath)), weights_only is not False
        self.on_all_ranks(lambda: self._check(place), filepath)
        if place.is_dir():
            self._source = source = Source(place, "cpu", safe)
            return source.whole(lambda tensor: torch.empty_like(tensor, device="cpu"), self._is_for_later)
        found = archive.read(place, repr(str(filepath)), "cpu", safe, mmap=zipfile.is_zipfile(place))
        archive.warn_of_changes(found, repr(str(filepath)))
        return found  # type: ignore[no-any-return]

    def _is_for_later(self, path: shards.Path) -> bool:
        """Whether what is at ``path`` of a checkpoint is spread, or another process's own."""
        if path[:2] == shards.OF_RANKS:
            return bool(path[2] != self.global_rank)
        return path[0] in (shards.WEIGHTS, shards.OPTIMIZERS, "leyden")

    def _check(self, place: Path) -> None:
        if place.is_dir():
            if folders.is_committed(place):
                folders.check(place, self.global_rank, self.world_size)
        elif self.is_global_zero:
            archive.check(place, repr(str(place)))

    def parts(self, values: Mapping[Any, Any], models: Mapping[Any, Any], strict: bool = False) -> dict[Any, Any]:
        """Return values of a checkpoint, of what is spread the parts that this process has.

        Args:
            values: Whole tensors, empty ones that stand for those of the folder, or values of other kinds.
            models: For each of them, what it is to be spread like, if anything; None and plain tensors are not spread.
            strict: Leave one alone that is not of the shape of its model; otherwise every process gets the whole of it.

        Takes no exchange. What is read is no more than what is returned.
        """
        source, found, wanted = self._source, {}, []
        for key, value in values.items():
            model, found[key] = models.get(key), value
            is_empty = source is not None and source.knows(value)
            if not isinstance(value, Tensor) or isinstance(value, DTensor) or (value.is_meta and not is_empty):
                continue
            fits = isinstance(model, Tensor) and value.shape == model.shape
            if strict and not fits:
                continue
            if not isinstance(model, DTensor) or (value.dim() == 0 and not fits):
                if is_empty:
                    device = model.device if isinstance(model, Tensor) and value.dim() else "cpu"
                    found[key] = torch.empty_like(value, device=device)
                    wanted.append((value, found[key]))
            elif is_empty:
                found[key] = _empty_like(value, model, fits)
                wanted.append((value, found[key]))
            else:
                found[key] = _part_of(value, model, fits)
        if source is not None:
            source.fill(wanted)
        return found

    def weights_for(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the ``state_dict`` of a checkpoint as the module, which is spread by now, can load it."""
        computed = [name for name, value in state.items() if isinstance(value, Tensor) and value.is_meta]
        computed = [name for name in computed if self._source is None or not self._source.knows(state[name])]
        if computed:
            raise CheckpointError(
                f"on_load_checkpoint has computed {', '.join(computed[:5])} of weights that are not read yet: each process"
                " reads its parts of them only after that hook, which may rename them, drop them, or put in others. Take"
                " weights that have to be computed from a file: leyden ckpt consolidate FOLDER FILE."
            )
        own = {clean_name(name): value for name, value in self.module.state_dict().items()}
        return self.parts(state, {name: own.get(clean_name(name)) for name in state}, strict=True)

    def read_gradients(self, gradients: Mapping[str, Tensor], owners: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return gradients of a checkpoint: as DTensors where they were written in shards, this process's own as they are.

        Args:
            gradients: Tensors, and empty ones that stand for those of the folder.
            owners: The parameters that they are of, under the same names.
        """
        source, found = self._source, dict(gradients)
        if source is not None:
            found |= self.parts({name: g for name, g in found.items() if source.knows(g)}, owners, strict=True)
        return {name: gradient for name, gradient in found.items() if not gradient.is_meta}

    def with_names(self, state: dict[str, Any], optimizer: Any) -> dict[str, Any]:
        """Return the state of an optimizer with the names of its parameters in the place of their numbers."""
        return shards.named(state, optimizer, {**self._called, **self._names_now()})

    def _names_now(self) -> dict[int, str]:
        return {id(parameter): clean_name(name) for name, parameter in self.module.named_parameters()}

    def exchange_optimizers(self, optimizers: list[Any]) -> None:
        super().exchange_optimizers(optimizers)
        spread = any(isinstance(p, DTensor) for one in optimizers for p in parameters_of(one))
        if spread and any(isinstance(one, torch.optim.LBFGS) for one in optimizers):
            raise MisconfigurationException(
                f"torch.optim.LBFGS works on all parameters as one vector, which {type(self).__name__} has spread over"
                " processes. Use another optimizer, or strategy='ddp'."
            )
        self._called = self._names_now()  # after the run the module has other parameters

    def optimizer_parts(self, optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
        """Return the state of an optimizer of a checkpoint as that optimizer, whose parameters are spread, can load it."""
        state = shards.numbered(state)
        indices = [index for group in state["param_groups"] for index in group["params"]]
        parameters = parameters_of(optimizer)
        owners = dict(zip(indices, parameters, strict=False))  # torch says what does not fit
        flat = {
            (index, name): value
            for index, each in state["state"].items()
            if isinstance(each, Mapping)
            for name, value in each.items()
        }
        # every process counts the steps
        taken = self.parts(flat, {key: owners.get(key[0]) for key in flat if key[1] != "step"})
        parts = {
            index: {name: taken[index, name] for name in each} if isinstance(each, Mapping) else each
            for index, each in state["state"].items()
        }
        return {**state, "state": parts}


def local(tensor: Tensor) -> Tensor:
    """Return what this process has of a tensor: a view of it, with the same memory."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def rebuilt(part: Tensor, model: DTensor, mesh: DeviceMesh | None = None) -> DTensor:
    """Return the DTensor of which each process has a ``part``, spread like ``model``; on its mesh, or another."""
    return DTensor.from_local(
        part, mesh or model.device_mesh, model.placements, run_check=False, shape=model.shape, stride=model.stride()
    )


def _empty_like(value: Tensor, model: Any, fits: bool) -> DTensor:
    """Return a tensor for ``value``, spread like ``model`` if it has its shape; else the whole of it is on all processes."""
    if fits:
        return rebuilt(torch.empty_like(local(model), dtype=value.dtype), model)
    return _everywhere(torch.empty_like(value, device=model.device), model)


def _part_of(value: Tensor, model: Any, fits: bool) -> DTensor:
    """Return ``value``, spread like ``model`` if it has its shape; else the whole of it is on all processes."""
    if not fits:
        return _everywhere(value.to(model.device, copy=True), model)
    (chunk,) = model.__create_chunk_list__()
    part = value[tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))]
    # a view would keep the whole, or the file
    return rebuilt(part.to(model.device, copy=True, memory_format=torch.contiguous_format), model)


def _everywhere(whole: Tensor, model: DTensor) -> DTensor:
    mesh = model.device_mesh
    return DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
