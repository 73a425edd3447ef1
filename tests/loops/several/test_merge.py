# SPDX-License-Identifier: Apache-2.0
"""What several processes have counted, put together: exact sums, and gradients that come to the same mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchmetrics

from leyden.errors import LeydenWarning
from leyden.loops.metric_state import gather_metrics
from leyden.loops.several.merge import of_rank, one_of_each_share, put_metrics
from leyden.results import Results
from leyden.runtime.seed import rng_state


def _logged(values: list[float], weight: int) -> dict[str, Any]:
    results = Results()
    results.active = store = results.train
    store.hook = "training_step"
    where = (False, False, None, True, False)
    for value in values:
        for reduction in ("mean", "sum", "min", "max"):
            store.log(
                reduction, torch.tensor(value), False, True, False, True, reduction, True,
                weight if reduction == "mean" else None, where,
            )  # fmt: skip
    return results.state_dict()


def _rank(values: list[float], weight: int, gradient: float | None = None, **more: Any) -> dict[str, Any]:
    found = {"rng": rng_state(), "results": _logged(values, weight), "data": {}, "metrics": {}, **more}
    if gradient is not None:
        found["window"] = {"gradients": {"w": torch.tensor([gradient])}, "weight": None, "weights": {}}
    return found


def _slots(state: dict[str, Any]) -> dict[str, Any]:
    return {logged["name"]: logged["slot"] for logged in state["results"]["train"]["logged"]}


def test_values_of_the_epoch_are_over_all_and_stand_on_one_rank() -> None:
    ranks = [_rank([1.0, 5.0], 2), _rank([3.0], 4), _rank([-2.0], 1)]
    first, second = (_slots(of_rank(ranks, rank, rank, 2, {})) for rank in (0, 1))
    assert (first["mean"]["total"].item(), first["mean"]["weight"]) == (1 * 2 + 5 * 2 + 3 * 4 - 2, 9)
    assert first["sum"]["total"].item() == 7
    assert (second["mean"]["total"].item(), second["mean"]["weight"], second["sum"]["total"].item()) == (0, 0, 0)
    for slots in (first, second):
        assert (slots["min"]["total"].item(), slots["max"]["total"].item()) == (-2, 5)


def test_ranks_of_one_share_count_once() -> None:
    ranks = [_rank([1.0], 1, share=0), _rank([1.0], 1, share=0), _rank([4.0], 1, share=1)]
    assert one_of_each_share(ranks) == [ranks[0], ranks[2]]
    assert _slots(of_rank(ranks, 0, 0, 1, {}))["sum"]["total"].item() == 5


@pytest.mark.parametrize("shares", [1, 2, 4])
def test_gradients_of_an_open_update_come_to_the_mean_that_they_would_have_had(shares: int) -> None:
    ranks, weights = [_rank([1.0], 1, gradient) for gradient in (1.0, 2.0, 6.0, 3.0)], {"w": torch.zeros(1)}
    states = [of_rank(ranks, rank, rank, shares, weights)["window"] for rank in range(shares)]
    assert sum(state["gradients"]["w"].item() for state in states) / shares == 3.0


@pytest.mark.parametrize("shares", [1, 2, 4])
def test_declared_weights_stay_in_proportion(shares: int) -> None:
    ranks = [_rank([1.0], 1, gradient) for gradient in (10.0, 2.0)]
    for number, one in enumerate(ranks):
        one["window"]["weight"] = number + 1
        one["window"]["weights"] = {0: (number + 1, False), 1: (None, True)}
    window = of_rank(ranks, 0, 0, shares, {"w": torch.zeros(1)})["window"]
    assert window["gradients"]["w"].item() * shares == 12
    assert window["weight"] * shares == 3
    assert window["weights"][0][0] * shares == 3
    assert window["weights"][1] == (None, True)


@pytest.mark.parametrize("weights", [{}, {"w": torch.zeros(2)}])
def test_parts_of_gradients_are_not_added_up_but_computed_anew(weights: dict[str, Any]) -> None:
    found = of_rank([_rank([1.0], 1, 1.0), _rank([1.0], 1, 2.0)], 0, 0, 1, weights)
    assert "window" not in found
    assert found["data"]["redo"] is True


class _Foreign(torch.nn.Module):
    """A metric that does not say how its state is reduced."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.update_count = torch.tensor(0.0), 0

    @property
    def metric_state(self) -> dict[str, Any]:
        return {"count": self.count}

    def update(self) -> None:
        self.count, self.update_count = self.count + 1, self.update_count + 1

    def compute(self) -> torch.Tensor:
        return self.count

    def reset(self) -> None:
        self.count, self.update_count = torch.tensor(0.0), 0


def test_states_of_metrics_are_put_together_as_they_are_reduced() -> None:
    kinds = (torchmetrics.SumMetric, torchmetrics.MeanMetric, torchmetrics.MinMetric, torchmetrics.MaxMetric,
             torchmetrics.CatMetric)  # fmt: skip
    states, whole = [], {kind.__name__: kind() for kind in kinds}
    for values in ([1.0, 7.0], [2.0], [4.0]):
        own = {kind.__name__: kind() for kind in kinds}
        for name, metric in own.items():
            metric.update(torch.tensor(values))
            whole[name].update(torch.tensor(values))
        states.append(gather_metrics(own))
    found = {kind.__name__: kind() for kind in kinds}
    put_metrics(found, states, True, torch.device("cpu"))
    for name, metric in found.items():
        assert torch.equal(metric.compute(), whole[name].compute()), name
        assert metric.update_count == whole[name].update_count
    others = {kind.__name__: kind() for kind in kinds}
    put_metrics(others, states, False, torch.device("cpu"))
    assert all(metric.update_count == 0 for metric in others.values())


def test_a_metric_that_does_not_say_how_is_named() -> None:
    states = []
    for _ in range(2):
        one = _Foreign()
        one.update()
        states.append({"foreign": {**one.metric_state, "_update_count": 1}})
    metric = _Foreign()
    with pytest.warns(LeydenWarning, match="What the metric foreign .*cannot be put together"):
        put_metrics({"foreign": metric}, states, True, torch.device("cpu"))
    assert metric.count == 1
