# SPDX-License-Identifier: Apache-2.0
"""Several processes work on one batch, and give the numbers of one: layers split by columns and rows, alone and sharded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

import leyden as L
from leyden.strategies import TensorParallelStrategy
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
    trainer = make_trainer(devices, strategy=strategy, max_epochs=4, log_every_n_steps=1, **options)
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


@pytest.mark.parametrize("case", CASES)
def test_f1_f2_u1_m1_two_processes_on_one_batch_give_the_numbers_of_one(case: str) -> None:
    options: dict[str, Any] = {"gradient_clip_val": 0.5}
    _same(_train(case, 1, 1, **options), on_ranks(2, lambda: _train(case, 2, 2, **options)), 2)


@pytest.mark.parametrize("case", ["perceptron", "gpt"])
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
