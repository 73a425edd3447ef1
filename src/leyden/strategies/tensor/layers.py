# SPDX-License-Identifier: Apache-2.0
"""Layers whose weights are split over the devices of a mesh, and that compute what the whole layer would.

A layer split by columns has a share of its outputs on each device, one split by rows takes a share of its inputs. Where the
second follows the first, what lies between them can stay split, and one exchange forward and one backward are enough. That
is right only if the code between them does not mind; where it does, the activations are gathered in between, which is right
whatever the code is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from leyden.errors import MisconfigurationException

WORDS = {
    "colwise": "outputs are split and stay so",
    "colwise_gather": "outputs are split and gathered",
    "rowwise": "inputs are split already",
    "rowwise_split": "whole inputs are split",
    "sequence": "whole inputs are split along dimension 1, outputs are gathered",
    "gather": "weights are split and brought together where the layer runs",
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
        self._taken: tuple[Tensor, Tensor] | None = None

    def enter(self, given: Tensor, mesh: Any) -> Tensor:
        """Return ``given`` for a layer that is split by columns.

        Several layers that take the same tensor get the same object, so that its gradient is exchanged once.
        """
        if self._taken is not None and self._taken[0] is given:
            return self._taken[1]
        taken = copy_to(given, mesh)
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
        device: That of this process.
    """

    def __init__(self, root: nn.Module, mesh: Any, device: torch.device) -> None:
        self.root, self.mesh, self.device = root, mesh, device
        self._undo: list[Callable[[], None]] = []
        self._tied: dict[int, nn.Parameter] = {}
        """By the id of a whole parameter, which more than one layer may have, what stands in its place."""
        self._held: list[Any] = []

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
            self._hook(module)
        elif style == "gather":
            self._share_weights(module)
        elif isinstance(module, nn.Embedding):
            rows = style.startswith("rowwise")
            self._distribute(module, "weight", Shard(0 if rows else 1))
            self._stand_on(module, _vocabulary if rows else _features)
        elif style.startswith("colwise"):
            region = region or Region(split=style == "colwise")
            self._distribute(module, "weight", Shard(0))
            self._distribute(module, "bias", Shard(0))
            self._stand_on(module, _columns, region)
        elif style.startswith("rowwise"):
            region = region or Region(split=style == "rowwise")
            self._distribute(module, "weight", Shard(1))
            self._distribute(module, "bias", Replicate())
            self._stand_on(module, _rows, region)

    def set_numbers(self, name: str, numbers: Mapping[str, Any]) -> None:
        """Give the module ``name`` attributes that it has on one device."""
        module = self.root.get_submodule(name)
        former = {key: getattr(module, key) for key in numbers}
        vars(module).update(numbers)
        self._undo.append(lambda: vars(module).update(former))

    def undo(self) -> None:
        """Let the layers compute as they did; their parameters are left as they are."""
        while self._undo:
            self._undo.pop()()
        self._held.clear()

    def _distribute(self, module: nn.Module, name: str, placement: Placement) -> None:
        parameter = getattr(module, name, None)
        if parameter is None:
            return
        known = self._tied.get(id(parameter))
        if known is None:
            if isinstance(parameter, DTensor):  # of an earlier run
                return
            # all ranks have the same: nothing has to travel
            part = parameter.detach()
            if isinstance(placement, Shard):
                part = part.chunk(self.mesh.size(), placement.dim)[self.mesh.get_local_rank()]
            part = part.to(self.device, copy=True, memory_format=torch.contiguous_format)  # a view would keep the whole
            spread = DTensor.from_local(part, self.mesh, [placement], run_check=False)
            known = nn.Parameter(spread, requires_grad=parameter.requires_grad)
            self._tied[id(parameter)] = known
            self._held.append(parameter)  # or its id might come again
        setattr(module, name, known)

    def _replicate_parameters(self, module: nn.Module) -> None:
        for name, _ in list(module.named_parameters(recurse=False)):
            self._distribute(module, name, Replicate())

    def _share_weights(self, module: nn.Module) -> None:
        shared = [
            (owner, name)
            for owner in module.modules()
            for name, parameter in list(owner.named_parameters(recurse=False))
            if parameter.dim() and len(parameter) % self.mesh.size() == 0
        ]
        for owner, name in shared:
            self._distribute(owner, name, Shard(0))
        handles = [
            module.register_forward_pre_hook(_Hook(_bring_together, self.mesh, shared), prepend=True),
            module.register_forward_hook(_Hook(_let_go, self.mesh, shared), prepend=True, always_call=True),
        ]
        self._undo.extend(handle.remove for handle in handles)

    def _by_torch(self, name: str, module: nn.Module, style: ParallelStyle) -> None:
        hooks = [module._forward_pre_hooks, module._forward_hooks]  # noqa: SLF001  # torch gives no handles of these
        before = [set(one) for one in hooks]
        parallelize_module(self.root, self.mesh, {name: style})

        def undo() -> None:
            for kept, one in zip(before, hooks, strict=True):
                for key in [key for key in one if key not in kept]:
                    del one[key]

        self._undo.append(undo)

    def _stand_on(self, module: nn.Module, computes: Any, region: Region | None = None) -> None:
        vars(module)["forward"] = _Forward(module, computes, self.mesh, region)
        # without a hook nn.TransformerEncoderLayer would compute with the weights itself, in evaluation
        handle = module.register_forward_pre_hook(_nothing)

        def undo() -> None:
            handle.remove()
            vars(module).pop("forward", None)

        self._undo.append(undo)

    def _hook(self, module: nn.Module) -> None:
        handles = [
            module.register_forward_pre_hook(_Hook(_before_sequence, self.mesh)),
            module.register_forward_hook(_Hook(_after_sequence, self.mesh)),
        ]
        self._undo.extend(handle.remove for handle in handles)


def _nothing(_module: nn.Module, _args: Any) -> None:
    """A hook that does nothing."""


class _Hook:
    """A hook with what it needs; an object rather than a closure, so that modules can be copied."""

    def __init__(self, function: Any, mesh: Any, shared: Any = None) -> None:
        self.function, self.mesh, self.shared = function, mesh, shared

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        return self.function(self.mesh if self.shared is None else (self.mesh, self.shared), *args)

    def __deepcopy__(self, memo: Any) -> _Hook:
        return _Hook(self.function, self.mesh, copy.deepcopy(self.shared, memo))


def _before_sequence(mesh: Any, args: tuple[Any, ...]) -> Any:
    given = args[0]
    if not isinstance(given, DTensor):
        given = DTensor.from_local(given, mesh, [Replicate()], run_check=False)
    return (given.redistribute(placements=[Shard(1)]), *args[1:])


def _after_sequence(_mesh: Any, _args: Any, output: DTensor) -> Tensor:
    return output.redistribute(placements=[Replicate()]).to_local()


def _bring_together(of: Any, _args: Any) -> None:
    mesh, shared = of
    for owner, name in shared:
        # what an instance has itself comes before its parameters
        vars(owner)[name] = gather(_local(getattr(owner, name)), mesh, 0)


def _let_go(of: Any, _args: Any, _output: Any) -> None:
    for owner, name in of[1]:
        vars(owner).pop(name, None)


class _Forward:
    """Stands on a layer as its ``forward``: computes on each device with what is there."""

    def __init__(self, module: nn.Module, computes: Any, mesh: Any, region: Region | None) -> None:
        self.module, self.computes, self.mesh, self.region = module, computes, mesh, region

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        given = args[0] if args else kwargs["input"]
        return self.computes(self.module, given, self.mesh, self.region)  # type: ignore[no-any-return]

    def __deepcopy__(self, memo: Any) -> _Forward:
        return _Forward(memo.get(id(self.module), self.module), self.computes, self.mesh, self.region)


def _columns(module: nn.Linear, given: Tensor, mesh: Any, region: Region) -> Tensor:
    output = F.linear(region.enter(given, mesh), _local(module.weight), _local(module.bias))
    return output if region.split else gather(output, mesh)


def _rows(module: nn.Linear, given: Tensor, mesh: Any, region: Region) -> Tensor:
    region.leave()
    if isinstance(given, DTensor):
        given = given.redistribute(placements=[Shard(-1) if region.split else Replicate()]).to_local()
    output = add_up(F.linear(given if region.split else slice_of(given, mesh), _local(module.weight)), mesh)
    bias = _local(module.bias)
    return output if bias is None else output + bias.to(output.dtype)


def _vocabulary(module: nn.Embedding, indices: Tensor, mesh: Any, _region: None) -> Tensor:
    weight = _local(module.weight)
    rows = len(weight)
    first = mesh.get_local_rank() * rows
    here = indices - first
    missing = (here < 0) | (here >= rows)
    padding = None if module.padding_idx is None else module.padding_idx - first
    found = F.embedding(
        here.masked_fill(missing, 0), weight, padding if padding is not None and 0 <= padding < rows else None
    )
    return add_up(found.masked_fill(missing[..., None], 0.0), mesh)


def _features(module: nn.Embedding, indices: Tensor, mesh: Any, _region: None) -> Tensor:
    return gather(F.embedding(indices, _local(module.weight), module.padding_idx), mesh)


def _local(parameter: Any) -> Any:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


# ---------------------------------------------------------------------------------------------- exchanges


def copy_to(given: Tensor, mesh: Any) -> Tensor:
    """Return what all devices have; its gradient is the sum of theirs."""
    if isinstance(given, DTensor):
        given = given.redistribute(placements=[Replicate()]).to_local()
    return given if mesh.size() == 1 else _Copy.apply(given, mesh.get_group())  # type: ignore[no-untyped-call]


def add_up(part: Tensor, mesh: Any) -> Tensor:
    """Return the sum of what the devices have computed."""
    return part if mesh.size() == 1 else _Sum.apply(part, mesh.get_group())  # type: ignore[no-untyped-call]


def gather(part: Tensor, mesh: Any, dim: int = -1) -> Tensor:
    """Return the parts of all devices, one behind the other in dimension ``dim``; all go on with the same."""
    return part if mesh.size() == 1 else _Gather.apply(part, mesh.get_group(), dim)  # type: ignore[no-untyped-call]


def slice_of(given: Tensor, mesh: Any) -> Tensor:
    """Return this device's part of the last dimension of what all have."""
    return given if mesh.size() == 1 else _Slice.apply(given, mesh.get_group())  # type: ignore[no-untyped-call]


def _gathered(part: Tensor, group: Any, dim: int = -1) -> Tensor:
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim)


def _sliced(whole: Tensor, group: Any, dim: int = -1) -> Tensor:
    return whole.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)].contiguous()


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return given.view_as(given)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, part: Tensor, group: Any) -> Tensor:
        total = part.clone(
            memory_format=torch.contiguous_format
        )  # torch.compile does not follow what is changed in place
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(_ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _gathered(part, group, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _sliced(gradients[0], ctx.group, ctx.dim), None, None


class _Slice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _sliced(given, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _gathered(gradients[0], ctx.group), None


# ---------------------------------------------------------------------------------------------- what can be split


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
