# SPDX-License-Identifier: Apache-2.0
"""Tests of ThroughputMonitor; with ``semantics="lightning"`` the rows are those that Lightning 2.6.6 wrote."""

from __future__ import annotations

import itertools
import struct
from collections import deque

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import leyden as L
from leyden.callbacks import ModelCheckpoint, ThroughputMonitor, throughput_monitor
from leyden.callbacks.throughput_monitor import _DeviceClock, _dtype, _Meter
from leyden.errors import MisconfigurationException
from leyden.loggers import CSVLogger
from leyden.profilers.throughput import Throughput


class Uncounted(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Module(Uncounted):
    flops_per_batch: int | None = 10

    def validation_step(self, batch, batch_idx):
        self.layer(batch)

    test_step = predict_step = validation_step


class Rows(CSVLogger):
    """Keeps the rows."""

    def __init__(self, folder):
        super().__init__(folder)
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))


@pytest.fixture
def ticking(monkeypatch):
    """A clock that goes on by a second each time that it is read, and a device that can do 100 operations a second."""

    def start():
        clock = itertools.count()
        monkeypatch.setattr(throughput_monitor.time, "perf_counter", lambda: float(next(clock)))
        monkeypatch.setattr(throughput_monitor, "get_available_flops", lambda device, dtype: 100)

    return start


def loader(batches=5):
    return DataLoader(torch.randn(2 * batches, 8), batch_size=2)


@pytest.fixture
def run(tmp_path, ticking):
    """Run entry points on one trainer, under the ticking clock; return the rows of the logger."""

    def start(monitor, *entries, batches=5, every=2, module=None, semantics="lightning", callbacks=(), **arguments):
        ticking()
        logger = Rows(tmp_path)
        trainer = L.Trainer(
            accelerator="cpu", devices=1, callbacks=[monitor, *callbacks], logger=logger, log_every_n_steps=every,
            semantics=semantics, default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False,
            **{"enable_checkpointing": False, "max_epochs": 1, **arguments},
        )  # fmt: skip
        module = module or Module()
        for entry in entries:
            if entry == "fit":
                validates = arguments.get("limit_val_batches") != 0
                trainer.fit(
                    module, loader(batches), loader(batches) if validates or isinstance(module, Module) else None
                )
            elif entry == "predict":
                trainer.predict(module, loader(batches))
            else:
                getattr(trainer, entry)(module, loader(batches), verbose=False)
        start.trainer = trainer
        return logger.rows

    return start


def samples(batch):
    return batch.size(0)


def rates(stage, separator="/", items=None):
    """Return the rates of one batch of two samples and ten operations a second."""
    found = {"batches_per_sec": 1.0, "samples_per_sec": 2.0, "flops_per_sec": 10.0, "mfu": 0.1}
    if items is not None:
        found["items_per_sec"] = items
    return {f"{stage}{separator}device{separator}{name}": value for name, value in found.items()}


def counts(stage, batches, time=None):
    """Return the totals after ``batches`` batches of two samples."""
    return {f"{stage}/time": float(time or batches), f"{stage}/batches": batches, f"{stage}/samples": 2 * batches}


def test_training_with_lengths_and_a_separator(run):
    monitor = ThroughputMonitor(samples, length_fn=torch.numel, window_size=4, separator="|")
    rows = run(monitor, "fit", every=1, limit_val_batches=0)
    totals = [
        {"train|time": n, "train|batches": n, "train|samples": 2 * n, "train|lengths": 16 * n, "epoch": 0}
        for n in (1, 2, 3, 4, 5)
    ]
    full = rates("train", "|", 16.0)
    assert rows == [(n, row if n < 3 else {**row, **full}) for n, row in enumerate(totals)]


def test_accumulation_logs_where_the_window_ends(run):
    rows = run(
        ThroughputMonitor(samples, window_size=3), "fit", batches=7, accumulate_grad_batches=2, limit_val_batches=0
    )
    full = rates("train")
    assert rows == [
        (1, {**counts("train", 4), **full, "epoch": 0}),
        (3, {**counts("train", 7), **full, "epoch": 0}),  # the window of the last batch is short
    ]


def test_validation_has_its_rows_and_takes_no_time_from_training(run):
    rows = run(
        ThroughputMonitor(samples, window_size=3),
        "fit",
        batches=6,
        max_epochs=2,
        val_check_interval=3,
        limit_val_batches=4,
    )
    full, validated = rates("train"), rates("validate")

    def validation(step):
        return [(step + 2, counts("validate", 2)), (step + 4, {**counts("validate", 4), **validated})]

    def training(step, batches, epoch, *, with_rates=True):
        return [(step, {**counts("train", batches), **(full if with_rates else {}), "epoch": epoch})]

    assert rows == [
        *training(1, 2, 0, with_rates=False),
        *validation(0),
        *training(3, 4, 0),
        *training(5, 6, 0),
        *validation(4),
        *training(7, 8, 1),
        *validation(8),
        *training(9, 10, 1),
        *training(11, 12, 1),
        *validation(12),
    ]


@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
def test_other_entry_points_go_on_over_calls(entry, run):
    rows = run(ThroughputMonitor(samples, window_size=3), entry, entry)
    full = rates(entry)
    assert rows == [
        (2, counts(entry, 2)),
        (4, {**counts(entry, 4), **full}),
        (7, counts(entry, 7, time=2)),
        (9, {**counts(entry, 9, time=4), **full}),
    ]


def test_a_second_fit_begins_anew(run):
    monitor = ThroughputMonitor(samples)
    run(monitor, "fit", limit_val_batches=0)
    rows = run(monitor, "fit", limit_val_batches=0)
    assert rows[-1] == (3, {**counts("train", 4), "epoch": 0})


def test_nothing_is_done_where_nothing_is_logged(run):
    def fails(batch):
        raise AssertionError("called")

    assert run(ThroughputMonitor(fails), "fit", "validate", every=0) == []


def test_batches_that_differ_in_size(run, tmp_path):
    class Ragged(Uncounted):
        def train_dataloader(self):
            return DataLoader([torch.randn(size, 8) for size in (1, 5, 2, 8)], batch_size=None)

    monitor, logger = ThroughputMonitor(samples, window_size=2), Rows(tmp_path)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=monitor, logger=logger, log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Ragged())
    assert [row["train/samples"] for _, row in logger.rows] == [1, 6, 8, 16]


def test_values_are_readable_from_the_trainer_without_a_logger(tmp_path):
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=ThroughputMonitor(samples, window_size=2), logger=False,
        log_every_n_steps=1, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Uncounted(), loader())
    assert trainer.logged_metrics["train/samples"] == 10
    assert trainer.logged_metrics["train/device/samples_per_sec"] > 0
    assert "train/device/mfu" not in trainer.logged_metrics  # nobody knows what this CPU can do


def test_a_module_that_does_not_know_its_operations(run):
    class Silent(Module):
        flops_per_batch = None

    rows = run(ThroughputMonitor(samples, window_size=2), "fit", module=Silent(), limit_val_batches=0)
    assert set(rows[-1][1]) == {
        "train/time", "train/batches", "train/samples", "train/device/batches_per_sec", "train/device/samples_per_sec",
        "epoch",
    }  # fmt: skip


def test_operations_are_counted_in_the_first_step_if_asked(run):
    rows = run(
        ThroughputMonitor(samples, window_size=2, count_flops=True), "fit", module=Uncounted(), limit_val_batches=0
    )
    # forward and the product for the gradient of the weights, each of 2 x 8 x 2
    assert rows[-1][1]["train/device/flops_per_sec"] == 2 * 2 * 2 * 8 * 2


def test_no_counter_stays_behind_when_the_first_step_fails(run):
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    class Fails(Uncounted):
        def training_step(self, batch, batch_idx):
            assert _get_current_dispatch_mode() is not None
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run(ThroughputMonitor(samples, count_flops=True), "fit", module=Fails(), limit_val_batches=0)
    assert _get_current_dispatch_mode() is None


def test_the_wait_for_data_is_a_share_of_the_time(run, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(throughput_monitor.time, "monotonic", lambda: now[0])

    class Slow(Uncounted):
        def training_step(self, batch, batch_idx):
            now[0] += 3.0
            return super().training_step(batch, batch_idx)

        def train_dataloader(self):
            return Loader()

    class Loader:
        def __len__(self):
            return 8

        def __iter__(self):
            for _ in range(8):
                now[0] += 1.0
                yield torch.randn(2, 8)

    rows = []

    def fit(monitor, **arguments):
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=1, callbacks=monitor, logger=False, log_every_n_steps=2,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, **arguments,
        )  # fmt: skip
        monkeypatch.setattr(trainer, "record", lambda row, step: rows.append(row))
        rows.clear()
        trainer.fit(Slow())
        return [row.get("train/data_wait") for row in rows]

    # the loader looks ahead by a batch, before the first hook: of the first two batches only the second was waited for
    assert fit(ThroughputMonitor(samples)) == pytest.approx([0.25] * 4, abs=0.1)
    assert fit(ThroughputMonitor(samples))[1:3] == [0.25, 0.25]
    assert fit(ThroughputMonitor(samples, data_wait=False)) == [None] * 4
    assert fit(ThroughputMonitor(samples), semantics="lightning") == [None] * 4
    assert fit(ThroughputMonitor(samples, data_wait=True), semantics="lightning")[1:3] == [0.25, 0.25]


def test_a_resumed_run_goes_on_with_its_totals(run, tmp_path):
    def checkpointing():
        return ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)

    more = {"limit_val_batches": 0, "enable_checkpointing": True, "every": 1}
    whole = run(ThroughputMonitor(samples), "fit", callbacks=[checkpointing()], **more)
    monitor, logger = ThroughputMonitor(samples), Rows(tmp_path)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[monitor, checkpointing()], logger=logger, log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Uncounted(), loader(), ckpt_path=tmp_path / "step=3.ckpt")
    names = ("train/batches", "train/samples")
    assert [(step, [row[name] for name in names]) for step, row in logger.rows] == [
        (step, [row[name] for name in names]) for step, row in whole[3:]
    ]
    assert logger.rows[0][1]["train/time"] > 3  # three seconds of the ticking clock are in the checkpoint


class Queue:
    """Stands for a device: marks are passed in order when ``run`` lets them."""

    def __init__(self):
        self.now = 0.0
        self.ran = 0
        self.marks = []

    def stamp(self):
        self.marks.append(len(self.marks))
        return self.marks[-1]

    def passed(self, mark):
        return mark < self.ran

    def between(self, earlier, later):
        assert later < self.ran, "a mark was read that the device has not passed"
        return 2.0 * (later - earlier)


def test_on_a_device_only_what_it_has_done_is_told():
    device = Queue()
    meter = _Meter(Throughput(window_size=2), device)
    meter.start()
    for _ in range(3):
        meter.count(4, None, None)
    assert meter.throughput.compute() == {}
    device.ran = 3  # the start and two batches
    meter.count(4, None, None)
    assert meter.throughput.compute() == {
        "time": 4.0, "batches": 2, "samples": 8, "device/batches_per_sec": 0.5, "device/samples_per_sec": 2.0,
    }  # fmt: skip
    meter.leave_out(meter.last, device.stamp())  # a validation
    meter.count(4, None, None)
    device.ran = 10
    meter.count(4, None, None)
    found = meter.throughput.compute()
    assert (found["batches"], found["time"]) == (6, 12.0)


def test_the_times_of_a_device_stay_exact_over_days():
    """A device tells milliseconds in 32 bits: after a day, those since the run began are 8 ms apart."""

    class Days(Queue):
        def between(self, earlier, later):
            return struct.unpack("f", struct.pack("f", 1000 * self.times[later] - 1000 * self.times[earlier]))[0] / 1000

    device = Days()
    meter = _Meter(Throughput(window_size=2), device)
    device.ran, device.times = 99, [0.0, 100_000.0, 100_000.003, 100_000.006]
    meter.start(before=1.0)
    for _ in range(3):
        meter.count(4, None, None)
    assert meter.throughput.compute()["device/batches_per_sec"] == pytest.approx(1000 / 3, rel=1e-4)
    assert meter.time == pytest.approx(100_001.006, abs=1e-3)


def test_marks_of_a_device_are_its_events(monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.calls = deque()

        def record(self):
            self.calls.append("record")

        def query(self):
            return False

        def elapsed_time(self, other):
            return 1500.0

    monkeypatch.setattr(torch, "get_device_module", lambda device: type("module", (), {"Event": Event}))
    clock = _DeviceClock(torch.device("cuda"))
    mark = clock.stamp()
    assert list(mark.calls) == ["record"]
    assert clock.passed(mark) is False
    assert clock.between(mark, clock.stamp()) == 1.5


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("32-true", torch.float32), ("64-true", torch.float64), ("16-mixed", torch.float16), ("16-true", torch.float16),
        ("bf16-mixed", torch.bfloat16), ("bf16-true", torch.bfloat16),
    ],
)  # fmt: skip
def test_dtype_of_a_precision(precision, dtype):
    assert _dtype(precision) is dtype


def test_bad_arguments():
    with pytest.raises(MisconfigurationException, match=r"ThroughputMonitor\(batch_size_fn=32\)"):
        ThroughputMonitor(32)
    with pytest.raises(MisconfigurationException, match=r"ThroughputMonitor\(length_fn='numel'\)"):
        ThroughputMonitor(samples, "numel")
    with pytest.raises(MisconfigurationException, match="window_size=1"):
        ThroughputMonitor(samples, window_size=1)
    with pytest.raises(TypeError, match="windowsize"):
        ThroughputMonitor(samples, windowsize=3)
