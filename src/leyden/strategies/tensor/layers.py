# SPDX-License-Identifier: Apache-2.0
"""Layers whose weights are split over the devices of a mesh, and that compute what the whole layer would.

A layer split by columns has a share of its outputs on each device, one split by rows takes a share of its inputs. Where the
second follows the first, what lies between them can stay split, and one exchange forward and one backward are enough. That
is right only if the code between them does not mind; where it does, the activations are gathered in between, which is right
whatever the code is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from leyden.errors import MisconfigurationException

WORDS = {
    "colwise": "outputs are split and stay so",
    "colwise_gather": "outputs are split and gathered",
    "rowwise": "inputs are split already",
    "rowwise_split": "whole inputs are split",
    "sequence": "whole inputs are split along dimension 1, outputs are gathered",
    "replicate": "not split",
}
"""How a layer can be split. For an Embedding, rows are the vocabulary, columns the features; what goes in and out is whole."""
ALIASES = {
    "colwise_rep": "colwise_gather", "colwise_gather_output": "colwise_gather", "rowwise_rep": "rowwise_split",
    "rowwise_split_input": "rowwise_split", "sequence_parallel": "sequence",
}  # fmt: skip
"""Other names of the same, as in the plans of libraries."""


class Region:
    """What lies between layers that are split by columns and the one that is split by rows and takes what they give.

    Args:
        split: Whether activations stay split in between.
        paired: Whether a layer that is split by rows ends it.
    """

    def __init__(self, split: bool, paired: bool = False) -> None:
        self.split, self.paired = split, paired
        self._taken: tuple[Tensor, DTensor] | None = None

    def enter(self, given: Tensor, mesh: Any) -> DTensor:
        """Return the whole ``given`` for a layer that is split by columns.

        Several layers that take the same tensor get the same object, so that its gradient is exchanged once.
        """
        if self._taken is not None and self._taken[0] is given:
            return self._taken[1]
        taken = _whole(given, mesh)
        self._taken = (given, taken) if self.paired else None
        return taken

    def leave(self) -> None:
        """What was entered is not needed any more."""
        self._taken = None


class Layers:
    """The layers of a module that have been split, and the way back.

    Args:
        root: The module.
        mesh: One dimension of devices.
    """

    def __init__(self, root: nn.Module, mesh: Any) -> None:
        self.root, self.mesh = root, mesh
        self._undo: list[Callable[[], None]] = []
        self._tied: dict[int, nn.Parameter] = {}
        """By the id of a whole parameter that more than one layer has, what stands in its place."""

    def split(self, name: str, style: Any, region: Region | None = None) -> None:
        """Split the layer ``name``.

        Args:
            name: As in ``named_modules``.
            style: One of ``WORDS``, or torch's ParallelStyle.
            region: What the layer is at an end of; None for one of its own.
        """
        module = self.root.get_submodule(name)
        if isinstance(style, ParallelStyle):
            self._by_torch(name, module, style)
        elif style == "sequence":
            self._replicate_parameters(module)
            self._hook(module, _before_sequence, _after_sequence)
        elif isinstance(module, nn.Embedding):
            rows = style.startswith("rowwise")
            self._distribute(module, "weight", Shard(0 if rows else 1))
            self._replace(module, _rows_of if rows else _columns_of)
        elif style.startswith("colwise"):
            region = region or Region(split=style == "colwise")
            self._distribute(module, "weight", Shard(0))
            self._distribute(module, "bias", Shard(0))
            self._hook(module, _before_columns, _after_columns, region)
        elif style.startswith("rowwise"):
            region = region or Region(split=style == "rowwise")
            self._distribute(module, "weight", Shard(1))
            self._distribute(module, "bias", Replicate())
            self._hook(module, _before_rows, _after_rows, region)

    def set_numbers(self, name: str, numbers: Mapping[str, int]) -> None:
        """Give the module ``name`` the numbers that it has on one device."""
        module = self.root.get_submodule(name)
        former = {key: getattr(module, key) for key in numbers}
        vars(module).update(numbers)
        self._undo.append(lambda: vars(module).update(former))

    def undo(self) -> None:
        """Let the layers compute as they did; their parameters are left as they are."""
        while self._undo:
            self._undo.pop()()

    def _distribute(self, module: nn.Module, name: str, placement: Placement) -> None:
        parameter = getattr(module, name, None)
        if parameter is None:
            return
        known = self._tied.get(id(parameter))
        if known is None:
            if isinstance(parameter, DTensor):  # of an earlier run
                return
            # all ranks have the same: nothing has to travel
            whole = parameter.detach()
            local = distribute_tensor(whole, self.mesh, [placement], src_data_rank=None)
            known = nn.Parameter(local, requires_grad=parameter.requires_grad)
            self._tied[id(parameter)] = known
            self._undo.append(lambda kept=parameter: None)  # type: ignore[misc]  # or its id might come again
        setattr(module, name, known)

    def _replicate_parameters(self, module: nn.Module) -> None:
        for name, _ in list(module.named_parameters(recurse=False)):
            self._distribute(module, name, Replicate())

    def _by_torch(self, name: str, module: nn.Module, style: ParallelStyle) -> None:
        hooks = [module._forward_pre_hooks, module._forward_hooks]  # noqa: SLF001  # torch gives no handles of these
        before = [set(one) for one in hooks]
        parallelize_module(self.root, self.mesh, {name: style})

        def undo() -> None:
            for kept, one in zip(before, hooks, strict=True):
                for key in [key for key in one if key not in kept]:
                    del one[key]

        self._undo.append(undo)

    def _hook(self, module: nn.Module, before: Any, after: Any, region: Region | None = None) -> None:
        handles = [
            module.register_forward_pre_hook(_Hook(before, self.mesh, region)),
            module.register_forward_hook(_Hook(after, self.mesh, region)),
        ]
        self._undo.extend(handle.remove for handle in handles)

    def _replace(self, module: nn.Module, look_up: Any) -> None:
        vars(module)["forward"] = _LookUp(module, look_up, self.mesh)
        self._undo.append(lambda: vars(module).pop("forward", None))


class _Hook:
    """A hook with what it needs; an object rather than a closure, so that modules can be copied."""

    def __init__(self, function: Any, mesh: Any, region: Region | None) -> None:
        self.function, self.mesh, self.region = function, mesh, region

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        return self.function(self.mesh, self.region, *args)

    def __deepcopy__(self, memo: Any) -> _Hook:
        return _Hook(self.function, self.mesh, self.region)


def _before_columns(mesh: Any, region: Region, args: tuple[Any, ...]) -> Any:
    return (region.enter(args[0], mesh), *args[1:])


def _after_columns(mesh: Any, region: Region, args: Any, output: DTensor) -> Tensor:
    return output.to_local() if region.split else _gathered(output)


def _before_rows(mesh: Any, region: Region, args: tuple[Any, ...]) -> Any:
    region.leave()
    given = args[0]
    if not isinstance(given, DTensor):
        given = DTensor.from_local(given, mesh, [Shard(-1) if region.split else Replicate()], run_check=False)
    return (given.redistribute(placements=[Shard(-1)]), *args[1:])


def _after_rows(mesh: Any, region: Region, args: Any, output: DTensor) -> Tensor:
    return _gathered(output)


def _before_sequence(mesh: Any, region: None, args: tuple[Any, ...]) -> Any:
    return (_whole(args[0], mesh).redistribute(placements=[Shard(1)]), *args[1:])


def _after_sequence(mesh: Any, region: None, args: Any, output: DTensor) -> Tensor:
    return _gathered(output)


def _whole(given: Tensor, mesh: Any) -> DTensor:
    if isinstance(given, DTensor):
        return given.redistribute(placements=[Replicate()])
    return DTensor.from_local(given, mesh, [Replicate()], run_check=False)


def _gathered(output: DTensor) -> Tensor:
    return output.redistribute(placements=[Replicate()]).to_local()


class _LookUp:
    """Stands on an Embedding as its ``forward``: looks up on each device what is there."""

    def __init__(self, module: nn.Module, look_up: Any, mesh: Any) -> None:
        self.module, self.look_up, self.mesh = module, look_up, mesh

    def __call__(self, indices: Tensor) -> Tensor:
        return self.look_up(self.module, indices, self.mesh)  # type: ignore[no-any-return]

    def __deepcopy__(self, memo: Any) -> _LookUp:
        return _LookUp(memo.get(id(self.module), self.module), self.look_up, self.mesh)


def _rows_of(module: nn.Embedding, indices: Tensor, mesh: Any) -> Tensor:
    weight = _local(module.weight)
    rows, first = len(weight), mesh.get_local_rank() * -(-module.num_embeddings // mesh.size())
    here = indices - first
    missing = (here < 0) | (here >= rows)
    padding = None if module.padding_idx is None else module.padding_idx - first
    found = F.embedding(
        here.masked_fill(missing, 0), weight, padding if padding is not None and 0 <= padding < rows else None
    )
    found = found.masked_fill(missing[..., None], 0.0)
    return _gathered(DTensor.from_local(found, mesh, [Partial()], run_check=False))


def _columns_of(module: nn.Embedding, indices: Tensor, mesh: Any) -> Tensor:
    found = F.embedding(indices, _local(module.weight), module.padding_idx)
    return _gathered(DTensor.from_local(found, mesh, [Shard(-1)], run_check=False))


def _local(weight: Any) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight  # type: ignore[no-any-return]


def can_be_split(module: nn.Module) -> bool:
    """Whether a layer is a Linear or Embedding as torch has them: nothing of it is computed by somebody else."""
    names = {name for name, _ in module.named_parameters(recurse=False)}
    if isinstance(module, nn.Linear):
        return (
            type(module).forward is nn.Linear.forward and "forward" not in vars(module) and names <= {"weight", "bias"}
        )
    if isinstance(module, nn.Embedding):
        plain = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
        return plain and type(module).forward is nn.Embedding.forward and "forward" not in vars(module)
    return False


def size_along(module: nn.Module, word: str) -> int:
    """The number of rows or columns that ``word`` shares out among devices."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings if word.startswith("rowwise") else module.embedding_dim
    assert isinstance(module, nn.Linear)
    return module.in_features if word.startswith("rowwise") else module.out_features


def require_divisible(name: str, module: nn.Module, word: str, size: int) -> None:
    """Check that a layer can be shared out evenly.

    Raises:
        MisconfigurationException: if it cannot.
    """
    count = size_along(module, word)
    if count % size:
        what = "inputs" if word.startswith("rowwise") else "outputs"
        if isinstance(module, nn.Embedding):
            what = "rows" if word.startswith("rowwise") else "features"
        raise MisconfigurationException(
            f"The plan splits {name!r} {word}, but its {count} {what} cannot be shared out evenly among"
            f" tensor_parallel_size={size} devices. Say {name!r}: 'replicate', or take a size that divides {count}."
        )


__all__ = ["ALIASES", "WORDS", "Layers", "Region", "can_be_split", "require_divisible", "size_along"]
