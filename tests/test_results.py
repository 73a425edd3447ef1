# SPDX-License-Identifier: Apache-2.0
"""What ``self.log`` keeps: where it may be called, under which names, how it is reduced, and how long it lasts."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.errors import MisconfigurationException, PossibleUserWarning
from leyden.hooks import HOOKS

STEP_HOOKS = (
    "on_train_batch_start", "training_step", "on_before_zero_grad", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step", "optimizer_step", "optimizer_zero_grad", "backward", "configure_gradient_clipping",
    "on_train_batch_end",
)  # fmt: skip
EVAL_STEP_HOOKS = ("validation_step", "on_validation_batch_start", "on_validation_batch_end")
EPOCH_HOOKS = (
    "on_train_start", "on_train_epoch_start", "on_train_epoch_end", "on_validation_start",
    "on_validation_epoch_start", "on_validation_epoch_end",
)  # fmt: skip
FORBIDDEN = (
    "on_fit_start", "on_fit_end", "on_train_end", "on_validation_end", "setup", "teardown", "configure_optimizers",
    "configure_model", "prepare_data", "train_dataloader", "lr_scheduler_step", "on_save_checkpoint",
)  # fmt: skip


class Net(L.LightningModule):
    """Calls ``do(module, batch_idx)`` in the hook ``where``, besides what the hook does anyway."""

    def __init__(self, do: Callable[..., Any] | None = None, where: str = "training_step") -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.do, self.where = do, where
        if where not in ("training_step", "validation_step"):
            setattr(self, where, self.wrap(where))

    def wrap(self, where: str) -> Callable[..., Any]:
        """Return the hook ``where`` with a call of ``do`` ahead of it."""
        usual = getattr(super(), where)

        def hook(*args: Any, **kwargs: Any) -> Any:
            self.do(self, next((a for a in args if isinstance(a, int)), 0))
            return usual(*args, **kwargs)

        return hook

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.do is not None and self.where == "training_step":
            self.do(self, batch_idx)
        return self.layer(batch[0] if isinstance(batch, (list, tuple)) else batch).square().mean()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if self.do is not None and self.where == "validation_step":
            self.do(self, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    def train_dataloader(self) -> Any:
        return loader(8, 2)

    def val_dataloader(self) -> Any:
        return loader(6, 2)


def loader(samples: int, batch_size: int) -> DataLoader[Any]:
    """Return a loader of ``samples`` zeros and ones."""
    return DataLoader(TensorDataset(torch.arange(2 * samples).reshape(samples, 2) % 2 * 1.0), batch_size=batch_size)


def stream(batches: list[Any]) -> DataLoader[Any]:
    """Return a loader of these batches, as they are."""
    return DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)  # type: ignore[arg-type]


def trainer(**settings: Any) -> L.Trainer:
    """Return a quiet Trainer of one epoch."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(**{"max_epochs": 1, "accelerator": "cpu", "log_every_n_steps": 1, **quiet, **settings})


def fit(do: Callable[..., Any] | None, where: str = "training_step", **settings: Any) -> L.Trainer:
    """Fit a ``Net``; return the Trainer."""
    made = trainer(**settings)
    made.fit(Net(do, where))
    return made


def values(metrics: Any) -> dict[str, float]:
    """Return metrics as floats."""
    return {name: float(value) for name, value in metrics.items()}


def rows(made: L.Trainer, name: str) -> list[tuple[int, float]]:
    """Return ``(step, value)`` of all rows that hold ``name``."""
    return [(row["step"], row[name]) for row in made.history if name in row]


# ------------------------------------------------------------------ where, and with which defaults


@pytest.mark.parametrize("where", STEP_HOOKS)
def test_training_hooks_log_the_step_by_default(where: str) -> None:
    made = fit(lambda net, _: net.log("a", float(net.global_step)), where)
    assert len(rows(made, "a")) == 4
    assert "a_epoch" not in made.callback_metrics


@pytest.mark.parametrize("where", STEP_HOOKS)
def test_training_hooks_may_log_both(where: str) -> None:
    made = fit(lambda net, _: net.log("a", 2.0, on_epoch=True), where)
    assert {"a", "a_step", "a_epoch"} <= made.callback_metrics.keys()
    assert len(rows(made, "a_step")) == 4
    assert [value for _, value in rows(made, "a_epoch")] == [2.0]


@pytest.mark.parametrize("where", EVAL_STEP_HOOKS)
def test_evaluation_hooks_log_the_epoch_by_default(where: str) -> None:
    made = fit(lambda net, i: net.log("a", float(i)), where, num_sanity_val_steps=0)
    assert [value for _, value in rows(made, "a")] == [1.0]
    assert float(made.callback_metrics["a"]) == 1.0


@pytest.mark.parametrize("where", EPOCH_HOOKS)
def test_epoch_hooks_log_the_epoch_only(where: str) -> None:
    made = fit(lambda net, _: net.log("a", 3.0), where, num_sanity_val_steps=0)
    assert [value for _, value in rows(made, "a")] == [3.0]
    with pytest.raises(MisconfigurationException, match="on_step=True.*belongs to no step"):
        fit(lambda net, _: net.log("a", 3.0, on_step=True), where, num_sanity_val_steps=0)


@pytest.mark.parametrize("where", FORBIDDEN)
def test_other_hooks_cannot_log(where: str, tmp_path: Any) -> None:
    made = trainer(default_root_dir=tmp_path, enable_checkpointing=True)
    with pytest.raises(MisconfigurationException, match=r"self\.log\('a', \.\.\.\) is not possible"):
        made.fit(Net(lambda net, _: net.log("a", 1.0), where))


@pytest.mark.parametrize("where", ["on_predict_start", "on_predict_batch_start", "predict_step"])
def test_predict_cannot_log(where: str) -> None:
    net = Net()
    net.predict_step = lambda *args: None  # type: ignore[method-assign]
    vars(net)[where] = lambda *args, **kwargs: net.log("a", 1.0)
    with pytest.raises(MisconfigurationException, match="predict has no logging"):
        trainer().predict(net, loader(2, 1))


def test_the_table_of_hooks_says_the_same_as_these_tests() -> None:
    may = {hook.name for hook in HOOKS if hook.logging is not None and "test" not in hook.name}
    assert may == {"clip_gradients", *STEP_HOOKS, *EVAL_STEP_HOOKS, *EPOCH_HOOKS, "training_step"}
    assert not may & set(FORBIDDEN)


def test_outside_a_run_the_value_is_dropped_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="without a Trainer"):
        Net().log("a", 1.0)


def test_barebones_drops_the_value_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="barebones=True"):
        L.Trainer(barebones=True, max_epochs=1, accelerator="cpu").fit(Net(lambda net, _: net.log("a", 1.0)))


# ------------------------------------------------------------------ names


def test_names_in_each_view() -> None:
    def do(net: Net, i: int) -> None:
        net.log("plain", 1.0)
        net.log("both", 2.0, on_step=True, on_epoch=True)
        net.log("epoch", 3.0, on_step=False, on_epoch=True, prog_bar=True)
        net.log("bar", 4.0, prog_bar=True, on_epoch=True)
        net.log("silent", 5.0, logger=False)

    made = fit(do, limit_val_batches=0)
    everything = {"plain", "both", "both_step", "both_epoch", "epoch", "bar", "bar_step", "bar_epoch", "silent"}
    assert made.callback_metrics.keys() == everything
    assert made.logged_metrics.keys() == everything - {"both", "bar", "silent"}
    assert values(made.progress_bar_metrics) == {"bar_step": 4.0, "bar_epoch": 4.0, "epoch": 3.0}
    logged = {name for row in made.history for name in row}
    assert logged == {"plain", "both_step", "both_epoch", "epoch", "bar_step", "bar_epoch", "step"} | {"epoch"}


def test_several_evaluation_loaders_get_a_suffix() -> None:
    def validation_step(batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        net.log("a", float(dataloader_idx))
        net.log("b", float(dataloader_idx), on_step=True, on_epoch=True)
        net.log(f"own_{dataloader_idx}", float(dataloader_idx), add_dataloader_idx=False)

    net = Net()
    net.validation_step = validation_step  # type: ignore[method-assign]
    made = trainer()
    first, second = made.validate(net, [loader(4, 2), loader(4, 2)], verbose=False)
    assert first == {"a/dataloader_idx_0": 0.0, "b_epoch/dataloader_idx_0": 0.0, "own_0": 0.0}
    assert second == {"a/dataloader_idx_1": 1.0, "b_epoch/dataloader_idx_1": 1.0, "own_1": 1.0}
    assert {"a/dataloader_idx_0", "b/dataloader_idx_1", "b_epoch/dataloader_idx_1"} <= made.callback_metrics.keys()
    assert "b_step/dataloader_idx_0" not in made.callback_metrics
    assert [value for _, value in rows(made, "b_step/dataloader_idx_1")] == [1.0, 1.0]


def test_one_name_for_two_loaders_is_an_error() -> None:
    net = Net(lambda net, _: net.log("a", 1.0, add_dataloader_idx=False), "validation_step")
    with pytest.raises(MisconfigurationException, match="loaders 0 and 1"):
        trainer().validate(net, [loader(4, 2), loader(4, 2)], verbose=False)


def test_the_same_name_in_two_hooks() -> None:
    class Both(Net):
        def on_train_epoch_end(self) -> None:
            self.log("a", 9.0)

    made = trainer(limit_val_batches=0)
    made.fit(Both(lambda net, i: net.log("a", float(i), on_step=False, on_epoch=True)))
    assert rows(made, "a") == [(3, 9.0)]
    assert float(made.callback_metrics["a"]) == 9.0


def test_a_name_of_training_and_validation_ends_with_that_of_validation() -> None:
    class Both(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("a", 7.0)

    made = trainer(log_every_n_steps=50)
    made.fit(Both(lambda net, i: net.log("a", float(i))))
    assert float(made.callback_metrics["a"]) == 7.0


@pytest.mark.parametrize(
    ("first", "second"),
    [({}, {"prog_bar": True}), ({"on_epoch": True}, {}), ({"reduce_fx": "max"}, {}), ({"logger": False}, {})],
)
def test_twice_in_one_hook_with_other_arguments_is_an_error(first: Any, second: Any) -> None:
    def do(net: Net, i: int) -> None:
        net.log("a", 1.0, **first)
        net.log("a", 2.0, **second)

    with pytest.raises(MisconfigurationException, match="called twice in `training_step` with different arguments"):
        fit(do)


def test_twice_in_one_hook_with_the_same_arguments_keeps_the_last_step_and_reduces_all() -> None:
    def do(net: Net, i: int) -> None:
        net.log("a", 1.0, on_epoch=True)
        net.log("a", 2.0, on_epoch=True)

    made = fit(do)
    assert rows(made, "a_step")[0] == (0, 2.0)
    assert float(made.callback_metrics["a_epoch"]) == 1.5


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        ({"name": 5}, TypeError, "the name must be a str, not int"),
        (
            {"name": "a/dataloader_idx_0"},
            MisconfigurationException,
            "should not contain information about `dataloader_idx`",
        ),
        ({"reduce_fx": "maen"}, MisconfigurationException, "did you mean 'mean'"),
        ({"reduce_fx": torch.median}, MisconfigurationException, "allowed are 'mean', 'sum', 'min', 'max'"),
        ({"on_step": False, "on_epoch": False}, MisconfigurationException, "would log nothing"),
        ({"value": "x"}, ValueError, "the value is a str; it must be a number"),
        ({"value": None}, ValueError, "the value is a NoneType"),
        ({"value": {"b": 1}}, ValueError, "log its entries with self.log_dict"),
        ({"value": torch.ones(2)}, ValueError, r"shape \(2,\).*value.mean\(\)"),
        ({"value": torch.ones(0)}, ValueError, r"shape \(0,\)"),
    ],
)
def test_bad_arguments_say_what_is_wrong(call: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=f"(?i){match}"):
        fit(lambda net, _: net.log(**{"name": "a", "value": 1.0, **call}))


# ------------------------------------------------------------------ values


@pytest.mark.parametrize(
    "value",
    [
        3, 3.0, True, torch.tensor(3), torch.tensor(3.0), torch.tensor([3.0]), torch.tensor([[3]]),
        torch.tensor(3.0).half(), torch.tensor(3.0).bfloat16(), torch.tensor(3.0).double(), torch.tensor(True),
        torch.tensor(3.0, requires_grad=True),
    ],
)  # fmt: skip
def test_numbers_and_tensors_of_all_kinds(value: Any) -> None:
    expected = float(torch.as_tensor(value).detach())
    made = fit(lambda net, _: net.log("a", value, on_epoch=True))
    for name in ("a", "a_step", "a_epoch"):
        kept = made.callback_metrics[name]
        assert kept.ndim == 0
        assert not kept.requires_grad
        assert kept.dtype == (torch.float64 if getattr(value, "dtype", None) is torch.float64 else torch.float32)
        assert float(kept) == expected
    assert type(rows(made, "a_step")[0][1]) is float


def test_numpy_scalars() -> None:
    numpy = pytest.importorskip("numpy")
    made = fit(lambda net, i: net.log_dict({"a": numpy.float32(i), "b": numpy.int64(i), "c": numpy.float64(i)}))
    assert {name: value for name, value in made.history[-1].items() if name in "abc"} == {"a": 3.0, "b": 3.0, "c": 3.0}


def test_half_values_are_summed_in_single_precision() -> None:
    made = trainer()
    made.fit(Net(lambda net, _: net.log("a", torch.tensor(0.1).half(), on_epoch=True)), loader(4000, 1))
    assert float(made.callback_metrics["a_epoch"]) == pytest.approx(float(torch.tensor(0.1).half()), rel=1e-5)


def test_64_true_keeps_all_digits_of_numbers() -> None:
    made = fit(lambda net, _: net.log_dict({"a": 0.1, "b": 2**40 + 1}), precision="64-true")
    assert made.callback_metrics["a"].dtype is torch.float64
    assert rows(made, "a")[0][1] == 0.1
    assert rows(made, "b")[0][1] == 2**40 + 1


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor(0.1), 0.1),
        (torch.tensor(0.1, requires_grad=True) * 3, 0.3),
        (torch.tensor(1 + 2j).conj().imag, -2.0),  # a view that is to be read with its sign turned
        (torch._efficientzerotensor(()), 0.0),  # has no memory, and forward-mode gradients make them
        (torch.tensor(1.5).as_subclass(nn.Parameter), 1.5),
        (torch.tensor([[2.5]]), 2.5),
        (torch.tensor(0.1, dtype=torch.float64), 0.1),
        (torch.tensor(0.25, dtype=torch.float16), 0.25),
        (torch.tensor(3), 3.0),
        (torch.tensor(math.inf), math.inf),
    ],
)
def test_every_kind_of_tensor_in_host_memory_is_read_right(value: Tensor, expected: float) -> None:
    run = fit(lambda module, _: module.log("x", value), limit_train_batches=1)
    logged = run.callback_metrics["x"]
    assert logged.item() == pytest.approx(expected)
    assert logged.dtype == (torch.float64 if value.dtype is torch.float64 else torch.float32)
    assert run.history[-1]["x"] == pytest.approx(expected)


def test_a_value_inside_a_transform_of_functions_is_no_memory_to_be_read() -> None:
    def do(module: Net, _: int) -> None:
        def inner(x: Tensor) -> Tensor:
            module.log("x", x.sum())
            return x.sum()

        torch.func.grad(inner)(torch.ones(3))

    assert fit(do, limit_train_batches=1).callback_metrics["x"].item() == 3.0


def test_a_single_number_stays_one_where_double_is_the_default() -> None:
    def do(net: Net, _: int) -> None:
        net.log_dict({"single": torch.tensor(0.1, dtype=torch.float32), "number": 0.1})

    logged = fit(do, precision="64-true", limit_train_batches=1).callback_metrics
    assert logged["single"].dtype is torch.float32
    assert logged["number"].dtype is torch.float64


@pytest.mark.parametrize("value", [torch.tensor(0.1), 0.1, 3], ids=["tensor", "float", "int"])
def test_a_default_device_takes_no_number_away_from_the_host(value: Any) -> None:
    def do(net: Net, _: int) -> None:
        with torch.device("meta"):
            net.log("step", value)
            net.log("both", value, on_epoch=True)
            torch.set_default_device("meta")  # what reads the numbers runs later
            assert float(net.trainer.callback_metrics["step"]) == pytest.approx(float(value))
            torch.set_default_device(None)

    logged = fit(do, limit_train_batches=1).callback_metrics
    assert {name: number.device.type for name, number in logged.items()} == dict.fromkeys(logged, "cpu")
    assert float(logged["both_epoch"]) == pytest.approx(float(value))


def test_what_the_user_compiles_himself_may_log_and_stays_one_graph() -> None:
    class Helped(Net):
        def __init__(self) -> None:
            super().__init__()
            self.whole = torch.compile(self.helper, backend="eager", fullgraph=True)

        def helper(self, batch: Any) -> Tensor:
            loss = self.layer(batch[0]).square().mean()
            self.log("loss", loss)
            return loss

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.whole(batch)

    made = trainer()
    made.fit(Helped())
    assert len(rows(made, "loss")) == 4
    assert math.isfinite(made.callback_metrics["loss"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_writing_into_the_tensor_afterwards_changes_nothing(dtype: torch.dtype) -> None:
    def do(net: Net, i: int) -> None:
        value = torch.tensor(float(i), dtype=dtype)
        net.log("a", value, on_epoch=True)
        net.log("b", value)
        value.fill_(100.0)

    made = fit(do)
    assert [value for _, value in rows(made, "a_step")] == [0.0, 1.0, 2.0, 3.0]
    assert [value for _, value in rows(made, "b")] == [0.0, 1.0, 2.0, 3.0]
    assert float(made.callback_metrics["a_epoch"]) == 1.5


def test_enable_graph_keeps_the_graph() -> None:
    seen = []

    def do(net: Net, i: int) -> None:
        net.log("a", net.layer.weight.sum(), enable_graph=True)
        seen.append(net.trainer.callback_metrics["a"].requires_grad)

    fit(do)
    assert seen == [True] * 4


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_arrive(value: float) -> None:
    made = fit(lambda net, i: net.log("a", torch.tensor(value if i == 1 else 1.0), on_epoch=True))
    assert str(rows(made, "a_step")[1][1]) == str(value)
    assert str(float(made.callback_metrics["a_epoch"])) == str(value)


@pytest.mark.parametrize("how", ["mean", "sum", "min", "max"])
def test_nan_is_not_lost_in_a_reduction(how: str) -> None:
    made = fit(lambda net, i: net.log("a", math.nan if i == 1 else float(i), on_epoch=True, reduce_fx=how))
    assert math.isnan(made.callback_metrics["a_epoch"])


@pytest.mark.parametrize(
    ("how", "expected"),
    [("mean", 1.5), ("avg", 1.5), ("MEAN", 1.5), (torch.mean, 1.5), ("sum", 6.0), (sum, 6.0), (torch.sum, 6.0)]
    + [("min", 0.0), (min, 0.0), (torch.min, 0.0), ("max", 3.0), (max, 3.0), (torch.max, 3.0)],
)
@pytest.mark.parametrize("number", [float, torch.tensor, int])
def test_reductions(how: Any, expected: float, number: Any) -> None:
    made = fit(lambda net, i: net.log("a", number(i), on_epoch=True, reduce_fx=how))
    assert float(made.callback_metrics["a_epoch"]) == expected
    assert rows(made, "a_step")[3] == (3, 3.0)


# ------------------------------------------------------------------ weights


def test_the_mean_is_weighted_by_the_size_of_the_batch() -> None:
    made = trainer()
    made.fit(Net(lambda net, i: net.log("a", float(i), on_epoch=True)), loader(5, 4))
    assert float(made.callback_metrics["a_epoch"]) == pytest.approx(1 / 5)


def test_batch_size_of_the_user_comes_first() -> None:
    made = fit(lambda net, i: net.log("a", float(i), on_epoch=True, batch_size=i + 1))
    assert float(made.callback_metrics["a_epoch"]) == pytest.approx((0 * 1 + 1 * 2 + 2 * 3 + 3 * 4) / 10)


class Graph:
    """A batch that knows its size, like those of graph libraries."""

    def __init__(self, size: int) -> None:
        self.num_graphs, self.x = size, torch.ones(7, 2)

    def __getitem__(self, index: Any) -> Tensor:
        return self.x[index]


@pytest.mark.parametrize(
    "make",
    [
        lambda n: torch.ones(n, 2),
        lambda n: [torch.ones(n, 2), torch.ones(n)],
        lambda n: (torch.ones(n, 2), {"deep": [torch.ones(n, 5)]}),
        Graph,
    ],
)
def test_sizes_are_read_off_nested_batches(make: Callable[[int], Any]) -> None:
    class Reader(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("a", float(batch_idx), on_epoch=True)
            return self.layer(torch.ones(1, 2)).sum()

    made = trainer(limit_val_batches=0)
    made.fit(Reader(), stream([make(3), make(1)]))
    assert float(made.callback_metrics["a_epoch"]) == 0.25


def test_M4_sizes_that_disagree_are_a_warning_once() -> None:
    class Reader(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("a", float(batch_idx), on_epoch=True)
            return self.layer(torch.ones(1, 2)).sum()

    made = trainer(limit_val_batches=0)
    with pytest.warns(PossibleUserWarning, match=r"'a_epoch'|'a'.*a guess: 3") as caught:
        made.fit(Reader(), stream([(torch.ones(3, 2), torch.ones(4)), (torch.ones(1, 2), torch.ones(4))]))
    assert len(caught) == 1
    assert float(made.callback_metrics["a_epoch"]) == 0.25


def test_M4_a_batch_without_size_is_an_error_only_where_a_weight_is_needed() -> None:
    class Reader(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("a", 1.0, **batch)
            return self.layer(torch.ones(1, 2)).sum()

    for fine in ({}, {"on_epoch": True, "reduce_fx": "max"}, {"on_epoch": True, "batch_size": 2}):
        trainer(limit_val_batches=0, limit_train_batches=1).fit(Reader(), stream([fine]))
    with pytest.raises(MisconfigurationException, match=r"self\.log\('a', \.\.\.\).*batch_size=n"):
        trainer(limit_val_batches=0).fit(Reader(), stream([{"on_epoch": True}]))


def test_epoch_hooks_weigh_each_call_alike() -> None:
    def do(net: Net, i: int) -> None:
        net.log("a", 1.0)
        net.log("a", 4.0)

    assert float(fit(do, "on_train_epoch_end").callback_metrics["a"]) == 2.5


numbers = st.floats(-1e3, 1e3, allow_nan=False, width=32)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(numbers, st.integers(1, 9)), min_size=1, max_size=12), st.booleans())
def test_M1_the_epoch_mean_is_the_mean_over_all_samples(batches: list[tuple[float, int]], tensors: bool) -> None:
    class Reader(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            value = batches[batch_idx][0]
            self.log("a", torch.tensor(value) if tensors else value, on_step=False, on_epoch=True)
            return self.layer(batch).sum()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            value = batches[batch_idx][0]
            self.log("b", torch.tensor(value, dtype=torch.float64) if tensors else value)

    data = stream([torch.ones(count, 2) for _, count in batches])
    made = trainer()
    made.fit(Reader(), data, data)
    exact = math.fsum(value * count for value, count in batches) / sum(count for _, count in batches)
    scale = max(abs(value) for value, _ in batches)
    assert float(made.callback_metrics["a"]) == pytest.approx(exact, abs=1e-6 * max(scale, 1e-6))
    assert float(made.callback_metrics["b"]) == pytest.approx(exact, abs=1e-6 * max(scale, 1e-6))


# ------------------------------------------------------------------ metric objects


class HomeMade:
    """A metric object that owes nothing to torchmetrics."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.resets = 0

    def update(self, value: float) -> None:
        self.seen.append(value)

    def compute(self) -> float:
        return max(self.seen)

    def reset(self) -> None:
        self.seen, self.resets = [], self.resets + 1


def test_a_home_made_metric_is_computed_and_reset_by_the_trainer() -> None:
    metric = HomeMade()

    def do(net: Net, i: int) -> None:
        metric.update(float(i - 10 * net.current_epoch))
        net.log("a", metric, on_step=True, on_epoch=True)

    made = fit(do, max_epochs=2)
    assert rows(made, "a_epoch") == [(3, 3.0), (7, -7.0)]
    assert [value for _, value in rows(made, "a_step")] == [0, 1, 2, 3, -10, -9, -8, -7]
    assert metric.resets >= 2
    assert metric.seen == []


def test_torchmetrics_are_recognised_without_an_import() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")

    class Measured(Net):
        def __init__(self) -> None:
            super().__init__()
            self.mean = torchmetrics.MeanMetric()
            self.several = torchmetrics.MetricCollection(
                {"least": torchmetrics.MinMetric(), "most": torchmetrics.MaxMetric()}
            )

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            value = float(batch_idx + 10 * self.current_epoch)
            self.mean(value)
            self.log("mean", self.mean, on_step=True, on_epoch=True)
            self.several.update(value)
            self.log_dict(self.several, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    made = trainer(max_epochs=2, limit_val_batches=0)
    made.fit(Measured())
    assert rows(made, "mean_epoch") == [(3, 1.5), (7, 11.5)]
    assert [value for _, value in rows(made, "mean_step")] == [0, 1, 2, 3, 10, 11, 12, 13]
    assert rows(made, "least") == [(3, 0.0), (7, 10.0)]
    assert rows(made, "most") == [(3, 3.0), (7, 13.0)]


def test_metrics_of_a_child_module() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")

    class Child(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.metric = torchmetrics.SumMetric()

        def forward(self) -> None:
            self.metric(1.0)
            self.log("child", self.metric, on_step=False, on_epoch=True)
            self.log("by_hand", 2.0)

    class Parent(Net):
        def __init__(self) -> None:
            super().__init__()
            self.child = Child()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.child()
            return super().training_step(batch, batch_idx)

    made = trainer(max_epochs=2)
    made.fit(Parent())
    assert [value for _, value in rows(made, "child")] == [4.0, 4.0]
    assert len(rows(made, "by_hand")) == 8


def test_a_metric_that_gives_several_numbers_is_an_error() -> None:
    class Several(HomeMade):
        def compute(self) -> Any:
            return {"a": 1}

    with pytest.raises(ValueError, match="log_dict"):
        fit(lambda net, i: net.log("a", Several(), on_epoch=True))


def test_a_metric_in_validation_is_not_touched_by_the_sanity_check() -> None:
    metric = HomeMade()

    def do(net: Net, i: int) -> None:
        metric.update(100.0 if net.trainer.sanity_checking else float(i))
        net.log("a", metric)

    assert rows(fit(do, "validation_step"), "a") == [(3, 2.0)]


def test_the_trainer_does_not_keep_a_metric_of_an_earlier_fit() -> None:
    metric = HomeMade()
    reference = weakref.ref(metric)

    def do(net: Net, i: int) -> None:
        net.metric.update(1.0)
        net.log("a", net.metric, on_epoch=True)

    net = Net(do)
    net.metric = metric
    made = trainer()
    made.fit(net)
    del metric, net
    made.fit(Net())
    gc.collect()
    assert reference() is None


# ------------------------------------------------------------------ rows


def test_a_step_of_the_user_is_the_step_of_the_row() -> None:
    made = fit(lambda net, i: net.log_dict({"a": 1.0, "step": 100.0 + i}))
    assert rows(made, "a") == [(100, 1.0), (101, 1.0), (102, 1.0), (103, 1.0)]
    assert all("epoch" not in row for row in made.history if "a" in row)


def test_every_other_row_says_its_epoch() -> None:
    made = fit(lambda net, i: net.log("a", 1.0), max_epochs=2)
    assert [row["epoch"] for row in made.history if "a" in row] == [0] * 4 + [1] * 4


@pytest.mark.parametrize(("every", "steps"), [(1, [0, 1, 2, 3, 4, 5, 6, 7]), (3, [2, 5]), (50, [])])
def test_log_every_n_steps(every: int, steps: list[int]) -> None:
    made = fit(lambda net, i: net.log("a", 1.0), max_epochs=2, log_every_n_steps=every)
    assert [step for step, _ in rows(made, "a")] == steps


def test_log_every_0_steps_still_writes_epochs() -> None:
    made = fit(lambda net, i: net.log("a", 1.0, on_epoch=True), max_epochs=2, log_every_n_steps=0)
    assert rows(made, "a_step") == []
    assert rows(made, "a_epoch") == [(3, 1.0), (7, 1.0)]
    assert float(made.callback_metrics["a_step"]) == 1.0


def test_rows_count_updates_under_accumulation() -> None:
    made = fit(lambda net, i: net.log("a", float(i)), max_epochs=2, accumulate_grad_batches=2)
    assert rows(made, "a") == [(0, 1.0), (1, 3.0), (2, 1.0), (3, 3.0)]


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_G4_the_logged_loss_does_not_depend_on_accumulation(accumulate: int) -> None:
    class Still(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx) * 0 + float(batch_idx)
            self.log("loss", loss, on_step=True, on_epoch=True)
            return loss

    made = trainer(accumulate_grad_batches=accumulate)
    made.fit(Still())
    assert float(made.callback_metrics["loss_epoch"]) == 1.5
    assert [value for _, value in rows(made, "loss_step")] == [float(i) for i in range(accumulate - 1, 4, accumulate)]


# ------------------------------------------------------------------ callbacks


def test_callbacks_log_like_the_module() -> None:
    class Logs(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            self.log("from_callback", 1.0, on_epoch=True)

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            pl_module.log("through_the_module", 2.0)
            self.log_dict({"c": 3.0, "d": 4.0}, prog_bar=True)

        def on_validation_batch_end(self, *args: Any) -> None:
            self.log("val", 5.0)

    callback = Logs()
    made = fit(None, callbacks=[callback])
    assert {name: value for name, value in values(made.callback_metrics).items() if not name.endswith("_step")} == {
        "from_callback": 1.0, "from_callback_epoch": 1.0, "through_the_module": 2.0, "c": 3.0, "d": 4.0, "val": 5.0,
    }  # fmt: skip
    assert values(made.progress_bar_metrics) == {"c": 3.0, "d": 4.0}
    assert "log" not in vars(callback)


# ------------------------------------------------------------------ how long values last


def test_values_survive_between_epochs() -> None:
    seen = []

    class Reads(L.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(values(trainer.callback_metrics))

    def do(net: Net, i: int) -> None:
        if net.current_epoch == 0:
            net.log("a", 1.0, on_epoch=True)

    made = fit(do, max_epochs=3, callbacks=[Reads()])
    assert seen == [{}, {"a": 1.0, "a_step": 1.0, "a_epoch": 1.0}, {"a": 1.0, "a_step": 1.0, "a_epoch": 1.0}]
    assert len(rows(made, "a_epoch")) == 1


def test_values_of_a_run_last_until_the_next_begins() -> None:
    made = fit(lambda net, i: net.log("a", 1.0))
    assert "a" in made.callback_metrics
    made.validate(Net(lambda net, i: net.log("b", 2.0), "validation_step"), verbose=False)
    assert values(made.callback_metrics) == {"b": 2.0}
    assert values(made.logged_metrics) == {"b": 2.0}


def test_another_module_may_log_the_same_name_in_another_way() -> None:
    made = fit(lambda net, i: net.log("a", 1.0))
    made.fit(Net(lambda net, i: net.log("a", 2.0, on_step=False, on_epoch=True)))
    assert values(made.callback_metrics) == {"a": 2.0}


def test_the_sanity_check_leaves_nothing() -> None:
    seen = []

    class Reads(L.Callback):
        def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(("sanity", values(trainer.callback_metrics), values(trainer.logged_metrics)))

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(("train", values(trainer.callback_metrics), values(trainer.progress_bar_metrics)))

    made = fit(lambda net, i: net.log("a", 1.0, prog_bar=True), "validation_step", callbacks=[Reads()])
    assert seen[-1] == ("train", {}, {})
    assert rows(made, "a") == [(3, 1.0)]


def test_metrics_are_on_the_host_after_a_run() -> None:
    made = fit(lambda net, i: net.log("a", torch.tensor(1.0), on_epoch=True))
    assert {value.device.type for value in made.callback_metrics.values()} == {"cpu"}
