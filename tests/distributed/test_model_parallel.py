# SPDX-License-Identifier: Apache-2.0
"""Modules that split and shard themselves in ``configure_model``, over a mesh of two dimensions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader

import leyden as L
from leyden.errors import LeydenWarning
from leyden.strategies import ModelParallelStrategy
from ranks import make_trainer, on_ranks
from tensor_models import Perceptron, numbers, whole

# torch's RowwiseParallel gives fully_shard a view
pytestmark = pytest.mark.filterwarnings("ignore:.*returned a view tensor:UserWarning")


class _Own(Perceptron):
    """Splits itself; with ``shards`` it shards itself as well, all of it or a part."""

    def __init__(self, shards: str = "", meta: bool = False) -> None:
        super().__init__()
        self.shards, self.configured = shards, 0

    def configure_model(self) -> None:
        self.configured += 1
        tensor, data = self.device_mesh["tensor_parallel"], self.device_mesh["data_parallel"]
        parallelize_module(self.net, tensor, {"0": ColwiseParallel(), "3": RowwiseParallel()})
        if self.shards:
            fully_shard(self.net, mesh=data)
        if self.shards == "all":
            fully_shard(self, mesh=data)


def _run(devices: int, size: int, shards: str, path: Path | None = None, distributed: bool = True) -> Any:
    L.seed_everything(11, verbose=False)
    module = _Own(shards) if devices > 1 else Perceptron()
    strategy = ModelParallelStrategy(tensor_parallel_size=size, save_distributed_checkpoint=distributed)
    trainer = make_trainer(
        devices,
        strategy=strategy if devices > 1 else "auto",
        max_epochs=4,
        gradient_clip_val=0.3,
        num_sanity_val_steps=0,
    )
    loaders = DataLoader(numbers(40), 8 // (devices // size), shuffle=True), DataLoader(numbers(13), 3)
    trainer.fit(module, *loaders)
    (tested,) = trainer.test(module, loaders[1], verbose=False)
    predicted = trainer.predict(module, loaders[1])
    assert predicted is not None
    if path is not None:
        trainer.save_checkpoint(path)
    weights = {name: whole(p).detach().clone() for name, p in module.named_parameters()}
    numbers_seen = [int(i) for batch in predicted for i in batch]
    return module.losses, module.norms, tested, weights, getattr(module, "configured", 1), numbers_seen


@pytest.mark.parametrize(("devices", "shards"), [(2, ""), (4, "all"), (4, "part"), (4, "")])
def test_f1_f2_u1_a_module_that_splits_itself_has_the_numbers_of_one_process(devices: int, shards: str) -> None:
    losses, norms, tested, weights, _, seen = _run(1, 1, "")
    ranks = on_ranks(devices, _run, devices, 2, shards)
    together = ranks[0][0] if devices == 2 else [(a + b) / 2 for a, b in zip(ranks[0][0], ranks[2][0], strict=True)]
    assert len(losses) == 20
    assert together == pytest.approx(losses, abs=1e-5)  # F1
    for _, their_norms, their_test, their_weights, configured, _ in ranks:
        assert their_norms == pytest.approx(norms, abs=1e-5)  # F2
        assert their_test == pytest.approx(tested, abs=1e-6)  # U1
        assert configured == 1  # it stays as it is between runs
        for name, weight in their_weights.items():
            assert torch.allclose(weight, weights[name], atol=1e-5), name
    assert sorted(seen) == sorted(ranks[0][5] if devices == 2 else ranks[0][5] + ranks[2][5])


def _save(path: Path) -> None:
    _run(4, 2, "all", path / "sharded.ckpt")
    _run(4, 2, "part", path / "whole.ckpt", distributed=False)


def _load(path: Path) -> Any:
    module = _Own("all")
    trainer = make_trainer(2, strategy=ModelParallelStrategy(), num_sanity_val_steps=0)
    return [
        trainer.test(module, DataLoader(numbers(13), 3), ckpt_path=path / name, verbose=False)[0]["val"]
        for name in ("sharded.ckpt", "whole.ckpt")
    ]


def test_f3_checkpoints_of_a_module_that_splits_itself_open_anywhere(tmp_path: Path) -> None:
    on_ranks(4, _save, tmp_path)
    assert (tmp_path / "sharded.ckpt").is_dir()
    assert (tmp_path / "whole.ckpt").is_file()
    plain, trainer = Perceptron(), make_trainer(1)
    values = [
        trainer.test(plain, DataLoader(numbers(13), 3), ckpt_path=tmp_path / name, verbose=False)[0]["val"]
        for name in ("sharded.ckpt", "whole.ckpt")
    ]
    assert values[0] == pytest.approx(values[1], abs=1e-5)
    for found in on_ranks(2, _load, tmp_path):
        assert found == pytest.approx(values, abs=1e-5)


class _Meta(L.LightningModule):
    """Is built without memory, and has a layer that cannot fill itself."""

    def configure_model(self) -> None:
        with torch.device("meta"):
            self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
            self.own = nn.ParameterList([nn.Parameter(torch.ones(1))])
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return 0.0 * self.net(batch[0]).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05)


def _from_meta() -> Any:
    torch.manual_seed(make_trainer().global_rank)
    module, trainer = _Meta(), make_trainer(2, strategy="model_parallel", max_epochs=1)
    with pytest.warns(LeydenWarning) if trainer.global_rank == 0 else _nothing() as told:
        trainer.fit(module, DataLoader(numbers(8), 2))
    text = str(told[0].message) if told else ""
    assert not any(p.is_meta for p in module.parameters())
    return text, [whole(p).tolist() for p in module.net.parameters()]


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext([])


def test_layers_that_were_built_without_memory_are_filled_and_the_rest_is_told() -> None:
    (text, weights), (_, others) = on_ranks(2, _from_meta)
    assert "have no reset_parameters(): own (ParameterList)" in text
    assert weights == others
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    for parameter, weight in zip(expected.parameters(), weights, strict=True):
        assert torch.allclose(parameter, torch.tensor(weight))  # as on one process


def test_a_module_without_configure_model_is_told_what_to_use() -> None:
    def fit() -> None:
        make_trainer(2, strategy="model_parallel").fit(Perceptron(), DataLoader(numbers(8), 2))

    with pytest.raises(AssertionError, match="required to override the `configure_model.*strategy='tensor_parallel'"):
        on_ranks(2, fit)
