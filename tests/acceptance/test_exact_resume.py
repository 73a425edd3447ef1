# SPDX-License-Identifier: Apache-2.0
"""A run that goes on from any checkpoint is, from there, the run that was never interrupted: bit for bit."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

import leyden as L
import resume_parts as parts
from leyden.data import CombinedLoader
from leyden.errors import CheckpointError, LeydenWarning
from leyden.precision import MixedPrecision
from resume_script import VARIANTS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*worker processes in total:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]
Make = Callable[[], tuple[Any, Any, Any]]


@pytest.fixture(autouse=True)
def _seeding() -> Iterator[None]:
    """Leave no seed of a test in the environment."""
    names = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")
    before = {name: os.environ.get(name) for name in names}
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def _fit(make: Make, callbacks: list[Any], path: str | None = None, **options: Any) -> tuple[Any, L.Trainer, Any]:
    model, train, validation = make()
    defaults = {"max_epochs": 2, "val_check_interval": 3, "log_every_n_steps": 1}
    if "plugins" in options:  # each run has its own
        options["plugins"] = options["plugins"]()
    trainer = L.Trainer(
        **{**defaults, **options}, callbacks=callbacks, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(model, train, validation, ckpt_path=path)
    return model, trainer, train


def _seed(seed: int, workers: bool = False) -> None:
    L.seed_everything(seed, workers=workers, verbose=False)


def _generators() -> Any:
    numpy = np.random.get_state(legacy=False)
    return torch.get_rng_state().tolist(), random.getstate(), numpy["state"]["key"].tolist(), numpy["state"]["pos"]


def _check(
    make: Make, folder: Path, every: int = 1, samples: bool = False, drawing: bool = True, **options: Any
) -> L.Trainer:
    """Run through, saving everywhere; go on from every ``every``-th file, and compare all that can be compared."""
    _seed(7, samples)
    saver = parts.SaveEverywhere(folder)
    careless = [parts.Drawing()] if drawing else []
    model, whole, _ = _fit(make, [*careless, parts.Watch(), saver], **options)
    generators, rows = _generators(), [dict(row) for row in whole.history]
    assert len(saver.saved) >= 6
    for path, (events, written) in list(saver.saved.items())[::every]:
        _seed(99, samples) if not samples else random.seed(99)
        again, resumed, _ = _fit(make, [*careless, parts.Watch()], path, **options)
        assert again.events == model.events[events:], path
        assert [dict(row) for row in resumed.history] == rows[written:], path
        for name, value in model.state_dict().items():
            assert torch.equal(value, again.state_dict()[name]), path
        assert _generators() == generators, path
        assert resumed.progress == whole.progress
        assert {k: v.item() for k, v in resumed.callback_metrics.items()} == {
            k: v.item() for k, v in whole.callback_metrics.items()
        }
    return whole


def _simple(kind: str = "shuffle", module: Any = parts.Recording, **more: Any) -> Make:
    return lambda: (module(), parts.loader(kind, **more), parts.loader("shuffle", size=4))


@pytest.mark.filterwarnings("ignore:Metric `SpearmanCorrcoef` will save all targets")
def test_R1_metric_objects_go_on_with_what_they_have_counted(tmp_path: Path) -> None:
    torchmetrics = pytest.importorskip("torchmetrics")

    class Measured(parts.Recording):
        def __init__(self) -> None:
            super().__init__()
            self.mean = torchmetrics.MeanMetric()
            self.rank = torchmetrics.SpearmanCorrCoef()  # keeps all it has seen, in lists

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.mean(loss)
            self.log("mean", self.mean, on_step=True, on_epoch=True)
            self.rank.update(torch.rand(2), torch.rand(2))
            self.log("rank", self.rank, on_step=False, on_epoch=True)
            return loss

    whole = _check(_simple(module=Measured), tmp_path)
    assert {"mean_step", "mean_epoch", "rank"} <= {name for row in whole.history for name in row}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_R1_the_scale_of_a_gradient_scaler_goes_on(tmp_path: Path, accumulate: int) -> None:
    scales: list[list[float]] = []

    class Scaled(parts.Recording):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            scales[-1].append(self.trainer.precision_plugin.scaler.get_scale())
            # too large to be stored in 16 bits: that step is skipped, and the scale shrinks
            return loss * (1e30 if self.trainer.progress.batches == 4 else 1.0)

    def scaler() -> MixedPrecision:
        scales.append([])
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2))

    _check(_simple(module=Scaled), tmp_path, plugins=scaler, accumulate_grad_batches=accumulate)
    whole, *resumed = scales
    turns = {(after > before) - (after < before) for before, after in pairwise(whole)}
    assert turns == {-1, 0, 1}  # it has shrunk, and grown
    assert len(resumed) >= 6
    for part in (part for part in resumed if part):
        # what a step has found out is waiting for the next loss, but not where a checkpoint is written, as in the whole run
        assert part[1:] == whole[len(whole) - len(part) : -1]


class Plateau(parts.Recording):
    """Its learning rate waits for a metric, of each step or of the epoch."""

    interval: ClassVar[str] = "step"

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, mode="max")
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": self.interval, "monitor": "loss"},
        }


class EpochPlateau(Plateau):
    interval = "epoch"


class Manual(parts.Recording):
    """Steps two optimizers by hand, every other batch: gradients are open at any time, also between two epochs."""

    def __init__(self) -> None:
        super().__init__(manual=True, optimizers=2)


class Two(parts.Recording):
    def __init__(self) -> None:
        super().__init__(optimizers=2)


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (parts.Recording, {"max_epochs": 3, "accumulate_grad_batches": 3, "val_check_interval": 4}),
        (parts.Recording, {"val_check_interval": 0.5, "limit_train_batches": 6}),
        (parts.Recording, {"val_check_interval": "2 steps", "max_steps": 9, "max_epochs": -1}),
        (parts.Recording, {"reload_dataloaders_every_n_epochs": 2, "max_epochs": 3}),
        (parts.Recording, {"val_check_interval": 5, "check_val_every_n_epoch": None}),
        (parts.Recording, {"check_val_every_n_epoch": 2, "num_sanity_val_steps": 0, "max_epochs": 3}),
        (parts.Recording, {"semantics": "lightning", "limit_val_batches": 1}),
        (Plateau, {"accumulate_grad_batches": 2}),
        (EpochPlateau, {"val_check_interval": 1.0}),
        (Manual, {}),
        (Two, {"accumulate_grad_batches": 3}),
    ],
)
def test_R1_a_resumed_run_is_the_uninterrupted_run(tmp_path: Path, module: Any, options: dict[str, Any]) -> None:
    _check(_simple(module=module), tmp_path, **options)


KINDS = [
    "plain", "lazy", "eager", "remembers", "subset", "weighted", "replacement", "own", "list", "buckets", "unsized",
    "nested", "single", "generator", "moves", "stream", "batches",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_R1_with_every_kind_of_loader(tmp_path: Path, kind: str) -> None:
    _check(_simple(kind), tmp_path, every=2, limit_train_batches=9 if kind in ("own", "replacement") else 1.0)


def _working(kind: str, workers: int, persistent: bool) -> Make:
    more = {"num_workers": workers, "persistent_workers": persistent}
    validation = {"num_workers": 1, "persistent_workers": True} if persistent else {}
    return lambda: (parts.Recording(), parts.loader(kind, **more), parts.loader("shuffle", size=4, **validation))


@pytest.mark.parametrize(
    ("kind", "persistent"),
    [("shuffle", False), ("shuffle", True), ("lazy", True), ("buckets", False), ("single", True), ("moves", True)],
)
def test_R1_with_workers_that_draw_random_numbers(tmp_path: Path, kind: str, persistent: bool) -> None:
    _check(_working(kind, 2, persistent), tmp_path, every=5 if kind != "single" else 9)


@pytest.mark.parametrize(
    ("kind", "samples"),
    [("shuffle", False), ("combined", False), ("lazy", False), ("buckets", False), ("eager", False), ("shuffle", True)],
)
def test_R1_I3_with_workers_that_are_kept(tmp_path: Path, kind: str, samples: bool) -> None:
    notes = tmp_path / "notes"

    def make() -> tuple[Any, Any, Any]:
        validation = parts.loader("shuffle", data=parts.Noting(4, notes), size=4, num_workers=1)
        if kind == "combined":  # one of them starts again in the middle of the epoch
            pair = [parts.loader("shuffle", data=parts.Noting(n, notes), size=n, num_workers=1) for n in (14, 6)]
            return parts.Recording(), CombinedLoader(dict(zip("ab", pair, strict=True)), "max_size_cycle"), validation
        return parts.Recording(), parts.loader(kind, data=parts.Noting(14, notes), num_workers=1), validation

    folder = tmp_path / "saved"
    folder.mkdir()
    _check(make, folder, every=5, samples=samples)
    runs = len(list(folder.glob("*"))) // 5 + 2
    assert len(set(notes.read_text().split())) <= (3 if kind == "combined" else 2) * runs + 2


def _combined(mode: str, workers: int = 0) -> Make:
    more = {"num_workers": workers, "persistent_workers": True} if workers else {}

    def make() -> tuple[Any, Any, Any]:
        loaders = {
            "a": parts.loader("shuffle", **more),
            "b": parts.loader("buckets", size=5, **more),
            "c": parts.loader("eager", size=9),
        }
        return parts.Recording(), CombinedLoader(loaders, mode), parts.loader("shuffle", size=4)

    return make


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
def test_R1_with_several_loaders(tmp_path: Path, mode: str) -> None:
    _check(_combined(mode), tmp_path, val_check_interval=1.0, accumulate_grad_batches=2)


def test_R1_with_several_loaders_and_workers_that_start_again(tmp_path: Path) -> None:
    _check(_combined("max_size_cycle", 1), tmp_path, every=4, val_check_interval=1.0)


class Draws(parts.Recording):
    """Draws two batches for each step, by itself."""

    def training_step(self, dataloader_iter: Any) -> Any:
        loss = torch.zeros(())
        for _ in range(2):
            batch, batch_idx, _ = next(dataloader_iter, (None, 0, 0))
            if batch is not None:
                loss = loss + super().training_step(batch, batch_idx)
        return loss


@pytest.mark.parametrize("kind", ["shuffle", "unsized", "combined"])
def test_R1_where_the_step_draws_its_batches(tmp_path: Path, kind: str) -> None:
    def make() -> tuple[Any, Any, Any]:
        _, train, validation = _combined("max_size_cycle")() if kind == "combined" else _simple(kind)()
        return Draws(), train, validation

    _check(make, tmp_path, val_check_interval=1.0, max_epochs=3)


def test_R1_with_streams_of_samples(tmp_path: Path) -> None:
    _check(_simple("shuffle"), tmp_path, samples=True, every=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_R1_saved_when_an_epoch_had_begun_and_none_of_its_batches_was_done(tmp_path: Path, workers: int) -> None:
    class AtFirst(L.Callback):
        """As a run that a signal ends while it waits for the first batch."""

        order: ClassVar[int] = -100

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")
                begun[trainer.current_epoch] = len(pl_module.events)

    begun: dict[int, int] = {}
    make = _simple(size=14, data=parts.Quiet(14), num_workers=workers)
    _seed(7)
    model, whole, _ = _fit(make, [AtFirst()])
    generators = _generators()
    assert list(begun) == [0, 1]
    for epoch, events in begun.items():
        _seed(99)
        again, resumed, _ = _fit(make, [], str(tmp_path / f"{epoch}.ckpt"))
        assert again.events == model.events[events:]
        assert _generators() == generators
        assert resumed.progress == whole.progress


@pytest.mark.filterwarnings("ignore:overfit_batches needs the same batches")
def test_R1_overfit_batches(tmp_path: Path) -> None:
    _check(_simple(), tmp_path, overfit_batches=4)


def test_R1_loaders_whose_hooks_draw_random_numbers_are_the_same_after_a_resume(tmp_path: Path) -> None:
    class Splits(parts.Recording):
        def train_dataloader(self) -> Any:
            return parts.loader("shuffle", data=torch.utils.data.random_split(parts.Noisy(20), [14, 6])[0])

        def val_dataloader(self) -> Any:
            return parts.loader("plain", data=torch.utils.data.random_split(parts.Noisy(8), [4, 4])[0])

    _check(lambda: (Splits(), None, None), tmp_path, reload_dataloaders_every_n_epochs=1, max_epochs=3)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata's affair
@pytest.mark.parametrize("data", [parts.Noisy, parts.Stream])
def test_R1_torchdatas_loader_goes_on_by_its_own_state(tmp_path: Path, data: Any) -> None:
    module = pytest.importorskip("torchdata.stateful_dataloader")

    def make() -> tuple[Any, Any, Any]:
        shuffle = True if data is parts.Noisy else None
        train = module.StatefulDataLoader(data(14), batch_size=2, shuffle=shuffle)
        return parts.Recording(), train, parts.loader("shuffle", size=4)

    _check(make, tmp_path, every=2, drawing=False, val_check_interval=1.0)


class SaveInValidation(parts.SaveEverywhere):
    """Saves in the middle of validations; remembers what had happened when they began."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.events = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.events = len(pl_module.events)

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if not trainer.sanity_checking:
            path = self.folder / f"{len(self.saved)}.ckpt"
            trainer.save_checkpoint(path)
            self.saved[str(path)] = (self.events, 0)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        pass

    on_train_epoch_end = on_validation_end


def test_R1_a_checkpoint_inside_a_validation_begins_that_validation_anew(tmp_path: Path) -> None:
    class Counting(parts.Recording):
        """Has a metric object of its own, which a validation fills step by step."""

        def __init__(self) -> None:
            super().__init__()
            self.seen = Counter()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.seen.update()

        def on_validation_epoch_end(self) -> None:
            self.events.append(("seen", self.seen.update_count))
            self.seen.reset()

    _seed(7)
    saver, make = SaveInValidation(tmp_path), _simple(module=Counting)
    model, _, _ = _fit(make, [parts.Drawing(), saver])
    generators = _generators()
    assert len(saver.saved) >= 8
    for path, (events, _) in saver.saved.items():
        _seed(99)
        again, _, _ = _fit(make, [parts.Drawing()], path)
        assert again.events == model.events[events:], path
        assert _generators() == generators


class Counter(torch.nn.Module):
    """The least that a metric object is."""

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def update(self) -> None:
        self._update_count += 1

    def compute(self) -> Tensor:
        return torch.tensor(float(self._update_count))

    def reset(self) -> None:
        self._update_count = 0

    @property
    def update_count(self) -> int:
        return self._update_count

    @property
    def metric_state(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("variant", ["plain", "workers"])
def test_R1_killed_after_a_step_and_gone_on_in_a_fresh_process(tmp_path: Path, variant: str) -> None:
    # R3: 5+7 is killed twice in the first epoch
    assert "exact 3/3" in _kill(tmp_path, variant, "3", "5+7", "13")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("variant", VARIANTS)
def test_R1_killed_after_every_step_and_gone_on_in_a_fresh_process(tmp_path: Path, variant: str) -> None:
    said = _kill(tmp_path, variant, "all")
    print(f"{variant}: {said}")
    last = said.split()[-1]
    assert last.split("/")[0] == last.split("/")[1]


def _kill(folder: Path, *arguments: str) -> str:
    script = Path(__file__).with_name("resume_script.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(script.parent), *sys.path])}
    done = subprocess.run(
        [sys.executable, str(script), str(folder / "runs"), *arguments],
        capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _save_after(step: int, path: Path) -> L.Callback:
    class Save(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if trainer.progress.batches == step:
                trainer.save_checkpoint(path)

    return Save()


@pytest.mark.parametrize("kind", ["shuffle", "lazy", "buckets", "single", "unsized", "batches"])
def test_R2_no_sample_that_is_skipped_is_asked_for(tmp_path: Path, kind: str) -> None:
    options = {"max_epochs": 1, "limit_val_batches": 0}
    path = tmp_path / "five.ckpt"
    _seed(7)
    _, _, train = _fit(_simple(kind), [_save_after(5, path)], **options)
    asked = train.asked if kind == "batches" else train.dataset.asked
    _, _, train = _fit(_simple(kind), [], str(path), **options)
    again = train.asked if kind == "batches" else train.dataset.asked
    assert again == asked[5 if kind in ("single", "batches") else 10 :]
    assert again


def test_R2_workers_load_no_sample_that_is_skipped(tmp_path: Path) -> None:
    class Logged(parts.Quiet):
        """Leaves a file for each sample that any process loads."""

        def __getitem__(self, index: int) -> tuple[int, Tensor]:
            (Path(os.environ["ASKED"]) / str(index)).touch()
            return super().__getitem__(index)

    path, seen = tmp_path / "four.ckpt", []
    for resume in (None, str(path)):
        os.environ["ASKED"] = str(tmp_path / f"asked-{bool(resume)}")
        Path(os.environ["ASKED"]).mkdir()
        make = _simple(data=Logged(14), num_workers=2)
        _seed(7)
        model, _, _ = _fit(make, [_save_after(4, path)], resume, max_epochs=1, limit_val_batches=0)
        seen.append({index for event in model.events for index in event[3]})
        assert {int(file.name) for file in Path(os.environ["ASKED"]).iterdir()} == seen[-1]
    del os.environ["ASKED"]
    assert len(seen[0]) == 14
    assert len(seen[1]) == 6


def test_R3_two_resumes_inside_one_epoch(tmp_path: Path) -> None:
    for kind, workers in (("shuffle", 0), ("buckets", 0), ("lazy", 2), ("moves", 0)):
        make = _working(kind, workers, persistent=False)
        _seed(7)
        model, _, _ = _fit(make, [parts.Drawing()])
        first, second = tmp_path / f"{kind}-2.ckpt", tmp_path / f"{kind}-5.ckpt"
        _seed(7)
        _fit(make, [parts.Drawing(), _save_after(2, first)])
        _seed(1)
        _fit(make, [parts.Drawing(), _save_after(5, second)], str(first))
        _seed(2)
        again, _, _ = _fit(make, [parts.Drawing()], str(second))
        assert again.events == model.events[-len(again.events) :]
        assert [event[2] for event in again.events if event[0] == "train"][0] == 5


class Numbers(IterableDataset):
    """An iterable data set that cannot tell where it stands."""

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        for i in range(12):
            yield i, torch.full((4,), float(i))


class WithState(Numbers):
    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


class Lines:
    """An iterable that is no loader."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(6):
            yield torch.tensor([i]), torch.full((1, 4), float(i))


class Stubborn(DataLoader):
    """A loader that does not look at its sampler."""

    def __iter__(self) -> Any:
        for i in range(6):
            yield torch.tensor([i]), torch.full((1, 4), float(i))

    def __len__(self) -> int:
        return 6


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: DataLoader(Numbers(), batch_size=2), "data set Numbers is iterable"),
        (lambda: DataLoader(WithState(), batch_size=2, num_workers=1), "the state of its iterable data set WithState"),
        (lambda: Lines(), "the Lines has neither an index nor state_dict"),
        (lambda: iter(list(Lines())), "a list_iterator can be gone through only once"),
        (lambda: Stubborn(parts.Quiet(12), batch_size=2), "the Stubborn does not draw from its sampler"),
    ],
)
def test_R5_a_loader_that_cannot_be_resumed_says_so_once_when_the_checkpoint_is_written(
    tmp_path: Path, make: Any, says: str
) -> None:
    options = {"max_epochs": 1, "limit_val_batches": 0}
    with pytest.warns(LeydenWarning, match=f"This checkpoint is inside an epoch .*{says}.*fetches.*drops") as caught:
        model, _, _ = _fit(
            lambda: (parts.Recording(), make(), parts.in_order(4, 2)),
            [_save_after(2, tmp_path / "2.ckpt"), _save_after(3, tmp_path / "3.ckpt")],
            **options,
        )
    assert sum("cannot be gone on with exactly" in str(w.message) for w in caught) == 1
    again, _, _ = _fit(
        lambda: (parts.Recording(), make(), parts.in_order(4, 2)), [], str(tmp_path / "3.ckpt"), **options
    )
    assert [event[2:4] for event in again.events] == [event[2:4] for event in model.events[3:]]


def test_R5_between_two_epochs_there_is_nothing_to_say(tmp_path: Path) -> None:
    class Save(L.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    def make() -> Any:
        return parts.Recording(), DataLoader(Numbers(), batch_size=2), parts.in_order(4, 2)

    _seed(7)
    model, _, _ = _fit(make, [Save()])  # warnings are errors
    again, _, _ = _fit(make, [], str(tmp_path / "0.ckpt"))
    assert again.events == model.events[-len(again.events) :]


def test_R5_a_sampler_that_draws_more_often_than_is_remembered_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leyden.data.feed.JOURNAL", 2)
    with pytest.warns(LeydenWarning, match="only its last 2 draws are remembered"):
        _fit(_simple("lazy"), [_save_after(6, tmp_path / "6.ckpt")], max_epochs=1)


def test_R6_no_validation_that_the_whole_run_would_not_have_done(tmp_path: Path) -> None:
    saver = parts.SaveEverywhere(tmp_path)
    _seed(7)
    model, _, _ = _fit(_simple(), [saver], val_check_interval=4)
    for path, (events, _) in saver.saved.items():
        again, _, _ = _fit(_simple(), [], path, val_check_interval=4)
        assert [e for e in again.events if e[0] == "val"] == [e for e in model.events[events:] if e[0] == "val"], path


# --- what has changed between checkpoint and resume is said ---------------------------------------------------------


def _saved(tmp_path: Path, step: int = 3, **more: Any) -> str:
    path = tmp_path / "saved.ckpt"
    _seed(7)
    _fit(_simple(**more), [_save_after(step, path)], max_epochs=1, limit_val_batches=0)
    return str(path)


def test_another_length_of_the_data_set_is_said(tmp_path: Path) -> None:
    path = _saved(tmp_path)
    with pytest.warns(
        LeydenWarning, match="had 14 samples .* and has 16 now: the epoch that was running goes on after 3"
    ):
        model, _, _ = _fit(_simple(size=16), [], path, max_epochs=1, limit_val_batches=0)
    assert [event[2] for event in model.events] == [3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("batch", "says", "first"), [(1, "count as 6 batches", 6), (4, "count as 1 batches. The first 2", 1)]
)
def test_another_batch_size_goes_on_after_the_same_samples(tmp_path: Path, batch: int, says: str, first: int) -> None:
    path = _saved(tmp_path)
    whole = [i for event in _order(tmp_path) for i in event]
    with pytest.warns(LeydenWarning, match=f"was 2 when the checkpoint was written and is {batch} now.*{says}"):
        model, _, _ = _fit(_simple(batch=batch), [], path, max_epochs=1, limit_val_batches=0)
    assert model.events[0][2] == first
    assert [i for event in model.events for i in event[3]] == whole[first * batch :]


def _order(tmp_path: Path) -> list[Any]:
    _seed(7)
    model, _, _ = _fit(_simple(), [], max_epochs=1, limit_val_batches=0)
    return [event[3] for event in model.events]


def test_another_batch_size_of_one_of_several_loaders_is_an_error_inside_an_epoch(tmp_path: Path) -> None:
    def make(batch: int) -> Make:
        loaders = {"a": parts.loader("shuffle", batch=batch), "b": parts.loader("plain")}
        return lambda: (parts.Recording(), loaders, parts.in_order(4, 2))

    _fit(make(2), [_save_after(3, tmp_path / "x.ckpt")], max_epochs=1)
    with (
        pytest.warns(LeydenWarning, match="The batch size"),
        pytest.raises(CheckpointError, match="batch size of a loader has changed inside an epoch"),
    ):
        _fit(make(4), [], str(tmp_path / "x.ckpt"), max_epochs=1)


def test_another_number_of_loaders_is_an_error(tmp_path: Path) -> None:
    path = _saved(tmp_path)
    two = {"a": parts.loader("shuffle"), "b": parts.loader("plain")}
    with pytest.raises(CheckpointError, match="stands in 1 training loaders, but there are 2 now"):
        _fit(lambda: (parts.Recording(), two, parts.in_order(4, 2)), [], path, max_epochs=1)


def test_workers_where_there_were_none_are_said_and_keep_the_order(tmp_path: Path) -> None:
    path = _saved(tmp_path)
    with pytest.warns(
        LeydenWarning, match="num_workers of .* was 0 when .* and is 2 now. The order of samples goes on"
    ):
        model, _, _ = _fit(_simple(num_workers=2), [], path, max_epochs=1, limit_val_batches=0)
    assert [event[3] for event in model.events] == _order(tmp_path)[3:]


def test_an_order_that_cannot_be_found_again_is_said(tmp_path: Path) -> None:
    def make(seed: int) -> Make:
        class Secret(parts.Lazy):
            def __iter__(self) -> Iterator[int]:
                return iter(torch.randperm(14, generator=torch.Generator().manual_seed(seed)).tolist())

        return lambda: (parts.Recording(), DataLoader(parts.Noisy(14), 2, sampler=Secret(14)), parts.in_order(4, 2))

    _fit(make(1), [_save_after(3, tmp_path / "x.ckpt")], max_epochs=1)
    with pytest.warns(LeydenWarning, match="do not come in the order of the run that wrote the checkpoint"):
        _fit(make(2), [], str(tmp_path / "x.ckpt"), max_epochs=1)
