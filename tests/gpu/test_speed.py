# SPDX-License-Identifier: Apache-2.0
"""What makes training fast on one GPU, and that it changes no result: copies ahead, and CUDA graphs. O2 of PAINS.md."""

from __future__ import annotations

import copy
import gc
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.loggers import CSVLogger
from leyden.loops.speed.ahead import SMALL, Ahead, Lane
from leyden.loops.speed.graphs import WARMUP, CudaGraphs
from leyden.tree import move_to


def trainer(folder: Path, **arguments: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cuda", "devices": 1, "max_epochs": 2, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(folder),
    }  # fmt: skip
    return L.Trainer(**{**defaults, **arguments})


def reasons(caplog: Any) -> list[str]:
    begin = "Trainer(cuda_graphs=True): the steps run eagerly, without a graph: "
    found = [record.getMessage() for record in caplog.records if record.getMessage().startswith(begin)]
    return [text.removeprefix(begin) for text in found]


class Model(L.LightningModule):
    """A few layers, dropout, five metrics, one of them on the bar, an optimizer and a schedule that steps with it."""

    def __init__(self, kind: str = "adam", scheduled: bool = True, width: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 4))
        self.kind, self.scheduled = kind, scheduled

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self.net(x)
        loss = nn.functional.cross_entropy(logits, y)
        self.log("loss", loss, prog_bar=True)
        self.log("mean", logits.mean(), on_step=True, on_epoch=True)
        self.log("most", logits.detach().max(), reduce_fx="max", on_step=False, on_epoch=True)
        self.log("number", 2.5)
        self.log_dict({"norm": self.net[0].weight.norm()})
        return loss

    def configure_optimizers(self) -> Any:
        if self.kind == "adam":
            optimizer: Any = torch.optim.AdamW(self.parameters(), lr=0.01)
        else:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        if not self.scheduled:
            return optimizer
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10, gamma=0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def data(samples: int, width: int = 64) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(samples, width, generator=generator)
    return TensorDataset(x, torch.randint(4, (samples,), generator=generator))


def fit(folder: Path, module: Any, loader: Any = None, **arguments: Any) -> L.Trainer:
    L.seed_everything(5, verbose=False)
    run = trainer(folder, **arguments)
    run.fit(module, loader or DataLoader(data(1000), batch_size=64, shuffle=True))
    return run


def seeded(make: Any) -> Any:
    torch.manual_seed(1)
    return make()


def assert_same(first: Any, second: Any) -> None:
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


# --- O2 -------------------------------------------------------------------------------------------------------------


class Strict(L.Callback):
    """Turns every wait for the device into an error, but where a row is due and in the first ``free`` steps."""

    def __init__(self, every: int, free: int) -> None:
        self.every, self.free, self.strict = every, free, 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx >= self.free:
            torch.cuda.set_sync_debug_mode("error")
            self.strict += 1

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % self.every == 0:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("bar", [False, True])
@pytest.mark.parametrize("replays", [False, True])
def test_O2_a_hundred_steps_wait_for_the_device_only_where_a_row_is_due(
    bar: bool, replays: bool, tmp_path: Path, capsys: Any
) -> None:
    # a collate function of its own keeps the data in host memory, so that batches are copied
    loader = DataLoader(data(100 * 64, 512), batch_size=64, collate_fn=list_of_both)
    strict = Strict(25, WARMUP + 1 if replays else 1)
    module = seeded(lambda: Model(width=512))
    try:
        run = fit(
            tmp_path, module, loader, max_epochs=1, gradient_clip_val=0.5,
            log_every_n_steps=25, logger=CSVLogger(tmp_path), enable_progress_bar=bar, callbacks=[strict],
            cuda_graphs=replays,
        )  # fmt: skip
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.global_step == 100
    assert strict.strict == 100 - strict.free
    assert [step for step, _ in run.history.column("loss")] == [24, 49, 74, 99]


# --- copies ahead ------------------------------------------------------------------------------------------------------


class Heavy(L.LightningModule):
    """Keeps the device busy for some milliseconds a step, with large batches of which it uses a little."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4096, 4096) / 64)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = batch[:4096, :4096]
        for _ in range(12):
            x = x @ self.weight
        return x.mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


class Pinned:
    """Ten large batches in pinned memory, over and over."""

    def __init__(self, count: int) -> None:
        self.batches = [torch.randn(4096, 4096).pin_memory() for _ in range(3)]
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Any:
        return (self.batches[index % 3] for index in range(self.count))


def overlap(folder: Path, **arguments: Any) -> list[float]:
    """For each large copy to the device: which part of it ran while some kernel ran too."""
    batches = Pinned(12)
    trainer(folder, max_epochs=1, **arguments).fit(Heavy(), batches)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        trainer(folder, max_epochs=1, **arguments).fit(Heavy(), batches)
        torch.cuda.synchronize()
    path = folder / "trace.json"
    profile.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("ph") == "X"]
    kernels = [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "kernel"]
    copies = [
        (e["ts"], e["ts"] + e["dur"])
        for e in events
        if e.get("cat") == "gpu_memcpy" and "HtoD" in e["name"] and e["args"].get("bytes", 0) == 4096 * 4096 * 4
    ]
    # the first is that of the weights, where they are as large
    parts = []
    for begin, end in copies:
        shared = sum(max(0.0, min(end, stop) - max(begin, start)) for start, stop in kernels)
        parts.append(shared / (end - begin))
    return parts


def test_copies_run_beside_the_step_before(tmp_path: Path) -> None:
    ahead, plain = overlap(tmp_path), overlap(tmp_path, fast_data=False)
    assert sum(part > 0.5 for part in ahead) >= 8, ahead
    assert sum(part > 0.5 for part in plain) <= 1, plain


@pytest.mark.parametrize("pins", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_copies_ahead_change_no_result(pins: bool, workers: int, tmp_path: Path) -> None:
    modules = []
    for fast in (False, True):
        module = seeded(lambda: Model("sgd", width=512))
        loader = DataLoader(
            data(1000, 512), batch_size=64, shuffle=True, pin_memory=pins, num_workers=workers, collate_fn=list_of_both
        )
        fit(tmp_path, module, loader, fast_data=fast, accumulate_grad_batches=2)
        modules.append(module)
    assert_same(*modules)


def list_of_both(samples: Any) -> Any:
    return [torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples])]


@pytest.mark.parametrize("pinned", [False, True])
def test_the_host_may_be_far_ahead_and_batches_may_be_kept_and_changed(pinned: bool) -> None:
    device = torch.device("cuda", 0)
    bring = Ahead(device, Lane(device))
    kept, sums = [], []
    for value in range(30):
        source = {"x": torch.full((SMALL // 4,), float(value)), "y": [torch.arange(value, value + SMALL), "text"]}
        if pinned:
            source["x"] = source["x"].pin_memory()
        batch = bring(source)
        del source
        kept.append(batch)
        torch.cuda._sleep(5_000_000)  # a step of some milliseconds, which nobody waits for
        sums.append(batch["x"].sum())
        batch["x"] += 1
        scratch = [torch.full_like(batch["x"], -1.0) for _ in range(4)]  # takes what memory is free
        del scratch
    torch.cuda.synchronize()
    for value, batch in enumerate(kept):
        assert sums[value].item() == value * (SMALL // 4)
        assert bool((batch["x"] == value + 1).all())
        assert torch.equal(batch["y"][0].cpu(), torch.arange(value, value + SMALL))
    assert len({batch["x"].data_ptr() for batch in kept}) == 30


def test_memory_of_the_device_does_not_grow_with_the_lead_of_the_host() -> None:
    device = torch.device("cuda", 0)
    bring, sources = Ahead(device, Lane(device)), [torch.randn(1 << 20).pin_memory() for _ in range(3)]
    bring(sources[0])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for turn in range(50):
        batch = bring(sources[turn % 3])
        torch.cuda._sleep(2_000_000)
        del batch
    assert torch.cuda.max_memory_allocated() - before <= 3 * sources[0].nbytes
    torch.cuda.synchronize()


def test_strides_are_those_of_an_ordinary_copy() -> None:
    device = torch.device("cuda", 0)
    base = torch.randn(512, 512)
    images = torch.randn(8, 3, 64, 64).to(memory_format=torch.channels_last)
    bring = Ahead(device, Lane(device))
    for source in (base, base.t(), base[:, ::2], base[:1].expand(512, -1), images):
        for _ in range(3):
            mine, theirs = bring(source), move_to(source, device)
            assert mine.stride() == theirs.stride()
            assert torch.equal(mine, theirs)


# --- CUDA graphs -------------------------------------------------------------------------------------------------------


def replays(monkeypatch: Any) -> list[int]:
    """Count how often a graph is replayed, from here on."""
    count = [0]
    record = CudaGraphs.record

    def counted(self: CudaGraphs, region: Any) -> Any:
        replay, result = record(self, region)

        def again() -> None:
            count[0] += 1
            replay()

        return again, result

    monkeypatch.setattr(CudaGraphs, "record", counted)
    return count


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(("kind", "scheduled"), [("sgd", False), ("sgd", True), ("adam", False), ("adam", True)])
def test_a_graphed_fit_equals_an_eager_one(
    kind: str, scheduled: bool, precision: str, tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    """SGD to the last bit, dropout included; Adam computes its step on the device, where eager code does in Python."""
    count = replays(monkeypatch)
    runs = []
    for graphs in (False, True):
        module = seeded(lambda: Model(kind, scheduled))
        with caplog.at_level(logging.INFO):
            run = fit(tmp_path, module, cuda_graphs=graphs, gradient_clip_val=0.5, precision=precision)
        runs.append((module, run))
    assert reasons(caplog) == []
    assert count[0] == 30 - WARMUP  # 1000 samples: 15 whole batches and a ragged one in each of two epochs
    (plain, eager), (module, run) = runs
    if kind == "sgd":
        assert_same(plain, module)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-2, atol=1e-3)
    assert run.global_step == eager.global_step == 32
    for name in ("loss", "mean_step", "mean_epoch", "most", "norm", "number"):
        mine, theirs = run.history.column(name), eager.history.column(name)
        assert [step for step, _ in mine] == [step for step, _ in theirs]
        assert [value for _, value in mine] == pytest.approx([value for _, value in theirs], rel=0.05, abs=1e-3)
    rates = [[group["lr"] for group in one.optimizers[0].param_groups] for one in (run, eager)]
    assert rates[0] == rates[1]


class Waits(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * (1.0 if loss.item() > 0 else 0.5)


class OwnGenerator(Model):
    """Draws from a generator that no graph knows: only the capture itself finds out."""

    def setup(self, stage: str) -> None:
        self.generator = torch.Generator("cuda").manual_seed(1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        noise = torch.randn(x.shape, generator=self.generator, device="cuda")
        return super().training_step((x + noise, y), batch_idx)


class Raises(Model):
    """Fails while it is captured, and only then."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if torch.cuda.is_current_stream_capturing():
            torch.ones((), device="cuda").item()
        return loss


@pytest.mark.parametrize(
    ("make", "why"),
    [
        # a torch that makes every generator known to the graph can capture it
        (Waits, "the step waits for the device"),
        (OwnGenerator, "it cannot be captured"),
        (Raises, "it cannot be captured"),
    ],
)
def test_what_cannot_be_captured_trains_eagerly_and_loses_nothing(
    make: Any, why: str, tmp_path: Path, caplog: Any
) -> None:
    runs = []
    for graphs in (False, True):
        module = seeded(lambda: make("sgd"))
        with caplog.at_level(logging.INFO):
            fit(tmp_path, module, cuda_graphs=graphs, gradient_clip_val=0.5)
        runs.append(module)
    # a torch that makes every generator known to the graph can capture the second
    assert [reason.startswith(why) for reason in reasons(caplog)] in ([True], [] if make is OwnGenerator else [True])
    assert_same(*runs)
    # the generator and the allocator are as if nothing had been tried
    assert torch.nn.functional.dropout(torch.ones(8, device="cuda")).isfinite().all()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_R1_a_graphed_fit_resumes_exactly(kind: str, tmp_path: Path) -> None:
    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step in (2, 10, 20):
                trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    module = seeded(lambda: Model(kind))
    fit(tmp_path, module, cuda_graphs=True, callbacks=[Saves()])
    for step in (2, 10, 20):
        resumed = seeded(lambda: Model(kind))
        trainer(tmp_path, cuda_graphs=True).fit(
            resumed, DataLoader(data(1000), batch_size=64, shuffle=True), ckpt_path=tmp_path / f"{step}.ckpt"
        )
        assert_same(module, resumed)


def test_a_checkpoint_of_a_graphed_fit_goes_on_without_graphs_and_on_the_cpu(tmp_path: Path) -> None:
    run = fit(tmp_path, seeded(Model), cuda_graphs=True)
    path = tmp_path / "done.ckpt"
    run.save_checkpoint(path)
    states = torch.load(path, weights_only=True)["optimizer_states"]
    assert [(group["capturable"], type(group["lr"])) for group in states[0]["param_groups"]] == [(False, float)]
    for arguments in ({}, {"accelerator": "cpu"}, {"cuda_graphs": True}):
        module = seeded(Model)
        trainer(tmp_path, max_epochs=3, **arguments).fit(module, DataLoader(data(1000), batch_size=64), ckpt_path=path)
        assert all(weight.isfinite().all() for weight in module.parameters())


def test_validation_between_epochs_and_a_frozen_layer(tmp_path: Path, monkeypatch: Any) -> None:
    class Freezes(Model):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

        def on_train_epoch_start(self) -> None:
            self.net[0].requires_grad_(self.current_epoch != 1)

    count = replays(monkeypatch)
    modules = []
    for graphs in (False, True):
        L.seed_everything(5, verbose=False)
        module = seeded(lambda: Freezes("sgd"))
        train = DataLoader(data(640), batch_size=64, shuffle=True)
        trainer(tmp_path, max_epochs=3, cuda_graphs=graphs).fit(module, train, DataLoader(data(200), batch_size=64))
        modules.append(module)
    assert count[0] == 3 * (10 - WARMUP)
    assert_same(*modules)


def test_E1_the_memory_of_a_graph_is_given_back(tmp_path: Path) -> None:
    def once() -> None:
        fit(tmp_path, seeded(Model), cuda_graphs=True)

    once()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    gc.disable()
    try:
        once()
        assert torch.cuda.memory_allocated() == before
    finally:
        gc.enable()


def test_outputs_and_gradients_that_hooks_see(tmp_path: Path) -> None:
    class Keeps(L.Callback):
        def __init__(self) -> None:
            self.outputs: list[Tensor] = []
            self.copies: list[Tensor] = []
            self.norms: list[Tensor] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.outputs.append(outputs["loss"])
            self.copies.append(copy.deepcopy(outputs["loss"]))
            self.norms.append(torch.stack([p.grad.norm() for p in pl_module.parameters()]))

    seen = []
    for graphs in (False, True):
        keeps = Keeps()
        fit(tmp_path, seeded(lambda: Model("sgd")), cuda_graphs=graphs, callbacks=[keeps])
        assert torch.equal(torch.stack(keeps.outputs), torch.stack(keeps.copies))
        seen.append((torch.stack(keeps.outputs), torch.stack(keeps.norms)))
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])
