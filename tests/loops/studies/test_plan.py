# SPDX-License-Identifier: Apache-2.0
"""The table of a plan: its formulas, what it recommends, and what it says where nothing fits."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.checkpoint import checkpoint

import leyden as L
from leyden.errors import MisconfigurationException
from leyden.loops.studies import footprint
from leyden.loops.studies import plan as planner
from leyden.loops.studies.footprint import Piece
from leyden.loops.studies.plan import human_bytes
from leyden.loops.studies.sheet import buckets
from leyden.strategies import DDPStrategy
from leyden.strategies.fsdp import FSDPStrategy
from leyden.strategies.tensor_parallel import TensorParallelStrategy


def trainer(**settings: Any) -> L.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(**{"max_epochs": 1, "accelerator": "cpu", **quiet, **settings})


class Net(L.LightningModule):
    """Four equal blocks between two layers, Adam."""

    def __init__(self, width: int = 400, norm: bool = False, frozen: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(10, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.last = nn.Linear(width, 3)
        if frozen:
            self.blocks.requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = self.first(batch)
        for block in self.blocks:
            x = block(x).relu()
        return self.last(self.norm(x)).square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad])


def rows(plan: Any) -> dict[str, dict[str, Any]]:
    return {row["strategy"]: row for row in plan.rows}


def test_bytes_on_each_device() -> None:
    plan = trainer().plan(Net(), devices=4, batch=torch.randn(8, 10))
    found = rows(plan)
    whole = sum(p.numel() * 4 for p in Net().parameters())
    count = len(list(Net().parameters()))
    single, ddp, fsdp = found["single"], found["ddp"], found["fsdp"]
    assert (single["weights"], single["gradients"], single["optimizer"]) == (whole, whole, 2 * whole + 4 * count)
    assert (ddp["weights"], ddp["gradients"], ddp["optimizer"]) == (whole, whole, 2 * whole + 4 * count)
    assert ddp["transit"] == whole  # the buckets
    # each parameter is cut into chunks along its first dimension: the last layer of 3 rows gives one to each of three
    cut = (whole - 4 * 3 * 401) // 4 + 4 * 401
    assert (fsdp["weights"], fsdp["gradients"], fsdp["optimizer"]) == (cut, cut, 2 * cut + 4 * count)
    block, ends = 4 * 401 * 400, 4 * 4 * 401 + 4 * 11 * 400  # the last layer comes padded to 4 rows
    assert fsdp["largest"] == block
    assert fsdp["transit"] == ends + 2 * block + block
    assert found["fsdp (SHARD_GRAD_OP)"]["transit"] == ends + 4 * block + block
    offload = found["fsdp (CPU offload)"]
    assert (offload["weights"], offload["gradients"], offload["optimizer"]) == (0, 0, 0)
    assert offload["host"] == 4 * cut + 4 * count
    assert len({row["activations"] for row in plan.rows}) == 1
    for row in plan.rows:
        kept = row["weights"] + row["gradients"] + row["optimizer"]
        assert row["total"] >= kept + row["activations"] + row["transit"]
    assert json.loads(json.dumps(plan.rows)) == plan.rows


def test_what_travels() -> None:
    plan = trainer(accumulate_grad_batches=3).plan(Net(norm=True), devices=2, nodes=4)
    found = rows(plan)
    grads = sum(p.numel() * 4 for p in Net(norm=True).parameters())
    buffers = sum(b.numel() * b.element_size() for b in Net(norm=True).buffers())
    # once for a window of three batches; its running statistics before each of them
    assert found["ddp"]["collectives"] == {"all_reduce": 2, "broadcast": 3}
    assert found["ddp"]["traffic"] == round(2 * 7 / 8 * grads + 3 * 7 / 8 * buffers)
    assert found["fsdp"]["collectives"] == {"all_gather": 3 * (2 * 4 + 1), "reduce_scatter": 5}
    assert found["fsdp (SHARD_GRAD_OP)"]["collectives"] == {"all_gather": 3 * 5, "reduce_scatter": 5}
    hybrid = found["fsdp (HYBRID_SHARD)"]
    assert hybrid["collectives"] == {"all_gather": 27, "reduce_scatter": 5, "all_reduce": 5}
    assert hybrid["weights"] > found["fsdp"]["weights"]
    assert found["single"]["collectives"] == {}
    assert found["single"]["traffic"] == 0
    assert [row["write"] for row in plan.rows[:2]] == [
        "Trainer(strategy='auto', devices=1)", "Trainer(strategy='ddp', devices=2, num_nodes=4)",
    ]  # fmt: skip


def test_frozen_weights_are_gathered_and_not_scattered() -> None:
    found = rows(trainer().plan(Net(frozen=True), devices=2))
    assert found["fsdp"]["collectives"] == {"all_gather": 9, "reduce_scatter": 1}
    assert found["ddp"]["gradients"] == sum(p.numel() * 4 for p in Net(frozen=True).parameters() if p.requires_grad)


class Blocks(Net):
    """The same in blocks whose activations may be given up, and that may be split."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(400, 1200), nn.Linear(1200, 400)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.fc2(self.fc1(x).relu())  # type: ignore[no-any-return]

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Blocks.Block() for _ in range(4))


def test_the_arguments_of_the_trainers_own_strategy_count() -> None:
    def planned(**arguments: Any) -> dict[str, Any]:
        owner = trainer(devices=2, strategy=FSDPStrategy(**arguments))
        return rows(owner.plan(Blocks(), batch=torch.randn(64, 10)))["fsdp"]

    plain = planned()
    assert planned(activation_checkpointing_policy={Blocks.Block})["activations"] < 0.8 * plain["activations"]
    layers = planned(auto_wrap_policy={nn.Linear})
    assert layers["collectives"] == {"all_gather": 20, "reduce_scatter": 10}  # nothing is left to the module itself
    assert layers["largest"] < plain["largest"]
    halves = planned(mixed_precision=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16))
    assert halves["traffic"] == pytest.approx(plain["traffic"] / 2, rel=0.001)
    views = trainer(devices=2, strategy=DDPStrategy(gradient_as_bucket_view=True)).plan(Blocks())
    assert rows(views)["ddp"]["transit"] == 0


def test_tensor_parallelism() -> None:
    batch = torch.randn(64, 10)
    found = rows(trainer().plan(Blocks(), devices=4, batch=batch))
    split, both = found["tensor_parallel"], found["fsdp x tensor_parallel"]
    # all is split, but for the biases of those that are split by rows; the first layer and the last are a pair too
    parameters = dict(Blocks().named_parameters())
    whole = sum(p.numel() * 4 for p in parameters.values())
    kept = sum(4 * p.numel() for name, p in parameters.items() if name.endswith(("fc2.bias", "last.bias")))
    assert split["weights"] == kept + (whole - kept) // 4
    assert split["optimizer"] == pytest.approx(2 * split["weights"], rel=0.001)
    assert (split["shares"], both["shares"], found["ddp"]["shares"]) == (1, 2, 4)
    size = 64 * 400 * 4  # of what goes into a block, and of what comes out of it
    # two in each block; between the first layer and the last activations are gathered, as nobody can try it out there
    assert split["collectives"] == {"all_reduce": 8 + 1, "all_gather": 2}
    assert split["traffic"] == 2 * 3 * (8 * size + 64 * 3 * 4) // 4 + 3 * 2 * size // 4
    assert both["weights"] < 0.3 * whole
    assert set(both["collectives"]) == {"all_reduce", "all_gather", "reduce_scatter"}
    unknown = rows(trainer().plan(Blocks(), devices=4))["tensor_parallel"]
    assert unknown["traffic"] is None  # it is activations that travel
    own = trainer(devices=2, strategy=TensorParallelStrategy({"blocks.0.fc1": "colwise", "blocks.0.fc2": "rowwise"}))
    assert rows(own.plan(Blocks(), batch=batch))["tensor_parallel"]["collectives"] == {"all_reduce": 2}


def test_what_tensor_parallelism_exchanges_where_activations_are_given_up_or_weights_are_brought_together() -> None:
    class Attends(L.LightningModule):
        def __init__(self, give_up: bool) -> None:
            super().__init__()
            self.give_up = give_up
            self.layer = nn.Linear(8, 64)
            self.block = nn.TransformerEncoderLayer(64, 4, 256, 0.0, batch_first=True)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = self.layer(batch)
            return (checkpoint(self.block, x, use_reentrant=False) if self.give_up else self.block(x)).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    plain, again = (
        rows(trainer().plan(Attends(give_up), devices=2, batch=torch.randn(4, 6, 8)))["tensor_parallel"]
        for give_up in (False, True)
    )
    # forward and backward of the two linear layers; four parameters of the attention
    assert plain["collectives"] == {"all_reduce": 2, "all_gather": 4}
    assert again["collectives"] == {"all_reduce": 3, "all_gather": 8}  # the backward comes once
    attention = 4 * (4 * 64 * 64 + 4 * 64)
    assert plain["weights"] < sum(4 * p.numel() for p in Attends(False).parameters()) - attention // 2


def test_what_is_not_possible_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    class Convolutions(Net):
        def __init__(self) -> None:
            L.LightningModule.__init__(self)
            self.layer = nn.Conv1d(3, 4, 2)

    plan = trainer().plan(Convolutions(), devices=2, memory="1GB")
    row = rows(plan)["tensor_parallel"]
    assert (row["reason"], row["write"], row["fits"]) == ("no layer can be split", "", None)
    assert "tensor_parallel       no layer can be split" in capsys.readouterr().out


def test_one_device_and_the_devices_of_the_trainer() -> None:
    assert list(rows(trainer().plan(Net()))) == ["single", "fsdp (CPU offload)"]
    assert "ddp" in rows(trainer(devices=2).plan(Net()))


def test_buckets() -> None:
    def pieces(*sizes: int) -> list[Piece]:
        return [Piece(str(n), (size,), 4, True) for n, size in enumerate(sizes)]

    mega = 1 << 18  # so many numbers are one MiB
    assert buckets(pieces(10, 10)) == 1
    assert buckets(pieces(10, mega)) == 2  # from the last on: the first bucket is full at one MiB
    assert buckets(pieces(mega, 10)) == 1
    assert buckets(pieces(*[mega] * 52)) == 4  # 1, 25, 25, 1
    assert buckets([]) == 0


def test_what_fits_and_what_is_recommended() -> None:
    net, batch = Net(), torch.randn(8, 10)
    plan = trainer().plan(net, devices=8, memory="1GB", batch=batch)
    assert plan.recommended == "ddp"
    assert plan.sentence.startswith("ddp: it needs ")
    assert "of 1 GB on each device and sends the least for as many samples" in plan.sentence
    assert plan.write == "Trainer(strategy='ddp', devices=8)"
    sizes = rows(plan)
    between = (sizes["fsdp"]["total"] + sizes["fsdp (SHARD_GRAD_OP)"]["total"]) / 2 / 0.9
    plan = trainer().plan(net, devices=8, memory=between, batch=batch)
    assert plan.recommended == "fsdp"
    assert "while ddp and fsdp (SHARD_GRAD_OP) do not fit" in plan.sentence
    assert [rows(plan)[name]["fits"] for name in ("single", "ddp", "fsdp")] == [False, False, True]
    # without activations nobody knows whether the rest fits, only what does not
    plan = trainer().plan(net, devices=8, memory=between)
    assert [rows(plan)[name]["fits"] for name in ("ddp", "fsdp")] == [False, None]
    assert "without activations" in plan.sentence
    assert "Activations are not known: no batch was given." in str(plan)
    assert "tells what fits" in trainer().plan(net, devices=8).sentence


class Large(L.LightningModule):
    """64 billion parameters, which no memory of this machine could hold."""

    def configure_model(self) -> None:
        self.embed = nn.Embedding(64_000, 16384)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(16384, 64, 65536, 0.0, batch_first=True) for _ in range(20)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = self.embed(batch)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return (x @ self.embed.weight.T).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


def test_a_model_too_large_for_the_plan_says_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: dict[int, Any] = {}

    def once(trainer: Any, module: Any, batch: Any) -> Any:
        if len(batch) not in measured:
            measured[len(batch)] = footprint.measure(trainer, module, batch)
        return measured[len(batch)]

    monkeypatch.setattr(planner, "measure", once)
    owner, batch = trainer(precision="bf16-true"), torch.zeros(32, 512, dtype=torch.long)

    def plan(memory: float, devices: int = 8) -> Any:
        return owner.plan(Large(), devices=devices, memory=memory / planner.ROOM, batch=batch)

    first = plan(1e15)
    assert sum(piece.numel for piece in first.footprint.pieces) > 64e9
    assert first.recommended == "ddp"
    row = rows(first)["fsdp (CPU offload)"]
    alone = row["total"] - row["activations"]
    nothing = plan(alone + row["activations"] / 2)
    assert (nothing.recommended, nothing.write) == (None, None)
    assert nothing.sentence.startswith("Nothing fits: fsdp (CPU offload) needs the least, ")
    assert "What would fit, or help: fsdp (CPU offload) with a batch of " in nothing.sentence
    assert str(nothing).endswith(nothing.sentence)
    assert f"Layers that are gathered take {human_bytes(row['transit'])} of it" in plan(0.8 * alone).sentence
    offload = plan(1.1 * row["total"])
    assert offload.recommended == "fsdp (CPU offload)"
    needed = int(offload.sentence.split("fsdp fits without it on ")[1].split()[0])
    assert plan(1.1 * row["total"], needed).recommended == "fsdp"
    assert not rows(plan(1.1 * row["total"], needed // 2))["fsdp"]["fits"]


def test_a_smaller_batch_is_named_where_it_helps() -> None:
    plan = trainer().plan(Net(), devices=2, batch=torch.randn(4000, 10), memory="20MB")
    fewer = int(plan.sentence.split("with a batch of ")[1].split()[0])
    assert "in place of 4000" in plan.sentence
    assert trainer().plan(Net(), devices=2, batch=torch.randn(fewer, 10), memory="20MB").recommended


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    plan = trainer(precision="bf16-mixed").plan(Net(), devices=2, nodes=2, memory="1 GB", batch=torch.randn(8, 10))
    lines = str(plan).splitlines()
    assert lines[0] == "Net: 647 K parameters; Adam; bf16-mixed; a batch of 8 on each device."
    assert lines[1].split() == [
        "strategy", "weights", "gradients", "optimizer", "activations", "transit", "on", "a", "device", "fits", "sends",
        "exchanges",
    ]  # fmt: skip
    assert lines[4].startswith("ddp ")
    assert lines[4].endswith("2 all-reduce")
    assert "more in the memory of the host" in str(plan)
    assert lines[-1] == f"    {plan.write}"
    assert str(plan) in capsys.readouterr().out
    assert repr(plan) == str(plan)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"devices": 0}, r"plan\(devices=0\) is not valid: it must be an int of at least 1"),
        ({"nodes": "two"}, r"plan\(nodes='two'\) is not valid"),
        ({"devices": True}, r"plan\(devices=True\)"),
        (
            {"memory": "much"},
            r"plan\(memory='much'\) is not valid: it must be bytes as a number, or text such as '80GB'",
        ),
        ({"memory": -1}, r"plan\(memory=-1\)"),
        ({"memory": "1.2.3GB"}, r"plan\(memory='1.2.3GB'\)"),
        ({"model": Net}, "the model must be a module"),
    ],
)
def test_bad_arguments(given: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        trainer().plan(**{"model": Net(), **given})


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GB", 80 * 10**9), ("79.6 GiB", int(79.6 * 2**30)), ("512mib", 512 * 2**20), ("100", 100), (5e3, 5000)],
)
def test_memory_is_read(text: Any, size: int) -> None:
    assert trainer().plan(Net(), memory=text).memory == size


def test_bytes_for_people() -> None:
    assert [human_bytes(n) for n in (0, 999, 1000, 12_345, 999_600, 123_456_789, 2.5e12)] == [
        "0 B", "999 B", "1 kB", "12.3 kB", "1 MB", "123 MB", "2.5 TB",
    ]  # fmt: skip
