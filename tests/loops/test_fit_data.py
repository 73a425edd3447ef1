# SPDX-License-Identifier: Apache-2.0
"""What a fit makes of its data: any iterable, ends that come early, batches that are None, steps that draw themselves."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import leyden as L
from leyden.data.combined import CombinedLoader
from leyden.errors import LeydenWarning, MisconfigurationException, PossibleUserWarning

QUIET: dict[str, Any] = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    "accelerator": "cpu",
}  # fmt: skip


class Noting(L.LightningModule):
    """Notes each batch of training, and after how many of them it was validated."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1)
        self.seen: list[Any] = []
        self.validated_at: list[int] = []

    def loss(self, batch: Any) -> Tensor:
        return self.net(batch).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(batch_idx)
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.loss(batch))

    def on_validation_epoch_end(self) -> None:
        self.validated_at.append(self.trainer.progress.batches)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**kwargs: Any) -> L.Trainer:
    return L.Trainer(**{**QUIET, "max_epochs": 1, "num_sanity_val_steps": 0, **kwargs})


def tensors(n: int) -> list[Tensor]:
    return [torch.full((3, 2), float(i)) for i in range(n)]


class NoLength:
    """An iterable of ``n`` batches that does not say how many it has."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[Tensor]:
        return iter(tensors(self.n))


class Sized(NoLength):
    """The same, which announces as many, or as many as it is told to."""

    def __init__(self, n: int, announced: int | None = None) -> None:
        super().__init__(n)
        self.announced = n if announced is None else announced

    def __len__(self) -> int:
        return self.announced


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.ones(6, 2))


@pytest.mark.parametrize(
    ("loader", "batches"),
    [
        (Sized(3), 3),
        (NoLength(3), 3),
        ((batch for batch in tensors(4)), 4),
        (DataLoader(Stream(), batch_size=2), 3),
        (DataLoader(torch.ones(5, 2), batch_size=2), 3),
        (CombinedLoader(NoLength(2)), 2),
        (torch.ones(4, 3, 2), 4),
    ],
    ids=["sized", "class without length", "generator", "iterable data set", "DataLoader", "combined", "tensor"],
)
def test_any_iterable_is_a_loader(loader: Any, batches: int) -> None:
    model, fit = Noting(), trainer()
    fit.fit(model, loader, NoLength(1))
    assert model.seen == list(range(batches))
    assert model.validated_at == [batches]
    assert fit.global_step == batches


def test_V2_validation_runs_at_the_end_of_an_iterable_without_length() -> None:
    model = Noting()
    trainer(max_epochs=2).fit(model, NoLength(5), NoLength(1))
    assert model.validated_at == [5, 10]


@pytest.mark.parametrize("interval", [1.0, 0.5])
def test_V2_validation_runs_where_an_iterable_ends_before_the_limit(interval: float) -> None:
    model, fit = Noting(), trainer(limit_train_batches=100, accumulate_grad_batches=3, val_check_interval=interval)
    fit.fit(model, NoLength(5), NoLength(1))
    assert model.validated_at == [5]
    assert fit.global_step == 2
    assert fit.is_last_batch


def test_V2_validation_runs_where_a_loader_ends_before_its_length() -> None:
    model, fit = Noting(), trainer(max_epochs=2, accumulate_grad_batches=2)
    with pytest.warns(LeydenWarning, match="announced 8 batches but gave 5"):
        fit.fit(model, Sized(5, announced=8), NoLength(1))
    assert model.validated_at == [5, 10]
    assert fit.global_step == 6  # the open window is stepped too
    assert fit.current_epoch == 2


def test_V2_no_batch_is_validated_twice_where_a_loader_ends_early() -> None:
    model = Noting()
    with pytest.warns(LeydenWarning, match="announced 8"):
        trainer(val_check_interval=2).fit(model, Sized(4, announced=8), NoLength(1))
    assert model.validated_at == [2, 4]


def test_schedules_of_an_epoch_that_ends_early_step() -> None:
    class Model(Noting):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    fit = trainer(max_epochs=2)
    with pytest.warns(LeydenWarning, match="announced 8"):
        fit.fit(Model(), Sized(3, announced=8), NoLength(1))
    assert fit.optimizers[0].param_groups[0]["lr"] == 0.025


def test_G2_the_gradients_of_a_window_that_ends_early_are_divided_by_its_length() -> None:
    def weights(loader: Any, accumulate: int) -> Tensor:
        model = Noting()
        nn.init.zeros_(model.net.weight)
        trainer(accumulate_grad_batches=accumulate, limit_val_batches=0).fit(model, loader, NoLength(1))
        return model.net.weight.detach()

    expected = weights(Sized(2), 2)
    with pytest.warns(LeydenWarning, match="announced 8"):
        assert torch.allclose(weights(Sized(2, announced=8), 4), expected)
    assert torch.allclose(weights(NoLength(2), 4), expected)


def test_a_loader_with_more_batches_than_announced_is_left_where_it_said_it_ends() -> None:
    model = Noting()
    trainer().fit(model, Sized(9, announced=4), NoLength(1))
    assert model.seen == [0, 1, 2, 3]


def test_a_limit_takes_no_batch_too_many_from_an_endless_iterable() -> None:
    taken = []

    class Endless:
        def __iter__(self) -> Iterator[Tensor]:
            while True:
                taken.append(1)
                yield torch.ones(1, 2)

    trainer(limit_train_batches=3, limit_val_batches=0).fit(Noting(), Endless(), NoLength(1))
    assert len(taken) == 3


@pytest.mark.parametrize("loader", [Sized(0), DataLoader(torch.empty(0, 2))])
def test_an_empty_loader_is_an_error_before_any_training(loader: Any) -> None:
    model = Noting()
    with pytest.raises(MisconfigurationException, match=r"train_dataloaders gave no batch: the \w+ is empty"):
        trainer().fit(model, loader, NoLength(1))
    with pytest.raises(MisconfigurationException, match="val_dataloaders gave no batch"):
        trainer().fit(model, NoLength(2), loader)
    with pytest.raises(MisconfigurationException, match="dataloaders gave no batch"):
        trainer().validate(model, loader)
    assert model.seen == []


@pytest.mark.filterwarnings("ignore::leyden.errors.PossibleUserWarning")
def test_an_iterable_without_batches_is_an_error() -> None:
    with pytest.raises(MisconfigurationException, match=r"\(NoLength\) gave no batch in epoch 0"):
        trainer().fit(Noting(), NoLength(0))


@pytest.mark.filterwarnings("ignore::leyden.errors.PossibleUserWarning")
def test_a_generator_that_is_used_up_is_an_error_that_says_so() -> None:
    model = Noting()
    with pytest.raises(MisconfigurationException, match=r"\(generator\) gave no batch in epoch 1\. A generator can be"):
        trainer(max_epochs=3).fit(model, (batch for batch in tensors(2)))
    assert model.seen == [0, 1]


@pytest.mark.parametrize("loader", [3, tensors, Noting])
def test_a_loader_that_cannot_be_iterated_is_an_error(loader: Any) -> None:
    with pytest.raises(TypeError, match="cannot be iterated over"):
        trainer().fit(Noting(), loader, NoLength(1))


def test_a_batch_that_is_none_is_passed_over_with_a_warning() -> None:
    class Holes:
        def __iter__(self) -> Iterator[Any]:
            first, second = torch.ones(1, 2), torch.ones(1, 2)
            return iter([None, first, second, None, first, None])

    model, fit = Noting(), trainer(accumulate_grad_batches=2, limit_val_batches=0)
    with pytest.warns(LeydenWarning, match="gave None in place of a batch"):
        fit.fit(model, Holes(), NoLength(1))
    assert model.seen == [1, 2, 4]
    assert fit.global_step == 3  # each window had one batch that counts


def test_loaders_in_dicts_and_lists_give_batches_of_the_same_structure() -> None:
    class Nested(Noting):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.seen.append((sorted(batch), type(batch["b"]), batch["b"][0] is None))
            return self.loss(batch["a"])

    loaders = {"a": Sized(3), "b": [Sized(1), Sized(2)]}
    model = Nested()
    trainer(limit_val_batches=0).fit(model, loaders, NoLength(1))
    assert model.seen == [(["a", "b"], list, False)] * 3
    for mode, missing in (("min_size", [False]), ("max_size", [False, True, True]), ("max_size_cycle", [False] * 3)):
        model = Nested()
        trainer(limit_val_batches=0).fit(model, CombinedLoader(loaders, mode), NoLength(1))
        assert [none for *_, none in model.seen] == missing
    with pytest.raises(MisconfigurationException, match="mode='sequential'"):
        trainer().fit(Nested(), CombinedLoader(loaders, "sequential"), NoLength(1))


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle", "sequential"])
def test_validation_takes_a_combined_loader_in_any_mode(mode: str) -> None:
    calls: list[Any] = []

    class Several(Noting):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            calls.append((type(batch).__name__, batch_idx, dataloader_idx))

    trainer().validate(Several(), CombinedLoader([Sized(1), Sized(2)], mode))
    assert (
        calls
        == {
            "sequential": [("Tensor", 0, 0), ("Tensor", 0, 1), ("Tensor", 1, 1)],
            "min_size": [("list", 0, 0)],
            "max_size": [("list", 0, 0), ("list", 1, 0)],
            "max_size_cycle": [("list", 0, 0), ("list", 1, 0)],
        }[mode]
    )


Pair = namedtuple("Pair", "x y")


@dataclass
class Record:
    x: Tensor
    name: str


class OwnBatch:
    def __init__(self) -> None:
        self.x = torch.ones(2, 2)
        self.moved_to: Any = None

    def to(self, device: Any, non_blocking: bool = False) -> OwnBatch:
        self.moved_to = device
        return self


@pytest.mark.parametrize(
    "batch",
    [
        {"x": torch.ones(2, 2), "text": ["a", "b"]},
        Pair(torch.ones(2, 2), torch.zeros(2)),
        Record(torch.ones(2, 2), "n"),
        OwnBatch(),
        ["some", "words"],
    ],
    ids=["dict", "namedtuple", "data class", "object with to()", "list of str"],
)
def test_batches_of_any_type_reach_the_step_as_they_are(batch: Any) -> None:
    class Model(Noting):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.seen.append(type(batch))
            x = batch["x"] if isinstance(batch, dict) else getattr(batch, "x", torch.ones(2, 2))
            return self.loss(x)

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            self.seen.append("transferred")
            return batch

    class One:
        def __iter__(self) -> Iterator[Any]:
            return iter([batch])

    model = Model()
    trainer(limit_val_batches=0).fit(model, One(), NoLength(1))
    assert model.seen == ["transferred", type(batch)]
    if isinstance(batch, OwnBatch):
        assert batch.moved_to == torch.device("cpu")


# ---------------------------------------------------------------------------------------------- signatures


class NoIndex(Noting):
    def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
        self.seen.append("batch")
        return self.loss(batch)


class Star(Noting):
    def training_step(self, *args: Any) -> Tensor:
        self.seen.append(len(args))
        return self.loss(args[0])


class Defaults(Noting):
    def training_step(self, batch: Any, batch_idx: int = 7, extra: int = 3) -> Tensor:
        self.seen.append((batch_idx, extra))
        return self.loss(batch)


@pytest.mark.parametrize(("cls", "seen"), [(NoIndex, "batch"), (Star, 2), (Defaults, (0, 3))])
def test_a_step_gets_what_its_signature_asks_for(cls: Any, seen: Any) -> None:
    model = cls()
    trainer(limit_val_batches=0).fit(model, Sized(1), NoLength(1))
    assert model.seen == [seen]


@pytest.mark.parametrize("entry", ["fit", "validate", "predict"])
def test_a_step_with_keyword_only_arguments_is_an_error_before_any_training(entry: str) -> None:
    class Wrong(Noting):
        def training_step(self, *, batch: Any, batch_idx: int) -> Tensor:  # type: ignore[override]
            return self.loss(batch)

        def validation_step(self, *, batch: Any) -> None:  # type: ignore[override]
            self.loss(batch)

        def predict_step(self, *, batch: Any) -> None:  # type: ignore[override]
            self.loss(batch)

    with pytest.raises(MisconfigurationException, match=r"Wrong\.\w+_step\(\) takes no positional argument"):
        getattr(trainer(), entry)(Wrong(), Sized(1))


def test_several_validation_loaders_need_a_step_that_can_tell_them_apart() -> None:
    with pytest.raises(MisconfigurationException, match="no argument dataloader_idx"):
        trainer().fit(Noting(), Sized(1), [Sized(1), Sized(2)])


# ---------------------------------------------------------------------------------------------- dataloader_iter


class Drawing(L.LightningModule):
    """A model whose steps draw their batches themselves, ``per_step`` of them in training."""

    def __init__(self, per_step: int = 1) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1)
        self.per_step = per_step
        self.seen: list[Any] = []
        self.hooks: list[Any] = []

    def training_step(self, dataloader_iter: Any) -> Tensor:
        drawn = [next(dataloader_iter) for _ in range(self.per_step)]
        self.seen += [(batch[0, 0].item(), batch_idx, loader) for batch, batch_idx, loader in drawn]
        loss = torch.stack([self.net(batch).mean() for batch, _, _ in drawn]).sum()
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, dataloader_iter: Any) -> None:
        batch, batch_idx, loader = next(dataloader_iter)
        self.seen.append(("val", batch[0, 0].item(), batch_idx, loader))
        self.log("val", batch.mean())

    def predict_step(self, dataloader_iter: Any) -> float:
        return float(next(dataloader_iter)[0][0, 0])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.hooks.append((batch[0, 0].item(), batch_idx))

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.hooks.append(("val", batch[0, 0].item(), batch_idx, dataloader_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("loader", [Sized(3), NoLength(3)])
def test_a_step_can_draw_its_batches_itself(loader: Any) -> None:
    model, fit = Drawing(), trainer()
    fit.fit(model, loader, Sized(2))
    assert model.seen == [(0, 0, 0), (1, 1, 0), (2, 2, 0), ("val", 0, 0, 0), ("val", 1, 1, 0)]
    assert model.hooks == [(0, 0), (1, 1), (2, 2), ("val", 0, 0, 0), ("val", 1, 1, 0)]
    assert fit.global_step == 3
    assert fit.callback_metrics["val"] == 0.5
    assert fit.predict(model, Sized(3)) == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("batches", [4, 5])
def test_a_step_may_draw_several_batches_and_once_too_often(batches: int) -> None:
    model, fit = Drawing(per_step=2), trainer()
    fit.fit(model, Sized(batches), Sized(1))
    assert [seen[0] for seen in model.seen if seen[0] != "val"] == [0, 1, 2, 3]
    assert model.seen[-1] == ("val", 0, 0, 0)


def test_a_step_that_draws_keeps_to_the_limit_and_sees_several_loaders() -> None:
    model = Drawing()
    trainer(limit_train_batches=2).fit(model, NoLength(9), [Sized(1), Sized(2)])
    assert [seen for seen in model.seen if seen[0] != "val"] == [(0, 0, 0), (1, 1, 0)]
    assert model.seen[2:] == [("val", 0, 0, 0), ("val", 0, 0, 1), ("val", 1, 1, 1)]


def test_Q3_a_stop_iteration_of_the_users_own_is_not_swallowed() -> None:
    class Stops(Drawing):
        def training_step(self, dataloader_iter: Any) -> Tensor:
            raise StopIteration("mine")

    with pytest.raises(StopIteration, match="mine"):
        trainer().fit(Stops(), Sized(3), Sized(1))


# ---------------------------------------------------------------------------------------------- samplers, workers, states


def test_samplers_are_told_each_epoch() -> None:
    class Sampler(torch.utils.data.SequentialSampler):
        epochs: ClassVar[list[int]] = []

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    data = torch.ones(4, 2)
    loader = DataLoader(data, sampler=Sampler(data))
    trainer(max_epochs=3, limit_val_batches=0).fit(Noting(), loader, NoLength(1))
    assert Sampler.epochs == [0, 1, 2]


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_deliver_every_sample(persistent: bool) -> None:
    class Model(Noting):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.seen += batch[:, 0].tolist()
            return self.loss(batch)

    data = torch.arange(12.0).reshape(6, 2)
    loader = DataLoader(data, batch_size=2, num_workers=2, persistent_workers=persistent)
    model = Model()
    trainer(max_epochs=2, limit_val_batches=0).fit(model, loader, NoLength(1))
    assert model.seen == [0, 2, 4, 6, 8, 10] * 2


class Stateful:
    """A stream that knows its position."""

    def __init__(self, n: int) -> None:
        self.n, self.position = n, 0

    def __iter__(self) -> Iterator[Tensor]:
        start, self.position = self.position, 0
        for i in range(start, self.n):
            self.position = i + 1
            yield torch.full((1, 2), float(i))
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class SizedStateful(Stateful):
    def __len__(self) -> int:
        return self.n


@pytest.mark.parametrize("cls", [Stateful, SizedStateful])
def test_R1_a_loader_with_a_state_goes_on_with_the_batch_that_comes_next(cls: Any, tmp_path: Any) -> None:
    class Model(Noting):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.seen.append(int(batch[0, 0]))
            return self.loss(batch)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if len(self.seen) == 3 and self.seen[0] == 0:
                self.trainer.save_checkpoint(tmp_path / "mid.ckpt")

    trainer(limit_val_batches=0).fit(Model(), cls(6), NoLength(1))
    model = Model()
    trainer(limit_val_batches=0).fit(model, cls(6), NoLength(1), ckpt_path=tmp_path / "mid.ckpt")
    assert model.seen == [3, 4, 5]


def test_overfit_batches_trains_and_validates_on_the_same_unshuffled_batches() -> None:
    class Model(Noting):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.seen.append(batch[:, 0].tolist())
            return self.loss(batch)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.seen.append(("val", batch[:, 0].tolist()))

    data = torch.arange(20.0).reshape(10, 2)
    model = Model()
    with pytest.warns(LeydenWarning, match="samples come in order"):
        trainer(overfit_batches=2, max_epochs=2).fit(
            model, DataLoader(data, batch_size=2, shuffle=True), DataLoader(data, batch_size=2, shuffle=True)
        )
    first, second = [0.0, 2.0], [4.0, 6.0]
    assert model.seen == [first, second, ("val", first), ("val", second)] * 2


def test_missing_validation_is_said() -> None:
    with pytest.warns(PossibleUserWarning, match="have no `val_dataloader`"):
        trainer().fit(Noting(), Sized(1))
