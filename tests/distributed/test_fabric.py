# SPDX-License-Identifier: Apache-2.0
"""Fabric on several processes: the numbers of one, no exchange that is not needed, an end of one rank that ends all."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler

from leyden import Fabric, LightningModule, files
from leyden.config import set_default_semantics
from leyden.errors import CheckpointError
from leyden.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from ranks import data, on_ranks
from test_launch import _environment, _free_port

SCRIPT = Path(__file__).with_name("fabric_script.py")


def make_fabric(devices: int = 2, **arguments: Any) -> Fabric:
    fabric = Fabric(accelerator="cpu", devices=devices, **arguments)
    fabric.launch()
    return fabric


def make_net(width: int = 5) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))


def loss_of(model: Any, batch: Any) -> Tensor:
    loss: Tensor = (model(batch[0]) - batch[1]).square().mean()
    return loss


# ---------------------------------------------------------------------------------------------- the same numbers


def _train(devices: int, batch_size: int, accumulate: int = 1, clip: float | None = None) -> Any:
    fabric = make_fabric(devices)
    net = make_net()
    model, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters(), 0.05))
    torch.manual_seed(5 + fabric.global_rank)  # rank 0's draws the order
    loader = fabric.setup_dataloaders(DataLoader(data(40), batch_size, shuffle=True))
    samples, losses, norms = [], [], []
    for _ in range(2):
        for index, batch in enumerate(loader):
            steps = (index + 1) % accumulate == 0
            samples.append(batch[2].tolist())
            with fabric.no_backward_sync(model, enabled=not steps):
                loss = loss_of(model, batch)
                fabric.backward(loss / accumulate)
            losses.append(fabric.all_reduce(loss.detach().clone()).item())
            if not steps:
                continue
            if clip is not None:
                norms.append(fabric.clip_gradients(model, optimizer, max_norm=clip).item())
            optimizer.step()
            optimizer.zero_grad()
    return samples, losses, norms, [p.tolist() for p in net.parameters()]


@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, 0.1)])
def test_f1_f2_two_processes_compute_what_one_does_with_the_same_global_batches(
    accumulate: int, clip: float | None
) -> None:
    alone = _train(1, 8, accumulate, clip)
    zero, one = on_ranks(2, _train, 2, 4, accumulate, clip)
    assert [sorted(a + b) for a, b in zip(zero[0], one[0], strict=True)] == [sorted(batch) for batch in alone[0]]
    assert zero[1] == one[1] == pytest.approx(alone[1], abs=1e-5)
    assert zero[2] == one[2] == pytest.approx(alone[2], abs=1e-5)
    for here, there, expected in zip(zero[3], one[3], alone[3], strict=True):
        assert here == there
        torch.testing.assert_close(torch.tensor(here), torch.tensor(expected), atol=1e-5, rtol=0)


def _count() -> list[int]:
    exchanged: list[int] = []

    def hook(state: Any, bucket: Any) -> Any:
        exchanged[-1] += 1
        return (
            torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0] / 2)
        )

    hook.__annotations__.clear()  # torch reads them, and knows no text
    fabric = make_fabric(strategy=DDPStrategy(ddp_comm_hook=hook))
    model, optimizer = fabric.setup(net := make_net(), torch.optim.SGD(net.parameters(), 0.1))
    batch = next(iter(DataLoader(data(4), 4)))
    for enabled in (False, True, True, False, True, False):
        exchanged.append(0)
        with fabric.no_backward_sync(model, enabled):
            fabric.backward(loss_of(model, batch))
    optimizer.step()
    return exchanged


def test_accumulation_exchanges_gradients_in_the_last_batch_of_a_window_only() -> None:
    assert on_ranks(2, _count) == [[1, 0, 0, 1, 0, 1]] * 2


# ---------------------------------------------------------------------------------------------- methods


class _Steps(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        return loss_of(self, batch)

    def embed(self, x: Tensor) -> Tensor:
        return self.net[0](x)  # type: ignore[no-any-return]

    def constant(self) -> int:
        return 7


def _methods() -> Any:
    fabric = make_fabric(strategy="ddp_find_unused_parameters_true")
    model, optimizer = fabric.setup(own := _Steps(), torch.optim.SGD(own.parameters(), 0.1))
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(fabric.global_rank))
    fabric.backward(model.training_step((x, x[:, :1])))
    grads = [p.grad.tolist() for p in own.parameters() if p.grad is not None]
    assert model.constant() == 7
    with pytest.raises(RuntimeError, match="mark_forward_method\\('embed'\\)"):
        model.embed(x)
    assert all(not part._forward_hooks for part in own.modules())
    optimizer.zero_grad()
    model.mark_forward_method("embed")
    model.mark_forward_method(own.embed)
    model.embed(x).sum().backward()
    assert "forward" not in vars(own)
    embedded = own.net[0].weight.grad.tolist()
    assert own.optimizers() is optimizer
    assert own.global_rank == fabric.global_rank
    names = [name for name, _ in model.named_parameters()]
    assert names == [name for name, _ in own.named_parameters()] == list(model.state_dict())
    copied = copy.deepcopy(model)
    assert copied(x).tolist() == own(x).tolist()
    assert copied.module is not own
    return grads, embedded


def test_steps_and_marked_methods_go_through_the_wrapper_and_others_must_not_run_a_forward() -> None:
    zero, one = on_ranks(2, _methods)
    assert zero == one
    own = _Steps()
    for rank in (0, 1):
        x = torch.randn(4, 4, generator=torch.Generator().manual_seed(rank))
        (own.training_step((x, x[:, :1])) / 2).backward()
    for found, parameter in zip(zero[0], own.parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(torch.tensor(found), parameter.grad)


def _unused() -> None:
    fabric = make_fabric()
    model = fabric.setup(own := _Steps())
    model.mark_forward_method("embed")
    fabric.backward(model.embed(torch.ones(1, 4)).sum())
    with pytest.raises(RuntimeError, match=r"these parameters of _Steps.*net\.2\.weight, net\.2\.bias"):
        model(torch.ones(1, 4))
    assert fabric.setup(own.requires_grad_(False))(torch.ones(1, 4)).shape == (1, 1)
    assert fabric.setup_module(nn.Identity())(3) == 3


def test_n1_parameters_without_a_gradient_are_named_and_frozen_modules_need_no_wrapper() -> None:
    on_ranks(2, _unused)


# ---------------------------------------------------------------------------------------------- exchanges


def _exchange(folder: Path) -> Any:
    fabric = Fabric(accelerator="cpu", devices=2)
    model = nn.Linear(1, 1)
    for name, call in {
        "setup": lambda: fabric.setup(model), "setup_module": lambda: fabric.setup_module(model),
        "setup_optimizers": lambda: fabric.setup_optimizers(torch.optim.SGD(model.parameters())),
        "setup_dataloaders": lambda: fabric.setup_dataloaders(DataLoader(range(3))), "barrier": fabric.barrier,
        "broadcast": lambda: fabric.broadcast(1), "all_gather": lambda: fabric.all_gather(1),
        "all_reduce": lambda: fabric.all_reduce(1), "init_module": fabric.init_module,
        "save": lambda: fabric.save("x", {}), "load": lambda: fabric.load("x"),
    }.items():  # fmt: skip
        with pytest.raises(RuntimeError, match=rf"Fabric.{name}\(\).*fabric.launch\(\)"):
            call()
    assert fabric.launch(lambda fabric, more, *, last: (fabric.world_size, more, last), 5, last=6) == (2, 5, 6)
    rank = fabric.global_rank
    assert (fabric.local_rank, fabric.node_rank, fabric.is_global_zero) == (rank, 0, rank == 0)
    fabric.barrier("here")
    assert fabric.broadcast({"of": rank}, src=1) == {"of": 1}
    gathered = fabric.all_gather({"a": torch.tensor([rank]), "b": [float(rank)], "c": "text"})
    assert (gathered["a"].tolist(), gathered["b"][0].tolist(), gathered["c"]) == ([[0], [1]], [0.0, 1.0], "text")
    tensor = torch.tensor([1.0 + rank])
    assert fabric.all_reduce(tensor) is tensor
    assert tensor.item() == 1.5
    assert fabric.all_reduce({"n": 1 + rank}, reduce_op="sum")["n"].item() == 3
    weight = torch.ones(2, requires_grad=True)
    fabric.all_gather(weight * (1 + rank), sync_grads=True).sum().backward()
    log = folder / "log"
    for local in (False, True):
        with fabric.rank_zero_first(local=local):
            seen = log.read_text() if log.exists() else ""
            log.write_text(seen + str(rank))
            time.sleep(0.1 * (1 - rank))
        fabric.barrier()
    fabric.print("said by", rank, file=(said := _Said()))
    return log.read_text(), said.text, weight.grad.tolist() if weight.grad is not None else None


class _Said:
    text = ""

    def write(self, text: str) -> None:
        self.text += text


def test_every_exchange_and_the_errors_before_launch(tmp_path: Path) -> None:
    zero, one = on_ranks(2, _exchange, tmp_path)
    assert zero[0] == one[0] == "0101"
    assert (zero[1], one[1]) == ("said by 0\n", "")
    assert (zero[2], one[2]) == ([2.0, 2.0], [4.0, 4.0])


# ---------------------------------------------------------------------------------------------- checkpoints


def _save(folder: Path) -> Any:
    fabric = make_fabric()
    model, optimizer = fabric.setup(net := make_net(), torch.optim.Adam(net.parameters(), 0.1))
    fabric.backward(loss_of(model, next(iter(DataLoader(data(4), 4)))))
    optimizer.step()
    fabric.save(folder / "a.ckpt", {"model": model, "optimizer": optimizer, "step": 1})
    expected = [p.tolist() for p in net.parameters()]
    other, its = fabric.setup(
        fresh := nn.Sequential(*copy.deepcopy(list(net))), torch.optim.Adam(fresh.parameters(), 0.1)
    )
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    state = {"model": other, "optimizer": its, "step": 0}
    assert fabric.load(folder / "a.ckpt", state) == {}
    assert state["step"] == 1
    assert [p.tolist() for p in fresh.parameters()] == expected
    assert its.state_dict()["state"][0]["step"] == 1
    with pytest.raises(CheckpointError):
        fabric.save(folder / "file" / "b.ckpt", {"model": model})
    return list(torch.load(folder / "a.ckpt", weights_only=True)["model"])


def test_rank_zero_saves_all_load_and_a_failure_is_told_everywhere(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    assert on_ranks(2, _save, tmp_path) == [list(make_net().state_dict())] * 2


# ---------------------------------------------------------------------------------------------- data


class _Batches(BatchSampler):
    pass


def _share() -> Any:
    fabric = make_fabric()
    fabric.seed_everything(1, verbose=False)
    rank = fabric.global_rank
    own = DistributedSampler(range(6), 2, rank, shuffle=True)
    loaders = fabric.setup_dataloaders(
        DataLoader(range(7), 2), DataLoader(range(6), 1, sampler=own),
        DataLoader(range(8), batch_sampler=_Batches(SequentialSampler(range(8)), 2, drop_last=False)),
        DataLoader(range(8), 4, shuffle=True),
    )  # fmt: skip
    found = [[batch.tolist() for batch in loader] for loader in loaders]
    alone = fabric.setup_dataloaders(DataLoader(range(4)), use_distributed_sampler=False)
    found.append([batch.item() for batch in alone])
    once = fabric.setup_dataloaders(DataLoader(range(7), 2), pad=False)
    found.append([batch.tolist() for batch in once])
    epochs = [own.epoch]
    list(loaders[1])
    epochs.append(own.epoch)
    own.set_epoch(7)
    list(loaders[1])
    epochs.append(own.epoch)
    list(loaders[1])
    epochs.append(own.epoch)
    loaders[1].set_epoch(20)
    list(loaders[1])
    return found, [*epochs, own.epoch]


def test_i1_loaders_are_shared_by_their_stream_and_samplers_hear_of_the_epoch() -> None:
    (zero, epochs), (one, _) = on_ranks(2, _share)
    assert (zero[0], one[0]) == ([[0, 2], [4, 6]], [[1, 3], [5, 0]])
    assert sorted(x for batch in (*zero[1], *one[1]) for x in batch) == list(range(6))
    assert (zero[2], one[2]) == ([[0, 1], [4, 5]], [[2, 3], [6, 7]])
    assert sorted(x for batch in (*zero[3], *one[3]) for x in batch) == list(range(8))
    assert zero[4] == one[4] == [0, 1, 2, 3]
    assert (zero[5], one[5]) == ([[0, 2], [4, 6]], [[1, 3], [5]])
    assert epochs == [0, 1, 7, 8, 20]


def _share_as_lightning() -> Any:
    set_default_semantics("lightning")  # this process is a copy, and ends with the test
    fabric = make_fabric()
    fabric.seed_everything(3, verbose=False)
    shuffled, ordered = fabric.setup_dataloaders(DataLoader(range(8), 1, shuffle=True), DataLoader(range(8), 1))
    passes = [[batch.item() for batch in loader] for loader in (shuffled, shuffled, ordered)]
    sampler = DistributedSampler(range(8), 2, fabric.global_rank, seed=3)
    expected = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        expected.append(list(sampler))
    assert isinstance(shuffled.sampler, DistributedSampler)
    return passes == [*expected, list(range(fabric.global_rank, 8, 2))]


def test_programs_that_import_lightnings_fabric_share_samples_as_there() -> None:
    assert on_ranks(2, _share_as_lightning) == [True, True]


# ---------------------------------------------------------------------------------------------- processes for one call


def _in_fork(fabric: Fabric, net: nn.Module, failing: int | None = None) -> Any:
    if fabric.global_rank == failing:
        raise ValueError(f"broken on rank {failing}")
    model = fabric.setup_module(net)
    ranks = fabric.all_gather(fabric.global_rank)
    return ranks, fabric.global_rank, model


class _Runs(Fabric):
    def run(self, number: int) -> Any:
        return self.world_size, self.all_reduce(number + self.global_rank, reduce_op="sum").item()


@pytest.mark.parametrize("method", ["ddp_fork", pytest.param("ddp_spawn", marks=pytest.mark.slow)])
def test_launch_runs_a_function_in_processes_of_its_own_and_returns_what_rank_zero_did(method: str) -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=method)
    with pytest.raises(TypeError, match="function"):
        fabric.launch()
    ranks, rank, model = fabric.launch(_in_fork, net := make_net())
    assert (ranks.tolist(), rank) == ([0, 1], 0)
    assert model.state_dict().keys() == net.state_dict().keys()
    assert model(torch.zeros(1, 4)).shape == (1, 1)
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="broken on rank 1"):
        fabric.launch(_in_fork, net, failing=1)
    assert _Runs(accelerator="cpu", devices=2, strategy=method).run(5) == (2, 11)


# ---------------------------------------------------------------------------------------------- scripts


def _run(command: list[str], folder: Path, mode: str) -> tuple[int, str]:
    done = subprocess.run(
        [*command, str(SCRIPT), str(folder), mode], env=_environment(), stdout=subprocess.PIPE, timeout=100, text=True,
        stderr=subprocess.STDOUT, check=False, cwd=folder,
    )  # fmt: skip
    return done.returncode, done.stdout


def _torchrun() -> list[str]:
    where = ["--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(_free_port())]
    return [sys.executable, "-m", "torch.distributed.run", *where]


@pytest.mark.parametrize("launcher", [pytest.param("ours", marks=pytest.mark.slow), "torchrun"])
def test_a_script_runs_once_in_each_process(launcher: str, tmp_path: Path) -> None:
    code, output = _run([sys.executable] if launcher == "ours" else _torchrun(), tmp_path, "uneven")
    assert code == 0, output
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [rank["rank"] for rank in ranks] == [0, 1]
    assert ranks[0]["pid"] != ranks[1]["pid"]
    assert ranks[0]["weight"] == ranks[1]["weight"]
    assert sorted(ranks[0]["samples"] + ranks[1]["samples"]) == sorted([*range(40)] * 2)
    assert output.count("above") == 2


@pytest.mark.parametrize(
    "mode", ["raise1", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("raise0", "kill1"))]
)
def test_d1_a_rank_that_breaks_ends_all_and_says_so_first(mode: str, tmp_path: Path) -> None:
    code, output = _run([sys.executable], tmp_path, mode)
    assert code != 0
    if mode.startswith("raise"):
        said = f"ValueError: broken on rank {mode[-1]}"
        assert said in output
        other = output.find("Connection")
        assert other == -1 or output.index(said) < other
    _nobody_is_left(tmp_path)


@pytest.mark.slow
def test_ctrl_c_leaves_no_process(tmp_path: Path) -> None:
    running = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(tmp_path), "wait"], env=_environment(), cwd=tmp_path, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        until = time.monotonic() + 60
        while not all((tmp_path / f"pid{rank}").exists() for rank in (0, 1)):
            assert running.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        os.killpg(running.pid, signal.SIGINT)
        assert running.wait(timeout=60) != 0
    finally:
        running.kill()
    _nobody_is_left(tmp_path)


def _nobody_is_left(folder: Path) -> None:
    until = time.monotonic() + 10
    while left := [
        found.pid
        for found in psutil.process_iter(["cmdline", "status"])
        if str(folder) in (found.info["cmdline"] or ()) and found.info["status"] != psutil.STATUS_ZOMBIE
    ]:
        assert time.monotonic() < until, left
        time.sleep(0.1)


# ---------------------------------------------------------------------------------------------- parameters that are spread


def _sharded_strategy(kind: str) -> Any:
    if kind == "fsdp, shards":
        return FSDPStrategy(state_dict_type="sharded")
    if kind != "model_parallel":
        return kind

    def split(module: Any, mesh: Any) -> Any:
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        return fully_shard(parallelize_module(module, mesh["tensor_parallel"], plan), mesh=mesh["data_parallel"])

    return ModelParallelStrategy(2, 2, parallelize_fn=split)


def _spread(strategy: str, ranks: int, folder: Path) -> Any:
    fabric = make_fabric(ranks, strategy=_sharded_strategy(strategy))
    net = make_net(6)
    model, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters(), 0.05))
    assert any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])
    loader = fabric.setup_dataloaders(DataLoader(data(16), 8 // fabric.strategy.data_size))
    losses, norms = [], []
    for epoch in range(3):
        for index, batch in enumerate(loader):
            with fabric.no_backward_sync(model, enabled=index % 2 == 0):
                loss = loss_of(model, batch)
                fabric.backward(loss / 2)
            losses.append(fabric.all_reduce(loss.detach().clone()).item())
            if index % 2:
                norms.append(fabric.clip_gradients(model, optimizer, max_norm=0.1).item())
                optimizer.step()
                optimizer.zero_grad()
        if epoch == 1:
            fabric.save(folder / "a.ckpt", {"model": model, "optimizer": optimizer, "epoch": epoch})
    again = make_net(6)
    other, its = fabric.setup(again, torch.optim.Adam(again.parameters(), 0.05))
    state = {"model": other, "optimizer": its, "epoch": 0}
    fabric.load(folder / "a.ckpt", state)
    for index, batch in enumerate(loader):
        with fabric.no_backward_sync(other, enabled=index % 2 == 0):
            fabric.backward(loss_of(other, batch) / 2)
    fabric.clip_gradients(other, its, max_norm=0.1)
    its.step()
    fabric.save(folder / "b.ckpt", {"model": model})
    fabric.save(folder / "c.ckpt", {"model": other})
    with pytest.raises(ValueError, match="exactly one"):
        fabric.clip_gradients(model, optimizer)
    fabric.backward(loss_of(model, batch))
    inf = fabric.clip_gradients(model, optimizer, max_norm=1e9, norm_type=float("inf"))
    fabric.clip_gradients(model, optimizer, clip_val=1e-6)
    return losses, norms, state["epoch"], float(inf)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # torch's, of the split module itself
@pytest.mark.parametrize(
    ("strategy", "ranks"), [("fsdp", 2), ("fsdp, shards", 2), ("tensor_parallel", 2), ("model_parallel", 4)]
)
def test_f1_f2_spread_parameters_give_the_numbers_of_one_process(strategy: str, ranks: int, tmp_path: Path) -> None:
    zero, *others = on_ranks(ranks, _spread, strategy, ranks, tmp_path)
    assert all(other == zero for other in others)
    net = make_net(6)
    optimizer = torch.optim.Adam(net.parameters(), 0.05)
    losses, norms = [], []
    for _ in range(3):
        for index, batch in enumerate(DataLoader(data(16), 8)):
            loss = loss_of(net, batch)
            (loss / 2).backward()
            losses.append(loss.item())
            if index % 2:
                norms.append(nn.utils.clip_grad_norm_(net.parameters(), 0.1).item())
                optimizer.step()
                optimizer.zero_grad()
    assert zero[0] == pytest.approx(losses, abs=1e-5)
    assert zero[1] == pytest.approx(norms, abs=1e-5)
    assert zero[2] == 1
    assert (tmp_path / "b.ckpt").is_dir() is (strategy in ("fsdp, shards", "model_parallel"))
    saved = [files.load(tmp_path / f"{name}.ckpt")["model"] for name in "bc"]
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(saved[0][name], parameter.detach(), atol=1e-5, rtol=0)
        torch.testing.assert_close(saved[1][name], saved[0][name], atol=1e-6, rtol=0)
    loss_of(net, batch).backward()
    assert zero[3] == pytest.approx(
        max(p.grad.abs().max().item() for p in net.parameters() if p.grad is not None), abs=1e-5
    )


def _meta(folder: Path) -> Any:
    fabric = make_fabric(2, strategy="fsdp")
    with fabric.init_module(empty_init=True):
        net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    assert net[0].weight.is_meta
    model = fabric.setup_module(net)
    fabric.load_raw(folder / "a.pt", model)
    fabric.setup_optimizers(torch.optim.SGD(model.parameters(), 0.1))
    return model(torch.ones(2, 4)).tolist()


def test_a_module_without_memory_is_spread_and_then_loaded(tmp_path: Path) -> None:
    torch.save(make_net().state_dict(), tmp_path / "a.pt")
    zero, one = on_ranks(2, _meta, tmp_path)
    assert zero == one
    torch.testing.assert_close(torch.tensor(zero), make_net()(torch.ones(2, 4)).detach())
