# SPDX-License-Identifier: Apache-2.0
"""Copying batches ahead, with a stand-in for ``torch.cuda`` that copies as late, or as early, as the marks allow."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.config import TrainerConfig
from leyden.loops.dispatch import bind
from leyden.loops.session import Session
from leyden.loops.speed.ahead import SMALL, Ahead, Lane
from leyden.precision.base import Precision, TruePrecision
from leyden.results import Results
from leyden.tree import tree_map

CPU = torch.device("cpu")


class Stream:
    """Work that was given to a stream and has not run; each piece may wait for a mark of another stream."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.work: list[Callable[[], Any]] = []
        self.done = 0

    def give(self, work: Callable[[], Any]) -> None:
        self.work.append(work)

    def run_to(self, count: int) -> None:
        while self.done < count:
            self.done += 1  # first: work may make another stream run, which waits for what is before it
            self.work[self.done - 1]()


class StandIn:
    """Streams of a device whose work runs only when somebody must have it: nothing is early unless ``eager``."""

    def __init__(self, eager: bool = False, pin_fails: bool = False, full: bool = False) -> None:
        self.main, self.side = Stream("compute"), Stream("side")
        self.eager, self.pin_fails, self.full = eager, pin_fails, full
        self.log: list[str] = []
        self.rooms: list[Tensor] = []

    def compute(self) -> Stream:
        return self.main

    def room(self, like: Tensor) -> Tensor:
        if self.full:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        self.log.append("room")
        found = torch.empty_like(like)
        if found.is_floating_point():
            found.fill_(float("nan"))
        self.rooms.append(found)
        return found

    def mark(self, stream: Stream) -> tuple[Stream, int]:
        self.log.append(f"mark {stream.name}")
        return stream, len(stream.work)

    def pinned(self, source: Tensor) -> Tensor:
        if self.pin_fails:
            raise RuntimeError("CUDA error: out of memory\nmore")
        self.log.append("pin")
        return source.clone()

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: tuple[Stream, int]) -> tuple[Stream, int]:
        self.log.append(f"copy {len(pairs)} after {after[0].name} {after[1]}")
        waited, count = after
        self.side.give(lambda: waited.run_to(count))
        for target, source in pairs:
            self.side.give(partial(target.copy_, source))
        if self.eager:
            self.side.run_to(len(self.side.work))
        return self.side, len(self.side.work)

    def wait(self, stream: Stream, mark: tuple[Stream, int]) -> None:
        self.log.append(f"{stream.name} waits for {mark[0].name}")
        other, count = mark
        stream.give(lambda: other.run_to(count))

    def compute_on(self, work: Callable[[], None]) -> None:
        self.log.append("step")
        self.main.give(work)

    def finish(self) -> None:
        self.main.run_to(len(self.main.work))


def big(value: float, rows: int = 4) -> Tensor:
    return torch.full((rows, SMALL // 8), float(value))


def ahead(lane: StandIn) -> Ahead:
    return Ahead(CPU, lane)  # type: ignore[arg-type]


def test_order_of_a_run() -> None:
    lane = StandIn()
    bring = ahead(lane)
    for value in (1.0, 2.0, 3.0):
        bring((big(value), torch.tensor([1, 2])))
        lane.compute_on(lambda: None)
    assert lane.log == [
        "pin", "room", "room", "mark compute", "step",
        "pin", "pin", "copy 2 after compute 0", "compute waits for side", "room", "room", "mark compute", "step",
        "pin", "pin", "copy 2 after compute 2", "compute waits for side", "room", "room", "mark compute", "step",
    ]  # fmt: skip


@pytest.mark.parametrize("eager", [False, True])
def test_what_steps_see_when_copies_are_late_or_early(eager: bool) -> None:
    """The host is far ahead: all steps are given before any runs. Each sees its batch, changed in place by none else."""
    lane = StandIn(eager)
    bring = ahead(lane)
    kept, seen = [], []

    def step(batch: Any) -> None:
        seen.append(float(batch["x"].sum()))
        batch["x"] += 1  # the user's own doing

    for value in range(6):
        source = {"x": big(float(value)), "name": f"batch {value}", "more": [big(-float(value)), None]}
        batch = bring(source)
        assert batch is not source
        assert batch["name"] == source["name"]
        del source
        kept.append(batch)
        lane.compute_on(lambda batch=batch: step(batch))  # type: ignore[misc]
    lane.finish()
    each = big(0.0).numel()
    assert seen == [value * each for value in range(6)]
    for value, batch in enumerate(kept):
        assert torch.equal(batch["x"], big(value + 1.0))
        assert torch.equal(batch["more"][0], big(-float(value)))
    assert len({batch["x"].data_ptr() for batch in kept}) == 6


def test_a_copy_is_at_most_one_batch_ahead() -> None:
    """When the copy of a batch runs, the step two before it has run."""
    lane = StandIn(eager=True)
    bring = ahead(lane)
    ran: list[int] = []
    for value in range(5):
        bring(big(float(value)))
        assert len(ran) == max(value - 1, 0)
        lane.compute_on(lambda value=value: ran.append(value))  # type: ignore[misc]


class Pair(NamedTuple):
    x: Tensor
    y: Any


@dataclass
class Both:
    x: Tensor
    note: str


class Movable:
    """An object that moves in its own way."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.moves = x, 0

    def to(self, device: torch.device) -> Movable:
        other = Movable(self.x)
        other.moves = self.moves + 1
        return other


class Kind(Tensor):
    """A subclass of Tensor."""


BATCHES: list[Callable[[int], Any]] = [
    lambda i: big(i),
    lambda i: [big(i), {"a": big(i + 0.5)}],
    lambda i: Pair(big(i), "text"),
    lambda i: Both(big(i), "text"),
    lambda i: OrderedDict(a=big(i), b=3),
    lambda i: {"train": [big(i), big(i)], "more": (big(2.0 * i), None)},  # several loaders
    lambda i: big(i, rows=4 + i % 3),  # another shape each time
    lambda i: big(i) if i % 2 else [big(i), big(i)],
    lambda i: big(i).t(),
    lambda i: big(i)[:, ::2],
    lambda i: big(i).double() if i == 3 else big(i),
    lambda i: (big(i)[:1].expand(4, -1), big(i)),
    lambda i: torch.tensor([i]),  # small
    lambda i: torch.empty(0),
    lambda i: "no tensor",
    lambda i: [big(i).requires_grad_(), big(i)],
    lambda i: [big(i).to_sparse(), big(i)],
    lambda i: [torch.complex(big(i), big(1)), big(i)],
    lambda i: [big(i).as_subclass(Kind), big(i)],
]


@pytest.mark.parametrize("make", BATCHES)
def test_any_batch_equals_what_move_to_gives(make: Callable[[int], Any]) -> None:
    lane = StandIn()
    bring = ahead(lane)
    found = []
    for i in range(5):
        found.append(bring(make(i)))
        lane.compute_on(lambda: None)
    lane.finish()
    for i, batch in enumerate(found):
        compare(batch, make(i))


def compare(batch: Any, wanted: Any) -> None:
    assert type(batch) is type(wanted)
    if isinstance(wanted, Tensor):
        assert batch.layout == wanted.layout
        if wanted.layout is torch.strided:
            assert torch.equal(batch, wanted)
            assert batch.stride() == torch.empty_like(wanted).stride() or batch.stride() == wanted.stride()
        else:
            assert torch.equal(batch.to_dense(), wanted.to_dense())
        assert batch.dtype == wanted.dtype
    elif isinstance(wanted, dict):
        assert list(batch) == list(wanted)
        for key in wanted:
            compare(batch[key], wanted[key])
    elif isinstance(wanted, (list, tuple)):
        assert len(batch) == len(wanted)
        for mine, theirs in zip(batch, wanted, strict=True):
            compare(mine, theirs)
    elif isinstance(wanted, Both):
        compare(batch.x, wanted.x)
        assert batch.note == wanted.note
    else:
        assert batch == wanted


def test_objects_with_their_own_to_move_once_and_themselves() -> None:
    bring = ahead(StandIn())
    for _ in range(3):
        batch = bring([Movable(big(1.0)), big(2.0)])
        assert batch[0].moves == 1


def test_a_batch_that_is_small_or_of_no_tensor_makes_no_marks() -> None:
    lane = StandIn()
    bring = ahead(lane)
    for _ in range(3):
        bring({"x": torch.ones(8, 4), "y": "text"})
    assert lane.log == []


def test_what_is_on_a_device_already_passes_through() -> None:
    lane = StandIn()
    bring = ahead(lane)
    there = torch.ones(SMALL, device="meta")
    bring.device = torch.device("meta")
    for _ in range(3):
        assert bring([there])[0] is there
    assert lane.log == []


def test_ragged_last_batch_is_copied_in_line_and_the_next_epoch_goes_on() -> None:
    lane = StandIn()
    bring = ahead(lane)
    for rows in (4, 4, 3, 4, 4):
        bring(big(1.0, rows))
    assert [word for word in lane.log if word.startswith("copy")] == [
        "copy 1 after compute 0", "copy 1 after compute 1",
    ]  # fmt: skip


def test_memory_that_cannot_be_pinned_is_said_once_and_the_rest_goes_on() -> None:
    lane = StandIn(pin_fails=True)
    bring = ahead(lane)
    with pytest.warns(UserWarning, match="pinned memory \\(CUDA error: out of memory\\), so batches go") as caught:
        found = [bring([big(2.0), big(i)]) for i in range(4)]
    assert len(caught) == 1
    lane.finish()
    assert torch.equal(found[-1][1], big(3.0))


def test_without_room_for_a_second_batch_all_are_copied_in_line() -> None:
    lane = StandIn(full=True)
    bring = ahead(lane)
    for i in range(3):
        assert torch.equal(bring(big(float(i))), big(float(i)))
    assert lane.log == ["pin"] * 3


def test_room_of_another_stream_is_not_used() -> None:
    lane = StandIn()
    bring = ahead(lane)
    bring(big(1.0))
    lane.main = Stream("another")
    assert torch.equal(bring(big(2.0)), big(2.0))
    assert not [word for word in lane.log if word.startswith("copy")]


def test_inside_and_outside_of_inference_mode() -> None:
    lane = StandIn()
    bring = ahead(lane)
    with torch.inference_mode():
        bring(big(1.0))
    assert not bring(big(2.0)).is_inference()
    lane.finish()


# --- where it is used ------------------------------------------------------------------------------------------------


class Module(L.LightningModule):
    """Nothing of its own."""


def transfer(monkeypatch: Any, module: Any, lane: StandIn, precision: Any = None, **config: Any) -> Any:
    """What a run on a CUDA device brings its batches with; the device is a stand-in, to which nothing really moves."""
    monkeypatch.setattr("leyden.loops.speed.ahead.Lane", lambda device: lane)
    monkeypatch.setattr("leyden.loops.speed.ahead.moved", lambda node, device: node)
    strategy = SimpleNamespace(root_device=torch.device("cuda", 0), precision=precision or Precision())
    trainer = SimpleNamespace(config=TrainerConfig(**config))
    session = Session(trainer, module, None, strategy, *[None] * 5)  # type: ignore[arg-type]
    session.hooks = bind(trainer, module, None, [], Results(), None)
    return session.transfer()


def test_a_run_on_cuda_copies_ahead(monkeypatch: Any) -> None:
    lane = StandIn()
    bring = transfer(monkeypatch, Module(), lane)
    for i in range(3):
        bring(big(float(i)), 0)
    assert lane.log.count("pin") == 3


def test_hooks_around_the_transfer_keep_their_order(monkeypatch: Any) -> None:
    seen: list[str] = []

    class Hooked(Module):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            seen.append(f"before {dataloader_idx} {len(lane.log)}")
            return batch

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            seen.append(f"after {dataloader_idx} {lane.log[3:]}")
            return batch

    lane = StandIn()
    bring = transfer(monkeypatch, Hooked(), lane)
    for i in range(2):
        bring(big(float(i)), 5)
    assert seen[2:] == [
        "before 5 3",
        "after 5 ['pin', 'copy 1 after compute 0', 'compute waits for side', 'room', 'mark compute']",
    ]


def test_a_batch_is_converted_before_it_is_copied(monkeypatch: Any) -> None:
    lane = StandIn()
    bring = transfer(monkeypatch, Module(), lane, TruePrecision(torch.float64))
    for i in range(3):
        assert bring(big(float(i)), 0).dtype == torch.float64
    assert lane.log.count("pin") == 3


def test_a_module_that_moves_its_batches_itself_does_it_all(monkeypatch: Any) -> None:
    class Moves(Module):
        def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
            return batch, device.type, dataloader_idx

    lane = StandIn()
    bring = transfer(monkeypatch, Moves(), lane)
    for i in range(3):
        assert bring(big(float(i)), 7)[1:] == ("cuda", 7)
    assert lane.log == []


def test_fast_data_false_copies_in_line(monkeypatch: Any) -> None:
    lane = StandIn()
    monkeypatch.setattr("leyden.module_hooks.move_to", lambda batch, device: ("moved", device.type))
    bring = transfer(monkeypatch, Module(), lane, fast_data=False)
    assert bring(big(1.0), 0) == ("moved", "cuda")
    assert lane.log == []


class Net(L.LightningModule):
    """Several loaders, small batches, and what a fit has around its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)
        self.kept: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.kept.append(batch)
        first, second = batch["first"], batch["second"][0]
        return self.layer(first).square().mean() + self.layer(second).mean() * torch.rand(())

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        batch["first"].mul_(2)  # its own to change

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.layer(batch).mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("eager", [False, True])
def test_R1_fits_equal_those_without_and_resume_exactly(eager: bool, monkeypatch: Any, tmp_path: Any) -> None:
    """Several loaders, ragged ends, accumulation, validation; the file is written in the middle of an epoch."""

    def fit(ahead: bool, path: Any = None) -> tuple[Net, list[Any]]:
        with monkeypatch.context() as patch:
            patch.setattr("leyden.loops.speed.ahead.SMALL", 0)
            if ahead:
                patch.setattr(Session, "transfer", lambda session, draws=False: Ahead(CPU, Waits(eager)))  # type: ignore[arg-type]
            else:
                patch.setattr(Session, "transfer", lambda session, draws=False: lambda batch, index: copied(batch))
            L.seed_everything(3, verbose=False)
            module, rng = Net(), torch.Generator().manual_seed(1)
            sets = torch.randn(22, 4, generator=rng), torch.randn(30, 4, generator=rng)
            train = {
                "first": DataLoader(sets[0], batch_size=4, shuffle=True),  # type: ignore[arg-type]
                "second": DataLoader(TensorDataset(sets[1]), batch_size=4, shuffle=True),
            }
            trainer = L.Trainer(
                max_epochs=2, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, callbacks=[Saves()],
                enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=2, val_check_interval=3,
                default_root_dir=tmp_path,
            )  # fmt: skip
            val = DataLoader(sets[0], batch_size=4)  # type: ignore[arg-type]
            trainer.fit(module, train, val, ckpt_path=path)
            return module, list(trainer.history)

    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.progress.batches == 5:
                trainer.save_checkpoint(tmp_path / "mid.ckpt")

    plain, rows = fit(False)
    module, mine = fit(True)
    assert torch.equal(plain.layer.weight, module.layer.weight)
    assert rows == mine
    for theirs, ours in zip(plain.kept, module.kept, strict=True):
        compare(ours, theirs)
    resumed, _ = fit(True, tmp_path / "mid.ckpt")
    assert torch.equal(plain.layer.weight, resumed.layer.weight)
    for theirs, ours in zip(plain.kept[5:], resumed.kept, strict=True):
        compare(ours, theirs)


class Waits(StandIn):
    """A device whose steps run when they are called: all that they wait for is done by then, and no sooner."""

    def wait(self, stream: Stream, mark: tuple[Stream, int]) -> None:
        super().wait(stream, mark)
        self.finish()


def copied(batch: Any) -> Any:
    return tree_map(Tensor.clone, batch)


def test_the_calls_of_torch(monkeypatch: Any) -> None:
    """With what stands for streams of torch: which one waits for what, and on which one the copies are made."""
    log: list[str] = []
    current = ["main"]

    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

        def record_event(self) -> str:
            log.append(f"mark {self.name}")
            return f"mark of {self.name}"

        def wait_event(self, event: str) -> None:
            log.append(f"{self.name} waits for {event}")

    @contextmanager
    def on(stream: Named) -> Iterator[None]:
        before, current[0] = current[0], stream.name
        yield
        current[0] = before

    class Target:
        def copy_(self, source: Any, non_blocking: bool) -> None:
            log.append(f"copy {source} on {current[0]} {non_blocking}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Named("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Named(current[0]))
    monkeypatch.setattr(torch.cuda, "stream", on)
    lane = Lane(torch.device("cuda", 0))
    stream = lane.compute()
    mark = lane.mark(stream)
    lane.wait(stream, lane.copy([(Target(), "a"), (Target(), "b")], mark))  # type: ignore[list-item]
    assert log == [
        "mark main", "side waits for mark of main", "copy a on side True", "copy b on side True", "mark side",
        "main waits for mark of side",
    ]  # fmt: skip
    lane.device = torch.device("meta")
    room = lane.room(torch.ones(3, 4).t())
    assert (room.device.type, room.stride()) == ("meta", (1, 4))
