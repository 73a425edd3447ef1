# SPDX-License-Identifier: Apache-2.0
"""Ranks that do not do the same: other names, no loss, other wishes, parameters without gradients. Nobody waits for ever."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryAccuracy

import leyden as L
from leyden import files
from leyden.callbacks import ModelCheckpoint, Timer
from leyden.errors import PossibleUserWarning
from leyden.runtime import collective
from leyden.strategies.where import exchanges
from ranks import Net, data, make_trainer, on_ranks

# ---------------------------------------------------------------------------------------------- what is logged


class _Logs(Net):
    """Logs by rank: some names on one rank only, all reductions, metric objects."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy, self.alone = BinaryAccuracy(), MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        rank = self.global_rank
        value = 10.0 * rank + batch_idx
        epoch = {"on_step": False, "on_epoch": True}
        for reduction in ("sum", "min", "max"):
            self.log(reduction, value, reduce_fx=reduction, **epoch)
        self.log("mean", value, batch_size=1 + rank, **epoch)
        self.log("synced", value, sync_dist=True)
        self.log("local", value)
        if rank == 1:
            self.log("only on one", value, **epoch)
            self.alone.update(value)
            self.log("metric of one", self.alone, **epoch)
        self.log("zero", value, rank_zero_only=True, **epoch) if rank == 0 else None
        self.accuracy.update(torch.tensor([0.9]), torch.tensor([rank]))
        self.log("accuracy", self.accuracy, **epoch)
        return self.loss(batch)

    def on_train_epoch_end(self) -> None:
        self.log("late", 1.0 + self.global_rank)


class _Reads(L.Callback):
    """Reads at the end of an epoch what callbacks monitor."""

    monitors = True

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def _logged() -> Any:
    module, reads = _Logs(), _Reads()
    trainer = make_trainer(max_epochs=2, callbacks=[reads], log_every_n_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, DataLoader(data(12), 2))
    told = [str(one.message) for one in caught if issubclass(one.category, PossibleUserWarning)]
    return reads.seen, told, [dict(row) for row in trainer.history]


def test_m3_names_that_differ_between_ranks_are_reported_and_weigh_nothing() -> None:
    (seen, told, rows), (other, untold, their_rows) = on_ranks(2, _logged)
    wanted = {
        "sum": 36.0, "min": 0.0, "max": 12.0, "mean": (3.0 + 2 * 33.0) / 9, "only on one": 11.0, "metric of one": 11.0,
        "zero": 1.0, "accuracy": 0.5, "late": 1.5, "synced": 7.0,
    }  # fmt: skip
    for epoch in seen + other:
        assert {name: epoch[name] for name in wanted} == pytest.approx(wanted)
    assert [epoch["local"] for epoch in seen + other] == [2.0, 2.0, 12.0, 12.0]
    assert [row["synced"] for row in rows if "synced" in row] == [5.0, 6.0, 7.0] * 2
    assert untold == []
    assert len(told) == 2
    for name, text in zip(("only on one", "metric of one"), told, strict=True):
        assert text.startswith(f"self.log({name!r}, ...) was called in training_step on the ranks [1], but not on [0]")
    epoch_rows = [row for row in rows if "mean" in row]
    assert epoch_rows == [row for row in their_rows if "mean" in row]


class _Many(Net):
    """Logs so many values of all reductions for the epoch, and counts the exchanges of a fit."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for i in range(self.count):
            for reduction in ("mean", "sum", "min", "max"):
                self.log(f"{reduction}{i}", float(i), reduce_fx=reduction, on_step=False, on_epoch=True)
        return self.loss(batch)


def _exchanged(count: int, batches: int) -> int:
    before = exchanges()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_trainer(max_epochs=2).fit(_Many(count), DataLoader(data(4 * batches), 2))
    return exchanges() - before


def _exchanged_by_count_and_length() -> Any:
    return [_exchanged(1, 3), _exchanged(10, 3), _exchanged(1, 9)]


def test_m2_u3_all_values_of_an_epoch_travel_together_and_batches_of_known_number_ask_nothing() -> None:
    (few, many, long), others = on_ranks(2, _exchanged_by_count_and_length)
    assert few > 0
    assert many == few
    assert long == few + 2 * (9 - 3)  # gradients: one for each batch more
    assert others == [few, many, long]


def _as_lightning() -> Any:
    reads = _Reads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_trainer(max_epochs=1, callbacks=[reads], semantics="lightning").fit(_Synced(), DataLoader(data(8), 2))
    return reads.seen[0]


class _Synced(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("local", float(self.global_rank), on_epoch=True, on_step=False)
        self.log("synced", float(self.global_rank), on_epoch=True, on_step=False, sync_dist=True)
        return self.loss(batch)


def test_with_lightnings_semantics_the_mean_is_local_unless_it_is_asked_for() -> None:
    assert on_ranks(2, _as_lightning) == [{"local": 0.0, "synced": 0.5}, {"local": 1.0, "synced": 0.5}]


# ---------------------------------------------------------------------------------------------- steps


class _Skips(Net):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.how == "rank" and batch_idx == 1 and self.global_rank == 1:
            return None
        return super().training_step(batch, batch_idx)


def _skipped(strategy: str) -> Any:
    module = _Skips("rank")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(strategy=strategy, max_epochs=1).fit(module, DataLoader(data(12), 2))
    assert all("returned None: with several processes" in str(one.message) for one in caught)
    return module.norms, module.layer[0].weight.tolist()


@pytest.mark.parametrize("strategy", ["ddp", "ddp_find_unused_parameters_true"])
def test_d4_a_rank_that_returns_none_counts_with_gradients_of_zero(strategy: str) -> None:
    (norms, weight), (others, other) = on_ranks(2, _skipped, strategy)
    assert len(norms) == 3
    assert norms == others
    assert weight == other


class _Wishes(L.Callback):
    """Wants to stop after a batch, on some ranks."""

    def __init__(self, ranks: tuple[int, ...], batch: int) -> None:
        self.ranks, self.batch = ranks, batch

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx >= self.batch and trainer.global_rank in self.ranks:
            trainer.should_stop = True


def _stopped(ranks: tuple[int, ...]) -> Any:
    module = Net()
    trainer = make_trainer(max_epochs=2, callbacks=[_Wishes(ranks, 4)], log_every_n_steps=8)
    trainer.fit(module, DataLoader(data(40), 2))
    return trainer.global_step, trainer.should_stop


def test_d3_all_stop_at_once_or_together_where_they_meet() -> None:
    assert on_ranks(2, _stopped, (0, 1)) == [(5, True)] * 2
    # by the wish of one they stop with the next row
    assert on_ranks(2, _stopped, (1,)) == [(8, True)] * 2


class _Counts(Net):
    """Counts the collectives that it has taken part in between the fifth batch and the twentieth."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 5:
            self.began = exchanges()
        if batch_idx == 20:
            self.made = exchanges() - self.began


def _timed(duration: dict[str, float]) -> Any:
    module = _Counts()
    trainer = make_trainer(max_epochs=10_000, max_steps=200, callbacks=[Timer(timedelta(**duration))])
    trainer.fit(module, DataLoader(data(120), 2))
    return trainer.global_step, module.made


def test_d3_the_time_is_up_for_all_after_the_same_batch_and_costs_an_ordinary_batch_nothing() -> None:
    (zero, made), (one, others) = on_ranks(2, _timed, {"seconds": 0.4})
    assert zero == one
    (zero, made), (one, others) = on_ranks(2, _timed, {"hours": 1})
    assert zero == one == 200
    assert made == others == 15  # one for the gradients of each batch, and none for the time


class _Unused(Net):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)


def _without_gradient(strategy: str) -> Any:
    module = _Unused()
    try:
        make_trainer(strategy=strategy, max_epochs=1).fit(module, DataLoader(data(12), 2))
    except RuntimeError as error:
        return str(error)
    return len(module.losses)


def test_n1_parameters_without_a_gradient_are_named() -> None:
    for rank, message in enumerate(on_ranks(2, _without_gradient, "ddp")):
        assert f"On rank {rank}, these parameters of _Unused took no part in the loss" in message
        assert "spare.weight, spare.bias" in message
        assert "ddp_find_unused_parameters_true" in message
    assert on_ranks(2, _without_gradient, "ddp_find_unused_parameters_true") == [3, 3]


class _Pair(L.LightningModule):
    """Two parts that are trained in turn, by hand or by itself; each has gradients in its own turn only."""

    def __init__(self, automatic: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.automatic_optimization = automatic
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)

    def loss(self, batch: Any) -> Tensor:
        return (self.second(self.first(batch[0])) - batch[1]).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.automatic_optimization:
            return [self.loss(batch), self.loss(batch).sqrt()]
        for optimizer in self.optimizers():
            with optimizer.toggle_model():
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()
        return None

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.first, self.second)]


def _in_turn(automatic: bool, devices: int) -> Any:
    module = _Pair(automatic)
    make_trainer(devices, max_epochs=2).fit(module, DataLoader(data(24), 8 // devices))
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()]).tolist()


@pytest.mark.parametrize("automatic", [False, True], ids=["by hand", "a loss each"])
def test_n3_parts_that_are_trained_in_turn_need_no_search_for_unused_parameters(automatic: bool) -> None:
    zero, one = on_ranks(2, _in_turn, automatic, 2)
    assert zero == one
    if not automatic:  # the second loss is no mean over samples
        assert zero == pytest.approx(_in_turn(automatic, 1), abs=1e-5)


# ---------------------------------------------------------------------------------------------- verbs


class _Verbs(Net):
    def on_train_start(self) -> None:
        strategy, rank = self.trainer.strategy, self.global_rank
        self.found = {
            "broadcast": strategy.broadcast({"rank": rank}),
            "from one": strategy.broadcast(rank, src=1),
            "mean": strategy.reduce(torch.tensor([1.0 + rank])).tolist(),
            "sum": strategy.reduce(torch.tensor(1 + rank), reduce_op="sum").item(),
            "max": strategy.reduce(torch.tensor(1 + rank), reduce_op=torch.distributed.ReduceOp.MAX).item(),
            "all": strategy.reduce_boolean_decision(rank == 0),
            "any": strategy.reduce_boolean_decision(rank == 0, all=False),
            "gathered": [item.tolist() for item in self.all_gather({"a": torch.full((2,), rank), "b": rank}).values()],
            "objects": strategy.gather_objects(f"rank {rank}"),
            "where": (
                self.trainer.world_size,
                self.trainer.num_devices,
                self.trainer.num_nodes,
                self.trainer.device_ids,
            ),
            "sampler": self.trainer.distributed_sampler_kwargs == {"num_replicas": 2, "rank": rank},
            "wrapped": self.trainer.model.module is self,
        }
        weight = torch.ones(1, requires_grad=True)
        (self.all_gather(weight * (1 + rank), sync_grads=True).sum()).backward()
        assert weight.grad is not None
        self.found["gradient"] = weight.grad.item()
        strategy.barrier()
        with pytest.raises(RuntimeError, match=r"by rank: \[\[\(1,\)\], \[\(2,\)\]\]"):
            self.all_gather(torch.zeros(1 + rank))


def _verbs() -> Any:
    module = _Verbs()
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, DataLoader(data(4), 2))
    assert trainer.model is module
    assert "forward" not in vars(module)
    return module.found


def test_the_verbs_of_the_strategy() -> None:
    for found in on_ranks(2, _verbs):
        assert found == {
            "broadcast": {"rank": 0}, "from one": 1, "mean": [1.5], "sum": 3, "max": 2, "all": False, "any": True,
            "gathered": [[[0, 0], [1, 1]], [0, 1]], "objects": ["rank 0", "rank 1"], "where": (2, 2, 1, [0, 1]),
            "sampler": True, "wrapped": True, "gradient": found["gradient"],
        }  # fmt: skip
        assert found["gradient"] in (2.0, 4.0)


def _read_all(read: dict[str, int], *things: Any) -> None:
    """Read all public properties of things, with a watchdog of 5 s for each (D2 of PAINS); none may begin a collective."""
    before = exchanges()
    for thing in things:
        for name in dir(type(thing)):
            if not name.startswith("_") and isinstance(getattr(type(thing), name), property):
                late = threading.Timer(5.0, os._exit, (1,))
                late.start()
                with contextlib.suppress(Exception), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    getattr(thing, name)
                late.cancel()
                key = type(thing).__name__
                read[key] = read.get(key, 0) + 1
    assert exchanges() == before


class _Looks(Net):
    """Rank 0 alone reads all public properties of everything at one moment, while the other one goes on."""

    def __init__(self, moment: str) -> None:
        super().__init__()
        self.moment, self.read = moment, dict[str, int]()

    def look(self, moment: str) -> None:
        if moment == self.moment and self.global_rank == 0 and not self.read:
            _read_all(self.read, self.trainer, self.trainer.strategy, self)

    def setup(self, stage: str) -> None:
        self.look("setup")

    def configure_optimizers(self) -> Any:
        self.look("configure_optimizers")
        return torch.optim.SGD(self.parameters(), 0.1)

    def on_fit_start(self) -> None:
        self.look("on_fit_start")

    def on_train_epoch_start(self) -> None:
        self.look("on_train_epoch_start")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.look("training_step")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.look("validation_step")

    def on_train_end(self) -> None:
        self.look("on_train_end")


def _properties(moment: str, arguments: dict[str, Any]) -> Any:
    module = _Looks(moment)
    trainer = make_trainer(max_epochs=2, **arguments)
    own = arguments.get("use_distributed_sampler") is False  # the user's, of which ranks have other numbers
    loader = DataLoader(data(4 + 2 * trainer.global_rank if own else 8), 2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The training loaders have other numbers of batches")
        trainer.fit(module, loader, DataLoader(data(4), 2))
    if moment == "after" and trainer.global_rank == 0:
        _read_all(module.read, trainer, trainer.strategy, module)
    return module.read, trainer.global_step


_MOMENTS = [
    "setup", "configure_optimizers", "on_fit_start", "on_train_epoch_start", "training_step", "validation_step",
    "on_train_end", "after",
]  # fmt: skip
_ARGUMENTS: list[dict[str, Any]] = [
    {}, {"use_distributed_sampler": False}, {"num_workers": "auto"}, {"reload_dataloaders_every_n_epochs": 1},
    {"strategy": "fsdp"},
]  # fmt: skip


def _in_short(moment: str, arguments: dict[str, Any]) -> bool:
    asks = moment == "configure_optimizers" and set(arguments) & {"use_distributed_sampler", "num_workers"}
    return bool(asks) or (not arguments and moment in ("configure_optimizers", "training_step", "after"))


@pytest.mark.parametrize(
    ("moment", "arguments"),
    [
        pytest.param(
            moment, arguments, id=f"{moment}-{next(iter(arguments), 'plain')}",
            marks=[] if _in_short(moment, arguments) else pytest.mark.slow,
        )
        for moment in _MOMENTS for arguments in _ARGUMENTS
    ],
)  # fmt: skip
def test_d2_no_public_property_waits_for_another_rank(moment: str, arguments: dict[str, Any]) -> None:
    (read, steps), (none, others) = on_ranks(2, _properties, moment, arguments)
    assert read["Trainer"] > 40
    assert sum(read.values()) > 60
    assert read["_Looks"] > 8
    assert none == {}
    assert steps == others == 4


class _Asks(Net):
    """Asks how many updates there will be in configure_optimizers, on some ranks, one after the other."""

    def __init__(self, who: list[int], late: float = 0.0) -> None:
        super().__init__()
        self.who, self.late, self.told = who, late, -1

    def train_dataloader(self) -> Any:
        time.sleep(self.late * self.global_rank)
        return DataLoader(data(8 + 2 * self.global_rank), 2)

    def configure_optimizers(self) -> Any:
        if self.global_rank in self.who:
            self.told = int(self.trainer.estimated_stepping_batches)
        return torch.optim.SGD(self.parameters(), 0.1)


def _asks(who: list[int], late: float) -> Any:
    module = _Asks(who, late)
    trainer = make_trainer(max_epochs=2, use_distributed_sampler=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module)
    said = [str(w.message) for w in caught if "estimated_stepping_batches" in str(w.message)]
    return module.told, trainer.global_step, trainer.estimated_stepping_batches, said


def test_d2_sc3_the_number_of_updates_is_the_same_on_all_ranks_that_ask_before_they_meet() -> None:
    # the second rank asks for its loaders for longer than the first one would wait for one that does not ask
    assert on_ranks(2, _asks, [0, 1], 2.0) == [(8, 8, 8, [])] * 2


def test_d2_a_rank_that_asks_alone_is_answered_and_told_what_was_wrong() -> None:
    zero, one = on_ranks(2, _asks, [1], 0.0)
    assert (zero[:3], one[:3]) == ((-1, 8, 8), (10, 8, 8))
    assert "by rank: {1: 5}; an epoch has 4" in zero[3][0]


class _Fails(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 3 and self.global_rank == 0:
            raise ValueError("broken on rank 0")
        return super().training_step(batch, batch_idx)


def _saves_on_exception(folder: Path) -> Any:
    saving = ModelCheckpoint(folder, save_on_exception=True)
    trainer = make_trainer(max_epochs=1, callbacks=[saving], enable_checkpointing=True)
    try:
        trainer.fit(_Fails(), DataLoader(data(24), 2))
    except Exception as error:
        collective.part()  # as at the end of the process: the other rank is cut off
        return type(error).__name__
    return None


def test_d6_what_is_saved_when_a_rank_raises_waits_for_no_other_one(tmp_path: Path) -> None:
    first, second = on_ranks(2, _saves_on_exception, tmp_path)
    assert first == "ValueError"
    assert second == "RuntimeError"
    (saved,) = tmp_path.glob("*.ckpt")
    assert files.load(saved)["global_step"] == 3


class _EndsEpoch(Net):
    """Ends its epoch by -1, on some ranks."""

    def __init__(self, ranks: tuple[int, ...]) -> None:
        super().__init__()
        self.ranks = ranks

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 2 and self.global_rank in self.ranks else None


def _ends_epoch(ranks: tuple[int, ...]) -> Any:
    module = _EndsEpoch(ranks)
    trainer = make_trainer(max_epochs=2)
    try:
        trainer.fit(module, DataLoader(data(16), 2))
    except RuntimeError as error:
        collective.part()  # as at the end of the process
        return str(error)
    return trainer.global_step


def test_d3_an_epoch_that_only_one_rank_ends_is_an_error_by_name() -> None:
    assert on_ranks(2, _ends_epoch, (0, 1)) == [4, 4]
    first, second = on_ranks(2, _ends_epoch, (1,))
    assert second.startswith(
        "on_train_batch_start returned -1 on rank 1 in batch 2, which ends the epoch, but not on all"
    )
    assert first != ""


class _UnusedOnOne(_Unused):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        extra = 0.0 if self.global_rank else self.spare(torch.zeros(1, 2)).sum() * 0.0
        return super().training_step(batch, batch_idx) + extra


def _on_one() -> Any:
    module = _UnusedOnOne()
    try:
        make_trainer(max_epochs=1).fit(module, DataLoader(data(12), 2))
    except RuntimeError as error:
        collective.part()
        return str(error)
    return None


def test_n1_the_error_names_parameters_their_modules_and_ranks() -> None:
    for message in on_ranks(2, _without_gradient, "ddp"):
        assert "spare.weight, spare.bias (in spare: Linear)" in message
        assert "By rank: on ranks 0, 1: spare.weight" in message or "By rank" not in message
    zero, one = on_ranks(2, _on_one)
    assert "On rank 1, these parameters of _UnusedOnOne took no part" in one
    assert zero != one


def test_n2_one_device_warns_of_parameters_without_a_gradient() -> None:
    module = _Unused()
    with pytest.warns(PossibleUserWarning, match=r"parameters of _Unused took no part.*: spare\.weight, spare\.bias\."):
        make_trainer(1, max_epochs=1).fit(module, DataLoader(data(12), 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_trainer(1, max_epochs=1).fit(Net(), DataLoader(data(12), 2))
