# SPDX-License-Identifier: Apache-2.0
"""dp: the batch is really split, and the numbers are those of one device."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch.utils.data import DataLoader

import leyden as L
from leyden.errors import MisconfigurationException
from leyden.strategies import DataParallelStrategy
from leyden.strategies.data_parallel import split, together
from ranks import Judged, Net, data, make_trainer

CPU = torch.device("cpu")


class Counted(Judged):
    """Also notes the size of each part, and logs in all the ways of reducing."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.parts.append(len(batch[0]))
        self.log("mean", batch[0].mean(), on_step=False, on_epoch=True)
        self.log("sum", float(len(batch[0])), on_step=False, on_epoch=True, reduce_fx="sum")
        self.log("max", batch[0].max(), on_step=False, on_epoch=True, reduce_fx="max")
        self.log("weighted", batch[0].sum(), on_step=False, on_epoch=True, batch_size=2 * len(batch[0]))
        return super().training_step(batch, batch_idx)


def _run(module: Any, strategy: Any, devices: Any = "auto", count: int = 43) -> L.Trainer:
    torch.manual_seed(0)
    trainer = make_trainer(devices, strategy=strategy, max_epochs=2)
    trainer.fit(module, DataLoader(data(count), 8, shuffle=True), DataLoader(data(11), 4))
    return trainer


def test_f1_dp_gives_the_losses_metrics_and_weights_of_one_device() -> None:
    single, double = Counted(), Counted()
    one, two = _run(single, "single", 1), _run(double, "dp", 2)
    assert (two.world_size, two.num_devices, two.global_step) == (1, 2, 12)
    assert single.parts[:7] == [8, 8, 8, 8, 8, 3, 8]
    assert double.parts[:13] == [4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 2, 1, 4]
    merged = [
        (a * m + b * n) / (m + n) for a, b, m, n in zip(*_pairs(double.losses), *_pairs(double.parts), strict=True)
    ]
    assert merged == pytest.approx(single.losses, abs=1e-5)
    assert set(one.callback_metrics) == set(two.callback_metrics)
    for name, value in one.callback_metrics.items():
        if name != "weighted":
            assert two.callback_metrics[name].item() == pytest.approx(value.item(), abs=1e-5), name
    for mine, theirs in zip(single.parameters(), double.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)
    assert [row.get("loss_step") for row in one.history] == pytest.approx(
        [row.get("loss_step") for row in two.history], abs=1e-5
    )


def _pairs(values: list[Any]) -> tuple[list[Any], list[Any]]:
    return values[::2], values[1::2]


def test_results_of_test_and_predict_are_those_of_one_device() -> None:
    loader = DataLoader(data(11), 4)
    module = Judged()
    single, double = make_trainer(1), make_trainer(2, strategy="dp")
    assert double.test(module, loader, verbose=False) == single.test(module, loader, verbose=False)
    mine, theirs = double.predict(module, loader), single.predict(module, loader)
    assert mine is not None
    assert theirs is not None
    assert [part.tolist() for part in mine] == [part.tolist() for part in theirs]


class Ends(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": self.loss(batch), "count": torch.tensor(float(len(batch[0]))), "ids": batch[2]}

    def training_step_end(self, parts: Any) -> Any:
        self.samples.append([*parts["count"].tolist(), len(parts["ids"])])
        loss = (parts["loss"] * parts["count"] / parts["count"].sum()).sum()
        self.losses.append(loss.item())
        return loss


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
def test_training_step_end_gets_an_entry_for_each_part_and_returns_the_loss() -> None:
    module, plain = Ends(), Net()
    _run(module, "dp", 2)
    _run(plain, "single", 1)
    assert module.samples[:2] == [[4, 4, 8], [4, 4, 8]]
    assert module.samples[5] == [2, 1, 3]
    assert module.losses == pytest.approx(plain.losses, abs=1e-5)


class Normed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(4)

    def loss(self, batch: Any) -> torch.Tensor:
        return super().loss((self.norm(batch[0]), *batch[1:]))


def test_buffers_keep_what_the_first_part_did_to_them() -> None:
    module = Normed()
    make_trainer(2, strategy="dp", max_steps=1).fit(module, DataLoader(data(8), 8))
    assert module.norm.num_batches_tracked == 1
    expected = 0.1 * data(8).tensors[0][:4].mean(0)
    assert torch.allclose(module.norm.running_mean, expected)  # type: ignore[arg-type]


class Pair(NamedTuple):
    x: torch.Tensor
    names: list[str]


def test_a_batch_is_split_along_its_samples() -> None:
    batch = {"pair": Pair(torch.arange(5), list("abcde")), "all": torch.zeros(3), "scale": 2.0}
    first, second = split(batch, [CPU, CPU])
    assert (first.size, second.size) == (3, 2)
    assert first.batch["pair"].x.tolist() == [0, 1, 2]
    assert second.batch["pair"].names == ["d", "e"]
    assert second.batch["all"].shape == (3,)
    assert isinstance(second.batch["pair"], Pair)
    assert [part.size for part in split(torch.zeros(3, 2), [CPU] * 4)] == [1, 1, 1]
    assert [part.size for part in split([torch.zeros(5), torch.zeros(5)], [CPU] * 4)] == [2, 2, 1]
    (whole,) = split("text", [CPU, CPU])
    assert whole.batch == "text"


def test_what_parts_return_is_put_together() -> None:
    def merged(*outputs: Any, stack: bool = False) -> Any:
        return together(outputs, [3.0, 1.0], CPU, stack)

    assert merged(None, None) is None
    assert merged(torch.tensor(4.0), None).item() == 4.0
    assert merged(torch.tensor(4.0), torch.tensor(8.0)).item() == 5.0
    assert merged(4, 8) == 5.0
    assert merged({"loss": torch.tensor(1.0), "num_items": 10}, {"loss": torch.tensor(4.0), "num_items": 20}) == {
        "loss": torch.tensor(3.0), "num_items": 30,
    }  # fmt: skip
    assert merged((torch.zeros(2), "a"), (torch.zeros(1), "a"))[0].shape == (3,)
    assert merged(["a", "b"], ["c"]) == ["a", "b", "c"]
    assert merged(torch.tensor(4), torch.tensor(8), stack=True).tolist() == [4, 8]


def test_what_cannot_be_is_an_error() -> None:
    with pytest.raises(MisconfigurationException, match="strategy='dp'.*num_nodes=2. Use strategy='ddp'"):
        make_trainer(2, strategy="dp", num_nodes=2)

    class Draws(Net):
        def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
            return self.loss(next(dataloader_iter)[0])

    with pytest.raises(MisconfigurationException, match="takes dataloader_iter, but strategy='dp' splits"):
        make_trainer(2, strategy="dp", max_epochs=1).fit(Draws(), DataLoader(data(8), 4))


def test_a_strategy_object_has_its_own_devices() -> None:
    trainer = make_trainer("auto", strategy=DataParallelStrategy([CPU, CPU, CPU]))
    assert (trainer.num_devices, trainer.world_size) == (3, 1)


class Copied(Counted):
    """What GPUs get: each part a copy, which has no parameters that count as its own."""

    copies: list[int]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.copies.append(id(self))
        assert self.device == CPU
        assert self.dtype == torch.float32
        return super().training_step(batch, batch_idx)


def test_the_parts_of_gpus_run_in_copies_of_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    def replicate(module: Any, devices: Any, detach: bool) -> list[Any]:
        assert detach is not torch.is_grad_enabled()
        return [_replica(module) for _ in devices]

    def parallel_apply(steps: Any, calls: Any, devices: Any) -> list[Any]:
        return [step(*call) for step, call in zip(steps, calls, strict=True)]

    monkeypatch.setattr(torch.nn.parallel, "replicate", replicate)
    monkeypatch.setattr(torch.nn.parallel, "parallel_apply", parallel_apply)
    monkeypatch.setattr(DataParallelStrategy, "_on_host", DataParallelStrategy._on_gpus)
    single, double = Counted(), Copied()
    double.copies = []
    one, two = _run(single, "single", 1), _run(double, "dp", 2)
    assert id(double) not in double.copies
    for mine, theirs in zip(single.parameters(), double.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)
    for name in ("mean", "sum", "max", "loss_epoch", "val"):
        assert two.callback_metrics[name].item() == pytest.approx(one.callback_metrics[name].item(), abs=1e-5), name
    double.training_step = lambda batch, batch_idx: single.loss(batch)  # type: ignore[method-assign]
    with pytest.raises(MisconfigurationException, match="is no method of Copied. Write it in the class"):
        _run(double, "dp", 2)


def _replica(module: Any) -> Any:
    """A copy as torch makes it for a GPU: its parameters are plain attributes."""
    copied = module._replicate_for_data_parallel()
    copied._former_parameters = dict(module._parameters)
    for name, child in module._modules.items():
        setattr(copied, name, _replica(child))
    for name, parameter in module._parameters.items():
        object.__setattr__(copied, name, parameter * 1.0)
    return copied
