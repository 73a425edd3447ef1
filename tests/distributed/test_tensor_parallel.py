# SPDX-License-Identifier: Apache-2.0
"""Several processes work on one batch, and give the numbers of one: layers split by columns and rows, alone and sharded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.utils.data import DataLoader

import leyden as L
from leyden.errors import MisconfigurationException
from leyden.strategies import ModelParallelStrategy, TensorParallelStrategy
from ranks import make_trainer, on_ranks
from tensor_models import GPT, Llama, Perceptron, numbers, texts

PLAN = {"net.0": "colwise", "net.3": "rowwise", "head": "rowwise_split", "norm": "replicate"}
CASES: dict[str, tuple[Any, Any, Any]] = {
    "perceptron": (Perceptron, numbers, None),
    "gpt": (GPT, texts, None),
    "llama": (Llama, texts, None),
    "plan": (Perceptron, numbers, PLAN),
}


def _train(case: str, devices: int, size: int, **options: Any) -> dict[str, Any]:
    kind, data, plan = CASES[case]
    L.seed_everything(11, verbose=False)
    module = kind(**options.pop("module", {}))
    strategy = TensorParallelStrategy(plan, size) if devices > 1 else "auto"
    trainer = make_trainer(
        devices, strategy=strategy, max_epochs=4, log_every_n_steps=1, num_sanity_val_steps=0, **options
    )
    batch = 8 // (devices // size)
    trainer.fit(module, DataLoader(data(40), batch, shuffle=True), DataLoader(data(13), 3))
    assert not any(isinstance(p, DTensor) for p in module.parameters())
    assert all(p.device.type == "cpu" for p in module.parameters())
    return {
        "losses": module.losses, "norms": module.norms, "samples": module.samples,
        "rows": [dict(row) for row in trainer.history], "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
        "weights": {name: p.detach().clone() for name, p in module.named_parameters()},
        "plan": dict(getattr(trainer.strategy, "plan", {})), "evaluated": sorted(module.evaluated),
    }  # fmt: skip


def _same(one: dict[str, Any], ranks: list[dict[str, Any]], size: int) -> None:
    """All ranks together have done what one process did."""
    groups = [ranks[first : first + size] for first in range(0, len(ranks), size)]
    for number in range(20):
        together = sum((group[0]["samples"][number] for group in groups), [])
        assert sorted(together) == sorted(one["samples"][number])  # the same global batches
        mean = sum(group[0]["losses"][number] for group in groups) / len(groups)
        assert mean == pytest.approx(one["losses"][number], abs=1e-5)  # F1
    for group in groups:
        for rank in group:
            assert rank["samples"] == group[0]["samples"]
            assert rank["losses"] == group[0]["losses"]
            assert rank["evaluated"] == group[0]["evaluated"]
    evaluated = sorted(sum((group[0]["evaluated"] for group in groups), []))
    assert evaluated == one["evaluated"]  # U1
    for rank in ranks:
        assert rank["norms"] == pytest.approx(one["norms"], abs=1e-5, rel=1e-4)  # F2
        assert rank["metrics"] == pytest.approx(one["metrics"], abs=1e-5)  # M1
        assert rank["metrics"]["count"] == 13
        assert rank["metrics"]["seen"] == 40
        for row, theirs in zip(one["rows"], rank["rows"], strict=True):
            assert theirs == pytest.approx(row, abs=1e-5)
        for name, weight in rank["weights"].items():
            assert torch.allclose(weight, one["weights"][name], atol=1e-5), name
            assert torch.equal(weight, ranks[0]["weights"][name]), name


@pytest.mark.parametrize("case", ["perceptron", "gpt", "plan", pytest.param("llama", marks=pytest.mark.slow)])
def test_f1_f2_u1_m1_two_processes_on_one_batch_give_the_numbers_of_one(case: str) -> None:
    options: dict[str, Any] = {"gradient_clip_val": 0.5}
    _same(_train(case, 1, 1, **options), on_ranks(2, lambda: _train(case, 2, 2, **options)), 2)


@pytest.mark.parametrize("case", [pytest.param("perceptron", marks=pytest.mark.slow), "gpt"])
def test_f1_f2_u1_m1_groups_of_two_share_out_the_data_and_the_parameters(case: str) -> None:
    options: dict[str, Any] = {"gradient_clip_val": 0.5}
    _same(_train(case, 1, 1, **options), on_ranks(4, lambda: _train(case, 4, 2, **options)), 2)


def _plans() -> Any:
    found = {}
    for name, module in (
        ("gpt", GPT()),
        ("llama", Llama()),
        ("odd", Llama(heads=4, kv_heads=1)),
        ("dropped", GPT(0.1)),
    ):
        strategy = TensorParallelStrategy()
        trainer = make_trainer(2, strategy=strategy, max_steps=1)
        trainer.fit(module, DataLoader(texts(8), 4), DataLoader(texts(2), 1))
        found[name] = trainer.strategy.plan  # type: ignore[attr-defined]
        heads = [layer.num_heads for layer in module.modules() if hasattr(layer, "num_heads")]
        assert set(heads) <= {4}
        assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.modules())
        again = TensorParallelStrategy({name: word for name, word in found[name].items() if name.startswith("lm_head")})
        assert again.plan
    return found


def test_a_found_plan_keeps_activations_split_only_where_that_gives_the_same() -> None:
    plans = on_ranks(2, _plans)[0]
    gpt, llama = plans["gpt"], plans["llama"]
    assert gpt["blocks.0.attn.c_attn"] == "colwise_gather"  # one layer for three, cut into three by the module
    assert gpt["blocks.0.attn.c_proj"] == "rowwise_split"
    assert (gpt["blocks.1.mlp.c_fc"], gpt["blocks.1.mlp.c_proj"]) == ("colwise", "rowwise")
    assert (gpt["wte"], gpt["lm_head"]) == ("rowwise", "colwise_gather")  # one weight
    assert not {"wpe", "ln_f"} & set(gpt)
    for name in ("q_proj", "k_proj", "v_proj"):
        assert llama[f"blocks.0.attn.{name}"] == "colwise"
        assert plans["odd"][f"blocks.0.attn.{name}"] == "colwise_gather"  # one head of keys cannot be shared out
    assert llama["blocks.1.attn.o_proj"] == "rowwise"
    assert {llama["blocks.0.mlp.gate_proj"], llama["blocks.0.mlp.up_proj"]} == {"colwise"}
    assert llama["blocks.0.mlp.down_proj"] == "rowwise"
    # the dropout behind the last layer draws the same on all
    assert plans["dropped"]["blocks.0.mlp.c_fc"] == "colwise"


VARIANTS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "dropout": (lambda: GPT(0.2), texts, {}),
    "dropout between layers": (lambda: Perceptron(0.2), numbers, {}),
    "accumulated": (
        Llama,
        texts,
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
    ),
    "bf16-mixed": (GPT, texts, {"precision": "bf16-mixed"}),
}


def _variants(devices: int) -> Any:
    found = {}
    for name, (kind, data, options) in VARIANTS.items():
        module = kind()
        trainer = make_trainer(devices, strategy="tensor_parallel" if devices > 1 else "auto", max_epochs=2, **options)
        torch.manual_seed(5 + 100 * trainer.global_rank)  # other generators on each rank: those of the first count
        trainer.fit(module, DataLoader(data(20), 4, shuffle=True), DataLoader(data(2), 1))
        found[name] = module.losses
    return found


def test_f1_the_same_random_numbers_windows_and_precision_on_one_batch() -> None:
    alone, (first, second) = _variants(1), on_ranks(2, _variants, 2)
    for name, losses in alone.items():
        assert first[name] == pytest.approx(losses, abs=0.02 if name == "bf16-mixed" else 1e-5), name
        assert second[name] == first[name], name


class _ByHand(Perceptron):
    """Two optimizers, stepped by the module."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.1)
            optimizer.step()
        self.losses.append(loss.item())

    def configure_optimizers(self) -> Any:
        halves = self.net.parameters(), [*self.norm.parameters(), *self.head.parameters()]
        return [torch.optim.SGD(half, 0.05) for half in halves]


def _by_hand(devices: int) -> Any:
    L.seed_everything(1, verbose=False)
    module = _ByHand()
    trainer = make_trainer(devices, strategy="tensor_parallel" if devices > 1 else "auto", max_epochs=2)
    trainer.fit(module, DataLoader(numbers(20), 4, shuffle=True), DataLoader(numbers(2), 1))
    return module.losses


def test_f1_f2_manual_optimization_gives_the_same() -> None:
    alone = _by_hand(1)
    for losses in on_ranks(2, _by_hand, 2):
        assert losses == pytest.approx(alone, abs=1e-5)


class _Encoder(Perceptron):
    """torch's own transformer, built without memory, with masks in evaluation."""

    def __init__(self, meta: bool) -> None:
        super().__init__()
        torch.manual_seed(6)
        with torch.device("meta" if meta else "cpu"):
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            self.net = nn.ModuleDict(
                {"encoder": nn.TransformerEncoder(layer, 1), "words": nn.Embedding(7, 8, padding_idx=2)}
            )

    def loss(self, batch: Any) -> torch.Tensor:
        tokens = (batch[0] * 3).long() % 7
        masked = tokens == 1
        masked[:, 0] = False
        x = self.net["encoder"](self.net["words"](tokens), src_key_padding_mask=masked).masked_fill(
            masked[..., None], 0.0
        )
        return (self.head(self.norm(x.mean(1))) - batch[1]).square().mean()


def _library(devices: int, plan: Any = None, meta: bool = False) -> Any:
    L.seed_everything(1, verbose=False)
    module = _Encoder(meta)
    torch.manual_seed(2)
    strategy = TensorParallelStrategy(plan) if devices > 1 else "auto"
    trainer = make_trainer(devices, strategy=strategy, max_epochs=1, num_sanity_val_steps=0)
    trainer.fit(module, DataLoader(numbers(12), 4), DataLoader(numbers(5), 5))
    weights = [p.detach().clone() for p in module.parameters()]
    return module.losses, trainer.callback_metrics["val"].item(), weights, getattr(trainer.strategy, "plan", {})


OWN = {
    "*.linear1": ColwiseParallel(), "*.linear2": RowwiseParallel(), "*.self_attn": "gather", "*.norm1": "sequence",
    "*.words": "colwise", "head": "rowwise_split",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_f1_layers_of_torch_and_styles_of_a_plan_give_the_numbers_of_one_process() -> None:
    losses, value, weights, _ = _library(1)

    def both() -> Any:
        return _library(2), _library(2, OWN)

    for found, own in on_ranks(2, both):
        assert found[3]["net.encoder.layers.0.linear1"] == "colwise"
        assert found[3]["net.encoder.layers.0.self_attn"] == "gather"
        assert found[3]["net.words"] == "colwise"  # 7 words cannot be shared out by rows
        for their_losses, their_value, their_weights, _ in (found, own):
            assert their_losses == pytest.approx(losses, abs=1e-5)
            assert their_value == pytest.approx(value, abs=1e-5)
            for one, other in zip(weights, their_weights, strict=True):
                assert torch.allclose(one, other, atol=1e-5)


def test_layers_built_without_memory_are_filled_alike_on_all() -> None:
    first, second = on_ranks(2, _library, 2, None, True)
    assert first[0] == second[0]
    assert all(torch.equal(one, other) and one.isfinite().all() for one, other in zip(first[2], second[2], strict=True))


class _Metric(nn.Module):
    """Counts samples, over the processes of its group, as metrics of torchmetrics do."""

    def __init__(self) -> None:
        super().__init__()
        self.process_group: Any = None
        self.reset()

    def reset(self) -> None:
        self.seen = torch.zeros(())

    def update(self, count: int) -> None:
        self.seen += count

    def compute(self) -> torch.Tensor:
        total = self.seen.clone()
        torch.distributed.all_reduce(total, group=self.process_group)
        return total


class _Counting(Perceptron):
    def __init__(self) -> None:
        super().__init__()
        self.counted = _Metric()

    def validation_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        super().validation_step(batch, batch_idx)
        self.counted.update(len(batch[0]))
        self.log("counted", self.counted, on_epoch=True)


class _Stream(torch.utils.data.IterableDataset[Any]):
    """Gives each process other samples."""

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(torch.distributed.get_rank())
        for number in range(8):
            x = torch.randn(4, generator=generator)
            yield x, x.sum(0, keepdim=True), torch.tensor(number)


class _Noisy(torch.utils.data.Dataset[Any]):
    """Draws random numbers in a worker."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        x = torch.randn(4)
        return x, x.sum(0, keepdim=True), torch.tensor(index)


def _data() -> Any:
    strategy = TensorParallelStrategy(tensor_parallel_size=2)
    trainer, module = make_trainer(4, strategy=strategy, max_epochs=1), _Counting()
    torch.manual_seed(trainer.global_rank)
    trainer.fit(module, DataLoader(_Noisy(), 2, num_workers=1), DataLoader(numbers(7), 2))
    counted = trainer.callback_metrics["counted"].item(), trainer.callback_metrics["count"].item()
    error = None
    try:
        fit = make_trainer(4, strategy=TensorParallelStrategy(tensor_parallel_size=2), max_epochs=1).fit
        fit(_Counting(), DataLoader(_Stream(), 2), DataLoader(numbers(7), 2))
    except MisconfigurationException as caught:
        error = str(caught)
    return counted, module.losses, module.counted.process_group is None, error


def test_m1_u1_a_group_counts_once_and_its_ranks_get_one_batch() -> None:
    ranks = on_ranks(4, _data)
    for counted, _, given_back, error in ranks:
        assert counted == (7, 7)  # M1: a metric object, and a sum
        assert given_back
        assert error is not None
        assert "work on one batch together" in error
        assert "trainer.strategy.data_rank" in error
    assert ranks[0][1] == ranks[1][1]  # what workers draw is the same in a group
    assert ranks[2][1] == ranks[3][1]
    assert ranks[0][1] != ranks[2][1]


class _Whole(L.LightningModule):
    """Nothing of it can be split."""

    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Linear(4, 5)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.odd(batch[0]).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class _Regularised(_Whole):
    """Uses a weight outside of its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 4))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0]).sum() + self.net[0].weight.square().sum()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (_Whole, "Nothing of _Whole can be split over devices by itself"),
        (_Regularised, "was used outside of the layer"),
    ],
)
def test_f1_what_cannot_be_split_is_said(kind: Any, message: str) -> None:
    def fit() -> None:
        make_trainer(2, strategy="tensor_parallel", max_steps=1).fit(kind(), DataLoader(numbers(4), 2))

    with pytest.raises(AssertionError, match=message):
        on_ranks(2, fit)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"plan": "colwise"}, "must be a dict"),
        ({"plan": {"a": "colwize"}}, "Did you mean 'colwise'"),
        ({"plan": {"a": ColwiseParallel}}, "Make an object of the class"),
        ({"plan": {"a": 3}}, "must be one of"),
        ({"tensor_parallel_size": 0}, "must be 'auto' or an int >= 1"),
        ({"tensor_parallel_size": "all"}, "must be 'auto' or an int >= 1"),
        ({"sharding_strategy": "NO_SHARD"}, "says what the mesh is"),
        ({"tensor_paralel_size": 2}, "Did you mean"),
    ],
)
def test_bad_arguments_of_the_strategy_are_told(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        TensorParallelStrategy(**arguments)


def test_sizes_that_do_not_divide_the_devices_are_told() -> None:
    with pytest.raises(
        MisconfigurationException, match=r"groups of 3 cannot be made of 4 processes.*Take one of \[1, 2, 4\]"
    ):
        make_trainer(4, strategy=TensorParallelStrategy(tensor_parallel_size=3))
    with pytest.raises(MisconfigurationException, match="are 3 x 2 processes, but there are 4"):
        make_trainer(4, strategy=ModelParallelStrategy(3, 2))
    assert make_trainer(4, strategy=ModelParallelStrategy(data_parallel_size=2)).strategy.mesh_shape() == {
        "data_parallel": 2, "tensor_parallel": 2,
    }  # fmt: skip
