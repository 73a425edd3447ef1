# SPDX-License-Identifier: Apache-2.0
"""N4: what the search for unused parameters finds in the first updates, and costs, is said once; numbers stay as they are."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from leyden.strategies import searched
from leyden.strategies.searched import verdict
from ranks import Net, data, make_trainer, on_ranks

SEARCHES = "ddp_find_unused_parameters_true"


class _Leaves(Net):
    """Has a layer that takes part always, never, or in every other batch of one rank."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part, self.extra = part, nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        takes = self.part == "always" or (self.part == "sometimes" and (batch_idx + self.global_rank) % 2)
        loss = loss + self.extra(batch[0]).square().mean() if takes else loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05)


def _fit(part: str, worth: float, accumulate: int = 1) -> Any:
    searched.WORTH, said = worth, []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("leyden").addHandler(handler)
    module = _Leaves(part)
    trainer = make_trainer(max_epochs=1, strategy=SEARCHES, accumulate_grad_batches=accumulate)
    trainer.fit(module, DataLoader(data(4 * 15 * accumulate), 2))
    hooks = [p for p in module.parameters() if getattr(p, "_post_accumulate_grad_hooks", None)]
    left = len(hooks) + len(module._forward_hooks)
    return [text for text in said if "find_unused" in text], module.losses, left


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("always", "all parameters took part on all ranks. strategy='ddp' does without it"),
        ("never", "these took no part on any rank: extra.weight, extra.bias. If that never changes, freeze them"),
        ("sometimes", None),
    ],
)
def test_n4_the_search_is_judged_once_by_what_it_found_and_cost(
    part: str, expected: str | None, accumulate: int
) -> None:
    (said, losses, left), (others, _, _) = on_ranks(2, _fit, part, 0.0, accumulate)
    assert left == 0
    assert others == []
    assert len(said) == (expected is not None)
    assert expected is None or expected in said[0]
    (silent, same, _), _ = on_ranks(2, _fit, part, float("inf"), accumulate)
    assert silent == []
    assert same == losses


def test_n4_a_search_that_costs_nothing_to_speak_of_is_not_mentioned() -> None:
    assert verdict([[[]] * 10] * 2, 0.00009, 0.01) is None
    text = verdict([[[]] * 10] * 2, 0.002, 0.01) or ""
    assert "takes 2 ms of each batch (20 %), and in the first 10 updates all parameters took part" in text


def test_n4_what_one_rank_leaves_out_is_what_the_search_is_for() -> None:
    assert verdict([[["a"]] * 10, [[]] * 10], 0.002, 0.01) is None
    assert verdict([[["a"]] * 9 + [[]], [["a"]] * 10], 0.002, 0.01) is None
