# SPDX-License-Identifier: Apache-2.0
"""Compiled runs: Y1 to Y4 of PAINS.md, what they must be equal to, and what happens where something cannot be compiled."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import leyden as L
from leyden.errors import LeydenWarning, MisconfigurationException

STRATEGIES = ["auto"]
"""Y4 runs with each of these."""
GRAPHS: list[Any] = []


def counted(graph: Any, example: Any) -> Callable[..., Any]:
    """A compiler that runs graphs as they are, and keeps them in ``GRAPHS``."""
    GRAPHS.append(graph)
    return graph.forward  # type: ignore[no-any-return]


def broken(graph: Any, example: Any) -> Any:
    raise RuntimeError("there is no compiler here\nat all")


@pytest.fixture(autouse=True)
def _no_graphs() -> Iterator[None]:
    GRAPHS.clear()
    torch._dynamo.reset()
    torch.set_num_threads(1)
    yield
    torch._dynamo.reset()


class Net(L.LightningModule):
    """Reads all that changes from step to step, draws random numbers, keeps statistics, and logs in many ways."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        loss = nn.functional.mse_loss(self.net(inputs), targets)
        self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        self.log_dict({"double": loss * 2, "samples": len(inputs), "half": 0.5}, batch_size=len(inputs))
        running = loss.detach().clone()
        self.log("before", running)
        running += 1
        self.log("after", running, on_epoch=True)
        self.log("largest", batch_idx, reduce_fx="max", on_step=False, on_epoch=True)
        self.log("step", float(self.global_step))
        return loss * (1 + 0.1 * self.current_epoch) + 0.001 * self.global_step + 0.01 * batch_idx

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", nn.functional.mse_loss(self.net(batch[0]), batch[1]) + self.current_epoch + batch_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Silent(Net):
    """Without validation."""

    validation_step = L.LightningModule.validation_step


class Small(Silent):
    """Without statistics of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 1)  # type: ignore[assignment]


class Losses(L.Callback):
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(outputs["loss"].clone() if outputs else module.net[0].weight.detach().clone())


def loader(samples: int = 37, shuffle: bool = False, batch_size: int = 8) -> DataLoader[Any]:
    inputs = torch.randn(samples, 8, generator=torch.Generator().manual_seed(samples))
    return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=batch_size, shuffle=shuffle)


def trainer(folder: Any = None, **options: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    quiet |= {"enable_checkpointing": False, "log_every_n_steps": 1, "max_epochs": 2, "default_root_dir": folder}
    return L.Trainer(**(quiet | options))


class Run:
    """One fit from a fixed seed, and all that it leaves."""

    def __init__(self, module: Callable[[], Any] = Net, compile: Any = False, **options: Any) -> None:
        torch.manual_seed(1)
        self.module, losses = module(), Losses()
        self.trainer = trainer(compile=compile, callbacks=[losses, *options.pop("callbacks", [])], **options)
        validates = type(self.module).validation_step is not L.LightningModule.validation_step
        self.trainer.fit(self.module, loader(shuffle=True), loader(21) if validates else None)
        self.losses, self.rows = losses.seen, [dict(row) for row in self.trainer.history]
        self.generator = torch.get_rng_state()

    def equals(self, other: Run) -> bool:
        """Whether losses, rows, weights, buffers and the random generator are the same, to the last bit."""
        mine, theirs = self.module.state_dict(), other.module.state_dict()
        return (
            len(self.losses) > 0
            and all(torch.equal(a, b) for a, b in zip(self.losses, other.losses, strict=True))
            and self.rows == other.rows
            and mine.keys() == theirs.keys()
            and all(torch.equal(mine[name], theirs[name]) for name in mine)
            and torch.equal(self.generator, other.generator)
        )


# --------------------------------------------------------------------------------------------- Y1


def test_y1_self_log_breaks_no_graph_in_a_run_before_it_and_after_it() -> None:
    found: dict[str, Any] = {}

    class Explain(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                found["in the run"] = torch._dynamo.explain(module.training_step)(batch, batch_idx)

        def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            found["in validation"] = torch._dynamo.explain(module.validation_step)(batch, batch_idx)

    module, batch = Net(), next(iter(loader()))
    found["before"] = torch._dynamo.explain(module.training_step)(batch, 0)
    fit = trainer(compile={"backend": "eager"}, callbacks=[Explain()], max_epochs=1, num_sanity_val_steps=0)
    fit.fit(module, loader(), loader(21))
    found["after"] = torch._dynamo.explain(module.training_step)(batch, 0)
    assert set(found) == {"before", "in the run", "in validation", "after"}
    assert {(each.graph_break_count, each.graph_count) for each in found.values()} == {(0, 1)}
    # nothing that was traced for a look was logged
    assert fit.callback_metrics["largest"] == 4


def test_y1_the_whole_step_is_one_graph_that_holds_the_loss() -> None:
    Run(Silent, {"backend": counted, "fullgraph": True})
    assert len(GRAPHS) == 1
    assert any("mse_loss" in str(node.target) for node in GRAPHS[0].graph.nodes)


def test_y1_a_compiled_run_is_equal_to_the_last_bit_when_its_graphs_run_as_they_are() -> None:
    assert Run(compile={"backend": counted}).equals(Run())
    assert GRAPHS


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own
def test_y1_inductor_gives_the_same_losses_and_the_same_values_of_the_epoch() -> None:
    if shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")

    class Plain(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net[3] = nn.Identity()  # inductor draws other random numbers

    # one graph: in float64, what differs is the order of sums
    mine, plain = Run(Plain, True, precision="64-true"), Run(Plain, precision="64-true")
    assert all(torch.allclose(a, b) for a, b in zip(mine.losses, plain.losses, strict=True))
    assert mine.rows == [pytest.approx(row) for row in plain.rows]


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true"])
def test_y1_every_precision(precision: str) -> None:
    assert Run(compile={"backend": counted}, precision=precision).equals(Run(precision=precision))
    assert GRAPHS


class Closure(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class Several(Net):
    """Two optimizers, one call of the step for each."""

    def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Tensor:  # type: ignore[override]
        self.log(f"loss_{optimizer_idx}", float(batch_idx))
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[index].parameters(), lr=0.01) for index in (0, 4)]


class Manual(Net):
    """Toggles, and steps by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.more = nn.ModuleList([nn.Linear(8, 8)])

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        for index, optimizer in enumerate(self.optimizers()):
            with optimizer.toggle_model():
                loss = (self.net(batch[0]) - batch[1]).pow(2).mean() + self.more[0](batch[0]).mean()
                self.log(f"loss_{index}", loss)
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.01), torch.optim.SGD(self.more.parameters(), lr=0.01)


@pytest.mark.parametrize(("module", "options"), [(Net, {"accumulate_grad_batches": 2}), (Closure, {}), (Several, {})])
def test_y1_every_way_to_optimize(module: Any, options: dict[str, Any]) -> None:
    assert Run(module, {"backend": counted}, **options).equals(Run(module, **options))
    assert GRAPHS


class SharedGraph(Small):
    """Two losses that share a part of their graph."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
        found = self.net(batch[0]).tanh()
        return [(found - batch[1]).square().mean(), (self.more(found) - batch[1]).square().mean()]

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.01) for part in (self.net, self.more)]


class Twice(Small):
    """Runs backward twice over one graph."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.net(batch[0]).tanh() - batch[1]).square().mean()

    def backward(self, loss: Tensor) -> None:
        loss.backward(retain_graph=True)
        loss.backward()


class Penalty(Small):
    """Has the gradients of its gradients."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs = batch[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.net(inputs).tanh().sum(), inputs, create_graph=True)
        return (self.net(inputs) - batch[1]).square().mean() + slope.square().mean()


@pytest.mark.parametrize("module", [SharedGraph, Twice, Penalty])
def test_y1_a_graph_may_be_gone_through_more_than_once(module: Any) -> None:
    warned = pytest.warns(LeydenWarning, match="gradients of gradients") if module is Penalty else nullcontext()
    weights = []
    for compile in (False, {"backend": "aot_eager"}):
        torch.manual_seed(1)
        net = module()
        with warned if compile else nullcontext():
            trainer(compile=compile, max_epochs=1).fit(net, loader())
        weights.append([weight.detach() for weight in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_y1_under_manual_optimization_the_layers_are_compiled_but_not_those_that_are_already() -> None:
    class Mixed(Manual):
        def __init__(self) -> None:
            super().__init__()
            self.more[0] = torch.compile(self.more[0], backend="eager")  # type: ignore[assignment]

    mine = Run(Mixed, {"backend": counted})
    assert mine.equals(Run(Mixed))
    called = {str(node.target) for graph in GRAPHS for node in graph.graph.nodes if node.op == "call_function"}
    assert any("batch_norm" in name for name in called)
    assert not any(vars(layer).get("_compiled_call_impl") for layer in mine.module.modules())


def test_y1_metrics_count_as_they_do_uncompiled() -> None:
    metrics = pytest.importorskip("torchmetrics")

    class Counts(Net):
        def __init__(self) -> None:
            super().__init__()
            self.error, self.seen = metrics.MeanSquaredError(), metrics.MeanAbsoluteError()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            outputs = self.net(batch[0])
            self.log("batch error", self.error(outputs, batch[1]))
            self.log("error", self.error, on_step=True, on_epoch=True)
            return nn.functional.mse_loss(outputs, batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.seen.update(self.net(batch[0]), batch[1])
            self.log("seen", self.seen)

    assert Run(Counts, {"backend": "eager"}).equals(Run(Counts))


# --------------------------------------------------------------------------------------------- Y2


def test_y2_two_graphs_over_epochs_steps_validation_and_short_last_batches(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "leyden")
    run = Run(compile={"backend": counted}, max_epochs=3)
    assert len(run.losses) == 15
    assert len(GRAPHS) == 2
    assert "compiled" not in caplog.text


def test_y2_a_last_batch_of_one_sample_has_no_graph_of_its_own() -> None:
    torch.manual_seed(1)
    trainer(compile={"backend": counted}).fit(Small(), loader(33))
    assert len(GRAPHS) == 1


def test_y2_full_batches_have_a_graph_for_their_size_alone() -> None:
    trainer(compile={"backend": counted}).fit(Silent(), loader(32))
    assert len(GRAPHS) == 1
    shapes = [
        node.meta["example_value"].shape
        for node in GRAPHS[0].graph.nodes
        if node.op == "placeholder" and "batch" in node.name
    ]
    assert torch.Size([8, 8]) in shapes


def test_y2_validate_test_and_predict() -> None:
    class Predicts(Net):
        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net(batch[0])  # type: ignore[no-any-return]

    module = Predicts()
    results: list[Any] = []
    for compile in (False, {"backend": counted}):
        run = trainer(compile=compile)
        results.append(
            [
                run.validate(module, loader(), verbose=False),
                run.test(module, [loader(), loader(21)], verbose=False),
                [each.tolist() for each in run.predict(module, loader()) or []],
            ]
        )
    assert results[0] == results[1]
    assert len(GRAPHS) == 3


def test_y2_what_is_compiled_again_is_told_with_the_reason_and_not_without_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Picks(Silent):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * [1.0, 2.0, 3.0, 4.0, 5.0][batch_idx]

    caplog.set_level(logging.INFO, "leyden")
    assert Run(Picks, {"backend": counted}).equals(Run(Picks))
    told = [record.message for record in caplog.records if "compiled again" in record.message]
    assert len(GRAPHS) == 5
    assert len(told) == 4
    assert told[0].startswith("training_step was compiled again: it computes something else where batch_idx is 1")
    assert told[2].startswith("training_step was compiled again (3 times by now): ")
    assert "TORCH_LOGS=recompiles" in told[3]


def test_y2_beyond_the_limit_of_graphs_the_rest_runs_uncompiled_and_that_is_told(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    class Picks(Silent):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * [1.0, 2.0, 3.0, 4.0, 5.0][batch_idx]

    caplog.set_level(logging.INFO, "leyden")
    with torch._dynamo.config.patch(cache_size_limit=2):
        assert Run(Picks, {"backend": counted}).equals(Run(Picks))
    assert len(GRAPHS) == 2
    assert len([record for record in caplog.records if "as often as torch allows" in record.message]) == 1
    assert "torch._dynamo hit config" not in capfd.readouterr().err


def test_y2_a_loss_that_is_logged_with_item_is_still_one_graph() -> None:
    class Reads(Silent):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("read", loss.item())
            self.log("positive", (batch[0] > 0).sum().item())
            return loss

    assert Run(Reads, {"backend": counted}).equals(Run(Reads))
    assert len(GRAPHS) == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own, about a resumed piece of the step
def test_y2_a_step_that_breaks_its_graph_is_told_so_and_logs_in_its_order(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    class Prints(Silent):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("twice", 1.0)
            self.log("rate", self.trainer.optimizers[0].param_groups[0]["lr"])
            loss = super().training_step(batch, batch_idx)
            print("in the middle")
            self.log("twice", 2.0)
            return loss

    caplog.set_level(logging.INFO, "leyden")
    mine = Run(Prints, {"backend": counted})
    assert mine.equals(Run(Prints))
    assert mine.trainer.callback_metrics["twice"] == 2.0
    assert len(GRAPHS) < 8  # what was logged before the break is not what the rest is compiled for
    told = [record.message for record in caplog.records if "compiled in parts" in record.message]
    assert len(told) == 1
    assert "print" in told[0]


def test_y2_batches_of_sizes_that_nobody_announces_take_one_more_graph() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield from ((torch.ones(n, 8), torch.ones(n, 1)) for n in (8, 8, 5, 7, 6))

    trainer(compile={"backend": counted}).fit(Small(), DataLoader(Stream(), batch_size=None))
    assert len(GRAPHS) == 2


# --------------------------------------------------------------------------------------------- Y3


def test_y3_checkpoints_of_a_compiled_run_are_those_of_any_run_and_go_on_exactly(tmp_path: Path) -> None:
    callbacks = lambda: [L.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")]  # noqa: E731
    whole = Run(compile={"backend": counted}, callbacks=callbacks(), enable_checkpointing=True, max_epochs=3)
    state = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"]
    assert list(state) == list(Net().state_dict())
    for compile in ({"backend": counted}, False):  # a run that goes on, compiled or not
        losses, module = Losses(), Net()
        fit = trainer(compile=compile, callbacks=[losses, *callbacks()], enable_checkpointing=True, max_epochs=3)
        fit.fit(module, loader(shuffle=True), loader(21), ckpt_path=tmp_path / "epoch=1.ckpt")
        assert len(losses.seen) == 5
        assert all(torch.equal(a, b) for a, b in zip(losses.seen, whole.losses[10:], strict=True))
        assert all(
            torch.equal(a, b)
            for a, b in zip(module.state_dict().values(), whole.module.state_dict().values(), strict=True)
        )
    Net().load_state_dict(state)
    torch.compile(Net(), backend="eager").load_state_dict({f"_orig_mod.{name}": value for name, value in state.items()})


def test_y3_a_module_given_compiled_runs_with_its_own_compiler_and_only_then(tmp_path: Path) -> None:
    module = Net()
    compiled = torch.compile(module, backend=counted, dynamic=True)
    run = trainer(tmp_path)
    run.fit(compiled, loader(), loader(21))
    assert len(GRAPHS) == 2
    assert run.lightning_module is module
    GRAPHS.clear()
    run.validate(dataloaders=loader(), verbose=False)
    assert len(GRAPHS) == 1  # it is the last one, as it was given
    GRAPHS.clear()
    run.validate(module, loader(), verbose=False)
    assert not GRAPHS
    run.save_checkpoint(tmp_path / "last.ckpt")
    assert list(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]) == list(module.state_dict())


def test_y3_a_step_that_the_user_has_compiled_is_not_compiled_twice() -> None:
    class Mine(Silent):
        @torch.compile(backend=counted)  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
            self.log("loss", loss, on_epoch=True)
            return loss

    class Plain(Silent):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return Mine.training_step._torchdynamo_orig_callable(self, batch, batch_idx)  # type: ignore[attr-defined, no-any-return]

    plain = Run(Plain)
    for compile in (False, {"backend": broken}):
        torch._dynamo.reset()
        GRAPHS.clear()
        assert Run(Mine, compile).equals(plain)
        assert 0 < len(GRAPHS) <= 2  # the second for the short batch: nobody could say beforehand


# --------------------------------------------------------------------------------------------- Y4


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_y4_every_strategy_gives_what_it_gives_uncompiled(strategy: str) -> None:
    assert Run(compile={"backend": counted}, strategy=strategy).equals(Run(strategy=strategy))
    assert len(GRAPHS) == 2


# --------------------------------------------------------------------------------------------- what cannot be compiled


class Prints(Silent):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        print("no graph")
        return loss


@pytest.mark.parametrize(
    ("module", "compile", "reason"),
    [
        (Net, {"backend": broken}, "RuntimeError: there is no compiler here"),
        (Manual, {"backend": broken}, "RuntimeError: there is no compiler here"),
        (Prints, {"backend": "eager", "fullgraph": True}, "`print`.*in training_step"),
    ],
)
def test_y2_what_cannot_be_compiled_runs_uncompiled_with_its_reason_once(
    module: Any, compile: dict[str, Any], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(LeydenWarning, match=f"could not be compiled.*{reason}") as warned:
        mine = Run(module, compile)
    assert len(warned) == 1
    assert mine.equals(Run(module))
    assert "Traceback" not in capfd.readouterr().err


def test_y2_a_failure_in_the_middle_of_a_run_loses_nothing() -> None:
    def late(graph: Any, example: Any) -> Any:
        GRAPHS.append(graph)
        if len(GRAPHS) > 2:
            raise RuntimeError("two is enough")
        return graph.forward

    class Picks(Silent):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * [1.0, 2.0, 3.0, 4.0, 5.0][batch_idx]

    with pytest.warns(LeydenWarning, match="training_step could not be compiled.*two is enough"):
        mine = Run(Picks, {"backend": late})
    assert len(GRAPHS) == 3
    assert mine.equals(Run(Picks))


def test_y2_errors_of_the_step_are_those_of_an_uncompiled_one() -> None:
    class Wrong(Silent):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("inputs", batch[0])
            return super().training_step(batch, batch_idx)

    class Shapes(Silent):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (self.net(batch[0]) @ batch[1]).mean()  # type: ignore[no-any-return]

    class Nowhere(Silent):
        def predict_step(self, batch: Any, batch_idx: int) -> None:
            self.log("x", 1.0)

    with pytest.raises(ValueError, match=r"self.log\('inputs', ...\) got a tensor of shape \(8, 8\)"):
        Run(Wrong, {"backend": "eager"})
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        Run(Shapes, {"backend": "eager"})
    with pytest.raises(MisconfigurationException, match="predict has no logging"):
        trainer(compile={"backend": "eager"}).predict(Nowhere(), loader())


def test_y2_a_step_that_draws_its_batches_is_not_compiled_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    class Draws(Silent):
        def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
            return super().training_step(next(dataloader_iter)[0], 0)

    caplog.set_level(logging.INFO, "leyden")
    trainer(compile={"backend": counted}).fit(Draws(), loader())
    assert not GRAPHS
    assert caplog.text.count("draws its batches itself, so it is not compiled") == 1


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (1, "True, False or a dict"),
        ({"mod": "default"}, "Did you mean 'mode'"),
        ({"mode": "fast"}, "Unrecognized mode=fast"),
        ({"backend": "nothing"}, "Invalid backend"),
    ],
)
def test_y1_arguments_that_torch_compile_does_not_take(given: Any, text: str) -> None:
    with pytest.raises(MisconfigurationException, match=text):
        trainer(compile=given).fit(Silent(), loader())


# --------------------------------------------------------------------------------------------- nothing outlives the run


def test_y3_nothing_outlives_the_run_and_copies_are_uncompiled() -> None:
    copies: list[Any] = []

    class Copy(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            copies.append(copy.deepcopy(module))
            copies.append(pickle.loads(pickle.dumps(module)))

    settings, listeners = (
        torch._dynamo.config.suppress_errors,
        list(torch._dynamo.callback.callback_handler.end_callbacks),
    )
    filters = list(logging.getLogger("torch._dynamo.convert_frame").filters)
    run = Run(Silent, {"backend": counted}, callbacks=[Copy()], max_epochs=1)
    assert GRAPHS
    plain = Run(Silent, callbacks=[Copy()], max_epochs=1)
    for each in (run.module, *copies):
        assert vars(each).keys() == vars(plain.module).keys()
    assert all("log" not in vars(store) for store in (run.trainer.results.train, run.trainer.results.eval))
    assert torch._dynamo.config.suppress_errors is settings
    assert list(torch._dynamo.callback.callback_handler.end_callbacks) == listeners
    assert logging.getLogger("torch._dynamo.convert_frame").filters == filters
    GRAPHS.clear()
    copies.clear()
    gone = weakref.ref(run.module), weakref.ref(run.trainer)
    del run, each
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_y3_a_step_put_on_the_instance_is_there_again_after_the_run() -> None:
    module = Silent()

    def step(batch: Any, batch_idx: int) -> Tensor:
        module.log("mine", 1.0)
        return module.net(batch[0]).mean()  # type: ignore[no-any-return]

    module.training_step = step  # type: ignore[method-assign]
    fit = trainer(compile={"backend": counted}, max_epochs=1)
    fit.fit(module, loader())
    assert module.training_step is step
    assert fit.callback_metrics["mine"] == 1.0
    assert len(GRAPHS) == 1
