# SPDX-License-Identifier: Apache-2.0
"""Look at a model layer by layer: types, parameters, and, given an example input, sizes and FLOPs."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from leyden.errors import MisconfigurationException
from leyden.runtime.ranks import rank_zero_warn
from leyden.tree import move_to

UNKNOWN_SIZE = "?"
OTHER_PARAMETERS = "other params"
NOT_APPLICABLE = "n/a"

Column = tuple[str, list[str]]
"""A heading and one cell for each row."""


class ForwardPrecision(Protocol):
    """The two verbs of a precision that a forward pass outside of training needs."""

    def forward_context(self) -> AbstractContextManager[Any]: ...

    def convert_input(self, batch: Any, /) -> Any: ...


class LayerSummary:
    """What is known of one layer; its sizes are recorded by the first forward pass after construction.

    Args:
        module: The layer. A forward hook stays on it until it has run once or ``detach_hook`` is called.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._in_size: Any = UNKNOWN_SIZE
        self._out_size: Any = UNKNOWN_SIZE
        self._handle: Any = None
        if not isinstance(module, torch.jit.ScriptModule):  # scripted modules take no hooks
            self._handle = module.register_forward_hook(self._record, with_kwargs=True)

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        inputs = (*args, *kwargs.values())
        self._in_size = shape_of(inputs[0] if len(inputs) == 1 else inputs)
        self._out_size = shape_of(output)
        self.detach_hook()  # a layer that runs several times shows its first pass

    def detach_hook(self) -> None:
        """Take the forward hook off the layer; may be called more than once."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    @property
    def in_size(self) -> Any:
        """The shape of the input as a list of ints, nested for several inputs; ``"?"`` while unknown."""
        return self._in_size

    @property
    def out_size(self) -> Any:
        """The shape of the output as a list of ints, nested for several outputs; ``"?"`` while unknown."""
        return self._out_size

    @property
    def layer_type(self) -> str:
        """The name of the layer's class."""
        return type(self.module).__name__

    @property
    def num_parameters(self) -> int:
        """The number of scalars in the layer's parameters; those that have no shape yet count zero."""
        return _count(self.module.parameters())

    @property
    def training(self) -> bool:
        """Whether the layer is in training mode."""
        return self.module.training


class ModelSummary:
    """A table of the layers of a model, with totals; ``str(summary)`` is that table as plain text.

    If the model has an attribute ``example_input_array`` that is not None, the model runs once on it, in eval mode and
    without gradients: a tuple or list is spread over the positional arguments of ``forward``, a dict over its keyword
    arguments, anything else is its only argument. This run adds the sizes and the FLOPs; it leaves training modes,
    buffers and the state of every random number generator as they were. Lazy layers get their shape by it.

    Args:
        model: The model, usually a LightningModule.
        max_depth: How many levels of nested layers to show: 1 the children, -1 all, 0 none.
        precision: If given, its ``convert_input`` and ``forward_context`` are used for the run on the example.

    Raises:
        MisconfigurationException: If ``max_depth`` is not an integer of at least -1.
    """

    def __init__(self, model: nn.Module, max_depth: int = 1, *, precision: ForwardPrecision | None = None) -> None:
        if type(max_depth) is not int or max_depth < -1:
            raise MisconfigurationException(
                f"max_depth={max_depth!r} is not possible: give -1 (all levels), 0 (no layers) or the number of levels."
            )
        self._model = model
        self._max_depth = max_depth
        self._has_example = getattr(model, "example_input_array", None) is not None
        self._flops: dict[str, dict[Any, int]] = {}
        """FLOPs on the example by operator, for the whole and for each layer."""
        self._layers = {name: LayerSummary(layer) for name, layer in self.named_modules}
        try:
            if self._has_example:
                self._run_example(precision)
        finally:
            for layer in self._layers.values():
                layer.detach_hook()

    def summarize(self) -> dict[str, LayerSummary]:
        """Return the layers by name, as deep as ``max_depth``."""
        return self._layers

    def _run_example(self, precision: ForwardPrecision | None) -> None:
        model = self._model
        example = move_to(model.example_input_array, _device_of(model))
        from torch.utils.flop_counter import FlopCounterMode  # noqa: PLC0415  # only models with an example pay for it

        counter = FlopCounterMode(display=False)
        with ExitStack() as stack:
            if precision is not None:
                example = precision.convert_input(example)
            stack.enter_context(_untouched(model))
            stack.enter_context(torch.no_grad())
            stack.enter_context(precision.forward_context() if precision is not None else nullcontext())
            stack.enter_context(counter)
            if isinstance(example, Mapping):
                model(**example)
            elif isinstance(example, (list, tuple)):
                model(*example)
            else:
                model(example)
        self._flops = counter.get_flop_counts()

    @property
    def named_modules(self) -> list[tuple[str, nn.Module]]:
        """The layers down to ``max_depth``, with their names; without the model itself."""
        if self._max_depth == 1:
            return list(self._model.named_children())
        return [
            (name, layer)
            for name, layer in self._model.named_modules()
            if name and (self._max_depth == -1 or name.count(".") < self._max_depth)
        ]

    @property
    def layer_names(self) -> list[str]:
        """The names of the layers, one for each row; the following lists go with it."""
        return list(self._layers)

    @property
    def layer_types(self) -> list[str]:
        """The class names of the layers."""
        return [layer.layer_type for layer in self._layers.values()]

    @property
    def in_sizes(self) -> list[Any]:
        """The input shapes; ``"?"`` for layers that the example did not reach."""
        return [layer.in_size for layer in self._layers.values()]

    @property
    def out_sizes(self) -> list[Any]:
        """The output shapes; ``"?"`` for layers that the example did not reach."""
        return [layer.out_size for layer in self._layers.values()]

    @property
    def param_nums(self) -> list[int]:
        """The numbers of parameters; a parameter that two layers share counts in both."""
        return [layer.num_parameters for layer in self._layers.values()]

    @property
    def training_modes(self) -> list[bool]:
        """Whether each layer is in training mode."""
        return [layer.training for layer in self._layers.values()]

    @property
    def total_training_modes(self) -> dict[str, int]:
        """How many modules of all levels, the model itself left out, are in mode ``"train"`` and ``"eval"``."""
        modes = [layer.training for layer in self._model.modules()][1:]
        return {"train": modes.count(True), "eval": modes.count(False)}

    @property
    def total_parameters(self) -> int:
        """The number of parameters of the model, each counted once; warns if some have no shape yet."""
        if not all(map(_has_shape, self._model.parameters())):
            rank_zero_warn(
                "The model has lazy parameters without a shape; they count as zero. Set example_input_array on the "
                "module, or run it once on a batch, to have them counted."
            )
        return _count(self._model.parameters())

    @property
    def trainable_parameters(self) -> int:
        """The number of parameters that require a gradient."""
        return _count(parameter for parameter in self._model.parameters() if parameter.requires_grad)

    @property
    def total_layer_params(self) -> int:
        """The sum of ``param_nums``."""
        return sum(self.param_nums)

    @property
    def model_size(self) -> float:
        """The size of the parameters in MB (10**6 bytes), each in its own data type."""
        known = filter(_has_shape, self._model.parameters())
        return sum(_elements(parameter) * parameter.element_size() for parameter in known) / 1e6

    @property
    def flop_counts(self) -> dict[str, dict[Any, int]]:
        """The FLOPs of each layer on the example, by operator."""
        root = type(self._model).__name__
        return {name: dict(self._flops.get(f"{root}.{name}", {})) for name in self._layers}

    @property
    def total_flops(self) -> int:
        """The FLOPs of one forward pass on the example; 0 without one."""
        return sum(self._flops.get("Global", {}).values())

    @property
    def columns(self) -> list[Column]:
        """The table by columns: a heading and its cells. Sizes are there only if there was an example."""
        cells: dict[str, list[str]] = {
            " ": [str(index) for index in range(len(self._layers))],
            "Name": self.layer_names,
            "Type": self.layer_types,
            "Params": [human_count(number) for number in self.param_nums],
            "Mode": ["train" if training else "eval" for training in self.training_modes],
            "FLOPs": [human_count(sum(counts.values())) for counts in self.flop_counts.values()],
        }
        if self._has_example:
            cells["In sizes"] = [str(size) for size in self.in_sizes]
            cells["Out sizes"] = [str(size) for size in self.out_sizes]
        others = self._other_parameters()
        if others:
            row = {" ": " ", "Name": OTHER_PARAMETERS, "Params": human_count(others)}
            for heading, column in cells.items():
                column.append(row.get(heading, NOT_APPLICABLE))
        return list(cells.items())

    def _other_parameters(self) -> int:
        """The number of parameters that belong to no layer of the table: those of the model itself, as a rule."""
        inside = {id(parameter) for layer in self._layers.values() for parameter in layer.module.parameters()}
        return _count(parameter for parameter in self._model.parameters() if id(parameter) not in inside)

    def __str__(self) -> str:
        return format_summary(
            self.columns,
            self.total_parameters,
            self.trainable_parameters,
            self.model_size,
            self.total_training_modes,
            self.total_flops,
        )

    __repr__ = __str__


def summarize(
    lightning_module: nn.Module, max_depth: int = 1, *, precision: ForwardPrecision | None = None
) -> ModelSummary:
    """Return the summary of a module; see ``ModelSummary`` for the arguments."""
    return ModelSummary(lightning_module, max_depth=max_depth, precision=precision)


def format_summary(
    summary_data: list[Column],
    total_parameters: int,
    trainable_parameters: int,
    model_size: float,
    total_training_modes: Mapping[str, int],
    total_flops: int,
) -> str:
    """Return the table and its totals as text: one line for each layer and at most six more."""
    columns = [column for column in summary_data if total_flops or column[0] != "FLOPs"]
    widths = [max(len(cell) for cell in (heading, *cells)) for heading, cells in columns]
    rule = "-" * (sum(widths) + 3 * (len(widths) - 1))
    rows = list(zip(*(cells for _, cells in columns), strict=True))

    def line(cells: Iterable[str]) -> str:
        return " | ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()

    lines = [line(heading for heading, _ in columns), rule, *map(line, rows), rule] if rows else []
    frozen = total_parameters - trainable_parameters
    lines.append(
        f"Parameters: {human_count(total_parameters)} in all, {human_count(trainable_parameters)} trainable, "
        f"{human_count(frozen)} frozen; {model_size:,.3f} MB"
    )
    lines.append(f"Modules: {total_training_modes['train']} in train mode, {total_training_modes['eval']} in eval mode")
    if total_flops:
        lines.append(f"FLOPs: {human_count(total_flops)} for one forward pass of the example input")
    return "\n".join(lines)


def human_count(number: float) -> str:
    """Return a count in at most four digits and a unit: 999, 1.2 K, 132 K, 2.6 M, 7.0 B, 5,000 T."""
    if number < 1000:
        return str(int(number))
    value = float(number)
    for unit in "KMBT":
        value /= 1000
        if value < 1000 or unit == "T":
            break
    return f"{value:.1f} {unit}" if value < 100 else f"{int(value):,} {unit}"


def shape_of(batch: Any) -> Any:
    """Return the shape of a tensor as a list, of a list or tuple of them as nested lists; ``"?"`` for anything else."""
    if hasattr(batch, "shape"):
        return list(batch.shape)
    if isinstance(batch, (list, tuple)):
        return [shape_of(element) for element in batch]
    return UNKNOWN_SIZE


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(_elements(parameter) for parameter in parameters if _has_shape(parameter))


def _elements(parameter: Tensor) -> int:
    """How many elements a parameter has, also where DeepSpeed has taken them out of it and left their number."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _has_shape(tensor: Tensor) -> bool:
    return not bool(is_lazy(tensor))


def _device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer; the CPU for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode; afterwards restore modes, buffers and the random number generators."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if _has_shape(buffer)  # lazy ones get their shape and keep it
    ]
    with _random_state_kept(model):
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    buffer.copy_(value)
                    if getattr(module, name) is not buffer:  # forward assigned a new tensor
                        setattr(module, name, buffer)


@contextmanager
def _random_state_kept(model: nn.Module) -> Iterator[None]:
    """Restore the generators of Python, numpy (if it was imported), torch's CPU and the model's devices."""
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    tensors: tuple[Tensor, ...] = (*model.parameters(), *model.buffers())
    devices = {tensor.device for tensor in tensors}
    mps_state = torch.mps.get_rng_state() if any(device.type == "mps" for device in devices) else None
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([]))
        for kind in ("cuda", "xpu"):
            indices = sorted(device.index or 0 for device in devices if device.type == kind)
            if indices:
                stack.enter_context(torch.random.fork_rng(indices, device_type=kind))
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)
            if mps_state is not None:
                torch.mps.set_rng_state(mps_state)
