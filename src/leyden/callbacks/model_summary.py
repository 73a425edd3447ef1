# SPDX-License-Identifier: Apache-2.0
"""Print a table of the model's layers when fit begins."""

from __future__ import annotations

from typing import Any

from leyden.callback import Callback
from leyden.runtime.ranks import say
from leyden.summary import format_summary, human_count, summarize
from leyden.types import TrainerView


class ModelSummary(Callback):
    """Prints the layers of the model and its totals, on the main process, once for each fit.

    Override ``summarize`` to show the same figures in another way.

    Args:
        max_depth: How many levels of nested layers to show: 1 the children, -1 all, 0 switches the summary off.
        **summarize_kwargs: Passed on to ``summarize``.
    """

    def __init__(self, max_depth: int = 1, **summarize_kwargs: Any) -> None:
        self._max_depth = max_depth
        self._summarize_kwargs = summarize_kwargs

    def on_fit_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Make the summary on every rank, because a sharded model runs on all or on none; show it on the main one."""
        if not self._max_depth:
            return
        summary = summarize(pl_module, self._max_depth, precision=getattr(trainer.strategy, "precision", None))
        if trainer.is_global_zero:
            self.summarize(
                summary.columns,
                summary.total_parameters,
                summary.trainable_parameters,
                summary.model_size,
                summary.total_training_modes,
                total_flops=summary.total_flops,
                **self._summarize_kwargs,
            )

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        total_training_modes: dict[str, int],
        total_flops: int,
        **summarize_kwargs: Any,  # noqa: ARG004 - for those who override
    ) -> None:
        """Print the summary.

        Args:
            summary_data: The table by columns: a heading and the cells under it.
            total_parameters: Number of parameters.
            trainable_parameters: Number of those that require a gradient.
            model_size: Size of the parameters in MB.
            total_training_modes: Number of modules in mode ``"train"`` and ``"eval"``.
            total_flops: FLOPs of one forward pass on ``example_input_array``; 0 if there is none.
            **summarize_kwargs: What the constructor was given.
        """
        say(
            format_summary(
                summary_data, total_parameters, trainable_parameters, model_size, total_training_modes, total_flops
            )
        )


class RichModelSummary(ModelSummary):
    """The same table drawn by rich.

    Args:
        max_depth: See ``ModelSummary``.
        **summarize_kwargs: ``header_style``, a style of rich for the headings (default ``"bold magenta"``).
    """

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        total_training_modes: dict[str, int],
        total_flops: int,
        **summarize_kwargs: Any,
    ) -> None:
        """Print the summary on rich's own console; the arguments are those of ``ModelSummary.summarize``."""
        from rich import get_console  # noqa: PLC0415 - only those who ask for rich wait for it
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        console = get_console()
        table = Table(header_style=summarize_kwargs.get("header_style", "bold magenta"))
        for heading, _ in summary_data:
            right = heading in ("Params", "FLOPs", "In sizes", "Out sizes")
            table.add_column(
                heading,
                justify="right" if right else "left",
                style="dim" if heading == " " else None,
                no_wrap=heading == "Name",
            )
        for row in zip(*(cells for _, cells in summary_data), strict=True):
            table.add_row(*(Text(cell) for cell in row))  # Text, because "[1, 3]" is markup to rich
        console.print(table)

        totals = {
            "Trainable params": human_count(trainable_parameters),
            "Non-trainable params": human_count(total_parameters - trainable_parameters),
            "Total params": human_count(total_parameters),
            "Total size of params (MB)": f"{model_size:,.3f}",
            "Modules in train mode": str(total_training_modes["train"]),
            "Modules in eval mode": str(total_training_modes["eval"]),
        }
        if total_flops:
            totals["Total FLOPs"] = human_count(total_flops)
        grid = Table.grid(padding=(0, 1))
        for name, value in totals.items():
            grid.add_row(Text(f"{name}:", style="bold"), value)
        console.print(grid)


__all__ = ["ModelSummary", "RichModelSummary"]
