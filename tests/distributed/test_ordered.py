# SPDX-License-Identifier: Apache-2.0
"""U1: what all ranks predict can be had on each of them, in the order of the data, each sample once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, SequentialSampler

from leyden.data.sharding import Deal
from leyden.errors import MisconfigurationException
from leyden.loops.several.ordered import Predicted, in_order
from ranks import Judged, data, make_trainer, on_ranks


class Rich(Judged):
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        ids = batch[2]
        return {"id": ids, "out": (self.layer(batch[0]), [f"n{i}" for i in ids.tolist()]), "array": ids.numpy()}


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(data(3))


def _ids(predictions: Any) -> list[list[int]]:
    return [batch["id"].tolist() for batch in predictions]


def _loader(count: int) -> Any:
    return DataLoader(data(count), 3)


def _predicted(size: int) -> dict[str, Any]:
    """What one rank, or one process, gets in each case."""
    trainer, module = make_trainer(size), Rich()
    found: dict[str, Any] = {}
    for count in (1, 2, 7, 12, 13):
        found[f"n{count}"] = trainer.predict(module, _loader(count), gather=True)
    found["several"] = trainer.predict(module, [_loader(4), _loader(5)], gather=True)
    batches = BatchSampler(SequentialSampler(range(11)), 3, drop_last=False)

    class Own(BatchSampler):
        def __init__(self) -> None:
            pass

        def __iter__(self) -> Any:
            return iter(batches)

        def __len__(self) -> int:
            return len(batches)

    found["own batches"] = trainer.predict(module, DataLoader(data(11), batch_sampler=Own()), gather=True)
    torch.manual_seed(4)
    found["shuffled"] = trainer.predict(module, DataLoader(data(7), 2, shuffle=True), gather=True)
    found["limited"] = make_trainer(size, limit_predict_batches=1).predict(module, _loader(13), gather=True)
    return found


def _all(size: int) -> Any:
    found = _predicted(size)
    trainer, module = make_trainer(size), Rich()
    own = trainer.predict(module, _loader(7))
    theirs = DataLoader(data(7), 2, sampler=DistributedSampler(data(7), shuffle=False))
    found["own"] = own
    found["distributed"] = trainer.predict(module, theirs, gather=True)
    found["stream"] = trainer.predict(module, DataLoader(Stream(), 2), gather=True)
    none = trainer.predict(module, _loader(7), gather=True, return_predictions=False)
    with pytest.raises(MisconfigurationException, match="returned a Tensor of shape .* for a batch of 3"):
        module.predict_step = lambda batch, batch_idx: batch[0].sum()  # type: ignore[method-assign]
        trainer.predict(module, _loader(7), gather=True)
    return found, none


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_u1_predictions_of_all_ranks_come_in_the_order_of_the_data(size: int) -> None:
    ranks, alone = on_ranks(size, _all, size), _predicted(1)
    for found, none in ranks:
        assert none is None
        for case, expected in alone.items():
            if case == "several":
                assert [_ids(one) for one in found[case]] == [_ids(one) for one in expected]
            elif case == "limited":
                assert _ids(found[case])[0] == _ids(expected)[0]
                assert len(found[case]) == size
            else:
                assert _ids(found[case]) == _ids(expected), case
                for mine, theirs in zip(found[case], expected, strict=True):
                    assert torch.allclose(mine["out"][0], theirs["out"][0])
                    assert mine["out"][1] == theirs["out"][1]
                    assert np.array_equal(mine["array"], theirs["array"])
        assert [i for batch in _ids(found["distributed"]) for i in batch] == list(range(7))
        assert _ids(found["stream"]) == [[0, 1], [2]] * size
    own = [i for found, _ in ranks for batch in _ids(found["own"]) for i in batch]
    assert sorted(own) == list(range(7))


def test_a_last_batch_that_was_left_out_leaves_no_hole() -> None:
    shares = [
        Predicted(Deal(0, 2, 2), [torch.tensor([0, 2]), torch.tensor([4, 6])], [2, 2]),
        Predicted(Deal(1, 2, 2), [torch.tensor([1, 3])], [2]),
    ]
    assert [batch.tolist() for batch in in_order(shares)] == [[0, 1], [2, 3], [4, 6]]
    assert in_order([Predicted(Deal(0, 1, 2), [], [])]) == []
