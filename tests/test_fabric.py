# SPDX-License-Identifier: Apache-2.0
"""Fabric in one process: the loop by hand to the last bit, every method and property, and what each refuses."""

from __future__ import annotations

import copy
import csv
import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from leyden import Fabric, LightningModule, seed_everything
from leyden.config import set_default_semantics
from leyden.errors import CheckpointError, CheckpointNotFoundError, MisconfigurationException, PossibleUserWarning
from leyden.loggers import CSVLogger
from leyden.precision import MixedPrecision, Precision
from leyden.runtime.seed import pl_worker_init_function
from leyden.strategies import SingleDeviceStrategy
from leyden.wrappers import _FabricDataLoader, _FabricModule, _FabricOptimizer, is_wrapped, unwrapped


@pytest.fixture(autouse=True)
def _seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # seed_everything leaves them to child processes
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)


def make_fabric(**arguments: Any) -> Fabric:
    return Fabric(**{"accelerator": "cpu", "devices": 1, **arguments})


def make_net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))


def samples(count: int = 24) -> TensorDataset:
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(7))
    return TensorDataset(x, x.sum(1, keepdim=True))


def loss_of(model: Any, batch: Any) -> Tensor:
    loss: Tensor = (model(batch[0]) - batch[1]).square().mean()
    return loss


# ---------------------------------------------------------------------------------------------- the same numbers


def _by_hand(make: Any, autocast: Any, dtype: torch.dtype) -> list[Tensor]:
    net = make_net().to(dtype)
    optimizer = make(net.parameters())
    schedule = OneCycleLR(optimizer, 0.1, total_steps=8)
    for _ in range(2):
        for x, y in DataLoader(samples(), 6, shuffle=True):
            with autocast():
                out = net(x.to(dtype))
            loss = (out.to(dtype if dtype == torch.float64 else torch.float32) - y).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return list(net.parameters())


def _with_fabric(make: Any, precision: str) -> list[Tensor]:
    fabric = make_fabric(precision=precision)
    fabric.launch()
    net = make_net()
    optimizer = make(net.parameters())
    model, optimizer, schedule = fabric.setup(net, optimizer, scheduler=OneCycleLR(optimizer, 0.1, total_steps=8))
    loader = fabric.setup_dataloaders(DataLoader(samples(), 6, shuffle=True))
    for _ in range(2):
        for batch in loader:
            fabric.backward(loss_of(model, batch))
            fabric.clip_gradients(model, optimizer, max_norm=0.5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return list(net.parameters())


@pytest.mark.parametrize(
    ("precision", "autocast", "dtype"),
    [
        ("32-true", partial(torch.autocast, "cpu", enabled=False), torch.float32),
        ("64-true", partial(torch.autocast, "cpu", enabled=False), torch.float64),
        ("bf16-true", partial(torch.autocast, "cpu", enabled=False), torch.bfloat16),
        ("bf16-mixed", partial(torch.autocast, "cpu", torch.bfloat16, cache_enabled=False), torch.float32),
    ],
)
@pytest.mark.parametrize("make", [partial(torch.optim.SGD, lr=0.1, momentum=0.9), partial(torch.optim.AdamW, lr=0.1)])
def test_the_numbers_are_those_of_the_loop_by_hand_to_the_last_bit(
    make: Any, precision: str, autocast: Any, dtype: torch.dtype
) -> None:
    expected = _by_hand(make, autocast, dtype)
    for mine, theirs in zip(_with_fabric(make, precision), expected, strict=True):
        assert mine.dtype == dtype
        assert torch.equal(mine, theirs)


def test_the_schedule_may_be_made_of_the_wrapped_optimizer() -> None:
    fabric = make_fabric()
    model, optimizer = fabric.setup(net := make_net(), torch.optim.SGD(net.parameters(), 1.0))
    schedule = StepLR(optimizer, 1, gamma=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rate in (1.0, 0.5, 0.25):
            assert optimizer.param_groups[0]["lr"] == optimizer.optimizer.param_groups[0]["lr"] == rate
            fabric.backward(loss_of(model, samples()[:2]))
            optimizer.step()
            schedule.step()


def test_lbfgs_steps_with_a_closure() -> None:
    fabric, found = make_fabric(), []
    model, optimizer = fabric.setup(
        net := nn.Linear(4, 1), torch.optim.LBFGS(net.parameters(), line_search_fn="strong_wolfe")
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, samples()[:])
        fabric.backward(loss)
        found.append(loss.item())
        return loss

    assert optimizer.step(closure).item() == found[0]
    assert found[-1] < 0.01 * found[0]


def test_scaled_gradients_are_unscaled_before_they_are_clipped_and_loss_backward_is_refused() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    fabric = make_fabric(plugins=MixedPrecision("16-mixed", "cpu", scaler))
    model, optimizer = fabric.setup(net := make_net().eval(), torch.optim.SGD(net.parameters(), 0.1))
    loss = loss_of(model, samples()[:4])
    with pytest.raises(RuntimeError, match=r"fabric.backward\(loss\)"):
        loss.backward()
    optimizer.zero_grad()
    fabric.backward(loss_of(model, samples()[:4]))
    scaled = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]).norm()
    norm = fabric.clip_gradients(model, optimizer, max_norm=1e6)
    assert norm is not None
    torch.testing.assert_close(norm * 4, scaled)
    before = net[0].weight.clone()
    optimizer.step()
    assert not torch.equal(before, net[0].weight)
    fabric.backward(loss_of(model, samples()[:4]) * float("inf"))
    before = net[0].weight.clone()
    optimizer.step()
    assert torch.equal(before, net[0].weight)
    state = {"precision": fabric.strategy.precision}
    assert unwrapped(state["precision"]) is fabric.strategy.precision


def test_outputs_in_16_bits_come_back_in_32_and_doubles_go_in() -> None:
    fabric = make_fabric(precision="bf16-mixed")
    model = fabric.setup(net := nn.Linear(4, 1))
    output = model(torch.ones(2, 4, dtype=torch.float64))
    assert output.dtype == torch.float32
    with fabric.autocast():
        assert net(torch.ones(2, 4)).dtype == torch.bfloat16
    assert make_fabric(precision="16-true").setup_module(nn.Linear(1, 1)).dtype == torch.float16
    double = make_fabric(precision="64-true")
    with double.init_module():
        assert nn.Linear(1, 1).weight.dtype == torch.float64
    with double.init_tensor():
        assert torch.zeros(1).dtype == torch.float64
    with fabric.init_module(empty_init=True):
        nn.Linear(3, 3)


def test_clipping_by_value_by_norm_and_what_is_refused() -> None:
    fabric = make_fabric()
    model, optimizer = fabric.setup(net := nn.Linear(2, 1, bias=False), torch.optim.SGD(net.parameters(), 0.1))
    for refused in ({}, {"clip_val": 1.0, "max_norm": 1.0}):
        with pytest.raises(ValueError, match="exactly one"):
            fabric.clip_gradients(model, optimizer, **refused)
    net.weight.grad = torch.tensor([[3.0, -4.0]])
    norm = fabric.clip_gradients(model, optimizer, max_norm=10.0)
    assert norm is not None
    assert norm.item() == 5.0
    norm = fabric.clip_gradients(net, optimizer.optimizer, max_norm=10.0, norm_type=1)
    assert norm is not None
    assert norm.item() == 7.0
    assert fabric.clip_gradients(model, optimizer, clip_val=0.5) is None
    assert net.weight.grad.tolist() == [[0.5, -0.5]]
    net.weight.grad.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="non-finite"):
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
    fabric.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=False)


# ---------------------------------------------------------------------------------------------- what is wrapped


class _Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.register_buffer("seen", torch.zeros(1))
        self.attribute = 1

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]

    def training_step(self, x: Tensor) -> Tensor:
        return self(x).sum()  # type: ignore[no-any-return]

    def helper(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def test_a_wrapped_module_looks_like_the_module() -> None:
    fabric = make_fabric()
    model = fabric.setup(own := _Own())
    assert isinstance(model, _FabricModule)
    assert model.module is own
    assert model.layer is own.layer
    assert [name for name, _ in model.named_parameters()] == ["layer.weight", "layer.bias"]
    assert [name for name, _ in model.named_buffers()] == ["seen"]
    assert list(model.state_dict()) == list(own.state_dict())
    assert list(model.state_dict(prefix="a.")) == ["a.seen", "a.layer.weight", "a.layer.bias"]
    assert model.load_state_dict(own.state_dict()).missing_keys == []
    model.attribute, model.new = 5, 6
    assert (own.attribute, own.new) == (5, 6)
    assert not hasattr(model, "nothing")
    with pytest.raises(AttributeError, match="_Own.*nothing"):
        _ = model.nothing
    model.eval()
    assert not own.training
    assert not own.layer.training
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert model.helper(torch.ones(1, 4)).shape == (1, 1)
    assert "_Own" in repr(model)
    calls: list[Any] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    model(torch.ones(1, 4))
    assert calls == [1]
    assert make_fabric().setup(nn.Identity()).device == torch.device("cpu")
    assert make_fabric().setup(nn.Identity(), move_to_device=False).dtype == torch.float32


def test_steps_run_in_the_precision_and_methods_can_be_marked() -> None:
    model = make_fabric(precision="bf16-mixed").setup(own := _Own())
    dtypes: list[Any] = []
    own.layer.register_forward_hook(lambda part, args, output: dtypes.append(output.dtype))
    assert model.training_step(torch.ones(1, 4)).dtype == torch.float32
    model.helper(torch.ones(1, 4))
    model.mark_forward_method("helper")
    model.helper(torch.ones(1, 4))
    assert dtypes == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert "forward" not in vars(own)
    with pytest.raises(TypeError, match="method of the module"):
        model.mark_forward_method(3)
    with pytest.raises(ValueError, match="forward"):
        model.mark_forward_method("forward")
    for name in ("attribute", "nothing"):
        with pytest.raises(AttributeError, match=name):
            model.mark_forward_method(name)


def test_a_step_that_raises_leaves_the_forward_of_the_module_as_it_was() -> None:
    model = make_fabric(precision="bf16-mixed").setup(own := _Own())
    own.forward = kept = own.forward  # type: ignore[method-assign]
    with pytest.raises(TypeError):
        model.training_step()
    assert own.forward is kept


def test_a_wrapped_optimizer_is_one_of_its_class() -> None:
    fabric = make_fabric()
    inner = torch.optim.Adam(make_net().parameters(), 0.1)
    optimizer = fabric.setup_optimizers(inner)
    assert isinstance(optimizer, torch.optim.Adam)
    assert isinstance(optimizer, _FabricOptimizer)
    assert type(optimizer).__name__ == "FabricAdam"
    assert optimizer.optimizer is inner
    assert optimizer.param_groups is inner.param_groups
    optimizer.param_groups = inner.param_groups[:]
    assert optimizer.param_groups is inner.param_groups
    optimizer.load_state_dict(optimizer.state_dict())
    assert fabric.setup_optimizers(inner, inner)[1].optimizer is inner
    inner.param_groups[0]["params"][0].grad = torch.ones_like(inner.param_groups[0]["params"][0])
    optimizer.zero_grad(set_to_none=False)
    assert inner.param_groups[0]["params"][0].grad.sum() == 0
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    assert len(inner.param_groups) == 2


def test_wrapped_things_can_be_copied_and_pickled() -> None:
    fabric = make_fabric(precision="bf16-mixed")
    model, optimizer = fabric.setup(net := make_net(), torch.optim.SGD(net.parameters(), 0.1))
    x = torch.ones(1, 4)
    model.eval()
    copied, its = copy.deepcopy((model, optimizer))
    assert copied(x).equal(model(x))
    assert its.param_groups[0]["params"][0] is copied.module[0].weight
    assert its.param_groups[0]["params"][0] is not net[0].weight
    again, its = pickle.loads(pickle.dumps((model, optimizer)))
    assert again(x).equal(model(x))
    assert type(its) is type(optimizer)
    fabric.backward(loss_of(again, samples()[:2]))
    its.step()
    assert not again.module[2].weight.equal(net[2].weight)
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    assert is_wrapped(torch.load(buffer, weights_only=False))


def test_is_wrapped() -> None:
    fabric = make_fabric()
    net, loader = make_net(), DataLoader(samples())
    optimizer = torch.optim.SGD(net.parameters())
    things = (net, optimizer, loader, None, 3)
    assert not any(map(is_wrapped, things))
    wrapped = (*fabric.setup(net, optimizer), fabric.setup_dataloaders(loader))
    assert all(map(is_wrapped, wrapped))
    assert [unwrapped(thing) for thing in wrapped] == [net, optimizer, loader]


def test_a_compiled_module_is_compiled_again_around_what_the_strategy_made() -> None:
    fabric = make_fabric()
    own = _Own()
    compiled = torch.compile(own, backend="eager")
    model = fabric.setup(compiled)
    assert isinstance(model, _FabricModule)
    assert model.module is own
    inner = model._forward_module
    assert inner is not compiled
    assert inner._orig_mod is own
    assert inner.dynamo_ctx is compiled.dynamo_ctx
    assert list(model.state_dict()) == list(own.state_dict())
    x = torch.ones(2, 4)
    assert model(x).equal(own(x))
    assert model.training_step(x).equal(own.training_step(x))
    assert is_wrapped(torch.compile(model, backend="eager"))
    with pytest.raises(ValueError, match="only once"):
        fabric.setup(torch.compile(model, backend="eager"))
    kept = fabric.setup(compiled, _reapply_compile=False)
    assert kept.module is compiled


# ---------------------------------------------------------------------------------------------- set up


def test_setup_returns_what_it_was_given_in_that_order() -> None:
    fabric, net = make_fabric(), make_net()
    one, two = torch.optim.SGD(net.parameters(), 0.1), torch.optim.Adam(net.parameters())
    schedule = StepLR(one, 1)
    assert isinstance(fabric.setup(net), _FabricModule)
    assert isinstance(fabric.setup_module(net), _FabricModule)
    model, first, second, last = fabric.setup(net, one, two, scheduler=schedule)
    assert (model.module, first.optimizer, second.optimizer, last) == (net, one, two, schedule)


def test_what_is_set_up_twice_or_is_something_else_is_refused() -> None:
    fabric, net, loader = make_fabric(), make_net(), DataLoader(samples())
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters()))
    for call in (fabric.setup, fabric.setup_module):
        with pytest.raises(ValueError, match="only once"):
            call(model)
        with pytest.raises(TypeError, match=r"torch.nn.Module"):
            call(3)
    for setup in (partial(fabric.setup, net), fabric.setup_optimizers):
        with pytest.raises(ValueError, match="only once"):
            setup(optimizer)
        with pytest.raises(TypeError, match="takes optimizers"):
            setup(3)
    with pytest.raises(ValueError, match="at least one optimizer"):
        fabric.setup_optimizers()
    with pytest.raises(ValueError, match="at least one DataLoader"):
        fabric.setup_dataloaders()
    with pytest.raises(TypeError, match="range"):
        fabric.setup_dataloaders(range(3))
    with pytest.raises(ValueError, match="only once"):
        fabric.setup_dataloaders(fabric.setup_dataloaders(loader))
    with torch.device("meta"):
        empty = nn.Linear(1, 1)
    for setup in (partial(fabric.setup, empty, move_to_device=False), fabric.setup_optimizers):
        with pytest.raises(RuntimeError, match="meta"):
            setup(torch.optim.SGD(empty.parameters()))
    with pytest.raises(TypeError, match="set up the Sequential first"):
        fabric.no_backward_sync(net)


class _Remakes(SingleDeviceStrategy):
    """Makes new parameters, as strategies that shard them do."""

    def setup_module(self, module: nn.Module) -> nn.Module:
        for part in module.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                setattr(part, name, nn.Parameter(parameter.detach().clone()))
        return module


def test_optimizers_follow_parameters_that_a_strategy_makes_anew() -> None:
    fabric = Fabric(strategy=_Remakes(torch.device("cpu")), accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(net := make_net(), torch.optim.Adam(net.parameters(), 0.1))
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], net.parameters(), strict=True))
    fabric.backward(loss_of(model, samples()[:2]))
    optimizer.step()
    with pytest.raises(MisconfigurationException, match="Set up the module first"):
        fabric.setup(net, optimizer.optimizer)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_loaders_give_what_they_gave(device: str | None) -> None:
    fabric = make_fabric()
    loader = DataLoader(samples(), 5)
    ready = fabric.setup_dataloaders(loader, move_to_device=device is not None)
    assert isinstance(ready, _FabricDataLoader)
    assert ready.device == (None if device is None else torch.device(device))
    assert len(ready) == len(loader) == 5
    assert ready.dataset is loader.dataset
    assert ready.batch_size == 5
    for mine, theirs in zip(ready, loader, strict=True):
        assert all(map(torch.equal, mine, theirs))
    with pytest.raises(AttributeError):
        _ = ready.nothing


class _Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield {"x": torch.ones(2), "deep": [torch.zeros(1)], "text": "a"}


def test_batches_of_any_form_arrive_on_the_device() -> None:
    ready, other = make_fabric().setup_dataloaders(DataLoader(_Stream(), batch_size=None), DataLoader(samples(), 4))
    (batch,) = ready
    assert batch["text"] == "a"
    moved = _FabricDataLoader([[torch.ones(1), 3], (torch.ones(1),), torch.ones(2)], torch.device("meta"))
    first, second, third = moved
    assert [x.device.type for x in (first[0], second[0], third)] == ["meta"] * 3
    assert len(list(other)) == 6


def test_workers_are_seeded_by_rank_where_that_was_asked_for() -> None:
    fabric = make_fabric()
    assert fabric.seed_everything(3, verbose=False) == 3
    loader = DataLoader(samples(), num_workers=1)
    ready = fabric.setup_dataloaders(loader)
    assert ready.worker_init_fn.func is pl_worker_init_function
    assert loader.worker_init_fn is None
    Fabric.seed_everything(3, workers=False, verbose=False)
    assert fabric.setup_dataloaders(loader).worker_init_fn is None


# ---------------------------------------------------------------------------------------------- who and where


def test_properties_and_exchanges_of_one_process() -> None:
    logger = Mock()
    fabric = make_fabric(loggers=logger)
    ranks = (fabric.global_rank, fabric.local_rank, fabric.node_rank, fabric.world_size, fabric.is_global_zero)
    assert ranks == (0, 0, 0, 1, True)
    assert fabric.device == torch.device("cpu") == fabric.strategy.root_device
    assert fabric.accelerator.name() == "cpu"
    assert (fabric.logger, fabric.loggers) == (logger, [logger])
    with pytest.raises(IndexError):
        _ = make_fabric().logger
    fabric.barrier()
    assert fabric.broadcast({"a": 1}) == {"a": 1}
    tensor = torch.ones(2)
    assert fabric.all_reduce(tensor) is tensor
    assert fabric.all_gather(tensor) is tensor
    gathered = fabric.all_gather({"a": 2, "b": "text"})
    assert isinstance(gathered["a"], Tensor)
    assert gathered["b"] == "text"
    with fabric.rank_zero_first(), fabric.no_backward_sync(fabric.setup(make_net())):
        pass
    with pytest.warns(DeprecationWarning, match="init_module"), fabric.sharded_model():
        pass
    assert fabric.to_device({"a": tensor})["a"].equal(tensor)
    net = make_net()
    assert fabric.to_device(net) is net


def test_print_prints(capsys: pytest.CaptureFixture[str]) -> None:
    make_fabric().print("a", 1, sep="-")
    assert capsys.readouterr().out == "a-1\n"


def test_launch_calls_a_function_and_refuses_what_is_none() -> None:
    fabric = make_fabric()
    assert fabric.launch() is None
    assert fabric.launch(lambda fabric, a, *, b: (fabric.world_size, a, b), 2, b=3) == (1, 2, 3)
    with pytest.raises(TypeError, match="at least one argument"):
        fabric.launch(lambda: 1)
    with pytest.raises(TypeError, match="callable"):
        fabric.launch(None)


class _Runs(Fabric):
    def run(self, *args: Any, **kwargs: Any) -> Any:
        return self, args, kwargs


class _RunsMore(_Runs):
    def run(self, *args: Any, **kwargs: Any) -> Any:
        return super().run(*args, more=1, **kwargs)


def test_run_is_for_subclasses() -> None:
    fabric = _RunsMore(accelerator="cpu", devices=1)
    assert fabric.run(1, two=2) == (fabric, (1,), {"more": 1, "two": 2})
    assert make_fabric().run(1, two=2) is None


def test_arguments_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "ACCELERATOR": "cpu",
        "DEVICES": "1",
        "NUM_NODES": "1",
        "PRECISION": "bf16-mixed",
        "STRATEGY": "single_device",
    }
    for name, value in values.items():
        monkeypatch.setenv(f"LT_{name}", value)
    fabric = Fabric()
    assert fabric.strategy.precision.precision == "bf16-mixed"
    assert isinstance(fabric.strategy, SingleDeviceStrategy)
    assert Fabric(precision="64-true").strategy.precision.precision == "bf16-mixed"
    monkeypatch.setenv("LT_CLI_USED", "1")
    with pytest.raises(MisconfigurationException, match=r"Fabric\(precision='64-true'\).*LT_PRECISION"):
        Fabric(precision="64-true")
    monkeypatch.delenv("LT_PRECISION")
    assert Fabric().launch(lambda fabric: fabric.world_size) == 1
    assert _Runs().run(1)[1] == (1,)
    before = set_default_semantics("lightning")
    try:
        with pytest.raises(RuntimeError, match="LT_CLI_USED"):
            Fabric().launch()
        with pytest.raises(TypeError, match="run"):
            _Runs()
    finally:
        set_default_semantics(before)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"strategy": "dpp"}, r"strategy='dpp'.*Did you mean"),
        ({"precision": "31"}, "Precision '31' is invalid"),
        ({"num_nodes": 0}, r"Fabric\(num_nodes=0\)"),
        ({"accelerator": "abacus"}, "abacus"),
        ({"plugins": 3}, r"Fabric\(plugins=3\)"),
        ({"precision": "32-true", "plugins": Precision()}, r"Fabric\(precision='32-true', plugins"),
        ({"devices": 2, "strategy": "single_device"}, r"Fabric\(devices=2"),
    ],
)
def test_arguments_that_cannot_be_are_refused_by_name(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(MisconfigurationException, match=said):
        Fabric(**{"accelerator": "cpu", **arguments})


def test_parameters_on_different_devices_are_told() -> None:
    with torch.device("meta"):
        far = nn.Linear(1, 1)
    with pytest.warns(PossibleUserWarning, match="different devices"), pytest.raises(NotImplementedError):
        make_fabric().setup(nn.Sequential(nn.Linear(1, 1), far))


# ---------------------------------------------------------------------------------------------- callbacks and loggers


class _Callback:
    attribute = 1

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_epoch(self, number: int, loss: float = 0.0) -> None:
        self.seen.append((number, loss))

    def on_any(self, **kwargs: Any) -> None:
        self.seen.append(kwargs)

    def on_after_setup(self, fabric: Fabric, module: Any) -> None:
        self.seen.append((fabric, module))

    def on_after_optimizer_step(self, strategy: Any, optimizer: Any) -> None:
        self.seen.append((strategy, optimizer))

    def state_dict(self) -> dict[str, Any]:
        return {"count": len(self.seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = [None] * state["count"]


def test_call_calls_those_that_have_the_method_with_what_it_takes() -> None:
    callback, other = _Callback(), object()
    fabric = make_fabric(callbacks=[callback, other])
    fabric.call("on_epoch", 3, loss=0.5, unknown=1)
    fabric.call("on_any", a=1)
    fabric.call("on_nothing")
    with pytest.warns(UserWarning, match=r"_Callback.attribute is no method"):
        fabric.call("attribute")
    assert callback.seen == [(3, 0.5), {"a": 1}]
    model, optimizer = fabric.setup(net := make_net(), torch.optim.SGD(net.parameters()))
    optimizer.step()
    assert callback.seen[2:] == [(fabric, model), (fabric.strategy, optimizer.optimizer)]
    single = make_fabric(callbacks=callback)
    single.call("on_any")
    assert callback.seen[-1] == {}


def test_log_sends_numbers_to_all_loggers() -> None:
    loggers = [Mock(), Mock()]
    fabric = make_fabric(loggers=loggers)
    fabric.log("a", torch.tensor([2.0], requires_grad=True), step=5)
    fabric.log_dict({"b": 1, "c": torch.tensor(3)})
    for logger in loggers:
        first, second = logger.log_metrics.call_args_list
        assert first.kwargs == {"metrics": {"a": 2.0}, "step": 5}
        assert second.kwargs == {"metrics": {"b": 1, "c": 3}, "step": None}
        assert type(second.kwargs["metrics"]["c"]) is int
    with pytest.raises(ValueError, match=r"\(2,\).*scalar"):
        fabric.log("a", torch.ones(2))


def test_rows_in_memory_are_written_when_the_program_ends(tmp_path: Path) -> None:
    script = (
        "import sys; from leyden import Fabric; from leyden.loggers import CSVLogger\n"
        "fabric = Fabric(accelerator='cpu', devices=1, loggers=CSVLogger(sys.argv[1]))\n"
        "for step in range(3): fabric.log('loss', step / 2, step)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=60)
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open(newline="") as file:
        assert [row["loss"] for row in csv.DictReader(file)] == ["0.0", "0.5", "1.0"]


class _Lit(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = loss_of(self.layer, batch)
        self.log("loss", loss)
        self.log("unlogged", loss, logger=False)
        return loss

    def on_train_epoch_end(self) -> None:
        self.print("over")


def test_a_lightning_module_logs_steps_and_hears_hooks(capsys: pytest.CaptureFixture[str]) -> None:
    logger = Mock()
    fabric = make_fabric(loggers=logger)
    model, optimizer = fabric.setup(own := _Lit(), torch.optim.SGD(own.parameters(), 0.1))
    loss = model.training_step(samples()[:4], 0)
    own.manual_backward(loss)
    own.optimizers().step()
    assert logger.log_metrics.call_args_list[0].kwargs == {"metrics": {"loss": loss.item()}, "step": None}
    assert logger.log_metrics.call_count == 1
    assert own.optimizers() is optimizer
    assert own.optimizers(use_pl_optimizer=False) is optimizer.optimizer
    fabric.call("on_train_epoch_end")
    assert capsys.readouterr().out == "over\n"
    assert (own.fabric, own.logger, own.global_rank, own.local_rank) == (fabric, logger, 0, 0)
    fabric.setup_module(own)
    fabric.call("on_train_epoch_end")
    assert capsys.readouterr().out == "over\n"
    assert pickle.loads(pickle.dumps(own)).fabric is None


# ---------------------------------------------------------------------------------------------- checkpoints


def _train(fabric: Fabric, model: Any, optimizer: Any, schedule: Any, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        fabric.backward(loss_of(model, samples()[step : step + 4]))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        fabric.call("on_epoch", step)


def _parts(fabric: Fabric) -> dict[str, Any]:
    net = make_net()
    inner = torch.optim.Adam(net.parameters(), 0.1)
    model, optimizer, schedule = fabric.setup(net, inner, scheduler=StepLR(inner, 2, 0.5))
    return {
        "model": model,
        "optimizer": optimizer,
        "schedule": schedule,
        "callback": _Callback(),
        "step": 0,
        "more": {"a": 1},
    }


def test_a_loop_that_is_saved_and_loaded_goes_on_to_the_last_bit(tmp_path: Path) -> None:
    fabric = make_fabric()
    whole, first, second = (_parts(fabric) for _ in range(3))
    loop = ("model", "optimizer", "schedule")
    _train(fabric, *(whole[name] for name in loop), range(6))
    _train(fabric, *(first[name] for name in loop), range(3))
    first["callback"].seen = [1, 2, 3]
    first["step"] = 3
    fabric.save(tmp_path / "sub" / "a.ckpt", first)
    with torch.no_grad():
        second["model"].module[0].weight.zero_()
    assert fabric.load(tmp_path / "sub" / "a.ckpt", second) == {}
    assert second["step"] == 3
    assert len(second["callback"].seen) == 3
    _train(fabric, *(second[name] for name in loop), range(3, 6))
    for mine, theirs in zip(second["model"].parameters(), whole["model"].parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert second["schedule"].get_last_lr() == whole["schedule"].get_last_lr()


def test_a_checkpoint_has_the_states_and_nothing_of_the_wrappers(tmp_path: Path) -> None:
    fabric, path = make_fabric(), tmp_path / "a.ckpt"
    parts = _parts(fabric)
    fabric.save(
        path, {**parts, "nets": {"deep": parts["model"]}}, filter={"model": lambda name, value: "bias" not in name}
    )
    found = torch.load(path, weights_only=True)
    assert list(found["model"]) == ["0.weight", "2.weight"]
    assert list(found["nets"]["deep"]) == list(make_net().state_dict())
    assert found["more"] == {"a": 1}
    assert fabric.load(path).keys() == found.keys()
    nets = {"deep": make_net()}
    with torch.no_grad():
        nets["deep"][0].weight.zero_()
    rest = fabric.load(str(path), {"nets": nets})
    assert nets["deep"][0].weight.equal(parts["model"].module[0].weight)
    assert rest["step"] == 0
    for error, bad in ((TypeError, 3), (TypeError, {"model": 3}), (ValueError, {"unknown": bool})):
        with pytest.raises(error, match="filter"):
            fabric.save(path, parts, filter=bad)  # type: ignore[arg-type]


def test_loading_is_strict_unless_asked_and_says_what_does_not_fit(tmp_path: Path) -> None:
    fabric, path = make_fabric(), tmp_path / "a.ckpt"
    fabric.save(path, {"model": make_net(), "n": 1})
    with pytest.raises(KeyError, match="optimizer.*strict=False"):
        fabric.load(path, {"model": make_net(), "optimizer": 3})
    assert fabric.load(path, {"optimizer": 3, "n": 0}, strict=False).keys() == {"model"}
    with pytest.raises(CheckpointError, match="do not fit Linear"):
        fabric.load(path, {"model": nn.Linear(1, 1)})
    with pytest.raises(CheckpointNotFoundError):
        fabric.load(tmp_path / "b.ckpt")
    torch.save([1], path)
    with pytest.raises(CheckpointError, match="list"):
        fabric.load(path)


class _Plain:
    def __init__(self) -> None:
        self.value = 3


def test_nothing_is_unpickled_unless_the_user_says_so(tmp_path: Path) -> None:
    fabric, path = make_fabric(), tmp_path / "a.ckpt"
    fabric.save(path, {"thing": _Plain()})
    with pytest.raises(CheckpointError, match="_Plain"):
        fabric.load(path)
    assert fabric.load(path, weights_only=False)["thing"].value == 3


def test_a_state_without_fabric_is_loaded_raw(tmp_path: Path) -> None:
    fabric, path = make_fabric(), tmp_path / "a.pt"
    torch.save(make_net().state_dict(), path)
    model = fabric.setup(net := nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 1)))
    fabric.load_raw(path, model)
    assert net[0].weight.equal(make_net()[0].weight)
    with pytest.raises(CheckpointError, match="do not fit"):
        fabric.load_raw(path, nn.Linear(4, 8))
    fabric.load_raw(path, nn.Sequential(nn.Linear(4, 8)), strict=False)
    inner = torch.optim.SGD(net.parameters(), 0.5)
    torch.save(inner.state_dict(), path)
    optimizer = fabric.setup_optimizers(torch.optim.SGD(net.parameters(), 0.1))
    fabric.load_raw(path, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.5
    with pytest.raises(TypeError, match="module or an optimizer"):
        fabric.load_raw(path, 3)


def test_seed_everything_is_the_same_as_ours() -> None:
    Fabric.seed_everything(5, workers=False, verbose=False)
    mine = torch.rand(1)
    seed_everything(5, verbose=False)
    assert torch.rand(1).equal(mine)


def test_a_logger_of_ours_logs_without_a_step(tmp_path: Path) -> None:
    fabric = make_fabric(loggers=CSVLogger(tmp_path))
    fabric.log("a", 1.0)
    fabric.log("a", 2.0)
    fabric.logger.save()
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open(newline="") as file:
        assert [(row["a"], row["step"]) for row in csv.DictReader(file)] == [("1.0", "0"), ("2.0", "1")]
